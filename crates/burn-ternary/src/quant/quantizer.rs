//! [`TernaryQuantizer`]: computes codes, scales and the fake-quantized weight from a latent weight.

use super::{Estimator, Granularity, QuantConfig, ScaleRule, ScheduleHandle, Sparsity};
use crate::ops::{OutsideGradient, StraightThrough, round_scale, ternary_codes};
use burn::module::{Module, Param};
use burn::tensor::Tensor;

/// Initial temperature of an annealed weight, in units of the scale; the final one is a tenth of it.
const INITIAL_TEMPERATURE: f32 = 0.5;

/// Configuration of a [`TernaryQuantizer`]; makes one for each weight.
#[derive(Clone, Debug)]
pub struct TernaryQuantizerConfig {
    /// The rule that determines the scale.
    pub rule: ScaleRule,
    /// Which weights share a scale.
    pub granularity: Granularity,
    /// Threshold in units of the scale; `twn` has its own.
    pub threshold: f32,
    /// Which weights are zero, if selected by rank.
    pub sparsity: Sparsity,
    /// Strength of [`TernaryQuantizer::dead_bias`]; 0: off.
    pub dead_bias: f32,
    /// Gradient estimator of the rounding.
    pub estimator: Estimator,
    /// The scheduled values: lambda, and the progress of sparsity.
    pub schedule: ScheduleHandle,
}

impl TernaryQuantizerConfig {
    /// The settings in `config` that concern a weight.
    pub fn new(config: &QuantConfig, schedule: &ScheduleHandle) -> Self {
        Self {
            rule: config.scale,
            granularity: config.granularity,
            threshold: config.threshold as f32,
            sparsity: config.sparsity,
            dead_bias: config.dead_bias as f32,
            estimator: config.estimator,
            schedule: schedule.clone(),
        }
    }

    /// A quantizer for `weight`, from whose values a learned scale is initialized.
    ///
    /// # Shapes
    /// weight: `[d_input, d_output]`
    pub fn init(&self, weight: &Tensor<2>) -> TernaryQuantizer {
        let rule = self.rule.rule();
        let scale = rule.is_trained().then(|| {
            let weight = weight.clone().detach();
            let threshold = self.own_threshold(&weight);
            // A parameter must be a leaf.
            Param::from_tensor(rule.init(self.granularity.view(weight), threshold).detach())
        });
        TernaryQuantizer { scale, config: self.clone() }
    }

    /// The threshold of codes that do not depend on the scale, by sparsity or by the rule; see [`Sparsity::threshold`] for
    /// its shape.
    fn own_threshold(&self, weight: &Tensor<2>) -> Option<Tensor<3>> {
        let view = self.granularity.shape(weight.dims());
        let sparse = self.sparsity.threshold(weight.clone(), view, self.schedule.sparsity.get());
        sparse.or_else(|| self.rule.rule().threshold(&weight.clone().reshape(view), self.threshold))
    }
}

/// Quantizes one weight to `{-scale, 0, +scale}`.
///
/// # Example
/// ```
/// # use burn_ternary::quant::{ScheduleHandle, QuantConfig, TernaryQuantizerConfig};
/// # use burn::tensor::{Device, Tensor};
/// let weight = Tensor::<2>::from_data([[0.9, -0.05], [-1.1, 0.3]], &Device::default());
/// let quantizer = TernaryQuantizerConfig::new(&QuantConfig::default(), &ScheduleHandle::default()).init(&weight);
/// assert_eq!(quantizer.codes(weight).into_data().try_to_vec::<f32>().unwrap(), [1.0, 0.0, -1.0, 1.0]);
/// ```
#[derive(Module, Debug)]
pub struct TernaryQuantizer {
    /// The trained scale of the rules `learned` and `seq`, `[groups, 1, channels]`; of `ttq`, those of positive and of
    /// negative weights, `[groups, 2, channels]`.
    pub scale: Option<Param<Tensor<3>>>,
    #[module(skip)]
    config: TernaryQuantizerConfig,
}

impl TernaryQuantizer {
    /// Which weights share a scale.
    pub fn granularity(&self) -> Granularity {
        self.config.granularity
    }

