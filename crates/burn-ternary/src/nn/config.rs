//! The shape of a model: the `[model]` section of an experiment, and the named presets.

use serde::{Deserialize, Serialize};

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

/// Type in which everything but norms, loss and latent weights is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    F32,
    Bf16,
    F16,
}

/// The `[model]` section of an experiment: one description for three families.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DuckConfig {
    pub family: Family,
    /// 0: as many as the tokenizer has. Otherwise at least that many (the rest are unused ids).
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
    /// Dropout probability on embeddings, attention output and feed-forward output.
    pub dropout: f64,
    /// The head is the token embedding.
    pub tied: bool,
    pub norm_eps: f64,
    /// Base of the rotary frequencies; ignored by gpt2.
    pub rope_theta: f64,
    pub compute: Compute,
}

impl DuckConfig {
    pub fn head_dim(&self) -> usize { self.d_model / self.n_heads }
    pub fn is_gated(&self) -> bool { self.family != Family::Gpt2 }
}
