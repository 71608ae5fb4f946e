//! The forward and the backward pass of one head.
//!
//! # Softmax
//! The factor `scale = 1 / sqrt(width)` is not a pass over the scores of its own. With `max` the largest score of a row:
//!
//! ```text
//! forward:   e = exp(scale x - scale max)       one multiply-add and the exponential
//!            log_partition = scale max + log(sum e)
//!            p = e / sum e
//! backward:  p = exp(scale x - log_partition)   no maximum, no sum, no division
//! ```
//!
//! So the forward pass stores one float per row for the backward pass, and the `[seq, seq]` probabilities are computed twice
//! instead of kept.
//!
//! # Memory
//! A thread has one `[seq, seq]` matrix in the forward pass and two in the backward pass, whatever the number of heads and
//! sequences; all others are `[seq, width]`. The query heads that share a key-value head run one after the other, so their
//! gradients of keys and values are summed without a lock.

use super::{
    padded_matrix::PaddedMatrix,
    shape::AttentionShape,
    triangular::{ROWS, RowFactor, TransposedFactor, add_upper, multiply_lower, multiply_visible},
};
use crate::simd::{
    Kernel, LANES, Simd,
    vector_ops::{exp, load, load_padded, store},
};

/// Padded matrices of a thread for the forward pass; the backward pass needs them too.
pub(super) struct ForwardBuffers {
    /// `[seq, width]`
    pub query: PaddedMatrix,
    /// `[seq, width]`
    pub key: PaddedMatrix,
    /// The transpose of the keys, `[width, seq]`.
    pub key_t: PaddedMatrix,
    /// `[seq, width]`
    pub value: PaddedMatrix,
    /// Scores, then probabilities, `[seq, seq]`.
    pub scores: PaddedMatrix,
    /// `[seq, width]`
    pub out: PaddedMatrix,
}

impl ForwardBuffers {
    pub fn new(shape: AttentionShape) -> Self {
        let rows = || PaddedMatrix::new(shape.seq, shape.width);
        Self {
            query: rows(),
            key: rows(),
            key_t: PaddedMatrix::new(shape.width, shape.seq),
            value: rows(),
            scores: PaddedMatrix::new(shape.seq, shape.seq),
            out: rows(),
        }
    }
}

/// Padded matrices of a thread for the backward pass.
pub(super) struct BackwardBuffers {
    /// The transpose of the values, `[width, seq]`.
    pub value_t: PaddedMatrix,
    /// Gradient of the output, `[seq, width]`.
    pub grad: PaddedMatrix,
    /// `dp`, then `ds`, `[seq, seq]`.
    pub dscores: PaddedMatrix,
    /// `[seq, width]`
    pub dquery: PaddedMatrix,
    /// `[seq, width]`, summed over the query heads.
    pub dkey: PaddedMatrix,
    /// `[seq, width]`, summed over the query heads.
    pub dvalue: PaddedMatrix,
}

impl BackwardBuffers {
    pub fn new(shape: AttentionShape) -> Self {
        let rows = || PaddedMatrix::new(shape.seq, shape.width);
        Self {
            value_t: PaddedMatrix::new(shape.width, shape.seq),
            grad: rows(),
            dscores: PaddedMatrix::new(shape.seq, shape.seq),
            dquery: rows(),
            dkey: rows(),
            dvalue: rows(),
        }
    }
}

/// The forward pass of one head.
pub(super) struct Forward<'a> {
    pub shape: AttentionShape,
    pub buffers: &'a mut ForwardBuffers,
    pub log_partition: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { shape: AttentionShape { width, seq, .. }, buffers, log_partition } = self;
        multiply_visible(s, &buffers.query, &buffers.key_t, width, seq, &mut buffers.scores);
        let scale = self.shape.scale();
        for (position, log_partition) in log_partition.iter_mut().enumerate() {
            let row = buffers.scores.row_mut(position);
            let (seen, unseen) = row.split_at_mut(position + 1);
            // Rows are computed in fours and columns in vectors, so some scores beyond the diagonal were written: clear them.
            let computed = unseen.len().min(ROWS + LANES);
            unseen[..computed].fill(0.0);
            let lowest = f32::NEG_INFINITY;
            let max = seen
                .chunks(LANES)
                .fold(s.splat_f32(lowest), |max, x| s.max_f32(max, load_padded(s, x, lowest)));
            // exp(scale * x - scale * max), summed, then divided by the sum.
            let max = s.max_lanes(max) * scale;
            let (scales, maxima) = (s.splat_f32(scale), s.splat_f32(-max));
            let mut sum = 0.0;
            let mut sums = s.splat_f32(0.0);
            for x in seen.chunks_mut(LANES) {
                let value = exp(s, s.fma(load(s, x), scales, maxima));
                store(s, value, x);
                // Loaded again, so that lanes beyond the diagonal are zero.
                sums = s.add_f32(sums, load(s, x));
            }
            sum += s.sum_lanes(sums);
            *log_partition = max + sum.ln();
            let factor = s.splat_f32(1.0 / sum);
            for x in seen.chunks_mut(LANES) {
                store(s, s.mul_f32(load(s, x), factor), x);
            }
        }
        multiply_lower(s, &RowFactor(&buffers.scores), &buffers.value, seq, &mut buffers.out);
    }
}

/// The backward pass of one head.
pub(super) struct Backward<'a> {
    pub shape: AttentionShape,
    pub buffers: &'a mut ForwardBuffers,
    pub back: &'a mut BackwardBuffers,
    pub log_partition: &'a [f32],
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { shape: AttentionShape { width, seq, .. }, buffers, back, log_partition } = self;
        let scale = self.shape.scale();
        multiply_visible(s, &buffers.query, &buffers.key_t, width, seq, &mut buffers.scores);
        multiply_visible(s, &back.grad, &back.value_t, width, seq, &mut back.dscores);
        for (position, log_partition) in log_partition.iter().enumerate() {
            // sum(grad out) of the row, which equals sum(p dp).
            let mut along = s.splat_f32(0.0);
            for (grad, out) in
                back.grad.row(position).chunks(LANES).zip(buffers.out.row(position).chunks(LANES))
            {
                along = s.fma(load(s, grad), load(s, out), along);
            }
            let along = s.splat_f32(s.sum_lanes(along));
            let (scales, partitions) = (s.splat_f32(scale), s.splat_f32(-log_partition));
            let (scores, dscores) = (buffers.scores.row_mut(position), back.dscores.row_mut(position));
            // p = exp(s - log_partition) and ds = p (dp - along) * scale, in place.
            for (p, ds) in scores[..=position].chunks_mut(LANES).zip(dscores[..=position].chunks_mut(LANES)) {
                let value = exp(s, s.fma(load(s, p), scales, partitions));
                let slope = s.mul_f32(s.mul_f32(value, s.sub_f32(load(s, ds), along)), scales);
                store(s, value, p);
                store(s, slope, ds);
            }
            for row in [scores, dscores] {
                let unseen = &mut row[position + 1..];
                let computed = unseen.len().min(ROWS + LANES);
                unseen[..computed].fill(0.0);
            }
        }
        add_upper(s, &TransposedFactor(&buffers.scores), &back.grad, seq, &mut back.dvalue);
        add_upper(s, &TransposedFactor(&back.dscores), &buffers.query, seq, &mut back.dkey);
        multiply_lower(s, &RowFactor(&back.dscores), &buffers.key, seq, &mut back.dquery);
    }
}
