//! `config.json`, to and from a [`ModelSpec`].

use crate::{
    Activation, Family, FormatError, ModelSpec,
    key::{self, KeyTable},
};
use serde::Deserialize;
use serde_json::{Value, json};

/// A `Spec` error: an unsupported value of a setting.
fn unsupported(key: &'static str, found: impl ToString, expected: &str) -> FormatError {
    FormatError::Spec { key, found: found.to_string(), expected: expected.into() }
}

/// Keys of all families. Many belong to models that share the tensor names of llama and compute something else.
const COMMON: KeyTable = KeyTable {
    prefix: "",
    used: &["model_type", "vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id"],
    fixed: &[
        ("add_cross_attention", "false"),
        ("attention_multiplier", "null"),
        ("attn_logit_softcapping", "null"),
        ("clip_qkv", "null"),
        ("embedding_multiplier", "1 or null"),
        ("embedding_scale", "1 or null"),
        ("final_logit_softcapping", "null"),
        ("is_encoder_decoder", "false"),
        ("logit_scale", "1 or null"),
        ("logits_scaling", "1 or null"),
        ("num_experts", "0 or null"),
        ("num_local_experts", "0 or null"),
        ("pruned_heads", "null"),
        ("quantization", "null"),
        ("quantization_config", "null"),
        ("query_pre_attn_scalar", "null"),
        ("residual_multiplier", "1 or null"),
        ("scale_depth", "null"),
        ("scale_emb", "1 or null"),
        ("use_parallel_residual", "false or null"),
    ],
    neutral: &[
        "_*",
        "architectures",
        "attention_dropout",
        "bad_words_ids",
        "begin_suppress_tokens",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_*",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "is_decoder",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_*",
        "pad_token_id",
        "prefix",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict*",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "unk_token_id",
        "unsloth_*",
        "use_bfloat16",
        "use_cache",
    ],
};

const GPT2_KEYS: KeyTable = KeyTable {
    prefix: "",
    used: &[
        "n_positions",
        "n_embd",
        "n_layer",
        "n_head",
        "n_inner",
        "activation_function",
        "layer_norm_epsilon",
    ],
    fixed: &[("scale_attn_weights", "true"), ("scale_attn_by_inverse_layer_idx", "false")],
    // Here, attention is always computed in f32.
    neutral: &["attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "reorder_and_upcast_attn", "summary_*"],
};

const LLAMA_KEYS: KeyTable = KeyTable {
    prefix: "",
    used: &[
        "max_position_embeddings",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "rms_norm_eps",
        "rope_theta",
    ],
    fixed: &[
        ("attention_bias", "false or null"),
        ("attention_out_bias", "false or null"),
        ("layer_types", "\"full_attention\" or null"),
        ("mlp_bias", "false or null"),
        ("mlp_layer_types", "\"dense\" or null"),
        ("no_rope_layers", "1 or null"),
        ("partial_rotary_factor", "1 or null"),
        ("qk_layernorm", "false or null"),
        ("qk_norm", "false or null"),
        ("qkv_bias", "false or null"),
        ("rope_interleaved", "false or null"),
        ("rope_parameters", "null"),
        ("rope_pct", "1 or null"),
        ("rope_scaling", "null"),
        ("rotary_dim", "null"),
        ("rotary_pct", "1 or null"),
        ("sliding_window", "null"),
        ("use_bias", "false or null"),
        ("use_qk_norm", "false or null"),
        ("use_sliding_window", "false or null"),
    ],
    // `pretraining_tp` splits products into parts with the same sums.
    neutral: &["max_window_layers", "original_max_position_embeddings", "pretraining_tp", "rope_type"],
};

/// Keys of `rope_parameters`, and of `rope_scaling`, its name before transformers 5.
const fn rope_keys(prefix: &str) -> KeyTable<'_> {
    KeyTable {
        prefix,
        used: &["rope_theta"],
        fixed: &[
            ("rope_type", "\"default\""),
            ("type", "\"default\""),
            ("factor", "1 or null"),
            ("attention_factor", "1 or null"),
            ("partial_rotary_factor", "1 or null"),
            ("full_attention", "null"),
            ("sliding_attention", "null"),
            ("mrope_section", "null"),
        ],
        neutral: &["original_max_position_embeddings", "beta_*", "finetuned", "truncate"],
    }
}

const QUANTIZATION_KEYS: KeyTable = KeyTable {
    prefix: "quantization_config.",
    used: &["quant_method", "linear_class", "quantization_mode", "use_rms_norm"],
    fixed: &[],
    neutral: &["modules_to_not_convert", "rms_norm_eps"],
};

