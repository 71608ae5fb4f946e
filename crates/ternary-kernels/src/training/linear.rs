//! A linear layer with a ternary weight whose three products are integer products.

use super::{pieces, rows_a_piece};
use crate::{
    CodeMatrix, Input, Matrix, Order, Pool, Product, Quantized,
    elementwise::{load, store, store_codes},
    multiply,
    pool::Disjoint,
    simd::{Kernel, LANES, Line, Simd},
};

/// Smallest absolute maximum of a gradient that is quantized; keeps zeros from dividing by zero.
const GRADIENT_MIN: f32 = 1e-30;

/// `y = x~ W~ + b` with int8 activations `x~` and a ternary weight `W~`, for training.
///
/// | product | left | right | scales |
/// |---|---|---|---|
/// | `y = x~ W~` | int8 by token | ternary by channel | both after the sum |
/// | `dx = dy W~^T` | `dy` times the channels' scales, int8 by token | codes | the token's, after the sum |
/// | `dW~ = x~^T dy` | int8 codes of `x~` | `dy` times the tokens' scales, int8 by channel | the channel's, after the sum |
///
/// Sums are exact in i32. Forward is, but for the order of roundings, what fake quantization computes; the gradients
/// differ from it by the rounding of `dy` alone.
#[derive(Debug, Default)]
pub struct TernaryLinear {
    matrix: CodeMatrix,
    tokens: Quantized,
    /// Codes of a gradient: fresh memory costs more than they do.
    gradient: Vec<i8>,
}

/// What the backward pass of a [`TernaryLinear`] needs: a byte an activation, a byte a weight.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a> {
    /// `[tokens, d_input padded to 16]`
    pub input: &'a [i8],
    /// `[tokens]`
    pub input_scales: &'a [f32],
    /// -1, 0, +1: `[d_input, d_output]`
    pub weight: &'a [i8],
    /// `[d_output]`
    pub weight_scales: &'a [f32],
}

/// Room for the same, which [`TernaryLinear::forward`] fills.
#[derive(Debug)]
pub struct SavedMut<'a> {
    pub input: &'a mut [i8],
    pub input_scales: &'a mut [f32],
    pub weight: &'a mut [i8],
    pub weight_scales: &'a mut [f32],
}

impl Saved<'_> {
    /// Codes that are kept of an input of so many tokens.
    pub fn input_len(tokens: usize, d_input: usize) -> usize {
        tokens * d_input.next_multiple_of(LANES)
    }
}

impl TernaryLinear {
    /// # Shapes
    /// x `[tokens, d_input]`, weight `[d_input, d_output]`, bias `[d_output]`, out `[tokens, d_output]`; saved as [`Saved`] says
    ///
    /// # Panics
    /// When shapes do not fit. A weight that is not `{-scale, 0, +scale}` by channel gives the product of another one.
    pub fn forward(
        &mut self,
        pool: &Pool,
        x: &[f32],
        weight: &[f32],
        bias: Option<&[f32]>,
        out: &mut [f32],
        saved: SavedMut,
    ) {
        let d_output = saved.weight_scales.len();
        assert!(weight.len().is_multiple_of(d_output), "{} weights, {d_output} outputs", weight.len());
        let d_input = weight.len() / d_output;
        column_scales(weight, saved.weight_scales);
        signs(pool, weight, saved.weight);
        self.matrix.pack(pool, saved.weight, Order::Columns, saved.weight_scales, true);
        let input = Input::int8(pool, x, d_input, &mut self.tokens);
        with_matrix(&mut self.matrix, |matrix| {
            multiply(pool, &input, &mut [Product { matrix, bias, add: false, out }]);
        });
        saved.input.copy_from_slice(self.tokens.codes.as_flattened());
        saved.input_scales.copy_from_slice(&self.tokens.scales);
    }

