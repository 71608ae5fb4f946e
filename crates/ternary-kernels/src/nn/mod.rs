//! What inference and training need besides products, forward and backward, in passes that touch memory once, on the
//! threads of a [`Pool`](crate::Pool).
//!
//! Work is cut into pieces whose size does not depend on the number of threads, and partial sums are added in their
//! order: results are the same, to the bit, on any number of threads and with any instruction set.

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
pub use attention_causal::{Attention, attention, attention_backward};
pub use cross_entropy::{cross_entropy, cross_entropy_backward};
pub use embedding::embedding_backward;
pub use fake_quantize::{absmax_quantize, mean_abs, ternary_quantize};
pub use int8_linear::{Saved, SavedMut, TernaryLinear, Weight, column_sums};
pub use kl_divergence::{divergence, divergence_backward};
pub use norm::{Norm, norm, norm_backward};
