//! A small model, and a function that uses every part of a model.

use half::f16;
use ternary_format::{Activation, Family, ModelSpec, PackedModel, Tensor, Tokenizer, chat};
use ternary_infer::{ActivationMode, Engine, EngineOptions, GenerateOptions, Sampling};

/// Larger models are read but not run.
const RUN_WEIGHTS: usize = 1 << 16;

/// A model with ternary and float matrices, the same at each call.
pub fn small(family: Family, d_model: usize, tokenizer: Tokenizer) -> PackedModel {
    let gpt2 = family == Family::Gpt2;
    let spec = ModelSpec::new(family)
        .with_vocab_size(tokenizer.vocab_size())
        .with_context(16)
        .with_d_model(d_model)
        .with_n_layers(1)
        .with_n_heads(2)
        .with_n_kv_heads(if gpt2 { 2 } else { 1 })
        .with_d_ff(d_model)
        .with_activation(if gpt2 { Activation::Gelu } else { Activation::Swiglu })
        .with_tied(family != Family::Llama)
        .with_norm_eps(1e-5)
        .with_rope_theta(10_000.0);
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let tensor = if name.starts_with("blk.") && shape.len() == 2 {
            Tensor::ternary(shape[0], shape[1], shape[1], |row, codes, scales| {
                codes.iter_mut().enumerate().for_each(|(col, code)| *code = ((row + col) % 3) as i8 - 1);
                scales.fill(f16::ONE);
            })
        } else {
            let values: Vec<f32> = (0..shape.iter().product()).map(|i| (i % 7) as f32 * 0.25 - 0.5).collect();
            Tensor::f32(&shape, &values)
        };
        (name, tensor.expect("shape and values fit"))
    };
    let tensors = spec.tensors().map(tensor).collect();
    PackedModel::new("small", spec, tensors)
        .with_tokenizer(Some(tokenizer))
        .with_chat_template(Some(chat::TEMPLATE.into()))
}

/// Reads all rows, encodes and decodes, renders a dialogue, and runs the model if it is small.
pub fn use_model(model: PackedModel) {
    model.validate().expect("what is read is a model");
    let mut weights = 0;
    for tensor in model.tensors.values() {
        let mut values = vec![0.0; tensor.cols()];
        (0..tensor.rows()).for_each(|row| tensor.read_row(row, &mut values));
        weights += tensor.rows() * tensor.cols();
    }
    if let Some(tokenizer) = &model.tokenizer {
        use_tokenizer(tokenizer);
        if let Some(template) = model.chat_template.as_deref().and_then(|t| chat::ChatTemplate::new(t).ok()) {
            let message = chat::Message::new(chat::Role::User, "<|user|> hi");
            let _ = template.ids(tokenizer, &[message], true);
        }
    }
    if weights > RUN_WEIGHTS || model.spec.n_layers > 8 {
        return;
    }
    for activations in [ActivationMode::Int8, ActivationMode::F32] {
        let options = EngineOptions::default().with_threads(1).with_activations(activations).with_context(16);
        let engine = Engine::from_model(model.clone(), options).expect("what is valid can be packed");
        let last = engine.spec().vocab_size as u32 - 1;
        let sampling = Sampling::default().with_temperature(0.7).with_top_p(0.9);
        let options = GenerateOptions::default().with_sampling(sampling).with_max_tokens(2);
        // A context of one token cannot take two.
        if let Ok(generation) = engine.generate(&[0, last], options) {
            generation.for_each(drop);
        }
    }
}

/// Encodes, decodes all ids at once and one by one, and writes the tokenizer.
pub fn use_tokenizer(tokenizer: &Tokenizer) {
    for text in ["", "ab", "hello <|user|> 12 \u{1f986}\r\n  \u{2581}a\u{301}", "<s>[UNK]ab"] {
        let Ok(ids) = tokenizer.encode(text) else { continue };
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()), "an id beyond the vocabulary");
        tokenizer.decode(&ids);
        let mut decoder = tokenizer.decoder();
        ids.iter().for_each(|&id| drop(decoder.push(id)));
        decoder.finish();
    }
    tokenizer.decode(&[0, 1, 2, 3, u32::MAX]);
    tokenizer.to_json();
}
