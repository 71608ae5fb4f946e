//! Tensor ops that need a backend.
//!
//! Weights have the shape `[groups, n, channels]`: Burn's `[d_input, d_output]` with the inputs split into `groups` of `n`, so
//! that weights that share a scale lie along dimension 1 and scales are `[groups, 1, channels]`. One scale per tensor is
//! `[1, d_input * d_output, 1]`.
//!
//! # One folder per family
//! | file | contents |
//! |---|---|
//! | `mod.rs` | tensor functions, the extension trait, and what an override of each method must keep |
//! | `reference.rs` | default bodies in float ops, the oracle of all others, where an op has one |
//! | `autodiff.rs` | backward passes, which call the `_backward` methods of the inner backend |
//! | `flex.rs` | overrides of the CPU backend [`Flex`](burn::backend::Flex), by the kernels of `ternary-kernels` |
//!
//! # What a backend may override
//! Any method of these traits. `tests/backends.rs` compares every override with the default body.
//!
//! | trait | methods that go together | agreement with the default body |
//! |---|---|---|
//! | [`QuantizeOps`] | none | to the bit |
//! | [`NormOps`], [`ActivationOps`], [`EmbeddingOps`], [`OptimizerOps`] | none | within f32 rounding |
//! | [`AttentionOps`] | forward and backward | within f32 rounding |
//! | [`LossOps`] | `divergences` and its backward method | within f32 rounding |
//! | [`LinearOps`] | `ternary_linear`, `latent_linear` and their two backward methods | within f32 rounding, integer products within that of int8 |
//!
//! `backend.rs` has the list of backends.

// ndarray and libtorch are deprecated upstream and still supported here; the generated code of the extensions names them.
#![allow(deprecated)]

mod activation;
mod attention;
mod autodiff;
mod backend;
mod embedding;
#[cfg(feature = "flex")]
mod flex;
mod linear;
mod loss;
mod norm;
mod optimizer;
mod quantize;

pub use activation::{ActivationOps, gelu, silu_mul};
pub use attention::{Attended, AttentionOps, Heads, SavedAttention, causal_attention};
pub use embedding::{EmbeddingOps, embed};
#[cfg(feature = "flex")]
pub(crate) use flex::start_threads;
pub use linear::{
    FactorPrecision, LinearOps, SavedFactors, TernaryLinearForward, WeightGradientPrecision, float_linear,
    latent_linear, lm_head, ternary_linear,
};
pub use loss::{LossOps, divergences, log_likelihood};
pub use norm::{NormOps, layer_norm, rms_norm};
pub use optimizer::{AdamWStep, MuonStep, OptimizerOps, adamw, adamw_int8, int8_moments, muon, square_sum};
pub use quantize::{
    OutsideGradient, QuantizeOps, RowScale, SCALE_MAX, SCALE_MIN, StraightThrough, absmax_quantize,
    absmax_scales, kth_magnitude, mean_abs, round_scale, ternary_codes, ternary_quantize,
};
