//! The losses in float ops: the default bodies, and the oracle of faster ones.

use burn::backend::{
    Backend, TensorMetadata,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{IndexingUpdateOp, Slice};

/// `log sum exp(logits)` of each row.
fn log_partition<B: Backend>(logits: FloatTensor<B>) -> FloatTensor<B> {
    let max = B::float_max_dim(logits.clone(), 1);
    let powers = B::float_exp(B::float_sub(logits, max.clone()));
    B::float_add(B::float_log(B::float_sum_dim(powers, 1)), max)
}

/// Column `i` of a matrix, as `[rows, 1]`.
fn column<B: Backend>(tensor: &FloatTensor<B>, i: usize) -> FloatTensor<B> {
    let rows = tensor.shape()[0];
    B::float_slice(tensor.clone(), &[Slice::from(0..rows), Slice::from(i..i + 1)])
}

pub(super) fn log_likelihood<B: Backend>(logits: FloatTensor<B>, targets: IntTensor<B>) -> FloatTensor<B> {
    let largest = B::float_argmax(logits.clone(), 1, targets.dtype().into());
    let distance = B::int_abs(B::int_sub(largest, targets.clone()));
    let distance = B::int_into_float(distance, logits.dtype().into());
    let hit = B::float_add_scalar(B::float_neg(B::float_clamp_max(distance, 1f32.into())), 1f32.into());
    let logit = B::float_gather(1, logits.clone(), targets);
    B::float_cat(vec![log_partition::<B>(logits), logit, hit], 1)
}

pub(super) fn log_likelihood_backward<B: Backend>(
    logits: FloatTensor<B>,
    targets: IntTensor<B>,
    output: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> FloatTensor<B> {
    let softmax = B::float_exp(B::float_sub(logits, column::<B>(&output, 0)));
    let spread = B::float_mul(softmax, column::<B>(&grad, 0));
    B::float_scatter(1, spread, targets, column::<B>(&grad, 1), IndexingUpdateOp::Add)
}

/// Log-softmax of `logits / temperature`, whose log-sum-exp is given.
fn log_softmax<B: Backend>(
    logits: FloatTensor<B>,
    temperature: f32,
    log_partition: FloatTensor<B>,
) -> FloatTensor<B> {
    B::float_sub(B::float_div_scalar(logits, temperature.into()), log_partition)
}

/// `sum exp(log_a) (log_a - log_b)` of each row.
fn relative_entropy<B: Backend>(log_a: FloatTensor<B>, log_b: FloatTensor<B>) -> FloatTensor<B> {
    let gap = B::float_sub(log_a.clone(), log_b);
    B::float_sum_dim(B::float_mul(B::float_exp(log_a), gap), 1)
}

/// The two divergences, and the two log-sum-exps.
pub(super) fn divergences<B: Backend>(
    teacher: FloatTensor<B>,
    student: FloatTensor<B>,
    temperature: f32,
) -> FloatTensor<B> {
    let [(log_p, p_partition), (log_q, q_partition)] = [teacher, student].map(|logits| {
        let partition = log_partition::<B>(B::float_div_scalar(logits.clone(), temperature.into()));
        (log_softmax::<B>(logits, temperature, partition.clone()), partition)
    });
    let forward = relative_entropy::<B>(log_p.clone(), log_q.clone());
    B::float_cat(vec![forward, relative_entropy::<B>(log_q, log_p), p_partition, q_partition], 1)
}

pub(super) fn divergences_backward<B: Backend>(
    teacher: FloatTensor<B>,
    student: FloatTensor<B>,
    output: FloatTensor<B>,
    grad: FloatTensor<B>,
    temperature: f32,
) -> FloatTensor<B> {
    let log_p = log_softmax::<B>(teacher, temperature, column::<B>(&output, 2));
    let log_q = log_softmax::<B>(student, temperature, column::<B>(&output, 3));
    let (p, q) = (B::float_exp(log_p.clone()), B::float_exp(log_q.clone()));
    let excess = B::float_sub(B::float_sub(log_q, log_p), column::<B>(&output, 1));
    let forward = B::float_mul(B::float_sub(q.clone(), p), column::<B>(&grad, 0));
    let reverse = B::float_mul(B::float_mul(q, excess), column::<B>(&grad, 1));
    B::float_div_scalar(B::float_add(forward, reverse), temperature.into())
}
