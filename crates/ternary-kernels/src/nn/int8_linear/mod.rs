//! The ternary linear layer for training with int8 products ([`TernaryLinear`]).
//!
//! # The three products
//! `y = x~ W~ + b`, with activations `x~` rounded to int8 and a ternary weight `W~ = C s_w` (codes times one scale per channel):
//!
//! | product | left factor, int8 | right factor | scales after the sum |
//! |---|---|---|---|
//! | `y = x~ W~` | codes of `x~`, a scale `s_x` per token | `C`, ternary | token and channel |
//! | `dx = dy W~^T` | `dy s_w`, rounded per token | `C^T`, ternary | token |
//! | `dW~ = x~^T dy` | codes of `x~^T` | `dy s_x`, rounded per channel, int8 | channel |
//!
//! The scales of the other factor are folded into `dy` before it is rounded, so that each product is one integer product
//! with one scale per row after it. Sums are exact in i32. The forward pass is what fake quantization computes, but for the
//! order of roundings; gradients differ from it by the rounding of `dy` alone. A scale per group of inputs could not be
//! folded into `dy`, so it is not supported.
//!
//! # Passes over memory
//! ```text
//! forward:    latent weight -> codes, packed and kept      (one pass; no fake quantized weight is made)
//!             x -> int8 codes, kept
//!             multiply, with bias, past the caches
//! backward:   dy -> column maxima, column sums (dbias), int8 per token     (one pass)
//!             codes of W -> packed by rows;  dx = multiply
//!             dy -> int8 per channel, packed;  codes of x -> transposed;  dW = multiply       (per 131,072 tokens)
//! ```
//!
//! What is kept for the backward pass is one byte per activation and one byte per weight ([`SavedTensors`]).
//!
//! # Measured
//! On two threads of a Xeon with AMX, tokens/s of a training step of 768 x 12, in three pairs of programs before and after:
//!
//! | change | before | after |
//! |---|---|---|
//! | codes straight from the latent weight | 1386, 1385, 1357 | 1477, 1433, 1482 |
//! | gradients and weights packed without a matrix of bytes between | 1396, 1360 | 1380, 1383 |
//! | columns prefetched while packing, codes transposed by blocks of 16 tokens | 1560, 1559, 1494 | 1609, 1538, 1549 |
//! | codes transposed a cache line of columns at a time | 1693, 1684, 1656 | 1708, 1682, 1690 |
//!
//! A layer of 768 x 3072 on 1,024 tokens, with all packing and rounding, on one thread: forward 3.5 ms, the input's gradient
//! 3.1 ms, both gradients 6.8 ms.
//!
//! Tried: 64 columns of codes transposed at once, instead of 16: half as slow again.

mod code_source;
mod column_stats;
mod saved_tensors;
mod transpose;

pub use column_stats::column_sums;
pub use saved_tensors::{SavedTensors, SavedTensorsMut};

use crate::{
    Activations, CodeRange, Int8Activations, Int8TrainingMatrix, Matrix, MemoryOrder, Pool, Product,
    matmul::activations::{ABSMAX_MIN, SumGranularity},
    multiply,
    thread_pool::{DisjointSlices, TASK_LEN},
};
use code_source::{GradientCodes, SignCodes};
use column_stats::column_stats;

/// The smallest absolute maximum by which a gradient is quantized; keeps zeros from dividing by zero.
const GRADIENT_ABSMAX_MIN: f32 = 1e-30;

