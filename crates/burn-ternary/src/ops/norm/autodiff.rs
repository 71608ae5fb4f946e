//! Gradients of the norms.

use super::NormOps;
use crate::ops::autodiff::{Gradient, track};
use burn::backend::{Autodiff, autodiff::checkpoint::strategy::CheckpointStrategy, tensor::FloatTensor};

impl<B: NormOps, C: CheckpointStrategy> NormOps for Autodiff<B, C> {
    fn layer_norm_rows(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        epsilon: f32,
    ) -> FloatTensor<Self> {
        track::<B, C, 3>([input, weight, bias], |[input, weight, bias]| {
            let output = B::layer_norm_rows(input.clone(), weight.clone(), bias, epsilon);
            let gradient = Gradient::new(move |grad| {
                B::layer_norm_rows_backward(input.clone(), weight.clone(), grad, epsilon).into()
            });
            (output, gradient)
        })
    }

    fn rms_norm_rows(input: FloatTensor<Self>, weight: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self> {
        track::<B, C, 2>([input, weight], |[input, weight]| {
            let output = B::rms_norm_rows(input.clone(), weight.clone(), epsilon);
            let gradient = Gradient::new(move |grad| {
                B::rms_norm_rows_backward(input.clone(), weight.clone(), grad, epsilon).into()
            });
            (output, gradient)
        })
    }
}
