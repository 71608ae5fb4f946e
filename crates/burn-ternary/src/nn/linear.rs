//! [`QuantizedLinear`]: a linear layer whose latent weight is quantized to ternary in the forward pass.

use super::{LowRank, MixedPrecision, init::normal, norm::rms_normalize};
use crate::ops::{
    FactorPrecision, RowScale, WeightGradientPrecision, absmax_quantize, float_linear, latent_linear,
    ternary_linear,
};
use crate::quant::{
    ActivationPrecision, MatmulPrecision, QuantConfig, ScheduleHandle, TernaryQuantizer,
    TernaryQuantizerConfig,
};
use burn::module::{Module, Param};
use burn::tensor::{Device, FloatDType, Tensor};
use rand::Rng;

/// Epsilon of the norm before a quantized linear layer (`quant.input_norm`).
const INPUT_NORM_EPS: f64 = 1e-6;

/// Configuration of a [`QuantizedLinear`].
#[derive(Clone, Debug)]
pub struct QuantizedLinearConfig {
    /// Width of the input.
    pub d_input: usize,
    /// Width of the output.
    pub d_output: usize,
    /// Whether a bias is added.
    pub bias: bool,
    /// Standard deviation of the initial weights.
    pub std: f64,
    /// Type of the matrix product.
    pub mixed_precision: MixedPrecision,
    /// How the weight is quantized; `enabled = false` gives the float twin.
    pub quant: QuantConfig,
    /// The scheduled values of the quantizer.
    pub schedule: ScheduleHandle,
}

/// `y = x~ W~ + b`, with ternary `W~` if quantization is enabled and float `W` otherwise, plus `alpha / rank x~ A B` if it
/// has an adapter.
///
/// # Example
/// ```
/// # use burn_ternary::{nn::{MixedPrecision, QuantizedLinearConfig}, quant::{ScheduleHandle, QuantConfig}};
/// # use burn::tensor::{Device, Tensor};
/// # use rand::SeedableRng;
/// let config = QuantizedLinearConfig {
///     d_input: 64, d_output: 32, bias: true, std: 0.02,
///     mixed_precision: MixedPrecision::F32, quant: QuantConfig::default(), schedule: ScheduleHandle::default(),
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
    /// LoRA adapter; the weight is then frozen.
    pub adapter: Option<LowRank>,
    #[module(skip)]
    config: QuantizedLinearConfig,
}

impl QuantizedLinearConfig {
    /// A layer with weights drawn on the host, the same bits on every backend. `rng` is a generator of `rand` 0.9.
    pub fn init(&self, rng: &mut impl Rng, device: &Device) -> QuantizedLinear {
        let weight = normal(rng, [self.d_input, self.d_output], self.std, device);
        let quantizer = self
            .quant
            .enabled
            .then(|| TernaryQuantizerConfig::new(&self.quant, &self.schedule).init(&weight));
        QuantizedLinear {
            weight: Param::from_tensor(weight),
            bias: self.bias.then(|| Param::from_tensor(Tensor::zeros([self.d_output], device))),
            quantizer,
            adapter: None,
            config: self.clone(),
        }
    }
}

