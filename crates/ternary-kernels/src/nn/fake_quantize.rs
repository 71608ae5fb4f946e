//! Fake quantization: ternary weights, activations rounded by their absolute maximum, and the means that scales are made of.
//!
//! Results agree to the bit with the float operations of any backend: values are divided by their scale and rounded ties to
//! even, and weights are compared with a threshold, without a division.
//!
//! # Measured
//! Means of magnitudes by larger blocks, so that one thread adds up fewer partial sums: a training step of 768 x 12 on two threads with
//! AMX had 1717, 1745 and 1759 tokens/s before, 1745, 1766 and 1782 after.

use crate::{
    Pool,
    simd::{
        Kernel, LANES, Simd,
        vector_ops::{abs, load, store},
    },
    thread_pool::{TASK_LEN, rows_per_task},
};

/// `out = scale` with the sign of `weight` where `|weight| > threshold`, else 0.
///
/// # Shapes
/// weight and out `[groups, n, channels]`; scale and threshold `[groups, channels]`
///
/// # Panics
/// When lengths do not fit.
///
/// # Example
/// ```
/// use ternary_kernels::{Pool, nn::ternary_quantize};
/// let mut out = [0.0; 4];
/// ternary_quantize(&Pool::new(1), &[0.9, -0.2, 0.4, -0.7], [4, 1], &[0.5], &[0.25], &mut out);
/// assert_eq!(out, [0.5, 0.0, 0.5, -0.5]);
/// ```
pub fn ternary_quantize(
    pool: &Pool,
    weight: &[f32],
    [n, channels]: [usize; 2],
    scale: &[f32],
    threshold: &[f32],
    out: &mut [f32],
) {
    assert!(weight.len() == out.len() && weight.len() == scale.len() * n && scale.len() == threshold.len());
    assert!(scale.len().is_multiple_of(channels), "scales for {channels} channels");
    // A row of `channels` weights with a scale each, or a run of `n` weights that share one.
    let row = if channels == 1 { n } else { channels };
    let rows = (TASK_LEN / row).max(1);
    pool.chunks(out, rows * row, |index, _, out| {
        for (i, out) in out.chunks_mut(row).enumerate() {
            let at = index * rows + i;
            let weight = &weight[at * row..][..row];
            let group = if channels == 1 { at..at + 1 } else { at / n * channels..(at / n + 1) * channels };
            let (scale, threshold) = (&scale[group.clone()], &threshold[group]);
            pool.isa().run(TernarizeRow { weight, scale, threshold, out });
        }
    });
}

/// Rounds each row to `2 levels + 1` values: `scale = of(max(|x|, least))`,
/// `out = round_ties_even(clamp(x / scale, -levels, levels)) * scale`. NaN stays NaN.
///
/// # Shapes
/// x, out `[rows, d]`
///
/// # Panics
/// When `x` is not a whole number of rows, or lengths differ.
///
/// # Example
/// ```
/// use ternary_kernels::{Pool, nn::absmax_quantize};
/// let mut out = [0.0; 3];
/// // One row at 7 levels on either side of zero: the scale is 0.5.
/// absmax_quantize(&Pool::new(1), &[3.5, 0.6, -1.1], 3, 7.0, 1e-5, |max| max / 7.0, &mut out);
/// assert_eq!(out, [3.5, 0.5, -1.0]);
/// ```
pub fn absmax_quantize(
    pool: &Pool,
    x: &[f32],
    d: usize,
    levels: f32,
    least: f32,
    of: impl Fn(f32) -> f32 + Sync,
    out: &mut [f32],
) {
    assert!(x.len() == out.len() && x.len().is_multiple_of(d), "{} numbers, rows of {d}", x.len());
    let piece = rows_per_task(d) * d;
    pool.chunks(out, piece, |index, _, out| {
        for (out, x) in out.chunks_mut(d).zip(x[index * piece..].chunks(d)) {
            let max = pool.isa().run(Absmax { x, least });
            pool.isa().run(RoundRow { x, levels, scale: of(max), out });
        }
    });
}

