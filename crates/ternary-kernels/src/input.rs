//! [`Input`]: the activations of one or many tokens.

use crate::Pool;

/// Columns are padded to this many.
pub(crate) const BLOCK: usize = 16;

/// Room for int8 activations, to be used again and again.
#[derive(Debug, Default)]
pub struct Quantized {
    /// `[tokens, stride]` in -127..=127, zero beyond the columns.
    pub(crate) codes: Vec<i8>,
    pub(crate) stride: usize,
    /// `[tokens]`: absmax / 127
    pub(crate) scales: Vec<f32>,
    /// `[tokens, stride / BLOCK + 1]`: sums of the codes before each block.
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

    /// Quantizes each token: `scale = absmax / 127`, `code = round_ties_even(x / scale)`. A token of zeros stays zero.
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
    fn quantize(&mut self, _pool: &Pool, values: &[f32], cols: usize) {
        let tokens = values.len() / cols;
        self.stride = cols.next_multiple_of(BLOCK);
        let blocks = self.stride / BLOCK;
        self.codes.resize(tokens * self.stride, 0);
        self.scales.resize(tokens, 0.0);
        self.sums.resize(tokens * (blocks + 1), 0);
        for (token, x) in values.chunks_exact(cols).enumerate() {
            let codes = &mut self.codes[token * self.stride..][..self.stride];
            let absmax = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            let inverse = if absmax > 0.0 { 127.0 / absmax } else { 0.0 };
            self.scales[token] = absmax / 127.0;
            for (code, x) in codes.iter_mut().zip(x) {
                *code = (x * inverse).round_ties_even() as i8;
            }
            codes[cols..].fill(0);
            let sums = &mut self.sums[token * (blocks + 1)..][..blocks + 1];
            for (block, codes) in codes.chunks_exact(BLOCK).enumerate() {
                sums[block + 1] = sums[block] + codes.iter().map(|c| i32::from(*c)).sum::<i32>();
            }
        }
    }
}
