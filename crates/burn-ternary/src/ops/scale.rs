//! Scales: the mean magnitude, and rounding to values that f16 can hold.

use super::TernaryBackend;
use burn::backend::{Backend, Dispatch, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{DType, FloatDType, Shape, Tensor, TensorData};

/// Smallest scale: the smallest normal f16, `2^-14`.
pub const SCALE_MIN: f32 = 1.0 / 16384.0;
/// Largest scale: the largest f16.
pub const SCALE_MAX: f32 = 65504.0;

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

pub(super) fn kth<B: Backend>(weight: FloatTensor<B>, k: usize) -> FloatTensor<B> {
    let [groups, _, channels] = weight.shape().dims();
    if k == 0 {
        let dtype = weight.dtype();
        return B::float_zeros(Shape::new([groups, 1, channels]), &weight.device(), dtype.into());
    }
    let sorted = B::float_sort(B::float_abs(weight), 1, false);
    B::float_slice(sorted, &[(0..groups).into(), (k - 1..k).into(), (0..channels).into()])
}

/// Rounds in float ops that no compiler's rearrangement changes: with `2^e <= x < 2^(e+1)`, found by comparing with a
/// table, `round(x * 2^(10-e)) * 2^(e-10)`. The products with powers of two are exact and rounding is an instruction
/// of its own; shader compilers simplify the shorter `(x + m) - m` to `x`. A cast to f16 would do on devices that have
/// f16, which not all have.
pub(super) fn round<B: Backend>(scale: FloatTensor<B>) -> FloatTensor<B> {
    let dtype = scale.dtype();
    if dtype != DType::F32 {
        // The last places below are those of f32.
        let rounded = round::<B>(B::float_cast(scale, FloatDType::F32));
        return B::float_cast(rounded, dtype.into());
    }
    let device = scale.device();
    let shape = scale.shape();
    let scale = B::float_clamp(scale, SCALE_MIN.into(), SCALE_MAX.into());
    let scale = B::float_reshape(scale, Shape::new([shape.num_elements(), 1]));
    let table = |power: fn(i32) -> f32| {
        let values: Vec<f32> = (MIN_EXPONENT..=MAX_EXPONENT).map(power).collect();
        let columns = values.len();
        B::float_from_data(TensorData::new(values, [1, columns]), &device)
    };
    // 1 where x >= bound: sign(x - bound) is 0 or 1 there and -1 elsewhere.
    let at_least = |bound| {
        let sign = B::float_sign(B::float_sub(scale.clone(), bound));
        B::float_clamp(B::float_add_scalar(sign, 1f32.into()), 0f32.into(), 1f32.into())
    };
    let binade = B::float_sub(at_least(table(|e| 2f32.powi(e))), at_least(table(|e| 2f32.powi(e + 1))));
    // One column is 1 and the others are 0, so these sums are exact.
    let of_binade = |power| B::float_sum_dim(B::float_mul(binade.clone(), table(power)), 1);
    let units = B::float_round(B::float_mul(scale.clone(), of_binade(|e| 2f32.powi(10 - e))));
    B::float_reshape(B::float_mul(units, of_binade(|e| 2f32.powi(e - 10))), shape)
}

/// Exponents of the normal f16 numbers.
const MIN_EXPONENT: i32 = -14;
const MAX_EXPONENT: i32 = 15;
