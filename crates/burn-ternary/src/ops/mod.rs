//! Tensor primitives that need a backend: the extension trait, and the one list of backends that have it.
//!
//! Weights come as `[groups, n, channels]`: Burn's `[d_input, d_output]` with the inputs cut into `groups` runs of
//! `n`, so that whoever shares a scale lies along dimension 1 and every scale is `[groups, 1, channels]`. One scale
//! a tensor is `[1, d_input * d_output, 1]`. Each op has a default body made of float ops, a hand-written backward
//! under `Autodiff`, and a fused form for [`Flex`](burn::backend::Flex) where the default costs memory traffic.

// ndarray and libtorch are deprecated upstream and still asked of us; the extension's generated code names them.
#![allow(deprecated)]

mod absmax;
#[cfg(feature = "flex")]
mod flex;
mod identity;
mod scale;
mod ternary;

pub use absmax::{RowScale, absmax_quantize, absmax_scales};
pub use scale::{SCALE_MAX, SCALE_MIN, mean_abs, round_scale};
pub use ternary::{StraightThrough, ternary_codes, ternary_quantize};

use burn::backend::{
    Autodiff, AutodiffBackend, Backend, autodiff::checkpoint::strategy::CheckpointStrategy,
    backend_extension, tensor::FloatTensor,
};

/// The ops of ternary training. Calling one on a backend that is not in this list panics, which cannot happen to
/// users of our features.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    LibTorch: cfg(feature = "tch"),
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Fusion: cfg(any(feature = "wgpu", feature = "cuda")),
)]
pub trait TernaryBackend: Backend {
    /// See [`ternary_codes`].
    #[fusion(default)]
    fn ternary_codes(weight: FloatTensor<Self>, threshold: FloatTensor<Self>) -> FloatTensor<Self> {
        ternary::codes::<Self>(weight, threshold)
    }

    /// See [`ternary_quantize`].
    #[fusion(default)]
    fn ternary_quantize(
        weight: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        threshold: FloatTensor<Self>,
        estimator: StraightThrough,
    ) -> FloatTensor<Self> {
        let _ = estimator; // decides the backward pass only
        Self::float_mul(Self::ternary_codes(weight, threshold), scale)
    }

    /// See [`mean_abs`].
    #[fusion(default)]
    fn mean_abs(weight: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_mean_dim(Self::float_abs(weight), 1)
    }

    /// See [`round_scale`].
    #[fusion(default)]
    fn round_scale(scale: FloatTensor<Self>) -> FloatTensor<Self> {
        scale::round::<Self>(scale)
    }

    /// See [`absmax_quantize`].
    #[fusion(default)]
    fn absmax_quantize(input: FloatTensor<Self>, levels: f32, scale: RowScale) -> FloatTensor<Self> {
        absmax::quantize::<Self>(input, levels, scale)
    }
}

impl<B: TernaryBackend, C: CheckpointStrategy> TernaryBackend for Autodiff<B, C> {
    fn ternary_codes(weight: FloatTensor<Self>, threshold: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::from_inner(B::ternary_codes(Self::inner(weight), Self::inner(threshold)))
    }

    fn ternary_quantize(
        weight: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        threshold: FloatTensor<Self>,
        estimator: StraightThrough,
    ) -> FloatTensor<Self> {
        ternary::track::<B, C>(weight, scale, threshold, estimator)
    }

    fn mean_abs(weight: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::from_inner(B::mean_abs(Self::inner(weight)))
    }

    fn round_scale(scale: FloatTensor<Self>) -> FloatTensor<Self> {
        identity::straight_through::<B, C>(scale, B::round_scale)
    }

    fn absmax_quantize(input: FloatTensor<Self>, levels: f32, scale: RowScale) -> FloatTensor<Self> {
        identity::straight_through::<B, C>(input, |input| B::absmax_quantize(input, levels, scale))
    }
}

#[cfg(feature = "ndarray")]
impl TernaryBackend for burn::backend::NdArray {}
#[cfg(feature = "tch")]
impl TernaryBackend for burn::backend::LibTorch {}
#[cfg(any(feature = "wgpu", feature = "cuda"))]
impl TernaryBackend for burn_cubecl::CubeBackend {}
