//! Ternary quantization: codes, scales and fake quantization of weights; absmax fake quantization of activations and tables.
//!
//! # Overriding
//! Every method must agree with its default body to the bit: a code or a scale that differs on one backend makes another
//! model there.

mod autodiff;
#[cfg(feature = "flex")]
mod flex;
mod reference;

use super::backend::backend_ops;
use burn::backend::{Backend, Dispatch, tensor::FloatTensor};
use burn::tensor::{DType, Tensor};
use half::{bf16, f16};

/// Smallest scale: the smallest normal f16, `2^-14`.
pub const SCALE_MIN: f32 = 1.0 / 16384.0;
/// Largest scale: the largest f16.
pub const SCALE_MAX: f32 = 65504.0;
/// Smallest absolute maximum of a row; avoids division by zero for a row of zeros.
const ABSMAX_MIN: f32 = 1e-5;

backend_ops! {
    /// The quantizers of weights, activations and tables.
    pub trait QuantizeOps: Backend {
        /// See [`ternary_codes`].
        #[fusion(default)]
        fn ternary_codes(weight: FloatTensor<Self>, threshold: FloatTensor<Self>) -> FloatTensor<Self> {
            reference::codes::<Self>(weight, threshold)
        }

        /// See [`ternary_quantize`]. The estimator matters to the backward pass only.
        #[fusion(default)]
        fn ternary_quantize(
            weight: FloatTensor<Self>,
            scale: FloatTensor<Self>,
            threshold: FloatTensor<Self>,
            _estimator: StraightThrough,
        ) -> FloatTensor<Self> {
            reference::ternary_quantize::<Self>(weight, scale, threshold)
        }

        /// See [`mean_abs`].
        #[fusion(default)]
        fn mean_abs(weight: FloatTensor<Self>) -> FloatTensor<Self> {
            reference::mean_abs::<Self>(weight)
        }

        /// See [`kth_magnitude`].
        #[fusion(default)]
        fn kth_magnitude(weight: FloatTensor<Self>, k: usize) -> FloatTensor<Self> {
            reference::kth_magnitude::<Self>(weight, k)
        }

        /// See [`round_scale`].
        #[fusion(default)]
        fn round_scale(scale: FloatTensor<Self>) -> FloatTensor<Self> {
            reference::round_scale::<Self>(scale)
        }

        /// See [`absmax_quantize`].
        #[fusion(default)]
        fn absmax_quantize(input: FloatTensor<Self>, levels: f32, scale: RowScale) -> FloatTensor<Self> {
            reference::absmax_quantize::<Self>(input, levels, scale)
        }
    }
}

/// The estimate of `d ternary_quantize / d weight` in the backward pass.
///
/// `v = weight / scale` is inside when `|v| <= clip`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StraightThrough {
    /// Where the quantizer saturates: 1 for LSQ-style scales, 1.485 for SEQ (`0.99 a` with `scale = 2a / 3`), 0 for codes
    /// that do not depend on the scale.
    pub clip: f32,
    /// The gradient of the weights outside.
    pub outside: OutsideGradient,
}

/// What a [`StraightThrough`] estimator does with the gradient `G` of a weight outside its clip range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutsideGradient {
    /// `dw = G`, as inside.
    Pass,
    /// `dw = 0`.
    Zero,
}

impl StraightThrough {
    /// `dw = G` everywhere: BitNet's estimator.
    pub const IDENTITY: Self = Self { clip: 1.0, outside: OutsideGradient::Pass };
}

/// The codes -1, 0, +1 of a weight: `sign(w)` where `|w| > threshold`, else 0; times the mask.
///
/// The one rounding rule of the crate. With `threshold = scale / 2` it is
/// `round_ties_even(clamp(w / scale, -1, 1))`, written without the division, so that every backend agrees to the bit.
/// No gradient.
///
/// # Shapes
/// - weight and mask (0 or 1): `[groups, n, channels]`
/// - threshold: `[groups, 1, channels]`
/// - output: as weight
pub fn ternary_codes(weight: Tensor<3>, threshold: Tensor<3>, mask: Option<Tensor<3>>) -> Tensor<3> {
    let threshold = prune(&weight, threshold, mask);
    Tensor::from_dispatch(Dispatch::ternary_codes(weight.into_dispatch(), threshold.into_dispatch()))
}