    /// Gradients for input, weight and (returned) bias.
    ///
    /// # Shapes
    /// grad `[tokens, d_output]`, dx `[tokens, d_input]`, dweight `[d_input, d_output]`
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn backward(
        &mut self,
        pool: &Pool,
        saved: Saved,
        grad: &[f32],
        dx: &mut [f32],
        dweight: &mut [f32],
    ) -> Vec<f32> {
        let (tokens, d_output) = (saved.input_scales.len(), saved.weight_scales.len());
        let d_input = saved.weight.len() / d_output;
        assert_eq!(saved.input.len(), Saved::input_len(tokens, d_input), "activations of {tokens} tokens");
        assert!(grad.len() == tokens * d_output, "gradients");
        self.input_backward(pool, saved.weight, saved.weight_scales, grad, dx);

        let (maxima, sums) = column_maxima(pool, grad, d_output, Some(saved.input_scales));
        let scales: Vec<f32> = maxima.iter().map(|max| max.max(GRADIENT_MIN) / 127.0).collect();
        gradient_codes(pool, grad, saved.input_scales, &scales, &mut self.gradient);
        self.matrix.pack(pool, &self.gradient, Order::Columns, &scales, false);
        self.tokens.transpose(pool, saved.input, d_input, tokens);
        let input = Input::codes(&self.tokens, tokens);
        with_matrix(&mut self.matrix, |matrix| multiply(pool, &input, &mut [Product::new(matrix, dweight)]));
        sums
    }

    /// The gradient for the input alone, as [`backward`](Self::backward) has it: that of a layer that is frozen.
    ///
    /// # Shapes
    /// weight (-1, 0, +1) `[d_input, d_output]`, weight_scales `[d_output]`, grad `[tokens, d_output]`, dx
    /// `[tokens, d_input]`
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn input_backward(
        &mut self,
        pool: &Pool,
        weight: &[i8],
        weight_scales: &[f32],
        grad: &[f32],
        dx: &mut [f32],
    ) {
        let d_output = weight_scales.len();
        let d_input = weight.len() / d_output;
        assert!(grad.len() / d_output * d_input == dx.len(), "gradients");
        self.tokens.quantize(pool, grad, d_output, Some(weight_scales), GRADIENT_MIN);
        self.matrix.pack(pool, weight, Order::Rows, &vec![1.0; d_input], true);
        let input = Input::codes(&self.tokens, d_output);
        with_matrix(&mut self.matrix, |matrix| multiply(pool, &input, &mut [Product::new(matrix, dx)]));
    }
}

/// Lends the matrix as one of all kinds.
fn with_matrix(matrix: &mut CodeMatrix, f: impl FnOnce(&Matrix)) {
    let lent = Matrix::Code(std::mem::take(matrix));
    f(&lent);
    let Matrix::Code(back) = lent else { unreachable!("a matrix of codes was lent") };
    *matrix = back;
}

/// The magnitude in each column of `{-scale, 0, +scale}`: that of its first number that is not zero.
fn column_scales(weight: &[f32], scales: &mut [f32]) {
    scales.fill(0.0);
    let mut missing = scales.len();
    for row in weight.chunks(scales.len()) {
        if missing == 0 {
            break;
        }
        for (scale, weight) in scales.iter_mut().zip(row) {
            if *scale == 0.0 && *weight != 0.0 {
                *scale = weight.abs();
                missing -= 1;
            }
        }
    }
}

/// The sign of each weight.
fn signs(pool: &Pool, weight: &[f32], codes: &mut [i8]) {
    assert_eq!(weight.len(), codes.len(), "a code for each weight");
    pool.chunks(codes, super::PIECE, |index, _, codes| {
        pool.isa().run(Signs { weight: &weight[index * super::PIECE..][..codes.len()], codes });
    });
}

struct Signs<'a> {
    weight: &'a [f32],
    codes: &'a mut [i8],
}

impl Kernel for Signs<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let zero = s.splat_f32(0.0);
        // No scale is below f16's smallest normal number: times this, its sign is 1 or more.
        let (large, one) = (s.splat_f32(1e5), s.splat_f32(1.0));
        for (codes, weight) in self.codes.chunks_mut(LANES).zip(self.weight.chunks(LANES)) {
            let x = s.mul_f32(load(s, weight), large);
            let below = s.sub_f32(zero, s.max_f32(s.sub_f32(zero, x), s.sub_f32(zero, one)));
            let sign = s.max_f32(below, s.sub_f32(zero, one));
            store_codes(s, s.to_int(sign), codes);
        }
    }
}

