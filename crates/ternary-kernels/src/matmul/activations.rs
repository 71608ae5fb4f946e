//! [`Activations`]: the right factor of products, as floats and as int8 codes with one scale per token.
//!
//! # Quantization
//! Each token is quantized by its absolute maximum, as in training:
//!
//! ```text
//! scale = max(absmax(x), 1e-5) / 127        code = round_ties_even(x / scale)        so code is in -127..=127
//! ```
//!
//! # Layout
//! ```text
//! codes    [tokens, blocks, 16]    int8; a token's columns are padded with zeros to whole blocks of 16
//! scales   [tokens]                f32
//! sums     [tokens, blocks + 1]    i32 prefix sums: sums[b] = sum of all codes before block b
//! offsets  [tokens, blocks]        i32: -32 times the sum of the block
//! ```
//!
//! Formats store their codes with an offset (ternary + 1, 6-bit + 32, int8 + 128 in the instruction). A product of such codes
//! is too large by the offset times the sum of the activations. `sums[end] - sums[start]` is the sum over any scale group.
//!
//! Matrices with one scale per row only need the total: with [`SumGranularity::PerToken`], sums are `[tokens, 2]` and there
//! are no offsets.

use crate::{
    Isa, Pool,
    simd::{
        CacheLine, Kernel, LANES, Simd,
        vector_ops::{abs, load},
    },
    thread_pool::DisjointSlices,
};
use std::ops::{Deref, DerefMut};

/// Columns per block: 16.
pub(crate) const BLOCK: usize = LANES;

/// Smallest absolute maximum of a token; keeps a token of zeros from dividing by zero.
pub(crate) const ABSMAX_MIN: f32 = 1e-5;

/// What is added to a 6-bit code to store it without a sign.
pub(crate) const Q6_OFFSET: i32 = 32;

/// Number of values above which quantization is shared between threads.
const PARALLEL_MIN_VALUES: usize = 1 << 14;
/// Values per task.
const TASK_VALUES: usize = 1 << 13;

/// Int8 codes of activations, one scale per token, and the sums that products need. Its memory is reused.
#[derive(Debug, Default)]
pub struct Int8Activations {
    /// `[tokens, blocks]` in -127..=127, zero beyond the columns.
    pub(crate) codes: AlignedBlocks,
    /// Blocks of 16 columns per token.
    pub(crate) blocks: usize,
    /// `[tokens]`: absmax / 127.
    pub(crate) scales: Vec<f32>,
    /// Sums per token: its blocks, or 1.
    parts: usize,
    /// `[tokens, parts + 1]`: prefix sums of the codes.
    sums: Vec<i32>,
    /// `[tokens, blocks]`: -32 times the sum of each block, which corrects products of 6-bit codes.
    offsets: Vec<i32>,
}

/// Which sums of a token's codes are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SumGranularity {
    /// Prefix sums by block, for matrices with one scale per group of columns.
    PerBlock,
    /// The total only, for matrices with one scale per row.
    PerToken,
}

/// The activations that matrices are multiplied with: floats `[tokens, cols]`, and, for integer products, their int8 codes.
#[derive(Clone, Copy, Debug)]
pub struct Activations<'a> {
    pub(crate) floats: &'a [f32],
    pub(crate) cols: usize,
    pub(crate) tokens: usize,
    pub(crate) int8: Option<&'a Int8Activations>,
}

impl<'a> Activations<'a> {
    /// Float activations only: quantized matrices are then multiplied in f32, without rounding the activations.
    ///
    /// # Panics
    /// When `values` is not a whole number of tokens.
    pub fn f32(values: &'a [f32], cols: usize) -> Self {
        assert!(values.len().is_multiple_of(cols), "{} values are no whole rows of {cols}", values.len());
        Self { floats: values, cols, tokens: values.len() / cols, int8: None }
    }

    /// Activations that are int8 codes only; they cannot be multiplied with float matrices.
    pub(crate) fn from_codes(codes: &'a Int8Activations, cols: usize) -> Self {
        Self { floats: &[], cols, tokens: codes.scales.len(), int8: Some(codes) }
    }

