//! Optimizer steps, and the squared norm of gradients.
//!
//! # Overriding
//! Every method must agree with its default body within f32 rounding. `adamw_int8_step` has none: only flex has it.

mod autodiff;
#[cfg(feature = "flex")]
mod flex;
mod reference;

use super::backend::backend_ops;
use burn::backend::{Backend, Dispatch, tensor::FloatTensor};
use burn::tensor::Tensor;

/// Elements of a block of 8-bit moments, and its length in 32-bit words: two scales, and two bytes per element.
const MOMENT_BLOCK: [usize; 2] = [256, 2 + 2 * 256 / 4];

/// Parameters of an AdamW step.
///
/// # Source
/// Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
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
/// # Shapes
/// weight and gradient of one shape, moments as of [`int8_moments`], to weight and moments of the same
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
///
/// # Shapes
/// any to `[words]`, about two bytes per element
pub fn int8_moments<const D: usize>(of: &Tensor<D>) -> Tensor<1> {
    let [numbers, words] = MOMENT_BLOCK;
    Tensor::zeros([of.shape().num_elements().div_ceil(numbers) * words], &of.device())
}

/// Parameters of a Muon step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MuonStep {
    /// The learning rate, times the factor for the shape of the matrix.
    pub rate: f32,
    /// Factor of weight decay, `1 - lr * weight_decay`.
    pub keep: f32,
    /// Momentum of the velocity.
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

/// `sum x^2`, with the same bits for any number of threads. No gradient.
///
/// # Shapes
/// any to `[1]`
pub fn square_sum<const D: usize>(input: Tensor<D>) -> Tensor<1> {
    Tensor::from_dispatch(Dispatch::square_sum(input.into_dispatch()))
}

backend_ops! {
    /// Optimizer steps. They have no gradient.
    pub trait OptimizerOps: Backend {
        /// See [`adamw`].
        #[fusion(default)]
        fn adamw_step(
            weight: FloatTensor<Self>,
            grad: FloatTensor<Self>,
            m: FloatTensor<Self>,
            v: FloatTensor<Self>,
            step: AdamWStep,
        ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
            reference::adamw_step::<Self>(weight, grad, m, v, step)
        }

        /// See [`adamw_int8`].
        #[fusion(default)]
        fn adamw_int8_step(
            _weight: FloatTensor<Self>,
            _grad: FloatTensor<Self>,
            _moments: FloatTensor<Self>,
            _step: AdamWStep,
        ) -> (FloatTensor<Self>, FloatTensor<Self>) {
            panic!("8-bit moments need the device flex")
        }

        /// See [`muon`].
        #[fusion(default)]
        fn muon_step(
            weight: FloatTensor<Self>,
            grad: FloatTensor<Self>,
            velocity: FloatTensor<Self>,
            step: MuonStep,
        ) -> (FloatTensor<Self>, FloatTensor<Self>) {
            reference::muon_step::<Self>(weight, grad, velocity, step)
        }

        /// See [`square_sum`].
        #[fusion(default)]
        fn square_sum(input: FloatTensor<Self>) -> FloatTensor<Self> {
            reference::square_sum::<Self>(input)
        }
    }
}
