//! Hugging Face folders, as transformers reads and writes them: `config.json`, `tokenizer.json` and safetensors. LoRA
//! adapters are read and written in the format of PEFT.
//!
//! The reader supports `GPT2LMHeadModel`, `LlamaForCausalLM` and `BitNetForCausalLM`, in one file or in shards, with
//! float weights or the packed codes of BitNet. The writer stores floats, which are exact for ternary weights even in
//! F16, or packed codes for matrices with one scale.
//!
//! # Packed codes of BitNet
//!
//! A matrix `[out, in]` is stored as `U8` of `[out / 4, in]`, with one f32 `weight_scale`. Four rows share a byte,
//! and they are a quarter of the matrix apart:
//!
//! ```text
//! R = out / 4
//! byte (r, c) = sum over p in 0..4 of (code(p R + r, c) + 1) << 2p
//! ```
//!
//! In the class `autobitlinear`, a weight is `code * weight_scale`; in `bitlinear`, it is `code / weight_scale`. The
//! writer uses the first, so that f16 scales are exact.
//!
//! # Layout of GPT-2
//!
//! `Conv1D` stores weights as `[in, out]`, so they are transposed. `c_attn` contains queries, keys and values next to
//! each other. minGPT and nanoGPT use `nn.Linear`, `[out, in]`, under the same names. They differ in the shape of
//! `c_attn`.
//!
//! # Source
//! transformers: `models/{gpt2,llama,bitnet}`, `integrations/bitnet.py`.

mod config;
mod peft;
mod read;
mod tokenizer;
mod write;

pub use peft::{read as read_adapter, write as write_adapter};
pub use read::read;
pub(crate) use write::DEFAULT_TYPE;
pub use write::write;

use crate::Family;

/// Part of our tensor name, and its name in transformers, outside of blocks.
const GPT2: [(&str, &str); 4] = [
    ("token_embd", "transformer.wte"),
    ("position_embd", "transformer.wpe"),
    ("output_norm", "transformer.ln_f"),
    ("output", "lm_head"),
];
const GPT2_BLOCK: [(&str, &str); 8] = [
    ("attn_norm", "ln_1"),
    ("attn_q", "attn.c_attn"),
    ("attn_k", "attn.c_attn"),
    ("attn_v", "attn.c_attn"),
    ("attn_output", "attn.c_proj"),
    ("ffn_norm", "ln_2"),
    ("ffn_up", "mlp.c_fc"),
    ("ffn_down", "mlp.c_proj"),
];
const LLAMA: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];
const LLAMA_BLOCK: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_sub_norm", "self_attn.attn_sub_norm"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_sub_norm", "mlp.ffn_sub_norm"),
    ("ffn_down", "mlp.down_proj"),
];

/// Name in transformers of one of our tensors, such as `model.layers.0.mlp.up_proj.weight` for `blk.0.ffn_up.weight`.
///
/// In the gpt2 family, queries, keys and values have the same name, since they are fused.
fn transformers_name(family: Family, ours: &str) -> String {
    let (outside, blocks, prefix): (&[_], &[_], _) = match family {
        Family::Gpt2 => (&GPT2, &GPT2_BLOCK, "transformer.h"),
        Family::Llama | Family::Bitnet => (&LLAMA, &LLAMA_BLOCK, "model.layers"),
    };
    let lookup = |table: &[(&str, &'static str)], part: &str| {
        let known = table.iter().find(|(ours, _)| *ours == part);
        known.map(|(_, theirs)| *theirs).expect("a name of `ModelSpec::tensors`")
    };
    let (ours, kind) = ours.rsplit_once('.').expect("`.weight` or `.bias`");
    match ours.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        Some((index, part)) => format!("{prefix}.{index}.{}.{kind}", lookup(blocks, part)),
        None => format!("{}.{kind}", lookup(outside, ours)),
    }
}

