//! [`Input`]: the activations of one or many tokens.

use crate::{
    Pool,
    elementwise::load,
    pool::Disjoint,
    simd::{Kernel, LANES, Simd},
};

/// Columns are padded to this many: 16.
pub(crate) const BLOCK: usize = LANES;

/// Smallest absolute maximum of a token; keeps a token of zeros from dividing by zero.
const ABSMAX_MIN: f32 = 1e-5;

/// Values above which threads share the quantizing.
const SHARED: usize = 1 << 14;

/// Room for int8 activations, to be used again and again.
#[derive(Debug, Default)]
pub struct Quantized {
    /// `[tokens, blocks]` in -127..=127, zero beyond the columns.
    pub(crate) codes: Vec<[i8; BLOCK]>,
    pub(crate) blocks: usize,
    /// `[tokens]`: absmax / 127
    pub(crate) scales: Vec<f32>,
    /// `[tokens, blocks + 1]`: sums of the codes before each block.
    pub(crate) sums: Vec<i32>,
}

/// What matrices are multiplied with: floats `[tokens, cols]`, and the same as int8 if integer products are wanted.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    pub(crate) floats: &'a [f32],
    pub(crate) cols: usize,
    pub(crate) int8: Option<&'a Quantized>,
}

impl<'a> Input<'a> {
    /// Floats only: ternary and int8 matrices are multiplied exactly.
    ///
    /// # Panics
    /// When `values` is not a whole number of tokens.
    pub fn exact(values: &'a [f32], cols: usize) -> Self {
        assert!(values.len().is_multiple_of(cols), "{} values are no whole rows of {cols}", values.len());
        Self { floats: values, cols, int8: None }
    }

    /// Quantizes each token, as training does: `scale = max(absmax, 1e-5) / 127`,
    /// `code = round_ties_even(x / scale)`. NaN counts as zero.
    ///
    /// # Panics
    /// When `values` is not a whole number of tokens.
    pub fn int8(pool: &Pool, values: &'a [f32], cols: usize, buffer: &'a mut Quantized) -> Self {
        let input = Self::exact(values, cols);
        buffer.quantize(pool, values, cols);
        Self { int8: Some(buffer), ..input }
    }

    pub fn tokens(&self) -> usize {
        self.floats.len() / self.cols
    }
}

impl Quantized {
    fn quantize(&mut self, pool: &Pool, values: &[f32], cols: usize) {
        let (tokens, blocks) = (values.len() / cols, cols.div_ceil(BLOCK));
        self.blocks = blocks;
        self.codes.resize(tokens * blocks, [0; BLOCK]);
        self.scales.resize(tokens, 0.0);
        self.sums.resize(tokens * (blocks + 1), 0);
        let codes = Disjoint::new(&mut self.codes);
        let scales = Disjoint::new(&mut self.scales);
        let sums = Disjoint::new(&mut self.sums);
        let isa = pool.isa();
        let token = |token: usize, _| {
            // SAFETY: each token is called once, and has its own part of each slice.
            let (codes, scale, sums) = unsafe {
                (
                    codes.slice(token * blocks, blocks),
                    scales.slice(token, 1),
                    sums.slice(token * (blocks + 1), blocks + 1),
                )
            };
            scale[0] = isa.run(Quantize { values: &values[token * cols..][..cols], codes, sums });
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
    codes: &'a mut [[i8; BLOCK]],
    sums: &'a mut [i32],
}

impl Kernel for Quantize<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sum = 0;
        self.sums[0] = 0;
        quantize(s, self.values, |block, codes| {
            self.codes[block] = codes;
            sum += codes.iter().map(|code| i32::from(*code)).sum::<i32>();
            self.sums[block + 1] = sum;
        })
    }
}

/// Gives the codes of each block in turn, zeros beyond the values; the result is their scale.
#[inline(always)]
pub(crate) fn quantize<S: Simd>(s: S, values: &[f32], mut put: impl FnMut(usize, [i8; BLOCK])) -> f32 {
    let mut absmax = s.splat_f32(ABSMAX_MIN);
    for block in values.chunks(BLOCK) {
        let x = load(s, block);
        // In this order a NaN is passed over.
        absmax = s.max_f32(s.max_f32(x, s.sub_f32(s.splat_f32(0.0), x)), absmax);
    }
    let scale = s.max_lanes(absmax) / 127.0;
    let divisor = s.splat_f32(scale);
    for (index, block) in values.chunks(BLOCK).enumerate() {
        let mut codes = [0; BLOCK];
        s.store_i8(s.to_int(s.div_f32(load(s, block), divisor)), &mut codes);
        put(index, codes);
    }
    scale
}
