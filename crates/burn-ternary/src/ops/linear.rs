//! Matrix products of linear layers: float, and ternary with int8 activations where the backend has integer products.

use super::{RowScale, StraightThrough, TernaryBackend, node};
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{Shape, Tensor};

/// `x~ W~ + b` with int8 activations (those of [`absmax_quantize`](super::absmax_quantize) with 127 levels) and a weight that is
/// already ternary.
///
/// On flex, the forward product and both backward products are integer products of int8 activations, ternary codes and
/// gradients rounded to int8: per token for the gradient of the input, per channel for that of the weight (if `factors`
/// selects it). On other backends they are float products.
///
/// # Shapes
/// - input: `[tokens, d_input]`; its gradient passes the rounding straight through
/// - weight: `[d_input, d_output]`, each channel of `{-scale, 0, scale}`
/// - bias: `[d_output]`
pub fn ternary_linear(
    input: Tensor<2>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    factors: GradientFactors,
) -> Tensor<2> {
    // The extension takes no optional tensors.
    let bias = bias.unwrap_or_else(|| Tensor::zeros([weight.dims()[1]], &weight.device()));
    let [input, weight, bias] = [input.into_dispatch(), weight.into_dispatch(), bias.into_dispatch()];
    Tensor::from_dispatch(Dispatch::ternary_linear(input, weight, bias, factors).0)
}

/// [`ternary_linear`] of [`ternary_quantize`](super::ternary_quantize) of a latent weight, with the identity estimator. On flex the
/// quantized weight is never materialized, only its codes.
///
/// # Shapes
/// As there; scale and threshold, without gradients, are both `[1, 1, d_output]` or both `[1, 1, 1]`
pub fn latent_linear(
    input: Tensor<2>,
    latent: Tensor<2>,
    [scale, threshold]: [Tensor<3>; 2],
    bias: Option<Tensor<1>>,
    factors: GradientFactors,
) -> Tensor<2> {
    let bias = bias.unwrap_or_else(|| Tensor::zeros([latent.dims()[1]], &latent.device()));
    let [input, latent, bias] = [input.into_dispatch(), latent.into_dispatch(), bias.into_dispatch()];
    let [scale, threshold] = [scale, threshold].map(Tensor::into_dispatch);
    Tensor::from_dispatch(Dispatch::latent_linear(input, latent, scale, threshold, bias, factors).0)
}

/// `x W + b`.
///
/// # Shapes
/// input `[tokens, d_input]`, weight `[d_input, d_output]`, bias `[d_output]`, to `[tokens, d_output]`
pub fn float_linear(
    input: Tensor<2>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    factors: Factors,
) -> Tensor<2> {
    let [input, weight] = [input.into_dispatch(), weight.into_dispatch()];
    Tensor::from_dispatch(match bias {
        Some(bias) => Dispatch::float_linear(input, weight, bias.into_dispatch(), factors),
        None => Dispatch::float_product(input, weight, factors),
    })
}

/// Precision of the factors of a float product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factors {
    /// f32.
    Whole,
    /// Rounded to bfloat16 on CPUs with AMX, which multiply it faster; f32 elsewhere. Sums are f32.
    Half,
}

/// Precision of the factors of a ternary weight's gradient: those are the gradient of the output and the activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GradientFactors {
    /// int8: gradients are rounded per channel.
    Int8,
    /// As [`Factors::Half`].
    Half,
}

/// The head, `x T^T`: logits from a table with one row per token id.
///
/// # Shapes
/// hidden `[tokens, d]`, table `[vocab, d]`, to `[tokens, vocab]`
pub fn project(hidden: Tensor<2>, table: Tensor<2>, factors: Factors) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::project(hidden.into_dispatch(), table.into_dispatch(), factors))
}

pub(super) fn float_forward<B: Backend>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    bias: FloatTensor<B>,
) -> FloatTensor<B> {
    let d_output = bias.shape()[0];
    B::float_add(B::float_matmul(input, weight), B::float_reshape(bias, Shape::new([1, d_output])))
}

pub(super) fn track_float<B: TernaryBackend, C: CheckpointStrategy>(
    inputs: [FloatTensor<Autodiff<B, C>>; 3],
    factors: Factors,
) -> FloatTensor<Autodiff<B, C>> {
    node::track::<B, C, 3>(inputs, |[input, weight, bias]| {
        let output = B::float_linear(input.clone(), weight.clone(), bias, factors);
        let gradient = node::Gradient::of_wanted(move |grad: FloatTensor<B>, [_, weight_too, bias_too]| {
            let dbias = bias_too.then(|| B::bias_gradient(grad.clone()));
            let (dinput, dweight) = product_gradients::<B>([&input, &weight], grad, weight_too, factors);
            [Some(dinput), dweight, dbias]
        });
        (output, gradient)
    })
}

/// A frozen weight needs one of the two products only.
fn product_gradients<B: TernaryBackend>(
    [input, weight]: [&FloatTensor<B>; 2],
    grad: FloatTensor<B>,
    weight_too: bool,
    factors: Factors,
) -> (FloatTensor<B>, Option<FloatTensor<B>>) {
    if !weight_too {
        return (B::project(grad, weight.clone(), factors), None);
    }
    let (dinput, dweight) = B::float_product_backward(input.clone(), weight.clone(), grad, factors);
    (dinput, Some(dweight))
}

