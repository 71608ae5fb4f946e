//! Metadata keys, tensor names and row orders of the architectures of llama.cpp.
//!
//! # Rotary attention
//!
//! RoPE in llama files pairs adjacent rows; [`rotary`](crate::rotary) converts their order. bitnet files have the order
//! that a model has in memory.
//!
//! # Fused tensors
//!
//! gpt2 files have one tensor `attn_qkv` of the rows of queries, keys and values, in this order.

use super::{
    GgufOptions,
    container::{Container, TensorInfo, Value, unexpected},
    vocabulary,
};
use crate::{Activation, Encoding, Family, FormatError, ModelSpec, PackedModel, key};

/// A tensor as it is stored in a file.
#[derive(Clone, Debug)]
pub(super) struct FileTensor {
    pub name: String,
    pub shape: Vec<usize>,
    /// Our tensors that it contains, with their number of rows.
    pub parts: Vec<(String, usize)>,
    /// Whether its rows are in the order of interleaved rotation.
    pub interleaved: bool,
}

impl FileTensor {
    pub(super) fn info(&self, encoding: Encoding) -> TensorInfo {
        TensorInfo { name: self.name.clone(), shape: self.shape.clone(), encoding }
    }

    /// Returns whether the tensor is a norm, a bias or the learned positions.
    pub(super) fn is_float(&self) -> bool {
        self.shape.len() == 1 || self.name == "position_embd.weight"
    }

    /// Checks that rows are whole blocks.
    pub(super) fn check_width(&self, encoding: Encoding) -> Result<(), FormatError> {
        let width = self.shape[self.shape.len() - 1];
        let block = encoding.block_weights();
        if encoding.ggml_type().is_none() {
            return Err(FormatError::ReadOnly { encoding }.in_tensor(&self.name));
        }
        if width.is_multiple_of(block) {
            return Ok(());
        }
        let setting = if self.name.contains("ffn_down") { "d_ff" } else { "d_model" };
        let narrower = if encoding.is_ternary() { Encoding::Q2_0 } else { Encoding::F16 };
        let fits = width.is_multiple_of(narrower.block_weights());
        let instead = if fits { narrower } else { Encoding::F16 };
        let instead = match self.name.as_str() {
            "token_embd.weight" | "output.weight" => {
                format!("use {instead} (`--embedding {instead}` of duck export)")
            }
            _ => format!("use {instead} (`--type {instead}` of duck export), a .ternary or an .onnx file"),
        };
        Err(FormatError::Width { setting, width, encoding, block, instead }.in_tensor(&self.name))
    }
}

/// Tensors of a file, in order. Lazy, as [`ModelSpec::tensors`] is.
pub(super) fn layout(spec: &ModelSpec) -> impl Iterator<Item = FileTensor> + use<> {
    let gpt2 = spec.family == Family::Gpt2;
    let llama = spec.family == Family::Llama;
    spec.tensors().filter_map(move |(name, mut shape)| {
        let rows = shape[0];
        if !gpt2 {
            // LLAMA_ROPE_TYPE_NORM (interleaved) in llama, LLAMA_ROPE_TYPE_NEOX (half rotation) in bitnet.
            let interleaved = llama && (name.ends_with("attn_q.weight") || name.ends_with("attn_k.weight"));
            return Some(FileTensor { parts: vec![(name.clone(), rows)], name, shape, interleaved });
        }
        if name.contains("attn_k.") || name.contains("attn_v.") {
            return None; // part of `attn_qkv`
        }
        let mut parts = vec![(name.clone(), rows)];
        if name.contains("attn_q.") {
            parts.extend(["attn_k.", "attn_v."].map(|part| (name.replace("attn_q.", part), rows)));
            shape[0] = 3 * rows;
        }
        Some(FileTensor { name: name.replace("attn_q.", "attn_qkv."), shape, parts, interleaved: false })
    })
}

/// Checks that llama.cpp computes the same as this model.
pub(super) fn check_llama_cpp(spec: &ModelSpec) -> Result<(), FormatError> {
    let (family, activation) = (spec.family, spec.activation);
    let not = |what: String, why: &str| Err(FormatError::NotInGguf { what, why: why.into() });
    if activation == Activation::SquaredRelu {
        let why = "llama.cpp supports gelu in gpt2, swiglu in llama and bitnet: train with that, or write another file type";
        return not(format!("activation squared_relu in the {} family", name(family)), why);
    }
    if family == Family::Bitnet && !spec.tied {
        let why = "llama.cpp's bitnet uses the token embedding as its head: train with tied = true";
        return not("an untied output head in the bitnet family".into(), why);
    }
    Ok(())
}

