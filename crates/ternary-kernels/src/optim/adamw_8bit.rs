//! AdamW whose moments are kept at eight bits.

use super::AdamW;
use crate::{
    Pool,
    simd::{
        Kernel, LANES, Simd,
        vector_ops::{load, store},
    },
    thread_pool::Disjoint,
};

/// Numbers whose moments share their scales.
pub const MOMENTS: usize = 256;

/// Blocks of a task.
const BLOCKS: usize = 64;

/// The first moment of 256 numbers and the root of the second, as bytes: floats of their own kind, times a scale.
///
/// | | sign | exponent | mantissa | of the block's largest |
/// |---|---|---|---|---|
/// | first | 1 bit | 4 bits | 3 bits | 2^-16 to 1 |
/// | root of the second | | 4 bits | 4 bits | 2^-16 to 1 |
///
/// A moment is rounded to the nearest, by at most 1/16, the root by at most 1/32 of itself; what is smaller than the range becomes its
/// least. Where all moments of a block fade alike, the scale does, and no code has to: an average that is slower than the
/// steps between codes does not stand still.
///
/// # Source
/// Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022): blocks, and codes that are fine near zero. Theirs
/// have a table; these are made by shifts, and the root halves the range that the second moment needs.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct Moments {
    /// Of the first moment and of the root of the second.
    scales: [f32; 2],
    first: [i8; MOMENTS],
    root: [i8; MOMENTS],
}

/// 2^-15, the least that a code stands for.
const LEAST: f32 = 1.0 / 32768.0;
/// What the exponent of [`LEAST`] is in a float.
const BIAS: i32 = 112;
/// The greatest code of seven bits, 2^0 (1 + 7/8), and of eight, 2^0 (1 + 15/16).
const GREATEST: [f32; 2] = [1.875, 1.9375];

impl Moments {
    /// Moments before the first step.
    pub const ZERO: Self = Self { scales: [0.0; 2], first: [0; MOMENTS], root: [0; MOMENTS] };
    /// Four bytes each, that a copy must keep as they are.
    pub const WORDS: usize = size_of::<Self>() / 4;

    /// First and second moment of each number.
    pub fn values(&self) -> [[f32; MOMENTS]; 2] {
        let mut values = [[0.0; MOMENTS]; 2];
        Read { of: self, values: &mut values }.run(crate::simd::Scalar);
        values
    }

    /// As they lie in memory; the inverse of [`from_words`](Self::from_words).
    pub fn words(blocks: &[Self]) -> &[f32] {
        // SAFETY: a block is whole words without padding, and any bits are a float.
        unsafe { std::slice::from_raw_parts(blocks.as_ptr().cast(), blocks.len() * Self::WORDS) }
    }

    /// # Panics
    /// When `words` is not a whole number of blocks.
    pub fn from_words(words: &mut [f32]) -> &mut [Self] {
        assert!(words.len().is_multiple_of(Self::WORDS), "{} words are no whole blocks", words.len());
        // SAFETY: a block needs the alignment of a float, has no padding, and any bits are a block.
        unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len() / Self::WORDS) }
    }
}

/// [`adamw`](super::adamw) with the moments of each 256 numbers in a block; the step itself takes them before they are rounded.
///
/// # Panics
/// When lengths do not fit.
pub fn adamw_moments(pool: &Pool, step: AdamW, weight: &mut [f32], grad: &[f32], moments: &mut [Moments]) {
    assert!(weight.len() == grad.len() && moments.len() == grad.len().div_ceil(MOMENTS));
    let moments = Disjoint::new(moments);
    pool.chunks(weight, BLOCKS * MOMENTS, |index, _, weight| {
        let grad = &grad[index * BLOCKS * MOMENTS..][..weight.len()];
        // SAFETY: pieces do not overlap.
        let moments = unsafe { moments.slice(index * BLOCKS, weight.len().div_ceil(MOMENTS)) };
        for (block, (weight, grad)) in
            moments.iter_mut().zip(weight.chunks_mut(MOMENTS).zip(grad.chunks(MOMENTS)))
        {
            pool.isa().run(Step { step, weight, grad, block });
        }
    });
}

struct Step<'a> {
    step: AdamW,
    /// At most a block.
    weight: &'a mut [f32],
    grad: &'a [f32],
    block: &'a mut Moments,
}

