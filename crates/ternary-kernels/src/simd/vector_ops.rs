//! Functions of vectors: loads and stores of partial vectors, absolute value, exponential, sigmoid.
//!
//! The last vector of a slice may have fewer than 16 values. [`load`] pads it and [`store`] cuts it off, so that kernels need
//! no code of their own for the remainder; whole vectors take the fast path.

use super::vector::{LANES, Simd};

/// Loads up to 16 values, followed by zeros.
#[inline(always)]
pub(crate) fn load<S: Simd>(s: S, values: &[f32]) -> S::Float {
    load_padded(s, values, 0.0)
}

/// Loads up to 16 values, followed by `padding`.
#[inline(always)]
pub(crate) fn load_padded<S: Simd>(s: S, values: &[f32], padding: f32) -> S::Float {
    match values.as_array::<LANES>() {
        Some(values) => s.load_f32(values),
        None => {
            let mut padded = [padding; LANES];
            padded[..values.len()].copy_from_slice(values);
            s.load_f32(&padded)
        }
    }
}

/// `|x|`, by clearing the sign bit.
#[inline(always)]
pub(crate) fn abs<S: Simd>(s: S, x: S::Float) -> S::Float {
    s.bits_to_float(s.and(s.float_to_bits(x), s.splat(0x7fff_ffff)))
}

/// Stores as many lanes as `values` has elements, at most 16.
#[inline(always)]
pub(crate) fn store<S: Simd>(s: S, a: S::Float, values: &mut [f32]) {
    match values.as_mut_array::<LANES>() {
        Some(values) => s.store_f32(a, values),
        None => values.copy_from_slice(&s.to_array(a)[..values.len()]),
    }
}

/// Stores the low byte of as many lanes as `codes` has elements, at most 16.
#[inline(always)]
pub(crate) fn store_codes<S: Simd>(s: S, a: S::Int, codes: &mut [i8]) {
    match codes.as_mut_array::<LANES>() {
        Some(codes) => s.store_i8(a, codes),
        None => {
            let mut block = [0; LANES];
            s.store_i8(a, &mut block);
            codes.copy_from_slice(&block[..codes.len()]);
        }
    }
}

/// Loads up to 16 codes, followed by zeros.
#[inline(always)]
pub(crate) fn load_codes<S: Simd>(s: S, codes: &[i8]) -> S::Int {
    match codes.as_array::<LANES>() {
        Some(codes) => s.load_i8(codes),
        None => {
            let mut block = [0; LANES];
            block[..codes.len()].copy_from_slice(codes);
            s.load_i8(&block)
        }
    }
}

/// `exp(x)`, to 2 units in the last place, for x in -87 to 88; x is clamped to that range.
///
/// With `n = round(x / ln 2)` and `r = x - n ln 2` (in two parts, so that no bits are lost), `exp(x) = 2^n exp(r)`. `exp(r)` is a
/// polynomial, and `2^n` is written into the exponent of a float.
///
/// # Source
/// Cephes, `expf`.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::Float) -> S::Float {
    let c = |value: f32| s.splat_f32(value);
    // `Simd` has a maximum and no minimum: `min(x, 88)` is `-max(-x, -88)`.
    let negative = s.sub_f32(c(0.0), x);
    let x = s.max_f32(s.sub_f32(c(0.0), s.max_f32(negative, c(-88.0))), c(-87.0));
    let n = s.to_int(s.mul_f32(x, c(std::f32::consts::LOG2_E)));
    let n_float = s.to_float(n);
    // The first part of ln 2 has few bits, so that its product with n is exact.
    let r = s.fma(n_float, c(-0.693_359_4), x);
    let r = s.fma(n_float, c(2.121_944_4e-4), r);
    let mut poly = c(1.987_569_1e-4);
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        poly = s.fma(poly, r, c(coefficient));
    }
    let mantissa = s.add_f32(s.fma(s.mul_f32(r, r), poly, r), c(1.0));
    // n is in -126..=127, so that n + 127 is the exponent of a normal number.
    s.mul_f32(mantissa, s.bits_to_float(s.shl::<23>(s.add(n, s.splat(127)))))
}

/// `1 / (1 + exp(-x))`
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::Float) -> S::Float {
    times_sigmoid(s, s.splat_f32(1.0), x)
}

/// `x / (1 + exp(-y))`
#[inline(always)]
pub(crate) fn times_sigmoid<S: Simd>(s: S, x: S::Float, y: S::Float) -> S::Float {
    s.div_f32(x, s.add_f32(s.splat_f32(1.0), exp(s, s.sub_f32(s.splat_f32(0.0), y))))
}
