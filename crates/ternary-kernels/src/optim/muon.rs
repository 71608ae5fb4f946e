//! Muon: momentum, orthogonalization of the update by Newton-Schulz iterations, and the weight update.
//!
//! # Algorithm
//! ```text
//! v = momentum v + g;   u = g + momentum v                      (Nesterov)
//! x = u / |u|
//! five times:   r = x x^T;   x = (a + b r + c r²) x             singular values approach 1
//! w = keep w - rate x
//! ```
//!
//! # How it is computed
//! All matrices of the iteration are polynomials of one `r = x x^T`, `[m, m]` with `m` the shorter side. They are symmetric and
//! commute, which saves work twice:
//!
//! 1. Products of them are symmetric, so only the blocks below the diagonal are computed, recursively, and mirrored
//!    ([`symmetric`]).
//! 2. If a matrix is at least twice as long as wide, several steps are taken on `r` alone:
//!
//! ```text
//! per step:      p = a + b r + c r²;   q = p q;   r = p r p          [m, m] products
//! every 3 steps: x = q x;   r = x x^T                                [m, m] x [m, n] products
//! ```
//!
//! `r` is computed anew from `x` after three steps ([`GRAM_STEPS`]): with more, small singular values drown in its rounding.
//! The tests compare with the textbook iteration in f64, on matrices whose singular values span four decades.

use super::square_sum;
use crate::{
    MatrixView, Pool,
    matmul::gemm_f32::scaled_matmul,
    simd::{
        Kernel, LANES, Simd,
        vector_ops::{load, store},
    },
    thread_pool::{DisjointSlices, TASK_LEN},
};
use std::ops::Range;

/// The parameters of a Muon step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MuonStep {
    /// Learning rate, including the factor for the shape.
    pub rate: f32,
    /// Factor of the weight for decoupled weight decay.
    pub keep: f32,
    /// Factor of the velocity.
    pub momentum: f32,
    /// Factor of the gradient, for clipping by the global norm.
    pub grad_factor: f32,
}

/// Coefficients of the quintic `a x + b x^3 + c x^5` that each Newton-Schulz iteration applies to the singular values.
pub const NEWTON_SCHULZ: [f32; 3] = [3.4445, -4.7750, 2.0315];
/// Number of Newton-Schulz iterations.
pub const NEWTON_SCHULZ_STEPS: usize = 5;
/// Iterations on a Gram matrix before it is computed anew: after three, small singular values would drown in its rounding.
const GRAM_STEPS: usize = 3;
/// The smallest norm by which a matrix is divided.
const NORM_MIN: f64 = 1e-7;

/// One Muon step: `v = momentum v + g`, `w = keep w - rate orthogonal(g + momentum v)`, with `g = grad_factor * grad`.
///
/// `orthogonal(x)` divides by the Frobenius norm and applies `x = (a + b x x^T + c (x x^T)^2) x` five times, which moves the
/// singular values to about 1.
///
/// # Shapes
/// weight, grad, velocity `[rows, cols]`
///
/// # Panics
/// When lengths differ or are not a whole number of rows.
///
/// # Source
/// Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
///
/// # Example
/// ```
/// use ternary_kernels::{Pool, optim::{MuonStep, muon}};
/// let step = MuonStep { rate: 0.1, keep: 1.0, momentum: 0.95, grad_factor: 1.0 };
/// let (mut weight, mut velocity) = ([0.0; 4], [0.0; 4]);
/// // The gradient is diagonal, with singular values 3 and 1; the update is nearly the identity.
/// muon(&Pool::new(1), step, 2, &mut weight, &[3.0, 0.0, 0.0, 1.0], &mut velocity);
/// assert!(weight[0] < -0.06 && weight[3] < -0.06 && weight[1] == 0.0 && weight[2] == 0.0);
/// ```
pub fn muon(
    pool: &Pool,
    step: MuonStep,
    cols: usize,
    weight: &mut [f32],
    grad: &[f32],
    velocity: &mut [f32],
) {
    assert!(weight.len() == grad.len() && velocity.len() == grad.len() && grad.len().is_multiple_of(cols));
    if grad.is_empty() {
        return;
    }
    let mut update = vec![0.0; grad.len()];
    let velocities = DisjointSlices::new(velocity);
    pool.chunks(&mut update, TASK_LEN, |index, _, update| {
        let (start, len) = (index * TASK_LEN, update.len());
        // SAFETY: tasks do not overlap.
        let velocity = unsafe { velocities.slice(start, len) };
        let grad = &grad[start..start + len];
        pool.isa().run(UpdateMomentum { step, grad, velocity, update });
    });
    let norm = square_sum(pool, &update).sqrt().max(NORM_MIN);
    orthogonalize(pool, cols, &mut update, (1.0 / norm) as f32);
    pool.chunks(weight, TASK_LEN, |index, _, weight| {
        let update = &update[index * TASK_LEN..][..weight.len()];
        pool.isa().run(UpdateWeight { step, update, weight });
    });
}

