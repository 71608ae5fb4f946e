//! KL divergences between the distributions of a student and its teacher.

use super::{TernaryBackend, loss::log_partition, node};
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{Slice, Tensor};

/// For each row of logits: `KL(p || q)` and `KL(q || p)` in nats, with `p = softmax(teacher / temperature)` and
/// `q = softmax(student / temperature)`. The teacher gets no gradient.
///
/// # Shapes
/// teacher, student `[rows, vocab]`, to `[rows, 2]`
pub fn divergences(teacher: Tensor<2>, student: Tensor<2>, temperature: f32) -> Tensor<2> {
    let [teacher, student] = [teacher.into_dispatch(), student.into_dispatch()];
    Tensor::from_dispatch(Dispatch::divergences(teacher, student, temperature)).narrow(1, 0, 2)
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
pub(super) fn forward<B: Backend>(
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

pub(super) fn backward<B: Backend>(
    teacher: FloatTensor<B>,
    student: FloatTensor<B>,
    output: FloatTensor<B>,
    grad: FloatTensor<B>,
    temperature: f32,
) -> FloatTensor<B> {
    let column = |tensor: &FloatTensor<B>, i: usize| {
        let rows = tensor.shape()[0];
        B::float_slice(tensor.clone(), &[Slice::from(0..rows), Slice::from(i..i + 1)])
    };
    let log_p = log_softmax::<B>(teacher, temperature, column(&output, 2));
    let log_q = log_softmax::<B>(student, temperature, column(&output, 3));
    let (p, q) = (B::float_exp(log_p.clone()), B::float_exp(log_q.clone()));
    let excess = B::float_sub(B::float_sub(log_q, log_p), column(&output, 1));
    let forward = B::float_mul(B::float_sub(q.clone(), p), column(&grad, 0));
    let reverse = B::float_mul(B::float_mul(q, excess), column(&grad, 1));
    B::float_div_scalar(B::float_add(forward, reverse), temperature.into())
}

pub(super) fn track<B: TernaryBackend, C: CheckpointStrategy>(
    teacher: FloatTensor<B>,
    student: FloatTensor<Autodiff<B, C>>,
    temperature: f32,
) -> FloatTensor<Autodiff<B, C>> {
    node::track::<B, C, 1>([student], |[student]| {
        let output = B::divergences(teacher.clone(), student.clone(), temperature);
        let result = output.clone();
        let gradient = node::Gradient::new(move |grad| {
            [B::divergences_backward(teacher.clone(), student.clone(), output.clone(), grad, temperature)]
        });
        (result, gradient)
    })
}
