//! Norms whose statistics and affine are f32, whatever the rest computes in.

use burn::module::{Module, Param};
use burn::tensor::{Device, FloatDType, Tensor};

/// Layer norm in f32 between casts: `(x - mean) / sqrt(var + eps) * weight + bias`.
///
/// # Source
/// Ba et al., Layer Normalization; the biased variance, as GPT-2 has it.
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
    pub fn new(d: usize, eps: f64, device: &Device) -> Self {
        Self {
            weight: Param::from_tensor(Tensor::ones([d], device)),
            bias: Param::from_tensor(Tensor::zeros([d], device)),
            eps,
        }
    }

    /// # Shapes
    /// `[..., d]` to the same, in the input's type
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        in_f32(input, |input| {
            let centered = input.clone() - input.mean_dim(D - 1);
            let variance = centered.clone().square().mean_dim(D - 1);
            centered / variance.add_scalar(self.eps).sqrt() * self.weight.val().unsqueeze() + self.bias.val().unsqueeze()
        })
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
    pub fn new(d: usize, eps: f64, device: &Device) -> Self {
        Self { weight: Param::from_tensor(Tensor::ones([d], device)), eps }
    }

    /// # Shapes
    /// `[..., d]` to the same, in the input's type
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        in_f32(input, |input| normalize(input, self.eps) * self.weight.val().unsqueeze())
    }
}

/// The norm of a family.
#[derive(Module, Debug)]
pub enum Norm {
    Layer(MixedLayerNorm),
    Rms(RmsNorm),
}

impl Norm {
    /// # Shapes
    /// `[..., d]` to the same
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Layer(norm) => norm.forward(input),
            Self::Rms(norm) => norm.forward(input),
        }
    }
}

/// RMS norm without parameters.
pub fn rms_normalize<const D: usize>(input: Tensor<D>, eps: f64) -> Tensor<D> {
    in_f32(input, |input| normalize(input, eps))
}

fn normalize<const D: usize>(input: Tensor<D>, eps: f64) -> Tensor<D> {
    let mean_square = input.clone().square().mean_dim(D - 1);
    input / mean_square.add_scalar(eps).sqrt()
}

fn in_f32<const D: usize>(input: Tensor<D>, forward: impl FnOnce(Tensor<D>) -> Tensor<D>) -> Tensor<D> {
    let dtype = input.dtype();
    if dtype == FloatDType::F32.into() {
        return forward(input);
    }
    forward(input.cast(FloatDType::F32)).cast(dtype)
}