/// Of each column of `[rows, n]`: the largest magnitude, of numbers times their row's factor, and the sum, of the numbers
/// themselves.
fn column_maxima(pool: &Pool, x: &[f32], n: usize, factors: Option<&[f32]>) -> (Vec<f32>, Vec<f32>) {
    // A sixteenth at least: each piece has results of its own, to be added up.
    let rows = x.len() / n;
    let parts = pieces(pool, rows, rows_a_piece(n).max(rows.div_ceil(16)), |rows| {
        let mut part = (vec![0.0; n], vec![0.0; n]);
        let x = &x[rows.start * n..rows.end * n];
        let factors = factors.map(|factors| &factors[rows]);
        pool.isa().run(Columns { x, factors, maxima: &mut part.0, sums: &mut part.1 });
        part
    });
    let mut all = (vec![0.0f32; n], vec![0.0; n]);
    for (maxima, sums) in parts {
        all.0.iter_mut().zip(maxima).for_each(|(max, part)| *max = max.max(part));
        all.1.iter_mut().zip(sums).for_each(|(sum, part)| *sum += part);
    }
    all
}

/// The sum of each column of `[rows, n]`.
///
/// # Panics
/// When `x` is not a whole number of rows.
pub fn column_sums(pool: &Pool, x: &[f32], n: usize) -> Vec<f32> {
    assert!(x.len().is_multiple_of(n), "{} numbers are no whole rows of {n}", x.len());
    column_maxima(pool, x, n, None).1
}

struct Columns<'a> {
    x: &'a [f32],
    factors: Option<&'a [f32]>,
    maxima: &'a mut [f32],
    sums: &'a mut [f32],
}

impl Kernel for Columns<'_> {
    type Output = ();

    /// Several rows at a time: what is gathered is loaded and stored once for all of them.
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        const ROWS: usize = 8;
        let zero = s.splat_f32(0.0);
        let n = self.maxima.len();
        for (group, x) in self.x.chunks(ROWS * n).enumerate() {
            let mut factors = [1.0; ROWS];
            if let Some(given) = self.factors {
                let given = &given[group * ROWS..][..x.len() / n];
                factors[..given.len()].copy_from_slice(given);
            }
            let columns = self.maxima.chunks_mut(LANES).zip(self.sums.chunks_mut(LANES));
            for (column, (maxima, sums)) in columns.enumerate() {
                let (mut max, mut sum) = (load(s, maxima), load(s, sums));
                for (row, factor) in x.chunks_exact(n).zip(factors) {
                    let x = load(s, &row[column * LANES..][..maxima.len()]);
                    let scaled = s.mul_f32(x, s.splat_f32(factor));
                    // In this order a NaN is passed over.
                    max = s.max_f32(s.max_f32(scaled, s.sub_f32(zero, scaled)), max);
                    sum = s.add_f32(sum, x);
                }
                store(s, max, maxima);
                store(s, sum, sums);
            }
        }
    }
}

/// `round(grad[t, o] * factors[t] / scales[o])`, `[tokens, d_output]`
fn gradient_codes(pool: &Pool, grad: &[f32], factors: &[f32], scales: &[f32], codes: &mut Vec<i8>) {
    let n = scales.len();
    let inverse: Vec<f32> = scales.iter().map(|scale| 1.0 / scale).collect();
    codes.resize(grad.len(), 0);
    let piece = rows_a_piece(n);
    pool.chunks(codes, piece * n, |index, _, codes| {
        let (start, rows) = (index * piece, codes.len() / n);
        let grad = &grad[start * n..][..rows * n];
        pool.isa().run(Codes { grad, factors: &factors[start..start + rows], inverse: &inverse, codes });
    });
}