pub(super) fn track_product<B: TernaryBackend, C: CheckpointStrategy>(
    inputs: [FloatTensor<Autodiff<B, C>>; 2],
    factors: Factors,
) -> FloatTensor<Autodiff<B, C>> {
    node::track::<B, C, 2>(inputs, |[input, weight]| {
        let output = B::float_product(input.clone(), weight.clone(), factors);
        let gradient = node::Gradient::of_wanted(move |grad, [_, weight_too]| {
            let (dinput, dweight) = product_gradients::<B>([&input, &weight], grad, weight_too, factors);
            [Some(dinput), dweight]
        });
        (output, gradient)
    })
}

pub(super) fn project_forward<B: Backend>(hidden: FloatTensor<B>, table: FloatTensor<B>) -> FloatTensor<B> {
    B::float_matmul(hidden, B::float_transpose(table))
}

/// Gradients of hidden and table; the latter is computed in the layout of the table.
pub(super) fn project_backward<B: Backend>(
    hidden: FloatTensor<B>,
    table: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    (B::float_matmul(grad.clone(), table), B::float_matmul(B::float_transpose(grad), hidden))
}

pub(super) fn track_project<B: TernaryBackend, C: CheckpointStrategy>(
    inputs: [FloatTensor<Autodiff<B, C>>; 2],
    factors: Factors,
) -> FloatTensor<Autodiff<B, C>> {
    node::track::<B, C, 2>(inputs, |[hidden, table]| {
        let output = B::project(hidden.clone(), table.clone(), factors);
        let gradient = node::Gradient::of_wanted(move |grad, [_, table_too]| {
            if !table_too {
                return [Some(B::float_product(grad, table.clone(), factors)), None];
            }
            let (dhidden, dtable) = B::project_backward(hidden.clone(), table.clone(), grad, factors);
            [Some(dhidden), Some(dtable)]
        });
        (output, gradient)
    })
}

/// The output, and the tensors saved for the backward pass: here, both factors.
pub(super) fn forward<B: TernaryBackend>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    bias: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let input = B::absmax_quantize(input, 127.0, RowScale::F32);
    (float_forward::<B>(input.clone(), weight.clone(), bias), input, weight)
}

pub(super) fn latent_forward<B: TernaryBackend>(
    input: FloatTensor<B>,
    latent: FloatTensor<B>,
    scale: FloatTensor<B>,
    threshold: FloatTensor<B>,
    bias: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let shape = latent.shape();
    let [d_input, d_output] = shape.dims();
    // Weights along dimension 1 share a scale.
    let channels = scale.shape()[2];
    let view = B::float_reshape(latent, Shape::new([1, d_input * d_output / channels, channels]));
    let weight = B::ternary_quantize(view, scale, threshold, StraightThrough::IDENTITY);
    forward::<B>(input, B::float_reshape(weight, shape), bias)
}

pub(super) fn float_backward<B: Backend>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let dinput = B::float_matmul(grad.clone(), B::float_transpose(weight));
    (dinput, B::float_matmul(B::float_transpose(input), grad))
}

pub(super) fn bias_gradient<B: Backend>(grad: FloatTensor<B>) -> FloatTensor<B> {
    let d_output = grad.shape()[1];
    B::float_reshape(B::float_sum_dim(grad, 0), Shape::new([d_output]))
}

pub(super) fn backward<B: Backend>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let dbias = bias_gradient::<B>(grad.clone());
    let (dinput, dweight) = float_backward::<B>(input, weight, grad);
    (dinput, dweight, dbias)
}

pub(super) fn track<B: TernaryBackend, C: CheckpointStrategy>(
    inputs: [FloatTensor<Autodiff<B, C>>; 3],
    factors: GradientFactors,
) -> FloatTensor<Autodiff<B, C>> {
    track_of::<B, C>(inputs, factors, |[input, weight, bias]| B::ternary_linear(input, weight, bias, factors))
}

pub(super) fn track_latent<B: TernaryBackend, C: CheckpointStrategy>(
    inputs: [FloatTensor<Autodiff<B, C>>; 3],
    [scale, threshold]: [FloatTensor<B>; 2],
    factors: GradientFactors,
) -> FloatTensor<Autodiff<B, C>> {
    track_of::<B, C>(inputs, factors, |[input, latent, bias]| {
        B::latent_linear(input, latent, scale, threshold, bias, factors)
    })
}

/// Straight-through: the gradient of the latent weight is that of the ternary one.
fn track_of<B: TernaryBackend, C: CheckpointStrategy>(
    inputs: [FloatTensor<Autodiff<B, C>>; 3],
    factors: GradientFactors,
    forward: impl FnOnce([FloatTensor<B>; 3]) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>),
) -> FloatTensor<Autodiff<B, C>> {
    node::track::<B, C, 3>(inputs, |inputs| {
        let (output, input, weight) = forward(inputs);
        let gradient = node::Gradient::of_wanted(move |grad, [_, weight_too, bias_too]| {
            if !(weight_too || bias_too) {
                return [Some(B::ternary_linear_input_backward(weight.clone(), grad)), None, None];
            }
            let (dinput, dweight, dbias) =
                B::ternary_linear_backward(input.clone(), weight.clone(), grad, factors);
            [Some(dinput), Some(dweight), Some(dbias)]
        });
        (output, gradient)
    })
}