/// `y = x~ W~ + b` with int8 activations `x~` and a ternary weight `W~`, forward and backward in integer products.
///
/// | product | left | right | scales |
/// |---|---|---|---|
/// | `y = x~ W~` | int8 per token | ternary per channel | both after the sum |
/// | `dx = dy W~^T` | `dy` times the scales of the channels, int8 per token | codes | of the token, after the sum |
/// | `dW~ = x~^T dy` | int8 codes of `x~` | `dy` times the scales of the tokens, int8 per channel | of the channel, after the sum |
///
/// Sums are exact in i32. The value is the workspace of these products: one serves all layers of a model in turn.
///
/// # Example
/// ```
/// use ternary_kernels::{Pool, nn::{LinearWeight, SavedTensors, SavedTensorsMut, TernaryLinear}};
/// let (tokens, d_input, d_output) = (1, 2, 2);
/// let mut saved = (vec![0; SavedTensors::input_len(tokens, d_input)], [0.0; 1], [0; 4], [0.0; 2]);
/// let mut y = [0.0; 2];
/// // Weight `[d_input, d_output]`: channel 0 is {0.5, -0.5}, channel 1 {2, 0}.
/// TernaryLinear::default().forward(
///     &Pool::new(1),
///     &[127.0, 1.0],
///     LinearWeight::Ternary(&[0.5, 2.0, -0.5, 0.0]),
///     None,
///     &mut y,
///     SavedTensorsMut {
///         input: &mut saved.0,
///         input_scales: &mut saved.1,
///         weight: &mut saved.2,
///         weight_scales: &mut saved.3,
///     },
/// );
/// assert_eq!(y, [63.0, 254.0]);
/// assert_eq!(saved.2, [1, 1, -1, 0]);
/// ```
#[derive(Debug, Default)]
pub struct TernaryLinear {
    /// The packed right factor of the current product.
    matrix: Int8TrainingMatrix,
    /// The int8 left factor of the current product.
    tokens: Int8Activations,
}

/// The weight of a [`TernaryLinear`], `[d_input, d_output]`.
#[derive(Clone, Copy, Debug)]
pub enum LinearWeight<'a> {
    /// A weight with values `{-scale, 0, +scale}` per channel. Any other weight gives the product of one that is.
    Ternary(&'a [f32]),
    /// The latent weight, which is quantized here: `scales` with the sign of a weight where its magnitude exceeds
    /// `thresholds`.
    Latent {
        /// `[d_input, d_output]`
        weight: &'a [f32],
        /// `[d_output]`
        scales: &'a [f32],
        /// `[d_output]`
        thresholds: &'a [f32],
    },
}

impl TernaryLinear {
    /// `out = x~ W~ + bias`; `bias` is optional.
    ///
    /// # Shapes
    /// x `[tokens, d_input]`, bias `[d_output]`, out `[tokens, d_output]`, saved as in [`SavedTensors`]
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn forward(
        &mut self,
        pool: &Pool,
        x: &[f32],
        weight: LinearWeight,
        bias: Option<&[f32]>,
        out: &mut [f32],
        saved: SavedTensorsMut,
    ) {
        let d_output = saved.weight_scales.len();
        let none = vec![0.0; d_output];
        let (weight, thresholds) = match weight {
            LinearWeight::Ternary(weight) => {
                column_scales(weight, saved.weight_scales);
                (weight, &none[..])
            }
            LinearWeight::Latent { weight, scales, thresholds } => {
                saved.weight_scales.copy_from_slice(scales);
                (weight, thresholds)
            }
        };
        assert!(weight.len().is_multiple_of(d_output), "{} weights, {d_output} outputs", weight.len());
        assert!(saved.weight.len() == weight.len() && thresholds.len() == d_output, "codes and thresholds");
        let d_input = weight.len() / d_output;
        // Codes of the weight are packed and kept in one pass.
        let signs = SignCodes { weight, thresholds, codes: DisjointSlices::new(saved.weight) };
        self.matrix.pack_columns(pool, d_input, saved.weight_scales, CodeRange::Ternary, &signs);
        self.tokens.quantize(pool, x, d_input, None, ABSMAX_MIN, SumGranularity::PerToken);
        let input = Activations::from_codes(&self.tokens, d_input);
        with_matrix(&mut self.matrix, |matrix| {
            multiply(pool, &input, &mut [Product { matrix, bias, add: false, out }]);
        });
        let codes = self.tokens.codes.as_flattened();
        pool.chunks(saved.input, TASK_LEN, |index, _, kept| {
            kept.copy_from_slice(&codes[index * TASK_LEN..][..kept.len()]);
        });
        saved.input_scales.copy_from_slice(&self.tokens.scales);
    }

