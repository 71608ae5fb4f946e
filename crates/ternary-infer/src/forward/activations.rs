//! Inputs of matrices, and products with the weights of a layer.

use crate::{
    ActivationMode,
    model::{Linear, LowRank, Norm},
};
use ternary_kernels::{Activations, Int8Activations, Pool, Product, multiply};

/// `out = x W^T + b`, for [`multiply`].
pub(super) fn product<'a>(linear: &'a Linear, out: &'a mut [f32]) -> Product<'a> {
    Product { bias: linear.bias.as_deref(), ..Product::new(&linear.matrix, out) }
}

/// Rows of `cols` values that `fill(row, values)` computes in place, quantized if activations are int8.
pub(super) fn quantize_rows<'a>(
    pool: &Pool,
    activations: ActivationMode,
    values: &'a mut [f32],
    cols: usize,
    buffer: &'a mut Int8Activations,
    fill: impl Fn(usize, &mut [f32]) + Sync,
) -> Activations<'a> {
    match activations {
        ActivationMode::Int8 => Activations::int8_with(pool, values, cols, buffer, fill),
        ActivationMode::F32 => {
            pool.chunks(values, cols, |row, _, values| fill(row, values));
            Activations::f32(values, cols)
        }
    }
}

/// The norm of each row of `width` values, quantized if activations are int8.
pub(super) fn norm_and_quantize<'a>(
    pool: &Pool,
    activations: ActivationMode,
    norm: &Norm,
    from: &[f32],
    width: usize,
    to: &'a mut Vec<f32>,
    buffer: &'a mut Int8Activations,
) -> Activations<'a> {
    to.resize(from.len(), 0.0);
    let isa = pool.isa();
    let fill = |row: usize, to: &mut [f32]| norm.forward(isa, &from[row * width..(row + 1) * width], to);
    quantize_rows(pool, activations, to, width, buffer, fill)
}

/// Scratch buffers of LoRA adapters.
#[derive(Debug, Default)]
pub(super) struct LowRankScratch {
    /// Input of the layer, `[rows, in]`
    input: Vec<f32>,
    /// `[rows, rank]`
    inner: Vec<f32>,
}

impl LowRankScratch {
    /// Adds the output of the adapter of `linear` to `out`, if it has one.
    pub fn add(&mut self, pool: &Pool, x: &Activations, linear: &Linear, out: &mut [f32]) {
        let Some(LowRank { a, b }) = &linear.low_rank else { return };
        let input = x.dequantized(&linear.matrix, &mut self.input);
        self.inner.resize(x.tokens() * a.rows(), 0.0);
        multiply(pool, &Activations::f32(input, a.cols()), &mut [Product::new(a, &mut self.inner)]);
        let product = Product { add: true, ..Product::new(b, out) };
        multiply(pool, &Activations::f32(&self.inner, b.cols()), &mut [product]);
    }
}
