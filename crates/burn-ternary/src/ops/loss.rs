//! Log-likelihoods, of which cross entropy is made.

use super::{TernaryBackend, node};
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::{
    Autodiff, Backend, Dispatch, TensorMetadata,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{IndexingUpdateOp, Int, Slice, Tensor};

/// For each row of logits: `log Z` with `Z = sum exp(logits)`, the target's logit, and whether the target is the first of
/// the largest logits (1 or 0, without a gradient).
///
/// # Shapes
/// logits `[rows, vocab]`, targets `[rows, 1]`, to `[rows, 3]`
pub fn log_likelihood(logits: Tensor<2>, targets: Tensor<2, Int>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::log_likelihood(logits.into_dispatch(), targets.into_dispatch()))
}

/// `log sum exp(logits)` of each row.
pub(super) fn log_partition<B: Backend>(logits: FloatTensor<B>) -> FloatTensor<B> {
    let max = B::float_max_dim(logits.clone(), 1);
    let powers = B::float_exp(B::float_sub(logits, max.clone()));
    B::float_add(B::float_log(B::float_sum_dim(powers, 1)), max)
}

pub(super) fn forward<B: Backend>(logits: FloatTensor<B>, targets: IntTensor<B>) -> FloatTensor<B> {
    let largest = B::float_argmax(logits.clone(), 1, targets.dtype().into());
    let distance = B::int_abs(B::int_sub(largest, targets.clone()));
    let distance = B::int_into_float(distance, logits.dtype().into());
    let hit = B::float_add_scalar(B::float_neg(B::float_clamp_max(distance, 1f32.into())), 1f32.into());
    let logit = B::float_gather(1, logits.clone(), targets);
    B::float_cat(vec![log_partition::<B>(logits), logit, hit], 1)
}

pub(super) fn backward<B: Backend>(
    logits: FloatTensor<B>,
    targets: IntTensor<B>,
    output: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> FloatTensor<B> {
    let column = |tensor: &FloatTensor<B>, i: usize| {
        let rows = tensor.shape()[0];
        B::float_slice(tensor.clone(), &[Slice::from(0..rows), Slice::from(i..i + 1)])
    };
    let softmax = B::float_exp(B::float_sub(logits, column(&output, 0)));
    let spread = B::float_mul(softmax, column(&grad, 0));
    B::float_scatter(1, spread, targets, column(&grad, 1), IndexingUpdateOp::Add)
}

pub(super) fn track<B: TernaryBackend, C: CheckpointStrategy>(
    logits: FloatTensor<Autodiff<B, C>>,
    targets: IntTensor<B>,
) -> FloatTensor<Autodiff<B, C>> {
    node::track::<B, C, 1>([logits], |[logits]| {
        let output = B::log_likelihood(logits.clone(), targets.clone());
        let result = output.clone();
        let gradient = node::Gradient::new(move |grad| {
            [B::log_likelihood_backward(logits.clone(), targets.clone(), output.clone(), grad)]
        });
        (result, gradient)
    })
}