#[derive(Deserialize)]
struct Gpt2 {
    vocab_size: usize,
    n_positions: usize,
    n_embd: usize,
    n_layer: usize,
    n_head: usize,
    n_inner: Option<usize>,
    #[serde(default = "gelu_new")]
    activation_function: String,
    #[serde(default = "layer_norm_epsilon")]
    layer_norm_epsilon: f32,
}

fn gelu_new() -> String {
    "gelu_new".into()
}

fn layer_norm_epsilon() -> f32 {
    1e-5
}

#[derive(Deserialize)]
struct Llama {
    vocab_size: usize,
    max_position_embeddings: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    hidden_act: String,
    rms_norm_eps: f32,
    rope_theta: Option<f32>,
    /// Since transformers 5, in place of `rope_theta` and `rope_scaling`.
    rope_parameters: Option<Rope>,
    rope_scaling: Option<Rope>,
}

#[derive(Deserialize)]
struct Rope {
    rope_theta: Option<f32>,
}

/// How the matrices of a BitNet checkpoint are packed.
#[derive(Deserialize)]
pub(super) struct Quantization {
    quant_method: String,
    #[serde(default = "bitlinear")]
    linear_class: String,
    #[serde(default = "offline")]
    quantization_mode: String,
    #[serde(default)]
    use_rms_norm: bool,
}

fn bitlinear() -> String {
    "bitlinear".into()
}

fn offline() -> String {
    "offline".into()
}

/// The content of a `config.json`.
pub(super) struct Config {
    pub spec: ModelSpec,
    /// `tie_word_embeddings`, if it is set.
    pub tied: Option<bool>,
    pub quantization: Option<Quantization>,
    /// Warning about unknown keys.
    pub warning: Option<String>,
}

impl Quantization {
    /// Returns whether a weight is `code / weight_scale`, not `code * weight_scale`.
    pub fn is_inverse(&self) -> bool {
        self.linear_class == "bitlinear"
    }

    fn check(&self) -> Result<(), FormatError> {
        if self.quant_method != "bitnet" {
            return Err(unsupported("quantization_config.quant_method", &self.quant_method, "bitnet"));
        }
        if self.quantization_mode != "offline" {
            let expected =
                "offline: online checkpoints store latent weights, which have to be trained and packed first";
            return Err(unsupported(
                "quantization_config.quantization_mode",
                &self.quantization_mode,
                expected,
            ));
        }
        if !["autobitlinear", "bitlinear"].contains(&&*self.linear_class) {
            let expected = "autobitlinear or bitlinear";
            return Err(unsupported("quantization_config.linear_class", &self.linear_class, expected));
        }
        if self.use_rms_norm {
            return Err(unsupported("quantization_config.use_rms_norm", true, "false"));
        }
        Ok(())
    }
}

impl Config {
    /// Parses a `config.json`.
    ///
    /// # Errors
    /// `Json`: not JSON, or a setting that is missing or of another type. `Spec`, `Value`: an unsupported setting.
    pub fn parse(json: &[u8]) -> Result<Self, FormatError> {
        let value: Value = serde_json::from_slice(json)?;
        let family = match value["model_type"].as_str().unwrap_or_default() {
            "gpt2" => Family::Gpt2,
            "llama" => Family::Llama,
            "bitnet" => Family::Bitnet,
            other => return Err(unsupported("model_type", other, "gpt2, llama or bitnet")),
        };
        let warning = check_keys(family, &value)?;
        let mut spec = match family {
            Family::Gpt2 => gpt2(Gpt2::deserialize(&value)?)?,
            Family::Llama | Family::Bitnet => llama(Llama::deserialize(&value)?)?,
        };
        spec.family = family;
        let quantization = Option::<Quantization>::deserialize(&value["quantization_config"])?;
        quantization.as_ref().map_or(Ok(()), Quantization::check)?;
        spec.validate()?;
        let tied = Option::<bool>::deserialize(&value["tie_word_embeddings"]).map_err(|_| {
            unsupported("tie_word_embeddings", &value["tie_word_embeddings"], "true, false or null")
        })?;
        Ok(Self { spec, tied, quantization, warning })
    }
}

