//! Promise: a pretrained model has the logits and the text of its original implementation.

use crate::{divergence, error};
use safetensors::SafeTensors;
use serde_json::Value;
use std::{collections::BTreeMap, fs, path::PathBuf};
use ternary_format::{Activation, Family, ModelSpec, PackedModel, Tensor};
use ternary_infer::{ActivationMode, CacheType, Engine, EngineOptions, GenerateOptions, Sampling};

/// The files of a reference model: one folder of the shared test data.
struct Reference(PathBuf);

impl Reference {
    /// `None` if the data is missing, which is printed.
    fn open(name: &str) -> Option<Self> {
        let folder =
            PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/models")).join(name);
        if !folder.is_dir() {
            println!("skipped: {}: absent", folder.display());
            return None;
        }
        Some(Self(folder))
    }

    fn bytes(&self, file: &str) -> Vec<u8> {
        let path = self.0.join(file);
        fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    fn json(&self, file: &str) -> Value {
        serde_json::from_slice(&self.bytes(file)).unwrap()
    }
}

fn floats(tensors: &SafeTensors, name: &str) -> (Vec<usize>, Vec<f32>) {
    let view = tensors.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    (view.shape().to_vec(), values)
}

fn size(config: &Value, key: &str) -> usize {
    config[key].as_u64().unwrap_or_else(|| panic!("{key}: {}", config[key])) as usize
}

/// A model without a tokenizer.
fn model(spec: ModelSpec, tensors: BTreeMap<String, Tensor>) -> PackedModel {
    PackedModel::new("reference", spec, tensors)
}

fn stories260k(reference: &Reference) -> PackedModel {
    let config = reference.json("config.json");
    let spec = ModelSpec::new(Family::Llama)
        .with_activation(Activation::Swiglu)
        .with_vocab_size(size(&config, "vocab_size"))
        .with_context(size(&config, "max_position_embeddings"))
        .with_d_model(size(&config, "hidden_size"))
        .with_n_layers(size(&config, "num_hidden_layers"))
        .with_n_heads(size(&config, "num_attention_heads"))
        .with_n_kv_heads(size(&config, "num_key_value_heads"))
        .with_d_ff(size(&config, "intermediate_size"))
        .with_tied(config["tie_word_embeddings"].as_bool().unwrap())
        .with_norm_eps(config["rms_norm_eps"].as_f64().unwrap() as f32)
        .with_rope_theta(config["rope_theta"].as_f64().unwrap() as f32);
    let bytes = reference.bytes("model.safetensors");
    let weights = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors = BTreeMap::new();
    let mut take = |from: &str, to: String| {
        let (shape, values) = floats(&weights, from);
        tensors.insert(to, Tensor::f32(&shape, &values).unwrap());
    };
    take("model.embed_tokens.weight", "token_embd.weight".into());
    take("model.norm.weight", "output_norm.weight".into());
    for layer in 0..spec.n_layers {
        for (from, to) in [
            ("input_layernorm", "attn_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("post_attention_layernorm", "ffn_norm"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ] {
            take(&format!("model.layers.{layer}.{from}.weight"), format!("blk.{layer}.{to}.weight"));
        }
    }
    model(spec, tensors)
}

fn engine(model: &PackedModel, activations: ActivationMode) -> Engine {
    let options = EngineOptions::default().with_threads(2).with_activations(activations);
    Engine::from_model(model.clone(), options).unwrap()
}

#[test]
fn a_pretrained_llama_has_its_reference_logits_and_text() {
    let Some(reference) = Reference::open("stories260k") else { return };
    let model = stories260k(&reference);
    let exact = engine(&model, ActivationMode::F32);
    let fast = engine(&model, ActivationMode::Int8);
    let bytes = reference.bytes("reference_logits.safetensors");
    let logits = SafeTensors::deserialize(&bytes).unwrap();
    let prompts = reference.json("reference.json")["prompts"].as_array().unwrap().clone();
    assert_eq!(prompts.len(), 4);
    for (index, prompt) in prompts.iter().enumerate() {
        let tokens = |key: &str| -> Vec<u32> { serde_json::from_value(prompt[key].clone()).unwrap() };
        let (prompt, greedy) = (tokens("ids"), tokens("greedy_ids_32"));
        let (_, expected) = floats(&logits, &format!("logits_{index}"));
        let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
        let error = error(&exact.logits(&prompt).unwrap(), &expected);
        let (kl, equal) = divergence(&fast.logits(&prompt).unwrap(), &expected, 512);
        println!(
            "prompt {index}: error {error:.1e} of the spread; int8: {kl:.1e} nats, likeliest equal {equal:.3}"
        );
        assert!(error < 1e-5, "prompt {index}: {error:e}");
        assert!(kl < 1e-3, "prompt {index}: {kl:e} nats");
        let options = GenerateOptions::default().with_sampling(Sampling::greedy()).with_max_tokens(32);
        for engine in [&exact, &fast] {
            let text: Vec<u32> = engine.generate(&prompt, options.clone()).unwrap().collect();
            assert_eq!(text, greedy[prompt.len()..], "prompt {index}");
        }
    }
}

#[test]
fn an_int8_cache_changes_little_of_the_logits_of_a_pretrained_llama() {
    let Some(reference) = Reference::open("stories260k") else { return };
    let model = stories260k(&reference);
    let half = engine(&model, ActivationMode::Int8);
    let options = EngineOptions::default().with_threads(2).with_cache(CacheType::Int8);
    let int8 = Engine::from_model(model.clone(), options).unwrap();
    for seed in 0..4 {
        let sampling = Sampling::default().with_seed(seed);
        let options = GenerateOptions::default().with_sampling(sampling);
        // As long as the context.
        let text: Vec<u32> = half.generate(&[1], options).unwrap().collect();
        let text = &text[..text.len() - 1];
        let expected: Vec<f64> = half.logits(text).unwrap().into_iter().map(f64::from).collect();
        let (kl, equal) = divergence(&int8.logits(text).unwrap(), &expected, 512);
        println!("text {seed}, {} tokens: {kl:.1e} nats, likeliest equal {equal:.3}", text.len());
        assert!(kl < 4e-3, "text {seed}: {kl:e} nats");
        assert!(equal > 0.95, "text {seed}: likeliest equal {equal}");
    }
}

/// The file has no biases of queries, keys and values; the model sorts without them.
fn gpt_nano_sort(reference: &Reference) -> PackedModel {
    let config = reference.json("config.json");
    let d = size(&config, "n_embd");
    let spec = ModelSpec::new(Family::Gpt2)
        .with_activation(Activation::Gelu)
        .with_vocab_size(size(&config, "vocab_size"))
        .with_context(size(&config, "n_positions"))
        .with_d_model(d)
        .with_n_layers(size(&config, "n_layer"))
        .with_n_heads(size(&config, "n_head"))
        .with_n_kv_heads(size(&config, "n_head"))
        .with_d_ff(4 * d)
        .with_tied(false)
        .with_norm_eps(config["layer_norm_epsilon"].as_f64().unwrap() as f32)
        .with_rope_theta(0.0);
    let bytes = reference.bytes("model.safetensors");
    let weights = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors = BTreeMap::new();
    let mut take = |from: &str, to: &str, suffix: &str| {
        let (shape, values) = floats(&weights, &format!("{from}.{suffix}"));
        tensors.insert(format!("{to}.{suffix}"), Tensor::f32(&shape, &values).unwrap());
    };
    take("transformer.wte", "token_embd", "weight");
    take("transformer.wpe", "position_embd", "weight");
    take("lm_head", "output", "weight");
    take("transformer.ln_f", "output_norm", "weight");
    take("transformer.ln_f", "output_norm", "bias");
    for layer in 0..spec.n_layers {
        for (from, to) in [
            ("ln_1", "attn_norm"),
            ("attn.c_proj", "attn_output"),
            ("ln_2", "ffn_norm"),
            ("mlp.c_fc", "ffn_up"),
            ("mlp.c_proj", "ffn_down"),
        ] {
            for suffix in ["weight", "bias"] {
                take(&format!("transformer.h.{layer}.{from}"), &format!("blk.{layer}.{to}"), suffix);
            }
        }
    }
    for layer in 0..spec.n_layers {
        let (_, fused) = floats(&weights, &format!("transformer.h.{layer}.attn.c_attn.weight"));
        for (part, weight) in ["attn_q", "attn_k", "attn_v"].into_iter().zip(fused.chunks(d * d)) {
            let name = format!("blk.{layer}.{part}");
            tensors.insert(format!("{name}.weight"), Tensor::f32(&[d, d], weight).unwrap());
            tensors.insert(format!("{name}.bias"), Tensor::f32(&[d], &vec![0.0; d]).unwrap());
        }
    }
    model(spec, tensors)
}

#[test]
fn a_trained_gpt2_sorts_every_input() {
    let Some(reference) = Reference::open("gpt_nano_sort") else { return };
    let model = gpt_nano_sort(&reference);
    for activations in [ActivationMode::F32, ActivationMode::Int8] {
        let engine = engine(&model, activations);
        for n in 0..729 {
            let mut input: Vec<u32> = (0..6).map(|digit| n / 3u32.pow(digit) % 3).collect();
            let options = GenerateOptions::default().with_sampling(Sampling::greedy()).with_max_tokens(6);
            let output: Vec<u32> = engine.generate(&input, options).unwrap().collect();
            input.sort();
            assert_eq!(output, input, "input {n}, {activations:?}");
        }
    }
}
