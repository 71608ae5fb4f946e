//! Cross entropy over a vocabulary, and its gradient.
//!
//! The loss of a row is `log Z - logit of the target`, with `Z = sum exp(logits)`. The forward pass returns both terms, so that
//! the caller may weigh them (a loss, a z-loss), and the backward pass takes a gradient for each.

use crate::{
    Pool,
    simd::{
        Kernel, LANES, Simd,
        vector_ops::{exp, load, load_padded, store},
    },
    thread_pool::rows_per_task,
};

/// For each row of logits: `[log Z, logit of the target, hit]`, where `Z = sum exp(logits)`, and `hit` is 1 if the target is the
/// first of the largest logits, else 0.
///
/// # Shapes
/// logits `[rows, vocab]`, targets `[rows]`, out `[rows]`
///
/// # Panics
/// When a target is not below `vocab`, or lengths differ.
///
/// # Example
/// ```
/// use ternary_kernels::{Pool, nn::cross_entropy};
/// let mut out = [[0.0; 3]];
/// cross_entropy(&Pool::new(1), &[0.0, 0.0, 0.0, 0.0], 4, &[1], &mut out);
/// let [log_z, logit, hit] = out[0];
/// assert!((log_z - logit - 4f32.ln()).abs() < 1e-6 && hit == 0.0);
/// ```
pub fn cross_entropy(pool: &Pool, logits: &[f32], vocab: usize, targets: &[usize], out: &mut [[f32; 3]]) {
    assert!(logits.len() == targets.len() * vocab && out.len() == targets.len());
    let piece = rows_per_task(vocab);
    pool.chunks(out, piece, |index, _, out| {
        let rows = logits[index * piece * vocab..].chunks(vocab);
        for ((out, row), target) in out.iter_mut().zip(rows).zip(&targets[index * piece..]) {
            let (max, log_partition) = pool.isa().run(Partition { row });
            let logit = row[*target];
            let hit = logit == max && row[..*target].iter().all(|x| *x < max);
            *out = [log_partition, logit, f32::from(u8::from(hit))];
        }
    });
}

/// The gradient for the logits, given those of `log Z` and of the target's logit for each row:
/// `dlogits = softmax(logits) * dlog_partition`, plus `dlogit` at the target.
///
/// # Shapes
/// logits, dlogits `[rows, vocab]`; targets, log_partition, grads `[rows]`
///
/// # Panics
/// As [`cross_entropy()`].
pub fn cross_entropy_backward(
    pool: &Pool,
    logits: &[f32],
    vocab: usize,
    targets: &[usize],
    log_partition: &[f32],
    grads: &[[f32; 2]],
    dlogits: &mut [f32],
) {
    let rows = targets.len();
    assert!(logits.len() == rows * vocab && dlogits.len() == logits.len());
    assert!(log_partition.len() == rows && grads.len() == rows);
    let piece = rows_per_task(vocab);
    pool.chunks(dlogits, piece * vocab, |index, _, dlogits| {
        for (i, out) in dlogits.chunks_mut(vocab).enumerate() {
            let row = index * piece + i;
            let [factor, at_target] = grads[row];
            let x = &logits[row * vocab..][..vocab];
            pool.isa().run(Softmax { x, log_partition: log_partition[row], factor, out });
            out[targets[row]] += at_target;
        }
    });
}

/// The largest logit of a row, and the logarithm of its sum of exponentials.
struct Partition<'a> {
    /// `[vocab]`
    row: &'a [f32],
}

impl Kernel for Partition<'_> {
    type Output = (f32, f32);

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (f32, f32) {
        let lowest = f32::NEG_INFINITY;
        let max = self
            .row
            .chunks(LANES)
            .fold(s.splat_f32(lowest), |max, x| s.max_f32(max, load_padded(s, x, lowest)));
        let max = s.max_lanes(max);
        let maxima = s.splat_f32(max);
        let (blocks, rest) = self.row.as_chunks::<LANES>();
        let mut sum = s.splat_f32(0.0);
        for x in blocks {
            sum = s.add_f32(sum, exp(s, s.sub_f32(s.load_f32(x), maxima)));
        }
        let tail = s.to_array(exp(s, s.sub_f32(load(s, rest), maxima)));
        let sum = s.sum_lanes(sum) + tail[..rest.len()].iter().sum::<f32>();
        (max, max + sum.ln())
    }
}

/// `out = exp(x - log_partition) * factor`
struct Softmax<'a> {
    /// Logits, `[vocab]`.
    x: &'a [f32],
    /// Logarithm of the sum of exponentials of the row.
    log_partition: f32,
    /// The gradient of `log Z`.
    factor: f32,
    /// `[vocab]`
    out: &'a mut [f32],
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (log_partition, factor) = (s.splat_f32(self.log_partition), s.splat_f32(self.factor));
        for (out, x) in self.out.chunks_mut(LANES).zip(self.x.chunks(LANES)) {
            store(s, s.mul_f32(exp(s, s.sub_f32(load(s, x), log_partition)), factor), out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, numbers, pools};

    #[test]
    fn forward_and_backward_are_right() {
        for (rows, vocab) in [(1, 1), (3, 7), (5, 16), (2, 65), (4, 8192)] {
            let logits = numbers(rows * vocab, 8.0, 1);
            let targets: Vec<usize> = (0..rows).map(|row| row * 31 % vocab).collect();
            let grads: Vec<[f32; 2]> =
                numbers(2 * rows, 1.0, 2).chunks(2).map(|pair| [pair[0], pair[1]]).collect();
            let exact: Vec<f64> = logits.iter().map(|x| f64::from(*x)).collect();
            let partition = |row: usize| exact[row * vocab..][..vocab].iter().map(|x| x.exp()).sum::<f64>();
            for pool in pools() {
                let mut out = vec![[0.0; 3]; rows];
                cross_entropy(&pool, &logits, vocab, &targets, &mut out);
                for (row, [log_partition, logit, hit]) in out.iter().enumerate() {
                    assert!((f64::from(*log_partition) - partition(row).ln()).abs() < 2e-6 * 8.0);
                    let values = &logits[row * vocab..][..vocab];
                    assert_eq!(*logit, values[targets[row]]);
                    let largest = (0..vocab).rev().max_by(|a, b| values[*a].total_cmp(&values[*b])).unwrap();
                    assert_eq!(*hit == 1.0, largest == targets[row]);
                }
                let log_partition: Vec<f32> = out.iter().map(|out| out[0]).collect();
                let mut dlogits = vec![0.0; logits.len()];
                cross_entropy_backward(&pool, &logits, vocab, &targets, &log_partition, &grads, &mut dlogits);
                let expected = exact.iter().enumerate().map(|(i, x)| {
                    let (row, id) = (i / vocab, i % vocab);
                    let [factor, at_target] = grads[row].map(f64::from);
                    x.exp() / partition(row) * factor + if id == targets[row] { at_target } else { 0.0 }
                });
                assert_close("dlogits", &dlogits, expected, 3e-6);
            }
        }
    }

    #[test]
    fn the_first_of_equal_logits_is_the_hit() {
        for pool in pools() {
            let mut out = [[0.0; 3]; 2];
            cross_entropy(&pool, &[1.0, 5.0, 5.0, 1.0, 5.0, 5.0], 3, &[1, 2], &mut out);
            assert_eq!(out.map(|out| out[2]), [1.0, 0.0]);
        }
    }
}
