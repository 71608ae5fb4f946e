//! PEFT folders with a LoRA adapter: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! | tensor | shape |
//! |---|---|
//! | `base_model.model.<module>.lora_A.weight` | `[rank, in]` |
//! | `base_model.model.<module>.lora_B.weight` | `[out, rank]` |
//!
//! Modules have the names of transformers. In gpt2, queries, keys and values are thirds of the module `c_attn`. Their
//! pairs become one pair, whose rank is the sum of their ranks:
//!
//! ```text
//! A = [A_q; A_k; A_v]        B = | B_q  0   0  |
//!                                |  0  B_k  0  |
//!                                |  0   0  B_v |
//! ```
//!
//! A pair has one scale, so each block of B is multiplied by the ratio of its scale to the first one.
//!
//! # Source
//! peft: `utils/save_and_load.py`, `tuners/lora/{config,layer}.py`, `utils/other.py` for `rank_pattern`.

mod config;

use super::{
    fused_third,
    read::{expect_shape, read_text},
    transformers_name,
};
use crate::{
    Adapter, Family, FormatError, LowRank, ModelSpec,
    adapter::{matrices, require},
    disk::{self, NewFolder},
    safetensors::{self, Annotated, Entry, Stored},
};
use ::safetensors::tensor::Dtype;
use config::{Config, Patterns, check_targets};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// Key of [`Adapter::base_signs`] in the metadata of the tensors. PEFT ignores it.
const BASE_SIGNS: &str = "base_signs";
/// Projections that share `c_attn` in the gpt2 family.
const THIRDS: usize = 3;

/// Module name of one of our matrices.
fn module(family: Family, ours: &str) -> String {
    let name = transformers_name(family, ours);
    name.strip_suffix(".weight").map_or(name.clone(), Into::into)
}

fn factor_name(module: &str, factor: char) -> String {
    format!("base_model.model.{module}.lora_{factor}.weight")
}

/// Reads the LoRA adapter of a model with this spec from a PEFT folder.
///
/// # Errors
/// `Io`, `Json`, `Safetensors`: files that are missing or damaged. `Value`: another kind of adapter. `MissingTensor`,
/// `UnknownTensor`, `WrongShape`, `StoredType`: tensors that do not match the model or the rank.
pub fn read(folder: &Path, spec: &ModelSpec) -> Result<Adapter, FormatError> {
    spec.validate()?;
    let path = folder.join(CONFIG);
    let config = Config::parse(&read_text(&path)?).and_then(|(config, warning)| {
        let ranks = config.rank_pattern.compile("rank_pattern")?;
        let alphas = config.alpha_pattern.compile("alpha_pattern")?;
        Ok((config, ranks, alphas, warning))
    });
    let (config, ranks, alphas, warning) = config.map_err(|error| error.in_file(&path))?;
    // The scale of rsLoRA is `alpha / sqrt(rank)`.
    let of = |module: &str| {
        let rank = ranks.lookup(module).unwrap_or(config.r);
        let alpha = alphas.lookup(module).unwrap_or(config.lora_alpha);
        (rank, if config.use_rslora { alpha * (rank as f64).sqrt() } else { alpha })
    };
    let path = folder.join(WEIGHTS);
    let Annotated { tensors, mut texts } = safetensors::read_annotated(&path)?;
    let adapter = read_pairs(of, &tensors, spec).map_err(|error| error.in_file(&path))?;
    check_targets(&config, &adapter, spec.family).map_err(|error| error.in_file(&folder.join(CONFIG)))?;
    Ok(Adapter { base_signs: texts.remove(BASE_SIGNS), warnings: Vec::from_iter(warning), ..adapter })
}

