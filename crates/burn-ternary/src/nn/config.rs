//! The shape of a model: the `[model]` section of an experiment, and the named presets.

use crate::invalid_value::{InvalidValue, require};
use getset::WithSetters;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use ternary_format::ModelSpec;
pub use ternary_format::{Activation, Family};

/// Floating-point type of all computations except norms, the loss and latent weights, which are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MixedPrecision {
    /// 32 bits: no mixed precision.
    F32,
    /// bfloat16.
    Bf16,
    /// Half precision.
    F16,
}

/// The `[model]` section of an experiment: the architecture of a Duck, a decoder-only transformer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema, WithSetters)]
#[serde(default, deny_unknown_fields)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct DuckConfig {
    /// Architecture family. It determines norms, position encoding, biases and sub-norms.
    pub family: Family,
    /// Number of token ids; 0: as many as the tokenizer has. A larger number than the tokenizer's leaves the rest unused.
    pub vocab_size: usize,
    /// Context length: the maximum sequence length, in tokens.
    pub context: usize,
    /// Width of the hidden states. GGUF's ternary types need a multiple of 256 (TQ2_0, TQ1_0) or 64 (Q2_0).
    pub d_model: usize,
    /// Number of transformer blocks.
    pub n_layers: usize,
    /// Number of attention heads; a divisor of `d_model`.
    pub n_heads: usize,
    /// Number of key and value heads, a divisor of `n_heads`: fewer are grouped-query attention, `n_heads` are multi-head attention.
    pub n_kv_heads: usize,
    /// Width of the feed-forward layers; the same multiples as for `d_model`.
    pub d_ff: usize,
    /// Activation function of the feed-forward layers. The gpt2 family has `"gelu"` or `"squared_relu"`, the others `"swiglu"` or
    /// `"squared_relu"`.
    pub activation: Activation,
    /// Dropout probability on embeddings and on the outputs of attention and feed-forward layers; at least 0, below 1.
    pub dropout: f64,
    /// Whether the output head shares the weights of the token embedding (`tie_word_embeddings` in transformers).
    pub tied: bool,
    /// Epsilon of the norms, added to the variance; above 0, below 1.
    pub norm_eps: f64,
    /// Base of the rotary position embedding (RoPE); the gpt2 family ignores it. At least 1.
    pub rope_theta: f64,
    /// Mixed precision: the floating-point type of all computations except norms, the loss and latent weights, which are f32.
    pub mixed_precision: MixedPrecision,
}

impl Default for DuckConfig {
    /// [`duck_tiny`](Self::duck_tiny) with the vocabulary of the tokenizer.
    fn default() -> Self {
        Self { vocab_size: 0, ..Self::duck_tiny() }
    }
}

/// Maximum width, context or vocabulary: far above any model, and low enough that no product of sizes overflows.
const LARGEST_SIZE: usize = 1 << 20;

/// Number of parameters by kind, without the scales of learned quantizers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParameterCount {
    /// Weights of the linear layers inside the blocks, which are ternary.
    pub matrices: usize,
    /// The token embedding; also the head if they are tied.
    pub embedding: usize,
    /// An untied head.
    pub head: usize,
    /// Biases, norms and learned positions: always float.
    pub other: usize,
}

impl ParameterCount {
    /// All parameters.
    pub fn total(&self) -> usize {
        self.matrices + self.embedding + self.head + self.other
    }
}

impl DuckConfig {
    /// About a million parameters: trains in minutes on two cores.
    pub fn duck_tiny() -> Self {
        Self {
            family: Family::Llama,
            vocab_size: 1024,
            context: 128,
            d_model: 128,
            n_layers: 4,
            n_heads: 4,
            n_kv_heads: 4,
            d_ff: 384,
            activation: Activation::Swiglu,
            dropout: 0.0,
            tied: true,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
            mixed_precision: MixedPrecision::F32,
        }
    }

    /// About ten million parameters; every matrix row is a multiple of 256, the block of GGUF's ternary types.
    pub fn duck_small() -> Self {
        Self { vocab_size: 4096, context: 256, d_model: 256, n_layers: 8, d_ff: 1024, ..Self::duck_tiny() }
    }