impl QuantizedLinear {
    /// `x~ W~ + b`, plus the output of the adapter.
    ///
    /// # Shapes
    /// `[..., d_input]` to `[..., d_output]`
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let quant = &self.config.quant;
        let input = if quant.input_norm { rms_normalize(input, INPUT_NORM_EPS) } else { input };
        let mut shape = input.dims();
        let tokens = shape[..D - 1].iter().product::<usize>();
        // One matrix product for all tokens: [tokens, d_input] x [d_input, d_output].
        let input: Tensor<2> = input.reshape([tokens, self.config.d_input]);
        shape[D - 1] = self.config.d_output;
        let precision = self.config.mixed_precision;
        let bias = self.effective_bias().map(|bias| precision.cast(bias));
        let ternary = self.quantizer.is_some();
        let integer =
            quant.matmul_precision.is_integer() && ternary && self.config.schedule.lambda.get() >= 1.0;
        let (output, adapter_input) = if integer {
            // The op quantizes its input itself; only an adapter needs the quantized input here.
            let adapter_input = self.adapter.is_some().then(|| self.quantized_input(input.clone()));
            let channels = self
                .quantizer
                .as_ref()
                .and_then(|quantizer| quantizer.channel_scale_and_threshold(&self.weight.val()));
            let factors = match quant.matmul_precision {
                MatmulPrecision::Int8 => WeightGradientPrecision::Int8,
                _ => WeightGradientPrecision::Bf16,
            };
            let output = match channels {
                Some(channels) => latent_linear(input, self.weight.val(), channels, bias, factors),
                None => ternary_linear(input, self.effective_weight(), bias, factors),
            };
            (output, adapter_input)
        } else {
            let input = self.quantized_input(input);
            let factors =
                if ternary { quant.matmul_precision.factor_precision() } else { FactorPrecision::F32 };
            let output = float_linear(input.clone(), precision.cast(self.effective_weight()), bias, factors);
            (output, Some(input))
        };
        let output = match (&self.adapter, adapter_input) {
            (Some(adapter), Some(input)) => output + adapter.forward(input, precision),
            _ => output,
        };
        output.reshape(shape)
    }

    /// The input that weight and adapter multiply: quantized, after the norm.
    fn quantized_input(&self, input: Tensor<2>) -> Tensor<2> {
        let input = match (self.is_ternary(), self.config.quant.activations) {
            // In f32: a scale in half precision would differ from the one that the inference engine computes.
            (true, ActivationPrecision::Int8) => {
                absmax_quantize(input.cast(FloatDType::F32), 127.0, RowScale::F32)
            }
            _ => input,
        };
        self.config.mixed_precision.cast(input)
    }

    /// The weight that the forward pass multiplies: quantized, or blended while lambda is below 1; the latent one in a float twin.
    ///
    /// # Shapes
    /// `[d_input, d_output]`
    pub fn effective_weight(&self) -> Tensor<2> {
        match &self.quantizer {
            Some(quantizer) => quantizer.fake_quantize(self.weight.val()),
            None => self.weight.val(),
        }
    }

    /// The bias that the forward pass adds: the parameter plus that of dead weights (`quant.dead_bias`).
    ///
    /// # Shapes
    /// `[d_output]`
    pub fn effective_bias(&self) -> Option<Tensor<1>> {
        let bias = self.bias.as_ref().map(|bias| bias.val());
        let dead = self.quantizer.as_ref().and_then(|quantizer| quantizer.dead_bias(self.weight.val()));
        match (bias, dead) {
            (Some(bias), Some(dead)) => Some(bias + dead),
            (bias, dead) => bias.or(dead),
        }
    }

    /// The codes -1, 0, +1 as floats; `None` in a float twin.
    ///
    /// # Shapes
    /// `[d_input, d_output]`
    pub fn codes(&self) -> Option<Tensor<2>> {
        self.quantizer.as_ref().map(|quantizer| quantizer.codes(self.weight.val()))
    }

    /// Fraction of zero codes; `None` in a float twin.
    pub fn zero_fraction(&self) -> Option<f64> {
        let codes = self.codes()?;
        let count = self.config.d_input * self.config.d_output;
        let kept = codes.abs().sum().into_scalar::<f32>() as f64;
        Some(1.0 - kept / count as f64)
    }

    /// Bytes of the packed weight: five codes per byte and one f16 per scale; four bytes per weight in a float twin.
    pub fn packed_bytes(&self) -> usize {
        let weights = self.config.d_input * self.config.d_output;
        match &self.quantizer {
            Some(quantizer) => {
                let scales = quantizer.granularity().scales([self.config.d_input, self.config.d_output]);
                let per_group = self.config.quant.scale.rule().scales_per_group();
                weights.div_ceil(5) + 2 * per_group * scales
            }
            None => weights * 4,
        }
    }

    /// Bits per packed weight, scales included.
    pub fn bits_per_weight(&self) -> f64 {
        self.packed_bytes() as f64 * 8.0 / (self.config.d_input * self.config.d_output) as f64
    }

    /// FP32 bytes / packed bytes of the weight. At most `32 / log2(3) = 20.19` for any fixed-rate code.
    pub fn compression_ratio(&self) -> f64 {
        32.0 / self.bits_per_weight()
    }

    /// Whether the weight is quantized: not in a float twin, and not during the float phase of a float-first schedule.
    fn is_ternary(&self) -> bool {
        self.quantizer.is_some() && self.config.schedule.lambda.get() > 0.0
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::quant::Granularity;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    fn device() -> Device {
        crate::device::device("flex").unwrap()
    }

    fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
        tensor.into_data().iter::<f64>().collect()
    }

    fn layer(dims: [usize; 2], quant: QuantConfig, schedule: &ScheduleHandle) -> QuantizedLinear {
        let [d_input, d_output] = dims;
        let mixed_precision = MixedPrecision::F32;
        let config = QuantizedLinearConfig {
            d_input,
            d_output,
            bias: true,
            std: 0.3,
            mixed_precision,
            quant,
            schedule: schedule.clone(),
        };
        let mut layer = config.init(&mut ChaCha8Rng::seed_from_u64(3), &device());
        layer.bias = Some(Param::from_tensor(random([d_output])));
        layer
    }

    /// Always the same numbers: a tie of int8 rounding that came by chance would look like an error.
    fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
        let rng = &mut ChaCha8Rng::seed_from_u64(11);
        normal(rng, [shape.iter().product(), 1], 1.0, &device()).reshape(shape)
    }

    fn with(granularity: Granularity) -> QuantConfig {
        QuantConfig { granularity, ..QuantConfig::default() }
    }

    /// Rows of activations after the RMS norm without parameters and the int8 round trip that `quant` asks for.
    pub(in crate::nn) fn prepared(row: &[f64], quant: &QuantConfig) -> Vec<f64> {
        let mut row = row.to_vec();
        if quant.input_norm {
            let root = (row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64 + 1e-6).sqrt();
            row.iter_mut().for_each(|x| *x /= root);
        }
        if quant.enabled && quant.activations == ActivationPrecision::Int8 {
            let scale = row.iter().fold(0f64, |max, x| max.max(x.abs())) / 127.0;
            row.iter_mut().for_each(|x| *x = (*x / scale).round_ties_even() * scale);
        }
        row
    }

    #[test]
    fn forward_multiplies_prepared_rows_by_the_effective_weight() {
        let [d_input, d_output] = [24, 7];
        let mut quants = vec![QuantConfig::default().float()];
        for granularity in [Granularity::PerTensor, Granularity::PerChannel, Granularity::PerGroup(8)] {
            for (input_norm, activations) in [
                (false, ActivationPrecision::Float),
                (true, ActivationPrecision::Float),
                (false, ActivationPrecision::Int8),
                (true, ActivationPrecision::Int8),
            ] {
                quants.push(QuantConfig { input_norm, activations, ..with(granularity) });
                quants.push(quants.last().unwrap().clone().float());
            }
        }
        for quant in quants {
            let layer = layer([d_input, d_output], quant.clone(), &ScheduleHandle::default());
            let input = random([3, 5, d_input]).mul_scalar(2.5);
            let output = layer.forward(input.clone());
            assert_eq!(output.dims(), [3, 5, d_output]);
            let (weight, bias) =
                (values(layer.effective_weight()), values(layer.bias.as_ref().unwrap().val()));
            let rows = values(input);
            for (input, output) in rows.chunks(d_input).zip(values(output).chunks(d_output)) {
                let input = prepared(input, &quant);
                for (channel, found) in output.iter().enumerate() {
                    let products = input.iter().enumerate().map(|(i, x)| x * weight[i * d_output + channel]);
                    let expected = products.sum::<f64>() + bias[channel];
                    assert!((found - expected).abs() < 1e-4, "{found} for {expected}: {quant:?}");
                }
            }
        }
    }

    #[test]
    fn the_effective_weight_is_scale_times_code_by_group() {
        let dims = [16, 6];
        // Who shares a scale with weight (input, channel).
        type Scales = fn(usize, usize) -> usize;
        let groups: [(Granularity, Scales); 3] = [
            (Granularity::PerTensor, |_, _| 0),
            (Granularity::PerChannel, |_, channel| channel),
            (Granularity::PerGroup(4), |input, channel| input / 4 * 6 + channel),
        ];
        for (granularity, group) in groups {
            let layer = layer(dims, with(granularity), &ScheduleHandle::default());
            let latent = values(layer.weight.val());
            let group = |index: usize| group(index / dims[1], index % dims[1]);
            let effective = values(layer.effective_weight());
            let codes = values(layer.codes().unwrap());
            for index in 0..latent.len() {
                let shared = (0..latent.len()).filter(|other| group(*other) == group(index));
                let magnitudes: Vec<f64> = shared.map(|other| latent[other].abs()).collect();
                let mean = magnitudes.iter().sum::<f64>() / magnitudes.len() as f64;
                let scale = half::f16::from_f64(mean).to_f64();
                let code = (latent[index] / scale).clamp(-1.0, 1.0).round_ties_even();
                assert_eq!(codes[index], code, "{granularity:?}");
                assert!((effective[index] - scale * code).abs() < 1e-7, "{granularity:?}");
            }
            let zeros = codes.iter().filter(|code| **code == 0.0).count();
            assert!(zeros > 0);
            assert!((layer.zero_fraction().unwrap() - zeros as f64 / 96.0).abs() < 1e-9);
        }
    }

    #[test]
    fn packed_size_is_five_codes_a_byte_and_two_bytes_a_scale() {
        let codes = (128 * 64usize).div_ceil(5);
        for (granularity, scales) in
            [(Granularity::PerChannel, 64), (Granularity::PerGroup(64), 2 * 64), (Granularity::PerTensor, 1)]
        {
            let layer = layer([128, 64], with(granularity), &ScheduleHandle::default());
            let bytes = codes + 2 * scales;
            assert_eq!(layer.packed_bytes(), bytes);
            let bits = bytes as f64 * 8.0 / (128.0 * 64.0);
            assert!((layer.bits_per_weight() - bits).abs() < 1e-12);
            assert!((layer.compression_ratio() - (128.0 * 64.0 * 4.0) / bytes as f64).abs() < 1e-12);
            assert!(layer.compression_ratio() < 32.0 / 3f64.log2());
        }
        let float = layer([128, 64], QuantConfig::default().float(), &ScheduleHandle::default());
        assert_eq!((float.packed_bytes(), float.bits_per_weight()), (128 * 64 * 4, 32.0));
        assert_eq!(float.compression_ratio(), 1.0);
        assert!(float.codes().is_none() && float.zero_fraction().is_none());
    }

    #[test]
    fn lambda_goes_from_the_float_layer_to_the_ternary_one() {
        let quant = QuantConfig { activations: ActivationPrecision::Int8, ..QuantConfig::default() };
        let schedule = ScheduleHandle::default();
        let ternary = layer([24, 7], quant.clone(), &schedule);
        let mut float = layer([24, 7], quant.float(), &schedule);
        float.bias = ternary.bias.clone();
        let input = random([4, 24]);
        let full = values(ternary.effective_weight());
        schedule.lambda.set(0.0);
        assert_eq!(values(ternary.forward(input.clone())), values(float.forward(input)));
        schedule.lambda.set(0.25);
        let latent = values(float.weight.val());
        for ((found, latent), full) in values(ternary.effective_weight()).iter().zip(latent).zip(full) {
            assert!((found - (0.75 * latent + 0.25 * full)).abs() < 1e-6);
        }
    }
}
