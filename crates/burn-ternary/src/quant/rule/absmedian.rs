use crate::ops::ternary_codes;
use crate::quant::scale_rule::Rule;
use burn::tensor::Tensor;

/// `scale = median |w|`; under sparsity, of the kept weights. The median of an even number is the mean of the middle two.
///
/// # Source
/// Nielsen and Schneider-Kamp, BitNet b1.58 Reloaded.
pub(super) struct Absmedian;

impl Rule for Absmedian {
    fn scale(&self, weight: Tensor<3>, threshold: Option<Tensor<3>>, zeros: usize) -> Tensor<3> {
        let n = weight.dims()[1];
        let kept = match threshold {
            // Zeros come first when sorted.
            Some(threshold) => ternary_codes(weight.clone(), threshold, None) * weight,
            None => weight.abs(),
        };
        let sorted = kept.sort(1);
        let [lower, upper] =
            [n - zeros - 1, n - zeros].map(|twice| sorted.clone().narrow(1, zeros + twice / 2, 1));
        (lower + upper).mul_scalar(0.5)
    }
}
