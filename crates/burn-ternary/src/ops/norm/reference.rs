//! The norms in float ops: the default bodies, and the oracle of faster ones.

use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::Shape;

/// A parameter `[d]` as a row.
fn row<B: Backend>(parameter: FloatTensor<B>) -> FloatTensor<B> {
    let d = parameter.shape()[0];
    B::float_reshape(parameter, Shape::new([1, d]))
}

fn centered<B: Backend>(input: FloatTensor<B>) -> FloatTensor<B> {
    B::float_sub(input.clone(), B::float_mean_dim(input, 1))
}

fn root_mean_square<B: Backend>(input: FloatTensor<B>, epsilon: f32) -> FloatTensor<B> {
    let mean = B::float_mean_dim(B::float_mul(input.clone(), input), 1);
    B::float_sqrt(B::float_add_scalar(mean, epsilon.into()))
}

pub(super) fn layer_norm<B: Backend>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    bias: FloatTensor<B>,
    epsilon: f32,
) -> FloatTensor<B> {
    B::float_add(rms_norm::<B>(centered::<B>(input), weight, epsilon), row::<B>(bias))
}

pub(super) fn rms_norm<B: Backend>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    epsilon: f32,
) -> FloatTensor<B> {
    let root = root_mean_square::<B>(input.clone(), epsilon);
    B::float_mul(B::float_div(input, root), row::<B>(weight))
}

pub(super) fn layer_norm_backward<B: Backend>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
    epsilon: f32,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let d = weight.shape();
    let dbias = B::float_reshape(B::float_sum_dim(grad.clone(), 0), d);
    let (dx, dweight) = rms_norm_backward::<B>(centered::<B>(input), weight, grad, epsilon);
    (centered::<B>(dx), dweight, dbias)
}

pub(super) fn rms_norm_backward<B: Backend>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
    epsilon: f32,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let root = root_mean_square::<B>(input.clone(), epsilon);
    let normal = B::float_div(input, root.clone());
    let dweight = B::float_sum_dim(B::float_mul(grad.clone(), normal.clone()), 0);
    let inner = B::float_mul(grad, row::<B>(weight.clone()));
    let along = B::float_mean_dim(B::float_mul(inner.clone(), normal.clone()), 1);
    let dx = B::float_div(B::float_sub(inner, B::float_mul(normal, along)), root);
    (dx, B::float_reshape(dweight, weight.shape()))
}
