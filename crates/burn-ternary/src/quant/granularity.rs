//! Views of weights in which those that share a scale lie along one dimension.

use super::Granularity;
use burn::tensor::Tensor;

impl Granularity {
    /// The shape `[groups, n, channels]` of a `[d_input, d_output]` weight: the `n` weights along dimension 1 share a scale.
    ///
    /// # Panics
    /// If a group size does not divide `d_input`.
    pub fn shape(self, [d_input, d_output]: [usize; 2]) -> [usize; 3] {
        match self {
            Self::PerTensor => [1, d_input * d_output, 1],
            Self::PerChannel => [1, d_input, d_output],
            Self::PerGroup(n) => {
                assert!(n > 0 && d_input % n == 0, "groups of {n} do not divide {d_input} inputs");
                [d_input / n, n, d_output]
            }
        }
    }

    /// The weight as a view in which the weights that share a scale lie along dimension 1. No data is moved.
    ///
    /// # Shapes
    /// `[d_input, d_output]` to `[groups, n, channels]`
    ///
    /// # Panics
    /// If a group size does not divide `d_input`.
    pub fn view(self, weight: Tensor<2>) -> Tensor<3> {
        let shape = self.shape(weight.dims());
        weight.reshape(shape)
    }

    /// Number of scales of a `[d_input, d_output]` weight.
    pub fn scales(self, dims: [usize; 2]) -> usize {
        let [groups, _, channels] = self.shape(dims);
        groups * channels
    }
}
