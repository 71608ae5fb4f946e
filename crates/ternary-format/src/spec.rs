//! [`ModelSpec`]: the shape of a language model, the same for every file type, the trainer and the engine.

use crate::FormatError;
use serde::{Deserialize, Serialize};

/// The largest width, context or vocabulary: far above any model, low enough that no product of three overflows.
pub(crate) const LARGEST_SIZE: usize = 1 << 20;

/// The architecture family; decides norms, positions, biases and sub-norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// LayerNorm, learned positions, biases.
    Gpt2,
    /// RMSNorm, rotary positions, no biases, grouped-query attention.
    Llama,
    /// llama with a norm before the attention output and the down projection.
    Bitnet,
}

/// The non-linearity of the feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// GELU in its tanh form, as GPT-2 has it (`gelu_new`).
    Gelu,
    /// Gated: `silu(gate(x)) * up(x)`.
    Swiglu,
    /// Gated: `relu(gate(x))^2 * up(x)` in the llama and bitnet families, `relu(up(x))^2` in gpt2.
    SquaredRelu,
}

/// The shape of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    pub family: Family,
    pub vocab_size: usize,
    /// Longest sequence, in tokens.
    pub context: usize,
    pub d_model: usize,
    pub n_layers: usize,
    pub n_heads: usize,
    /// Heads that share keys and values; `n_heads` for ordinary attention.
    pub n_kv_heads: usize,
    pub d_ff: usize,
    pub activation: Activation,
    /// The head is the token embedding.
    pub tied: bool,
    pub norm_eps: f32,
    /// Base of the rotary frequencies; ignored by gpt2.
    pub rope_theta: f32,
}

impl ModelSpec {
    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.d_model / self.n_heads
    }

    /// Whether the feed-forward block has a gate: in all families but gpt2.
    pub fn is_gated(&self) -> bool {
        self.family != Family::Gpt2
    }

    /// The tensors of a model of this shape: names as in [`PackedModel`](crate::PackedModel), and shapes.
    ///
    /// Lazy, so that a spec with absurd sizes costs nothing.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Vec<usize>)> + use<> {
        let Self { vocab_size, context, d_model, d_ff, tied, .. } = *self;
        let kv = self.n_kv_heads * self.head_dim();
        let (gpt2, bitnet) = (self.family == Family::Gpt2, self.family == Family::Bitnet);
        let named = move |name: &str, shape: &[usize]| {
            let weight = (format!("{name}.weight"), shape.to_vec());
            let bias = (format!("{name}.bias"), shape[..1].to_vec());
            [weight].into_iter().chain(gpt2.then_some(bias))
        };
        let block = move |i: usize| {
            let parts = [
                Some(("attn_norm", vec![d_model])),
                Some(("attn_q", vec![d_model, d_model])),
                Some(("attn_k", vec![kv, d_model])),
                Some(("attn_v", vec![kv, d_model])),
                bitnet.then(|| ("attn_sub_norm", vec![d_model])),
                Some(("attn_output", vec![d_model, d_model])),
                Some(("ffn_norm", vec![d_model])),
                (!gpt2).then(|| ("ffn_gate", vec![d_ff, d_model])),
                Some(("ffn_up", vec![d_ff, d_model])),
                bitnet.then(|| ("ffn_sub_norm", vec![d_ff])),
                Some(("ffn_down", vec![d_model, d_ff])),
            ];
            let parts = parts.into_iter().flatten();
            parts.flat_map(move |(part, shape)| named(&format!("blk.{i}.{part}"), &shape))
        };
        let table = |name: &str, rows| (name.to_string(), vec![rows, d_model]);
        [table("token_embd.weight", vocab_size)]
            .into_iter()
            .chain(gpt2.then(|| table("position_embd.weight", context)))
            .chain((0..self.n_layers).flat_map(block))
            .chain(named("output_norm", &[d_model]))
            .chain((!tied).then(|| table("output.weight", vocab_size)))
    }

    /// Checks that a model of this shape can be.
    ///
    /// # Errors
    /// `Spec`: the first size that is out of range or does not fit the others.
    pub fn validate(&self) -> Result<(), FormatError> {
        let require = |holds: bool, key, found: String, expected: String| {
            if holds { Ok(()) } else { Err(FormatError::Spec { key, found, expected }) }
        };
        let Self { d_model, n_heads, n_kv_heads, activation, .. } = *self;
        for (key, size) in [
            ("vocab_size", self.vocab_size),
            ("context", self.context),
            ("d_model", d_model),
            ("n_layers", self.n_layers),
            ("n_heads", n_heads),
            ("n_kv_heads", n_kv_heads),
            ("d_ff", self.d_ff),
        ] {
            let expected = || format!("1 to {LARGEST_SIZE}");
            require((1..=LARGEST_SIZE).contains(&size), key, size.to_string(), expected())?;
        }
        let divides = |key, n: usize, of, whole: usize| {
            require(whole.is_multiple_of(n), key, n.to_string(), format!("a divisor of {of} = {whole}"))
        };
        divides("n_heads", n_heads, "d_model", d_model)?;
        divides("n_kv_heads", n_kv_heads, "n_heads", n_heads)?;
        let gpt2 = self.family == Family::Gpt2;
        let (unfit, expected) = match gpt2 {
            true => (Activation::Swiglu, "gelu or squared_relu in the gpt2 family"),
            false => (Activation::Gelu, "swiglu or squared_relu in the llama and bitnet families"),
        };
        require(activation != unfit, "activation", format!("{activation:?}"), expected.into())?;
        let (eps, theta) = (self.norm_eps, self.rope_theta);
        require(eps > 0.0 && eps < 1.0, "norm_eps", eps.to_string(), "above 0 and below 1".into())?;
        if gpt2 {
            let expected = format!("n_heads = {n_heads} in the gpt2 family");
            return require(n_kv_heads == n_heads, "n_kv_heads", n_kv_heads.to_string(), expected);
        }
        let even = self.head_dim().is_multiple_of(2);
        require(
            even,
            "n_heads",
            n_heads.to_string(),
            "an even d_model / n_heads for rotary positions".into(),
        )?;
        let expected = "a finite number, at least 1".into();
        require(theta >= 1.0 && theta.is_finite(), "rope_theta", theta.to_string(), expected)
    }
}
