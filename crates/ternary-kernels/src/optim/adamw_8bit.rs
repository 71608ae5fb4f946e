//! AdamW with both moments at 8 bits per parameter ([`MomentBlock`]).
//!
//! # Layout
//! 256 consecutive parameters are a block of 520 bytes:
//!
//! ```text
//! | scale of m, f32 | scale of sqrt(v), f32 | 256 codes of m | 256 codes of sqrt(v) |
//!
//! code of m         s eeee mmm      value = (-1)^s * 2^(e - 15) * (1 + mmm / 8) * scale
//! code of sqrt(v)     eeee mmmm     value =          2^(e - 15) * (1 + mmmm / 16) * scale
//! ```
//!
//! A code is a small float, which is made from an f32 by a rounding addition and a shift, and expanded by a shift. Scales are such
//! that the largest number of a block has the largest code.
//!
//! # Why these codes
//! - The root of the second moment is stored, which halves the range of exponents that is needed.
//! - Where all moments of a block fade alike, only the scale changes. An average that moves more slowly than the distance between
//!   codes therefore does not get stuck.
//! - The step itself uses the new moments before they are rounded.
//!
//! # Step
//! ```text
//! for each block:
//!     decode m, sqrt(v);  update both in f32;  update the weights;  find the largest of each     (first pass)
//!     scales = largest / largest code;  encode                                                   (second pass, in the cache)
//! ```

use super::AdamWStep;
use crate::{
    Pool,
    simd::{
        Kernel, LANES, Simd,
        vector_ops::{load, store},
    },
    thread_pool::DisjointSlices,
};

/// Parameters per block, whose moments share their scales.
pub const MOMENT_BLOCK: usize = 256;

/// Blocks per task.
const TASK_BLOCKS: usize = 64;

/// The first moment of 256 parameters and the root of the second, at 8 bits each: small floats times a scale.
///
/// | | sign | exponent | mantissa | relative to the block's largest |
/// |---|---|---|---|---|
/// | first moment | 1 bit | 4 bits | 3 bits | 2^-16 to 1 |
/// | root of the second | | 4 bits | 4 bits | 2^-16 to 1 |
///
/// Rounding changes the first moment by at most 1/16 of itself, and the root of the second by at most 1/32. Smaller numbers
/// become the smallest of the range.
///
/// # Source
/// Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022): blocks, and codes that are fine near zero. Their
/// codes come from a table; these are made by shifts.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct MomentBlock {
    /// Scales of the first moment and of the root of the second.
    scales: [f32; 2],
    first: [i8; MOMENT_BLOCK],
    root: [i8; MOMENT_BLOCK],
}

/// 2^-15, the value of code 0 without its scale.
const MIN_CODE_VALUE: f32 = 1.0 / 32768.0;
/// The biased exponent of [`MIN_CODE_VALUE`] in an f32.
const MIN_CODE_EXPONENT: i32 = 112;
/// The values of the largest code of 7 bits, 2^0 (1 + 7/8), and of 8 bits, 2^0 (1 + 15/16).
const MAX_CODE_VALUES: [f32; 2] = [1.875, 1.9375];

impl MomentBlock {
    /// The moments before the first step.
    pub const ZERO: Self = Self { scales: [0.0; 2], first: [0; MOMENT_BLOCK], root: [0; MOMENT_BLOCK] };
    /// Size in 4-byte words. A copy must keep their bits.
    pub const WORDS: usize = size_of::<Self>() / 4;

    /// First and second moment of each parameter.
    pub fn values(&self) -> [[f32; MOMENT_BLOCK]; 2] {
        let mut values = [[0.0; MOMENT_BLOCK]; 2];
        Decode { of: self, values: &mut values }.run(crate::simd::Scalar);
        values
    }

    /// The blocks as 4-byte words; the inverse of [`from_words`](Self::from_words).
    pub fn words(blocks: &[Self]) -> &[f32] {
        // SAFETY: a block is whole words without padding, and any bits are a float.
        unsafe { std::slice::from_raw_parts(blocks.as_ptr().cast(), blocks.len() * Self::WORDS) }
    }

    /// Words as blocks; the inverse of [`words`](Self::words).
    ///
    /// # Panics
    /// When `words` is not a whole number of blocks.
    pub fn from_words(words: &mut [f32]) -> &mut [Self] {
        assert!(words.len().is_multiple_of(Self::WORDS), "{} words are no whole blocks", words.len());
        // SAFETY: a block needs the alignment of a float, has no padding, and any bits are a block.
        unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len() / Self::WORDS) }
    }
}

