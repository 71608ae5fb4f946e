//! Layer norm and RMS norm, and their gradients.
//!
//! ```text
//! mean = sum(x) / n  (0 in an RMS norm)        r = 1 / sqrt(mean((x - mean)²) + epsilon)
//! x^ = (x - mean) r                            out = x^ weight + bias
//! g = grad weight                              dx = r (g - mean(g) - x^ mean(g x^))     (no mean(g) in an RMS norm)
//! dweight = sum over rows of grad x^           dbias = sum over rows of grad
//! ```
//!
//! Each row is read three times, and is in the cache after the first. Gradients of parameters are summed per task, and the sums
//! of tasks are added in their order.

use crate::{
    Pool,
    simd::{
        Isa, Kernel, LANES, Simd,
        vector_ops::{load, load_padded, store},
    },
    thread_pool::{DisjointSlices, rows_per_task},
};

impl Isa {
    /// RMS norm of one row: `out = x / sqrt(mean(x²) + epsilon) * weight`.
    ///
    /// # Panics
    /// When lengths differ.
    ///
    /// # Source
    /// Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    pub fn rms_norm(self, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        self.run(NormRow { x, weight, bias: None, epsilon, out });
    }

    /// Layer norm of one row: `out = (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias`.
    ///
    /// # Panics
    /// When lengths differ.
    ///
    /// # Source
    /// Ba et al., "Layer Normalization" (2016).
    pub fn layer_norm(self, x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, out: &mut [f32]) {
        self.run(NormRow { x, weight, bias: Some(bias), epsilon, out });
    }
}

/// Parameters of a norm. A row has as many numbers as `weight`.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// Factor of each column, `[d]`.
    pub weight: &'a [f32],
    /// Added to each column, `[d]`. With a bias it is layer norm, without RMS norm.
    pub bias: Option<&'a [f32]>,
    /// Added to the mean square, so that a row of zeros does not divide by zero.
    pub epsilon: f32,
}

/// Normalizes each row: see [`crate::Isa::layer_norm`] and [`crate::Isa::rms_norm`].
///
/// # Shapes
/// x, out `[rows, d]`
///
/// # Panics
/// When `x` is not a whole number of rows, or lengths differ.
///
/// # Example
/// ```
/// use ternary_kernels::{Pool, nn::{Norm, norm}};
/// let (weight, mut out) = ([1.0; 4], [0.0; 4]);
/// // Without a bias: RMS norm.
/// let parameters = Norm { weight: &weight, bias: None, epsilon: 0.0 };
/// norm(&Pool::new(1), &[2.0, -2.0, 2.0, -2.0], parameters, &mut out);
/// assert_eq!(out, [1.0, -1.0, 1.0, -1.0]);
/// ```
pub fn norm(pool: &Pool, x: &[f32], norm: Norm, out: &mut [f32]) {
    let d = norm.weight.len();
    assert!(x.len() == out.len() && x.len().is_multiple_of(d));
    let piece = rows_per_task(d) * d;
    pool.chunks(out, piece, |index, _, out| {
        for (out, x) in out.chunks_mut(d).zip(x[index * piece..].chunks(d)) {
            match norm.bias {
                Some(bias) => pool.isa().layer_norm(x, norm.weight, bias, norm.epsilon, out),
                None => pool.isa().rms_norm(x, norm.weight, norm.epsilon, out),
            }
        }
    });
}

/// Gradients of [`norm()`]: `dx` for its input; those for the weight and, in a layer norm, for the bias are returned.
///
/// With `x^ = (x - mean) r` and `g = grad * weight`: `dx = r (g - mean(g) - x^ mean(g x^))`, without the means of `x`
/// and `g` in an RMS norm; `dweight = sum grad x^` and `dbias = sum grad` over the rows.
///
/// # Shapes
/// x, grad, dx `[rows, d]`; results `[d]`
///
/// # Panics
/// As [`norm()`].
pub fn norm_backward(
    pool: &Pool,
    x: &[f32],
    norm: Norm,
    grad: &[f32],
    dx: &mut [f32],
) -> (Vec<f32>, Option<Vec<f32>>) {
    let d = norm.weight.len();
    assert!(x.len() == dx.len() && grad.len() == dx.len() && x.len().is_multiple_of(d));
    let dx = DisjointSlices::new(dx);
    let parts = pool.map_ranges(x.len() / d, rows_per_task(d), |rows| {
        let numbers = rows.start * d..rows.end * d;
        // SAFETY: tasks do not overlap.
        let dx = unsafe { dx.slice(numbers.start, numbers.len()) };
        let mut sums = [vec![0.0; d], vec![0.0; d]];
        let [dweight, dbias] = &mut sums;
        pool.isa().run(Backward { x: &x[numbers.clone()], norm, grad: &grad[numbers], dx, dweight, dbias });
        sums
    });
    let mut sums = [vec![0.0; d], vec![0.0; d]];
    for part in parts {
        for (sums, part) in sums.iter_mut().zip(part) {
            sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
    }
    let [dweight, dbias] = sums;
    (dweight, norm.bias.map(|_| dbias))
}

/// Either norm of one row.
struct NormRow<'a> {
    /// `[d]`
    x: &'a [f32],
    /// `[d]`
    weight: &'a [f32],
    /// With one, the mean is subtracted.
    bias: Option<&'a [f32]>,
    /// Added to the variance.
    epsilon: f32,
    /// `[d]`
    out: &'a mut [f32],
}

