//! The optimizer steps in float ops: the default bodies, and the oracle of faster ones.

use super::{AdamWStep, MuonStep};
use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{Scalar, Shape};

/// Coefficients of the quintic `a x + b x^3 + c x^5` that each Newton-Schulz step applies to the singular values.
pub(super) const NEWTON_SCHULZ: [f32; 3] = [3.4445, -4.7750, 2.0315];
pub(super) const NEWTON_SCHULZ_STEPS: usize = 5;

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
    let wide = |x| if rows > cols { B::float_transpose(x) } else { x };
    let norm = B::float_sqrt(B::float_sum(B::float_mul(x.clone(), x.clone())));
    let norm = B::float_reshape(B::float_clamp_min(norm, 1e-7.into()), Shape::new([1, 1]));
    let mut x = wide(B::float_div(x, norm));
    for _ in 0..NEWTON_SCHULZ_STEPS {
        let gram = B::float_matmul(x.clone(), B::float_transpose(x.clone()));
        let square = B::float_matmul(gram.clone(), gram.clone());
        let both = B::float_add(B::float_mul_scalar(gram, b), B::float_mul_scalar(square, c));
        let more = B::float_matmul(both, x.clone());
        x = B::float_add(B::float_mul_scalar(x, a), more);
    }
    wide(x)
}

pub(super) fn square_sum<B: Backend>(input: FloatTensor<B>) -> FloatTensor<B> {
    // Summed by rows first, which rounds less.
    let last = input.shape().num_dims() - 1;
    let rows = B::float_sum_dim(B::float_mul(input.clone(), input), last);
    B::float_reshape(B::float_sum(rows), Shape::new([1]))
}