impl Kernel for Step<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let AdamW { lr, beta1, beta2, epsilon, keep, corrections, grad_factor } = self.step;
        let c = |value: f32| s.splat_f32(value);
        let zero = c(0.0);
        // As in the step of floats.
        let root = corrections[1].sqrt();
        let (rate, epsilon) = (c(-lr * root / corrections[0]), c(epsilon * root));
        let scales = self.block.scales.map(c);
        let (mut firsts, mut roots) = ([0.0; MOMENTS], [0.0; MOMENTS]);
        let mut largest = [zero; 2];
        let (bytes, _) = self.block.first.as_chunks::<LANES>();
        let (root_bytes, _) = self.block.root.as_chunks::<LANES>();
        let numbers = self.weight.chunks_mut(LANES).zip(self.grad.chunks(LANES));
        for (i, (weight, grad)) in numbers.enumerate() {
            let grad = s.mul_f32(load(s, grad), c(grad_factor));
            let m = s.mul_f32(signed(s, s.load_i8(&bytes[i])), scales[0]);
            let r = s.mul_f32(unsigned(s, s.load_i8(&root_bytes[i])), scales[1]);
            let first = s.fma(m, c(beta1), s.mul_f32(grad, c(1.0 - beta1)));
            let second = s.fma(s.mul_f32(r, r), c(beta2), s.mul_f32(s.mul_f32(grad, grad), c(1.0 - beta2)));
            let second_root = s.sqrt_f32(second);
            let direction = s.div_f32(first, s.add_f32(second_root, epsilon));
            store(s, s.fma(direction, rate, s.mul_f32(load(s, weight), c(keep))), weight);
            store(s, first, &mut firsts[i * LANES..][..LANES]);
            store(s, second_root, &mut roots[i * LANES..][..LANES]);
            largest[0] = s.max_f32(s.max_f32(first, s.sub_f32(zero, first)), largest[0]);
            largest[1] = s.max_f32(second_root, largest[1]);
        }
        // The root of all moments that fit a float is far from its ends, the first moment may be anywhere.
        let scales = [0, 1].map(|i| (s.max_lanes(largest[i]) / GREATEST[i]).max(f32::MIN_POSITIVE));
        self.block.scales = scales;
        let inverse = scales.map(|scale| c(1.0 / scale));
        let (bytes, _) = self.block.first.as_chunks_mut::<LANES>();
        let (root_bytes, _) = self.block.root.as_chunks_mut::<LANES>();
        for i in 0..self.weight.len().div_ceil(LANES) {
            let first = s.mul_f32(load(s, &firsts[i * LANES..][..LANES]), inverse[0]);
            let root = s.mul_f32(load(s, &roots[i * LANES..][..LANES]), inverse[1]);
            let magnitude = s.max_f32(s.sub_f32(zero, first), first);
            let sign = s.shl::<7>(s.shr::<31>(s.float_to_bits(first)));
            s.store_i8(s.add(code::<S, 20>(s, magnitude), sign), &mut bytes[i]);
            s.store_i8(code::<S, 19>(s, root), &mut root_bytes[i]);
        }
    }
}

/// The code of `x` in 0 to [`GREATEST`]: the bits of the nearest float whose mantissa lacks the last `DROPPED`.
#[inline(always)]
fn code<S: Simd, const DROPPED: i32>(s: S, x: S::Float) -> S::Int {
    let bits = s.float_to_bits(s.max_f32(x, s.splat_f32(LEAST)));
    let shifted = s.sub(bits, s.splat((BIAS << 23) - (1 << (DROPPED - 1))));
    s.shr::<DROPPED>(shifted)
}

/// What the codes of seven bits and a sign stand for.
#[inline(always)]
fn signed<S: Simd>(s: S, codes: S::Int) -> S::Float {
    let magnitude = s.add(s.shl::<20>(s.and(codes, s.splat(0x7f))), s.splat(BIAS << 23));
    // The sign of the byte is that of the lane.
    s.bits_to_float(s.add(magnitude, s.shl::<31>(s.shr::<31>(codes))))
}

/// What the codes of eight bits stand for.
#[inline(always)]
fn unsigned<S: Simd>(s: S, codes: S::Int) -> S::Float {
    s.bits_to_float(s.add(s.shl::<19>(s.and(codes, s.splat(0xff))), s.splat(BIAS << 23)))
}

struct Read<'a> {
    of: &'a Moments,
    values: &'a mut [[f32; MOMENTS]; 2],
}

