//! Promise: the engine computes what the float64 reference computes, whatever the chunks, the batch and the threads.

use crate::{divergence, error};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use ternary_format::{Activation, Adapter, Encoding, Family, LowRank, ModelSpec, PackedModel};
use ternary_infer::{
    ActivationMode, CacheType, Engine, EngineOptions, GenerateOptions, Sampler, Sampling, random, reference,
};

const FAMILIES: [(Family, Activation); 6] = [
    (Family::Gpt2, Activation::Gelu),
    (Family::Gpt2, Activation::SquaredRelu),
    (Family::Llama, Activation::Swiglu),
    (Family::Llama, Activation::SquaredRelu),
    (Family::Bitnet, Activation::Swiglu),
    (Family::Bitnet, Activation::SquaredRelu),
];

fn spec(family: Family, activation: Activation) -> ModelSpec {
    ModelSpec {
        family,
        activation,
        vocab_size: 131,
        context: 300,
        d_model: 96,
        n_layers: 3,
        n_heads: 6,
        n_kv_heads: if family == Family::Gpt2 { 6 } else { 2 },
        d_ff: 160,
        tied: activation == Activation::SquaredRelu,
        norm_eps: 1e-3,
        rope_theta: 100.0,
    }
}

/// Models of every family at odd sizes, with ternary weights by row and by group, and as float twins.
fn models() -> Vec<(String, PackedModel)> {
    let mut models = Vec::new();
    for (seed, (family, activation)) in FAMILIES.into_iter().enumerate() {
        let odd = ModelSpec { d_model: 84, n_heads: 6, d_ff: 35, ..spec(family, activation) };
        let by_row = |cols| Encoding::Ternary { group: cols };
        let kinds = [
            ("by row, odd", random::model(&odd, by_row, Encoding::F32, seed as u64)),
            (
                "by 16",
                random::model(
                    &spec(family, activation),
                    |_| Encoding::Ternary { group: 16 },
                    Encoding::Q8_0,
                    7,
                ),
            ),
            ("by 7", random::model(&odd, |_| Encoding::Ternary { group: 7 }, Encoding::F16, 8)),
            ("float", random::model(&odd, |_| Encoding::F16, Encoding::F16, 9)),
        ];
        for (index, (kind, model)) in kinds.into_iter().enumerate() {
            let model = model.unwrap();
            let adapter = adapter(&model.spec, 1 + 4 * index);
            let adapted = PackedModel { adapter: Some(adapter), ..model.clone() };
            models.push((format!("{family:?} {activation:?} {kind}"), model));
            models.push((format!("{family:?} {activation:?} {kind}, adapted"), adapted));
        }
    }
    models
}

/// Pairs beside two of three matrices, which change their products as much as these are.
fn adapter(spec: &ModelSpec, rank: usize) -> Adapter {
    let rng = &mut ChaCha8Rng::seed_from_u64(rank as u64);
    let mut number = |spread: f32| rng.next_u32() as i32 as f32 / i32::MAX as f32 * spread;
    let matrices = spec.tensors().filter(|(name, shape)| name.starts_with("blk.") && shape.len() == 2);
    let chosen = matrices.enumerate().filter(|(index, _)| index % 3 < 2);
    let pairs = chosen.map(|(_, (name, shape))| {
        let [out, inputs] = [shape[0], shape[1]];
        let a = (0..rank * inputs).map(|_| number(1.0 / (inputs as f32).sqrt())).collect();
        let b = (0..out * rank).map(|_| number(1.0)).collect();
        (name, LowRank::new(rank, (rank as f64).sqrt() * 0.5, a, b).unwrap())
    });
    Adapter { pairs: pairs.collect(), ..Adapter::default() }
}

const EXACT: EngineOptions =
    EngineOptions { threads: 2, activations: ActivationMode::F32, cache: CacheType::F16, context: 4096 };
const INT8: EngineOptions = EngineOptions { activations: ActivationMode::Int8, ..EXACT };
const INT8_CACHE: EngineOptions = EngineOptions { cache: CacheType::Int8, ..INT8 };

fn engine(model: &PackedModel, options: EngineOptions) -> Engine {
    Engine::from_model(model.clone(), options).unwrap()
}

fn ids(count: usize, seed: u32) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i * 31 + i * 17 + seed * 29) % 131).collect()
}

#[test]
fn with_float_activations_every_family_agrees_with_the_reference() {
    for (what, model) in models() {
        let ids = ids(41, 1);
        let expected = reference::logits(&model, &ids).unwrap().concat();
        let error = error(&engine(&model, EXACT).logits(&ids).unwrap(), &expected);
        println!("{what}: error {error:.1e} of the spread");
        assert!(error < 1e-5, "{what}: {error:e}");
    }
}

