//! Symmetric fake quantization by the absolute maximum: int8 activations by token, int8 and int4 tables by row.

use super::TernaryBackend;
use burn::backend::{Backend, Dispatch, TensorMetadata, tensor::FloatTensor};
use burn::tensor::Tensor;

/// Smallest absolute maximum of a row; keeps a row of zeros from dividing by zero.
pub(super) const ABSMAX_MIN: f32 = 1e-5;

/// Fake quantization to `2 levels + 1` values with one scale a row: `scale = max|x| / levels`,
/// `x~ = scale * round_ties_even(x / scale)`. The gradient passes straight through.
///
/// `levels` is 127 for int8, 7 for int4. A row is the last dimension: a token of activations, an entry of a table.
///
/// # Shapes
/// `[..., d]` to the same
///
/// # Source
/// Ma et al., The Era of 1-bit LLMs (BitNet b1.58), section 2.
pub fn absmax_quantize<const D: usize>(input: Tensor<D>, levels: f32) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::absmax_quantize(input.into_dispatch(), levels))
}

pub(super) fn quantize<B: Backend>(input: FloatTensor<B>, levels: f32) -> FloatTensor<B> {
    let last = input.shape().num_dims() - 1;
    let absmax = B::float_clamp_min(B::float_max_abs_dim(input.clone(), last), ABSMAX_MIN.into());
    let scale = B::float_div_scalar(absmax, levels.into());
    B::float_mul(B::float_round(B::float_div(input, scale.clone())), scale)
}
