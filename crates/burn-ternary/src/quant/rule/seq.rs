use crate::quant::scale_rule::Rule;
use burn::tensor::Tensor;

/// The levels are `{-2/3, 0, 2/3} a`, where `a` is the parameter.
const OUTER_LEVEL: f64 = 2.0 / 3.0;
/// `0.99 a` in units of the scale `2a / 3`.
const CLIP: f32 = 1.485;

/// Stretched elastic quantization: [`learned`](super::learned) with balanced levels and another clip.
///
/// # Source
/// Liu et al., ParetoQ, equations 5 to 7.
pub(super) struct Seq;

impl Rule for Seq {
    fn is_trained(&self) -> bool {
        true
    }

    fn init(&self, weight: Tensor<3>, threshold: Option<Tensor<3>>) -> Tensor<3> {
        super::learned::Learned.init(weight, threshold).mul_scalar(1.5)
    }

    fn trained_scale(&self, parameter: Tensor<3>) -> Tensor<3> {
        parameter.mul_scalar(OUTER_LEVEL)
    }

    fn clip(&self) -> Option<f32> {
        Some(CLIP)
    }
}
