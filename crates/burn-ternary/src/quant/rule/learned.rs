use crate::quant::scale_rule::Rule;

/// The scale is a parameter, with the gradient of learned step size quantization
/// ([`ternary_quantize`](crate::ops::ternary_quantize)).
///
/// # Source
/// Esser et al., Learned Step Size Quantization.
pub(super) struct Learned;

impl Rule for Learned {
    fn is_trained(&self) -> bool {
        true
    }

    fn clip(&self) -> Option<f32> {
        Some(1.0)
    }
}
