//! Promise: the engine computes what the float64 reference computes, independently of chunks, batch and threads.

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
    ModelSpec::new(family)
        .with_activation(activation)
        .with_vocab_size(131)
        .with_context(300)
        .with_d_model(96)
        .with_n_layers(3)
        .with_n_heads(6)
        .with_n_kv_heads(if family == Family::Gpt2 { 6 } else { 2 })
        .with_d_ff(160)
        .with_tied(activation == Activation::SquaredRelu)
        .with_norm_eps(1e-3)
        .with_rope_theta(100.0)
}

/// Models of every family at odd sizes: ternary weights with one scale per row or group, and float weights.
fn models() -> Vec<(String, PackedModel)> {
    let mut models = Vec::new();
    for (seed, (family, activation)) in FAMILIES.into_iter().enumerate() {
        let odd = spec(family, activation).with_d_model(84).with_n_heads(6).with_d_ff(35);
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
            let adapted = model.clone().with_adapter(Some(adapter));
            models.push((format!("{family:?} {activation:?} {kind}"), model));
            models.push((format!("{family:?} {activation:?} {kind}, adapted"), adapted));
        }
    }
    models
}

/// An adapter of two of three matrices, whose outputs are about as large as those of the matrices.
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
    Adapter::new(pairs.collect())
}

fn exact() -> EngineOptions {
    EngineOptions::default().with_threads(2).with_activations(ActivationMode::F32)
}

fn int8() -> EngineOptions {
    EngineOptions::default().with_threads(2)
}

fn int8_cache() -> EngineOptions {
    int8().with_cache(CacheType::Int8)
}

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
        let error = error(&engine(&model, exact()).logits(&ids).unwrap(), &expected);
        println!("{what}: error {error:.1e} of the spread");
        assert!(error < 1e-5, "{what}: {error:e}");
    }
}