/// One [`adamw`](super::adamw()) step, with the moments of each 256 parameters in a block.
///
/// The step uses the new moments before they are rounded.
///
/// # Panics
/// When lengths do not fit.
pub fn adamw_8bit(
    pool: &Pool,
    step: AdamWStep,
    weight: &mut [f32],
    grad: &[f32],
    moments: &mut [MomentBlock],
) {
    assert!(weight.len() == grad.len() && moments.len() == grad.len().div_ceil(MOMENT_BLOCK));
    let moments = DisjointSlices::new(moments);
    pool.chunks(weight, TASK_BLOCKS * MOMENT_BLOCK, |index, _, weight| {
        let grad = &grad[index * TASK_BLOCKS * MOMENT_BLOCK..][..weight.len()];
        // SAFETY: tasks do not overlap.
        let moments = unsafe { moments.slice(index * TASK_BLOCKS, weight.len().div_ceil(MOMENT_BLOCK)) };
        for (block, (weight, grad)) in
            moments.iter_mut().zip(weight.chunks_mut(MOMENT_BLOCK).zip(grad.chunks(MOMENT_BLOCK)))
        {
            pool.isa().run(Step { step, weight, grad, block });
        }
    });
}

/// One step of one block.
struct Step<'a> {
    step: AdamWStep,
    /// At most a block.
    weight: &'a mut [f32],
    grad: &'a [f32],
    block: &'a mut MomentBlock,
}

impl Kernel for Step<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let AdamWStep { lr, beta1, beta2, epsilon, keep, corrections, grad_factor } = self.step;
        let c = |value: f32| s.splat_f32(value);
        let zero = c(0.0);
        // As in AdamW with f32 moments.
        let root = corrections[1].sqrt();
        let (rate, epsilon) = (c(-lr * root / corrections[0]), c(epsilon * root));
        let scales = self.block.scales.map(c);
        let (mut firsts, mut roots) = ([0.0; MOMENT_BLOCK], [0.0; MOMENT_BLOCK]);
        let mut largest = [zero; 2];
        let (bytes, _) = self.block.first.as_chunks::<LANES>();
        let (root_bytes, _) = self.block.root.as_chunks::<LANES>();
        // First pass: the step in f32, and the new moments to memory.
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
        // The root is far from the ends of the range of f32; the first moment may be anywhere, so the scale is kept normal.
        let scales = [0, 1].map(|i| (s.max_lanes(largest[i]) / MAX_CODE_VALUES[i]).max(f32::MIN_POSITIVE));
        self.block.scales = scales;
        // Second pass: the moments to codes.
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

/// The code of `x`, which is in 0 to [`MAX_CODE_VALUES`]: the upper bits of the nearest float whose last `DROPPED` mantissa bits are
/// zero.
#[inline(always)]
fn code<S: Simd, const DROPPED: i32>(s: S, x: S::Float) -> S::Int {
    let bits = s.float_to_bits(s.max_f32(x, s.splat_f32(MIN_CODE_VALUE)));
    let shifted = s.sub(bits, s.splat((MIN_CODE_EXPONENT << 23) - (1 << (DROPPED - 1))));
    s.shr::<DROPPED>(shifted)
}

/// The values of codes of a sign and 7 bits.
#[inline(always)]
fn signed<S: Simd>(s: S, codes: S::Int) -> S::Float {
    let magnitude = s.add(s.shl::<20>(s.and(codes, s.splat(0x7f))), s.splat(MIN_CODE_EXPONENT << 23));
    // The sign of the byte is that of the lane.
    s.bits_to_float(s.add(magnitude, s.shl::<31>(s.shr::<31>(codes))))
}

/// The values of codes of 8 bits.
#[inline(always)]
fn unsigned<S: Simd>(s: S, codes: S::Int) -> S::Float {
    s.bits_to_float(s.add(s.shl::<19>(s.and(codes, s.splat(0xff))), s.splat(MIN_CODE_EXPONENT << 23)))
}

/// Decodes a block to f32.
struct Decode<'a> {
    of: &'a MomentBlock,
    values: &'a mut [[f32; MOMENT_BLOCK]; 2],
}