    /// Gradients for the input, the weight and (returned) the bias.
    ///
    /// # Shapes
    /// grad `[tokens, d_output]`, dx `[tokens, d_input]`, dweight `[d_input, d_output]`, result `[d_output]`
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn backward(
        &mut self,
        pool: &Pool,
        saved: SavedTensors,
        grad: &[f32],
        dx: &mut [f32],
        dweight: &mut [f32],
    ) -> Vec<f32> {
        let (tokens, d_output) = (saved.input_scales.len(), saved.weight_scales.len());
        let d_input = saved.weight.len() / d_output;
        assert_eq!(
            saved.input.len(),
            SavedTensors::input_len(tokens, d_input),
            "activations of {tokens} tokens"
        );
        assert!(grad.len() == tokens * d_output, "gradients");
        assert_eq!(grad.len(), tokens * d_output, "gradients");
        let task = self.tokens.quantize_task(
            tokens,
            d_output,
            Some(saved.weight_scales),
            GRADIENT_ABSMAX_MIN,
            SumGranularity::PerToken,
        );
        let (maxima, sums) = column_stats(pool, grad, d_output, Some(saved.input_scales), |row, values| {
            // SAFETY: each row is visited once.
            unsafe { task.quantize(pool.isa(), row, values) };
        });
        self.multiply_by_weight(pool, saved.weight, d_output, dx);

        // dW: the gradient again, int8 per channel, with the scales of the activations folded in.
        let scales: Vec<f32> = maxima.iter().map(|max| max.max(GRADIENT_ABSMAX_MIN) / 127.0).collect();
        let inverse: Vec<f32> = scales.iter().map(|scale| 1.0 / scale).collect();
        let stride = saved.input.len() / tokens;
        for start in (0..tokens).step_by(MAX_SUMMED_TOKENS) {
            let part = start..tokens.min(start + MAX_SUMMED_TOKENS);
            let grad = &grad[part.start * d_output..part.end * d_output];
            let codes = GradientCodes { grad, factors: &saved.input_scales[part.clone()], inverse: &inverse };
            self.matrix.pack_columns(pool, part.len(), &scales, CodeRange::Int8, &codes);
            let input = &saved.input[part.start * stride..part.end * stride];
            self.tokens.transpose(pool, input, d_input, part.len());
            let input = Activations::from_codes(&self.tokens, part.len());
            with_matrix(&mut self.matrix, |matrix| {
                let product = Product { add: start > 0, ..Product::new(matrix, dweight) };
                multiply(pool, &input, &mut [product]);
            });
        }
        sums
    }

    /// The gradient for the input alone, as of [`backward`](Self::backward): for a frozen layer.
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
        self.tokens.quantize(
            pool,
            grad,
            d_output,
            Some(weight_scales),
            GRADIENT_ABSMAX_MIN,
            SumGranularity::PerToken,
        );
        self.multiply_by_weight(pool, weight, d_output, dx);
    }

    /// `dx` from the quantized gradient in `self.tokens`.
    fn multiply_by_weight(&mut self, pool: &Pool, weight: &[i8], d_output: usize, dx: &mut [f32]) {
        self.matrix.pack(
            pool,
            weight,
            MemoryOrder::RowMajor,
            &vec![1.0; weight.len() / d_output],
            CodeRange::Ternary,
        );
        let input = Activations::from_codes(&self.tokens, d_output);
        with_matrix(&mut self.matrix, |matrix| multiply(pool, &input, &mut [Product::new(matrix, dx)]));
    }
}

