//! `adapter_config.json`: its keys, and the patterns by which it selects modules.
//!
//! PEFT matches `rank_pattern` and `alpha_pattern` as regular expressions against the end of a module name, from a
//! dot on: the first pattern of the file that matches decides, so their order is kept. `target_modules` and its like
//! are either one regular expression for the whole name, or a list of names that match from a dot on.

use super::{CONFIG, module};
use crate::{
    Adapter, Family, FormatError,
    adapter::require,
    key::{self, KeyTable},
};
use regex::Regex;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{MapAccess, Visitor},
};
use serde_json::{Map, Value};
use std::{fmt, marker::PhantomData};

/// Keys up to PEFT 0.21.
const KEYS: KeyTable = KeyTable {
    prefix: "",
    used: &[
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "init_lora_weights",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
    ],
    fixed: &[
        ("alora_invocation_tokens", "null"),
        ("arrow_config", "null"),
        ("bias", "\"none\" or null"),
        ("kasa_config", "null"),
        ("layer_replication", "null"),
        ("lora_bias", "false or null"),
        ("modules_to_save", "null"),
        ("monteclora_config", "null"),
        ("peft_type", "\"LORA\""),
        ("target_parameters", "null"),
        ("trainable_token_indices", "null"),
        ("use_bdlora", "false or null"),
        ("use_dora", "false or null"),
        ("use_qalora", "false or null"),
    ],
    neutral: &[
        "auto_mapping",
        "base_model_name_or_path",
        // How the initial weights were found; see `NEUTRAL_INITS`.
        "corda_config",
        "eva_config",
        "lora_ga_config",
        "loftq_config",
        // Which modules share tensors, and where layer numbers are in their names.
        "ensure_weight_tying",
        "layers_pattern",
        // How the base model stores its weights.
        "fan_in_fan_out",
        // Settings of training.
        "inference_mode",
        "lora_dropout",
        "megatron_config",
        "megatron_core",
        "velora_config",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    ],
};

/// Values of `init_lora_weights` that do not change the weights of the base model. The others (PiSSA, OLoRA, CorDA,
/// LoftQ, LoRA-GA) change them before training, so the adapter is valid for the changed weights only.
const NEUTRAL_INITS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

/// Values by patterns of module names, in the order of the file.
pub(super) struct Patterns<T>(pub Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patterns<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for InOrder<T> {
            type Value = Vec<(String, T)>;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                std::iter::from_fn(|| map.next_entry().transpose()).collect()
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Vec::new())
            }
        }
        deserializer.deserialize_any(InOrder(PhantomData)).map(Self)
    }
}

impl<T: Serialize> Serialize for Patterns<T> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key, value)))
    }
}

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Copy> Patterns<T> {
    /// Compiles the patterns.
    ///
    /// # Errors
    /// `Value`: a pattern is not a supported regular expression.
    pub(super) fn compile(&self, key: &str) -> Result<Compiled<T>, FormatError> {
        let compile =
            |(pattern, value): &(String, T)| Ok((whole_name(key, &format!(r"(.*\.)?({pattern})"))?, *value));
        self.0.iter().map(compile).collect::<Result<_, _>>().map(Compiled)
    }
}

/// A regular expression that must match a whole name.
fn whole_name(key: &str, pattern: &str) -> Result<Regex, FormatError> {
    Regex::new(&format!("^({pattern})$")).map_err(|_| FormatError::Value {
        key: key.into(),
        found: format!("`{}`", pattern.chars().take(60).collect::<String>()),
        expected: "regular expressions without look-around and back-references".into(),
    })
}

/// The value of `target_modules` and its like.
enum ModuleNames {
    /// A regular expression for whole names.
    Regex(Regex),
    /// Names that match a whole name, or its end from a dot on.
    Endings(Vec<String>),
}

impl ModuleNames {
    /// Parses the value; `None` for null.
    ///
    /// # Errors
    /// `Value`: neither a list of names, nor a regular expression, nor null.
    fn parse(key: &str, value: &Value) -> Result<Option<Self>, FormatError> {
        match value {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(Self::Regex(whole_name(key, text)?))),
            Value::Array(names) => {
                let names: Option<Vec<String>> =
                    names.iter().map(|name| Some(name.as_str()?.into())).collect();
                require(names.is_some(), key, value, "names of modules")?;
                Ok(names.map(Self::Endings))
            }
            _ => require(false, key, value, "names of modules, a regular expression or null").map(|()| None),
        }
    }

    fn matches(&self, module: &str) -> bool {
        match self {
            Self::Regex(regex) => regex.is_match(module),
            Self::Endings(names) => names.iter().any(|name| {
                module.strip_suffix(&**name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }),
        }
    }
}

