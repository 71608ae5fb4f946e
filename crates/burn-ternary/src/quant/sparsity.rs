//! Zeros by rank: thresholds and counts.

use super::Sparsity;
use crate::ops::kth_magnitude;
use burn::tensor::Tensor;

/// Zero fraction of a Gaussian under absmean: the initial value of growing sparsity.
const DENSE_ZERO_FRACTION: f64 = 0.31;

impl Sparsity {
    /// The magnitude up to which weights are zero: `[groups, 1, channels]` as for scales, or one per weight,
    /// `[groups, n, channels]`, for N:M sparsity. `None` without sparsity.
    ///
    /// # Shapes
    /// weight: `[d_input, d_output]`, seen as `view`: `[groups, n, channels]`
    pub(super) fn threshold(self, weight: Tensor<2>, view: [usize; 3], progress: f32) -> Option<Tensor<3>> {
        match self {
            Self::None => None,
            Self::ZeroFraction(_) => Some(kth_magnitude(weight.reshape(view), self.zeros(view[1], progress))),
            Self::NOfM([_, m]) => {
                let [d_input, d_output] = weight.dims();
                assert!(d_input.is_multiple_of(m), "groups of {m} do not divide {d_input} inputs");
                let groups = [d_input / m, m, d_output];
                let threshold = kth_magnitude(weight.reshape(groups), self.zeros(m, progress));
                Some(threshold.expand(groups).reshape(view))
            }
        }
    }

    /// Number of zeros among `n` weights (those that share a scale, or the M of N:M), without ties.
    ///
    /// While `progress` is below 1, the share grows from that of a dense model to the configured one.
    pub(super) fn zeros(self, n: usize, progress: f32) -> usize {
        let progress = f64::from(progress);
        let grown = |fraction: f64| DENSE_ZERO_FRACTION * (1.0 - progress) + fraction * progress;
        let share = |fraction: f64, n: usize| ((grown(fraction) * n as f64).round() as usize).min(n - 1);
        match self {
            Self::None => 0,
            Self::ZeroFraction(fraction) => share(fraction, n),
            Self::NOfM([kept, m]) => share(1.0 - kept as f64 / m as f64, m) * n / m,
        }
    }
}