/// Tokens whose products of int8 codes are summed in i32: `128 * 127` times as many fit.
const MAX_SUMMED_TOKENS: usize = 1 << 17;

/// Lends the matrix to `f` as a [`Matrix`].
fn with_matrix(matrix: &mut Int8TrainingMatrix, f: impl FnOnce(&Matrix)) {
    let lent = Matrix::Int8Training(std::mem::take(matrix));
    f(&lent);
    let Matrix::Int8Training(back) = lent else { unreachable!("a matrix of codes was lent") };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        TensorBuffer,
        testing::{assert_close, numbers, pools},
    };

    /// All products of one sign, and enough of them for their sum to exceed 32 bits.
    #[test]
    #[cfg_attr(miri, ignore = "takes minutes")]
    fn gradients_of_very_many_tokens_are_sums_of_all() {
        for (tokens, sign) in
            [(MAX_SUMMED_TOKENS, 1.0), (MAX_SUMMED_TOKENS + 3, -1.0), (3 * MAX_SUMMED_TOKENS / 2 + 1, 1.0)]
        {
            for pool in pools() {
                let mut layer = TernaryLinear::default();
                let (mut input, mut input_scales) =
                    (vec![0; SavedTensors::input_len(tokens, 1)], vec![0.0; tokens]);
                let (mut weight, mut weight_scales) = ([0], [0.0]);
                let saved = SavedTensorsMut {
                    input: &mut input,
                    input_scales: &mut input_scales,
                    weight: &mut weight,
                    weight_scales: &mut weight_scales,
                };
                let mut out = vec![0.0; tokens];
                layer.forward(
                    &pool,
                    &vec![sign; tokens],
                    LinearWeight::Ternary(&[1.0]),
                    None,
                    &mut out,
                    saved,
                );
                let saved = SavedTensors {
                    input: &input,
                    input_scales: &input_scales,
                    weight: &weight,
                    weight_scales: &weight_scales,
                };
                let mut dweight = [f32::NAN];
                layer.backward(&pool, saved, &vec![1.0; tokens], &mut out, &mut dweight);
                assert_close("dw", &dweight, [f64::from(sign) * tokens as f64], 1e-5);
            }
        }
    }

    #[test]
    fn products_are_those_of_rounded_factors() {
        // The last one's output is so large that it goes past the caches.
        let shapes = [(1, 1, 1), (3, 5, 7), (16, 16, 16), (33, 70, 19), (70, 130, 65), (520, 20, 512)];
        for (tokens, d_input, d_output) in shapes {
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
            // Rounded, it is the weight.
            let latent: Vec<f32> = weight
                .iter()
                .enumerate()
                .map(|(n, w)| if *w == 0.0 { scales[n % d_output] * 0.4 } else { w * 0.7 })
                .collect();
            let thresholds: Vec<f32> = scales.iter().map(|scale| scale * 0.5).collect();
            let forms = [
                LinearWeight::Ternary(&weight),
                LinearWeight::Latent { weight: &latent, scales: &scales, thresholds: &thresholds },
            ];
            let mut bits = None;
            for pool in pools() {
                let mut layer = TernaryLinear::default();
                // Twice: what is left of a larger product must not show.
                for form in forms {
                    let mut out = TensorBuffer::new(tokens * d_output);
                    out.fill(f32::NAN);
                    let mut kept = (vec![0; SavedTensors::input_len(tokens, d_input)], vec![0.0; tokens]);
                    let mut kept_weight = (vec![0; weight.len()], vec![0.0; d_output]);
                    let saved = SavedTensorsMut {
                        input: &mut kept.0,
                        input_scales: &mut kept.1,
                        weight: &mut kept_weight.0,
                        weight_scales: &mut kept_weight.1,
                    };
                    layer.forward(&pool, &x, form, Some(&bias), &mut out, saved);
                    assert_close("y", &out, y.clone(), 2e-6);
                    let saved = SavedTensors {
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