    /// The scale that the forward pass multiplies codes with: a positive value that f16 holds exactly.
    ///
    /// # Shapes
    /// weight `[d_input, d_output]` to `[groups, 1, channels]`, for `ttq` `[groups, 2, channels]`
    pub fn scales(&self, weight: Tensor<2>) -> Tensor<3> {
        self.scale_and_threshold(&weight).0.detach()
    }

    /// The trained scale before it is rounded to f16, with its gradient; `None` if the rule computes the scale.
    ///
    /// # Shapes
    /// As [`scales`](Self::scales).
    pub fn learned_scale(&self) -> Option<Tensor<3>> {
        Some(self.config.rule.rule().trained_scale(self.scale.as_ref()?.val()))
    }

    /// The codes -1, 0, +1 of the weight, as floats. No gradient.
    ///
    /// # Shapes
    /// `[d_input, d_output]` to the same
    pub fn codes(&self, weight: Tensor<2>) -> Tensor<2> {
        let dims = weight.dims();
        let (_, threshold) = self.scale_and_threshold(&weight);
        ternary_codes(self.config.granularity.view(weight.detach()), threshold, None).reshape(dims)
    }

    /// `scale * codes`. While lambda is below 1, blended with the latent weight, or annealed.
    ///
    /// # Shapes
    /// `[d_input, d_output]` to the same
    pub fn fake_quantize(&self, weight: Tensor<2>) -> Tensor<2> {
        let lambda = self.config.schedule.lambda.get();
        if lambda <= 0.0 {
            return weight;
        }
        let dims = weight.dims();
        let (scale, threshold) = self.scale_and_threshold(&weight);
        let latent = self.config.granularity.view(weight);
        let annealed = self.config.estimator == Estimator::Annealed;
        if annealed && lambda < 1.0 && latent.is_autodiff() {
            let temperature = INITIAL_TEMPERATURE * 0.1f32.powf(lambda);
            return anneal(latent, scale, threshold, temperature).reshape(dims);
        }
        let rule = self.config.rule.rule();
        let ternary = rule.fake_quantize(latent.clone(), scale, threshold, self.estimator());
        let blended = match lambda < 1.0 && !annealed {
            true => latent.clone() + (ternary - latent).mul_scalar(lambda),
            false => ternary,
        };
        blended.reshape(dims)
    }

    /// Scale and threshold, if [`fake_quantize`](Self::fake_quantize) is only a comparison with one threshold per channel or tensor, with
    /// a straight-through gradient. An op that multiplies codes then need not compute the fake-quantized weight.
    ///
    /// # Shapes
    /// weight `[d_input, d_output]` to twice `[1, 1, d_output]` or `[1, 1, 1]`
    pub(crate) fn channel_scale_and_threshold(&self, weight: &Tensor<2>) -> Option<[Tensor<3>; 2]> {
        let plain = self.config.estimator == Estimator::Identity
            && self.scale.is_none()
            && self.config.schedule.lambda.get() >= 1.0;
        let (scale, threshold) = plain.then(|| self.scale_and_threshold(weight))?;
        let [groups, one, channels] = scale.dims();
        let shared = threshold.dims() == scale.dims() && groups == 1 && one == 1;
        (shared && [1, weight.dims()[1]].contains(&channels)).then_some([scale, threshold])
    }

    /// The scale with the least squared error: for the given codes if they do not depend on it, over all scales otherwise.
    ///
    /// # Shapes
    /// As [`scales`](Self::scales).
    pub fn optimal_scale(&self, weight: Tensor<2>) -> Tensor<3> {
        match self.config.own_threshold(&weight) {
            Some(threshold) => {
                self.config.rule.rule().least_squares(self.config.granularity.view(weight), threshold)
            }
            None => compute_optimal_scale(weight, self.config.granularity, None),
        }
    }