/// Compiled [`Patterns`].
pub(super) struct Compiled<T>(Vec<(Regex, T)>);

impl<T: Copy> Compiled<T> {
    /// The value of the first pattern that matches the name of a module, or its end from a dot on.
    pub(super) fn lookup(&self, module: &str) -> Option<T> {
        self.0.iter().find(|(pattern, _)| pattern.is_match(module)).map(|(_, value)| *value)
    }
}

/// The keys that are read or written.
#[derive(Serialize, Deserialize)]
pub(super) struct Config {
    pub peft_type: String,
    #[serde(default)]
    pub task_type: Option<String>,
    #[serde(default)]
    pub base_model_name_or_path: Option<String>,
    pub r: usize,
    pub lora_alpha: f64,
    #[serde(default)]
    pub target_modules: Value,
    #[serde(default, skip_serializing)]
    pub exclude_modules: Value,
    #[serde(default, skip_serializing)]
    pub layers_to_transform: Value,
    /// Ranks of modules that differ from `r`.
    #[serde(default)]
    pub rank_pattern: Patterns<usize>,
    /// Alphas of modules that differ from `lora_alpha`.
    #[serde(default)]
    pub alpha_pattern: Patterns<f64>,
    #[serde(default)]
    pub lora_dropout: f64,
    #[serde(default)]
    pub bias: Option<String>,
    #[serde(default)]
    pub fan_in_fan_out: bool,
    #[serde(default)]
    pub inference_mode: bool,
    #[serde(default)]
    pub use_rslora: bool,
    #[serde(default)]
    pub use_dora: bool,
    #[serde(default)]
    pub modules_to_save: Value,
    #[serde(default)]
    pub init_lora_weights: Value,
}

impl Config {
    /// Parses the file. Also returns a warning about unknown keys.
    ///
    /// # Errors
    /// `Json`: not JSON, or a key of another type. `Value`: the adapter computes something else than `W x + scale B A x`.
    pub(super) fn parse(json: &[u8]) -> Result<(Self, Option<String>), FormatError> {
        let entries = key::entries(&serde_json::from_slice::<Map<String, Value>>(json)?, &[]);
        let warning = key::check(&[KEYS], CONFIG, entries)?;
        let config: Self = serde_json::from_slice(json)?;
        let init = &config.init_lora_weights;
        let plain = init.is_null()
            || init.is_boolean()
            || init.as_str().is_some_and(|init| NEUTRAL_INITS.contains(&init));
        let expected = "true, false, \"gaussian\", \"eva\", \"orthogonal\" or \"mica\": this adapter requires changed \
                        weights of the base model; convert it with PEFT (`path_initial_model_for_weight_conversion`)";
        require(plain, "init_lora_weights", init, expected)?;
        Ok((config, warning))
    }
}

/// Checks that the configuration selects every module that has tensors. PEFT would ignore the tensors of the others.
pub(super) fn check_targets(config: &Config, adapter: &Adapter, family: Family) -> Result<(), FormatError> {
    let all = config.target_modules == "all-linear";
    let [targets, excluded] =
        [("target_modules", &config.target_modules), ("exclude_modules", &config.exclude_modules)]
            .map(|(key, value)| ModuleNames::parse(key, value));
    let (targets, excluded) = (targets?.filter(|_| !all), excluded?);
    let layers: Option<Vec<u64>> = match &config.layers_to_transform {
        Value::Array(layers) => Some(layers.iter().filter_map(Value::as_u64).collect()),
        layer => layer.as_u64().map(|layer| vec![layer]),
    };
    for ours in adapter.pairs.keys() {
        let module = module(family, ours);
        let named = targets.as_ref().is_none_or(|names| names.matches(&module));
        require(
            named,
            "target_modules",
            &config.target_modules,
            format!("one that names `{module}`, which has tensors"),
        )?;
        let kept = excluded.as_ref().is_none_or(|names| !names.matches(&module));
        require(
            kept,
            "exclude_modules",
            &config.exclude_modules,
            format!("none that names `{module}`, which has tensors"),
        )?;
        let layer = module.split('.').find_map(|part| part.parse().ok());
        let transformed = layers.as_ref().zip(layer).is_none_or(|(layers, layer)| layers.contains(&layer));
        let expected = format!("one with the layer of `{module}`, which has tensors");
        require(transformed, "layers_to_transform", &config.layers_to_transform, &expected)?;
    }
    Ok(())
}