impl Kernel for Read<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [first, second] = self.values;
        let ((bytes, _), (roots, _)) =
            (self.of.first.as_chunks::<LANES>(), self.of.root.as_chunks::<LANES>());
        for (i, (first, second)) in first.chunks_mut(LANES).zip(second.chunks_mut(LANES)).enumerate() {
            let [scale, root_scale] = self.of.scales.map(|scale| s.splat_f32(scale));
            store(s, s.mul_f32(signed(s, s.load_i8(&bytes[i])), scale), first);
            let root = s.mul_f32(unsigned(s, s.load_i8(&roots[i])), root_scale);
            store(s, s.mul_f32(root, root), second);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        optim::adamw,
        testing::{numbers, pools},
    };

    fn step(time: i32) -> AdamW {
        let corrections = [0.9f32, 0.95].map(|beta| 1.0 - beta.powi(time));
        AdamW { lr: 0.02, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, keep: 0.998, corrections, grad_factor: 0.5 }
    }

    #[test]
    fn moments_are_rounded_to_a_sixteenth_or_to_the_least_of_their_block() {
        for len in [1, 17, MOMENTS, 3 * MOMENTS + 5] {
            // Magnitudes over seven decades.
            let grad: Vec<f32> =
                numbers(len, 1.0, 3).iter().map(|g| g * 10f32.powf(g.abs().fract() * 14.0 - 7.0)).collect();
            let mut bits = None;
            for pool in pools() {
                let mut blocks = vec![Moments::ZERO; len.div_ceil(MOMENTS)];
                let (mut weight, mut exact) = (numbers(len, 1.0, 1), numbers(len, 1.0, 1));
                let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
                adamw_moments(&pool, step(1), &mut weight, &grad, &mut blocks);
                adamw(&pool, step(1), &mut exact, &grad, &mut m, &mut v);
                // From moments that are zero the first step is that of floats.
                for (found, expected) in weight.iter().zip(&exact) {
                    assert!((found - expected).abs() <= 1e-6, "{found} {expected}");
                }
                for ((block, m), v) in blocks.iter().zip(m.chunks(MOMENTS)).zip(v.chunks(MOMENTS)) {
                    let [first, second] = block.values();
                    let top = |values: &[f32]| values.iter().fold(0f32, |top, x| top.max(x.abs()));
                    let (least, least_root) = (top(m) / 32768.0, top(v).sqrt() / 32768.0);
                    for i in 0..m.len() {
                        let error = (first[i] - m[i]).abs();
                        assert!(error <= m[i].abs() / 15.9 + least, "{} for {}", first[i], m[i]);
                        let (root, exact) = (second[i].sqrt(), v[i].sqrt());
                        assert!((root - exact).abs() <= exact / 31.9 + least_root, "{root} for {exact}");
                    }
                }
                let now: Vec<u32> = Moments::words(&blocks).iter().map(|word| word.to_bits()).collect();
                assert_eq!(*bits.get_or_insert_with(|| now.clone()), now, "other bits");
            }
        }
    }

    #[test]
    fn words_are_the_blocks() {
        let mut blocks = vec![Moments::ZERO; 2];
        let grad = numbers(MOMENTS + 9, 1.0, 4);
        adamw_moments(&Pool::new(1), step(1), &mut numbers(grad.len(), 1.0, 1), &grad, &mut blocks);
        let mut words = Moments::words(&blocks).to_vec();
        assert_eq!(words.len(), 2 * Moments::WORDS);
        assert_eq!(Moments::WORDS, 2 + 2 * MOMENTS / 4);
        assert_eq!(Moments::from_words(&mut words), &blocks);
    }

    /// A gradient that ends: the moments must fade with it, and with them the steps.
    #[test]
    fn moments_fade() {
        for beta2 in [0.95, 0.999] {
            let (pool, mut blocks) = (Pool::new(1), vec![Moments::ZERO]);
            let (grad, mut weight) = (numbers(MOMENTS, 1.0, 8), vec![0.0; MOMENTS]);
            let quiet = vec![0.0; MOMENTS];
            let steps = 4000;
            for time in 0..steps {
                let step = AdamW { beta2, ..step(100_000) };
                adamw_moments(&pool, step, &mut weight, if time < 10 { &grad } else { &quiet }, &mut blocks);
            }
            let [first, second] = blocks[0].values();
            assert!(first.iter().all(|m| m.abs() < 1e-30), "{first:?}");
            let faded = (f64::from(beta2).powi(steps - 10) as f32).max(1e-30);
            assert!(second.iter().all(|v| *v < faded), "{beta2}: {second:?} {faded}");
        }
    }

    /// Noisy gradients of a bowl: as near its bottom as with moments in floats.
    #[test]
    fn a_bowl_is_descended_as_with_floats() {
        let len = 2 * MOMENTS;
        let curvature: Vec<f32> = numbers(len, 1.0, 1).iter().map(|x| 10f32.powf(2.0 * x)).collect();
        let start = numbers(len, 1.0, 2);
        let pool = Pool::new(1);
        let loss = |weight: &[f32]| -> f64 {
            weight.iter().zip(&curvature).map(|(w, c)| f64::from(w * w * c)).sum::<f64>() / len as f64
        };
        let (mut bytes, mut blocks) = (start.clone(), vec![Moments::ZERO; 2]);
        let (mut floats, mut m, mut v) = (start.clone(), vec![0.0; len], vec![0.0; len]);
        for time in 1..=600 {
            let noise = numbers(len, 0.1, 100 + time as u64);
            let gradient = |weight: &[f32]| -> Vec<f32> {
                weight.iter().zip(&curvature).zip(&noise).map(|((w, c), n)| c * (2.0 * w + n)).collect()
            };
            let lr = 0.02 * (1.0 - time as f32 / 600.0);
            let step = AdamW { lr, keep: 1.0, ..step(time) };
            let grad = gradient(&bytes);
            adamw_moments(&pool, step, &mut bytes, &grad, &mut blocks);
            let grad = gradient(&floats);
            adamw(&pool, step, &mut floats, &grad, &mut m, &mut v);
        }
        let (first, bytes, floats) = (loss(&start), loss(&bytes), loss(&floats));
        assert!(floats < 0.01 * first, "{floats} of {first}");
        assert!(bytes < 1.2 * floats, "{bytes} with bytes, {floats} with floats");
    }
}