/// `mean |x|` over `n`, per channel of each group.
///
/// Sums are in f32 within blocks of rows, and in f64 over the blocks.
///
/// # Shapes
/// x `[groups, n, channels]`, result `[groups, channels]`
///
/// # Panics
/// When `x` is not a whole number of groups.
pub fn mean_abs(pool: &Pool, x: &[f32], [n, channels]: [usize; 2]) -> Vec<f32> {
    assert!(x.len().is_multiple_of(n * channels), "{} numbers, groups of {n} x {channels}", x.len());
    // Large blocks: their sums are added up by one thread.
    let rows = if channels == 1 { TASK_LEN } else { (TASK_LEN / channels).max(64) }.min(n);
    let blocks = n.div_ceil(rows);
    let groups = x.len() / (n * channels);
    let piece = (TASK_LEN / (rows * channels)).max(1);
    let sums = pool.map_ranges(groups * blocks, piece, |range| {
        let mut sums = vec![0.0; range.len() * channels];
        for (index, sums) in range.zip(sums.chunks_mut(channels)) {
            let (group, first) = (index / blocks, index % blocks * rows);
            let block = &x[(group * n + first) * channels..][..rows.min(n - first) * channels];
            pool.isa().run(ColumnMagnitudes { x: block, sums });
        }
        sums
    });
    let mut blocks_of = sums.iter().flat_map(|sums| sums.chunks_exact(channels));
    let mut means = Vec::with_capacity(groups * channels);
    for _ in 0..groups {
        let mut sums = vec![0f64; channels];
        for block in blocks_of.by_ref().take(blocks) {
            sums.iter_mut().zip(block).for_each(|(sum, part)| *sum += f64::from(*part));
        }
        means.extend(sums.into_iter().map(|sum| (sum / n as f64) as f32));
    }
    means
}

/// Adds the magnitudes in each column of `[rows, columns]` to its sum, row by row. A single column is added by 16 partial sums.
struct ColumnMagnitudes<'a> {
    /// `[rows, columns]`
    x: &'a [f32],
    /// `[columns]`
    sums: &'a mut [f32],
}

impl Kernel for ColumnMagnitudes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // Vectors of columns with their sums in registers.
        const COLUMN_VECTORS: usize = 4;
        let n = self.sums.len();
        if let [sum] = self.sums {
            let (vectors, rest) = self.x.as_chunks::<LANES>();
            let add = |sums, x| s.add_f32(sums, abs(s, s.load_f32(x)));
            let lanes = s.to_array(vectors.iter().fold(s.splat_f32(0.0), add));
            *sum += lanes.iter().sum::<f32>() + rest.iter().map(|x| x.abs()).sum::<f32>();
            return;
        }
        let (groups, rest) = self.sums.as_chunks_mut::<{ COLUMN_VECTORS * LANES }>();
        let first = groups.len() * COLUMN_VECTORS * LANES;
        for (index, sums) in groups.iter_mut().enumerate() {
            let (vectors, _) = sums.as_chunks_mut::<LANES>();
            let mut found: [_; COLUMN_VECTORS] = std::array::from_fn(|i| s.load_f32(&vectors[i]));
            for row in self.x.chunks_exact(n) {
                let (row, _) =
                    row[index * COLUMN_VECTORS * LANES..][..COLUMN_VECTORS * LANES].as_chunks::<LANES>();
                for i in 0..COLUMN_VECTORS {
                    found[i] = s.add_f32(found[i], abs(s, s.load_f32(&row[i])));
                }
            }
            vectors.iter_mut().zip(found).for_each(|(sums, found)| s.store_f32(found, sums));
        }
        for (index, sums) in rest.chunks_mut(LANES).enumerate() {
            let mut found = load(s, sums);
            for row in self.x.chunks_exact(n) {
                found = s.add_f32(found, abs(s, load(s, &row[first + index * LANES..][..sums.len()])));
            }
            store(s, found, sums);
        }
    }
}

/// The absolute maximum of a row, at least `least`.
struct Absmax<'a> {
    /// One row.
    x: &'a [f32],
    /// The result is not smaller than this.
    least: f32,
}

impl Kernel for Absmax<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let zero = s.splat_f32(0.0);
        s.max_lanes(self.x.chunks(LANES).fold(s.splat_f32(self.least), |max, x| {
            let x = load(s, x);
            // In this order of arguments, max ignores a NaN.
            s.max_f32(s.max_f32(x, s.sub_f32(zero, x)), max)
        }))
    }
}

/// Rounds one row by its scale.
struct RoundRow<'a> {
    /// One row.
    x: &'a [f32],
    /// The largest code.
    levels: f32,
    /// The value of code 1.
    scale: f32,
    /// As long as `x`.
    out: &'a mut [f32],
}

impl Kernel for RoundRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (scale, lowest, zero) = (s.splat_f32(self.scale), s.splat_f32(-self.levels), s.splat_f32(0.0));
        for (out, x) in self.out.chunks_mut(LANES).zip(self.x.chunks(LANES)) {
            let x = load(s, x);
            let above = s.max_f32(s.div_f32(x, scale), lowest);
            let within = s.sub_f32(zero, s.max_f32(s.sub_f32(zero, above), lowest));
            // Adds zero, or NaN to a NaN.
            store(s, s.fma(s.to_float(s.to_int(within)), scale, s.sub_f32(x, x)), out);
        }
    }
}

/// Quantizes the weights of one row.
struct TernarizeRow<'a> {
    /// One row.
    weight: &'a [f32],
    /// One scale for the row, or one for each weight.
    scale: &'a [f32],
    /// As many as scales.
    threshold: &'a [f32],
    /// As long as `weight`.
    out: &'a mut [f32],
}