impl Kernel for NormRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, weight, bias, epsilon, out } = self;
        assert!(x.len() == weight.len() && x.len() == out.len() && bias.is_none_or(|b| b.len() == x.len()));
        let n = x.len() as f32;
        let mut mean = 0.0;
        if bias.is_some() {
            let sum = x.chunks(LANES).fold(s.splat_f32(0.0), |sum, x| s.add_f32(sum, load(s, x)));
            mean = s.sum_lanes(sum) / n;
        }
        let means = s.splat_f32(mean);
        let mut squares = s.splat_f32(0.0);
        for x in x.chunks(LANES) {
            let d = s.sub_f32(load_padded(s, x, mean), means);
            squares = s.fma(d, d, squares);
        }
        let variance = s.sum_lanes(squares) / n;
        let factor = s.splat_f32(1.0 / (variance + epsilon).sqrt());
        for (i, (out, x)) in out.chunks_mut(LANES).zip(x.chunks(LANES)).enumerate() {
            let part = i * LANES..i * LANES + out.len();
            let scaled = s.mul_f32(s.sub_f32(load(s, x), means), factor);
            let bias = bias.map_or(s.splat_f32(0.0), |bias| load(s, &bias[part.clone()]));
            store(s, s.fma(scaled, load(s, &weight[part]), bias), out);
        }
    }
}

