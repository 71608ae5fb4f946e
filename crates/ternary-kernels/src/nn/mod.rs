//! Layers and losses: activations, norms, attention, embedding, cross entropy, KL divergence, fake quantization and the int8
//! linear layer, forward and backward, each in passes that touch memory once.
//!
//! Functions take a [`Pool`](crate::Pool) and use all its threads. Work is cut into tasks whose size does not depend on the number
//! of threads, and partial sums are added in the order of tasks: results are the same, to the bit, on any number of threads and
//! with any instruction set. Functions for a single row are methods of [`Isa`](crate::Isa).
//!
//! | layer | forward | backward |
//! |---|---|---|
//! | ternary linear layer | [`TernaryLinear::forward`] | [`TernaryLinear::backward`] |
//! | fake quantization | [`ternary_quantize`], [`absmax_quantize`], [`mean_abs`] | straight-through, by the caller |
//! | RMS norm, layer norm | [`norm()`] | [`norm_backward`] |
//! | GELU, SwiGLU | [`gelu`], [`silu_mul`] | [`gelu_backward`], [`silu_mul_backward`] |
//! | attention, training | [`causal_attention`] | [`causal_attention_backward`] |
//! | attention, inference | [`attention_cached::attend`] | |
//! | token embedding | by the caller | [`embedding_backward`] |
//! | cross entropy | [`cross_entropy()`] | [`cross_entropy_backward`] |
//! | distillation loss | [`kl_divergence()`] | [`kl_divergence_backward`] |

mod activation;
pub mod attention_cached;
mod attention_causal;
mod cross_entropy;
mod embedding;
mod fake_quantize;
mod int8_linear;
mod kl_divergence;
mod norm;
mod rope;
mod softmax;

pub use activation::{gelu, gelu_backward, silu_mul, silu_mul_backward};
pub use attention_causal::{AttentionShape, causal_attention, causal_attention_backward};
pub use cross_entropy::{cross_entropy, cross_entropy_backward};
pub use embedding::embedding_backward;
pub use fake_quantize::{absmax_quantize, mean_abs, ternary_quantize};
pub use int8_linear::{LinearWeight, SavedTensors, SavedTensorsMut, TernaryLinear, column_sums};
pub use kl_divergence::{kl_divergence, kl_divergence_backward};
pub use norm::{Norm, norm, norm_backward};
