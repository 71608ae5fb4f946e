use crate::ops::{StraightThrough, mean_abs, ternary_codes};
use crate::quant::scale_rule::{Rule, mean_kept};
use burn::tensor::Tensor;

/// Two parameters, for positive and for negative weights, `[groups, 2, channels]`. The weight is zero where
/// `|w| <= factor * mean |w|`.
///
/// # Source
/// Zhu et al., Trained Ternary Quantization, 2017.
pub(super) struct Ttq;

impl Rule for Ttq {
    fn threshold(&self, weight: &Tensor<3>, factor: f32) -> Option<Tensor<3>> {
        Some(mean_abs(weight.clone()).mul_scalar(factor))
    }

    /// Per sign.
    fn least_squares(&self, weight: Tensor<3>, threshold: Tensor<3>) -> Tensor<3> {
        let codes = ternary_codes(weight.clone(), threshold, None);
        let signs = [codes.clone().clamp_min(0.0), codes.clamp_max(0.0)];
        Tensor::cat(signs.map(|codes| mean_kept(weight.clone(), codes)).into(), 1)
    }

    fn is_trained(&self) -> bool {
        true
    }

    fn fake_quantize(
        &self,
        latent: Tensor<3>,
        scale: Tensor<3>,
        threshold: Tensor<3>,
        _estimator: StraightThrough,
    ) -> Tensor<3> {
        two_scales(latent, scale, threshold)
    }

    fn scales_per_group(&self) -> usize {
        2
    }
}

/// `s+` where the code is 1, `-s-` where it is -1.
///
/// With `G` the gradient of the output: `dw = G`, `ds+ = 1/sqrt(n) sum G` over the positive codes and
/// `ds- = -1/sqrt(n) sum G` over the negative ones. The factor is that of learned scales; the paper has none, and
/// multiplies `dw` by the scale of its code, which suits latent weights that are normalized to 1, as ours are not.
///
/// # Shapes
/// - latent: `[groups, n, channels]`
/// - scale: `[groups, 2, channels]`, of positive and of negative codes
///
/// # Source
/// Zhu et al., Trained Ternary Quantization, 2017, equations 6 to 8.
fn two_scales(latent: Tensor<3>, scale: Tensor<3>, threshold: Tensor<3>) -> Tensor<3> {
    let codes = ternary_codes(latent.clone().detach(), threshold, None);
    let share = (latent.dims()[1] as f64).sqrt().recip();
    // The difference is 0 in value and carries the gradient only.
    let value = scale.clone().detach();
    let scale = value.clone() + (scale - value).mul_scalar(share);
    let [positive, negative] = [0, 1].map(|sign| scale.clone().narrow(1, sign, 1));
    let ternary = codes.clone().clamp_min(0.0) * positive + codes.clamp_max(0.0) * negative;
    ternary + (latent.clone() - latent.detach())
}
