//! Gradients of the quantizers: straight-through, and for a learned scale that of learned step size quantization.

use super::{OutsideGradient, QuantizeOps, RowScale, StraightThrough, pruned, reference::beyond};
use crate::ops::autodiff::straight_through;
use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, AutodiffBackend, TensorMetadata, tensor::FloatTensor};

impl<B: QuantizeOps, C: CheckpointStrategy> QuantizeOps for Autodiff<B, C> {
    fn ternary_codes(weight: FloatTensor<Self>, threshold: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::from_inner(B::ternary_codes(Self::inner(weight), Self::inner(threshold)))
    }

    fn ternary_quantize(
        weight: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        threshold: FloatTensor<Self>,
        estimator: StraightThrough,
    ) -> FloatTensor<Self> {
        let reads_inputs = scale.is_tracked() || estimator.outside == OutsideGradient::Zero;
        let (weight, weight_node) = weight.into_parts();
        let (scale, scale_node) = scale.into_parts();
        let (threshold, _) = threshold.into_parts();
        match TernaryQuantize.prepare::<C>([weight_node, scale_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let saved = reads_inputs.then(|| (weight.clone(), scale.clone(), threshold.clone()));
                let output = B::ternary_quantize(weight, scale, threshold, estimator);
                prep.finish((saved, estimator), output)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::ternary_quantize(weight, scale, threshold, estimator)),
        }
    }

    fn mean_abs(weight: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::from_inner(B::mean_abs(Self::inner(weight)))
    }

    fn kth_magnitude(weight: FloatTensor<Self>, k: usize) -> FloatTensor<Self> {
        Self::from_inner(B::kth_magnitude(Self::inner(weight), k))
    }

    fn round_scale(scale: FloatTensor<Self>) -> FloatTensor<Self> {
        straight_through::<B, C>(scale, B::round_scale)
    }

    fn absmax_quantize(input: FloatTensor<Self>, levels: f32, scale: RowScale) -> FloatTensor<Self> {
        straight_through::<B, C>(input, |input| B::absmax_quantize(input, levels, scale))
    }
}

/// Inputs of the backward pass; empty if it reads none, so that nothing is kept alive.
type Saved<B> = Option<(FloatTensor<B>, FloatTensor<B>, FloatTensor<B>)>;

#[derive(Debug)]
struct TernaryQuantize;

impl<B: QuantizeOps> Backward<B, 2> for TernaryQuantize {
    type State = (Saved<B>, StraightThrough);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [weight_node, scale_node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let (saved, estimator) = ops.state;
        let Some((weight, scale, threshold)) = saved else {
            if let Some(node) = weight_node {
                grads.register::<B>(node.id, grad);
            }
            return;
        };
        let clip = B::float_mul_scalar(scale.clone(), estimator.clip.into());
        let outside = beyond::<B>(weight.clone(), clip);
        let inside = B::float_add_scalar(B::float_neg(outside.clone()), 1f32.into());
        if let Some(node) = scale_node {
            let n = weight.shape()[1] as f32;
            let ratio = B::float_div(weight.clone(), scale);
            let codes = B::ternary_codes(weight, threshold.clone());
            let saturated = B::float_mul(codes.clone(), outside);
            let slope = B::float_add(B::float_mul(B::float_sub(codes, ratio), inside.clone()), saturated);
            let pruned = pruned(threshold.dtype());
            let kept = B::float_clamp_min(
                B::float_sign(B::float_add_scalar(B::float_neg(threshold), pruned.into())),
                0f32.into(),
            );
            let slope = B::float_mul(slope, kept);
            let sum = B::float_sum_dim(B::float_mul(grad.clone(), slope), 1);
            grads.register::<B>(node.id, B::float_mul_scalar(sum, n.sqrt().recip().into()));
        }
        if let Some(node) = weight_node {
            let grad = match estimator.outside {
                OutsideGradient::Pass => grad,
                OutsideGradient::Zero => B::float_mul(grad, inside),
            };
            grads.register::<B>(node.id, grad);
        }
    }
}