fn name(family: Family) -> &'static str {
    match family {
        Family::Gpt2 => "gpt2",
        Family::Llama => "llama",
        Family::Bitnet => "bitnet",
    }
}

/// Keys that this reader uses, without the prefix of the architecture.
const USED: &[&str] = &[
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.freq_base",
];

/// Keys with which llama.cpp would compute something else, and the values at which it does not. A zero means that the
/// key is not set.
const FIXED: &[(&str, &str)] = &[
    ("attention.causal", "true"),
    ("attention.clamp_kqv", "0"),
    ("attention.max_alibi_bias", "0"),
    ("attention.output_scale", "0 or 1"),
    ("attention.scale", "0"),
    ("attention.sliding_window", "0"),
    ("attention.temperature_length", "0"),
    ("attention.temperature_scale", "0"),
    ("attn_logit_softcapping", "0"),
    ("embedding_scale", "0 or 1"),
    ("expert_count", "0"),
    ("expert_shared_count", "0"),
    ("expert_used_count", "0"),
    ("final_logit_softcapping", "0"),
    ("logit_scale", "0 or 1"),
    ("nextn_predict_layers", "0"),
    ("no_rope_layer_interval", "0"),
    ("pooling_type", "0"),
    ("residual_scale", "0 or 1"),
    ("rope.dimension_sections", "0"),
    ("rope.scale_linear", "0 or 1"),
    ("rope.scaling.alpha", "0"),
    ("rope.scaling.attn_factor", "1"),
    // Scaling is linear if there is a factor and no type, so the factor decides.
    ("rope.scaling.factor", "0 or 1"),
    ("rope.scaling.type", "\"none\" or \"linear\""),
    ("rope.scaling.yarn_attn_factor", "1"),
    ("rope.scaling.yarn_ext_factor", "0"),
    ("use_parallel_residual", "false"),
];

/// Keys that do not change what a model computes.
const NEUTRAL: &[&str] = &[
    "decoder_start_token_id",
    "expert_feed_forward_length",
    "rope.freq_base_swa",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_*",
    "rope.scaling.yarn_log_multiplier",
    "tensor_data_layout",
    "vocab_size",
];

/// Keys without the prefix of an architecture.
const FILE: key::KeyTable = key::KeyTable {
    prefix: "",
    used: &[
        "burn_ternary.tokenizer.json",
        "general.alignment",
        "general.architecture",
        "general.name",
        "tokenizer.chat_template",
        "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.add_space_prefix",
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.scores",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.unknown_token_id",
        "tokenizer.huggingface.json",
    ],
    fixed: &[("general.type", "\"model\""), ("split.count", "0 or 1")],
    neutral: &[
        "general.*",
        "imatrix.*",
        "quantize.*",
        "split.*",
        "tokenizer.chat_template.*",
        "tokenizer.chat_templates",
        // The caller that encodes a text appends the end token.
        "tokenizer.ggml.add_eos_token",
        "tokenizer.ggml.added_tokens",
        "tokenizer.ggml.cls_token_id",
        "tokenizer.ggml.eom_token_id",
        "tokenizer.ggml.eot_token_id",
        "tokenizer.ggml.fim_*",
        "tokenizer.ggml.mask_token_id",
        "tokenizer.ggml.middle_token_id",
        "tokenizer.ggml.padding_token_id",
        "tokenizer.ggml.prefix_token_id",
        "tokenizer.ggml.seperator_token_id",
        "tokenizer.ggml.suffix_token_id",
        "tokenizer.ggml.token_type_count",
    ],
};