/// Updates the velocity, and computes the update before orthogonalization.
struct UpdateMomentum<'a> {
    step: MuonStep,
    grad: &'a [f32],
    /// `v`, which is updated.
    velocity: &'a mut [f32],
    /// `g + momentum v`, the result.
    update: &'a mut [f32],
}

impl Kernel for UpdateMomentum<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (momentum, factor) = (s.splat_f32(self.step.momentum), s.splat_f32(self.step.grad_factor));
        let numbers = self.velocity.chunks_mut(LANES).zip(self.update.chunks_mut(LANES));
        for (grad, (velocity, update)) in self.grad.chunks(LANES).zip(numbers) {
            let grad = s.mul_f32(load(s, grad), factor);
            let new = s.fma(load(s, velocity), momentum, grad);
            store(s, new, velocity);
            store(s, s.fma(new, momentum, grad), update);
        }
    }
}

/// `weight = keep weight - rate update`
struct UpdateWeight<'a> {
    step: MuonStep,
    update: &'a [f32],
    weight: &'a mut [f32],
}

impl Kernel for UpdateWeight<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (rate, keep) = (s.splat_f32(-self.step.rate), s.splat_f32(self.step.keep));
        for (weight, update) in self.weight.chunks_mut(LANES).zip(self.update.chunks(LANES)) {
            let kept = s.mul_f32(load(s, weight), keep);
            store(s, s.fma(load(s, update), rate, kept), weight);
        }
    }
}

/// The Newton-Schulz iterations, on `factor x`: see the head of this file.
fn orthogonalize(pool: &Pool, cols: usize, x: &mut [f32], factor: f32) {
    let rows = x.len() / cols;
    let tall = rows > cols;
    let (m, n) = if tall { (cols, rows) } else { (rows, cols) };
    let steps = if n >= 2 * m { GRAM_STEPS } else { 1 };
    let mut product = vec![0.0; x.len()];
    let [mut r, mut p, mut q, mut other] = std::array::from_fn(|_| vec![0.0; m * m]);
    let (mut done, mut factor) = (0, factor);
    while done < NEWTON_SCHULZ_STEPS {
        let steps = steps.min(NEWTON_SCHULZ_STEPS - done);
        done += steps;
        let view = |x| if tall { MatrixView::new(x, n, m).transposed() } else { MatrixView::new(x, m, n) };
        symmetric(pool, view(x), view(x).transposed(), factor * factor, None, &mut r);
        // q is the product of the polynomials of these steps, r the Gram matrix of q x.
        for step in 0..steps {
            polynomial(pool, &r, m, &mut p);
            if step == 0 {
                q.copy_from_slice(&p);
            } else {
                symmetric(pool, square(&p, m), square(&q, m), 1.0, None, &mut other);
                std::mem::swap(&mut q, &mut other);
            }
            if step + 1 < steps {
                symmetric(pool, square(&p, m), square(&r, m), 1.0, None, &mut other);
                symmetric(pool, square(&other, m), square(&p, m), 1.0, None, &mut r);
            }
        }
        // Symmetric, so that it may stand on either side.
        let q = square(&q, m);
        let (left, right) = if tall { (MatrixView::new(x, n, m), q) } else { (q, MatrixView::new(x, m, n)) };
        scaled_matmul(pool, left, right, factor, None, &mut product, cols);
        x.copy_from_slice(&product);
        factor = 1.0;
    }
}

/// A view of an `[m, m]` matrix.
fn square(x: &[f32], m: usize) -> MatrixView<'_> {
    MatrixView::new(x, m, m)
}

/// `p = a + b r + c r^2`
fn polynomial(pool: &Pool, r: &[f32], m: usize, p: &mut [f32]) {
    let [a, b, c] = NEWTON_SCHULZ;
    p.copy_from_slice(r);
    symmetric(pool, square(r, m), square(r, m), c, Some(b), p);
    p.iter_mut().step_by(m + 1).for_each(|x| *x += a);
}

/// Rows up to which a symmetric product is computed as a whole. Larger ones are computed below the diagonal, and mirrored.
const DIRECT_ROWS: usize = 160;

/// [`scaled_matmul`] of a product that is known to be symmetric.
fn symmetric(
    pool: &Pool,
    left: MatrixView,
    right: MatrixView,
    factor: f32,
    add: Option<f32>,
    out: &mut [f32],
) {
    let m = left.row_count();
    let below = |rows: Range<usize>, cols: Range<usize>, out: &mut [f32]| {
        let right = right.transposed().rows(cols.clone()).transposed();
        scaled_matmul(
            pool,
            left.rows(rows.clone()),
            right,
            factor,
            add,
            &mut out[rows.start * m + cols.start..],
            m,
        );
    };
    lower_blocks(0..m, &mut |rows, cols| below(rows, cols, out));
    if m > DIRECT_ROWS {
        mirror(m, out);
    }
}

/// Calls `product(rows, columns)` for blocks that cover the lower half of a square.
fn lower_blocks(range: Range<usize>, product: &mut impl FnMut(Range<usize>, Range<usize>)) {
    if range.len() <= DIRECT_ROWS {
        return product(range.clone(), range);
    }
    let middle = range.start + range.len() / 2;
    lower_blocks(range.start..middle, product);
    product(middle..range.end, range.start..middle);
    lower_blocks(middle..range.end, product);
}

