//! Log-likelihoods, from which the cross entropy is computed, and KL divergences for knowledge distillation.
//!
//! # Overriding
//! Every method must agree with its default body within f32 rounding. `divergences` returns the columns that its backward
//! method reads, so override both or neither.

mod autodiff;
#[cfg(feature = "flex")]
mod flex;
mod reference;

use super::backend::backend_ops;
use burn::backend::{
    Backend, Dispatch,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{Int, Tensor};

/// For each row of logits: `log Z` with `Z = sum exp(logits)`, the target's logit, and whether the target is the first of
/// the largest logits (1 or 0, without a gradient).
///
/// # Shapes
/// logits `[rows, vocab]`, targets `[rows, 1]`, to `[rows, 3]`
pub fn log_likelihood(logits: Tensor<2>, targets: Tensor<2, Int>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::log_likelihood(logits.into_dispatch(), targets.into_dispatch()))
}

/// For each row of logits: `KL(p || q)` and `KL(q || p)` in nats, with `p = softmax(teacher / temperature)` and
/// `q = softmax(student / temperature)`. The teacher gets no gradient.
///
/// # Shapes
/// teacher, student `[rows, vocab]`, to `[rows, 2]`
pub fn divergences(teacher: Tensor<2>, student: Tensor<2>, temperature: f32) -> Tensor<2> {
    let [teacher, student] = [teacher.into_dispatch(), student.into_dispatch()];
    Tensor::from_dispatch(Dispatch::divergences(teacher, student, temperature)).narrow(1, 0, 2)
}

backend_ops! {
    /// Losses per row of logits, with their gradients.
    pub trait LossOps: Backend {
        /// See [`log_likelihood`].
        #[fusion(default)]
        fn log_likelihood(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
            reference::log_likelihood::<Self>(logits, targets)
        }

        /// The gradient of the logits.
        #[fusion(default)]
        fn log_likelihood_backward(
            logits: FloatTensor<Self>,
            targets: IntTensor<Self>,
            output: FloatTensor<Self>,
            grad: FloatTensor<Self>,
        ) -> FloatTensor<Self> {
            reference::log_likelihood_backward::<Self>(logits, targets, output, grad)
        }

        /// See [`divergences`]. Columns 2 and 3 are the log-sum-exps of teacher and student, for the backward pass.
        #[fusion(default)]
        fn divergences(
            teacher: FloatTensor<Self>,
            student: FloatTensor<Self>,
            temperature: f32,
        ) -> FloatTensor<Self> {
            reference::divergences::<Self>(teacher, student, temperature)
        }

        /// The gradient of the student's logits.
        #[fusion(default)]
        fn divergences_backward(
            teacher: FloatTensor<Self>,
            student: FloatTensor<Self>,
            output: FloatTensor<Self>,
            grad: FloatTensor<Self>,
            temperature: f32,
        ) -> FloatTensor<Self> {
            reference::divergences_backward::<Self>(teacher, student, output, grad, temperature)
        }
    }
}
