//! From a [`PackedModel`] to a folder.

use super::{config, fused_third, tokenizer, transformers_name};
use crate::{
    Encoding, Family, FormatError, PackedModel, Tensor, WeightType, WriteOptions,
    disk::{self, NewFolder},
    safetensors::{self, Entry, Produce},
};
use ::safetensors::tensor::Dtype;
use half::f16;
use serde_json::Value;
use std::{io::Write, path::Path};

/// The type of the matrices of the blocks where none is selected.
pub(crate) const DEFAULT_TYPE: WeightType = WeightType::Bitnet;

/// Writes a new folder. Weights are packed codes unless `options` select F32 or F16.
///
/// # Errors
/// `Io`; of kind `AlreadyExists` if the folder exists. `WeightType`: not F32, F16 or BITNET. `NotPerTensor`,
/// `NotTernary`, `RowCount`, `Unpackable`: weights or models that cannot be packed. Those of
/// [`PackedModel::validate`] and [`PackedModel::merged`].
pub fn write(model: &PackedModel, folder: &Path, options: &WriteOptions) -> Result<(), FormatError> {
    model.validate()?;
    let model = &*model.merged()?;
    let weights = options.weights.unwrap_or(DEFAULT_TYPE);
    let tables = options.table(&model.tensors["token_embd.weight"], &[Encoding::F16]);
    float_type(tables, "F32 or F16")?;
    let entries = match weights {
        WeightType::Encoded(encoding) => {
            float_type(encoding, "F32, F16 or BITNET")?;
            check_range(model, encoding, tables)?;
            float_entries(model, encoding, tables)
        }
        WeightType::Bitnet => packed_entries(model, tables)?,
        _ => return Err(FormatError::WeightType { found: weights, expected: "F32, F16 or BITNET" }),
    };
    let dtype = if weights == WeightType::Encoded(Encoding::F16) { "float16" } else { "float32" };
    let new = NewFolder::create(folder).map_err(FormatError::io(folder))?;
    let text = |name: &str, text: String| {
        let path = new.scratch().join(name);
        disk::write_new(&path, text.as_bytes()).map_err(FormatError::io(&path))
    };
    let json = |name: &str, value: &Value| text(name, format!("{value:#}\n"));
    let mut config = config::to_json(&model.spec, dtype, weights == WeightType::Bitnet);
    if let Some(tokens) = &model.tokenizer {
        tokenizer::set_ends(tokens, &mut config);
        let mut generation = Value::Object(Default::default());
        tokenizer::set_ends(tokens, &mut generation);
        json("generation_config.json", &generation)?;
        json("tokenizer.json", &tokenizer::to_json(tokens))?;
        let template = model.chat_template.as_deref();
        json("tokenizer_config.json", &tokenizer::config(tokens, model.spec.context, template))?;
    } else {
        // The defaults of transformers are ids of another vocabulary.
        config["bos_token_id"] = Value::Null;
        config["eos_token_id"] = Value::Null;
    }
    json("config.json", &config)?;
    text("README.md", model_card(model, weights))?;
    safetensors::write(&new.scratch().join("model.safetensors"), entries)?;
    new.commit().map_err(FormatError::io(folder))
}

fn float_type(encoding: Encoding, expected: &'static str) -> Result<(), FormatError> {
    match encoding {
        Encoding::F32 | Encoding::F16 => Ok(()),
        _ => Err(FormatError::WeightType { found: WeightType::Encoded(encoding), expected }),
    }
}

/// Checks that matrices and tables fit the range of their types.
///
/// # Errors
/// `NotFinite`: a weight of an F16 tensor is out of range.
fn check_range(model: &PackedModel, matrices: Encoding, tables: Encoding) -> Result<(), FormatError> {
    for (name, tensor) in model.tensors.iter().filter(|(_, tensor)| tensor.shape().len() == 2) {
        let encoding = if name.starts_with("blk.") { matrices } else { tables };
        tensor.encode(encoding).map_err(|error| error.in_tensor(name))?;
    }
    Ok(())
}

/// Float tensors: matrices of the blocks as `matrices`, embedding tables as `tables`, all others as F32.
fn float_entries(model: &PackedModel, matrices: Encoding, tables: Encoding) -> Vec<Entry<'_>> {
    let family = model.spec.family;
    let names =
        model.tensors.iter().filter(|(name, _)| fused_third(family, name).is_none_or(|part| part == 0));
    names
        .map(|(name, tensor)| {
            let matrix = name.starts_with("blk.") && tensor.shape().len() == 2;
            let encoding = match tensor.shape().len() {
                1 => Encoding::F32,
                _ if matrix => matrices,
                _ => tables,
            };
            let parts = match fused_third(family, name) {
                Some(_) => ["attn_q", "attn_k", "attn_v"]
                    .map(|part| &model.tensors[&name.replace("attn_q", part)])
                    .to_vec(),
                None => vec![tensor],
            };
            let transposed = matrix && family == Family::Gpt2;
            let mut shape = tensor.shape().to_vec();
            shape[0] *= parts.len();
            if transposed {
                shape.reverse();
            }
            Entry {
                name: transformers_name(family, name),
                dtype: if encoding == Encoding::F16 { Dtype::F16 } else { Dtype::F32 },
                shape,
                produce: floats(parts, transposed, encoding),
            }
        })
        .collect()
}

