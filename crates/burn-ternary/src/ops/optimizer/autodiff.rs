//! The optimizer steps under autodiff: without a gradient.

use super::{AdamWStep, MuonStep, OptimizerOps};
use burn::backend::{
    Autodiff, AutodiffBackend, autodiff::checkpoint::strategy::CheckpointStrategy, tensor::FloatTensor,
};

impl<B: OptimizerOps, C: CheckpointStrategy> OptimizerOps for Autodiff<B, C> {
    fn adamw_step(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let [weight, grad, m, v] = [weight, grad, m, v].map(Self::inner);
        let (weight, m, v) = B::adamw_step(weight, grad, m, v, step);
        (Self::from_inner(weight), Self::from_inner(m), Self::from_inner(v))
    }

    fn adamw_int8_step(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        moments: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [weight, grad, moments] = [weight, grad, moments].map(Self::inner);
        let (weight, moments) = B::adamw_int8_step(weight, grad, moments, step);
        (Self::from_inner(weight), Self::from_inner(moments))
    }

    fn muon_step(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        velocity: FloatTensor<Self>,
        step: MuonStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [weight, grad, velocity] = [weight, grad, velocity].map(Self::inner);
        let (weight, velocity) = B::muon_step(weight, grad, velocity, step);
        (Self::from_inner(weight), Self::from_inner(velocity))
    }

    fn square_sum(input: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::from_inner(B::square_sum(Self::inner(input)))
    }
}
