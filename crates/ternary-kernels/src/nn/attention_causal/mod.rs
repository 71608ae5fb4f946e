//! Causal attention over whole sequences, forward and backward, for training.
//!
//! # Shapes
//! ```text
//! query, out   [batch, seq, heads * width]          head h reads key-value head h / (heads / kv_heads)
//! key, value   [batch, seq, kv_heads * width]
//! ```
//!
//! # Algorithm
//! A task is one key-value head of one sequence, with all query heads that share it. Its matrices are copied to padded
//! memory of the thread ([`PaddedMatrix`](padded_matrix::PaddedMatrix)), so that the scores of one head, `[seq, seq]`, are all that is ever held:
//!
//! ```text
//! forward, per head:                              backward, per head:
//!   s = q k^T / sqrt(width), columns <= row         p = exp(s - log_partition)            recomputed, not stored
//!   p = softmax(s);  log_partition = log sum exp    dv += p^T grad
//!   out = p v                                       dp = grad v^T
//!                                                   ds = p (dp - sum(grad out)) / sqrt(width)
//!                                                   dq = ds k;  dk += ds^T q
//! ```
//!
//! `sum(grad out)` per row equals `sum(p dp)`, and needs no pass over the scores.
//!
//! # Triangles
//! Entries above the diagonal are zero, and about half of the work is skipped:
//!
//! | product | function | what is skipped |
//! |---|---|---|
//! | `q k^T`, `grad v^T` | [`multiply_visible`](triangular::multiply_visible) | columns beyond the row, in whole vectors |
//! | `p v`, `ds k` | [`multiply_lower`](triangular::multiply_lower) | summands beyond the row |
//! | `p^T grad`, `ds^T q` | [`add_upper`](triangular::add_upper) | summands before the row |
//!
//! The micro-kernel ([`multiply_block`](triangular::multiply_block)) keeps sums of 4 rows and 2 vectors of columns in registers (1 vector with AVX2 and
//! NEON).
//!
//! # Measured
//! On a Xeon with AMX, a training step of 768 x 12: reading the next head ahead gave 1,301, 1,313 and 1,297 tokens/s before
//! and 1,321, 1,347 and 1,311 after; two vectors of columns at a time, with other changes, 1,157 before and 1,256 after. Eight
//! rows at a time instead of four were 1 % slower.

mod head;
mod padded_matrix;
mod shape;
mod triangular;

pub use shape::AttentionShape;

use crate::{Pool, thread_pool::DisjointSlices};
use head::{Backward, BackwardBuffers, Forward, ForwardBuffers};