/// The pairs of all modules. `of` returns rank and alpha of a module.
fn read_pairs(
    of: impl Fn(&str) -> (usize, f64),
    tensors: &BTreeMap<String, Stored>,
    spec: &ModelSpec,
) -> Result<Adapter, FormatError> {
    let mut adapter = Adapter::default();
    let mut used = BTreeSet::new();
    for (ours, [out, inputs]) in matrices(spec) {
        let module = module(spec.family, &ours);
        let names = ['A', 'B'].map(|which| factor_name(&module, which));
        let (a, b) = match names.each_ref().map(|name| tensors.get(name)) {
            [Some(a), Some(b)] => (a, b),
            [None, None] => continue,
            [None, _] => return Err(FormatError::MissingTensor { tensor: names[0].clone() }),
            [_, None] => return Err(FormatError::MissingTensor { tensor: names[1].clone() }),
        };
        let (rank, alpha) = of(&module);
        let part = fused_third(spec.family, &ours);
        let rows = out * part.map_or(1, |_| THIRDS);
        let read = |name: &str, stored: &Stored, shape: [usize; 2]| {
            expect_shape(&shape, &stored.shape)
                .and_then(|()| floats(stored))
                .map_err(|error| error.in_tensor(name))
        };
        let a = read(&names[0], a, [rank, inputs])?;
        let mut b = read(&names[1], b, [rows, rank])?;
        if let Some(part) = part {
            b = b[part * out * rank..(part + 1) * out * rank].to_vec();
        }
        let pair = LowRank::new(rank, alpha, a, b)?;
        // A rank that belongs to one third is zero in the others.
        let pair = if part.is_some() { pair.trimmed() } else { Some(pair) };
        adapter.pairs.extend(pair.map(|pair| (ours, pair)));
        used.extend(names);
    }
    match tensors.keys().find(|name| !used.contains(*name)) {
        Some(name) => Err(FormatError::UnknownTensor { tensor: name.clone() }),
        None => Ok(adapter),
    }
}

fn floats(stored: &Stored) -> Result<Vec<f32>, FormatError> {
    let tensor = stored.clone().float()?;
    tensor.check_finite()?;
    let mut values = vec![0.0; tensor.rows() * tensor.cols()];
    values.chunks_exact_mut(tensor.cols()).enumerate().for_each(|(row, values)| tensor.read_row(row, values));
    Ok(values)
}

/// Writes a LoRA adapter to a new PEFT folder. `base` is the name or path of the base model.
///
/// # Errors
/// `Io`; of kind `AlreadyExists` if the folder exists. `Value`: no pairs. Those of [`Adapter::validate`].
pub fn write(adapter: &Adapter, spec: &ModelSpec, base: &str, folder: &Path) -> Result<(), FormatError> {
    adapter.validate(spec)?;
    let family = spec.family;
    // Pairs by module, each with its third, in the order of the tensors.
    let mut modules: BTreeMap<String, Vec<(usize, &LowRank)>> = BTreeMap::new();
    for (ours, pair) in &adapter.pairs {
        let third = fused_third(family, ours).unwrap_or(0);
        modules.entry(module(family, ours)).or_default().push((third, pair));
    }
    let parts = if family == Family::Gpt2 { THIRDS } else { 1 };
    let fused: BTreeMap<&str, LowRank> = modules
        .iter()
        .map(|(module, pairs)| {
            let parts = if module.ends_with(".c_attn") { parts } else { 1 };
            Ok((module.as_str(), fuse(pairs, parts)?))
        })
        .collect::<Result<_, FormatError>>()?;
    let Some(first) = fused.values().next() else {
        return require(false, "adapter", "empty", "at least one pair");
    };
    let mut config = Config {
        peft_type: "LORA".into(),
        task_type: Some("CAUSAL_LM".into()),
        base_model_name_or_path: Some(base.into()),
        r: first.rank(),
        lora_alpha: first.alpha(),
        target_modules: target_modules(family, &fused),
        exclude_modules: Value::Null,
        layers_to_transform: Value::Null,
        rank_pattern: Patterns::default(),
        alpha_pattern: Patterns::default(),
        lora_dropout: 0.0,
        bias: Some("none".into()),
        // `Conv1D` stores weights as `[in, out]`.
        fan_in_fan_out: family == Family::Gpt2,
        inference_mode: true,
        use_rslora: false,
        use_dora: false,
        modules_to_save: Value::Null,
        init_lora_weights: true.into(),
    };
    let mut entries = Vec::new();
    for (module, pair) in &fused {
        if pair.rank() != config.r {
            config.rank_pattern.0.push((regex::escape(module), pair.rank()));
        }
        if pair.alpha() != config.lora_alpha {
            config.alpha_pattern.0.push((regex::escape(module), pair.alpha()));
        }
        let [out, inputs] = pair.shape();
        for (which, shape, values) in
            [('A', [pair.rank(), inputs], pair.a()), ('B', [out, pair.rank()], pair.b())]
        {
            entries.push(Entry {
                name: factor_name(module, which),
                dtype: Dtype::F32,
                shape: shape.into(),
                produce: Box::new(move |file| {
                    values.iter().try_for_each(|v| file.write_all(&v.to_le_bytes()))
                }),
            });
        }
    }
    let new = NewFolder::create(folder).map_err(FormatError::io(folder))?;
    let text = serde_json::to_value(&config).expect("names and numbers are JSON");
    let path = new.scratch().join(CONFIG);
    disk::write_new(&path, format!("{text:#}\n").as_bytes()).map_err(FormatError::io(&path))?;
    let signs = adapter.base_signs.as_deref().map(|signs| (BASE_SIGNS, signs));
    safetensors::write_annotated(&new.scratch().join(WEIGHTS), entries, signs.as_slice())?;
    new.commit().map_err(FormatError::io(folder))
}