    /// The reference model: the shape of GPT-2 small with a vocabulary of 32,000.
    pub fn duck() -> Self {
        Self { vocab_size: 32_000, ..Self::gpt2_small() }
    }

    /// GPT-2 small.
    ///
    /// # Source
    /// `config.json` of `openai-community/gpt2` (Radford et al. 2019, table 2).
    pub fn gpt2_small() -> Self {
        Self {
            family: Family::Gpt2,
            vocab_size: 50_257,
            context: 1024,
            d_model: 768,
            n_layers: 12,
            n_heads: 12,
            n_kv_heads: 12,
            d_ff: 3072,
            activation: Activation::Gelu,
            ..Self::duck_tiny()
        }
    }

    /// GPT-2 medium.
    ///
    /// # Source
    /// `config.json` of `openai-community/gpt2-medium` (Radford et al. 2019, table 2).
    pub fn gpt2_medium() -> Self {
        Self { d_model: 1024, n_layers: 24, n_heads: 16, n_kv_heads: 16, d_ff: 4096, ..Self::gpt2_small() }
    }

    /// Llama 2 7B.
    ///
    /// # Source
    /// `config.json` of `meta-llama/Llama-2-7b-hf` (Touvron et al. 2023, table 1).
    pub fn llama_2_7b() -> Self {
        Self {
            vocab_size: 32_000,
            context: 4096,
            d_model: 4096,
            n_layers: 32,
            n_heads: 32,
            n_kv_heads: 32,
            d_ff: 11_008,
            tied: false,
            ..Self::duck_tiny()
        }
    }

    /// A preset by its name, written with hyphens: `duck-tiny`, `duck-small`, `duck`, `gpt2-small`, `gpt2-medium`
    /// or `llama-2-7b`.
    pub fn preset(name: &str) -> Option<Self> {
        Some(match name {
            "duck-tiny" => Self::duck_tiny(),
            "duck-small" => Self::duck_small(),
            "duck" => Self::duck(),
            "gpt2-small" => Self::gpt2_small(),
            "gpt2-medium" => Self::gpt2_medium(),
            "llama-2-7b" => Self::llama_2_7b(),
            _ => return None,
        })
    }

    /// The shape in the terms of model files.
    pub fn spec(&self) -> ModelSpec {
        ModelSpec::new(self.family)
            .with_vocab_size(self.vocab_size)
            .with_context(self.context)
            .with_d_model(self.d_model)
            .with_n_layers(self.n_layers)
            .with_n_heads(self.n_heads)
            .with_n_kv_heads(self.n_kv_heads)
            .with_d_ff(self.d_ff)
            .with_activation(self.activation)
            .with_tied(self.tied)
            .with_norm_eps(self.norm_eps as f32)
            .with_rope_theta(self.rope_theta as f32)
    }

    /// The shape that a model file describes, without dropout and computed in f32.
    pub fn from_spec(spec: &ModelSpec) -> Self {
        Self {
            family: spec.family,
            vocab_size: spec.vocab_size,
            context: spec.context,
            d_model: spec.d_model,
            n_layers: spec.n_layers,
            n_heads: spec.n_heads,
            n_kv_heads: spec.n_kv_heads,
            d_ff: spec.d_ff,
            activation: spec.activation,
            dropout: 0.0,
            tied: spec.tied,
            norm_eps: spec.norm_eps.into(),
            rope_theta: spec.rope_theta.into(),
            mixed_precision: MixedPrecision::F32,
        }
    }

