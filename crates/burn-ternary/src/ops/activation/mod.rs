//! Activation functions of the feed-forward block.
//!
//! # Overriding
//! Every method must agree with its default body within f32 rounding. The backward methods take the inputs of the forward
//! ones, so each can be overridden alone.

mod autodiff;
#[cfg(feature = "flex")]
mod flex;
mod reference;

use super::backend::backend_ops;
use burn::backend::{Backend, Dispatch, tensor::FloatTensor};
use burn::tensor::Tensor;

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

backend_ops! {
    /// Activation functions, with their gradients.
    pub trait ActivationOps: Backend {
        /// See [`gelu`].
        #[fusion(default)]
        fn gelu_tanh(input: FloatTensor<Self>) -> FloatTensor<Self> {
            reference::gelu_tanh::<Self>(input)
        }

        /// The gradient of the input.
        #[fusion(default)]
        fn gelu_tanh_backward(input: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
            reference::gelu_tanh_backward::<Self>(input, grad)
        }

        /// See [`silu_mul`].
        #[fusion(default)]
        fn silu_mul(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
            reference::silu_mul::<Self>(gate, up)
        }

        /// Gradients of gate and up.
        #[fusion(default)]
        fn silu_mul_backward(
            gate: FloatTensor<Self>,
            up: FloatTensor<Self>,
            grad: FloatTensor<Self>,
        ) -> (FloatTensor<Self>, FloatTensor<Self>) {
            reference::silu_mul_backward::<Self>(gate, up, grad)
        }
    }
}
