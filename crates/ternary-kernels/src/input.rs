//! [`Input`]: the activations of one or many tokens.

use crate::{
    Matrix, Pool,
    elementwise::load,
    pool::Disjoint,
    simd::{Kernel, LANES, Line, Simd},
};
use std::ops::{Deref, DerefMut};

/// Columns are padded to this many: 16.
pub(crate) const BLOCK: usize = LANES;

/// Smallest absolute maximum of a token; keeps a token of zeros from dividing by zero.
pub(crate) const ABSMAX_MIN: f32 = 1e-5;

/// What is added to a code of six bits so that it has no sign.
pub(crate) const SIX_BITS: i32 = 32;

/// Values above which threads share the quantizing.
const SHARED: usize = 1 << 14;

/// Room for int8 activations, to be used again and again.
#[derive(Debug, Default)]
pub struct Quantized {
    /// `[tokens, blocks]` in -127..=127, zero beyond the columns.
    pub(crate) codes: Codes,
    pub(crate) blocks: usize,
    /// `[tokens]`: absmax / 127
    pub(crate) scales: Vec<f32>,
    /// `[tokens, blocks + 1]`: sums of the codes before each block.
    pub(crate) sums: Vec<i32>,
    /// `[tokens, blocks]`: -32 times the sum of each block, for what codes of six bits have too much in a product.
    pub(crate) offsets: Vec<i32>,
}

/// What matrices are multiplied with: floats `[tokens, cols]`, and the same as int8 if integer products are wanted.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    pub(crate) floats: &'a [f32],
    pub(crate) cols: usize,
    tokens: usize,
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
        buffer.quantize(pool, values, cols, None, ABSMAX_MIN);
        Self { int8: Some(buffer), ..input }
    }

    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// What `matrix` multiplies of this input, as floats `[tokens, cols]`: the int8 codes times their scales if it takes
    /// those, which `buffer` then holds; else the floats.
    pub fn multiplied<'b>(&self, matrix: &Matrix, buffer: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        let Some(int8) = self.int8.filter(|_| matrix.is_integer()) else {
            return self.floats;
        };
        buffer.resize(self.tokens * self.cols, 0.0);
        let tokens = buffer.chunks_exact_mut(self.cols).zip(int8.codes.chunks_exact(int8.blocks));
        for ((values, codes), scale) in tokens.zip(&int8.scales) {
            let codes = codes.as_flattened();
            values.iter_mut().zip(codes).for_each(|(value, code)| *value = f32::from(*code) * scale);
        }
        buffer
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
        self.lines.resize((blocks * BLOCK).div_ceil(size_of::<Line>()), Line([0; 64]));
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
    pub(crate) fn resize(&mut self, tokens: usize, cols: usize) {
        self.blocks = cols.div_ceil(BLOCK);
        self.codes.resize(tokens * self.blocks);
        self.scales.resize(tokens, 0.0);
        self.sums.resize(tokens * (self.blocks + 1), 0);
        self.offsets.resize(tokens * self.blocks, 0);
    }

    /// Quantizes each token, times `factors` where there are any, as one whose absmax is at least `least`.
    pub(crate) fn quantize(
        &mut self,
        pool: &Pool,
        values: &[f32],
        cols: usize,
        factors: Option<&[f32]>,
        least: f32,
    ) {
        assert!(factors.is_none_or(|factors| factors.len() == cols), "a factor for each of {cols} columns");
        let (tokens, blocks) = (values.len() / cols, cols.div_ceil(BLOCK));
        self.resize(tokens, cols);
        let codes = Disjoint::new(&mut self.codes);
        let scales = Disjoint::new(&mut self.scales);
        let sums = Disjoint::new(&mut self.sums);
        let offsets = Disjoint::new(&mut self.offsets);
        let isa = pool.isa();
        let token = |token: usize, _| {
            // SAFETY: each token is called once, and has its own part of each slice.
            let (codes, scale, sums, offsets) = unsafe {
                (
                    codes.slice(token * blocks, blocks),
                    scales.slice(token, 1),
                    sums.slice(token * (blocks + 1), blocks + 1),
                    offsets.slice(token * blocks, blocks),
                )
            };
            let values = &values[token * cols..][..cols];
            scale[0] = isa.run(Quantize { values, factors, least, codes, sums, offsets });
        };
        if values.len() > SHARED {
            pool.run(tokens, token);
        } else {
            (0..tokens).for_each(|index| token(index, 0));
        }
    }
}

/// Quantizes one token; the result is its scale.
struct Quantize<'a> {
    values: &'a [f32],
    factors: Option<&'a [f32]>,
    least: f32,
    codes: &'a mut [[i8; BLOCK]],
    sums: &'a mut [i32],
    offsets: &'a mut [i32],
}

impl Kernel for Quantize<'_> {
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

/// Gives the codes of each block in turn, zeros beyond the values; the result is their scale.
#[inline(always)]
pub(crate) fn quantize<S: Simd>(
    s: S,
    values: &[f32],
    factors: Option<&[f32]>,
    least: f32,
    mut put: impl FnMut(usize, [i8; BLOCK]),
) -> f32 {
    let mut absmax = s.splat_f32(least);
    for (index, block) in values.chunks(BLOCK).enumerate() {
        let x = scaled(s, block, factors, index);
        // In this order a NaN is passed over.
        absmax = s.max_f32(s.max_f32(x, s.sub_f32(s.splat_f32(0.0), x)), absmax);
    }
    let scale = s.max_lanes(absmax) / 127.0;
    let (divisor, inverse) = (s.splat_f32(scale), s.splat_f32(1.0 / scale));
    for (index, block) in values.chunks(BLOCK).enumerate() {
        let x = scaled(s, block, factors, index);
        // Activations are rounded as fake quantization rounds them; gradients need not be, and division is slow. At most
        // 127 and a rounding error, which to_int takes off.
        let quotient = if factors.is_some() { s.mul_f32(x, inverse) } else { s.div_f32(x, divisor) };
        let mut codes = [0; BLOCK];
        s.store_i8(s.to_int(quotient), &mut codes);
        put(index, codes);
    }
    scale
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