    /// Quantizes each token to int8, as in training: `scale = max(absmax, 1e-5) / 127`,
    /// `code = round_ties_even(x / scale)`. NaN becomes zero. The codes are kept in `buffer`.
    ///
    /// # Panics
    /// When `values` is not a whole number of tokens.
    pub fn int8(pool: &Pool, values: &'a [f32], cols: usize, buffer: &'a mut Int8Activations) -> Self {
        let input = Self::f32(values, cols);
        buffer.quantize(pool, values, cols, None, ABSMAX_MIN, SumGranularity::PerBlock);
        Self { int8: Some(buffer), ..input }
    }

    /// As [`int8`](Self::int8), of values that `fill(token, values)` writes first: the thread that computes a token
    /// quantizes it while it is in the cache.
    ///
    /// # Panics
    /// When `values` is not a whole number of tokens.
    pub fn int8_with(
        pool: &Pool,
        values: &'a mut [f32],
        cols: usize,
        buffer: &'a mut Int8Activations,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Self {
        let task =
            buffer.quantize_task(values.len() / cols, cols, None, ABSMAX_MIN, SumGranularity::PerBlock);
        pool.chunks(values, cols, |token, _, values| {
            fill(token, values);
            // SAFETY: each token is called once.
            unsafe { task.quantize(pool.isa(), token, values) };
        });
        Self { int8: Some(buffer), ..Self::f32(values, cols) }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}

/// Blocks of codes that start at a cache line, since AMX loads rows of 64 bytes: rows that cross lines cost 160 to 190
/// cycles per 64 of work, aligned ones 120.
#[derive(Debug, Default)]
pub(crate) struct AlignedBlocks {
    lines: Vec<CacheLine>,
    blocks: usize,
}

impl AlignedBlocks {
    fn resize(&mut self, blocks: usize) {
        let lines = (blocks * BLOCK).div_ceil(size_of::<CacheLine>());
        // Never shrinks: growing again would fill with zeros again.
        if self.lines.len() < lines {
            self.lines.resize(lines, CacheLine([0; 64]));
        }
        self.blocks = blocks;
    }
}

impl Deref for AlignedBlocks {
    type Target = [[i8; BLOCK]];

    fn deref(&self) -> &Self::Target {
        // SAFETY: the lines have at least the bytes of `blocks` blocks, and any byte is a code.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.blocks) }
    }
}

impl DerefMut for AlignedBlocks {
    fn deref_mut(&mut self) -> &mut Self::Target {
        // SAFETY: as for `deref`; `&mut self` makes it exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.blocks) }
    }
}

impl Int8Activations {
    /// Sets the shape; the contents are those of before, or zeros.
    pub(crate) fn resize(&mut self, tokens: usize, cols: usize, sums: SumGranularity) {
        self.blocks = cols.div_ceil(BLOCK);
        self.codes.resize(tokens * self.blocks);
        self.scales.resize(tokens, 0.0);
        let (parts, offsets) = match sums {
            SumGranularity::PerBlock => (self.blocks, tokens * self.blocks),
            SumGranularity::PerToken => (1, 0),
        };
        self.parts = parts;
        self.sums.resize(tokens * (parts + 1), 0);
        self.offsets.resize(offsets, 0);
    }

    /// Prefix sums of the codes of a token: `sums[b]` is the sum of all codes before block `b`, the last one the total.
    #[inline(always)]
    pub(crate) fn sums(&self, token: usize) -> &[i32] {
        &self.sums[token * (self.parts + 1)..][..self.parts + 1]
    }

    /// The sum of all codes of a token.
    #[inline(always)]
    pub(crate) fn sum(&self, token: usize) -> i32 {
        self.sums[token * (self.parts + 1) + self.parts]
    }

    /// -32 times the sum of the codes of each block of a token.
    #[inline(always)]
    pub(crate) fn offsets(&self, token: usize) -> &[i32] {
        &self.offsets[token * self.blocks..][..self.blocks]
    }

    /// The memory of codes and sums, for kernels that write both.
    pub(crate) fn codes_and_sums(&mut self) -> (&mut [[i8; BLOCK]], &mut [i32]) {
        (&mut self.codes, &mut self.sums)
    }

