//! Models with random ternary weights. They are as fast as trained models of the same shape.

use half::f16;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use serde_json::json;
use std::collections::HashMap;
use ternary_format::{
    Activation, Encoding, Family, FormatError, ModelSpec, PackedModel, Special, Tensor, Tokenizer,
};

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Shape {
    /// 768 x 12, 138 million parameters
    Duck,
    /// 2048 x 24, 1.3 billion parameters
    #[value(name = "1b")]
    Billion,
    /// 4096 x 32, 6.6 billion parameters
    #[value(name = "7b")]
    SevenBillion,
}

impl Shape {
    pub fn spec(self) -> ModelSpec {
        let [d_model, n_layers, n_heads, d_ff] = match self {
            Self::Duck => [768, 12, 12, 3072],
            Self::Billion => [2048, 24, 32, 5632],
            Self::SevenBillion => [4096, 32, 32, 11008],
        };
        ModelSpec::new(Family::Llama)
            .with_vocab_size(32000)
            .with_context(2048)
            .with_d_model(d_model)
            .with_n_layers(n_layers)
            .with_n_heads(n_heads)
            .with_n_kv_heads(n_heads)
            .with_d_ff(d_ff)
            .with_activation(Activation::Swiglu)
            .with_tied(true)
            .with_norm_eps(1e-5)
            .with_rope_theta(10000.0)
    }

    /// A model without its tensors.
    pub fn model(self) -> PackedModel {
        let spec = self.spec();
        let tokenizer = tokenizer(spec.vocab_size);
        PackedModel::new(format!("random {self:?}").to_lowercase(), spec, Default::default())
            .with_tokenizer(Some(tokenizer))
    }
}

/// Byte-level BPE of letters, pairs of letters and pairs of these. Other programs load no model without a tokenizer, and a
/// server cannot stream tokens that have no text.
fn tokenizer(vocab_size: usize) -> Tokenizer {
    // How byte-level BPE spells the 256 bytes.
    let bytes = ('!'..='~').chain('\u{a1}'..='\u{ac}').chain('\u{ae}'..='\u{143}');
    let mut tokens: Vec<String> = bytes.map(String::from).collect();
    let mut merges = Vec::new();
    let mut parts: Vec<String> = ('a'..='z').map(String::from).collect();
    let count = vocab_size - Special::ALL.len();
    while tokens.len() < count {
        let pairs = parts.iter().flat_map(|a| parts.iter().map(move |b| [a.clone(), b.clone()]));
        let pairs: Vec<_> = pairs.take(count - tokens.len()).collect();
        parts = pairs.iter().map(|pair| pair.concat()).collect();
        tokens.extend_from_slice(&parts);
        merges.extend(pairs.iter().map(|pair| pair.join(" ")));
    }
    let vocab: HashMap<_, _> = tokens.into_iter().zip(0..).collect();
    let level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let model = json!({ "type": "BPE", "vocab": vocab, "merges": merges });
    let file = json!({ "model": model, "pre_tokenizer": level, "decoder": level });
    let tokenizer = Tokenizer::from_json(file.to_string().as_bytes()).and_then(Tokenizer::with_specials);
    tokenizer.expect("a sound tokenizer")
}

/// A tensor of a random model, always the same: ternary codes that are -1, 0 and +1 equally often, embeddings in 8
/// bits, norms of ones.
pub fn tensor(name: &str, shape: &[usize]) -> Result<Tensor, FormatError> {
    let seed = name.bytes().fold(0u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    match *shape {
        [width] => Tensor::f32(&[width], &vec![1.0; width]),
        [rows, cols] if name == "token_embd.weight" => {
            // A standard deviation of 74 codes, about 0.02.
            let scale = f16::from_f32(0.02 / 74.0);
            matrix(Encoding::Q8_0, [rows, cols], scale, || (rng.next_u32() >> 24) as i8)
        }
        [rows, cols] => {
            let scale = f16::from_f32((1.5 / cols as f32).sqrt());
            matrix(Encoding::Ternary { group: cols }, [rows, cols], scale, || (rng.next_u32() % 3) as i8 - 1)
        }
        _ => unreachable!("models have vectors and matrices"),
    }
}

fn matrix(
    encoding: Encoding,
    [rows, cols]: [usize; 2],
    scale: f16,
    mut code: impl FnMut() -> i8,
) -> Result<Tensor, FormatError> {
    Tensor::from_codes(encoding, rows, cols, |_, codes, scales| {
        codes.fill_with(&mut code);
        scales.fill(scale);
    })
}
