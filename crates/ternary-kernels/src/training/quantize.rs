//! The ternary quantizer.

use super::PIECE;
use crate::{
    Pool,
    elementwise::{load, store},
    simd::{Kernel, LANES, Simd},
};

/// `scale` with the sign of `weight` where `|weight| > threshold`, else 0.
///
/// # Shapes
/// weight and out `[groups, n, channels]`; scale and threshold `[groups, channels]`
///
/// # Panics
/// When lengths do not fit.
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
    // A row of `channels` weights where each has its own scale, a run of `n` weights where they share one.
    let row = if channels == 1 { n } else { channels };
    let rows = (PIECE / row).max(1);
    pool.chunks(out, rows * row, |index, _, out| {
        for (i, out) in out.chunks_mut(row).enumerate() {
            let at = index * rows + i;
            let weight = &weight[at * row..][..row];
            let group = if channels == 1 { at..at + 1 } else { at / n * channels..(at / n + 1) * channels };
            let (scale, threshold) = (&scale[group.clone()], &threshold[group]);
            pool.isa().run(Row { weight, scale, threshold, out });
        }
    });
}

struct Row<'a> {
    weight: &'a [f32],
    /// One, or one for each weight.
    scale: &'a [f32],
    threshold: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Row<'_> {
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
        for ((out, weight), (scale, threshold)) in out.chunks_mut(LANES).zip(weight.chunks(LANES)).zip(shared) {
            store(s, quantized(s, load(s, weight), load(s, scale), load(s, threshold)), out);
        }
    }
}

#[inline(always)]
fn quantized<S: Simd>(s: S, weight: S::Float, scale: S::Float, threshold: S::Float) -> S::Float {
    let zero = s.splat_f32(0.0);
    let above = s.select_greater(weight, threshold, scale, zero);
    s.select_greater(s.sub_f32(zero, weight), threshold, s.sub_f32(zero, scale), above)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::tests::{numbers, pools};

    #[test]
    fn weights_become_their_scale_or_zero_to_the_bit() {
        for [groups, n, channels] in [[1, 1, 1], [1, 37, 1], [3, 20, 1], [1, 5, 33], [4, 3, 16], [2, 70, 130]] {
            let (weight, scale) = (numbers(groups * n * channels, 2.0, 1), numbers(groups * channels, 1.0, 2));
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