    /// `dead_bias * sum of w` over the weights of code 0 of each output channel, with the gradient of these weights;
    /// `None` if it is off or the weight is still float.
    ///
    /// # Shapes
    /// weight `[d_input, d_output]` to `[d_output]`
    ///
    /// # Source
    /// Huang et al., Tequila: Trapping-free Ternary Quantization for Large Language Models, 2025.
    pub fn dead_bias(&self, weight: Tensor<2>) -> Option<Tensor<1>> {
        let strength = self.config.dead_bias * self.config.schedule.lambda.get();
        (strength > 0.0).then(|| {
            let dead = self.codes(weight.clone()).abs().neg().add_scalar(1.0);
            (weight * dead).sum_dim(0).squeeze_dim(0).mul_scalar(strength)
        })
    }

    /// Scale (with the gradient of a learned one), see [`scales`](Self::scales), and threshold (without),
    /// `[groups, 1, channels]` or one per weight.
    fn scale_and_threshold(&self, weight: &Tensor<2>) -> (Tensor<3>, Tensor<3>) {
        let weight = weight.clone().detach();
        let own = self.config.own_threshold(&weight);
        let scale = self.learned_scale().unwrap_or_else(|| {
            let weight = self.config.granularity.view(weight);
            let zeros = self.config.sparsity.zeros(weight.dims()[1], self.config.schedule.sparsity.get());
            self.config.rule.rule().scale(weight, own.clone(), zeros)
        });
        let scale = round_scale(scale);
        let threshold = own.unwrap_or_else(|| scale.clone().detach().mul_scalar(self.config.threshold));
        (scale, threshold)
    }

    fn estimator(&self) -> StraightThrough {
        let clip = match self.config.sparsity {
            Sparsity::None => self.config.rule.rule().clip().unwrap_or(1.0),
            // Codes by rank do not depend on the scale, which then has the exact gradient.
            Sparsity::ZeroFraction(_) | Sparsity::NOfM(_) => 0.0,
        };
        let outside = match self.config.estimator {
            Estimator::Masked => OutsideGradient::Zero,
            Estimator::Identity | Estimator::Annealed => OutsideGradient::Pass,
        };
        StraightThrough { clip, outside }
    }
}

/// The ternary weight at a temperature; see [`Estimator::Annealed`]. Neither scale nor threshold has a gradient.
fn anneal(latent: Tensor<3>, scale: Tensor<3>, threshold: Tensor<3>, temperature: f32) -> Tensor<3> {
    let width = scale.clone().mul_scalar(2.0 * temperature);
    let edges = [latent.clone() - threshold.clone(), latent + threshold];
    let [upper, lower] = edges.map(|distance| (distance / width.clone()).tanh());
    (upper + lower) * scale.mul_scalar(0.5)
}

/// The scale that minimizes `sum h (w - scale * code(w))^2` with the best codes for it: exact, not iterated.
///
/// For a given scale the best code is 0 below half of it, so the kept weights are the largest. The magnitudes are sorted,
/// and of all prefixes k the one with the largest `(sum_k h |w|)^2 / sum_k h` is taken; its scale is
/// `sum_k h |w| / sum_k h`. With `second_moment`, `h` is the mean of the squared inputs over a batch, and the error is that
/// of the layer's output; without it, `h = 1`.
///
/// # Shapes
/// - weight: `[d_input, d_output]`
/// - second_moment: `[d_input]`
/// - output: `[groups, 1, channels]`
pub fn compute_optimal_scale(
    weight: Tensor<2>,
    granularity: Granularity,
    second_moment: Option<Tensor<1>>,
) -> Tensor<3> {
    let dims = weight.dims();
    let importance = match second_moment {
        Some(moment) => moment.reshape([dims[0], 1]).expand(dims),
        None => Tensor::ones(dims, &weight.device()),
    };
    let (magnitude, order) = granularity.view(weight.abs()).sort_descending_with_indices(1);
    let importance = granularity.view(importance).gather(1, order);
    let gain = (magnitude * importance.clone()).cumsum(1);
    let weight = importance.cumsum(1).clamp_min(f32::MIN_POSITIVE);
    let best = (gain.clone().powi_scalar(2) / weight.clone()).argmax(1);
    gain.gather(1, best.clone()) / weight.gather(1, best)
}