    /// Whether the feed-forward block has a gate: in all families but gpt2.
    pub fn is_gated(&self) -> bool {
        self.family != Family::Gpt2
    }

    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.d_model / self.n_heads
    }

    /// Number of parameters by arithmetic; nothing is allocated. `vocab_size` must not be 0.
    pub fn count(&self) -> ParameterCount {
        let (d, d_ff, kv) = (self.d_model, self.d_ff, self.n_kv_heads * self.head_dim());
        let attention = 2 * d * d + 2 * d * kv;
        let feed_forward = if self.is_gated() { 3 } else { 2 } * d * d_ff;
        let table = self.vocab_size * d;
        // Biases of q, k, v, o, up and down; two LayerNorms of weight and bias. Or weights of two RMS norms.
        let gpt2_block = (4 * d + d_ff + d) + 2 * 2 * d;
        let llama_block = 2 * d;
        let other = match self.family {
            Family::Gpt2 => self.n_layers * gpt2_block + 2 * d + self.context * d,
            Family::Llama => self.n_layers * llama_block + d,
            Family::Bitnet => self.n_layers * (llama_block + d + d_ff) + d,
        };
        ParameterCount {
            matrices: self.n_layers * (attention + feed_forward),
            embedding: table,
            head: if self.tied { 0 } else { table },
            other,
        }
    }

    /// Number of all parameters; see [`Self::count`].
    pub fn num_params(&self) -> usize {
        self.count().total()
    }

    /// Checks that a model of this shape can be built.
    ///
    /// # Errors
    /// The first setting that is out of range or does not fit the others.
    pub fn validate(&self) -> Result<(), InvalidValue> {
        let size = |key, n| {
            let holds = (1..=LARGEST_SIZE).contains(&n);
            require(holds, key, n, format!("1 to {LARGEST_SIZE}"))
        };
        let Self { d_model, n_heads, n_kv_heads, .. } = *self;
        require(
            self.vocab_size <= LARGEST_SIZE,
            "vocab_size",
            self.vocab_size,
            format!("0 (the tokenizer's) to {LARGEST_SIZE}"),
        )?;
        size("context", self.context)?;
        size("d_model", d_model)?;
        require((1..=1000).contains(&self.n_layers), "n_layers", self.n_layers, "1 to 1000")?;
        size("n_heads", n_heads)?;
        require(
            d_model.is_multiple_of(n_heads),
            "n_heads",
            n_heads,
            format!("a divisor of d_model = {d_model}"),
        )?;
        size("n_kv_heads", n_kv_heads)?;
        size("d_ff", self.d_ff)?;
        self.check_family()?;
        require((0.0..1.0).contains(&self.dropout), "dropout", self.dropout, "at least 0 and below 1")?;
        let small = self.norm_eps > 0.0 && self.norm_eps < 1.0;
        require(small, "norm_eps", self.norm_eps, "above 0 and below 1")?;
        let finite = self.rope_theta >= 1.0 && self.rope_theta.is_finite();
        require(finite, "rope_theta", self.rope_theta, "a finite number, at least 1")
    }

    /// Checks the heads and the activation that the family allows.
    fn check_family(&self) -> Result<(), InvalidValue> {
        let Self { n_heads, n_kv_heads, .. } = *self;
        let activations: (&[Activation], &str) = match self.family {
            Family::Gpt2 => {
                require(
                    n_kv_heads == n_heads,
                    "n_kv_heads",
                    n_kv_heads,
                    format!("n_heads = {n_heads}, as gpt2 has no grouped-query attention"),
                )?;
                (&[Activation::Gelu, Activation::SquaredRelu], "gelu or squared_relu in the gpt2 family")
            }
            Family::Llama | Family::Bitnet => {
                require(
                    n_heads.is_multiple_of(n_kv_heads),
                    "n_kv_heads",
                    n_kv_heads,
                    format!("a divisor of n_heads = {n_heads}"),
                )?;
                require(
                    self.head_dim().is_multiple_of(2),
                    "n_heads",
                    n_heads,
                    format!("an even d_model / n_heads for rotary positions, not {}", self.head_dim()),
                )?;
                (
                    &[Activation::Swiglu, Activation::SquaredRelu],
                    "swiglu or squared_relu in the llama and bitnet families",
                )
            }
        };
        require(activations.0.contains(&self.activation), "activation", self.activation, activations.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRESETS: [&str; 6] = ["duck-tiny", "duck-small", "duck", "gpt2-small", "gpt2-medium", "llama-2-7b"];

    #[test]
    fn published_models_have_their_published_parameter_counts() {
        assert_eq!(DuckConfig::gpt2_small().num_params(), 124_439_808);
        assert_eq!(DuckConfig::gpt2_medium().num_params(), 354_823_168);
        assert_eq!(DuckConfig::llama_2_7b().num_params(), 6_738_415_616);
        // Llama 2 70B has grouped-query attention: 68,976,648,192.
        let llama_2_70b = DuckConfig {
            d_model: 8192,
            n_layers: 80,
            n_heads: 64,
            n_kv_heads: 8,
            d_ff: 28_672,
            ..DuckConfig::llama_2_7b()
        };
        assert_eq!(llama_2_70b.num_params(), 68_976_648_192);
    }

    #[test]
    fn bitnet_adds_sub_norms_before_output_and_down_projection() {
        let llama = DuckConfig::duck_tiny();
        let bitnet = DuckConfig { family: Family::Bitnet, ..llama.clone() };
        assert_eq!(bitnet.count().other - llama.count().other, 4 * (128 + 384));
        assert_eq!(bitnet.count().matrices, llama.count().matrices);
    }

    #[test]
    fn duck_sizes_are_what_their_names_promise() {
        assert!((900_000..1_100_000).contains(&DuckConfig::duck_tiny().num_params()));
        assert!((9_000_000..11_000_000).contains(&DuckConfig::duck_small().num_params()));
        let duck = DuckConfig::duck();
        assert_eq!((duck.d_model, duck.n_layers, duck.n_heads, duck.d_ff), (768, 12, 12, 3072));
        assert_eq!(duck.head_dim(), 64);
    }

    #[test]
    fn presets_are_valid_and_distinct() {
        let presets = PRESETS.map(|name| DuckConfig::preset(name).expect(name));
        for (i, preset) in presets.iter().enumerate() {
            preset.validate().unwrap();
            assert!(!presets[..i].contains(preset));
        }
        assert_eq!(DuckConfig::preset("duck_tiny"), None);
    }

    #[test]
    fn a_shape_that_cannot_be_built_is_refused_by_key() {
        let gpt2 = DuckConfig::gpt2_small;
        let tiny = DuckConfig::duck_tiny;
        for (config, key) in [
            (DuckConfig { context: 0, ..tiny() }, "context"),
            (DuckConfig { d_model: 1 << 40, ..tiny() }, "d_model"),
            (DuckConfig { n_layers: 0, ..tiny() }, "n_layers"),
            (DuckConfig { n_heads: 0, ..tiny() }, "n_heads"),
            (DuckConfig { n_heads: 5, ..tiny() }, "n_heads"),
            (DuckConfig { n_heads: 128, n_kv_heads: 128, ..tiny() }, "n_heads"),
            (DuckConfig { n_kv_heads: 0, ..tiny() }, "n_kv_heads"),
            (DuckConfig { n_kv_heads: 3, ..tiny() }, "n_kv_heads"),
            (DuckConfig { n_kv_heads: 4, ..gpt2() }, "n_kv_heads"),
            (DuckConfig { d_ff: 0, ..tiny() }, "d_ff"),
            (DuckConfig { activation: Activation::Swiglu, ..gpt2() }, "activation"),
            (DuckConfig { activation: Activation::Gelu, ..tiny() }, "activation"),
            (DuckConfig { dropout: 1.0, ..tiny() }, "dropout"),
            (DuckConfig { dropout: f64::NAN, ..tiny() }, "dropout"),
            (DuckConfig { norm_eps: 0.0, ..tiny() }, "norm_eps"),
            (DuckConfig { rope_theta: f64::INFINITY, ..tiny() }, "rope_theta"),
        ] {
            let error = config.validate().expect_err(key);
            assert_eq!(error.key, key, "{error}");
        }
        let error = DuckConfig { activation: Activation::Swiglu, ..gpt2() }.validate().unwrap_err();
        assert_eq!(
            error.to_string(),
            "`activation` is \"swiglu\", expected gelu or squared_relu in the gpt2 family"
        );
    }
}
