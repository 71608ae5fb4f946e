//! The `[quant]` section of an experiment: what is quantized, and how.

use crate::ops::FactorPrecision;
use getset::WithSetters;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The weights that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// One scale for the whole matrix.
    PerTensor,
    /// One scale per output channel (a row of a PyTorch or GGUF weight).
    PerChannel,
    /// One scale per group of this many consecutive inputs of an output channel.
    PerGroup(usize),
}

/// The rule that determines the scale of the weights that share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScaleRule {
    /// `mean |w|` (BitNet b1.58).
    Absmean,
    /// `median |w|` (BitNet b1.58 Reloaded).
    Absmedian,
    /// Zero where `|w| <= 0.7 mean |w|`; scale is the mean of the kept `|w|` (ternary weight networks).
    Twn,
    /// A parameter, trained by the gradient of learned step size quantization (LSQ).
    Learned,
    /// A parameter, balanced levels `{-2/3, 0, 2/3} a` (stretched elastic quantization, ParetoQ).
    Seq,
    /// Two parameters, one for positive and one for negative weights, with the codes of absmean: zero where
    /// `|w| <= threshold mean |w|` (trained ternary quantization). No file format stores two.
    Ttq,
}

/// Which weights are zero, if selected by rank instead of by the threshold of the scale.
///
/// The weights with the smallest magnitudes are zero, including all that tie with the largest of them. All others have the
/// code of their sign, so codes do not depend on the scale; computed scales are those of the kept weights.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sparsity {
    /// By the threshold of the scale.
    None,
    /// This share of the `n` weights that share a scale: `round(fraction n)`, at most `n - 1`. In (0, 1).
    ZeroFraction(f64),
    /// All but the `N` largest of each `M` consecutive inputs of an output channel, `[N, M]`.
    NOfM([usize; 2]),
}

/// Gradient estimator: the gradient of the weight, since rounding has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Estimator {
    /// `dw = G` everywhere.
    Identity,
    /// `dw = G` inside the clipping range of a learned scale, 0 outside.
    Masked,
    /// While the schedule blends, training multiplies soft weights instead of a blend, with their own gradient:
    /// `scale / 2 (tanh((w - threshold) / 2Ts) + tanh((w + threshold) / 2Ts))`, where `s` is the scale and
    /// `T = 0.5 * 10^-lambda`. They are hard outside of training, and from `ramp_until` on, with `dw = G`.
    Annealed,
}

/// Precision of the activations that a quantized linear layer multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ActivationPrecision {
    /// Not quantized.
    Float,
    /// Fake-quantized to int8 with one absmax scale per token.
    Int8,
}

/// How the three matrix products of a ternary layer are computed: `y = x W`, and backward `dx = dy W^T` and `dW = x^T dy`.
/// Sums are never rounded below 32 bits. The three products of the head, which is no ternary layer, have bfloat16 factors in
/// all but the first.
///
/// | | y | dx | dW |
/// |---|---|---|---|
/// | `float` | float | float | float |
/// | `bf16` | bfloat16 | bfloat16 | bfloat16 |
/// | `int8_bf16` | int8 | int8 | bfloat16 |
/// | `int8` | int8 | int8 | int8 |
///
/// Factors are rounded to bfloat16 on CPUs with AMX, which multiplies them; on other CPUs they stay f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MatmulPrecision {
    /// In the model's float type, on fake quantized factors.
    Float,
    /// Of fake quantized factors rounded to bfloat16.
    Bf16,
    /// `y` and `dx` in int8, as the inference engine computes the forward pass, with `dy` rounded to int8 per token; `dW` in
    /// bfloat16.
    Int8Bf16,
    /// All in int8, with `dy` rounded per token for `dx` and per channel for `dW`.
    Int8,
}

impl MatmulPrecision {
    /// Whether activations and weights are multiplied as codes.
    pub fn is_integer(self) -> bool {
        matches!(self, Self::Int8 | Self::Int8Bf16)
    }

    /// The precision of factors of float products.
    pub(crate) fn factor_precision(self) -> FactorPrecision {
        match self {
            Self::Float => FactorPrecision::F32,
            Self::Bf16 | Self::Int8Bf16 | Self::Int8 => FactorPrecision::Bf16,
        }
    }
}

/// Precision of a table (token embedding, output head), with one scale per row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TablePrecision {
    /// Not quantized.
    Float,
    /// 8 bits per weight.
    Int8,
    /// 4 bits per weight.
    Int4,
    /// 2 bits per weight.
    Ternary,
}

/// The `[quant]` section of an experiment: which weights are quantized, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema, WithSetters)]
#[serde(default, deny_unknown_fields)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct QuantConfig {
    /// Whether weights are quantized; `false` trains the float twin: the same model without quantizers.
    pub enabled: bool,
    /// Rule that determines the scale of the weights that share one.
    pub scale: ScaleRule,
    /// Which weights share a scale.
    pub granularity: Granularity,
    /// Rounding threshold in units of the scale: the code of a weight is 0 where `|w| <= threshold * scale`. Ignored by `twn` and
    /// where `sparsity` selects the zeros. Above 0, below 1.
    pub threshold: f64,
    /// Zeros by rank instead of by threshold: a share of the weights that share a scale, or N:M, which keeps N of each M consecutive
    /// inputs.
    pub sparsity: Sparsity,
    /// Gradient estimator for the rounding (straight-through estimator).
    pub estimator: Estimator,
    /// Precision of the activations that ternary layers multiply.
    pub activations: ActivationPrecision,
    /// Precision of the matrix products of ternary layers in training. All but `"float"` require the device flex and
    /// `model.mixed_precision = "f32"`; `"int8"` and `"int8_bf16"` also require `activations = "int8"` and one scale per tensor or
    /// channel.
    pub matmul_precision: MatmulPrecision,
    /// Weight with which the sum of the zeroed weights of an output channel is added to its bias (Tequila, there 0.001), so that
    /// zeroed weights get a gradient; 0: off. Requires the gpt2 family, whose files have biases.
    pub dead_bias: f64,
    /// Adds an RMS norm without parameters before each ternary layer. No model file format can express it.
    pub input_norm: bool,
    /// Precision of the token embedding, and of a tied head.
    pub embedding: TablePrecision,
    /// Precision of an untied output head.
    pub head: TablePrecision,
    /// Weight in the loss of the mean squared distance between latent and quantized weights; 0: off.
    pub quantization_penalty: f64,
    /// Weight in the loss of the mean squared log distance between learned scales and their least-squares values; 0: off.
    pub scale_penalty: f64,
}

impl Default for QuantConfig {
    /// absmean, one scale per channel, weights only: the recipe with the most evidence for small models.
    fn default() -> Self {
        Self {
            enabled: true,
            scale: ScaleRule::Absmean,
            granularity: Granularity::PerChannel,
            threshold: 0.5,
            sparsity: Sparsity::None,
            estimator: Estimator::Identity,
            activations: ActivationPrecision::Float,
            matmul_precision: MatmulPrecision::Float,
            dead_bias: 0.0,
            input_norm: false,
            embedding: TablePrecision::Float,
            head: TablePrecision::Float,
            quantization_penalty: 0.0,
            scale_penalty: 0.0,
        }
    }
}

impl QuantConfig {
    /// The float twin of this configuration.
    pub fn float(self) -> Self {
        Self { enabled: false, ..self }
    }
}
