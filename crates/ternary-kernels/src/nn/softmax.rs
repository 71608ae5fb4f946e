//! Softmax of one row, as methods of [`Isa`].
//!
//! Three passes over a row: maximum; exponentials and their sum; division. Subtracting the maximum keeps every exponential in 0 to 1,
//! and their sum at least 1. Sampling takes [`Isa::softmax_weights`], which leaves out the last pass: a draw only needs weights.

use crate::simd::{
    Isa, Kernel, LANES, Simd,
    vector_ops::{exp, load, load_padded, store},
};

impl Isa {
    /// Softmax in place: `x = exp(x - max(x)) / sum(exp(x - max(x)))`.
    pub fn softmax(self, x: &mut [f32]) {
        self.run(Softmax { x });
    }

    /// Unnormalized softmax in place: `x = exp((x - max(x)) / temperature)`. Results below `exp(-87)`, and those of negative infinity,
    /// are 0.
    pub fn softmax_weights(self, x: &mut [f32], temperature: f32) {
        self.run(SoftmaxWeights { x, temperature });
    }
}

/// See [`Isa::softmax`].
pub(crate) struct Softmax<'a> {
    /// The row, which is replaced.
    pub x: &'a mut [f32],
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (blocks, rest) = self.x.as_chunks_mut::<LANES>();
        let mut max = s.splat_f32(f32::NEG_INFINITY);
        for x in &*blocks {
            max = s.max_f32(max, s.load_f32(x));
        }
        let max = rest.iter().fold(s.max_lanes(max), |max, x| max.max(*x));
        let maxima = s.splat_f32(max);
        let mut sum = s.splat_f32(0.0);
        for x in &mut *blocks {
            let value = exp(s, s.sub_f32(s.load_f32(x), maxima));
            sum = s.add_f32(sum, value);
            s.store_f32(value, x);
        }
        let tail = s.to_array(exp(s, s.sub_f32(load(s, rest), maxima)));
        rest.copy_from_slice(&tail[..rest.len()]);
        let sum = s.sum_lanes(sum) + rest.iter().sum::<f32>();
        let factor = s.splat_f32(1.0 / sum);
        for x in self.x.chunks_mut(LANES) {
            store(s, s.mul_f32(load(s, x), factor), x);
        }
    }
}

/// See [`Isa::softmax_weights`].
struct SoftmaxWeights<'a> {
    /// Logits, which are replaced.
    x: &'a mut [f32],
    /// Divides the logits.
    temperature: f32,
}

impl Kernel for SoftmaxWeights<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut max = s.splat_f32(f32::NEG_INFINITY);
        for x in self.x.chunks(LANES) {
            max = s.max_f32(load_padded(s, x, f32::NEG_INFINITY), max);
        }
        let (max, temperature) = (s.splat_f32(s.max_lanes(max)), s.splat_f32(self.temperature));
        for x in self.x.chunks_mut(LANES) {
            // Divided after the subtraction: the difference may be infinite, and a quotient of infinities would be NaN.
            let power = s.div_f32(s.sub_f32(load(s, x), max), temperature);
            store(s, s.select_greater(power, s.splat_f32(-87.0), exp(s, power), s.splat_f32(0.0)), x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{SIZES, check, values};

    #[test]
    fn a_softmax_is_right() {
        for &n in SIZES {
            for scale in [0.0, 1.0, 80.0] {
                let x = values(n, scale);
                let max = f64::from(x.iter().fold(f32::NEG_INFINITY, |max, x| max.max(*x)));
                let powers: Vec<_> = x.iter().map(|x| (f64::from(*x) - max).exp()).collect();
                let sum: f64 = powers.iter().sum();
                check("softmax", 1e-6, &powers.iter().map(|p| p / sum).collect::<Vec<_>>(), |isa| {
                    let mut x = x.clone();
                    isa.softmax(&mut x);
                    x
                });
            }
        }
    }

    #[test]
    fn softmax_agrees_with_float64_on_every_instruction_set() {
        for n in [1, 15, 16, 37, 300] {
            for temperature in [0.3, 1.0, 7.0] {
                let mut logits: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1000) as f32 / 50.0) - 10.0).collect();
                logits[n / 2] = if n > 1 { f32::NEG_INFINITY } else { 3.0 };
                if n > 20 {
                    logits[n - 2] = -400.0;
                    logits[3] = f32::MIN;
                }
                let max = logits.iter().fold(f32::NEG_INFINITY, |max, x| max.max(*x));
                let mut first: Option<Vec<f32>> = None;
                for isa in Isa::available() {
                    let mut found = logits.clone();
                    isa.softmax_weights(&mut found, temperature);
                    for (found, logit) in found.iter().zip(&logits) {
                        let power = (f64::from(*logit) - f64::from(max)) / f64::from(temperature);
                        let expected = power.exp();
                        // A unit of the power in its last place is so much of the result.
                        let error = (f64::from(*found) - expected).abs() / expected.max(1e-37);
                        assert!(
                            error < 1e-6 + 1.2e-7 * power.abs().min(90.0),
                            "{found} for {expected}, {isa:?}"
                        );
                        assert!(power > -87.0 || *found == 0.0, "{isa:?}");
                    }
                    assert_eq!(first.get_or_insert(found.clone()), &found, "{isa:?}");
                }
            }
        }
        for isa in Isa::available() {
            let mut none = [f32::NEG_INFINITY; 3];
            isa.softmax_weights(&mut none, 1.0);
            assert_eq!(none, [0.0; 3]);
        }
    }
}