#[test]
fn int8_activations_and_caches_stay_near_the_reference() {
    for (what, model) in models() {
        let ids = ids(41, 2);
        let expected = reference::logits(&model, &ids).unwrap().concat();
        for options in [int8(), int8_cache()] {
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
    let spec = spec(Family::Llama, Activation::Swiglu).with_d_model(384);
    let model = random::model(&spec, |cols| Encoding::Ternary { group: cols }, Encoding::F16, 1).unwrap();
    let bytes = |options| engine(&model, options).sequence().cache_bytes();
    // 300 positions in 75 groups of 4, scales of 16 positions together, 2 heads of 64 in 3 layers.
    assert_eq!(bytes(int8()), 3 * 2 * (300 + 300) * 64 * 2);
    assert_eq!(bytes(int8_cache()), 3 * 2 * ((300 + 300) * 64 + 2 * 304 * 4));
    assert_eq!(bytes(exact()), 3 * 2 * (300 + 300) * 64 * 4);
}

#[test]
fn chunks_tokens_batches_and_threads_give_the_same_bits() {
    for options in [int8(), int8_cache(), exact()] {
        for (what, model) in models() {
            let what = format!("{what} {:?}, cache {:?}", options.activations, options.cache);
            let single = engine(&model, options.with_threads(1));
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
            // Chunks of unequal length: the last one of a prompt is a single token, that of another is nearly the prompt.
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
                assert_eq!(sequence.logits(), alone, "{what}: in chunks, in a batch");
            }
            let samplers = || -> Vec<Sampler> {
                let of = |seed| Sampling::default().with_seed(seed);
                (0..8).map(|seed| Sampler::new(of(seed), model.spec.vocab_size).unwrap()).collect()
            };
            let drawn: Vec<u32> =
                samplers().iter_mut().zip(&alone).map(|(sampler, logits)| sampler.sample(logits)).collect();
            let together = engine.sample_batch(batch.iter().zip(&mut samplers()).collect());
            let together: Vec<u32> = together.into_iter().map(Result::unwrap).collect();
            assert_eq!(together, drawn, "{what}: sampled as a batch");
            let all = engine.logits(&prompts[1]).unwrap();
            assert_eq!(all[all.len() - model.spec.vocab_size..], alone[1], "{what}: all logits");
        }
    }
}

#[test]
fn generation_ends_for_a_reason() {
    use ternary_infer::{EngineError, FinishReason};
    let (_, model) = models().swap_remove(16);
    let engine = engine(&model, int8().with_threads(1));
    let prompt = ids(5, 3);
    let sampling = Sampling::default().with_seed(4);
    let options = |max_tokens, stop: &[u32]| {
        GenerateOptions::default()
            .with_sampling(sampling.clone())
            .with_max_tokens(max_tokens)
            .with_stop(stop.to_vec())
    };
    let mut free = engine.generate(&prompt, options(20, &[])).unwrap();
    let text: Vec<u32> = free.by_ref().collect();
    assert_eq!((text.len(), free.finish_reason()), (20, Some(FinishReason::MaxTokens)));
    let again: Vec<u32> = engine.generate(&prompt, options(20, &[])).unwrap().collect();
    assert_eq!(text, again);

    let stop = text[7];
    let first = text.iter().position(|id| *id == stop).unwrap();
    let mut stopped = engine.generate(&prompt, options(20, &[stop])).unwrap();
    assert_eq!(stopped.by_ref().collect::<Vec<_>>(), text[..first]);
    assert_eq!(stopped.finish_reason(), Some(FinishReason::Stop(stop)));

    let mut endless = engine.generate(&prompt, options(usize::MAX, &[])).unwrap();
    // The token after the last position of the context is drawn, but not decoded.
    assert_eq!(endless.by_ref().count(), engine.context() - prompt.len() + 1);
    assert_eq!(endless.finish_reason(), Some(FinishReason::Context));

    let error = |prompt: &[u32]| engine.generate(prompt, options(1, &[])).map(|_| ()).unwrap_err();
    assert!(matches!(error(&[]), EngineError::EmptyPrompt));
    assert!(matches!(error(&[131]), EngineError::UnknownToken { id: 131, .. }));
    assert!(matches!(error(&ids(301, 0)), EngineError::ContextFull { found: 301, context: 300 }));
}

#[test]
fn a_resumed_sequence_continues_the_same_text() {
    let (_, model) = models().swap_remove(16);
    let engine = engine(&model, int8());
    let prompt = ids(9, 5);
    let options =
        |max_tokens| GenerateOptions::default().with_sampling(Sampling::greedy()).with_max_tokens(max_tokens);
    let whole: Vec<u32> = engine.generate(&prompt, options(30)).unwrap().collect();
    let mut start = engine.generate(&prompt, options(12)).unwrap();
    let mut text: Vec<u32> = start.by_ref().collect();
    let (mut sequence, last) = start.into_sequence();
    assert_eq!((sequence.len(), last), (9 + 11, text.last().copied()));
    // The truncated tokens are computed again.
    sequence.truncate(15);
    let seen = [&prompt[..], &text].concat();
    text.extend(engine.resume(sequence, &seen[15..], options(18)).unwrap());
    assert_eq!(text, whole);
}

#[test]
fn mismatches_are_named() {
    let (_, model) = models().swap_remove(16);
    let error =
        |model: PackedModel| Engine::from_model(model, EngineOptions::default()).unwrap_err().to_string();
    let spec = &model.spec;
    for (spec, key) in [
        (spec.clone().with_n_heads(5), "n_heads"),
        (spec.clone().with_n_kv_heads(4), "n_kv_heads"),
        (spec.clone().with_n_heads(0), "n_heads"),
        (spec.clone().with_d_ff(usize::MAX), "d_ff"),
        (spec.clone().with_norm_eps(f32::NAN), "norm_eps"),
        (spec.clone().with_rope_theta(f32::INFINITY), "rope_theta"),
        (spec.clone().with_activation(Activation::Gelu), "activation"),
        (spec.clone().with_vocab_size(130), "token_embd.weight"),
        (spec.clone().with_n_layers(4), "blk.3."),
        (spec.clone().with_family(Family::Bitnet), "blk.0.attn_sub_norm.weight"),
        (spec.clone().with_family(Family::Gpt2).with_n_kv_heads(6), "activation"),
    ] {
        let error = error(model.clone().with_spec(spec));
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
fn a_copied_sequence_continues_like_the_original() {
    for options in [int8(), int8_cache(), exact()] {
        for (what, model) in models() {
            let engine = engine(&model, options);
            for length in [1, 16, 37] {
                let (mut first, mut copy) = (engine.sequence(), engine.sequence());
                engine.prefill(&mut first, &ids(length, 6)).unwrap();
                engine.prefill(&mut copy, &ids(100, 7)).unwrap();
                copy.copy_from(&first);
                assert_eq!((copy.len(), copy.logits()), (length, first.logits()), "{what}");
                // The copies are independent.
                engine.prefill(&mut first, &ids(40, 8)).unwrap();
                engine.prefill(&mut copy, &ids(20, 9)).unwrap();
                let mut alone = engine.sequence();
                engine.prefill(&mut alone, &[ids(length, 6), ids(20, 9)].concat()).unwrap();
                assert_eq!(copy.logits(), alone.logits(), "{what} after {length}");
            }
        }
    }
}
