//! Layer norm and RMS norm over rows.

use super::{TernaryBackend, node};
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{Shape, Tensor};

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

/// A parameter `[d]` as a row.
fn row<B: Backend>(parameter: FloatTensor<B>) -> FloatTensor<B> {
    let d = parameter.shape()[0];
    B::float_reshape(parameter, Shape::new([1, d]))
}

fn centred<B: Backend>(input: FloatTensor<B>) -> FloatTensor<B> {
    B::float_sub(input.clone(), B::float_mean_dim(input, 1))
}

fn square_root_of_mean<B: Backend>(input: FloatTensor<B>, epsilon: f32) -> FloatTensor<B> {
    let mean = B::float_mean_dim(B::float_mul(input.clone(), input), 1);
    B::float_sqrt(B::float_add_scalar(mean, epsilon.into()))
}

pub(super) fn layer<B: Backend>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    bias: FloatTensor<B>,
    epsilon: f32,
) -> FloatTensor<B> {
    B::float_add(rms::<B>(centred::<B>(input), weight, epsilon), row::<B>(bias))
}

pub(super) fn rms<B: Backend>(input: FloatTensor<B>, weight: FloatTensor<B>, epsilon: f32) -> FloatTensor<B> {
    let root = square_root_of_mean::<B>(input.clone(), epsilon);
    B::float_mul(B::float_div(input, root), row::<B>(weight))
}

pub(super) fn layer_backward<B: Backend>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
    epsilon: f32,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let d = weight.shape();
    let dbias = B::float_reshape(B::float_sum_dim(grad.clone(), 0), d);
    let (dx, dweight) = rms_backward::<B>(centred::<B>(input), weight, grad, epsilon);
    (centred::<B>(dx), dweight, dbias)
}

pub(super) fn rms_backward<B: Backend>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
    epsilon: f32,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let root = square_root_of_mean::<B>(input.clone(), epsilon);
    let normal = B::float_div(input, root.clone());
    let dweight = B::float_sum_dim(B::float_mul(grad.clone(), normal.clone()), 0);
    let inner = B::float_mul(grad, row::<B>(weight.clone()));
    let along = B::float_mean_dim(B::float_mul(inner.clone(), normal.clone()), 1);
    let dx = B::float_div(B::float_sub(inner, B::float_mul(normal, along)), root);
    (dx, B::float_reshape(dweight, weight.shape()))
}

pub(super) fn track_layer<B: TernaryBackend, C: CheckpointStrategy>(
    inputs: [FloatTensor<Autodiff<B, C>>; 3],
    epsilon: f32,
) -> FloatTensor<Autodiff<B, C>> {
    node::track::<B, C, 3>(inputs, |[input, weight, bias]| {
        let output = B::layer_norm_rows(input.clone(), weight.clone(), bias, epsilon);
        let gradient = node::Gradient::new(move |grad| {
            B::layer_norm_rows_backward(input.clone(), weight.clone(), grad, epsilon).into()
        });
        (output, gradient)
    })
}

pub(super) fn track_rms<B: TernaryBackend, C: CheckpointStrategy>(
    inputs: [FloatTensor<Autodiff<B, C>>; 2],
    epsilon: f32,
) -> FloatTensor<Autodiff<B, C>> {
    node::track::<B, C, 2>(inputs, |[input, weight]| {
        let output = B::rms_norm_rows(input.clone(), weight.clone(), epsilon);
        let gradient = node::Gradient::new(move |grad| {
            B::rms_norm_rows_backward(input.clone(), weight.clone(), grad, epsilon).into()
        });
        (output, gradient)
    })
}
