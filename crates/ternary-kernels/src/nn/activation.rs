//! Activation functions and their gradients.
//!
//! Methods of [`Isa`] work on one row in place, for inference. Functions take a [`Pool`], for training.
//!
//! | function | formula | derivative |
//! |---|---|---|
//! | GELU (tanh form) | `x s(z)`, `z = 2 sqrt(2 / pi) (x + 0.044715 x³)` | `s(z) + s(z) (1 - s(z)) x z'` |
//! | SiLU | `x s(x)` | `s(x) + x s(x) (1 - s(x))` |
//! | ReLU² | `max(x, 0)²` | |
//!
//! where `s(x) = 1 / (1 + exp(-x))`, and `(1 + tanh(u)) / 2 = s(2 u)`. Tried: streaming the results of GELU and of its gradient
//! past the caches was 3 % slower in a training step.

use crate::{
    Pool,
    simd::{
        Isa, Kernel, LANES, Simd,
        vector_ops::{load, sigmoid, store, times_sigmoid},
    },
    thread_pool::{DisjointSlices, TASK_LEN},
};

impl Isa {
    /// SwiGLU: `gate = silu(gate) * up`, with `silu(x) = x / (1 + exp(-x))`.
    ///
    /// # Panics
    /// When lengths differ.
    ///
    /// # Source
    /// Shazeer, "GLU Variants Improve Transformer" (2020).
    pub fn silu_mul(self, gate: &mut [f32], up: &[f32]) {
        self.run(MapInPlace { x: gate, y: up, f: SiluMul });
    }

    /// `gate = relu(gate)² * up`
    ///
    /// # Panics
    /// When lengths differ.
    pub fn relu2_mul(self, gate: &mut [f32], up: &[f32]) {
        self.run(MapInPlace { x: gate, y: up, f: Relu2Mul });
    }

    /// `x = relu(x)²`
    pub fn relu2(self, x: &mut [f32]) {
        self.run(MapInPlace { x, y: &[], f: Relu2 });
    }

    /// GELU, tanh form: `x = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x³)))`.
    ///
    /// # Source
    /// Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016).
    pub fn gelu(self, x: &mut [f32]) {
        self.run(MapInPlace { x, y: &[], f: Gelu });
    }
}

/// GELU, tanh form: see [`crate::Isa::gelu`].
///
/// # Panics
/// When lengths differ.
pub fn gelu(pool: &Pool, x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    pool.chunks(out, TASK_LEN, |index, _, out| {
        let x = &x[index * TASK_LEN..][..out.len()];
        pool.isa().run(Apply { x, y: x, f: Gelu, out });
    });
}

/// `dx = grad * gelu'(x)`
///
/// # Panics
/// When lengths differ.
pub fn gelu_backward(pool: &Pool, x: &[f32], grad: &[f32], dx: &mut [f32]) {
    assert!(x.len() == dx.len() && grad.len() == dx.len());
    pool.chunks(dx, TASK_LEN, |index, _, dx| {
        let part = index * TASK_LEN..index * TASK_LEN + dx.len();
        pool.isa().run(GeluBackward { x: &x[part.clone()], grad: &grad[part], dx });
    });
}

/// SwiGLU: `out = silu(gate) * up`.
///
/// # Panics
/// When lengths differ.
pub fn silu_mul(pool: &Pool, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == out.len() && up.len() == out.len());
    pool.chunks(out, TASK_LEN, |index, _, out| {
        let part = index * TASK_LEN..index * TASK_LEN + out.len();
        pool.isa().run(Apply { x: &gate[part.clone()], y: &up[part], f: SiluMul, out });
    });
}

/// `dgate = grad * up * silu'(gate)` and `dup = grad * silu(gate)`
///
/// # Panics
/// When lengths differ.
pub fn silu_mul_backward(
    pool: &Pool,
    gate: &[f32],
    up: &[f32],
    grad: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    let len = gate.len();
    assert!(up.len() == len && grad.len() == len && dgate.len() == len && dup.len() == len);
    let dup = DisjointSlices::new(dup);
    pool.chunks(dgate, TASK_LEN, |index, _, dgate| {
        let (start, len) = (index * TASK_LEN, dgate.len());
        let part = start..start + len;
        // SAFETY: tasks do not overlap.
        let dup = unsafe { dup.slice(start, len) };
        let (gate, up, grad) = (&gate[part.clone()], &up[part.clone()], &grad[part]);
        pool.isa().run(SiluMulBackward { gate, up, grad, dgate, dup });
    });
}

