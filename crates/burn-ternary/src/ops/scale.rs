//! Scales: the mean magnitude, and rounding to values that f16 can hold.

use super::TernaryBackend;
use burn::backend::{Backend, Dispatch, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{Shape, Tensor, TensorData};

/// Smallest scale: just above the smallest normal f16, `2^-14`.
pub const SCALE_MIN: f32 = 6.103_515_6e-5;
/// Largest scale: the largest f16.
pub const SCALE_MAX: f32 = 65504.0;

/// `mean |w|` along dimension 1. No gradient.
///
/// # Shapes
/// `[groups, n, channels]` to `[groups, 1, channels]`
pub fn mean_abs(weight: Tensor<3>) -> Tensor<3> {
    Tensor::from_dispatch(Dispatch::mean_abs(weight.into_dispatch()))
}

/// The nearest f16 in [[`SCALE_MIN`], [`SCALE_MAX`]], ties to even, as f32. The gradient passes straight through.
///
/// A file whose blocks hold f16 scales then reproduces the training forward exactly.
///
/// # Shapes
/// `[groups, 1, channels]` to the same
pub fn round_scale(scale: Tensor<3>) -> Tensor<3> {
    Tensor::from_dispatch(Dispatch::round_scale(scale.into_dispatch()))
}

/// Rounds by float ops that no compiler's contraction or approximation changes: `p = 2^floor(log2 x)` by comparing
/// with a table, then `(x + m) - m` with `m = 1.5 * 2^13 p`, whose last place is the last place of an f16 near x.
/// A cast would do on backends that have f16; not all do.
pub(super) fn round<B: Backend>(scale: FloatTensor<B>) -> FloatTensor<B> {
    let device = scale.device();
    let shape = scale.shape();
    let scale = B::float_clamp(scale, SCALE_MIN.into(), SCALE_MAX.into());
    let scale = B::float_reshape(scale, Shape::new([shape.num_elements(), 1]));
    let table: Vec<f32> = (-14..16).map(|e| 2f32.powi(e)).collect();
    let table = B::float_from_data(TensorData::new(table, [1, 30]), &device);
    // sign(x - p) is 1 or 0 where p <= x, so sign + 1, cut at 1, says so.
    let at_most = B::float_sign(B::float_sub(scale.clone(), table.clone()));
    let at_most = B::float_clamp(B::float_add_scalar(at_most, 1f32.into()), 0f32.into(), 1f32.into());
    let power = B::float_max_dim(B::float_mul(at_most, table), 1);
    let magic = B::float_mul_scalar(power, (1.5 * 8192f32).into());
    let rounded = B::float_sub(B::float_add(scale, magic.clone()), magic);
    B::float_reshape(rounded, shape)
}