/// Third of the fused `c_attn` that a tensor of a gpt2 model is; `None` for other tensors.
fn fused_third(family: Family, ours: &str) -> Option<usize> {
    let part = ours.strip_prefix("blk.")?.split('.').nth(1)?;
    let place = ["attn_q", "attn_k", "attn_v"].iter().position(|name| *name == part)?;
    (family == Family::Gpt2).then_some(place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Encoding, FormatError, PackedModel, Tensor, Tokenizer, WeightType, WriteOptions};
    use std::{
        fs,
        path::{Path, PathBuf},
    };

    fn random_model(family: Family, per_row: bool) -> PackedModel {
        crate::model::random(family, if per_row { Some(1) } else { None })
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        let mut values = vec![0.0; tensor.rows() * tensor.cols()];
        let rows = values.chunks_mut(tensor.cols()).enumerate();
        rows.for_each(|(row, values)| tensor.read_row(row, values));
        values
    }

    fn assert_same(expected: &PackedModel, found: &PackedModel) {
        assert_eq!(expected.spec, found.spec);
        assert!(expected.tensors.keys().eq(found.tensors.keys()));
        for (name, tensor) in &expected.tensors {
            let found = &found.tensors[name];
            assert_eq!(tensor.shape(), found.shape(), "{name}");
            assert!(values(tensor) == values(found), "{name}");
        }
    }

    fn options(weights: &str) -> WriteOptions {
        WriteOptions { weights: Some(weights.parse().unwrap()), embedding: None }
    }

    fn shared(path: &str) -> Option<PathBuf> {
        let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/models")).join(path);
        if !path.exists() {
            println!("skipped: {}: missing", path.display());
            return None;
        }
        Some(path)
    }

    #[test]
    fn floats_round_trip_exactly_even_in_f16() {
        let folder = tempfile::tempdir().unwrap();
        for family in [Family::Gpt2, Family::Llama, Family::Bitnet] {
            for weights in ["F32", "F16"] {
                let model = random_model(family, true);
                let path = folder.path().join(format!("{family:?} {weights}"));
                write(&model, &path, &options(weights)).unwrap();
                assert_same(&model, &read(&path).unwrap());
            }
        }
    }

    #[test]
    fn packed_codes_round_trip_as_ternary() {
        let folder = tempfile::tempdir().unwrap();
        for family in [Family::Llama, Family::Bitnet] {
            let model = random_model(family, false);
            let path = folder.path().join(format!("{family:?}"));
            write(&model, &path, &WriteOptions::default()).unwrap();
            let found = read(&path).unwrap();
            assert_same(&model, &found);
            assert!(found.tensors["blk.1.ffn_down.weight"].encoding().is_ternary());
        }
    }

    #[test]
    fn errors_of_packing_name_the_training_setting() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |model: &PackedModel, weights| {
            let error = write(model, &folder.path().join("model"), &options(weights)).unwrap_err();
            assert!(fs::read_dir(folder.path()).unwrap().next().is_none(), "the folder must stay empty");
            error.to_string()
        };
        let per_row = refused(&random_model(Family::Llama, true), "BITNET");
        assert!(per_row.contains("[quant] granularity = \"per_tensor\""), "{per_row}");
        assert!(refused(&random_model(Family::Gpt2, false), "BITNET").contains("llama and bitnet families"));
        assert!(
            refused(&random_model(Family::Llama, false), "TQ2_0").contains("expected F32, F16 or BITNET")
        );
        let mut float = random_model(Family::Llama, false);
        let matrix = float.tensors.get_mut("blk.0.attn_q.weight").unwrap();
        *matrix = matrix.encode(Encoding::F32).unwrap();
        assert!(refused(&float, "BITNET").contains("blk.0.attn_q.weight"));
    }

    #[test]
    fn an_existing_folder_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let error = write(&random_model(Family::Llama, false), folder.path(), &options("F32")).unwrap_err();
        assert!(matches!(error, FormatError::Io { .. }), "{error}");
    }

    #[test]
    fn published_checkpoints_are_read() {
        if let Some(path) = shared("stories260k") {
            let model = read(&path).unwrap();
            model.validate().unwrap();
            assert_eq!((model.spec.family, model.spec.tied), (Family::Llama, true));
            assert_eq!(model.tensors["blk.4.attn_k.weight"].shape(), [32, 64]);
        }
        if let Some(path) = shared("gpt_nano_sort") {
            let model = read(&path).unwrap();
            model.validate().unwrap();
            assert!(!model.spec.tied);
            assert!(values(&model.tensors["blk.2.attn_k.bias"]).iter().all(|&bias| bias == 0.0));
        }
    }

    /// Each change to a valid folder, and a part of its error message.
    #[test]
    fn hostile_folders_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let good = folder.path().join("good");
        write(&random_model(Family::Bitnet, false), &good, &WriteOptions::default()).unwrap();
        let weights = fs::read(good.join("model.safetensors")).unwrap();
        let config = fs::read_to_string(good.join("config.json")).unwrap();
        let header = String::from_utf8_lossy(&weights[8..]).into_owned();
        let header_length = u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
        let with_header = |from: &str, to: &str| {
            let header = header[..header_length].replacen(from, to, 1);
            assert!(!header.contains(from), "{from}");
            let mut file = (header.len() as u64).to_le_bytes().to_vec();
            file.extend_from_slice(header.as_bytes());
            file.extend_from_slice(&weights[8 + header_length..]);
            file
        };
        let with_config = |from: &str, to: &str| {
            assert!(config.contains(from), "{from}");
            config.replace(from, to).into_bytes()
        };
        let codes = {
            let mut file = weights.clone();
            *file.last_mut().unwrap() = 0xff; // codes are stored last
            file
        };
        let index =
            |shard: &str| format!(r#"{{"weight_map": {{"lm_head.weight": "{shard}"}}}}"#).into_bytes();
        let q = "model.layers.0.self_attn.q_proj.weight";
        let cases: Vec<(&str, Vec<u8>, &str)> = vec![
            ("config.json", b"{".to_vec(), "JSON"),
            ("config.json", b"[1]".to_vec(), "model_type"),
            ("config.json", with_config("\"bitnet\",\n  \"", "\"mamba\",\n  \""), "model_type"),
            ("config.json", with_config("\"hidden_size\": 24", "\"hidden_size\": 0"), "head_dim"),
            ("config.json", with_config("\"hidden_size\": 24", "\"hidden_size\": -24"), "JSON"),
            ("config.json", with_config("\"hidden_size\": 24", "\"hidden_size\": 99999999999"), "head_dim"),
            ("config.json", with_config("\"hidden_size\": 24", "\"hidden_size\": \"24\""), "JSON"),
            ("config.json", with_config("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3"), "layers.2"),
            ("config.json", with_config("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1"), "layers.1"),
            ("config.json", with_config("\"vocab_size\": 37", "\"vocab_size\": 38"), "shape [38, 24]"),
            (
                "config.json",
                with_config("\"attention_bias\": false", "\"attention_bias\": true"),
                "attention_bias",
            ),
            ("config.json", with_config("\"offline\"", "\"online\""), "quantization_mode"),
            (
                "config.json",
                with_config("\"hidden_act\": \"silu\"", "\"hidden_act\": \"gelu\""),
                "hidden_act",
            ),
            ("model.safetensors", vec![], "safetensors"),
            ("model.safetensors", weights[..7].to_vec(), "safetensors"),
            ("model.safetensors", weights[..100].to_vec(), "safetensors"),
            ("model.safetensors", weights[..weights.len() - 1].to_vec(), "safetensors"),
            ("model.safetensors", u64::MAX.to_le_bytes().to_vec(), "safetensors"),
            ("model.safetensors", with_header(&format!("\"{q}\""), "\"other\""), "q_proj.weight` is missing"),
            (
                "model.safetensors",
                with_header(&format!("{q}_scale"), "other"),
                "q_proj.weight_scale` is missing",
            ),
            ("model.safetensors", codes, "none of -1, 0, +1"),
            ("model.safetensors.index.json", index("../good/model.safetensors"), "shard"),
            ("model.safetensors.index.json", index("/etc/passwd"), "shard"),
            ("model.safetensors.index.json", index(".."), "shard"),
            ("model.safetensors.index.json", index(""), "shard"),
            ("model.safetensors.index.json", index("none.safetensors"), "none.safetensors"),
            ("model.safetensors.index.json", b"{}".to_vec(), "weight_map"),
            ("chat_template.jinja", vec![0xff], "UTF-8"),
            ("tokenizer_config.json", b"nonsense".to_vec(), "JSON"),
        ];
        for (number, (name, bytes, expected)) in cases.into_iter().enumerate() {
            let bad = folder.path().join(format!("bad {number}"));
            fs::create_dir(&bad).unwrap();
            for file in ["config.json", "model.safetensors"] {
                fs::copy(good.join(file), bad.join(file)).unwrap();
            }
            fs::write(bad.join(name), bytes).unwrap();
            if name.ends_with("index.json") {
                fs::remove_file(bad.join("model.safetensors")).unwrap(); // it would take precedence
            }
            let error = read(&bad).expect_err(name).to_string();
            assert!(error.contains(expected), "{name} {number}: {error}");
            assert!(error.contains("bad "), "{error}: no path");
        }
        // One bit of each byte of header and configuration is flipped: an error or a model, but no panic.
        for (name, length) in [("config.json", config.len()), ("model.safetensors", header_length.min(700))] {
            let file = fs::read(good.join(name)).unwrap();
            for place in 0..length {
                let mut damaged = file.clone();
                damaged[place] ^= 1 << (place % 8);
                fs::write(good.join(name), &damaged).unwrap();
                let _ = read(&good);
            }
            fs::write(good.join(name), &file).unwrap();
        }
        read(&good).unwrap();
    }

    #[test]
    fn shards_are_read_as_one() {
        let folder = tempfile::tempdir().unwrap();
        let model = random_model(Family::Llama, false);
        let path = folder.path().join("model");
        write(&model, &path, &options("F32")).unwrap();
        let whole = crate::safetensors::read(&path.join("model.safetensors")).unwrap();
        let mut map = serde_json::Map::new();
        for shard in 0..2 {
            let name = format!("model-{shard}.safetensors");
            let part = whole.iter().enumerate().filter(|(i, _)| i % 2 == shard).map(|(_, tensor)| tensor);
            let entries = part.map(|(tensor, stored)| {
                map.insert(tensor.clone(), name.clone().into());
                crate::safetensors::Entry {
                    name: tensor.clone(),
                    dtype: stored.dtype,
                    shape: stored.shape.clone(),
                    produce: Box::new(|file| std::io::Write::write_all(file, &stored.bytes)),
                }
            });
            crate::safetensors::write(&path.join(&name), entries.collect()).unwrap();
        }
        let index = serde_json::json!({ "weight_map": map });
        fs::write(path.join("model.safetensors.index.json"), index.to_string()).unwrap();
        drop(whole);
        fs::remove_file(path.join("model.safetensors")).unwrap();
        assert_same(&model, &read(&path).unwrap());
    }

    /// Writes the model, changes its configuration, and reads it.
    fn with_config(
        model: &PackedModel,
        changes: &[(&str, serde_json::Value)],
    ) -> Result<PackedModel, FormatError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        write(model, &path, &options("F32")).unwrap();
        let file = path.join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        changes.iter().for_each(|(key, value)| config[*key] = value.clone());
        fs::write(&file, config.to_string()).unwrap();
        read(&path)
    }

    #[test]
    fn keys_that_change_the_computation_are_refused_by_name() {
        use serde_json::json;
        for (family, key, value) in [
            (Family::Gpt2, "scale_attn_weights", json!(false)),
            (Family::Gpt2, "scale_attn_by_inverse_layer_idx", json!(true)),
            (Family::Gpt2, "activation_function", json!("gelu")),
            (Family::Llama, "rope_parameters", json!({"type": "linear", "factor": 4.0})),
            (Family::Llama, "rope_parameters", json!({"rope_type": "llama3"})),
            (Family::Llama, "rope_parameters", json!({"rope_theta": 1e4, "factor": 2})),
            (Family::Llama, "rope_scaling", json!({"type": "dynamic", "factor": 2.0})),
            (Family::Llama, "rope_scaling", json!("linear")),
            (Family::Llama, "partial_rotary_factor", json!(0.5)),
            (Family::Llama, "mlp_bias", json!(true)),
            (Family::Llama, "sliding_window", json!(8)),
            (Family::Bitnet, "attn_logit_softcapping", json!(50.0)),
            (Family::Llama, "embedding_multiplier", json!(12.0)),
            (Family::Llama, "logits_scaling", json!(8)),
            (Family::Llama, "head_dim", json!(4)),
        ] {
            let error = with_config(&random_model(family, true), &[(key, value)]).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("expected"), "{error}");
        }
        let neutral = [
            ("rope_scaling", json!({"rope_type": "default"})),
            ("embedding_multiplier", json!(1.0)),
            ("reorder_and_upcast_attn", json!(null)),
            ("a_key_of_tomorrow", json!(1)),
        ];
        let model = with_config(&random_model(Family::Llama, true), &neutral).unwrap();
        assert_eq!(model.warnings, ["config.json: unknown keys are ignored: `a_key_of_tomorrow`"]);
        assert!(with_config(&random_model(Family::Gpt2, true), &[]).unwrap().warnings.is_empty());
    }

    #[test]
    fn a_stored_head_is_used_unless_it_is_the_embedding() {
        for changed in [false, true] {
            let mut model = random_model(Family::Bitnet, true);
            let mut head = values(&model.tensors["token_embd.weight"]);
            head[3] += if changed { 1.0 } else { 0.0 };
            model.tensors.insert("output.weight".into(), Tensor::f32(&[37, 24], &head).unwrap());
            let found = with_config(&model, &[("tie_word_embeddings", true.into())]).unwrap();
            assert_eq!(found.spec.tied, !changed);
            assert_eq!(found.tensors.contains_key("output.weight"), changed);
        }
    }

    #[test]
    fn a_single_file_takes_precedence_over_an_index() {
        let folder = tempfile::tempdir().unwrap();
        let (model, path) = (random_model(Family::Llama, false), folder.path().join("model"));
        write(&model, &path, &options("F32")).unwrap();
        let index = r#"{"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}"#;
        fs::write(path.join("model.safetensors.index.json"), index).unwrap();
        assert_same(&model, &read(&path).unwrap());
    }

    #[test]
    fn weight_scales_of_both_linear_classes_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let model = random_model(Family::Bitnet, false);
        let path = folder.path().join("model");
        write(&model, &path, &WriteOptions { weights: Some(WeightType::Bitnet), embedding: None }).unwrap();
        let config = fs::read_to_string(path.join("config.json")).unwrap();
        fs::write(path.join("config.json"), config.replace("autobitlinear", "bitlinear")).unwrap();
        let inverse = read(&path).unwrap();
        let name = "blk.0.attn_q.weight";
        let largest = |model: &PackedModel| values(&model.tensors[name]).into_iter().fold(0.0, f32::max);
        let product = largest(&model) * largest(&inverse);
        assert!((product - 1.0).abs() < 1e-3, "{product}");
    }

    #[test]
    fn tokenizers_and_templates_round_trip() {
        let folder = tempfile::tempdir().unwrap();
        let characters = || Tokenizer::from_characters(" abcdefé".chars().collect()).unwrap();
        for (number, tokenizer) in [Tokenizer::byte(), characters()].into_iter().enumerate() {
            let mut model = random_model(Family::Llama, false);
            model.spec.vocab_size = tokenizer.vocab_size();
            let table: Vec<f32> = (0..24 * model.spec.vocab_size).map(|i| i as f32).collect();
            let shape = [model.spec.vocab_size, 24];
            model.tensors.insert("token_embd.weight".into(), Tensor::f32(&shape, &table).unwrap());
            model.chat_template = Some(crate::chat::TEMPLATE.into());
            model.tokenizer = Some(tokenizer);
            let path = folder.path().join(number.to_string());
            write(&model, &path, &options("F32")).unwrap();
            let found = read(&path).unwrap();
            assert_eq!(model.chat_template, found.chat_template);
            let (expected, found) = (model.tokenizer.unwrap(), found.tokenizer.unwrap());
            assert_eq!(expected.ends(), found.ends());
            assert!(expected.specials().eq(found.specials()));
            let ids = expected.encode("a bé cafe").unwrap();
            assert_eq!(ids, found.encode("a bé cafe").unwrap());
            assert_eq!(expected.decode(&ids), found.decode(&ids));
        }
    }
}