/// A function of one or two vectors.
trait ElementwiseFn {
    /// `f(x, y)`; a function of one argument ignores `y`.
    fn apply<S: Simd>(&self, s: S, x: S::Float, y: S::Float) -> S::Float;
}

/// `silu(x) * y`
struct SiluMul;
/// `relu(x)² * y`
struct Relu2Mul;
/// `relu(x)²`
struct Relu2;
/// `gelu(x)`
struct Gelu;

impl ElementwiseFn for SiluMul {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, x: S::Float, y: S::Float) -> S::Float {
        s.mul_f32(times_sigmoid(s, x, x), y)
    }
}

impl ElementwiseFn for Relu2Mul {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, x: S::Float, y: S::Float) -> S::Float {
        s.mul_f32(Relu2.apply(s, x, y), y)
    }
}

impl ElementwiseFn for Relu2 {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, x: S::Float, _: S::Float) -> S::Float {
        let x = s.max_f32(x, s.splat_f32(0.0));
        s.mul_f32(x, x)
    }
}

impl ElementwiseFn for Gelu {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, x: S::Float, _: S::Float) -> S::Float {
        // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x³)
        let cubic = s.fma(s.mul_f32(x, x), s.splat_f32(0.071_354_82), s.splat_f32(1.595_769_2));
        times_sigmoid(s, x, s.mul_f32(x, cubic))
    }
}

/// `x = f(x, y)`, with `y = x` if `y` is empty.
struct MapInPlace<'a, F> {
    /// Replaced by the result.
    x: &'a mut [f32],
    /// As long as `x`, or empty.
    y: &'a [f32],
    f: F,
}

impl<F: ElementwiseFn> Kernel for MapInPlace<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if self.y.is_empty() {
            for x in self.x.chunks_mut(LANES) {
                let value = load(s, x);
                store(s, self.f.apply(s, value, value), x);
            }
            return;
        }
        assert_eq!(self.x.len(), self.y.len());
        for (x, y) in self.x.chunks_mut(LANES).zip(self.y.chunks(LANES)) {
            store(s, self.f.apply(s, load(s, x), load(s, y)), x);
        }
    }
}

/// `out = f(x, y)`
struct Apply<'a, F> {
    x: &'a [f32],
    y: &'a [f32],
    f: F,
    out: &'a mut [f32],
}

impl<F: ElementwiseFn> Kernel for Apply<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let inputs = self.x.chunks(LANES).zip(self.y.chunks(LANES));
        for (out, (x, y)) in self.out.chunks_mut(LANES).zip(inputs) {
            store(s, self.f.apply(s, load(s, x), load(s, y)), out);
        }
    }
}

/// See [`gelu_backward`].
struct GeluBackward<'a> {
    /// Input of the forward pass.
    x: &'a [f32],
    /// The gradient of the output.
    grad: &'a [f32],
    /// Gradient of `x`.
    dx: &'a mut [f32],
}

impl Kernel for GeluBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let c = |value: f32| s.splat_f32(value);
        for ((dx, x), grad) in
            self.dx.chunks_mut(LANES).zip(self.x.chunks(LANES)).zip(self.grad.chunks(LANES))
        {
            // Beyond 30, the derivative is 0 or 1 in f32; within, no power overflows.
            let x = s.max_f32(load(s, x), c(-30.0));
            let x = s.sub_f32(c(0.0), s.max_f32(s.sub_f32(c(0.0), x), c(-30.0)));
            let square = s.mul_f32(x, x);
            let z = s.mul_f32(x, s.fma(square, c(0.071_354_82), c(1.595_769_2)));
            // x dz/dx
            let slope = s.mul_f32(x, s.fma(square, c(3.0 * 0.071_354_82), c(1.595_769_2)));
            let share = sigmoid(s, z);
            let rest = s.sub_f32(c(1.0), share);
            let derivative = s.fma(s.mul_f32(share, rest), slope, share);
            store(s, s.mul_f32(load(s, grad), derivative), dx);
        }
    }
}

/// See [`silu_mul_backward`].
struct SiluMulBackward<'a> {
    /// Inputs of the forward pass.
    gate: &'a [f32],
    /// Inputs of the forward pass.
    up: &'a [f32],
    /// The gradient of the output.
    grad: &'a [f32],
    /// Gradient of `gate`.
    dgate: &'a mut [f32],
    /// Gradient of `up`.
    dup: &'a mut [f32],
}