/// Metadata of a file.
pub(super) fn metadata(
    model: &PackedModel,
    options: &GgufOptions,
) -> Result<Vec<(String, Value)>, FormatError> {
    let spec = &model.spec;
    let architecture = name(spec.family);
    // LLAMA_FTYPE_*: the type of most of the file. llama.cpp only displays it.
    let file_type = match options.blocks {
        Encoding::F16 => 1,
        Encoding::Q4_0 => 2,
        Encoding::Q8_0 => 7,
        Encoding::Tq1_0 => 36,
        Encoding::Tq2_0 => 37,
        Encoding::Q2_0 => 41,
        _ => 0,
    };
    let mut keys = vec![
        ("general.architecture".to_string(), Value::Text(architecture.into())),
        ("general.name".into(), Value::Text(model.name.clone())),
        ("general.file_type".into(), Value::U32(file_type)),
        ("general.quantization_version".into(), Value::U32(2)),
    ];
    let mut key = |key: &str, value| keys.push((format!("{architecture}.{key}"), value));
    for (name, size) in [
        ("vocab_size", spec.vocab_size),
        ("context_length", spec.context),
        ("embedding_length", spec.d_model),
        ("block_count", spec.n_layers),
        ("feed_forward_length", spec.d_ff),
        ("attention.head_count", spec.n_heads),
        ("attention.head_count_kv", spec.n_kv_heads),
    ] {
        key(name, Value::U32(size as u32));
    }
    if spec.family == Family::Gpt2 {
        key("attention.layer_norm_epsilon", Value::F32(spec.norm_eps));
    } else {
        key("attention.layer_norm_rms_epsilon", Value::F32(spec.norm_eps));
        key("rope.dimension_count", Value::U32(spec.head_dim() as u32));
        key("rope.freq_base", Value::F32(spec.rope_theta));
    }
    match &model.tokenizer {
        Some(tokenizer) => keys.extend(vocabulary::metadata(tokenizer, spec.vocab_size)?),
        None => keys.push(("tokenizer.ggml.model".into(), Value::Text("no_vocab".into()))),
    }
    if let Some(template) = &model.chat_template {
        keys.push(("tokenizer.chat_template".into(), Value::Text(template.clone())));
    }
    Ok(keys)
}

/// Architecture and sizes of the model in a file.
pub(super) fn spec(container: &Container) -> Result<ModelSpec, FormatError> {
    let keys = ArchitectureKeys { container, architecture: text(container, "general.architecture")? };
    let family = match keys.architecture {
        "gpt2" => Family::Gpt2,
        "llama" => Family::Llama,
        "bitnet" => Family::Bitnet,
        found => return Err(FormatError::Architecture { found: found.into() }),
    };
    let gpt2 = family == Family::Gpt2;
    let n_heads = keys.size("attention.head_count", None)?;
    let epsilon = if gpt2 { "attention.layer_norm_epsilon" } else { "attention.layer_norm_rms_epsilon" };
    let embedding = "token_embd.weight";
    let vocab_size = container
        .shape(embedding)
        .and_then(|shape| shape.first())
        .ok_or_else(|| FormatError::MissingTensor { tensor: embedding.into() })?;
    let spec = ModelSpec {
        family,
        vocab_size: *vocab_size,
        context: keys.size("context_length", None)?,
        d_model: keys.size("embedding_length", None)?,
        n_layers: keys.size("block_count", None)?,
        n_heads,
        n_kv_heads: keys.size("attention.head_count_kv", Some(n_heads))?,
        d_ff: keys.size("feed_forward_length", None)?,
        activation: if gpt2 { Activation::Gelu } else { Activation::Swiglu },
        tied: container.shape("output.weight").is_none(),
        norm_eps: keys.float(epsilon, None)?,
        rope_theta: keys.float("rope.freq_base", Some(10_000.0))?,
    };
    spec.validate()?;
    Ok(spec)
}

fn text<'a>(container: &'a Container, key: &str) -> Result<&'a str, FormatError> {
    let value = container.metadata.get(key).ok_or_else(|| FormatError::MissingKey { key: key.into() })?;
    value.as_text().ok_or_else(|| unexpected(key, "a string", value))
}

/// Access to the keys with the prefix of the architecture.
struct ArchitectureKeys<'a> {
    container: &'a Container,
    architecture: &'a str,
}

impl ArchitectureKeys<'_> {
    fn get(&self, key: &str) -> (String, Option<&Value>) {
        let key = format!("{}.{key}", self.architecture);
        let value = self.container.metadata.get(&key);
        (key, value)
    }

    /// An integer, or an array with one equal integer per layer.
    fn size(&self, key: &str, default: Option<usize>) -> Result<usize, FormatError> {
        let (key, value) = self.get(key);
        let Some(value) = value else { return default.ok_or(FormatError::MissingKey { key }) };
        let size = match value.items() {
            None => value.as_size(),
            Some(mut items) => {
                let first = items.next().and_then(|item| item.as_size());
                first.filter(|_| items.all(|item| item.as_size() == first))
            }
        };
        size.ok_or_else(|| {
            unexpected(&key, "an integer that is not negative, the same for all layers", value)
        })
    }

    fn float(&self, key: &str, default: Option<f32>) -> Result<f32, FormatError> {
        let (key, value) = self.get(key);
        let Some(value) = value else { return default.ok_or(FormatError::MissingKey { key }) };
        value.as_f64().map(|x| x as f32).ok_or_else(|| unexpected(&key, "a float", value))
    }
}

