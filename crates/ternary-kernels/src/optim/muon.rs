//! Muon: momentum, the orthogonal factor of a matrix by products alone, and the update.

use super::square_sum;
use crate::{
    Pool, View,
    matmul::gemm_f32::scaled_product,
    simd::{
        Kernel, LANES, Simd,
        vector_ops::{load, store},
    },
    thread_pool::{Disjoint, PIECE},
};
use std::ops::Range;

/// The numbers of a step of Muon.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Muon {
    /// The learning rate, with what the shape makes of it.
    pub rate: f32,
    /// What decay leaves of a weight.
    pub keep: f32,
    pub momentum: f32,
    /// What gradients are multiplied by first, as to clip them.
    pub grad_factor: f32,
}

/// Of the quintic `a x + b x^3 + c x^5` that each step of Newton and Schulz's iteration applies to the singular values.
pub const NEWTON_SCHULZ: [f32; 3] = [3.4445, -4.7750, 2.0315];
pub const NEWTON_SCHULZ_STEPS: usize = 5;
/// Steps of a Gram matrix before it is taken anew: after three, small singular values would drown in its rounding.
const STEPS_OF_GRAM: usize = 3;
/// Below this norm a matrix is not scaled up.
const NORM_MIN: f64 = 1e-7;

/// `v = momentum v + g`, `w = keep w - rate orthogonal(g + momentum v)` of matrices whose rows have `cols` numbers.
///
/// `orthogonal(x)` is five steps of `x = (a + b x x^T + c (x x^T)^2) x` from `x` over its Frobenius norm: singular values
/// become about 1.
///
/// # Panics
/// When lengths differ or are no whole rows.
///
/// # Source
/// Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
pub fn muon(pool: &Pool, step: Muon, cols: usize, weight: &mut [f32], grad: &[f32], velocity: &mut [f32]) {
    assert!(weight.len() == grad.len() && velocity.len() == grad.len() && grad.len().is_multiple_of(cols));
    if grad.is_empty() {
        return;
    }
    let mut update = vec![0.0; grad.len()];
    let velocities = Disjoint::new(velocity);
    pool.chunks(&mut update, PIECE, |index, _, update| {
        let (start, len) = (index * PIECE, update.len());
        // SAFETY: pieces do not overlap.
        let velocity = unsafe { velocities.slice(start, len) };
        let grad = &grad[start..start + len];
        pool.isa().run(Momentum { step, grad, velocity, update });
    });
    let norm = square_sum(pool, &update).sqrt().max(NORM_MIN);
    orthogonalize(pool, cols, &mut update, (1.0 / norm) as f32);
    pool.chunks(weight, PIECE, |index, _, weight| {
        let update = &update[index * PIECE..][..weight.len()];
        pool.isa().run(Update { step, update, weight });
    });
}

struct Momentum<'a> {
    step: Muon,
    grad: &'a [f32],
    velocity: &'a mut [f32],
    update: &'a mut [f32],
}

impl Kernel for Momentum<'_> {
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

struct Update<'a> {
    step: Muon,
    update: &'a [f32],
    weight: &'a mut [f32],
}

impl Kernel for Update<'_> {
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

/// The iteration, on `factor x`.
///
/// All its matrices are polynomials of one, so that they are symmetric and commute. Where a matrix is twice as long as wide
/// or more, the steps are taken on the square `r = x x^T` and on the polynomial `q` of it that they are,
/// `r = p r p` and `q = p q` with `p = a + b r + c r^2`, and `x = q x` comes once for several.
fn orthogonalize(pool: &Pool, cols: usize, x: &mut [f32], factor: f32) {
    let rows = x.len() / cols;
    let tall = rows > cols;
    let (m, n) = if tall { (cols, rows) } else { (rows, cols) };
    let steps = if n >= 2 * m { STEPS_OF_GRAM } else { 1 };
    let mut room = vec![0.0; x.len()];
    let [mut r, mut p, mut q, mut other] = std::array::from_fn(|_| vec![0.0; m * m]);
    let (mut done, mut factor) = (0, factor);
    while done < NEWTON_SCHULZ_STEPS {
        let steps = steps.min(NEWTON_SCHULZ_STEPS - done);
        done += steps;
        let view = |x| if tall { View::new(x, n, m).transposed() } else { View::new(x, m, n) };
        symmetric(pool, view(x), view(x).transposed(), factor * factor, None, &mut r);
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
        let (left, right) = if tall { (View::new(x, n, m), q) } else { (q, View::new(x, m, n)) };
        scaled_product(pool, left, right, factor, None, &mut room, cols);
        x.copy_from_slice(&room);
        factor = 1.0;
    }
}

fn square(x: &[f32], m: usize) -> View<'_> {
    View::new(x, m, m)
}

/// `p = a + b r + c r^2`
fn polynomial(pool: &Pool, r: &[f32], m: usize, p: &mut [f32]) {
    let [a, b, c] = NEWTON_SCHULZ;
    p.copy_from_slice(r);
    symmetric(pool, square(r, m), square(r, m), c, Some(b), p);
    p.iter_mut().step_by(m + 1).for_each(|x| *x += a);
}

/// A symmetric product of more rows than this is computed below its diagonal, by halves, and mirrored.
const WHOLE: usize = 160;

/// [`scaled_product`] where the result is known to be symmetric.
fn symmetric(pool: &Pool, left: View, right: View, factor: f32, add: Option<f32>, out: &mut [f32]) {
    let m = left.row_count();
    let below = |rows: Range<usize>, cols: Range<usize>, out: &mut [f32]| {
        let right = right.transposed().rows(cols.clone()).transposed();
        scaled_product(
            pool,
            left.rows(rows.clone()),
            right,
            factor,
            add,
            &mut out[rows.start * m + cols.start..],
            m,
        );
    };
    halves(0..m, &mut |rows, cols| below(rows, cols, out));
    if m > WHOLE {
        mirror(m, out);
    }
}

/// Calls `product` for the blocks that make up the lower half of a square.
fn halves(range: Range<usize>, product: &mut impl FnMut(Range<usize>, Range<usize>)) {
    if range.len() <= WHOLE {
        return product(range.clone(), range);
    }
    let middle = range.start + range.len() / 2;
    halves(range.start..middle, product);
    product(middle..range.end, range.start..middle);
    halves(middle..range.end, product);
}

/// Copies what is below the diagonal of an `[m, m]` matrix to above it, in blocks that stay in the cache.
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
        let step = Muon { rate: 0.5, keep: 0.9, momentum: 0.95, grad_factor: 1.0 };
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
        let step = Muon { rate: 0.5, keep: 1.0, momentum: 0.95, grad_factor: 1.0 };
        let (mut weight, mut velocity) = (numbers(60, 1.0, 1), vec![0.0; 60]);
        muon(&Pool::new(1), step, 10, &mut weight, &[0.0; 60], &mut velocity);
        assert_eq!(weight, numbers(60, 1.0, 1));
    }
}
