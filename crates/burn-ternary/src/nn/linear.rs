//! [`QuantizedLinear`]: a linear layer whose latent weight is multiplied as ternary.

use super::{Compute, norm::rms_normalize};
use crate::ops::absmax_quantize;
use crate::quant::{ActivationPrecision, Dial, QuantConfig, TernaryQuantizer, TernaryQuantizerConfig};
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, module::linear};
use rand::Rng;
use rand_distr::{Distribution, Normal};

/// Epsilon of the norm right before a quantized linear layer.
const INPUT_NORM_EPS: f64 = 1e-6;

/// Configuration of a [`QuantizedLinear`].
#[derive(Clone, Debug)]
pub struct QuantizedLinearConfig {
    pub d_input: usize,
    pub d_output: usize,
    pub bias: bool,
    /// Standard deviation of the initial weights.
    pub std: f64,
    pub compute: Compute,
    pub quant: QuantConfig,
    pub lambda: Dial,
}

/// `y = x~ W~ + b`: ternary `W~` when quantization is enabled, float `W` otherwise.
///
/// # Example
/// ```
/// # use burn_ternary::{nn::{Compute, QuantizedLinearConfig}, quant::{Dial, QuantConfig}};
/// # use burn::tensor::{Device, Tensor};
/// # use rand::SeedableRng;
/// let config = QuantizedLinearConfig {
///     d_input: 64, d_output: 32, bias: true, std: 0.02,
///     compute: Compute::F32, quant: QuantConfig::default(), lambda: Dial::default(),
/// };
/// let device = Device::default();
/// let layer = config.init(&mut rand_chacha::ChaCha8Rng::seed_from_u64(0), &device);
/// let output = layer.forward(Tensor::<3>::ones([2, 5, 64], &device));
/// assert_eq!(output.dims(), [2, 5, 32]);
/// assert!((layer.zero_fraction().unwrap() - 0.31).abs() < 0.05);
/// ```
#[derive(Module, Debug)]
pub struct QuantizedLinear {
    /// Latent weight, `[d_input, d_output]`, f32.
    pub weight: Param<Tensor<2>>,
    /// `[d_output]`
    pub bias: Option<Param<Tensor<1>>>,
    /// `None` in a float twin.
    pub quantizer: Option<TernaryQuantizer>,
    #[module(skip)]
    config: QuantizedLinearConfig,
}

impl QuantizedLinearConfig {
    /// Weights are drawn on the host, so that every backend starts from the same bits.
    pub fn init(&self, rng: &mut impl Rng, device: &Device) -> QuantizedLinear {
        let weight = normal(rng, [self.d_input, self.d_output], self.std, device);
        let quantizer =
            self.quant.enabled.then(|| TernaryQuantizerConfig::new(&self.quant, &self.lambda).init(&weight));
        QuantizedLinear {
            weight: Param::from_tensor(weight),
            bias: self.bias.then(|| Param::from_tensor(Tensor::zeros([self.d_output], device))),
            quantizer,
            config: self.clone(),
        }
    }
}

impl QuantizedLinear {
    /// # Shapes
    /// `[..., d_input]` to `[..., d_output]`
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let quant = &self.config.quant;
        let input = if quant.input_norm { rms_normalize(input, INPUT_NORM_EPS) } else { input };
        let input = match (self.is_ternary(), quant.activations) {
            (true, ActivationPrecision::Int8) => absmax_quantize(input, 127.0),
            _ => input,
        };
        // One matrix product for all tokens: [tokens, d_input] x [d_input, d_output].
        let mut shape = input.dims();
        let tokens = shape[..D - 1].iter().product::<usize>();
        let input: Tensor<2> = input.reshape([tokens, self.config.d_input]);
        let bias = self.bias.as_ref().map(|bias| self.config.compute.cast(bias.val()));
        let output = linear(input, self.config.compute.cast(self.effective_weight()), bias);
        shape[D - 1] = self.config.d_output;
        output.reshape(shape)
    }

    /// The weight that the forward pass multiplies, `[d_input, d_output]`.
    pub fn effective_weight(&self) -> Tensor<2> {
        match &self.quantizer {
            Some(quantizer) => quantizer.fake_quantize(self.weight.val()),
            None => self.weight.val(),
        }
    }

    /// The codes -1, 0, +1 as floats, `[d_input, d_output]`; none in a float twin.
    pub fn codes(&self) -> Option<Tensor<2>> {
        self.quantizer.as_ref().map(|quantizer| quantizer.codes(self.weight.val()))
    }

    /// Fraction of zero codes; none in a float twin.
    pub fn zero_fraction(&self) -> Option<f64> {
        let codes = self.codes()?;
        let count = self.config.d_input * self.config.d_output;
        let kept = codes.abs().sum().into_scalar::<f32>() as f64;
        Some(1.0 - kept / count as f64)
    }

    /// Bytes of the packed weight: five codes a byte and an f16 for each scale; four bytes a weight in a float twin.
    pub fn packed_bytes(&self) -> usize {
        let weights = self.config.d_input * self.config.d_output;
        match &self.quantizer {
            Some(quantizer) => {
                weights.div_ceil(5) + 2 * quantizer.granularity().scales([self.config.d_input, self.config.d_output])
            }
            None => weights * 4,
        }
    }

    /// Bits that a packed weight takes, scales included.
    pub fn bits_per_weight(&self) -> f64 {
        self.packed_bytes() as f64 * 8.0 / (self.config.d_input * self.config.d_output) as f64
    }

    /// f32 bytes over packed bytes of the weight. At most `32 / log2(3) = 20.19` for any fixed-rate code.
    pub fn compression_ratio(&self) -> f64 {
        32.0 / self.bits_per_weight()
    }

    /// False in a float twin, and while a float-first schedule still trains the latent weight.
    fn is_ternary(&self) -> bool {
        self.quantizer.is_some() && self.config.lambda.get() > 0.0
    }
}

/// `[rows, columns]` of normal deviates from a seeded host generator.
pub(super) fn normal(rng: &mut impl Rng, [rows, columns]: [usize; 2], std: f64, device: &Device) -> Tensor<2> {
    let normal = Normal::new(0.0f32, std as f32).expect("a finite standard deviation");
    let values: Vec<f32> = (0..rows * columns).map(|_| normal.sample(rng)).collect();
    Tensor::from_data(burn::tensor::TensorData::new(values, [rows, columns]), device)
}