impl Kernel for TernarizeRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { weight, scale, threshold, out } = self;
        if let ([scale], [threshold]) = (scale, threshold) {
            let (scale, threshold) = (s.splat_f32(*scale), s.splat_f32(*threshold));
            for (out, weight) in out.chunks_mut(LANES).zip(weight.chunks(LANES)) {
                store(s, quantized(s, load(s, weight), scale, threshold), out);
            }
            return;
        }
        let shared = scale.chunks(LANES).zip(threshold.chunks(LANES));
        for ((out, weight), (scale, threshold)) in out.chunks_mut(LANES).zip(weight.chunks(LANES)).zip(shared)
        {
            store(s, quantized(s, load(s, weight), load(s, scale), load(s, threshold)), out);
        }
    }
}

/// `scale` with the sign of `weight` where its magnitude exceeds `threshold`, else 0.
#[inline(always)]
fn quantized<S: Simd>(s: S, weight: S::Float, scale: S::Float, threshold: S::Float) -> S::Float {
    let zero = s.splat_f32(0.0);
    let above = s.select_greater(weight, threshold, scale, zero);
    s.select_greater(s.sub_f32(zero, weight), threshold, s.sub_f32(zero, scale), above)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, numbers, pools};

    #[test]
    fn rows_are_rounded_to_the_bit_and_a_nan_stays() {
        for (rows, d) in [(1, 1), (3, 7), (5, 16), (40, 900)] {
            let mut x = numbers(rows * d, 3.0, 1);
            x[d - 1] = f32::NAN;
            for (levels, of) in [(127.0, 1.0f32), (7.0, 0.9)] {
                for pool in pools() {
                    let mut out = vec![9.0; x.len()];
                    absmax_quantize(&pool, &x, d, levels, 1e-5, |max| max / levels * of, &mut out);
                    for (out, x) in out.chunks(d).zip(x.chunks(d)) {
                        let scale = x.iter().fold(1e-5f32, |max, x| max.max(x.abs())) / levels * of;
                        for (out, x) in out.iter().zip(x) {
                            let expected = (x / scale).clamp(-levels, levels).round_ties_even() * scale;
                            assert!(*out == expected || out.is_nan() && x.is_nan(), "{out}, {expected}, {x}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn means_of_magnitudes_are_right_and_the_same_bits() {
        for [groups, n, channels] in
            [[1, 1, 1], [3, 7, 1], [1, 40_000, 1], [2, 5, 64], [3, 300, 100], [1, 70, 785]]
        {
            let x = numbers(groups * n * channels, 3.0, 1);
            let exact = (0..groups * channels).map(|i| {
                let column = x[i / channels * n * channels..][..n * channels].iter().skip(i % channels);
                column.step_by(channels).map(|x| f64::from(x.abs())).sum::<f64>() / n as f64
            });
            let exact: Vec<f64> = exact.collect();
            let found: Vec<_> = pools().iter().map(|pool| mean_abs(pool, &x, [n, channels])).collect();
            assert_close("mean", &found[0], exact, 1e-6);
            let bits = |means: &[f32]| means.iter().map(|mean| mean.to_bits()).collect::<Vec<_>>();
            assert!(found.iter().all(|means| bits(means) == bits(&found[0])), "{groups} {n} {channels}");
        }
    }

    #[test]
    fn weights_become_their_scale_or_zero_to_the_bit() {
        for [groups, n, channels] in [[1, 1, 1], [1, 37, 1], [3, 20, 1], [1, 5, 33], [4, 3, 16], [2, 70, 130]]
        {
            let (weight, scale) =
                (numbers(groups * n * channels, 2.0, 1), numbers(groups * channels, 1.0, 2));
            let scale: Vec<f32> = scale.iter().map(|s| s.abs() + 0.1).collect();
            let threshold: Vec<f32> = scale.iter().map(|s| s * 0.5).collect();
            let mut weight = weight;
            // At a threshold, and a NaN.
            weight[0] = threshold[0];
            let last = weight.len() - 1;
            weight[last] = if last > 0 { f32::NAN } else { weight[0] };
            for pool in pools() {
                let mut out = vec![9.0; weight.len()];
                ternary_quantize(&pool, &weight, [n, channels], &scale, &threshold, &mut out);
                for (i, (found, w)) in out.iter().zip(&weight).enumerate() {
                    let owner = i / (n * channels) * channels + i % channels;
                    let kept = w.abs() > threshold[owner];
                    let expected = if kept { scale[owner].copysign(*w) } else { 0.0 };
                    assert_eq!(*found, expected, "{i} of {groups} {n} {channels}");
                }
            }
        }
    }
}
