use crate::ops::mean_abs;
use crate::quant::scale_rule::Rule;
use burn::tensor::Tensor;

/// The weight is zero where `|w| <= THRESHOLD * mean |w|`.
const THRESHOLD: f32 = 0.7;

/// `scale = mean |w|` of the weights that exceed a threshold of `0.7 mean |w|`.
///
/// # Source
/// Li et al., Ternary Weight Networks, equations 3 and 6.
pub(super) struct Twn;

impl Rule for Twn {
    fn threshold(&self, weight: &Tensor<3>, _factor: f32) -> Option<Tensor<3>> {
        Some(mean_abs(weight.clone()).mul_scalar(THRESHOLD))
    }
}
