//! Activation functions of the feed-forward block.

use super::{TernaryBackend, node};
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::{Autodiff, Backend, Dispatch, tensor::FloatTensor};
use burn::tensor::Tensor;

/// `2 sqrt(2 / pi)`, and that times 0.044715.
const SLOPE: f32 = 1.595_769_2;
const CUBIC: f32 = 0.071_354_816;
/// Beyond this magnitude the slope of GELU is 0 or 1 in f32.
const FAR: f32 = 30.0;

/// GELU in its tanh approximation: `x / 2 (1 + tanh(u)) = x sigmoid(2u)` with `u = sqrt(2 / pi) (x + 0.044715 x^3)`.
///
/// # Shapes
/// any to the same
///
/// # Source
/// Hendrycks and Gimpel, "Gaussian Error Linear Units (GELUs)".
pub fn gelu<const D: usize>(input: Tensor<D>) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::gelu_tanh(input.into_dispatch()))
}

/// `silu(gate) * up` with `silu(x) = x sigmoid(x)`.
///
/// # Shapes
/// two of any one shape, to the same
///
/// # Source
/// Shazeer, "GLU Variants Improve Transformer".
pub fn silu_mul<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::silu_mul(gate.into_dispatch(), up.into_dispatch()))
}

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
    let x = B::float_clamp(x, (-FAR).into(), FAR.into());
    let share = B::sigmoid(B::float_mul(steepness::<B>(x.clone(), CUBIC), x.clone()));
    let slope = B::float_mul(steepness::<B>(x.clone(), 3.0 * CUBIC), x);
    B::float_mul(grad, times_logistic_slope::<B>(slope, share))
}

pub(super) fn silu_mul_default<B: Backend>(gate: FloatTensor<B>, up: FloatTensor<B>) -> FloatTensor<B> {
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

pub(super) fn track_gelu<B: TernaryBackend, C: CheckpointStrategy>(
    input: FloatTensor<Autodiff<B, C>>,
) -> FloatTensor<Autodiff<B, C>> {
    node::track::<B, C, 1>([input], |[x]| {
        let output = B::gelu_tanh(x.clone());
        (output, node::Gradient::new(move |grad| [B::gelu_tanh_backward(x.clone(), grad)]))
    })
}

pub(super) fn track_silu_mul<B: TernaryBackend, C: CheckpointStrategy>(
    inputs: [FloatTensor<Autodiff<B, C>>; 2],
) -> FloatTensor<Autodiff<B, C>> {
    node::track::<B, C, 2>(inputs, |[gate, up]| {
        let output = B::silu_mul(gate.clone(), up.clone());
        let gradient =
            node::Gradient::new(move |grad| B::silu_mul_backward(gate.clone(), up.clone(), grad).into());
        (output, gradient)
    })
}