/// The gradients of some rows. Those of the parameters are added to `dweight` and `dbias`.
struct Backward<'a> {
    /// `[rows, d]`
    x: &'a [f32],
    norm: Norm<'a>,
    /// `[rows, d]`
    grad: &'a [f32],
    /// `[rows, d]`
    dx: &'a mut [f32],
    /// `[d]`
    dweight: &'a mut [f32],
    /// `[d]`
    dbias: &'a mut [f32],
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Norm { weight, bias, epsilon } = self.norm;
        let d = weight.len();
        let n = d as f32;
        let zero = s.splat_f32(0.0);
        for ((x, grad), dx) in self.x.chunks(d).zip(self.grad.chunks(d)).zip(self.dx.chunks_mut(d)) {
            let mut mean = 0.0;
            if bias.is_some() {
                mean = s.sum_lanes(x.chunks(LANES).fold(zero, |sum, x| s.add_f32(sum, load(s, x)))) / n;
            }
            let means = s.splat_f32(mean);
            let squares = x.chunks(LANES).fold(zero, |squares, x| {
                let d = s.sub_f32(load_padded(s, x, mean), means);
                s.fma(d, d, squares)
            });
            let r = 1.0 / (s.sum_lanes(squares) / n + epsilon).sqrt();
            let factor = s.splat_f32(r);
            // mean(g) and mean(g x^), and the gradients of the parameters.
            let (mut sum, mut projection) = (zero, zero);
            for (i, (x, grad)) in x.chunks(LANES).zip(grad.chunks(LANES)).enumerate() {
                let part = i * LANES..i * LANES + x.len();
                let normal = s.mul_f32(s.sub_f32(load(s, x), means), factor);
                let grad = load(s, grad);
                let (dweight, dbias) = (&mut self.dweight[part.clone()], &mut self.dbias[part.clone()]);
                store(s, s.fma(grad, normal, load(s, dweight)), dweight);
                store(s, s.add_f32(grad, load(s, dbias)), dbias);
                let g = s.mul_f32(grad, load(s, &weight[part]));
                sum = s.add_f32(sum, g);
                projection = s.fma(g, normal, projection);
            }
            let sum = if bias.is_some() { s.sum_lanes(sum) / n } else { 0.0 };
            let (sum, projection) = (s.splat_f32(sum), s.splat_f32(s.sum_lanes(projection) / n));
            for (i, (dx, (x, grad))) in
                dx.chunks_mut(LANES).zip(x.chunks(LANES).zip(grad.chunks(LANES))).enumerate()
            {
                let part = i * LANES..i * LANES + x.len();
                let normal = s.mul_f32(s.sub_f32(load(s, x), means), factor);
                let g = s.mul_f32(load(s, grad), load(s, &weight[part]));
                let inner = s.sub_f32(s.sub_f32(g, sum), s.mul_f32(normal, projection));
                store(s, s.mul_f32(inner, factor), dx);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{SIZES, assert_close, check, numbers, pools, values};

    #[test]
    fn norms_are_right() {
        for &n in SIZES {
            let x: Vec<_> = values(n, 3.0).iter().map(|x| x + 5.0).collect();
            let (weight, bias) = (values(n + 1, 1.0)[1..].to_vec(), values(n + 2, 1.0)[2..].to_vec());
            let exact = |centre: bool| -> Vec<f64> {
                let x: Vec<_> = x.iter().map(|x| f64::from(*x)).collect();
                let mean = if centre { x.iter().sum::<f64>() / n as f64 } else { 0.0 };
                let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
                let factor = (variance + 1e-5).sqrt().recip();
                let bias = |i: usize| if centre { f64::from(bias[i]) } else { 0.0 };
                (0..n).map(|i| (x[i] - mean) * factor * f64::from(weight[i]) + bias(i)).collect()
            };
            check("rms", 2e-6, &exact(false), |isa| {
                let mut out = vec![0.0; n];
                isa.rms_norm(&x, &weight, 1e-5, &mut out);
                out
            });
            check("layer", 2e-6, &exact(true), |isa| {
                let mut out = vec![0.0; n];
                isa.layer_norm(&x, &weight, &bias, 1e-5, &mut out);
                out
            });
        }
    }

    /// `loss = sum grad * norm(x)` in float64.
    fn loss(x: &[f64], weight: &[f64], bias: Option<&[f64]>, grad: &[f64]) -> f64 {
        let d = weight.len();
        let rows = x.chunks(d).zip(grad.chunks(d));
        let row = |(x, grad): (&[f64], &[f64])| {
            let mean = bias.map_or(0.0, |_| x.iter().sum::<f64>() / d as f64);
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / d as f64;
            let r = (variance + 1e-5).sqrt().recip();
            let value = |i: usize| (x[i] - mean) * r * weight[i] + bias.map_or(0.0, |bias| bias[i]);
            (0..d).map(|i| grad[i] * value(i)).sum::<f64>()
        };
        rows.map(row).sum()
    }

    #[test]
    fn gradients_are_central_differences() {
        for (rows, d) in [(1, 1), (3, 5), (2, 16), (7, 33), (3, 100)] {
            for centre in [false, true] {
                let f64s = |v: &[f32]| v.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
                let (x, grad) = (numbers(rows * d, 2.0, 1), numbers(rows * d, 1.0, 2));
                let (weight, bias) = (numbers(d, 1.0, 3), numbers(d, 1.0, 4));
                let mut inputs = [f64s(&x), f64s(&weight), f64s(&bias)];
                let grads = f64s(&grad);
                let mut slopes = [vec![], vec![], vec![]];
                for input in 0..3 {
                    for i in 0..inputs[input].len() {
                        let at = |inputs: &mut [Vec<f64>; 3], step: f64| {
                            inputs[input][i] += step;
                            let bias = centre.then_some(&inputs[2][..]);
                            let loss = loss(&inputs[0], &inputs[1], bias, &grads);
                            inputs[input][i] -= step;
                            loss
                        };
                        let slope = (at(&mut inputs, 1e-5) - at(&mut inputs, -1e-5)) / 2e-5;
                        slopes[input].push(slope);
                    }
                }
                for pool in pools() {
                    let norm = Norm { weight: &weight, bias: centre.then_some(&bias), epsilon: 1e-5 };
                    let mut dx = vec![0.0; x.len()];
                    let (dweight, dbias) = norm_backward(&pool, &x, norm, &grad, &mut dx);
                    // Of a row of one number nearly nothing passes: what is left of a cancellation.
                    let tolerance = if d == 1 { 0.1 } else { 2e-5 };
                    assert_close("dx", &dx, slopes[0].iter().copied(), tolerance);
                    assert_close("dweight", &dweight, slopes[1].iter().copied(), tolerance);
                    assert_eq!(dbias.is_some(), centre);
                    if let Some(dbias) = dbias {
                        assert_close("dbias", &dbias, slopes[2].iter().copied(), tolerance);
                    }
                }
            }
        }
    }
}