#[test]
fn int8_activations_and_caches_stay_near_the_reference() {
    for (what, model) in models() {
        let ids = ids(41, 2);
        let expected = reference::logits(&model, &ids).unwrap().concat();
        for options in [INT8, INT8_CACHE] {
            let logits = engine(&model, options).logits(&ids).unwrap();
            let (kl, equal) = divergence(&logits, &expected, model.spec.vocab_size);
            println!("{what}, cache {:?}: {kl:.1e} nats, likeliest equal {equal:.3}", options.cache);
            // Random weights amplify what a trained model damps: a sanity bound, not the promise for trained models.
            assert!(kl < 2e-2, "{what}, cache {:?}: {kl:e}", options.cache);
        }
    }
}

#[test]
fn an_int8_cache_takes_about_half_the_memory() {
    let spec = ModelSpec { d_model: 384, ..spec(Family::Llama, Activation::Swiglu) };
    let model = random::model(&spec, |cols| Encoding::Ternary { group: cols }, Encoding::F16, 1).unwrap();
    let bytes = |options| engine(&model, options).sequence().cache_bytes();
    // 300 positions in 75 groups of 4, scales of 16 positions together, 2 heads of 64 in 3 layers.
    assert_eq!(bytes(INT8), 3 * 2 * (300 + 300) * 64 * 2);
    assert_eq!(bytes(INT8_CACHE), 3 * 2 * ((300 + 300) * 64 + 2 * 304 * 4));
    assert_eq!(bytes(EXACT), 3 * 2 * (300 + 300) * 64 * 4);
}

#[test]
fn chunks_tokens_batches_and_threads_give_the_same_bits() {
    for options in [INT8, INT8_CACHE, EXACT] {
        for (what, model) in models() {
            let what = format!("{what} {:?}, cache {:?}", options.activations, options.cache);
            let single = engine(&model, EngineOptions { threads: 1, ..options });
            let engine = engine(&model, options);
            let prompts: Vec<Vec<u32>> = (0..8).map(|seed| ids(150 + 17 * seed as usize, seed)).collect();
            let alone: Vec<Vec<f32>> = prompts
                .iter()
                .map(|ids| {
                    let mut sequence = engine.sequence();
                    engine.prefill(&mut sequence, ids).unwrap();
                    sequence.logits().to_vec()
                })
                .collect();
            let mut sequence = single.sequence();
            for id in &prompts[0] {
                single.decode_batch(&mut [(&mut sequence, *id)]).unwrap();
            }
            assert_eq!(sequence.logits(), alone[0], "{what}: token by token on one thread");

            let mut batch: Vec<_> = prompts.iter().map(|_| engine.sequence()).collect();
            for (sequence, ids) in batch.iter_mut().zip(&prompts) {
                engine.prefill(sequence, &ids[..ids.len() - 3]).unwrap();
            }
            for back in [3, 2, 1] {
                let mut steps: Vec<_> =
                    batch.iter_mut().zip(&prompts).map(|(s, ids)| (s, ids[ids.len() - back])).collect();
                engine.decode_batch(&mut steps).unwrap();
            }
            for (sequence, alone) in batch.iter().zip(&alone) {
                assert_eq!(sequence.logits(), alone, "{what}: in a batch");
            }
            // Parts of unequal length: the last of one prompt is a token, that of another nearly all of it.
            let cut = |index: usize| prompts[index].len() - 1 - 37 * index / 2;
            let mut batch: Vec<_> = prompts.iter().map(|_| engine.sequence()).collect();
            for last in [false, true] {
                let part = |index: usize| match last {
                    false => &prompts[index][..cut(index)],
                    true => &prompts[index][cut(index)..],
                };
                let mut parts: Vec<_> = batch.iter_mut().enumerate().map(|(i, s)| (s, part(i))).collect();
                engine.extend_batch(&mut parts).unwrap();
            }
            for (sequence, alone) in batch.iter().zip(&alone) {
                assert_eq!(sequence.logits(), alone, "{what}: in parts beside others");
            }
            let samplers = || -> Vec<Sampler> {
                let of = |seed| Sampling { seed, ..Sampling::default() };
                (0..8).map(|seed| Sampler::new(of(seed), model.spec.vocab_size).unwrap()).collect()
            };
            let drawn: Vec<u32> =
                samplers().iter_mut().zip(&alone).map(|(sampler, logits)| sampler.sample(logits)).collect();
            let together = engine.sample_batch(batch.iter().zip(&mut samplers()).collect());
            let together: Vec<u32> = together.into_iter().map(Result::unwrap).collect();
            assert_eq!(together, drawn, "{what}: drawn side by side");
            let all = engine.logits(&prompts[1]).unwrap();
            assert_eq!(all[all.len() - model.spec.vocab_size..], alone[1], "{what}: all logits");
        }
    }
}

