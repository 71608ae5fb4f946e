//! [`Input`]: the activations of one or many tokens.

use crate::{
    Isa, Pool,
    simd::{
        Kernel, LANES, Line, Simd,
        vector_ops::{abs, load},
    },
    thread_pool::Disjoint,
};
use std::ops::{Deref, DerefMut};

/// Columns are padded to this many: 16.
pub(crate) const BLOCK: usize = LANES;

/// Smallest absolute maximum of a token; keeps a token of zeros from dividing by zero.
pub(crate) const ABSMAX_MIN: f32 = 1e-5;

/// What is added to a code of six bits so that it has no sign.
pub(crate) const SIX_BITS: i32 = 32;

/// Values above which threads share the quantizing, and those of a task then.
const SHARED: usize = 1 << 14;
const PIECE: usize = 1 << 13;

/// Room for int8 activations, to be used again and again.
#[derive(Debug, Default)]
pub struct Quantized {
    /// `[tokens, blocks]` in -127..=127, zero beyond the columns.
    pub(crate) codes: Codes,
    pub(crate) blocks: usize,
    /// `[tokens]`: absmax / 127
    pub(crate) scales: Vec<f32>,
    /// Parts that a token has sums of: its blocks, or 1.
    parts: usize,
    /// `[tokens, parts + 1]`: sums of the codes before each part.
    sums: Vec<i32>,
    /// `[tokens, blocks]`: -32 times the sum of each block, for what codes of six bits have too much in a product.
    offsets: Vec<i32>,
}

/// Of what a token's codes are summed up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Summed {
    /// Of each block, for matrices with a scale a group.
    Blocks,
    /// Of all, for matrices with a scale a row.
    Whole,
}

/// What matrices are multiplied with: floats `[tokens, cols]`, and the same as int8 if integer products are wanted.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    pub(crate) floats: &'a [f32],
    pub(crate) cols: usize,
    pub(crate) tokens: usize,
    pub(crate) int8: Option<&'a Quantized>,
}

impl<'a> Input<'a> {
    /// Floats only: ternary and int8 matrices are multiplied exactly.
    ///
    /// # Panics
    /// When `values` is not a whole number of tokens.
    pub fn exact(values: &'a [f32], cols: usize) -> Self {
        assert!(values.len().is_multiple_of(cols), "{} values are no whole rows of {cols}", values.len());
        Self { floats: values, cols, tokens: values.len() / cols, int8: None }
    }

    /// Activations that are int8 already; matrices of floats cannot be multiplied with them.
    pub(crate) fn codes(codes: &'a Quantized, cols: usize) -> Self {
        Self { floats: &[], cols, tokens: codes.scales.len(), int8: Some(codes) }
    }

    /// Quantizes each token, as training does: `scale = max(absmax, 1e-5) / 127`,
    /// `code = round_ties_even(x / scale)`. NaN counts as zero.
    ///
    /// # Panics
    /// When `values` is not a whole number of tokens.
    pub fn int8(pool: &Pool, values: &'a [f32], cols: usize, buffer: &'a mut Quantized) -> Self {
        let input = Self::exact(values, cols);
        buffer.quantize(pool, values, cols, None, ABSMAX_MIN, Summed::Blocks);
        Self { int8: Some(buffer), ..input }
    }

    /// The same of values that `fill(token, values)` computes first, each token by one thread.
    ///
    /// # Panics
    /// When `values` is not a whole number of tokens.
    pub fn int8_of(
        pool: &Pool,
        values: &'a mut [f32],
        cols: usize,
        buffer: &'a mut Quantized,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Self {
        let places = buffer.places(values.len() / cols, cols, None, ABSMAX_MIN, Summed::Blocks);
        pool.chunks(values, cols, |token, _, values| {
            fill(token, values);
            // SAFETY: each token is called once.
            unsafe { places.quantize(pool.isa(), token, values) };
        });
        Self { int8: Some(buffer), ..Self::exact(values, cols) }
    }

    pub fn tokens(&self) -> usize {
        self.tokens
    }
}

/// Blocks of codes, the first at a cache line: tiles read lines.
#[derive(Debug, Default)]
pub(crate) struct Codes {
    lines: Vec<Line>,
    blocks: usize,
}

impl Codes {
    fn resize(&mut self, blocks: usize) {
        let lines = (blocks * BLOCK).div_ceil(size_of::<Line>());
        // Whoever grows again would fill with zeros again.
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0; 64]));
        }
        self.blocks = blocks;
    }
}

impl Deref for Codes {
    type Target = [[i8; BLOCK]];

    fn deref(&self) -> &Self::Target {
        // SAFETY: the lines have at least the bytes of so many blocks, and any byte is a code.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.blocks) }
    }
}