/// Fake quantization: `scale * codes`, with a straight-through gradient for the weight and the gradient of learned
/// step size quantization for the scale.
///
/// With `G` the gradient of the output, `v = w / scale`, codes `t` and `n` the weights that share a scale:
/// `dw = G` (outside the clip range, that of [`StraightThrough::outside`]), and
/// `dscale = 1/sqrt(n) * sum G * (t - v inside, t outside)`. Masked weights do not contribute to the gradient of the scale.
///
/// # Shapes
/// - weight and mask (0 or 1): `[groups, n, channels]`
/// - scale and threshold: `[groups, 1, channels]`; the threshold has no gradient
/// - output: as weight
///
/// # Source
/// Esser et al., Learned Step Size Quantization, equations 3 and 5; Liu et al., ParetoQ, for the clip range of SEQ.
pub fn ternary_quantize(
    weight: Tensor<3>,
    scale: Tensor<3>,
    threshold: Tensor<3>,
    mask: Option<Tensor<3>>,
    estimator: StraightThrough,
) -> Tensor<3> {
    let threshold = prune(&weight, threshold, mask);
    Tensor::from_dispatch(Dispatch::ternary_quantize(
        weight.into_dispatch(),
        scale.into_dispatch(),
        threshold.into_dispatch(),
        estimator,
    ))
}

/// The threshold of a pruned weight: no finite weight of its type exceeds it. Not infinity, because shader compilers assume
/// that infinities do not occur.
fn pruned(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => f16::MAX.to_f32(),
        DType::BF16 => bf16::MAX.to_f32(),
        _ => f32::MAX,
    }
}

/// Folds the mask into the threshold, which then is `[groups, n, channels]`.
fn prune(weight: &Tensor<3>, threshold: Tensor<3>, mask: Option<Tensor<3>>) -> Tensor<3> {
    match mask {
        Some(mask) => {
            let pruned = pruned(threshold.dtype());
            threshold.expand(weight.dims()).mask_fill(mask.equal_scalar(0.0), pruned)
        }
        None => threshold,
    }
}

/// `mean |w|` along dimension 1. No gradient.
///
/// # Shapes
/// `[groups, n, channels]` to `[groups, 1, channels]`
pub fn mean_abs(weight: Tensor<3>) -> Tensor<3> {
    Tensor::from_dispatch(Dispatch::mean_abs(weight.into_dispatch()))
}

/// The `k`-th smallest `|w|` along dimension 1, counted from 1; 0 for `k = 0`. No gradient.
///
/// A selection without arithmetic: the same bits on every backend.
///
/// # Shapes
/// `[groups, n, channels]` to `[groups, 1, channels]`
///
/// # Panics
/// If `k` exceeds `n`.
pub fn kth_magnitude(weight: Tensor<3>, k: usize) -> Tensor<3> {
    let n = weight.dims()[1];
    assert!(k <= n, "the {k}-th of {n} weights");
    Tensor::from_dispatch(Dispatch::kth_magnitude(weight.into_dispatch(), k))
}

/// The nearest f16 in [[`SCALE_MIN`], [`SCALE_MAX`]], ties to even, as f32. The gradient passes straight through.
///
/// A file with f16 scales then reproduces the training forward pass exactly.
///
/// # Shapes
/// `[groups, 1, channels]` to the same
pub fn round_scale(scale: Tensor<3>) -> Tensor<3> {
    Tensor::from_dispatch(Dispatch::round_scale(scale.into_dispatch()))
}

/// Precision of the scale of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowScale {
    /// Any f32: activations, whose scales are never stored.
    F32,
    /// Rounded to f16 as [`round_scale`] does: tables, whose scales a file stores.
    F16,
}

/// Fake quantization to `2 levels + 1` values with one scale per row: `scale = max|x| / levels`,
/// `x~ = scale * round_ties_even(clamp(x / scale, -levels, levels))`. The gradient passes straight through.
///
/// `levels` is 127 for int8, 7 for int4. A row is the last dimension: a token of activations, an entry of a table.
///
/// # Shapes
/// `[..., d]` to the same
///
/// # Source
/// Ma et al., The Era of 1-bit LLMs (BitNet b1.58), section 2.
pub fn absmax_quantize<const D: usize>(input: Tensor<D>, levels: f32, scale: RowScale) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::absmax_quantize(input.into_dispatch(), levels, scale))
}

/// The f16 scales with which [`absmax_quantize`] quantizes the rows of a table. No gradient.
///
/// # Shapes
/// `[rows, d]` to `[rows]`
pub fn absmax_scales(table: Tensor<2>, levels: f32) -> Tensor<1> {
    let [rows, _] = table.dims();
    let absmax = table.detach().max_abs_dim(1).clamp_min(ABSMAX_MIN);
    round_scale(absmax.div_scalar(levels).reshape([rows, 1, 1])).reshape([rows])
}
