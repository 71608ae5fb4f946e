//! Gradients of the activation functions.

use super::ActivationOps;
use crate::ops::autodiff::{Gradient, track};
use burn::backend::{Autodiff, autodiff::checkpoint::strategy::CheckpointStrategy, tensor::FloatTensor};

impl<B: ActivationOps, C: CheckpointStrategy> ActivationOps for Autodiff<B, C> {
    fn gelu_tanh(input: FloatTensor<Self>) -> FloatTensor<Self> {
        track::<B, C, 1>([input], |[x]| {
            let output = B::gelu_tanh(x.clone());
            (output, Gradient::new(move |grad| [B::gelu_tanh_backward(x.clone(), grad)]))
        })
    }

    fn silu_mul(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        track::<B, C, 2>([gate, up], |[gate, up]| {
            let output = B::silu_mul(gate.clone(), up.clone());
            let gradient =
                Gradient::new(move |grad| B::silu_mul_backward(gate.clone(), up.clone(), grad).into());
            (output, gradient)
        })
    }
}