    /// Quantizes all tokens: `values`, times `factors` per column if there are any, with
    /// `scale = max(absmax, absmax_min) / 127`.
    ///
    /// # Shapes
    /// values `[tokens, cols]`, factors `[cols]`
    pub(crate) fn quantize(
        &mut self,
        pool: &Pool,
        values: &[f32],
        cols: usize,
        factors: Option<&[f32]>,
        absmax_min: f32,
        sums_per: SumGranularity,
    ) {
        let tokens = values.len() / cols;
        let task = self.quantize_task(tokens, cols, factors, absmax_min, sums_per);
        let piece = if values.len() > PARALLEL_MIN_VALUES { (TASK_VALUES / cols).max(1) } else { tokens };
        pool.run(tokens.div_ceil(piece), |index, _| {
            for token in index * piece..tokens.min((index + 1) * piece) {
                // SAFETY: each token is called once.
                unsafe { task.quantize(pool.isa(), token, &values[token * cols..][..cols]) };
            }
        });
    }

    /// Sets the shape, and returns a task by which several threads may quantize tokens, with the parameters of
    /// [`quantize`](Self::quantize).
    pub(crate) fn quantize_task<'a>(
        &'a mut self,
        tokens: usize,
        cols: usize,
        factors: Option<&'a [f32]>,
        absmax_min: f32,
        sums_per: SumGranularity,
    ) -> QuantizeTask<'a> {
        assert!(factors.is_none_or(|factors| factors.len() == cols), "a factor for each of {cols} columns");
        self.resize(tokens, cols, sums_per);
        QuantizeTask {
            blocks: self.blocks,
            parts: self.parts,
            codes: DisjointSlices::new(&mut self.codes),
            scales: DisjointSlices::new(&mut self.scales),
            sums: DisjointSlices::new(&mut self.sums),
            offsets: DisjointSlices::new(&mut self.offsets),
            factors,
            absmax_min,
            sums_per,
        }
    }
}

/// Quantizes the tokens of an [`Int8Activations`] on several threads: see [`Int8Activations::quantize_task`].
pub(crate) struct QuantizeTask<'a> {
    blocks: usize,
    parts: usize,
    codes: DisjointSlices<'a, [i8; BLOCK]>,
    scales: DisjointSlices<'a, f32>,
    sums: DisjointSlices<'a, i32>,
    offsets: DisjointSlices<'a, i32>,
    factors: Option<&'a [f32]>,
    absmax_min: f32,
    sums_per: SumGranularity,
}

impl QuantizeTask<'_> {
    /// Quantizes one token, `values` of `[cols]`.
    ///
    /// # Safety
    /// No two threads quantize the same token at the same time.
    pub(crate) unsafe fn quantize(&self, isa: Isa, token: usize, values: &[f32]) {
        let Self { blocks, parts, factors, absmax_min, .. } = *self;
        // SAFETY: each token has its own part of each slice, and is its caller's alone.
        let (codes, scale, sums) = unsafe {
            (
                self.codes.slice(token * blocks, blocks),
                self.scales.slice(token, 1),
                self.sums.slice(token * (parts + 1), parts + 1),
            )
        };
        scale[0] = match self.sums_per {
            SumGranularity::PerBlock => {
                // SAFETY: as above.
                let offsets = unsafe { self.offsets.slice(token * blocks, blocks) };
                isa.run(QuantizePerBlock { values, factors, absmax_min, codes, sums, offsets })
            }
            SumGranularity::PerToken => {
                isa.run(QuantizePerToken { values, factors, absmax_min, codes, sum: &mut sums[1] })
            }
        };
    }
}

/// Quantizes one token and computes prefix sums and offsets by block. Returns its scale.
struct QuantizePerBlock<'a> {
    /// `[cols]`
    values: &'a [f32],
    /// `[cols]`
    factors: Option<&'a [f32]>,
    absmax_min: f32,
    /// `[blocks]`
    codes: &'a mut [[i8; BLOCK]],
    /// `[blocks + 1]`
    sums: &'a mut [i32],
    /// `[blocks]`
    offsets: &'a mut [i32],
}

