//! Norms, whose statistics and affine parts are f32 whatever the type of the model.

use crate::ops::{layer_norm, rms_norm};
use burn::module::{Module, Param};
use burn::tensor::{Device, FloatDType, Tensor};

/// Layer norm in f32 between casts: `(x - mean) / sqrt(var + eps) * weight + bias`.
///
/// # Source
/// Ba et al., Layer Normalization; the biased variance, as in GPT-2.
#[derive(Module, Debug)]
pub struct MixedLayerNorm {
    /// `[d]`
    pub weight: Param<Tensor<1>>,
    /// `[d]`
    pub bias: Param<Tensor<1>>,
    #[module(skip)]
    eps: f64,
}

impl MixedLayerNorm {
    /// A norm with weights 1 and biases 0.
    pub fn new(d: usize, eps: f64, device: &Device) -> Self {
        Self {
            weight: Param::from_tensor(Tensor::ones([d], device)),
            bias: Param::from_tensor(Tensor::zeros([d], device)),
            eps,
        }
    }

    /// Normalizes each row, the last dimension.
    ///
    /// # Shapes
    /// `[..., d]` to the same, in the type of the input
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        in_f32(input, |rows| layer_norm(rows, self.weight.val(), self.bias.val(), self.eps as f32))
    }
}

/// RMS norm in f32 between casts: `x / sqrt(mean(x^2) + eps) * weight`.
///
/// # Source
/// Zhang and Sennrich, Root Mean Square Layer Normalization.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[d]`
    pub weight: Param<Tensor<1>>,
    #[module(skip)]
    eps: f64,
}

impl RmsNorm {
    /// A norm with weights 1.
    pub fn new(d: usize, eps: f64, device: &Device) -> Self {
        Self { weight: Param::from_tensor(Tensor::ones([d], device)), eps }
    }

    /// Normalizes each row, the last dimension.
    ///
    /// # Shapes
    /// `[..., d]` to the same, in the type of the input
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        in_f32(input, |rows| rms_norm(rows, self.weight.val(), self.eps as f32))
    }
}

/// The norm of a family.
#[derive(Module, Debug)]
pub enum Norm {
    /// Of the gpt2 family.
    Layer(MixedLayerNorm),
    /// Of the llama and bitnet families.
    Rms(RmsNorm),
}

impl Norm {
    /// Normalizes each row, the last dimension.
    ///
    /// # Shapes
    /// `[..., d]` to the same
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Layer(norm) => norm.forward(input),
            Self::Rms(norm) => norm.forward(input),
        }
    }
}

/// RMS norm without parameters: `x / sqrt(mean(x^2) + eps)` of each row, computed in f32.
///
/// # Shapes
/// `[..., d]` to the same, in the type of the input
pub fn rms_normalize<const D: usize>(input: Tensor<D>, eps: f64) -> Tensor<D> {
    in_f32(input, |rows| {
        let ones = Tensor::ones([rows.dims()[1]], &rows.device());
        rms_norm(rows, ones, eps as f32)
    })
}

