//! Matrix products of linear layers: float, and ternary with int8 activations where the backend has integer products.
//!
//! # Overriding
//! The float products must agree with their default bodies within f32 rounding, each by itself. `ternary_linear` and
//! `latent_linear` return [`SavedFactors`] in a layout that only their two backward methods read: override all four or none.
//! The output and `dx` of an override must be those of the default body on its rounded factors, within f32 rounding.

mod autodiff;
#[cfg(feature = "flex")]
mod flex;
mod reference;

use super::{QuantizeOps, backend::backend_ops};
use burn::backend::{Backend, Dispatch, ExtensionType, tensor::FloatTensor};
use burn::tensor::Tensor;

/// Precision of the factors of a float product. Sums are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FactorPrecision {
    /// f32.
    F32,
    /// Rounded to bfloat16 on CPUs with AMX, which multiply it faster; f32 elsewhere.
    Bf16,
}

/// Precision of the factors of a ternary weight's gradient: the gradient of the output, and the activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightGradientPrecision {
    /// int8: gradients are rounded per channel.
    Int8,
    /// As [`FactorPrecision::Bf16`].
    Bf16,
}

/// `x~ W~ + b` with int8 activations (those of [`absmax_quantize`](super::absmax_quantize) with 127 levels) and a weight that is
/// already ternary.
///
/// On flex, the forward product and both backward products are integer products of int8 activations, ternary codes and
/// gradients rounded to int8: per token for the gradient of the input, per channel for that of the weight (if `precision`
/// selects it). On other backends they are float products.
///
/// # Shapes
/// - input: `[tokens, d_input]`; its gradient passes the rounding straight through
/// - weight: `[d_input, d_output]`, each channel of `{-scale, 0, scale}`
/// - bias: `[d_output]`
/// - output: `[tokens, d_output]`
pub fn ternary_linear(
    input: Tensor<2>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    precision: WeightGradientPrecision,
) -> Tensor<2> {
    // The extension takes no optional tensors.
    let bias = bias.unwrap_or_else(|| Tensor::zeros([weight.dims()[1]], &weight.device()));
    let [input, weight, bias] = [input.into_dispatch(), weight.into_dispatch(), bias.into_dispatch()];
    Tensor::from_dispatch(Dispatch::ternary_linear(input, weight, bias, precision).output)
}

/// [`ternary_linear`] of [`ternary_quantize`](super::ternary_quantize) of a latent weight, with the identity estimator. On flex the
/// quantized weight is never materialized, only its codes.
///
/// # Shapes
/// As [`ternary_linear`], with `latent` as the weight. Scale and threshold, without gradients, are both `[1, 1, d_output]` or both
/// `[1, 1, 1]`.
pub fn latent_linear(
    input: Tensor<2>,
    latent: Tensor<2>,
    [scale, threshold]: [Tensor<3>; 2],
    bias: Option<Tensor<1>>,
    precision: WeightGradientPrecision,
) -> Tensor<2> {
    let bias = bias.unwrap_or_else(|| Tensor::zeros([latent.dims()[1]], &latent.device()));
    let [input, latent, bias] = [input.into_dispatch(), latent.into_dispatch(), bias.into_dispatch()];
    let [scale, threshold] = [scale, threshold].map(Tensor::into_dispatch);
    Tensor::from_dispatch(Dispatch::latent_linear(input, latent, scale, threshold, bias, precision).output)
}

/// `x W + b`.
///
/// # Shapes
/// input `[tokens, d_input]`, weight `[d_input, d_output]`, bias `[d_output]`, to `[tokens, d_output]`
pub fn float_linear(
    input: Tensor<2>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    precision: FactorPrecision,
) -> Tensor<2> {
    let [input, weight] = [input.into_dispatch(), weight.into_dispatch()];
    Tensor::from_dispatch(match bias {
        Some(bias) => Dispatch::float_linear(input, weight, bias.into_dispatch(), precision),
        None => Dispatch::float_product(input, weight, precision),
    })
}

/// The output head, `x T^T`: logits from a table with one row per token id.
///
/// # Shapes
/// hidden `[tokens, d]`, table `[vocab, d]`, to `[tokens, vocab]`
pub fn lm_head(hidden: Tensor<2>, table: Tensor<2>, precision: FactorPrecision) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::float_product_transposed(
        hidden.into_dispatch(),
        table.into_dispatch(),
        precision,
    ))
}

