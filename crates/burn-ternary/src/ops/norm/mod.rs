//! Layer norm and RMS norm over rows.
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

/// `(x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias` of each row, with the biased variance.
///
/// # Shapes
/// `[rows, d]`, weight and bias `[d]`, to `[rows, d]`
pub fn layer_norm(input: Tensor<2>, weight: Tensor<1>, bias: Tensor<1>, epsilon: f32) -> Tensor<2> {
    let [input, weight, bias] = [input.into_dispatch(), weight.into_dispatch(), bias.into_dispatch()];
    Tensor::from_dispatch(Dispatch::layer_norm_rows(input, weight, bias, epsilon))
}

/// `x / sqrt(mean(x^2) + epsilon) * weight` of each row.
///
/// # Shapes
/// `[rows, d]`, weight `[d]`, to `[rows, d]`
pub fn rms_norm(input: Tensor<2>, weight: Tensor<1>, epsilon: f32) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::rms_norm_rows(input.into_dispatch(), weight.into_dispatch(), epsilon))
}

backend_ops! {
    /// Norms over rows, with their gradients.
    pub trait NormOps: Backend {
        /// See [`layer_norm`].
        #[fusion(default)]
        fn layer_norm_rows(
            input: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            bias: FloatTensor<Self>,
            epsilon: f32,
        ) -> FloatTensor<Self> {
            reference::layer_norm::<Self>(input, weight, bias, epsilon)
        }

        /// Gradients of input, weight and bias.
        #[fusion(default)]
        fn layer_norm_rows_backward(
            input: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            grad: FloatTensor<Self>,
            epsilon: f32,
        ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
            reference::layer_norm_backward::<Self>(input, weight, grad, epsilon)
        }

        /// See [`rms_norm`].
        #[fusion(default)]
        fn rms_norm_rows(input: FloatTensor<Self>, weight: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self> {
            reference::rms_norm::<Self>(input, weight, epsilon)
        }

        /// Gradients of input and weight.
        #[fusion(default)]
        fn rms_norm_rows_backward(
            input: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            grad: FloatTensor<Self>,
            epsilon: f32,
        ) -> (FloatTensor<Self>, FloatTensor<Self>) {
            reference::rms_norm_backward::<Self>(input, weight, grad, epsilon)
        }
    }
}