/// Writes the values of `parts`, each `[out, in]`, one after another; transposed as a whole if `transposed`.
fn floats(parts: Vec<&Tensor>, transposed: bool, encoding: Encoding) -> Produce<'_> {
    Box::new(move |file| {
        let put = |file: &mut dyn Write, values: &[f32]| {
            let bytes: Vec<u8> = match encoding {
                Encoding::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
                _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            };
            file.write_all(&bytes)
        };
        let cols = parts[0].cols();
        let rows = parts.iter().flat_map(|part| (0..part.rows()).map(move |row| (part, row)));
        let mut values = vec![0.0; cols];
        if !transposed {
            return rows.into_iter().try_for_each(|(part, row)| {
                part.read_row(row, &mut values);
                put(file, &values)
            });
        }
        let out: usize = parts.iter().map(|part| part.rows()).sum();
        let mut whole = vec![0.0; out * cols];
        for (place, (part, row)) in rows.enumerate() {
            part.read_row(row, &mut values);
            values.iter().enumerate().for_each(|(col, &value)| whole[col * out + place] = value);
        }
        whole.chunks(out).try_for_each(|row| put(file, row))
    })
}

/// Tensors of the model, with the matrices of the blocks packed as in BitNet.
fn packed_entries(model: &PackedModel, tables: Encoding) -> Result<Vec<Entry<'_>>, FormatError> {
    if model.spec.family == Family::Gpt2 {
        return Err(FormatError::Unpackable);
    }
    let mut entries = float_entries(model, Encoding::F32, tables);
    for (name, tensor) in &model.tensors {
        if !name.starts_with("blk.") || tensor.shape().len() != 2 {
            continue;
        }
        let theirs = transformers_name(model.spec.family, name);
        let scale = tensor_scale(tensor).map_err(|error| error.in_tensor(name))?;
        let entry = entries.iter_mut().find(|entry| entry.name == theirs).expect("every tensor has an entry");
        entry.dtype = Dtype::U8;
        entry.shape = vec![tensor.rows() / 4, tensor.cols()];
        entry.produce = pack_bitnet(tensor);
        entries.push(Entry {
            name: format!("{theirs}_scale"),
            dtype: Dtype::F32,
            shape: vec![1],
            produce: Box::new(move |file| file.write_all(&scale.to_le_bytes())),
        });
    }
    Ok(entries)
}

/// The single scale of a matrix that can be packed.
fn tensor_scale(tensor: &Tensor) -> Result<f32, FormatError> {
    let (rows, cols) = (tensor.rows(), tensor.cols());
    let Some(group) = tensor.ternary_group() else {
        let expected = Encoding::Ternary { group: cols };
        return Err(FormatError::NotTernary { found: tensor.encoding(), expected });
    };
    if rows % 4 != 0 {
        return Err(FormatError::RowCount { rows });
    }
    let mut codes = vec![0; cols];
    let mut scales = vec![f16::ZERO; cols / group];
    let mut one = None;
    for row in 0..rows {
        tensor.read_ternary_row(row, &mut codes, &mut scales);
        for (codes, &scale) in codes.chunks(group).zip(&scales) {
            // If all codes of a group are zero, its scale has no effect.
            if codes.iter().any(|&code| code != 0) && *one.get_or_insert(scale) != scale {
                return Err(FormatError::NotPerTensor { row });
            }
        }
    }
    Ok(one.unwrap_or(f16::ONE).to_f32())
}

/// Packs codes as in BitNet; see the [module](super) for their layout.
fn pack_bitnet(tensor: &Tensor) -> Produce<'_> {
    Box::new(move |file| {
        let (rows, cols) = (tensor.rows() / 4, tensor.cols());
        let mut scales =
            vec![
                f16::ZERO;
                cols / tensor.ternary_group().expect("`tensor_scale` checked that it is ternary")
            ];
        let mut codes = vec![0; cols];
        (0..rows).try_for_each(|row| {
            let mut bytes = vec![0; cols];
            for plane in 0..4 {
                tensor.read_ternary_row(plane * rows + row, &mut codes, &mut scales);
                let places = bytes.iter_mut().zip(&codes);
                places.for_each(|(byte, code)| *byte |= ((code + 1) as u8) << (2 * plane));
            }
            file.write_all(&bytes)
        })
    })
}

/// The model card, `README.md`.
fn model_card(model: &PackedModel, weights: WeightType) -> String {
    let PackedModel { name, spec, .. } = model;
    let stored = match weights {
        WeightType::Encoded(encoding) => format!("weights as {encoding}"),
        _ => "ternary weights of 2 bits, with one scale per matrix".into(),
    };
    format!(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- ternary\n---\n\n# {name}\n\n\
         A language model of the {family:?} family, trained with ternary weights (-1, 0, +1): {layers} layers of \
         width {width}, vocabulary {vocab}, context {context}. This folder contains {stored}.\n\n\
         ```python\n\
         from transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
         folder = \".\"  # the path of this folder\n\
         tokenizer = AutoTokenizer.from_pretrained(folder)\n\
         model = AutoModelForCausalLM.from_pretrained(folder)\n\
         ```\n",
        family = spec.family,
        layers = spec.n_layers,
        width = spec.d_model,
        vocab = spec.vocab_size,
        context = spec.context,
    )
}