#[test]
fn generation_ends_for_a_reason() {
    use ternary_infer::{EngineError, Finish};
    let (_, model) = models().swap_remove(16);
    let engine = engine(&model, EngineOptions { threads: 1, ..INT8 });
    let prompt = ids(5, 3);
    let sampling = Sampling { seed: 4, ..Sampling::default() };
    let options = |max_tokens, stop: &[u32]| GenerateOptions {
        sampling: sampling.clone(),
        max_tokens,
        stop: stop.to_vec(),
    };
    let mut free = engine.generate(&prompt, options(20, &[])).unwrap();
    let text: Vec<u32> = free.by_ref().collect();
    assert_eq!((text.len(), free.finish()), (20, Some(Finish::MaxTokens)));
    let again: Vec<u32> = engine.generate(&prompt, options(20, &[])).unwrap().collect();
    assert_eq!(text, again);

    let stop = text[7];
    let first = text.iter().position(|id| *id == stop).unwrap();
    let mut stopped = engine.generate(&prompt, options(20, &[stop])).unwrap();
    assert_eq!(stopped.by_ref().collect::<Vec<_>>(), text[..first]);
    assert_eq!(stopped.finish(), Some(Finish::Stop(stop)));

    let mut endless = engine.generate(&prompt, options(usize::MAX, &[])).unwrap();
    // The token after the last place of the context is drawn and never fed.
    assert_eq!(endless.by_ref().count(), engine.context() - prompt.len() + 1);
    assert_eq!(endless.finish(), Some(Finish::Context));

    let error = |prompt: &[u32]| engine.generate(prompt, options(1, &[])).map(|_| ()).unwrap_err();
    assert!(matches!(error(&[]), EngineError::EmptyPrompt));
    assert!(matches!(error(&[131]), EngineError::UnknownToken { id: 131, .. }));
    assert!(matches!(error(&ids(301, 0)), EngineError::ContextFull { found: 301, context: 300 }));
}

#[test]
fn a_resumed_sequence_goes_on_where_it_was() {
    let (_, model) = models().swap_remove(16);
    let engine = engine(&model, INT8);
    let prompt = ids(9, 5);
    let options =
        |max_tokens| GenerateOptions { sampling: Sampling::greedy(), max_tokens, ..Default::default() };
    let whole: Vec<u32> = engine.generate(&prompt, options(30)).unwrap().collect();
    let mut start = engine.generate(&prompt, options(12)).unwrap();
    let mut text: Vec<u32> = start.by_ref().collect();
    let (mut sequence, last) = start.into_sequence();
    assert_eq!((sequence.len(), last), (9 + 11, text.last().copied()));
    // What is cut off is computed again.
    sequence.truncate(15);
    let seen = [&prompt[..], &text].concat();
    text.extend(engine.resume(sequence, &seen[15..], options(18)).unwrap());
    assert_eq!(text, whole);
}

#[test]
fn misfits_are_named() {
    let (_, model) = models().swap_remove(16);
    let error =
        |model: PackedModel| Engine::from_model(model, EngineOptions::default()).unwrap_err().to_string();
    let spec = &model.spec;
    for (spec, key) in [
        (ModelSpec { n_heads: 5, ..spec.clone() }, "n_heads"),
        (ModelSpec { n_kv_heads: 4, ..spec.clone() }, "n_kv_heads"),
        (ModelSpec { n_heads: 0, ..spec.clone() }, "n_heads"),
        (ModelSpec { d_ff: usize::MAX, ..spec.clone() }, "d_ff"),
        (ModelSpec { norm_eps: f32::NAN, ..spec.clone() }, "norm_eps"),
        (ModelSpec { rope_theta: f32::INFINITY, ..spec.clone() }, "rope_theta"),
        (ModelSpec { activation: Activation::Gelu, ..spec.clone() }, "activation"),
        (ModelSpec { vocab_size: 130, ..spec.clone() }, "token_embd.weight"),
        (ModelSpec { n_layers: 4, ..spec.clone() }, "blk.3."),
        (ModelSpec { family: Family::Bitnet, ..spec.clone() }, "blk.0.attn_sub_norm.weight"),
        (ModelSpec { family: Family::Gpt2, n_kv_heads: 6, ..spec.clone() }, "activation"),
    ] {
        let error = error(PackedModel { spec, ..model.clone() });
        assert!(error.contains(key), "{error}");
    }
    for name in model.tensors.keys() {
        let mut model = model.clone();
        model.tensors.remove(name);
        let error = error(model);
        assert!(error.contains(name.as_str()), "{error} without {name}");
    }
}

#[test]
fn a_copied_sequence_goes_on_like_the_first() {
    for options in [INT8, INT8_CACHE, EXACT] {
        for (what, model) in models() {
            let engine = engine(&model, options);
            for length in [1, 16, 37] {
                let (mut first, mut copy) = (engine.sequence(), engine.sequence());
                engine.prefill(&mut first, &ids(length, 6)).unwrap();
                engine.prefill(&mut copy, &ids(100, 7)).unwrap();
                copy.copy_from(&first);
                assert_eq!((copy.len(), copy.logits()), (length, first.logits()), "{what}");
                // Neither sees what the other does.
                engine.prefill(&mut first, &ids(40, 8)).unwrap();
                engine.prefill(&mut copy, &ids(20, 9)).unwrap();
                let mut alone = engine.sequence();
                engine.prefill(&mut alone, &[ids(length, 6), ids(20, 9)].concat()).unwrap();
                assert_eq!(copy.logits(), alone.logits(), "{what} after {length}");
            }
        }
    }
}
