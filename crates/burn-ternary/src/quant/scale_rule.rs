//! What a scale rule decides: [`Rule`], one implementation per file in `rule/`.

use crate::ops::{StraightThrough, mean_abs, ternary_codes, ternary_quantize};
use burn::tensor::Tensor;

/// Least-squares scale of a Gaussian / its mean magnitude: the initial value of a learned scale.
pub const GAUSSIAN_SCALE: f32 = 1.534;

/// How the scales of a weight, its thresholds and its codes depend on each other.
///
/// Weights are views `[groups, n, channels]` in which the `n` weights along dimension 1 share a scale, without a gradient.
/// Scales are `[groups, 1, channels]`, thresholds the same or, under N:M sparsity, one per weight. The caller rounds scales to
/// f16.
pub(crate) trait Rule: Sync {
    /// The threshold of a rule whose codes do not depend on the scale, where `factor` is `quant.threshold`. `None`: the
    /// threshold is `factor * scale`. Sparsity takes precedence.
    fn threshold(&self, _weight: &Tensor<3>, _factor: f32) -> Option<Tensor<3>> {
        None
    }

    /// The scale of a rule without parameters. `threshold` is that of the rule or of sparsity, with `zeros` weights of each `n`
    /// below it.
    fn scale(&self, weight: Tensor<3>, threshold: Option<Tensor<3>>, _zeros: usize) -> Tensor<3> {
        match threshold {
            Some(threshold) => self.least_squares(weight, threshold),
            None => mean_abs(weight),
        }
    }

    /// The scale with the least squared error for the codes of a threshold.
    fn least_squares(&self, weight: Tensor<3>, threshold: Tensor<3>) -> Tensor<3> {
        let codes = ternary_codes(weight.clone(), threshold, None);
        mean_kept(weight, codes)
    }

    /// Whether the scale is a parameter.
    fn is_trained(&self) -> bool {
        false
    }

    /// The initial value of the parameter.
    fn init(&self, weight: Tensor<3>, threshold: Option<Tensor<3>>) -> Tensor<3> {
        match threshold {
            Some(threshold) => self.least_squares(weight, threshold),
            None => mean_abs(weight).mul_scalar(GAUSSIAN_SCALE),
        }
    }

    /// The scale of the codes, from the parameter, with a gradient.
    fn trained_scale(&self, parameter: Tensor<3>) -> Tensor<3> {
        parameter
    }

    /// `scale * codes` with the gradients of the latent weight and of a trained scale.
    fn fake_quantize(
        &self,
        latent: Tensor<3>,
        scale: Tensor<3>,
        threshold: Tensor<3>,
        estimator: StraightThrough,
    ) -> Tensor<3> {
        ternary_quantize(latent, scale, threshold, None, estimator)
    }

    /// The magnitude at which the quantizer saturates, in units of the scale. `None`: it has no clipping range, so the
    /// estimator `masked` is refused.
    fn clip(&self) -> Option<f32> {
        None
    }

    /// Number of scales for the weights that share one: 1, or 2 for one per sign, which no file and no integer product has.
    fn scales_per_group(&self) -> usize {
        1
    }
}

/// `mean |w|` along dimension 1 of the weights whose code is not 0; 0 if there are none.
pub(super) fn mean_kept(weight: Tensor<3>, codes: Tensor<3>) -> Tensor<3> {
    let count = codes.clone().abs().sum_dim(1).clamp_min(1.0);
    (codes * weight).sum_dim(1) / count
}
