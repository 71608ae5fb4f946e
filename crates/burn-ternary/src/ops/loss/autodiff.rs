//! Gradients of the losses.

use super::LossOps;
use crate::ops::autodiff::{Gradient, track};
use burn::backend::{
    Autodiff, AutodiffBackend,
    autodiff::checkpoint::strategy::CheckpointStrategy,
    tensor::{FloatTensor, IntTensor},
};

impl<B: LossOps, C: CheckpointStrategy> LossOps for Autodiff<B, C> {
    fn log_likelihood(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        track::<B, C, 1>([logits], |[logits]| {
            let output = B::log_likelihood(logits.clone(), targets.clone());
            let result = output.clone();
            let gradient = Gradient::new(move |grad| {
                [B::log_likelihood_backward(logits.clone(), targets.clone(), output.clone(), grad)]
            });
            (result, gradient)
        })
    }

    fn divergences(
        teacher: FloatTensor<Self>,
        student: FloatTensor<Self>,
        temperature: f32,
    ) -> FloatTensor<Self> {
        let teacher = Self::inner(teacher);
        track::<B, C, 1>([student], |[student]| {
            let output = B::divergences(teacher.clone(), student.clone(), temperature);
            let result = output.clone();
            let gradient = Gradient::new(move |grad| {
                let (teacher, student) = (teacher.clone(), student.clone());
                [B::divergences_backward(teacher, student, output.clone(), grad, temperature)]
            });
            (result, gradient)
        })
    }
}
