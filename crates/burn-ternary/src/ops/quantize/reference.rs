//! The quantizers in float ops: the default bodies, and the oracle of faster ones.

use super::{ABSMAX_MIN, RowScale, SCALE_MAX, SCALE_MIN};
use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{DType, FloatDType, Shape, TensorData};

/// 1 where `|value| > bound`, else 0.
pub(super) fn beyond<B: Backend>(value: FloatTensor<B>, bound: FloatTensor<B>) -> FloatTensor<B> {
    let sign = B::float_sign(B::float_sub(B::float_abs(value), bound));
    B::float_clamp_min(sign, 0f32.into())
}

pub(super) fn codes<B: Backend>(weight: FloatTensor<B>, threshold: FloatTensor<B>) -> FloatTensor<B> {
    B::float_mul(B::float_sign(weight.clone()), beyond::<B>(weight, threshold))
}

pub(super) fn ternary_quantize<B: Backend>(
    weight: FloatTensor<B>,
    scale: FloatTensor<B>,
    threshold: FloatTensor<B>,
) -> FloatTensor<B> {
    B::float_mul(codes::<B>(weight, threshold), scale)
}

pub(super) fn mean_abs<B: Backend>(weight: FloatTensor<B>) -> FloatTensor<B> {
    B::float_mean_dim(B::float_abs(weight), 1)
}

pub(super) fn kth_magnitude<B: Backend>(weight: FloatTensor<B>, k: usize) -> FloatTensor<B> {
    let [groups, _, channels] = weight.shape().dims();
    if k == 0 {
        let dtype = weight.dtype();
        return B::float_zeros(Shape::new([groups, 1, channels]), &weight.device(), dtype.into());
    }
    let sorted = B::float_sort(B::float_abs(weight), 1, false);
    B::float_slice(sorted, &[(0..groups).into(), (k - 1..k).into(), (0..channels).into()])
}

/// Exponents of the normal f16 numbers.
const MIN_EXPONENT: i32 = -14;
const MAX_EXPONENT: i32 = 15;

/// Rounds in float ops that no compiler's rearrangement changes: with `2^e <= x < 2^(e+1)`, found by comparing with a
/// table, `round(x * 2^(10-e)) * 2^(e-10)`. The products with powers of two are exact and rounding is an instruction
/// of its own; shader compilers simplify the shorter `(x + m) - m` to `x`. A cast to f16 would do on devices that have
/// f16, which not all have.
pub(super) fn round_scale<B: Backend>(scale: FloatTensor<B>) -> FloatTensor<B> {
    let dtype = scale.dtype();
    if dtype != DType::F32 {
        // The last places below are those of f32.
        let rounded = round_scale::<B>(B::float_cast(scale, FloatDType::F32));
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

pub(super) fn absmax_quantize<B: Backend>(
    input: FloatTensor<B>,
    levels: f32,
    scale: RowScale,
) -> FloatTensor<B> {
    let last = input.shape().num_dims() - 1;
    let absmax = B::float_clamp_min(B::float_max_abs_dim(input.clone(), last), ABSMAX_MIN.into());
    let exact = B::float_div_scalar(absmax, levels.into());
    let scale = match scale {
        RowScale::F32 => exact,
        RowScale::F16 => round_scale::<B>(exact),
    };
    // The largest f16 may be too small for the scale of a row.
    let codes = B::float_clamp(B::float_div(input, scale.clone()), (-levels).into(), levels.into());
    B::float_mul(B::float_round(codes), scale)
}