struct Codes<'a> {
    grad: &'a [f32],
    factors: &'a [f32],
    inverse: &'a [f32],
    codes: &'a mut [i8],
}

impl Kernel for Codes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.inverse.len();
        for ((grad, codes), factor) in self.grad.chunks(n).zip(self.codes.chunks_mut(n)).zip(self.factors) {
            let factor = s.splat_f32(*factor);
            let columns = grad.chunks(LANES).zip(self.inverse.chunks(LANES));
            for (codes, (grad, inverse)) in codes.chunks_mut(LANES).zip(columns) {
                // At most 127 and a rounding error, which to_int takes off.
                let scaled = s.mul_f32(s.mul_f32(load(s, grad), factor), load(s, inverse));
                store_codes(s, s.to_int(scaled), codes);
            }
        }
    }
}

impl Quantized {
    /// Takes the columns of `codes`, `[tokens, cols padded to 16]`, for tokens: int8 `[cols, tokens]` of scale 1.
    fn transpose(&mut self, pool: &Pool, codes: &[i8], cols: usize, tokens: usize) {
        let stride = cols.next_multiple_of(LANES);
        self.resize(cols, tokens);
        self.scales.fill(1.0);
        let blocks = self.blocks;
        let sums = Disjoint::new(&mut self.sums);
        pool.chunks(&mut self.codes, LANES * blocks, |index, _, out| {
            pool.isa().run(Transpose { codes, stride, first: index * LANES, tokens, blocks, out });
            for (i, column) in out.chunks(blocks).enumerate() {
                // SAFETY: each column is written once.
                let sums = unsafe { sums.slice((index * LANES + i) * (blocks + 1), blocks + 1) };
                let mut sum = 0;
                sums[0] = 0;
                for (block, place) in column.iter().zip(&mut sums[1..]) {
                    sum += block.iter().map(|code| i32::from(*code)).sum::<i32>();
                    *place = sum;
                }
            }
        });
    }
}

/// Sixteen columns of `[tokens, stride]`, from `first` on (the last may be fewer, `stride` is padded): `[columns, blocks]`.
struct Transpose<'a> {
    codes: &'a [i8],
    stride: usize,
    first: usize,
    tokens: usize,
    blocks: usize,
    out: &'a mut [[i8; LANES]],
}