/// Fuses pairs to one, whose rank is the sum of theirs. Each applies to one of `parts` equal parts of the outputs.
fn fuse(pairs: &[(usize, &LowRank)], parts: usize) -> Result<LowRank, FormatError> {
    let (_, first) = pairs[0];
    if parts == 1 {
        return Ok(first.clone());
    }
    let rank: usize = pairs.iter().map(|(_, pair)| pair.rank()).sum();
    let [out, _] = first.shape();
    let mut b = vec![0.0; parts * out * rank];
    let mut start = 0;
    for (part, pair) in pairs {
        let ratio = pair.scale() / first.scale();
        for (row, values) in pair.b().chunks_exact(pair.rank()).enumerate() {
            let place = &mut b[(part * out + row) * rank + start..][..pair.rank()];
            place.iter_mut().zip(values).for_each(|(to, value)| *to = value * ratio);
        }
        start += pair.rank();
    }
    let a = pairs.iter().flat_map(|(_, pair)| pair.a()).copied().collect();
    LowRank::new(rank, first.alpha() * rank as f64 / first.rank() as f64, a, b)
}

/// Shortest ends of the module names that select these modules only.
fn target_modules(family: Family, modules: &BTreeMap<&str, LowRank>) -> Value {
    let parts = if family == Family::Gpt2 { 2 } else { 1 };
    let ending = |module: &str| {
        let from = module.rmatch_indices('.').nth(parts - 1).map_or(0, |(dot, _)| dot + 1);
        module[from..].to_string()
    };
    modules.keys().map(|module| ending(module)).collect::<BTreeSet<_>>().into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Encoding, PackedModel};
    use rand::{Rng, SeedableRng, rngs::StdRng};
    use std::fs;

    const FAMILIES: [Family; 3] = [Family::Gpt2, Family::Llama, Family::Bitnet];

    /// A pair of rank `rank` for each matrix whose name contains one of `parts`.
    fn adapter(spec: &ModelSpec, parts: &[&str], rank: usize) -> Adapter {
        let rng = &mut StdRng::seed_from_u64(5);
        let chosen = matrices(spec).filter(|(name, _)| parts.iter().any(|part| name.contains(part)));
        let pairs = chosen.map(|(name, [out, inputs])| {
            let mut values = |n: usize| (0..n).map(|_| rng.random_range(-1.0..1.0)).collect::<Vec<f32>>();
            (name, LowRank::new(rank, 6.0, values(rank * inputs), values(out * rank)).unwrap())
        });
        Adapter { pairs: pairs.collect(), ..Adapter::default() }
    }

    fn spec(family: Family) -> ModelSpec {
        crate::model::random(family, None).spec
    }

    fn float(family: Family) -> PackedModel {
        let mut model = crate::model::random(family, None);
        for tensor in model.tensors.values_mut() {
            *tensor = tensor.encode(Encoding::F32).unwrap();
        }
        model
    }

    #[test]
    fn adapters_round_trip_with_the_names_of_peft() {
        let folder = tempfile::tempdir().unwrap();
        for family in FAMILIES {
            for (index, parts) in [&["attn_q", "attn_v"][..], &["blk"], &["ffn_down"]].into_iter().enumerate()
            {
                let spec = spec(family);
                let written = adapter(&spec, parts, 3);
                let path = folder.path().join(format!("{family:?}{index}"));
                write(&written, &spec, "base", &path).unwrap();
                assert_eq!(read(&path, &spec).unwrap(), written, "{family:?} {parts:?}");
            }
        }
        let json = |name: &str| -> Value {
            serde_json::from_slice(&fs::read(folder.path().join(name).join(CONFIG)).unwrap()).unwrap()
        };
        let config = json("Llama0");
        assert_eq!(config["target_modules"], serde_json::json!(["q_proj", "v_proj"]));
        assert_eq!((&config["r"], &config["lora_alpha"]), (&3.into(), &6.0.into()));
        assert_eq!(
            (&config["rank_pattern"], &config["fan_in_fan_out"]),
            (&serde_json::json!({}), &false.into())
        );
        let tensors = safetensors::read(&folder.path().join("Llama0").join(WEIGHTS)).unwrap();
        let [a, b] = ["A", "B"].map(|factor| {
            tensors[&format!("base_model.model.model.layers.1.self_attn.v_proj.lora_{factor}.weight")]
                .shape
                .clone()
        });
        assert_eq!((a, b), (vec![3, 24], vec![12, 3]));
        // Two thirds of a fused module, of rank 3 each.
        let config = json("Gpt20");
        assert_eq!(config["target_modules"], serde_json::json!(["attn.c_attn"]));
        assert_eq!((&config["r"], &config["lora_alpha"]), (&6.into(), &12.0.into()));
        let tensors = safetensors::read(&folder.path().join("Gpt20").join(WEIGHTS)).unwrap();
        let shape = &tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].shape;
        assert_eq!(shape, &[72, 6]);
        let config = json("Gpt21");
        let modules = serde_json::json!(["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]);
        assert_eq!(config["target_modules"], modules);
        assert_eq!(config["rank_pattern"][r"transformer\.h\.1\.attn\.c_proj"], 3);
    }

    #[test]
    fn adapters_in_bf16_and_with_patterns_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("adapter");
        let spec = spec(Family::Llama);
        write(&adapter(&spec, &["attn_k"], 2), &spec, "base", &path).unwrap();
        let (config, weights) = (path.join(CONFIG), path.join(WEIGHTS));
        let mut value: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        value["r"] = 8.into();
        value["lora_alpha"] = 16.into();
        value["rank_pattern"] = serde_json::json!({ "self_attn.k_proj": 2, "proj": 5, r"proj.*\d": 7 });
        value["alpha_pattern"] = serde_json::json!({ "k_proj": 1 });
        value["a_key_of_a_later_peft"] = true.into();
        fs::write(&config, value.to_string()).unwrap();
        let half = &safetensors::read(&weights).unwrap();
        fs::remove_file(&weights).unwrap();
        let entries = half.keys().map(|name| Entry {
            name: name.clone(),
            dtype: Dtype::BF16,
            shape: half[name].shape.clone(),
            produce: Box::new(move |file| {
                let count = half_len(&half[name].shape);
                (0..count).try_for_each(|_| file.write_all(&half::bf16::from_f32(0.5).to_le_bytes()))
            }),
        });
        safetensors::write(&weights, entries.collect()).unwrap();
        let found = read(&path, &spec).unwrap();
        let pair = &found.pairs["blk.0.attn_k.weight"];
        assert_eq!((pair.rank(), pair.alpha(), pair.scale()), (2, 1.0, 0.5));
        assert!(pair.a().iter().chain(pair.b()).all(|value| *value == 0.5));
        assert_eq!(
            found.warnings,
            ["adapter_config.json: unknown keys are ignored: `a_key_of_a_later_peft`"]
        );
        // The first pattern of the file that matches decides. It must match the whole name, or its end from a dot on.
        let scale = |key: &str, patterns: &str| {
            let mut text = value.clone();
            text[key] = serde_json::json!({});
            let text = text.to_string().replace(&format!("\"{key}\":{{}}"), &format!("\"{key}\":{patterns}"));
            fs::write(&config, text).unwrap();
            read(&path, &spec).map(|adapter| adapter.pairs["blk.0.attn_k.weight"].scale())
        };
        for (patterns, alpha) in [
            (r#"{"k_proj": 4, "self_attn.*": 2}"#, 4.0),
            (r#"{"self_attn.*": 2, "k_proj": 4}"#, 2.0),
            (r#"{"z|k_proj": 4}"#, 4.0),
            (r#"{"layers\\.[0-1]\\..*": 3}"#, 3.0),
            (r#"{"model.*k_proj": 5}"#, 5.0),
            (r#"{"_proj": 5}"#, 16.0),
            (r#"{"k_pro": 5}"#, 16.0),
            ("null", 16.0),
        ] {
            assert_eq!(scale("alpha_pattern", patterns).unwrap(), alpha / 2.0, "{patterns}");
        }
        for (key, patterns) in [("alpha_pattern", r#"{"(?=k)k_proj": 1}"#), ("rank_pattern", r#"{"(": 2}"#)] {
            let error = scale(key, patterns).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("regular expressions"), "{error}");
        }
        let mut rooted = value.clone();
        rooted["use_rslora"] = true.into();
        fs::write(&config, rooted.to_string()).unwrap();
        let scale = read(&path, &spec).unwrap().pairs["blk.0.attn_k.weight"].scale();
        assert_eq!(scale, std::f32::consts::FRAC_1_SQRT_2);
    }

    #[test]
    fn tensors_that_peft_would_ignore_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("adapter");
        let spec = spec(Family::Llama);
        write(&adapter(&spec, &["attn_k", "ffn_up"], 2), &spec, "base", &path).unwrap();
        let config = path.join(CONFIG);
        let value: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        let read_with = |key: &str, to: Value| {
            let mut changed = value.clone();
            changed[key] = to;
            fs::write(&config, changed.to_string()).unwrap();
            read(&path, &spec).map(|_| ()).map_err(|error| error.to_string())
        };
        use serde_json::json;
        for (key, to) in [
            ("target_modules", json!(["k_proj", "mlp.up_proj", "q_proj"])),
            ("target_modules", json!("all-linear")),
            ("target_modules", json!(r".*\.(k|up)_proj")),
            ("target_modules", json!(null)),
            ("exclude_modules", json!(["q_proj", "roj"])),
            ("exclude_modules", json!("k_proj")),
            ("layers_to_transform", json!([0, 1])),
            ("layers_to_transform", json!(null)),
        ] {
            assert_eq!(read_with(key, to.clone()), Ok(()), "{key} {to}");
        }
        for (key, to) in [
            ("target_modules", json!(["k_proj", "p_proj"])),
            ("target_modules", json!("k_proj|up_proj")),
            ("target_modules", json!("(")),
            ("target_modules", json!(3)),
            ("exclude_modules", json!(["up_proj"])),
            ("exclude_modules", json!(".*k_proj")),
            ("layers_to_transform", json!(1)),
        ] {
            let error = read_with(key, to.clone()).unwrap_err();
            assert!(error.contains(&format!("key `{key}` is ")), "{to}: {error}");
        }
    }

    fn half_len(shape: &[usize]) -> usize {
        shape.iter().product()
    }

    #[test]
    fn adapters_merge_into_float_models_only() {
        for family in FAMILIES {
            let base = float(family);
            let own = adapter(&base.spec, &["attn_v", "ffn_up"], 2);
            let model = base.clone().with_adapter(Some(own.clone()));
            let merged = model.merged().unwrap();
            assert!(merged.adapter.is_none());
            for (name, tensor) in &base.tensors {
                let mut values = vec![0.0; tensor.cols()];
                let mut found = values.clone();
                for row in 0..tensor.rows() {
                    tensor.read_row(row, &mut values);
                    merged.tensors[name].read_row(row, &mut found);
                    for (column, (before, found)) in values.iter().zip(&found).enumerate() {
                        let added = own.pairs.get(name).map_or(0.0, |pair| {
                            let product = |k: usize| {
                                f64::from(pair.b()[row * 2 + k])
                                    * f64::from(pair.a()[k * tensor.cols() + column])
                            };
                            3.0 * (0..2).map(product).sum::<f64>()
                        });
                        let expected = f64::from(*before) + added;
                        assert!((f64::from(*found) - expected).abs() < 1e-5, "{name}: {found} {expected}");
                    }
                }
            }
            // Files store the sum.
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("merged.ternary");
            crate::write_model(&model, &path, &Default::default()).unwrap();
            let read = crate::read_model(&path).unwrap();
            let name = "blk.1.ffn_up.weight";
            assert_eq!(read.tensors[name].bytes(), merged.tensors[name].bytes());

            let ternary = PackedModel { adapter: Some(own.clone()), ..crate::model::random(family, None) };
            for name in ["a.gguf", "a.onnx", "a.ternary", "a"] {
                let error = crate::write_model(&ternary, &folder.path().join(name), &Default::default());
                let error = error.unwrap_err();
                assert!(matches!(error.kind(), FormatError::Unmergeable { .. }), "{error}");
                assert!(error.to_string().contains("--adapter"), "{error}");
            }
            // A zero pair is dropped.
            let mut zero = own;
            for pair in zero.pairs.values_mut() {
                *pair = LowRank::new(2, 6.0, pair.a().to_vec(), vec![0.0; pair.b().len()]).unwrap();
            }
            let ternary = PackedModel { adapter: Some(zero), ..ternary };
            let name = "blk.0.attn_v.weight";
            assert_eq!(ternary.merged().unwrap().tensors[name].bytes(), ternary.tensors[name].bytes());
        }
    }

    #[test]
    fn hostile_adapters_are_errors() {
        let home = tempfile::tempdir().unwrap();
        let spec = spec(Family::Llama);
        let path = home.path().join("sound");
        write(&adapter(&spec, &["attn_q"], 2), &spec, "base", &path).unwrap();
        let sound = [CONFIG, WEIGHTS].map(|name| fs::read(path.join(name)).unwrap());
        let refused = |config: &[u8], weights: &[u8], spec: &ModelSpec| {
            fs::write(path.join(CONFIG), config).unwrap();
            fs::write(path.join(WEIGHTS), weights).unwrap();
            read(&path, spec).unwrap_err()
        };
        let json: Value = serde_json::from_slice(&sound[0]).unwrap();
        for (key, value, fragment) in [
            ("r", 3.into(), "expected shape [3, 24], found [2, 24]"),
            ("r", 0.into(), "expected shape [0, 24]"),
            ("r", u64::MAX.into(), "expected shape"),
            ("r", (-1).into(), "JSON"),
            ("r", Value::Null, "JSON"),
            ("lora_alpha", "much".into(), "JSON"),
            ("peft_type", "IA3".into(), "expected \"LORA\""),
            ("use_dora", true.into(), "`use_dora`"),
            ("bias", "all".into(), "`bias`"),
            ("alora_invocation_tokens", serde_json::json!([5, 6]), "`alora_invocation_tokens`"),
            ("layer_replication", serde_json::json!([[0, 1]]), "`layer_replication`"),
            ("lora_bias", true.into(), "`lora_bias`"),
            ("trainable_token_indices", serde_json::json!([1]), "`trainable_token_indices`"),
            ("target_parameters", serde_json::json!(["mlp"]), "`target_parameters`"),
            ("use_qalora", true.into(), "`use_qalora`"),
            ("use_bdlora", serde_json::json!({ "nblocks": 2 }), "`use_bdlora`"),
            ("arrow_config", serde_json::json!({ "top_k": 3 }), "`arrow_config`"),
            ("kasa_config", serde_json::json!({ "beta": 1 }), "`kasa_config`"),
            ("monteclora_config", serde_json::json!({ "num_samples": 8 }), "`monteclora_config`"),
            ("init_lora_weights", "pissa".into(), "path_initial_model_for_weight_conversion"),
            ("init_lora_weights", "pissa_niter_4".into(), "`init_lora_weights`"),
            ("init_lora_weights", "olora".into(), "`init_lora_weights`"),
            ("init_lora_weights", "corda".into(), "`init_lora_weights`"),
            ("init_lora_weights", "loftq".into(), "`init_lora_weights`"),
            ("init_lora_weights", "lora_ga".into(), "`init_lora_weights`"),
            ("init_lora_weights", "of_tomorrow".into(), "`init_lora_weights`"),
            ("modules_to_save", serde_json::json!(["lm_head"]), "`modules_to_save`"),
        ] {
            let mut config = json.clone();
            config[key] = value;
            let error = refused(config.to_string().as_bytes(), &sound[1], &spec).to_string();
            assert!(error.contains(fragment) && error.contains("adapter"), "{key}: {error}");
        }
        // Adapters of another model, and of a deeper one.
        let wider = ModelSpec { d_model: 48, ..spec.clone() };
        let error = refused(&sound[0], &sound[1], &wider);
        assert!(matches!(error.kind(), FormatError::WrongShape { .. }), "{error}");
        let shallow = ModelSpec { n_layers: 1, ..spec.clone() };
        let error = refused(&sound[0], &sound[1], &shallow);
        assert!(matches!(error.kind(), FormatError::UnknownTensor { .. }), "{error}");
        let error = refused(&sound[0], &sound[1], &ModelSpec { n_heads: 0, ..spec.clone() });
        assert!(matches!(error.kind(), FormatError::Spec { .. }), "{error}");
        // Every truncation, and random changes of the header.
        for length in 0..sound[1].len() {
            let error = refused(&sound[0], &sound[1][..length], &spec);
            assert!(matches!(error.kind(), FormatError::Safetensors { .. }), "{length}: {error}");
        }
        for length in 0..sound[0].len() - 2 {
            let error = refused(&sound[0][..length], &sound[1], &spec);
            assert!(matches!(error.kind(), FormatError::Json { .. }), "{length}: {error}");
        }
        let rng = &mut StdRng::seed_from_u64(3);
        for _ in 0..500 {
            let mut weights = sound[1].clone();
            let head = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
            weights[rng.random_range(0..head)] = rng.random();
            fs::write(path.join(CONFIG), &sound[0]).unwrap();
            fs::write(path.join(WEIGHTS), weights).unwrap();
            // An error or a valid adapter; no panic.
            if let Ok(adapter) = read(&path, &spec) {
                adapter.validate(&spec).unwrap();
            }
        }
        // One factor without the other, and a tensor of no module.
        let renamed = |from: &str, to: &str| {
            assert_eq!(from.len(), to.len());
            let mut bytes = sound[1].clone();
            let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
            refused(&sound[0], &bytes, &spec)
        };
        let error = renamed("q_proj.lora_A", "q_proj.lora_C");
        assert!(
            matches!(error.kind(), FormatError::MissingTensor { tensor } if tensor.contains("lora_A")),
            "{error}"
        );
        let error = renamed("layers.1.self_attn.q_proj.lora_B", "layers.1.self_attn.q_proj.lora_X");
        assert!(
            matches!(error.kind(), FormatError::MissingTensor { tensor } if tensor.contains("lora_B")),
            "{error}"
        );
        fs::remove_file(path.join(WEIGHTS)).unwrap();
        assert!(matches!(read(&path, &spec).unwrap_err(), FormatError::Io { .. }));
        let error = write(&adapter(&spec, &["attn_q"], 2), &spec, "base", &path).unwrap_err();
        assert!(matches!(error, FormatError::Io { .. }), "{error}");
    }
}