/// Returns a warning about unknown keys.
///
/// # Errors
/// `Value`: a key with which llama.cpp would compute something else.
pub(super) fn check_keys(container: &Container, spec: &ModelSpec) -> Result<Option<String>, FormatError> {
    let prefix = format!("{}.", name(spec.family));
    let head_dim = spec.head_dim().to_string();
    let by_head = ["attention.key_length", "attention.value_length", "rope.dimension_count"];
    let mut fixed = FIXED.to_vec();
    fixed.extend(by_head.map(|key| (key, &*head_dim)));
    let own = key::KeyTable { prefix: &prefix, used: USED, fixed: &fixed, neutral: NEUTRAL };
    let kind = container.metadata.get(&format!("{prefix}rope.scaling.type"));
    // With the type `none`, llama.cpp ignores the factor.
    let unscaled = kind.and_then(Value::as_text) == Some("none");
    let factors = ["rope.scaling.factor", "rope.scale_linear"].map(|key| format!("{prefix}{key}"));
    let entries = container.metadata.iter().filter(|(key, _)| !(unscaled && factors.contains(key)));
    let entries = entries.map(|(key, value)| (key.clone(), value.to_json()));
    key::check(&[own, FILE], "metadata", entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bytes, gguf};

    /// Checks the keys of a small llama file with additional `keys`. They get the prefix `llama.` unless they start
    /// with a dot.
    fn checked(keys: &[(&str, Value)]) -> Result<Option<String>, FormatError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        let options = GgufOptions::new(Encoding::F32);
        gguf::write(&crate::model::random(Family::Llama, None), &path, &options).unwrap();
        let mut container = Container::parse(Bytes::map(&path).unwrap()).unwrap();
        for (key, value) in keys {
            let key = key.strip_prefix('.').map_or_else(|| format!("llama.{key}"), Into::into);
            container.metadata.insert(key, value.clone());
        }
        check_keys(&container, &spec(&container)?)
    }

    #[test]
    fn unsupported_llama_cpp_keys_that_change_the_model_are_refused() {
        let text = |text: &str| Value::Text(text.into());
        let neutral: [&[(&str, Value)]; 7] = [
            &[],
            &[("rope.scaling.factor", Value::F32(1.0))],
            // With the type `none`, llama.cpp ignores the factor.
            &[("rope.scaling.type", text("none")), ("rope.scaling.factor", Value::F32(4.0))],
            &[("attention.sliding_window", Value::U32(0)), ("expert_count", Value::U32(0))],
            &[("attention.key_length", Value::U32(6)), ("rope.dimension_count", Value::U64(6))],
            &[("logit_scale", Value::F32(1.0)), ("vocab_size", Value::U32(99))],
            &[(".general.url", text("x")), (".split.count", Value::U16(1))],
        ];
        for keys in neutral {
            assert_eq!(checked(keys).unwrap(), None, "{keys:?}");
        }
        let changing: [(&[(&str, Value)], &str); 9] = [
            (&[("rope.scaling.factor", Value::F32(4.0))], "rope.scaling.factor"),
            (&[("rope.scale_linear", Value::F32(4.0))], "rope.scale_linear"),
            (
                &[("rope.scaling.type", text("linear")), ("rope.scaling.factor", Value::F32(4.0))],
                "rope.scaling.factor",
            ),
            (&[("rope.scaling.type", text("yarn"))], "rope.scaling.type"),
            (&[("attention.sliding_window", Value::U32(512))], "attention.sliding_window"),
            (&[("attention.key_length", Value::U32(8))], "attention.key_length"),
            (&[("final_logit_softcapping", Value::F32(30.0))], "final_logit_softcapping"),
            (&[("logit_scale", Value::F32(0.5))], "logit_scale"),
            (&[("expert_count", Value::U32(8))], "expert_count"),
        ];
        for (keys, named) in changing {
            let error = checked(keys).unwrap_err().to_string();
            assert!(error.contains(&format!("key `llama.{named}` is ")), "{keys:?}: {error}");
        }
        let warning = checked(&[("novelty", Value::Bool(true)), (".tokenizer.novelty", Value::U8(1))]);
        let expected = "metadata: unknown keys are ignored: `llama.novelty`, `tokenizer.novelty`";
        assert_eq!(warning.unwrap().unwrap(), expected);
    }
}