impl Kernel for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { codes, stride, first, tokens, blocks, out } = self;
        let columns = out.len() / blocks;
        let mut quad = Line([0; 64]);
        for start in (0..blocks * LANES).step_by(4) {
            // Four tokens of a column in each lane.
            let mut lanes = s.splat(0);
            for token in (start..start + 4).rev() {
                lanes = s.shl::<8>(lanes);
                if token < tokens {
                    let row: &[i8; LANES] =
                        codes[token * stride + first..].first_chunk().expect("a row is padded");
                    lanes = s.add(lanes, s.and(s.load_i8(row), s.splat(0xff)));
                }
            }
            s.store(lanes, &mut quad);
            let (block, place) = (start / LANES, start % LANES);
            let (quads, _) = quad.0.as_chunks::<4>();
            for (column, quad) in quads.iter().take(columns).enumerate() {
                out[column * blocks + block][place..place + 4].copy_from_slice(&quad.map(|byte| byte as i8));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::tests::{assert_close, numbers, pools};

    #[test]
    fn products_are_those_of_rounded_factors() {
        for (tokens, d_input, d_output) in [(1, 1, 1), (3, 5, 7), (16, 16, 16), (33, 70, 19), (70, 130, 65)] {
            let x = numbers(tokens * d_input, 2.0, 1);
            let scales: Vec<f32> = numbers(d_output, 1.0, 2).iter().map(|s| s.abs() + 0.1).collect();
            let codes: Vec<f32> =
                numbers(d_input * d_output, 1.5, 3).iter().map(|c| c.round().clamp(-1.0, 1.0)).collect();
            let weight: Vec<f32> = codes.iter().enumerate().map(|(i, c)| c * scales[i % d_output]).collect();
            let bias = numbers(d_output, 1.0, 4);
            let grad = numbers(tokens * d_output, 1e-6, 5);
            let round = |values: Vec<f64>, least: f64| -> Vec<f64> {
                let scale = values.iter().fold(least, |max, x| max.max(x.abs())) / 127.0;
                values.iter().map(|x| (x / scale).round_ties_even() * scale).collect()
            };
            let at = |m: &[f32], n: usize, row: usize, col: usize| f64::from(m[row * n + col]);
            let xs: Vec<Vec<f64>> = (0..tokens)
                .map(|t| round((0..d_input).map(|i| at(&x, d_input, t, i)).collect(), 1e-5))
                .collect();
            let y = (0..tokens * d_output).map(|n| {
                let (t, o) = (n / d_output, n % d_output);
                let sum: f64 = (0..d_input).map(|i| xs[t][i] * at(&weight, d_output, i, o)).sum();
                sum + f64::from(bias[o])
            });
            let by_token: Vec<Vec<f64>> = (0..tokens)
                .map(|t| {
                    let scaled = |o: usize| at(&grad, d_output, t, o) * f64::from(scales[o]);
                    round((0..d_output).map(scaled).collect(), 1e-30)
                })
                .collect();
            let dx = (0..tokens * d_input).map(|n| {
                let (t, i) = (n / d_input, n % d_input);
                (0..d_output).map(|o| by_token[t][o] * at(&codes, d_output, i, o)).sum::<f64>()
            });
            let token_scale = |t: usize| {
                x[t * d_input..][..d_input].iter().fold(1e-5f32, |max, x| max.max(x.abs())) / 127.0
            };
            let by_channel: Vec<Vec<f64>> = (0..d_output)
                .map(|o| {
                    let scaled = |t: usize| at(&grad, d_output, t, o) * f64::from(token_scale(t));
                    round((0..tokens).map(scaled).collect(), 1e-30)
                })
                .collect();
            let dweight = (0..d_input * d_output).map(|n| {
                let (i, o) = (n / d_output, n % d_output);
                (0..tokens).map(|t| xs[t][i] / f64::from(token_scale(t)) * by_channel[o][t]).sum::<f64>()
            });
            let mut bits = None;
            for pool in pools() {
                let mut layer = TernaryLinear::default();
                // Twice: what is left of a larger product must not show.
                for _ in 0..2 {
                    let mut out = vec![f32::NAN; tokens * d_output];
                    let mut kept = (vec![0; Saved::input_len(tokens, d_input)], vec![0.0; tokens]);
                    let mut kept_weight = (vec![0; weight.len()], vec![0.0; d_output]);
                    let saved = SavedMut {
                        input: &mut kept.0,
                        input_scales: &mut kept.1,
                        weight: &mut kept_weight.0,
                        weight_scales: &mut kept_weight.1,
                    };
                    layer.forward(&pool, &x, &weight, Some(&bias), &mut out, saved);
                    assert_close("y", &out, y.clone(), 2e-6);
                    let saved = Saved {
                        input: &kept.0,
                        input_scales: &kept.1,
                        weight: &kept_weight.0,
                        weight_scales: &kept_weight.1,
                    };
                    let (mut dx_, mut dw) = (vec![f32::NAN; x.len()], vec![f32::NAN; weight.len()]);
                    let dbias = layer.backward(&pool, saved, &grad, &mut dx_, &mut dw);
                    // A code may fall on the other side of a tie: a step of one part in 127 of the largest.
                    assert_close("dx", &dx_, dx.clone(), 2e-3);
                    assert_close("dw", &dw, dweight.clone(), 2e-3);
                    let sums =
                        (0..d_output).map(|o| (0..tokens).map(|t| at(&grad, d_output, t, o)).sum::<f64>());
                    assert_close("dbias", &dbias, sums, 1e-6);
                    let now: Vec<u32> = out.iter().chain(&dx_).chain(&dw).map(|x| x.to_bits()).collect();
                    assert_eq!(*bits.get_or_insert_with(|| now.clone()), now, "other bits");
                }
            }
        }
    }
}
