//! The ternary quantizer: one comparison, one multiplication, and a straight-through estimator.

use super::TernaryBackend;
use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{DType, Tensor};
use half::{bf16, f16};

/// The estimate of `d ternary_quantize / d weight` in the backward pass.
///
/// `v = weight / scale` is inside when `|v| <= clip`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StraightThrough {
    /// Where the quantizer saturates: 1 for LSQ-style scales, 1.485 for SEQ (`0.99 a` with `scale = 2a / 3`), 0 for codes
    /// that do not depend on the scale.
    pub clip: f32,
    /// `true`: `dw = G` inside and 0 outside. `false`: `dw = G` everywhere.
    pub masked: bool,
}

impl StraightThrough {
    /// `dw = G` everywhere: BitNet's estimator.
    pub const IDENTITY: Self = Self { clip: 1.0, masked: false };
}

/// The codes -1, 0, +1 of a weight: `sign(w)` where `|w| > threshold`, else 0; times the mask.
///
/// The one rounding rule of the crate. With `threshold = scale / 2` it is
/// `round_ties_even(clamp(w / scale, -1, 1))`, written without the division, so that every backend agrees to the bit.
/// No gradient.
///
/// # Shapes
/// - weight and mask (0 or 1): `[groups, n, channels]`
/// - threshold: `[groups, 1, channels]`
/// - output: as weight
pub fn ternary_codes(weight: Tensor<3>, threshold: Tensor<3>, mask: Option<Tensor<3>>) -> Tensor<3> {
    let threshold = prune(&weight, threshold, mask);
    Tensor::from_dispatch(Dispatch::ternary_codes(weight.into_dispatch(), threshold.into_dispatch()))
}

/// Fake quantization: `scale * codes`, with a straight-through gradient for the weight and the gradient of learned
/// step size quantization for the scale.
///
/// With `G` the gradient of the output, `v = w / scale`, codes `t` and `n` the weights that share a scale:
/// `dw = G` (inside the clip range only, when masked), and
/// `dscale = 1/sqrt(n) * sum G * (t - v inside, t outside)`. Masked weights do not contribute to the gradient of the scale.
///
/// # Shapes
/// - weight and mask (0 or 1): `[groups, n, channels]`
/// - scale and threshold: `[groups, 1, channels]`; the threshold has no gradient
/// - output: as weight
///
/// # Source
/// Esser et al., Learned Step Size Quantization, equations 3 and 5; Liu et al., ParetoQ, for the clip range of SEQ.
pub fn ternary_quantize(
    weight: Tensor<3>,
    scale: Tensor<3>,
    threshold: Tensor<3>,
    mask: Option<Tensor<3>>,
    estimator: StraightThrough,
) -> Tensor<3> {
    let threshold = prune(&weight, threshold, mask);
    Tensor::from_dispatch(Dispatch::ternary_quantize(
        weight.into_dispatch(),
        scale.into_dispatch(),
        threshold.into_dispatch(),
        estimator,
    ))
}

/// The threshold of a pruned weight: no finite weight of its type exceeds it. Not infinity, because shader compilers assume
/// that infinities do not occur.
fn pruned(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => f16::MAX.to_f32(),
        DType::BF16 => bf16::MAX.to_f32(),
        _ => f32::MAX,
    }
}

/// Folds the mask into the threshold, which then is `[groups, n, channels]`.
fn prune(weight: &Tensor<3>, threshold: Tensor<3>, mask: Option<Tensor<3>>) -> Tensor<3> {
    match mask {
        Some(mask) => {
            let pruned = pruned(threshold.dtype());
            threshold.expand(weight.dims()).mask_fill(mask.equal_scalar(0.0), pruned)
        }
        None => threshold,
    }
}

/// 1 where `|value| > bound`, else 0.
fn beyond<B: Backend>(value: FloatTensor<B>, bound: FloatTensor<B>) -> FloatTensor<B> {
    let sign = B::float_sign(B::float_sub(B::float_abs(value), bound));
    B::float_clamp_min(sign, 0f32.into())
}

pub(super) fn codes<B: Backend>(weight: FloatTensor<B>, threshold: FloatTensor<B>) -> FloatTensor<B> {
    B::float_mul(B::float_sign(weight.clone()), beyond::<B>(weight, threshold))
}

/// Inputs of the backward pass; empty if it reads none, so that nothing is kept alive.
type Saved<B> = Option<(FloatTensor<B>, FloatTensor<B>, FloatTensor<B>)>;

#[derive(Debug)]
struct TernaryQuantize;

impl<B: TernaryBackend> Backward<B, 2> for TernaryQuantize {
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
            let grad = if estimator.masked { B::float_mul(grad, inside) } else { grad };
            grads.register::<B>(node.id, grad);
        }
    }
}

pub(super) fn track<B: TernaryBackend, C: CheckpointStrategy>(
    weight: FloatTensor<Autodiff<B, C>>,
    scale: FloatTensor<Autodiff<B, C>>,
    threshold: FloatTensor<Autodiff<B, C>>,
    estimator: StraightThrough,
) -> FloatTensor<Autodiff<B, C>> {
    let reads_inputs = scale.is_tracked() || estimator.masked;
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