/// Result of the forward pass of a ternary layer.
#[derive(ExtensionType)]
pub struct TernaryLinearForward<B: Backend> {
    /// `[tokens, d_output]`
    pub output: FloatTensor<B>,
    /// What the backward pass reads.
    #[extension_type]
    pub saved: SavedFactors<B>,
}

/// The factors of the forward product, in a layout that is private to the backend.
#[derive(ExtensionType)]
pub struct SavedFactors<B: Backend> {
    /// The quantized input.
    pub input: FloatTensor<B>,
    /// The ternary weight.
    pub weight: FloatTensor<B>,
}

backend_ops! {
    /// Products of linear layers, with their gradients.
    pub trait LinearOps: QuantizeOps {
        /// See [`float_linear`].
        #[fusion(default)]
        fn float_linear(
            input: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            bias: FloatTensor<Self>,
            _precision: FactorPrecision,
        ) -> FloatTensor<Self> {
            reference::float_linear::<Self>(input, weight, bias)
        }

        /// `input weight`, as [`float_linear`] without a bias.
        #[fusion(default)]
        fn float_product(
            input: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            _precision: FactorPrecision,
        ) -> FloatTensor<Self> {
            Self::float_matmul(input, weight)
        }

        /// Gradients of input and weight.
        #[fusion(default)]
        fn float_product_backward(
            input: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            grad: FloatTensor<Self>,
            _precision: FactorPrecision,
        ) -> (FloatTensor<Self>, FloatTensor<Self>) {
            reference::product_backward::<Self>(input, weight, grad)
        }

        /// `input table^T`. See [`lm_head`].
        #[fusion(default)]
        fn float_product_transposed(input: FloatTensor<Self>, table: FloatTensor<Self>, _precision: FactorPrecision) -> FloatTensor<Self> {
            reference::product_transposed::<Self>(input, table)
        }

        /// Gradients of input and table.
        #[fusion(default)]
        fn float_product_transposed_backward(
            input: FloatTensor<Self>,
            table: FloatTensor<Self>,
            grad: FloatTensor<Self>,
            _precision: FactorPrecision,
        ) -> (FloatTensor<Self>, FloatTensor<Self>) {
            reference::product_transposed_backward::<Self>(input, table, grad)
        }

        /// The gradient of a bias `[d_output]`: the sum over the tokens.
        #[fusion(default)]
        fn bias_gradient(grad: FloatTensor<Self>) -> FloatTensor<Self> {
            reference::bias_gradient::<Self>(grad)
        }

        /// Forward pass of [`ternary_linear`].
        #[fusion(default)]
        fn ternary_linear(
            input: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            bias: FloatTensor<Self>,
            _precision: WeightGradientPrecision,
        ) -> TernaryLinearForward<Self> {
            reference::ternary_linear::<Self>(input, weight, bias)
        }

        /// Forward pass of [`latent_linear`], with the backward pass of [`ternary_linear`](Self::ternary_linear).
        #[fusion(default)]
        fn latent_linear(
            input: FloatTensor<Self>,
            latent: FloatTensor<Self>,
            scale: FloatTensor<Self>,
            threshold: FloatTensor<Self>,
            bias: FloatTensor<Self>,
            _precision: WeightGradientPrecision,
        ) -> TernaryLinearForward<Self> {
            reference::latent_linear::<Self>(input, latent, scale, threshold, bias)
        }

        /// Gradients of input, weight and bias.
        #[fusion(default)]
        fn ternary_linear_backward(
            #[extension_type] saved: SavedFactors<Self>,
            grad: FloatTensor<Self>,
            _precision: WeightGradientPrecision,
        ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
            reference::ternary_linear_backward::<Self>(saved, grad)
        }

        /// The gradient of the input only, from [`SavedFactors::weight`], for a frozen layer.
        #[fusion(default)]
        fn ternary_linear_input_backward(
            weight: FloatTensor<Self>,
            grad: FloatTensor<Self>,
        ) -> FloatTensor<Self> {
            Self::float_matmul(grad, Self::float_transpose(weight))
        }
    }
}
