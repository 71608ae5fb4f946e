//! Optimizer steps, and the squared norm of gradients.

use super::TernaryBackend;
use burn::backend::{Backend, Dispatch, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{Scalar, Shape, Tensor};

/// Elements of a block of 8-bit moments, and its length in 32-bit words: two scales, and two bytes per element.
pub(super) const MOMENTS: [usize; 2] = [256, 2 + 2 * 256 / 4];

/// Coefficients of the quintic `a x + b x^3 + c x^5` that each Newton-Schulz step applies to the singular values.
pub(super) const NEWTON_SCHULZ: [f32; 3] = [3.4445, -4.7750, 2.0315];
pub(super) const NEWTON_SCHULZ_STEPS: usize = 5;

/// Parameters of an AdamW step.
///
/// # Source
/// Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    pub lr: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub epsilon: f32,
    /// Factor of weight decay, `1 - lr * weight_decay`.
    pub keep: f32,
    /// `1 - beta1^t` and `1 - beta2^t` at step t, from 1 on.
    pub corrections: [f32; 2],
    /// Factor of the gradients, for clipping.
    pub grad_factor: f32,
}

/// `m = beta1 m + (1 - beta1) g`, `v = beta2 v + (1 - beta2) g^2`,
/// `w = keep w - lr (m / correction1) / (sqrt(v / correction2) + epsilon)`: weight, m and v after it. No gradient.
///
/// # Shapes
/// four of one shape, to three of it
pub fn adamw<const D: usize>(
    weight: Tensor<D>,
    grad: Tensor<D>,
    moments: [Tensor<D>; 2],
    step: AdamWStep,
) -> (Tensor<D>, [Tensor<D>; 2]) {
    let [m, v] = moments.map(Tensor::into_dispatch);
    let (weight, m, v) = Dispatch::adamw_step(weight.into_dispatch(), grad.into_dispatch(), m, v, step);
    (Tensor::from_dispatch(weight), [m, v].map(Tensor::from_dispatch))
}

/// [`adamw`] with 8-bit moments, initialized by [`int8_moments`]: returns weight and moments. The step uses the moments before
/// they are rounded. No gradient.
///
/// # Panics
/// On any backend except flex.
pub fn adamw_int8<const D: usize>(
    weight: Tensor<D>,
    grad: Tensor<D>,
    moments: Tensor<1>,
    step: AdamWStep,
) -> (Tensor<D>, Tensor<1>) {
    let (weight, grad) = (weight.into_dispatch(), grad.into_dispatch());
    let (weight, moments) = Dispatch::adamw_int8_step(weight, grad, moments.into_dispatch(), step);
    (Tensor::from_dispatch(weight), Tensor::from_dispatch(moments))
}

/// 8-bit moments of zero for a parameter of the shape of `of`: bytes and scales in blocks of 256 elements, stored as the bits of
/// an f32 tensor. The tensor is opaque: only copies and the optimizer op may touch it.
pub fn int8_moments<const D: usize>(of: &Tensor<D>) -> Tensor<1> {
    let [numbers, words] = MOMENTS;
    Tensor::zeros([of.shape().num_elements().div_ceil(numbers) * words], &of.device())
}

/// Parameters of a Muon step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MuonStep {
    /// The learning rate, times the factor for the shape of the matrix.
    pub rate: f32,
    /// Factor of weight decay, `1 - lr * weight_decay`.
    pub keep: f32,
    pub momentum: f32,
    /// Factor of the gradients, for clipping.
    pub grad_factor: f32,
}

