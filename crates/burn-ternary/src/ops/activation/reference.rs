//! The activation functions in float ops: the default bodies, and the oracle of faster ones.

use burn::backend::{Backend, tensor::FloatTensor};

/// `2 sqrt(2 / pi)`, and that times 0.044715.
const SLOPE: f32 = 1.595_769_2;
const CUBIC: f32 = 0.071_354_816;
/// Beyond this magnitude the slope of GELU is 0 or 1 in f32.
const SATURATION: f32 = 30.0;

/// `2u / x`
fn steepness<B: Backend>(x: FloatTensor<B>, cubic: f32) -> FloatTensor<B> {
    let square = B::float_mul(x.clone(), x);
    B::float_add_scalar(B::float_mul_scalar(square, cubic.into()), SLOPE.into())
}

pub(super) fn gelu_tanh<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let inner = B::float_mul(steepness::<B>(x.clone(), CUBIC), x.clone());
    B::float_mul(x, B::sigmoid(inner))
}

pub(super) fn gelu_tanh_backward<B: Backend>(x: FloatTensor<B>, grad: FloatTensor<B>) -> FloatTensor<B> {
    let x = B::float_clamp(x, (-SATURATION).into(), SATURATION.into());
    let share = B::sigmoid(B::float_mul(steepness::<B>(x.clone(), CUBIC), x.clone()));
    let slope = B::float_mul(steepness::<B>(x.clone(), 3.0 * CUBIC), x);
    B::float_mul(grad, times_logistic_slope::<B>(slope, share))
}

pub(super) fn silu_mul<B: Backend>(gate: FloatTensor<B>, up: FloatTensor<B>) -> FloatTensor<B> {
    B::float_mul(B::float_mul(gate.clone(), B::sigmoid(gate)), up)
}

pub(super) fn silu_mul_backward<B: Backend>(
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let share = B::sigmoid(gate.clone());
    let dup = B::float_mul(grad.clone(), B::float_mul(gate.clone(), share.clone()));
    let dgate = B::float_mul(B::float_mul(grad, up), times_logistic_slope::<B>(gate, share));
    (dgate, dup)
}

/// `share + x share (1 - share)`, the slope of `x sigmoid(..)`.
fn times_logistic_slope<B: Backend>(x: FloatTensor<B>, share: FloatTensor<B>) -> FloatTensor<B> {
    let rest = B::float_add_scalar(B::float_neg(share.clone()), 1f32.into());
    B::float_add(B::float_mul(B::float_mul(share.clone(), rest), x), share)
}