/// Copies the part below the diagonal of an `[m, m]` matrix to above it, in blocks that stay in the cache.
fn mirror(m: usize, out: &mut [f32]) {
    const BLOCK: usize = 16;
    for top in (0..m).step_by(BLOCK) {
        for left in (0..=top).step_by(BLOCK) {
            for row in top..m.min(top + BLOCK) {
                for col in left..row.min(left + BLOCK) {
                    out[col * m + row] = out[row * m + col];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{numbers, pools};

    /// As it is written, in f64, on `[rows, cols]`.
    fn reference(x: &[f64], rows: usize, cols: usize) -> Vec<f64> {
        let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt().max(NORM_MIN);
        let mut x: Vec<f64> = x.iter().map(|x| x / norm).collect();
        let product = |a: &[f64], b: &[f64], k: usize, n: usize| -> Vec<f64> {
            let mut out = vec![0.0; a.len() / k * n];
            for (out, a) in out.chunks_mut(n).zip(a.chunks(k)) {
                for (a, b) in a.iter().zip(b.chunks(n)) {
                    out.iter_mut().zip(b).for_each(|(out, b)| *out += a * b);
                }
            }
            out
        };
        let [a, b, c] = NEWTON_SCHULZ.map(f64::from);
        for _ in 0..NEWTON_SCHULZ_STEPS {
            let turned: Vec<f64> = (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect();
            let gram = product(&x, &turned, cols, rows);
            let square = product(&gram, &gram, rows, rows);
            let both: Vec<f64> = gram.iter().zip(&square).map(|(r, s)| b * r + c * s).collect();
            let more = product(&both, &x, rows, cols);
            x.iter_mut().zip(more).for_each(|(x, more)| *x = a * *x + more);
        }
        x
    }

    /// Singular values over four decades, as those of gradients are.
    fn uneven(rows: usize, cols: usize, seed: u64) -> Vec<f32> {
        let thin = rows.min(cols);
        let (left, right) = (numbers(rows * thin, 1.0, seed), numbers(thin * cols, 1.0, seed + 1));
        let mut x = vec![0.0; rows * cols];
        for (x, left) in x.chunks_mut(cols).zip(left.chunks(thin)) {
            for (i, (left, right)) in left.iter().zip(right.chunks(cols)).enumerate() {
                let weight = 10f32.powf(-4.0 * i as f32 / thin as f32) * left;
                x.iter_mut().zip(right).for_each(|(x, right)| *x += weight * right);
            }
        }
        x
    }

    #[test]
    fn steps_follow_float64() {
        let step = MuonStep { rate: 0.5, keep: 0.9, momentum: 0.95, grad_factor: 1.0 };
        for (rows, cols) in
            [(1, 1), (1, 9), (5, 3), (16, 16), (33, 70), (90, 31), (170, 190), (170, 400), (350, 165)]
        {
            let (grad, weight, velocity) =
                (uneven(rows, cols, 1), numbers(rows * cols, 1.0, 3), uneven(rows, cols, 4));
            let exact: Vec<f64> = velocity
                .iter()
                .zip(&grad)
                .map(|(v, g)| f64::from(*v) * 0.95f32 as f64 + f64::from(*g))
                .collect();
            let update: Vec<f64> =
                exact.iter().zip(&grad).map(|(v, g)| v * 0.95f32 as f64 + f64::from(*g)).collect();
            let update = reference(&update, rows, cols);
            let mut bits = None;
            for pool in pools() {
                let (mut weight_, mut velocity_) = (weight.clone(), velocity.clone());
                muon(&pool, step, cols, &mut weight_, &grad, &mut velocity_);
                for (found, exact) in velocity_.iter().zip(&exact) {
                    assert!(
                        (f64::from(*found) - exact).abs() < 1e-5 * exact.abs().max(1.0),
                        "{found} {exact}"
                    );
                }
                // The update of each weight is at most about 1; all together are off by so much.
                let moved = |i: usize| (f64::from(weight[i]) * 0.9f32 as f64 - f64::from(weight_[i])) / 0.5;
                let error: f64 = (0..weight.len()).map(|i| (moved(i) - update[i]).powi(2)).sum();
                let size: f64 = update.iter().map(|x| x * x).sum();
                assert!(error.sqrt() < 3e-5 * size.sqrt(), "{rows} x {cols}: {}", (error / size).sqrt());
                let now: Vec<u32> = weight_.iter().map(|x| x.to_bits()).collect();
                assert_eq!(*bits.get_or_insert_with(|| now.clone()), now, "{rows} x {cols}: other bits");
            }
        }
    }

    #[test]
    fn nothing_moves_without_a_gradient() {
        let step = MuonStep { rate: 0.5, keep: 1.0, momentum: 0.95, grad_factor: 1.0 };
        let (mut weight, mut velocity) = (numbers(60, 1.0, 1), vec![0.0; 60]);
        muon(&Pool::new(1), step, 10, &mut weight, &[0.0; 60], &mut velocity);
        assert_eq!(weight, numbers(60, 1.0, 1));
    }
}
