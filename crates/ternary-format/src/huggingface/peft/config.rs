//! `adapter_config.json`: its keys, and patterns of modules' names.

use super::{CONFIG, module};
use crate::{
    Adapter, Family, FormatError,
    adapter::check,
    key::{self, Keys},
};
use regex::Regex;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{MapAccess, Visitor},
};
use serde_json::{Map, Value};
use std::{fmt, marker::PhantomData};

/// The keys of PEFT 0.21 and before.
const KEYS: Keys = Keys {
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
        // How the first weights were found; see `INITS`.
        "corda_config",
        "eva_config",
        "lora_ga_config",
        "loftq_config",
        // Which modules have the same tensors, and where their names have the number of a layer.
        "ensure_weight_tying",
        "layers_pattern",
        // How the base stores its weights.
        "fan_in_fan_out",
        // Of training.
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

/// `init_lora_weights` that leave the weights of the base as they are. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
/// change them before training, and the adapter belongs to what they make.
const INITS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

/// Values by patterns of modules' names, in the order of the file.
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
    /// The patterns, to be asked for modules.
    ///
    /// # Errors
    /// `Value`: a pattern that is not a regular expression.
    pub(super) fn compile(&self, key: &str) -> Result<Compiled<T>, FormatError> {
        let compile =
            |(pattern, value): &(String, T)| Ok((whole(key, &format!(r"(.*\.)?({pattern})"))?, *value));
        self.0.iter().map(compile).collect::<Result<_, _>>().map(Compiled)
    }
}

/// A pattern of a whole name.
fn whole(key: &str, pattern: &str) -> Result<Regex, FormatError> {
    Regex::new(&format!("^({pattern})$")).map_err(|_| FormatError::Value {
        key: key.into(),
        found: format!("`{}`", pattern.chars().take(60).collect::<String>()),
        expected: "regular expressions without look-around and back-references".into(),
    })
}

/// `target_modules` and its like: a regular expression of whole names, names that may have others before them, or null.
enum Names {
    Regex(Regex),
    Endings(Vec<String>),
}

impl Names {
    /// # Errors
    /// `Value`: none of these.
    fn parse(key: &str, value: &Value) -> Result<Option<Self>, FormatError> {
        match value {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(Self::Regex(whole(key, text)?))),
            Value::Array(names) => {
                let names: Option<Vec<String>> =
                    names.iter().map(|name| Some(name.as_str()?.into())).collect();
                check(names.is_some(), key, value, "names of modules")?;
                Ok(names.map(Self::Endings))
            }
            _ => check(false, key, value, "names of modules, a regular expression or null").map(|()| None),
        }
    }

    fn has(&self, module: &str) -> bool {
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
    /// The value of the first pattern that matches the name of a module: all of it, or what follows a dot.
    pub(super) fn of(&self, module: &str) -> Option<T> {
        self.0.iter().find(|(pattern, _)| pattern.is_match(module)).map(|(_, value)| *value)
    }
}

/// The keys of a configuration that are read or written.
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
    /// Ranks and alphas of modules that have others.
    #[serde(default)]
    pub rank_pattern: Patterns<usize>,
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
    /// # Errors
    /// `Json`: not JSON, or a key of another type. `Value`: what would compute something else than `scale B A` beside the
    /// weights of the base.
    pub(super) fn parse(json: &[u8]) -> Result<(Self, Option<String>), FormatError> {
        let entries = key::entries(&serde_json::from_slice::<Map<String, Value>>(json)?, &[]);
        let warning = key::check(&[KEYS], CONFIG, entries)?;
        let config: Self = serde_json::from_slice(json)?;
        let init = &config.init_lora_weights;
        let plain =
            init.is_null() || init.is_boolean() || init.as_str().is_some_and(|init| INITS.contains(&init));
        let expected = "true, false, \"gaussian\", \"eva\", \"orthogonal\" or \"mica\": this adapter belongs to changed \
                        weights of the base; convert it with PEFT (`path_initial_model_for_weight_conversion`)";
        check(plain, "init_lora_weights", init, expected)?;
        Ok((config, warning))
    }
}

/// An error for a module whose tensors PEFT would leave out, as the configuration does not name it.
pub(super) fn check_targets(config: &Config, adapter: &Adapter, family: Family) -> Result<(), FormatError> {
    let all = config.target_modules == "all-linear";
    let [targets, excluded] =
        [("target_modules", &config.target_modules), ("exclude_modules", &config.exclude_modules)]
            .map(|(key, value)| Names::parse(key, value));
    let (targets, excluded) = (targets?.filter(|_| !all), excluded?);
    let layers: Option<Vec<u64>> = match &config.layers_to_transform {
        Value::Array(layers) => Some(layers.iter().filter_map(Value::as_u64).collect()),
        layer => layer.as_u64().map(|layer| vec![layer]),
    };
    for ours in adapter.pairs.keys() {
        let module = module(family, ours);
        let named = targets.as_ref().is_none_or(|names| names.has(&module));
        check(
            named,
            "target_modules",
            &config.target_modules,
            format!("one that names `{module}`, which has tensors"),
        )?;
        let kept = excluded.as_ref().is_none_or(|names| !names.has(&module));
        check(
            kept,
            "exclude_modules",
            &config.exclude_modules,
            format!("none that names `{module}`, which has tensors"),
        )?;
        let layer = module.split('.').find_map(|part| part.parse().ok());
        let transformed = layers.as_ref().zip(layer).is_none_or(|(layers, layer)| layers.contains(&layer));
        let expected = format!("one with the layer of `{module}`, which has tensors");
        check(transformed, "layers_to_transform", &config.layers_to_transform, &expected)?;
    }
    Ok(())
}
