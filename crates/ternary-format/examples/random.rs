//! Writes a model with random ternary weights, to test the programs that read such files.
//!
//! `cargo run --release -p ternary-format --example random -- FAMILY GRANULARITY OUT [TYPE [TOKENIZER.json]]`, with
//! FAMILY gpt2, llama or bitnet and GRANULARITY per_tensor, per_channel or a number of weights.

use half::f16;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{env, error::Error, path::Path};
use ternary_format::{
    Activation, Family, ModelSpec, PackedModel, Tensor, Tokenizer, WriteOptions, chat, write_model,
};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [family, granularity, out, rest @ ..] = &arguments[..] else {
        return Err("usage: random FAMILY GRANULARITY OUT [TYPE [TOKENIZER.json]]".into());
    };
    let tokenizer = rest.get(1).map(|path| Tokenizer::load(Path::new(path))).transpose()?;
    let tokenizer = tokenizer.unwrap_or_else(Tokenizer::byte);
    // bitnet has SwiGLU and tied embeddings in llama.cpp, and a squared ReLU in transformers.
    let gguf = out.ends_with(".gguf");
    let (family, activation) = match family.as_str() {
        "gpt2" => (Family::Gpt2, Activation::Gelu),
        "llama" => (Family::Llama, Activation::Swiglu),
        "bitnet" if gguf => (Family::Bitnet, Activation::Swiglu),
        "bitnet" => (Family::Bitnet, Activation::SquaredRelu),
        other => return Err(format!("{other}: expected gpt2, llama or bitnet").into()),
    };
    let spec = ModelSpec::new(family)
        .with_vocab_size(tokenizer.vocab_size())
        .with_context(256)
        .with_d_model(256)
        .with_n_layers(3)
        .with_n_heads(8)
        .with_n_kv_heads(if family == Family::Gpt2 { 8 } else { 2 })
        .with_d_ff(512)
        .with_activation(activation)
        .with_tied(gguf || family != Family::Bitnet)
        .with_norm_eps(1e-5)
        .with_rope_theta(10_000.0);
    let rng = &mut StdRng::seed_from_u64(1);
    let mut tensors = std::collections::BTreeMap::new();
    for (name, shape) in spec.tensors() {
        let tensor = if name.starts_with("blk.") && shape.len() == 2 {
            // Absmean scales of weights with standard deviation 1 / sqrt(in), as in a trained model.
            let scale = 0.8 / (shape[1] as f32).sqrt();
            let whole = f16::from_f32(scale * rng.random_range(0.7..1.3));
            let group = granularity.parse().unwrap_or(shape[1]);
            Tensor::ternary(shape[0], shape[1], group, |_, codes, scales| {
                codes.iter_mut().for_each(|code| *code = rng.random_range(-1..=1));
                let one = |_| f16::from_f32(scale * rng.random_range(0.7..1.3));
                let drawn: Vec<f16> = (0..scales.len()).map(one).collect();
                scales.copy_from_slice(&drawn);
                if granularity == "per_tensor" {
                    scales.fill(whole);
                }
            })?
        } else {
            let (mean, spread) = match shape.len() {
                1 if name.ends_with(".weight") => (1.0, 0.2),
                1 => (0.0, 0.1),
                _ => (0.0, 0.3),
            };
            let values: Vec<f32> =
                (0..shape.iter().product()).map(|_| mean + rng.random_range(-spread..spread)).collect();
            Tensor::f32(&shape, &values)?
        };
        tensors.insert(name, tensor);
    }
    let chat_template = Some(chat::TEMPLATE.into());
    let model = PackedModel::new("random", spec, tensors)
        .with_tokenizer(Some(tokenizer))
        .with_chat_template(chat_template);
    let weights = rest.first().map(|name| name.parse()).transpose()?;
    write_model(&model, Path::new(out), &WriteOptions::default().with_weights(weights))?;
    println!("{out}");
    Ok(())
}
