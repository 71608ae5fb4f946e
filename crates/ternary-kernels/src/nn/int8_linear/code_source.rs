//! Codes of a weight and of a gradient, computed while they are packed.
//!
//! Neither a fake quantized weight nor a matrix of the gradient's codes is written to memory: [`Int8TrainingMatrix`] asks for 16 rows
//! of a column at a time, and the answer goes into its cache lines.
//!
//! [`Int8TrainingMatrix`]: crate::Int8TrainingMatrix

use crate::{
    matmul::format::int8_training::ColumnSource,
    simd::{
        CacheLine, LANES, Simd,
        vector_ops::{load, store_codes},
    },
    thread_pool::DisjointSlices,
};
use std::ops::Range;

/// A source of ternary codes: the sign of each weight whose magnitude exceeds its threshold. The codes are also kept.
pub(super) struct SignCodes<'a> {
    /// `[d_input, d_output]`
    pub weight: &'a [f32],
    /// `[d_output]`
    pub thresholds: &'a [f32],
    /// `[d_input, d_output]`
    pub codes: DisjointSlices<'a, i8>,
}

impl ColumnSource for SignCodes<'_> {
    #[inline(always)]
    fn codes<S: Simd>(&self, s: S, col: usize, rows: Range<usize>) -> S::Int {
        let n = self.thresholds.len();
        let at = col * n + rows.start;
        // Prefetch the next block of columns: the CPU does not predict pieces this short.
        s.prefetch(&self.weight[at], n * LANES * size_of::<f32>() / size_of::<CacheLine>());
        let x = load(s, &self.weight[at..at + rows.len()]);
        let threshold = load(s, &self.thresholds[rows.clone()]);
        let (zero, one) = (s.splat_f32(0.0), s.splat_f32(1.0));
        let above = s.select_greater(x, threshold, one, zero);
        let negative = s.select_greater(s.sub_f32(zero, x), threshold, s.splat_f32(-1.0), above);
        let sign = s.to_int(negative);
        // SAFETY: each column of each 16 rows is read once.
        store_codes(s, sign, unsafe { self.codes.slice(at, rows.len()) });
        sign
    }
}

/// A source of int8 codes: `round(grad[t, o] * factors[t] / scales[o])` of a gradient `[tokens, d_output]`.
pub(super) struct GradientCodes<'a> {
    /// `[tokens, d_output]`
    pub grad: &'a [f32],
    /// `[tokens]`
    pub factors: &'a [f32],
    /// Inverse scales, `[d_output]`.
    pub inverse: &'a [f32],
}

impl ColumnSource for GradientCodes<'_> {
    #[inline(always)]
    fn codes<S: Simd>(&self, s: S, token: usize, outputs: Range<usize>) -> S::Int {
        let n = self.inverse.len();
        let grad = &self.grad[token * n..][outputs.clone()];
        // As in `SignCodes`.
        s.prefetch(&grad[0], n * LANES * size_of::<f32>() / size_of::<CacheLine>());
        let grad = load(s, grad);
        let factor = s.splat_f32(self.factors[token]);
        // At most 127, but for a rounding error, which to_int rounds off.
        s.to_int(s.mul_f32(s.mul_f32(grad, factor), load(s, &self.inverse[outputs])))
    }
}