/// `out = softmax(q k^T / sqrt(width)) v`, where each position attends to itself and those before it.
///
/// `log_partition` receives the logarithm of each row's sum of exponentials, for the backward pass.
///
/// # Shapes
/// query, out `[batch, seq, heads * width]`; key, value `[batch, seq, kv_heads * width]`; log_partition
/// `[batch, heads, seq]`
///
/// # Panics
/// When lengths do not fit the shape, or `heads` is not a multiple of `kv_heads`.
///
/// # Example
/// ```
/// use ternary_kernels::{Pool, nn::{AttentionShape, causal_attention}};
/// let shape = AttentionShape { batch: 1, seq: 2, heads: 1, kv_heads: 1, width: 1 };
/// let (query, key, value) = ([0.0; 2], [0.0; 2], [1.0, 3.0]);
/// let (mut out, mut log_partition) = ([0.0; 2], [0.0; 2]);
/// causal_attention(&Pool::new(1), shape, [&query, &key, &value], &mut out, &mut log_partition);
/// // The second position attends to both with equal weights.
/// assert_eq!(out, [1.0, 2.0]);
/// ```
pub fn causal_attention(
    pool: &Pool,
    shape: AttentionShape,
    [query, key, value]: [&[f32]; 3],
    out: &mut [f32],
    log_partition: &mut [f32],
) {
    check(shape, [query.len(), out.len()], [key.len(), value.len()], log_partition.len());
    let share = shape.share();
    let (out, log_partition) = (DisjointSlices::new(out), DisjointSlices::new(log_partition));
    let mut per_thread: Vec<_> = (0..pool.threads()).map(|_| None).collect();
    let per_thread = DisjointSlices::new(&mut per_thread);
    let isa = pool.isa();
    pool.run(shape.batch * shape.kv_heads, |task, thread| {
        let (sequence, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
        // SAFETY: no two tasks have a thread at a time.
        let slot = unsafe { &mut per_thread.slice(thread, 1)[0] };
        let buffers = slot.get_or_insert_with(|| ForwardBuffers::new(shape));
        buffers.key.read(isa, key, shape, sequence, kv_head, shape.kv_heads);
        buffers.value.read(isa, value, shape, sequence, kv_head, shape.kv_heads);
        buffers.key_t.transpose(isa, &buffers.key);
        for head in kv_head * share..(kv_head + 1) * share {
            buffers.query.read(isa, query, shape, sequence, head, shape.heads);
            let start = (sequence * shape.heads + head) * shape.seq;
            // SAFETY: each head of a sequence is handled once.
            let log_partition = unsafe { log_partition.slice(start, shape.seq) };
            isa.run(Forward { shape, buffers, log_partition });
            // SAFETY: as above.
            unsafe { buffers.out.write(isa, &out, shape, [sequence, head, shape.heads]) };
        }
    });
}

/// Gradients of [`causal_attention`] for query, key and value, given its inputs, its outputs and the gradient of `out`.
///
/// With `p = softmax(..)`, `dv = p^T grad`, `dp = grad v^T`, `ds = p (dp - sum(grad out)) / sqrt(width)`,
/// `dq = ds k`, `dk = ds^T q`.
///
/// # Shapes
/// As of [`causal_attention`]; a gradient has the shape of its tensor.
///
/// # Panics
/// When lengths do not fit the shape.
///
/// # Source
/// Dao et al., "FlashAttention" (2022), algorithm 4.
pub fn causal_attention_backward(
    pool: &Pool,
    shape: AttentionShape,
    [query, key, value]: [&[f32]; 3],
    out: &[f32],
    log_partition: &[f32],
    grad: &[f32],
    [dquery, dkey, dvalue]: [&mut [f32]; 3],
) {
    check(shape, [query.len(), out.len()], [key.len(), value.len()], log_partition.len());
    check(shape, [dquery.len(), grad.len()], [dkey.len(), dvalue.len()], log_partition.len());
    let share = shape.share();
    let [dquery, dkey, dvalue] = [dquery, dkey, dvalue].map(DisjointSlices::new);
    let mut per_thread: Vec<_> = (0..pool.threads()).map(|_| None).collect();
    let per_thread = DisjointSlices::new(&mut per_thread);
    let isa = pool.isa();
    pool.run(shape.batch * shape.kv_heads, |task, thread| {
        let (sequence, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
        // SAFETY: no two tasks have a thread at a time.
        let slot = unsafe { &mut per_thread.slice(thread, 1)[0] };
        let (buffers, back) =
            slot.get_or_insert_with(|| (ForwardBuffers::new(shape), BackwardBuffers::new(shape)));
        // The heads that share a key-value head add to these.
        back.dkey.numbers.fill(0.0);
        back.dvalue.numbers.fill(0.0);
        buffers.key.read(isa, key, shape, sequence, kv_head, shape.kv_heads);
        buffers.value.read(isa, value, shape, sequence, kv_head, shape.kv_heads);
        buffers.key_t.transpose(isa, &buffers.key);
        back.value_t.transpose(isa, &buffers.value);
        for head in kv_head * share..(kv_head + 1) * share {
            buffers.query.read(isa, query, shape, sequence, head, shape.heads);
            buffers.out.read(isa, out, shape, sequence, head, shape.heads);
            back.grad.read(isa, grad, shape, sequence, head, shape.heads);
            let log_partition = &log_partition[(sequence * shape.heads + head) * shape.seq..][..shape.seq];
            isa.run(Backward { shape, buffers, back, log_partition });
            // SAFETY: each head of a sequence is handled once.
            unsafe { back.dquery.write(isa, &dquery, shape, [sequence, head, shape.heads]) };
        }
        for (from, to) in [(&back.dkey, &dkey), (&back.dvalue, &dvalue)] {
            // SAFETY: as above, for the heads of keys and values.
            unsafe { from.write(isa, to, shape, [sequence, kv_head, shape.kv_heads]) };
        }
    });
}

/// Checks all lengths.
fn check(shape: AttentionShape, queries: [usize; 2], keys: [usize; 2], rows: usize) {
    assert_eq!(queries, [shape.queries(); 2], "numbers of queries and results");
    assert_eq!(keys, [shape.keys(); 2], "numbers of keys and values");
    assert_eq!(rows, shape.rows(), "rows of scores");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, numbers, pools};

    /// `softmax(q k^T / sqrt(width)) v` in float64, by its definition.
    fn reference(shape: AttentionShape, [q, k, v]: [&[f64]; 3]) -> Vec<f64> {
        let mut out = vec![0.0; shape.queries()];
        let share = shape.heads / shape.kv_heads;
        for sequence in 0..shape.batch {
            for head in 0..shape.heads {
                for position in 0..shape.seq {
                    let at = shape.at(sequence, position, head, shape.heads);
                    let kv = |j: usize| shape.at(sequence, j, head / share, shape.kv_heads);
                    let weight = |j: usize| {
                        let dot = (0..shape.width).map(|c| q[at + c] * k[kv(j) + c]).sum::<f64>();
                        (dot / (shape.width as f64).sqrt()).exp()
                    };
                    let weights: Vec<f64> = (0..=position).map(weight).collect();
                    let sum: f64 = weights.iter().sum();
                    for c in 0..shape.width {
                        out[at + c] = weights.iter().enumerate().map(|(j, w)| w / sum * v[kv(j) + c]).sum();
                    }
                }
            }
        }
        out
    }

    #[test]
    fn forward_and_gradients_are_right() {
        for (batch, seq, heads, kv_heads, width) in
            [(1, 1, 1, 1, 1), (2, 5, 2, 1, 3), (1, 17, 4, 2, 16), (2, 34, 3, 3, 9)]
        {
            let shape = AttentionShape { batch, seq, heads, kv_heads, width };
            let inputs = [
                numbers(shape.queries(), 2.0, 1),
                numbers(shape.keys(), 2.0, 2),
                numbers(shape.keys(), 2.0, 3),
            ];
            let grad = numbers(shape.queries(), 1.0, 4);
            let mut exact = inputs.clone().map(|x| x.into_iter().map(f64::from).collect::<Vec<_>>());
            let expected = reference(shape, [&exact[0], &exact[1], &exact[2]]);
            let loss = |exact: &[Vec<f64>; 3]| -> f64 {
                let out = reference(shape, [&exact[0], &exact[1], &exact[2]]);
                out.iter().zip(&grad).map(|(out, grad)| out * f64::from(*grad)).sum()
            };
            // Every seventh slope: a difference costs two passes.
            let mut slopes: [Vec<(usize, f64)>; 3] = Default::default();
            for input in 0..3 {
                for i in (0..exact[input].len()).step_by(if seq > 20 { 37 } else { 7 }) {
                    let start = exact[input][i];
                    exact[input][i] = start + 1e-5;
                    let after = loss(&exact);
                    exact[input][i] = start - 1e-5;
                    let before = loss(&exact);
                    exact[input][i] = start;
                    slopes[input].push((i, (after - before) / 2e-5));
                }
            }
            let mut bits = None;
            for pool in pools() {
                let views = [&inputs[0][..], &inputs[1][..], &inputs[2][..]];
                let mut out = vec![f32::NAN; shape.queries()];
                let mut log_partition = vec![f32::NAN; shape.rows()];
                causal_attention(&pool, shape, views, &mut out, &mut log_partition);
                assert_close("out", &out, expected.iter().copied(), 3e-6);
                let mut grads = [
                    vec![f32::NAN; shape.queries()],
                    vec![f32::NAN; shape.keys()],
                    vec![f32::NAN; shape.keys()],
                ];
                let [dq, dk, dv] = &mut grads;
                causal_attention_backward(&pool, shape, views, &out, &log_partition, &grad, [dq, dk, dv]);
                for (found, slopes) in grads.iter().zip(&slopes) {
                    let at: Vec<f32> = slopes.iter().map(|(i, _)| found[*i]).collect();
                    assert!(found.iter().all(|x| x.is_finite()));
                    assert_close("gradient", &at, slopes.iter().map(|(_, slope)| *slope), 2e-5);
                }
                let now: Vec<u32> = out.iter().chain(grads.iter().flatten()).map(|x| x.to_bits()).collect();
                assert_eq!(*bits.get_or_insert_with(|| now.clone()), now, "{shape:?}: other bits");
            }
        }
    }

    #[test]
    fn later_positions_and_large_scores_do_no_harm() {
        let shape = AttentionShape { batch: 1, seq: 20, heads: 1, kv_heads: 1, width: 4 };
        let query = vec![100.0; shape.queries()];
        let mut key = numbers(shape.keys(), 100.0, 5);
        let value = numbers(shape.keys(), 1.0, 6);
        for pool in pools() {
            let run = |key: &[f32]| {
                let mut out = vec![0.0; shape.queries()];
                causal_attention(&pool, shape, [&query, key, &value], &mut out, &mut [0.0; 20]);
                assert!(out.iter().all(|x| x.is_finite()));
                out
            };
            let before = run(&key);
            key[19 * 4..].fill(f32::MAX / 1e6);
            assert_eq!(run(&key)[..19 * 4], before[..19 * 4]);
        }
    }
}