/// Applies `forward` to the input as rows of f32, and casts back.
fn in_f32<const D: usize>(input: Tensor<D>, forward: impl FnOnce(Tensor<2>) -> Tensor<2>) -> Tensor<D> {
    let (dtype, shape) = (input.dtype(), input.dims());
    let d = shape[D - 1];
    let rows = input.cast(FloatDType::F32).reshape([shape.iter().product::<usize>() / d, d]);
    forward(rows).reshape(shape).cast(dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Distribution, TensorData};

    const ROWS: usize = 5;

    fn device() -> Device {
        crate::device::device("flex").unwrap()
    }

    fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
        tensor.into_data().iter::<f64>().collect()
    }

    fn random<const D: usize>(shape: [usize; D], offset: f64, spread: f64) -> Tensor<D> {
        Tensor::random(shape, Distribution::Normal(offset, spread), &device())
    }

    /// `[rows, d]` in float64, after `mean` is taken off each row.
    fn normalized(input: &[f64], d: usize, eps: f64, mean: impl Fn(&[f64]) -> f64) -> Vec<f64> {
        let row = |row: &[f64]| -> Vec<f64> {
            let mean = mean(row);
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / d as f64;
            row.iter().map(|x| (x - mean) / (variance + eps).sqrt()).collect()
        };
        input.chunks(d).flat_map(row).collect()
    }

    /// Both norms and their float64 references on one input.
    fn both(input: Tensor<3>, eps: f64) -> [(Tensor<3>, Vec<f64>); 2] {
        let [_, _, d] = input.dims();
        let mut layer = MixedLayerNorm::new(d, eps, &device());
        let mut rms = RmsNorm::new(d, eps, &device());
        let (weight, bias) = (random([d], 1.0, 0.5), random([d], 0.0, 0.5));
        layer.weight = Param::from_tensor(weight.clone());
        layer.bias = Param::from_tensor(bias.clone());
        rms.weight = Param::from_tensor(weight.clone());
        let (weight, bias, numbers) = (values(weight), values(bias), values(input.clone()));
        let centered = normalized(&numbers, d, eps, |row| row.iter().sum::<f64>() / d as f64);
        let plain = normalized(&numbers, d, eps, |_| 0.0);
        let layer_reference =
            centered.iter().enumerate().map(|(i, x)| x * weight[i % d] + bias[i % d]).collect();
        let rms_reference = plain.iter().enumerate().map(|(i, x)| x * weight[i % d]).collect();
        [(layer.forward(input.clone()), layer_reference), (rms.forward(input), rms_reference)]
    }

    #[test]
    fn norms_agree_with_float64_on_odd_sizes_and_large_means() {
        // An offset of 1000 leaves 6e-5 for the last place of the input: a variance from squares would be lost.
        for (sizes, offset, spread, bound) in [
            (&[1, 2, 7, 33, 129][..], 0.0, 1.0, 1e-5),
            (&[7, 33, 129], 0.0, 1e-2, 1e-5),
            (&[1, 7, 33, 129], 1e3, 1.0, 1e-3),
        ] {
            for &d in sizes {
                for (found, expected) in both(random([1, ROWS, d], offset, spread), 1e-5) {
                    for (found, expected) in values(found).iter().zip(expected) {
                        let error = (found - expected).abs() / expected.abs().max(1.0);
                        assert!(
                            error < bound,
                            "{found} for {expected}, d {d}, offset {offset}, spread {spread}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn bf16_input_has_f32_statistics_and_comes_back_as_bf16() {
        let bf16 = FloatDType::BF16;
        for d in [7, 33, 129] {
            for (offset, spread) in [(0.0, 1.0), (1e3, 100.0)] {
                let input = random([1, ROWS, d], offset, spread).cast(bf16);
                for (found, expected) in both(input.clone(), 1e-5) {
                    assert_eq!(found.dtype(), bf16.into());
                    for (found, expected) in values(found).iter().zip(expected) {
                        // Half of the last of eight bits, and what f32 loses.
                        let bound = expected.abs() / 256.0 + 1e-5;
                        assert!(
                            (found - expected).abs() <= bound,
                            "{found} for {expected}, d {d}, offset {offset}"
                        );
                    }
                }
                assert_eq!(rms_normalize(input, 1e-6).dtype(), bf16.into());
            }
        }
    }

    #[test]
    fn a_constant_row_stays_finite() {
        for (found, expected) in both(Tensor::full([1, 2, 8], 3.0, &device()), 1e-5) {
            assert!(
                values(found).iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-5)
            );
        }
        let zeros = rms_normalize(Tensor::<2>::zeros([2, 8], &device()), 1e-6);
        zeros.into_data().assert_eq(&TensorData::new(vec![0f32; 16], [2, 8]), true);
    }
}