impl DerefMut for Codes {
    fn deref_mut(&mut self) -> &mut Self::Target {
        // SAFETY: as for `deref`; `&mut self` makes it exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.blocks) }
    }
}

impl Quantized {
    /// Room for so many tokens.
    pub(crate) fn resize(&mut self, tokens: usize, cols: usize, sums: Summed) {
        self.blocks = cols.div_ceil(BLOCK);
        self.codes.resize(tokens * self.blocks);
        self.scales.resize(tokens, 0.0);
        let (parts, offsets) = match sums {
            Summed::Blocks => (self.blocks, tokens * self.blocks),
            Summed::Whole => (1, 0),
        };
        self.parts = parts;
        self.sums.resize(tokens * (parts + 1), 0);
        self.offsets.resize(offsets, 0);
    }

    /// The sums of the codes of a token before each part.
    #[inline(always)]
    pub(crate) fn sums(&self, token: usize) -> &[i32] {
        &self.sums[token * (self.parts + 1)..][..self.parts + 1]
    }

    /// The sum of all codes of a token.
    #[inline(always)]
    pub(crate) fn sum(&self, token: usize) -> i32 {
        self.sums[token * (self.parts + 1) + self.parts]
    }

    /// What six-bit codes have too much in each block of a token.
    #[inline(always)]
    pub(crate) fn offsets(&self, token: usize) -> &[i32] {
        &self.offsets[token * self.blocks..][..self.blocks]
    }

    /// Where the codes and sums of tokens are written.
    pub(crate) fn codes_and_sums(&mut self) -> (&mut [[i8; BLOCK]], &mut [i32]) {
        (&mut self.codes, &mut self.sums)
    }

    /// Quantizes each token, times `factors` where there are any, as one whose absmax is at least `least`.
    pub(crate) fn quantize(
        &mut self,
        pool: &Pool,
        values: &[f32],
        cols: usize,
        factors: Option<&[f32]>,
        least: f32,
        of: Summed,
    ) {
        let tokens = values.len() / cols;
        let places = self.places(tokens, cols, factors, least, of);
        let piece = if values.len() > SHARED { (PIECE / cols).max(1) } else { tokens };
        pool.run(tokens.div_ceil(piece), |index, _| {
            for token in index * piece..tokens.min((index + 1) * piece) {
                // SAFETY: each token is called once.
                unsafe { places.quantize(pool.isa(), token, &values[token * cols..][..cols]) };
            }
        });
    }

    /// Places for so many tokens that threads share, and how each is [`quantize`](Self::quantize)d.
    pub(crate) fn places<'a>(
        &'a mut self,
        tokens: usize,
        cols: usize,
        factors: Option<&'a [f32]>,
        least: f32,
        of: Summed,
    ) -> Places<'a> {
        assert!(factors.is_none_or(|factors| factors.len() == cols), "a factor for each of {cols} columns");
        self.resize(tokens, cols, of);
        Places {
            blocks: self.blocks,
            parts: self.parts,
            codes: Disjoint::new(&mut self.codes),
            scales: Disjoint::new(&mut self.scales),
            sums: Disjoint::new(&mut self.sums),
            offsets: Disjoint::new(&mut self.offsets),
            factors,
            least,
            of,
        }
    }
}

/// See [`Quantized::places`].
pub(crate) struct Places<'a> {
    blocks: usize,
    parts: usize,
    codes: Disjoint<'a, [i8; BLOCK]>,
    scales: Disjoint<'a, f32>,
    sums: Disjoint<'a, i32>,
    offsets: Disjoint<'a, i32>,
    factors: Option<&'a [f32]>,
    least: f32,
    of: Summed,
}

impl Places<'_> {
    /// # Safety
    /// No two threads have the same token.
    pub(crate) unsafe fn quantize(&self, isa: Isa, token: usize, values: &[f32]) {
        let Self { blocks, parts, factors, least, .. } = *self;
        // SAFETY: each token has its own part of each slice, and is its caller's alone.
        let (codes, scale, sums) = unsafe {
            (
                self.codes.slice(token * blocks, blocks),
                self.scales.slice(token, 1),
                self.sums.slice(token * (parts + 1), parts + 1),
            )
        };
        scale[0] = match self.of {
            Summed::Blocks => {
                // SAFETY: as above.
                let offsets = unsafe { self.offsets.slice(token * blocks, blocks) };
                isa.run(QuantizeBlocks { values, factors, least, codes, sums, offsets })
            }
            Summed::Whole => isa.run(QuantizeWhole { values, factors, least, codes, sum: &mut sums[1] }),
        };
    }
}

