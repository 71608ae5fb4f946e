//! Symmetric absmax fake quantization: int8 activations per token, int8 and int4 tables per row.

use super::{TernaryBackend, round_scale};
use burn::backend::{Dispatch, TensorMetadata, tensor::FloatTensor};
use burn::tensor::Tensor;

/// Smallest absolute maximum of a row; avoids division by zero for a row of zeros.
pub(super) const ABSMAX_MIN: f32 = 1e-5;

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

pub(super) fn quantize<B: TernaryBackend>(
    input: FloatTensor<B>,
    levels: f32,
    scale: RowScale,
) -> FloatTensor<B> {
    let last = input.shape().num_dims() - 1;
    let absmax = B::float_clamp_min(B::float_max_abs_dim(input.clone(), last), ABSMAX_MIN.into());
    let exact = B::float_div_scalar(absmax, levels.into());
    let scale = match scale {
        RowScale::F32 => exact,
        RowScale::F16 => B::round_scale(exact),
    };
    // The largest f16 may be too small for the scale of a row.
    let codes = B::float_clamp(B::float_div(input, scale.clone()), (-levels).into(), levels.into());
    B::float_mul(B::float_round(codes), scale)
}