/// `v = momentum v + g`, `w = keep w - rate orthogonal(g + momentum v)`: returns weight and v, where `orthogonal` is five
/// Newton-Schulz steps. No gradient.
///
/// # Shapes
/// three `[rows, cols]` to two of the same
///
/// # Source
/// Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
pub fn muon<const D: usize>(
    weight: Tensor<D>,
    grad: Tensor<D>,
    velocity: Tensor<D>,
    step: MuonStep,
) -> (Tensor<D>, Tensor<D>) {
    let [weight, grad, velocity] = [weight, grad, velocity].map(Tensor::into_dispatch);
    let (weight, velocity) = Dispatch::muon_step(weight, grad, velocity, step);
    (Tensor::from_dispatch(weight), Tensor::from_dispatch(velocity))
}

/// `sum x^2`, `[1]`, with the same bits for any number of threads. No gradient.
pub fn square_sum<const D: usize>(input: Tensor<D>) -> Tensor<1> {
    Tensor::from_dispatch(Dispatch::square_sum(input.into_dispatch()))
}

pub(super) fn adamw_step<B: Backend>(
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
    m: FloatTensor<B>,
    v: FloatTensor<B>,
    step: AdamWStep,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let AdamWStep { lr, beta1, beta2, epsilon, keep, corrections: [first, second], grad_factor } = step;
    let grad = scaled::<B>(grad, grad_factor);
    let mix = |old, new, beta: f32| {
        let new = B::float_mul_scalar(new, (1.0 - beta).into());
        B::float_add(B::float_mul_scalar(old, beta.into()), new)
    };
    let m = mix(m, grad.clone(), beta1);
    let v = mix(v, B::float_mul(grad.clone(), grad), beta2);
    let root = B::float_sqrt(B::float_div_scalar(v.clone(), second.into()));
    let direction = B::float_div(m.clone(), B::float_add_scalar(root, epsilon.into()));
    let update = B::float_mul_scalar(direction, (lr / first).into());
    (B::float_sub(scaled::<B>(weight, keep), update), m, v)
}

pub(super) fn muon_step<B: Backend>(
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
    velocity: FloatTensor<B>,
    step: MuonStep,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let MuonStep { rate, keep, momentum, grad_factor } = step;
    let grad = scaled::<B>(grad, grad_factor);
    let push = |velocity, grad| B::float_add(B::float_mul_scalar(velocity, momentum.into()), grad);
    let velocity = push(velocity, grad.clone());
    let update = orthogonal::<B>(push(velocity.clone(), grad));
    let update = B::float_mul_scalar(update, rate.into());
    (B::float_sub(scaled::<B>(weight, keep), update), velocity)
}

fn scaled<B: Backend>(x: FloatTensor<B>, factor: f32) -> FloatTensor<B> {
    if factor == 1.0 { x } else { B::float_mul_scalar(x, factor.into()) }
}

fn orthogonal<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let [a, b, c] = NEWTON_SCHULZ.map(Scalar::from);
    let [rows, cols] = x.shape().dims();
    let turn = |x| if rows > cols { B::float_transpose(x) } else { x };
    let norm = B::float_sqrt(B::float_sum(B::float_mul(x.clone(), x.clone())));
    let norm = B::float_reshape(B::float_clamp_min(norm, 1e-7.into()), Shape::new([1, 1]));
    let mut x = turn(B::float_div(x, norm));
    for _ in 0..NEWTON_SCHULZ_STEPS {
        let gram = B::float_matmul(x.clone(), B::float_transpose(x.clone()));
        let square = B::float_matmul(gram.clone(), gram.clone());
        let both = B::float_add(B::float_mul_scalar(gram, b), B::float_mul_scalar(square, c));
        let more = B::float_matmul(both, x.clone());
        x = B::float_add(B::float_mul_scalar(x, a), more);
    }
    turn(x)
}

pub(super) fn square_sum_default<B: Backend>(input: FloatTensor<B>) -> FloatTensor<B> {
    // Summed by rows first, which rounds less.
    let last = input.shape().num_dims() - 1;
    let rows = B::float_sum_dim(B::float_mul(input.clone(), input), last);
    B::float_reshape(B::float_sum(rows), Shape::new([1]))
}
