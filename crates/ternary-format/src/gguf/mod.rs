//! GGUF files, as llama.cpp reads and writes them, of its architectures `gpt2`, `llama` and `bitnet`.
//!
//! | file | content |
//! |---|---|
//! | `container.rs` | the container: metadata and tensors, whatever they mean |
//! | `architecture.rs` | metadata keys, tensor names and row orders of the three architectures |
//! | `vocabulary/` | tokenizers, to and from the keys of llama.cpp |
//!
//! # Source
//! `llama-model.cpp`, `models/{gpt2,llama,bitnet}.cpp` and `conversion/` of llama.cpp.

mod architecture;
mod container;
mod vocabulary;

use crate::{Bytes, Encoding, FormatError, ModelSpec, PackedModel, Tensor, disk, rotary::half_rotation_row};
use architecture::FileTensor;
use container::{ALIGNMENT, Container, Value};
use getset::WithSetters;
use std::{collections::BTreeSet, io::Write, path::Path};

/// Storage types of the matrices in a file. Norms, biases and learned positions are always F32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, WithSetters)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct GgufOptions {
    /// Matrices of the transformer blocks.
    pub blocks: Encoding,
    /// Token embedding.
    pub embedding: Encoding,
    /// Output head, if it is not the embedding.
    pub head: Encoding,
}

impl GgufOptions {
    /// Stores all matrices with one encoding.
    pub fn new(encoding: Encoding) -> Self {
        Self { blocks: encoding, embedding: encoding, head: encoding }
    }
}

/// Reads a model. Its tensors stay in the memory-mapped file.
///
/// # Errors
/// `Io`: the file cannot be read. `InFile`: what is wrong with it.
pub fn read(path: &Path) -> Result<PackedModel, FormatError> {
    parse(Bytes::map(path)?).map_err(|error| error.in_file(path))
}

/// Reads a model from the bytes of a file.
///
/// # Errors
/// What is wrong with the file.
pub fn parse(file: Bytes) -> Result<PackedModel, FormatError> {
    let container = Container::parse(file)?;
    let spec = architecture::spec(&container)?;
    let warnings = Vec::from_iter(architecture::check_keys(&container, &spec)?);
    let mut used = BTreeSet::new();
    let mut model = PackedModel {
        name: container.metadata.get("general.name").and_then(Value::as_text).unwrap_or("model").into(),
        tokenizer: vocabulary::read(&container, spec.vocab_size)?,
        tensors: Default::default(),
        adapter: None,
        warnings,
        chat_template: container
            .metadata
            .get("tokenizer.chat_template")
            .and_then(Value::as_text)
            .map(Into::into),
        spec,
    };
    for tensor in architecture::layout(&model.spec) {
        let mut first = 0;
        for (name, rows) in &tensor.parts {
            let whole = tensor.parts.len() == 1;
            let part = (!whole).then_some(first..first + rows);
            let mut part = container.tensor(&tensor.name, part, &tensor.shape)?;
            if tensor.interleaved {
                part = part.half_rotation(model.spec.head_dim());
            }
            model.tensors.insert(name.clone(), part);
            first += rows;
        }
        used.insert(tensor.name);
    }
    if let Some(tensor) = container.names().find(|name| !used.contains(*name)) {
        return Err(FormatError::UnknownTensor { tensor: tensor.into() });
    }
    Ok(model)
}

/// Writes a model atomically.
///
/// Ternary weights keep their codes and scales exactly. Weights that are not ternary are never rounded to ternary
/// ones.
///
/// # Errors
/// Those of [`PackedModel::validate`] and [`PackedModel::merged`]. `Width`, `ScalesDiffer`, `NotTernary`, `ReadOnly`:
/// a tensor does not fit its type. `NotInGguf`: llama.cpp cannot run the model. `Io`.
pub fn write(model: &PackedModel, path: &Path, options: &GgufOptions) -> Result<(), FormatError> {
    model.validate()?;
    let model = &*model.merged()?;
    write_with(model, path, options, |name| Ok(model.tensors[name].clone()))
}

/// Writes a model whose tensors do not fit in memory together. `tensor(name)` is called once per tensor, when it is
/// written; the tensors of `model` are ignored.
///
/// # Errors
/// Those of [`write()`] and of `tensor`.
pub fn write_with(
    model: &PackedModel,
    path: &Path,
    options: &GgufOptions,
    mut tensor: impl FnMut(&str) -> Result<Tensor, FormatError>,
) -> Result<(), FormatError> {
    let tensors = encoded_layout(&model.spec, options)?;
    let metadata = architecture::metadata(model, options)?;
    let infos: Vec<_> = tensors.iter().map(|(tensor, encoding)| tensor.info(*encoding)).collect();
    let header = container::header(&metadata, &infos)?;
    disk::atomic_write(path, |file| {
        file.write_all(&header).map_err(FormatError::io(path))?;
        for (to, encoding) in &tensors {
            let mut written = 0;
            for (name, rows) in &to.parts {
                let part = tensor(name)?;
                let mut expected = to.shape.clone();
                expected[0] = *rows;
                if part.shape() != expected {
                    let found = part.shape().into();
                    return Err(FormatError::WrongShape { expected, found }.in_tensor(name));
                }
                let mut part = part.encode(*encoding).map_err(|error| error.in_tensor(name))?;
                if to.interleaved {
                    let head_dim = model.spec.head_dim();
                    part = part.select_rows((0..*rows).map(|row| half_rotation_row(row, head_dim)));
                }
                file.write_all(part.bytes()).map_err(FormatError::io(path))?;
                written += part.bytes().len();
            }
            let padding = written.next_multiple_of(ALIGNMENT) - written;
            file.write_all(&[0; ALIGNMENT][..padding]).map_err(FormatError::io(path))?;
        }
        Ok(())
    })
}

/// Tensors of the file with their encodings.
fn encoded_layout(
    spec: &ModelSpec,
    options: &GgufOptions,
) -> Result<Vec<(FileTensor, Encoding)>, FormatError> {
    spec.validate()?;
    architecture::check_llama_cpp(spec)?;
    let mut tensors = Vec::new();
    for tensor in architecture::layout(spec) {
        let encoding = match tensor.name.as_str() {
            "token_embd.weight" => options.embedding,
            "output.weight" => options.head,
            _ if tensor.is_float() => Encoding::F32,
            _ => options.blocks,
        };
        tensor.check_width(encoding)?;
        tensors.push((tensor, encoding));
    }
    Ok(tensors)
}