impl Kernel for QuantizePerBlock<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sum = 0;
        self.sums[0] = 0;
        quantize(s, self.values, self.factors, self.absmax_min, |block, codes| {
            self.codes[block] = codes;
            let block_sum = codes.iter().map(|code| i32::from(*code)).sum::<i32>();
            sum += block_sum;
            self.sums[block + 1] = sum;
            self.offsets[block] = -Q6_OFFSET * block_sum;
        })
    }
}

/// Quantizes one token and computes the sum of its codes. Returns its scale.
struct QuantizePerToken<'a> {
    /// `[cols]`
    values: &'a [f32],
    /// `[cols]`
    factors: Option<&'a [f32]>,
    absmax_min: f32,
    /// `[blocks]`
    codes: &'a mut [[i8; BLOCK]],
    sum: &'a mut i32,
}

impl Kernel for QuantizePerToken<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let Self { values, factors, absmax_min, codes, sum } = self;
        let scaling = Scaling::of(s, values, factors, absmax_min);
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
        let mut lanes = CacheLine([0; 64]);
        s.store(sums, &mut lanes);
        *sum = lanes.0.as_chunks::<4>().0.iter().map(|lane| i32::from_ne_bytes(*lane)).sum();
        scaling.scale
    }
}

/// Quantizes `values` and passes the codes of each block to `put(block, codes)`, padded with zeros. Returns the scale.
#[inline(always)]
pub(crate) fn quantize<S: Simd>(
    s: S,
    values: &[f32],
    factors: Option<&[f32]>,
    absmax_min: f32,
    mut put: impl FnMut(usize, [i8; BLOCK]),
) -> f32 {
    let scaling = Scaling::of(s, values, factors, absmax_min);
    for (index, block) in values.chunks(BLOCK).enumerate() {
        let mut codes = [0; BLOCK];
        s.store_i8(scaling.codes(s, block, factors, index), &mut codes);
        put(index, codes);
    }
    scaling.scale
}

/// The scale of a token, and how its values become codes.
struct Scaling<S: Simd> {
    /// Value of code 1.
    scale: f32,
    /// `scale` in all lanes.
    divisor: S::Float,
    /// `1 / scale` in all lanes.
    inverse: S::Float,
}

impl<S: Simd> Scaling<S> {
    /// Finds the absolute maximum of `values`, times `factors`.
    #[inline(always)]
    fn of(s: S, values: &[f32], factors: Option<&[f32]>, absmax_min: f32) -> Self {
        // Independent maxima, to hide the latency of the instruction.
        const CHAINS: usize = 4;
        let mut maxima = [s.splat_f32(absmax_min); CHAINS];
        let (groups, rest) = values.as_chunks::<{ CHAINS * BLOCK }>();
        for (index, group) in groups.iter().enumerate() {
            let (blocks, _) = group.as_chunks::<BLOCK>();
            for chain in 0..CHAINS {
                let x = scaled(s, &blocks[chain], factors, index * CHAINS + chain);
                // In this order of arguments, max ignores a NaN.
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

    /// The codes of a block: at most 127, but for a rounding error, which `to_int` rounds off.
    ///
    /// Activations are divided by the scale, as fake quantization does, so that codes agree to the bit. Gradients (which have
    /// `factors`) are multiplied by its inverse: division is slow.
    #[inline(always)]
    fn codes(&self, s: S, block: &[f32], factors: Option<&[f32]>, index: usize) -> S::Int {
        let x = scaled(s, block, factors, index);
        s.to_int(if factors.is_some() { s.mul_f32(x, self.inverse) } else { s.div_f32(x, self.divisor) })
    }
}

/// The values of a block, times its factors if there are any.
#[inline(always)]
fn scaled<S: Simd>(s: S, block: &[f32], factors: Option<&[f32]>, index: usize) -> S::Float {
    let x = load(s, block);
    match factors {
        Some(factors) => s.mul_f32(x, load(s, &factors[index * BLOCK..][..block.len()])),
        None => x,
    }
}