impl Kernel for Decode<'_> {
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

    fn step(time: i32) -> AdamWStep {
        let corrections = [0.9f32, 0.95].map(|beta| 1.0 - beta.powi(time));
        AdamWStep {
            lr: 0.02,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            keep: 0.998,
            corrections,
            grad_factor: 0.5,
        }
    }

    #[test]
    fn eight_bit_moments_are_within_their_rounding() {
        for len in [1, 17, MOMENT_BLOCK, 3 * MOMENT_BLOCK + 5] {
            // Magnitudes over seven decades.
            let grad: Vec<f32> =
                numbers(len, 1.0, 3).iter().map(|g| g * 10f32.powf(g.abs().fract() * 14.0 - 7.0)).collect();
            let mut bits = None;
            for pool in pools() {
                let mut blocks = vec![MomentBlock::ZERO; len.div_ceil(MOMENT_BLOCK)];
                let (mut weight, mut exact) = (numbers(len, 1.0, 1), numbers(len, 1.0, 1));
                let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
                adamw_8bit(&pool, step(1), &mut weight, &grad, &mut blocks);
                adamw(&pool, step(1), &mut exact, &grad, &mut m, &mut v);
                // From moments that are zero the first step is that of floats.
                for (found, expected) in weight.iter().zip(&exact) {
                    assert!((found - expected).abs() <= 1e-6, "{found} {expected}");
                }
                for ((block, m), v) in blocks.iter().zip(m.chunks(MOMENT_BLOCK)).zip(v.chunks(MOMENT_BLOCK)) {
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
                let now: Vec<u32> = MomentBlock::words(&blocks).iter().map(|word| word.to_bits()).collect();
                assert_eq!(*bits.get_or_insert_with(|| now.clone()), now, "other bits");
            }
        }
    }

    #[test]
    fn words_are_the_blocks() {
        let mut blocks = vec![MomentBlock::ZERO; 2];
        let grad = numbers(MOMENT_BLOCK + 9, 1.0, 4);
        adamw_8bit(&Pool::new(1), step(1), &mut numbers(grad.len(), 1.0, 1), &grad, &mut blocks);
        let mut words = MomentBlock::words(&blocks).to_vec();
        assert_eq!(words.len(), 2 * MomentBlock::WORDS);
        assert_eq!(MomentBlock::WORDS, 2 + 2 * MOMENT_BLOCK / 4);
        assert_eq!(MomentBlock::from_words(&mut words), &blocks);
    }

    /// A gradient that ends: the moments must fade with it, and with them the steps.
    #[test]
    fn moments_fade() {
        for beta2 in [0.95, 0.999] {
            let (pool, mut blocks) = (Pool::new(1), vec![MomentBlock::ZERO]);
            let (grad, mut weight) = (numbers(MOMENT_BLOCK, 1.0, 8), vec![0.0; MOMENT_BLOCK]);
            let quiet = vec![0.0; MOMENT_BLOCK];
            let steps = 4000;
            for time in 0..steps {
                let step = AdamWStep { beta2, ..step(100_000) };
                adamw_8bit(&pool, step, &mut weight, if time < 10 { &grad } else { &quiet }, &mut blocks);
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
        let len = 2 * MOMENT_BLOCK;
        let curvature: Vec<f32> = numbers(len, 1.0, 1).iter().map(|x| 10f32.powf(2.0 * x)).collect();
        let start = numbers(len, 1.0, 2);
        let pool = Pool::new(1);
        let loss = |weight: &[f32]| -> f64 {
            weight.iter().zip(&curvature).map(|(w, c)| f64::from(w * w * c)).sum::<f64>() / len as f64
        };
        let (mut bytes, mut blocks) = (start.clone(), vec![MomentBlock::ZERO; 2]);
        let (mut floats, mut m, mut v) = (start.clone(), vec![0.0; len], vec![0.0; len]);
        for time in 1..=600 {
            let noise = numbers(len, 0.1, 100 + time as u64);
            let gradient = |weight: &[f32]| -> Vec<f32> {
                weight.iter().zip(&curvature).zip(&noise).map(|((w, c), n)| c * (2.0 * w + n)).collect()
            };
            let lr = 0.02 * (1.0 - time as f32 / 600.0);
            let step = AdamWStep { lr, keep: 1.0, ..step(time) };
            let grad = gradient(&bytes);
            adamw_8bit(&pool, step, &mut bytes, &grad, &mut blocks);
            let grad = gradient(&floats);
            adamw(&pool, step, &mut floats, &grad, &mut m, &mut v);
        }
        let (first, bytes, floats) = (loss(&start), loss(&bytes), loss(&floats));
        assert!(floats < 0.01 * first, "{floats} of {first}");
        assert!(bytes < 1.2 * floats, "{bytes} with bytes, {floats} with floats");
    }
}
