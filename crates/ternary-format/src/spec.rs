//! [`ModelSpec`]: the shape of a language model, the same for every file type, the trainer and the engine.

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
}