/// Quantizes one token, with sums of each block; the result is its scale.
struct QuantizeBlocks<'a> {
    values: &'a [f32],
    factors: Option<&'a [f32]>,
    least: f32,
    codes: &'a mut [[i8; BLOCK]],
    sums: &'a mut [i32],
    offsets: &'a mut [i32],
}

impl Kernel for QuantizeBlocks<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sum = 0;
        self.sums[0] = 0;
        quantize(s, self.values, self.factors, self.least, |block, codes| {
            self.codes[block] = codes;
            let of_block = codes.iter().map(|code| i32::from(*code)).sum::<i32>();
            sum += of_block;
            self.sums[block + 1] = sum;
            self.offsets[block] = -SIX_BITS * of_block;
        })
    }
}

/// The same with the sum of all.
struct QuantizeWhole<'a> {
    values: &'a [f32],
    factors: Option<&'a [f32]>,
    least: f32,
    codes: &'a mut [[i8; BLOCK]],
    sum: &'a mut i32,
}

impl Kernel for QuantizeWhole<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let Self { values, factors, least, codes, sum } = self;
        let scaling = Scaling::of(s, values, factors, least);
        let (blocks, rest) = values.as_chunks::<BLOCK>();
        let (whole, last) = codes.split_at_mut(blocks.len());
        let mut sums = s.splat(0);
        for (index, (x, codes)) in blocks.iter().zip(whole).enumerate() {
            let found = scaling.codes(s, x, factors, index);
            sums = s.add(sums, found);
            s.store_i8(found, codes);
        }
        if let [codes] = last {
            let found = scaling.codes(s, rest, factors, blocks.len());
            sums = s.add(sums, found);
            s.store_i8(found, codes);
        }
        let mut lanes = Line([0; 64]);
        s.store(sums, &mut lanes);
        *sum = lanes.0.as_chunks::<4>().0.iter().map(|lane| i32::from_ne_bytes(*lane)).sum();
        scaling.scale
    }
}

/// Gives the codes of each block in turn, zeros beyond the values; the result is their scale.
#[inline(always)]
pub(crate) fn quantize<S: Simd>(
    s: S,
    values: &[f32],
    factors: Option<&[f32]>,
    least: f32,
    mut put: impl FnMut(usize, [i8; BLOCK]),
) -> f32 {
    let scaling = Scaling::of(s, values, factors, least);
    for (index, block) in values.chunks(BLOCK).enumerate() {
        let mut codes = [0; BLOCK];
        s.store_i8(scaling.codes(s, block, factors, index), &mut codes);
        put(index, codes);
    }
    scaling.scale
}

/// How the values of a token become codes.
struct Scaling<S: Simd> {
    scale: f32,
    divisor: S::Float,
    inverse: S::Float,
}

impl<S: Simd> Scaling<S> {
    #[inline(always)]
    fn of(s: S, values: &[f32], factors: Option<&[f32]>, least: f32) -> Self {
        // Several maxima: each waits for the one before it.
        const CHAINS: usize = 4;
        let mut maxima = [s.splat_f32(least); CHAINS];
        let (groups, rest) = values.as_chunks::<{ CHAINS * BLOCK }>();
        for (index, group) in groups.iter().enumerate() {
            let (blocks, _) = group.as_chunks::<BLOCK>();
            for chain in 0..CHAINS {
                let x = scaled(s, &blocks[chain], factors, index * CHAINS + chain);
                // In this order a NaN is passed over.
                maxima[chain] = s.max_f32(abs(s, x), maxima[chain]);
            }
        }
        for (index, block) in rest.chunks(BLOCK).enumerate() {
            let x = scaled(s, block, factors, groups.len() * CHAINS + index);
            maxima[0] = s.max_f32(abs(s, x), maxima[0]);
        }
        let [a, b, c, d] = maxima;
        let scale = s.max_lanes(s.max_f32(s.max_f32(a, b), s.max_f32(c, d))) / 127.0;
        Self { scale, divisor: s.splat_f32(scale), inverse: s.splat_f32(1.0 / scale) }
    }

    /// Activations are rounded as fake quantization rounds them; gradients need not be, and division is slow. At most
    /// 127 and a rounding error, which `to_int` takes off.
    #[inline(always)]
    fn codes(&self, s: S, block: &[f32], factors: Option<&[f32]>, index: usize) -> S::Int {
        let x = scaled(s, block, factors, index);
        s.to_int(if factors.is_some() { s.mul_f32(x, self.inverse) } else { s.div_f32(x, self.divisor) })
    }
}

/// A block times its factors.
#[inline(always)]
fn scaled<S: Simd>(s: S, block: &[f32], factors: Option<&[f32]>, index: usize) -> S::Float {
    let x = load(s, block);
    match factors {
        Some(factors) => s.mul_f32(x, load(s, &factors[index * BLOCK..][..block.len()])),
        None => x,
    }
}