/// Returns a warning about unknown keys.
///
/// # Errors
/// `Value`: a key that changes what the model computes.
fn check_keys(family: Family, config: &Value) -> Result<Option<String>, FormatError> {
    let own = if family == Family::Gpt2 { GPT2_KEYS } else { LLAMA_KEYS };
    let [parameters, scaling] = ["rope_parameters.", "rope_scaling."].map(rope_keys);
    let nested = ["rope_parameters", "rope_scaling", "quantization_config"];
    let entries = config.as_object().map(|config| key::entries(config, &nested)).unwrap_or_default();
    key::check(&[COMMON, own, parameters, scaling, QUANTIZATION_KEYS], "config.json", entries)
}

fn gpt2(config: Gpt2) -> Result<ModelSpec, FormatError> {
    Ok(ModelSpec {
        family: Family::Gpt2,
        vocab_size: config.vocab_size,
        context: config.n_positions,
        d_model: config.n_embd,
        n_layers: config.n_layer,
        n_heads: config.n_head,
        n_kv_heads: config.n_head,
        d_ff: config.n_inner.unwrap_or(config.n_embd.saturating_mul(4)),
        activation: match config.activation_function.as_str() {
            "gelu_new" | "gelu_pytorch_tanh" => Activation::Gelu,
            "relu2" => Activation::SquaredRelu,
            other => return Err(unsupported("activation_function", other, "gelu_new or relu2")),
        },
        tied: true,
        norm_eps: config.layer_norm_epsilon,
        rope_theta: 10_000.0,
    })
}

fn llama(config: Llama) -> Result<ModelSpec, FormatError> {
    let rope = config.rope_scaling.or(config.rope_parameters);
    let (d_model, n_heads) = (config.hidden_size, config.num_attention_heads);
    if let Some(head_dim) = config.head_dim.filter(|dim| dim.checked_mul(n_heads) != Some(d_model)) {
        return Err(unsupported("head_dim", head_dim, "hidden_size / num_attention_heads"));
    }
    Ok(ModelSpec {
        family: Family::Llama,
        vocab_size: config.vocab_size,
        context: config.max_position_embeddings,
        d_model,
        n_layers: config.num_hidden_layers,
        n_heads,
        n_kv_heads: config.num_key_value_heads.unwrap_or(n_heads),
        d_ff: config.intermediate_size,
        activation: match config.hidden_act.as_str() {
            "silu" => Activation::Swiglu,
            "relu2" => Activation::SquaredRelu,
            other => return Err(unsupported("hidden_act", other, "silu or relu2")),
        },
        tied: false,
        norm_eps: config.rms_norm_eps,
        rope_theta: rope.and_then(|rope| rope.rope_theta).or(config.rope_theta).unwrap_or(10_000.0),
    })
}

/// The `config.json` of a spec, without token ids.
pub(super) fn to_json(spec: &ModelSpec, dtype: &str, packed: bool) -> Value {
    // The shortest decimal that parses to the same f32.
    let float = |value: f32| value.to_string().parse::<f64>().expect("a number");
    let mut config = match spec.family {
        Family::Gpt2 => json!({
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_positions": spec.context,
            "n_embd": spec.d_model,
            "n_layer": spec.n_layers,
            "n_head": spec.n_heads,
            "n_inner": spec.d_ff,
            "activation_function": if spec.activation == Activation::Gelu { "gelu_new" } else { "relu2" },
            "layer_norm_epsilon": float(spec.norm_eps),
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }),
        Family::Llama | Family::Bitnet => {
            let bitnet = spec.family == Family::Bitnet;
            json!({
                "architectures": [if bitnet { "BitNetForCausalLM" } else { "LlamaForCausalLM" }],
                "model_type": if bitnet { "bitnet" } else { "llama" },
                "max_position_embeddings": spec.context,
                "hidden_size": spec.d_model,
                "intermediate_size": spec.d_ff,
                "num_hidden_layers": spec.n_layers,
                "num_attention_heads": spec.n_heads,
                "num_key_value_heads": spec.n_kv_heads,
                "head_dim": spec.head_dim(),
                "hidden_act": if spec.activation == Activation::Swiglu { "silu" } else { "relu2" },
                "rms_norm_eps": float(spec.norm_eps),
                "rope_theta": float(spec.rope_theta),
                "attention_bias": false,
                "mlp_bias": false,
            })
        }
    };
    config["vocab_size"] = spec.vocab_size.into();
    config["tie_word_embeddings"] = spec.tied.into();
    config["torch_dtype"] = dtype.into();
    if packed {
        // In this class, `weight_scale` is the scale itself, so f16 scales are exact.
        config["quantization_config"] = json!({
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        });
    }
    config
}
