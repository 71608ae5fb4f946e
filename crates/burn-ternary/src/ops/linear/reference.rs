//! The products of linear layers in float ops: the default bodies, and the oracle of faster ones.

use super::{SavedFactors, TernaryLinearForward};
use crate::ops::{QuantizeOps, RowScale, StraightThrough};
use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::Shape;

pub(super) fn float_linear<B: Backend>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    bias: FloatTensor<B>,
) -> FloatTensor<B> {
    let d_output = bias.shape()[0];
    B::float_add(B::float_matmul(input, weight), B::float_reshape(bias, Shape::new([1, d_output])))
}

/// Gradients of input and weight.
pub(super) fn product_backward<B: Backend>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let dinput = B::float_matmul(grad.clone(), B::float_transpose(weight));
    (dinput, B::float_matmul(B::float_transpose(input), grad))
}

pub(super) fn product_transposed<B: Backend>(input: FloatTensor<B>, table: FloatTensor<B>) -> FloatTensor<B> {
    B::float_matmul(input, B::float_transpose(table))
}

/// Gradients of input and table; the latter is computed in the layout of the table.
pub(super) fn product_transposed_backward<B: Backend>(
    input: FloatTensor<B>,
    table: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    (B::float_matmul(grad.clone(), table), B::float_matmul(B::float_transpose(grad), input))
}

pub(super) fn bias_gradient<B: Backend>(grad: FloatTensor<B>) -> FloatTensor<B> {
    let d_output = grad.shape()[1];
    B::float_reshape(B::float_sum_dim(grad, 0), Shape::new([d_output]))
}

/// Saves both factors as they are.
pub(super) fn ternary_linear<B: QuantizeOps>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    bias: FloatTensor<B>,
) -> TernaryLinearForward<B> {
    let input = B::absmax_quantize(input, 127.0, RowScale::F32);
    let output = float_linear::<B>(input.clone(), weight.clone(), bias);
    TernaryLinearForward { output, saved: SavedFactors { input, weight } }
}

pub(super) fn latent_linear<B: QuantizeOps>(
    input: FloatTensor<B>,
    latent: FloatTensor<B>,
    scale: FloatTensor<B>,
    threshold: FloatTensor<B>,
    bias: FloatTensor<B>,
) -> TernaryLinearForward<B> {
    let shape = latent.shape();
    let [d_input, d_output] = shape.dims();
    // Weights along dimension 1 share a scale.
    let channels = scale.shape()[2];
    let view = B::float_reshape(latent, Shape::new([1, d_input * d_output / channels, channels]));
    let weight = B::ternary_quantize(view, scale, threshold, StraightThrough::IDENTITY);
    ternary_linear::<B>(input, B::float_reshape(weight, shape), bias)
}

pub(super) fn ternary_linear_backward<B: Backend>(
    saved: SavedFactors<B>,
    grad: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let dbias = bias_gradient::<B>(grad.clone());
    let (dinput, dweight) = product_backward::<B>(saved.input, saved.weight, grad);
    (dinput, dweight, dbias)
}