impl Kernel for SiluMulBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (i, (dgate, dup)) in self.dgate.chunks_mut(LANES).zip(self.dup.chunks_mut(LANES)).enumerate() {
            let part = i * LANES..i * LANES + dgate.len();
            let x = load(s, &self.gate[part.clone()]);
            let (up, grad) = (load(s, &self.up[part.clone()]), load(s, &self.grad[part]));
            let share = sigmoid(s, x);
            let silu = s.mul_f32(x, share);
            let derivative = s.fma(silu, s.sub_f32(s.splat_f32(1.0), share), share);
            store(s, s.mul_f32(s.mul_f32(grad, up), derivative), dgate);
            store(s, s.mul_f32(grad, silu), dup);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{SIZES, assert_close, check, numbers, pools, values};

    #[test]
    fn activations_are_right() {
        for &n in SIZES {
            for scale in [1.0, 9.0, 100.0] {
                let (x, y) = (values(n, scale), values(n + 3, 2.0)[3..].to_vec());
                let map = |f: fn(f64, f64) -> f64| -> Vec<f64> {
                    x.iter().zip(&y).map(|(x, y)| f(f64::from(*x), f64::from(*y))).collect()
                };
                let apply = |f: fn(Isa, &mut [f32], &[f32])| {
                    let (x, y) = (x.clone(), y.clone());
                    move |isa| {
                        let mut x = x.clone();
                        f(isa, &mut x, &y);
                        x
                    }
                };
                check("silu", 1e-6, &map(|x, y| x / (1.0 + (-x).exp()) * y), apply(Isa::silu_mul));
                check("relu2", 1e-6, &map(|x, y| x.max(0.0).powi(2) * y), apply(Isa::relu2_mul));
                check("relu2", 1e-6, &map(|x, _| x.max(0.0).powi(2)), apply(|isa, x, _| isa.relu2(x)));
                let gelu = |x: f64, _| {
                    0.5 * x
                        * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
                };
                check("gelu", 1e-6, &map(gelu), apply(|isa, x, _| isa.gelu(x)));
            }
        }
    }

    fn sigmoid(x: f64) -> f64 {
        1.0 / (1.0 + (-x).exp())
    }

    #[test]
    fn derivatives_are_right() {
        for len in [1, 15, 16, 33, TASK_LEN + 7] {
            let (x, up, grad) = (numbers(len, 6.0, 1), numbers(len, 2.0, 2), numbers(len, 1.0, 3));
            let f64s = |v: &[f32]| v.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
            let (xs, ups, grads) = (f64s(&x), f64s(&up), f64s(&grad));
            let gelu_slope = |x: f64| {
                let root = (2.0 / std::f64::consts::PI).sqrt();
                let tanh = (root * (x + 0.044715 * x.powi(3))).tanh();
                0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * root * (1.0 + 3.0 * 0.044715 * x * x)
            };
            for pool in pools() {
                let mut dx = vec![0.0; len];
                gelu_backward(&pool, &x, &grad, &mut dx);
                assert_close("gelu", &dx, xs.iter().zip(&grads).map(|(x, g)| g * gelu_slope(*x)), 2e-6);
                let mut out = vec![0.0; len];
                silu_mul(&pool, &x, &up, &mut out);
                assert_close("silu", &out, xs.iter().zip(&ups).map(|(x, u)| x * sigmoid(*x) * u), 2e-6);
                let mut dup = vec![0.0; len];
                silu_mul_backward(&pool, &x, &up, &grad, &mut dx, &mut dup);
                assert_close("dup", &dup, xs.iter().zip(&grads).map(|(x, g)| g * x * sigmoid(*x)), 2e-6);
                let dgate = xs
                    .iter()
                    .zip(&ups)
                    .zip(&grads)
                    .map(|((x, u), g)| g * u * sigmoid(*x) * (1.0 + x * (1.0 - sigmoid(*x))));
                assert_close("dgate", &dx, dgate, 2e-6);
            }
        }
    }

    #[test]
    fn the_slope_of_gelu_is_0_or_1_far_out() {
        for pool in pools() {
            let x = [-3e38, -1e13, -40.0, 40.0, 1e13, 3e38];
            let mut dx = [0.0; 6];
            gelu_backward(&pool, &x, &[1.0; 6], &mut dx);
            assert_close("slope", &dx, [0.0, 0.0, 0.0, 1.0, 1.0, 1.0], 1e-30);
        }
    }
}
