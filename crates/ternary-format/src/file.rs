//! [`read_model`] and [`write_model`]: model files of every kind, chosen by the path.

use crate::{
    Encoding, FormatError, PackedModel, Tensor, WeightType, WriteOptions, archive,
    gguf::{self, GgufOptions},
    huggingface, onnx,
};
use std::path::Path;

/// Reads a model: a Hugging Face folder, an [archive] from `*.ternary`, or else a GGUF file.
///
/// Tensors stay in the memory-mapped file where their layout allows it.
///
/// # Errors
/// `NoModel`: nothing at this path. `NoModelFolder`: a folder without `config.json`. `Onnx`: an ONNX file. Those of
/// [`huggingface::read`], [`archive::read`] and [`gguf::read`].
pub fn read_model(path: &Path) -> Result<PackedModel, FormatError> {
    match extension(path) {
        _ if path.try_exists().is_ok_and(|exists| !exists) => Err(FormatError::NoModel.in_file(path)),
        _ if path.is_dir() && !path.join("config.json").exists() => {
            Err(FormatError::NoModelFolder.in_file(path))
        }
        _ if path.is_dir() => huggingface::read(path),
        Some("onnx") if path.exists() => Err(FormatError::Onnx.in_file(path)),
        Some("ternary") => archive::read(path),
        _ => gguf::read(path),
    }
}

/// Writes a model: GGUF to `*.gguf`, ONNX to `*.onnx`, an [archive] to `*.ternary`, or else a Hugging Face folder. Returns the
/// type of the matrices of the blocks, in an archive that of the first one.
///
/// A LoRA adapter is merged into float matrices.
///
/// # Errors
/// `Unmergeable`: an adapter on matrices that are not float. `NotFinite`: a weight is NaN or infinite. `WeightType`:
/// a type that the kind of file does not support. Those of [`huggingface::write`], [`onnx::write`],
/// [`archive::write()`] and [`gguf::write()`].
pub fn write_model(
    model: &PackedModel,
    path: &Path,
    options: &WriteOptions,
) -> Result<WeightType, FormatError> {
    model.check_finite()?;
    let model = &*model.merged()?;
    match extension(path) {
        Some("gguf") => write_gguf(model, path, options).map(WeightType::Encoded),
        Some("ternary") => write_archive(model, path, options).map(WeightType::Encoded),
        Some("onnx") => {
            onnx::write(model, path, options)?;
            Ok(options.weights.unwrap_or(onnx::DEFAULT_TYPE))
        }
        _ => {
            huggingface::write(model, path, options)?;
            Ok(options.weights.unwrap_or(huggingface::DEFAULT_TYPE))
        }
    }
}

/// The types of the matrices of the blocks in GGUF files and archives.
const GGML_TYPES: &str = "F32, F16, Q8_0, Q4_0, TQ1_0, TQ2_0 or Q2_0 in this kind of file";

/// The matrices of the transformer blocks.
fn matrices(model: &PackedModel) -> impl Iterator<Item = &Tensor> {
    let blocks = model.tensors.iter().filter(|(name, _)| name.starts_with("blk."));
    blocks.map(|(_, tensor)| tensor).filter(|tensor| tensor.shape().len() == 2)
}

fn extension(path: &Path) -> Option<&str> {
    path.extension().and_then(|extension| extension.to_str())
}

fn write_archive(model: &PackedModel, path: &Path, options: &WriteOptions) -> Result<Encoding, FormatError> {
    model.validate()?;
    let mut model = model.clone();
    for (name, tensor) in &mut model.tensors {
        let encoding = match (name.as_str(), options.weights) {
            ("token_embd.weight" | "output.weight", _) => options.embedding,
            (_, None) => None,
            (name, _) if !name.starts_with("blk.") || tensor.shape().len() < 2 => None,
            (_, Some(WeightType::Encoded(encoding))) => Some(encoding),
            (_, Some(found)) => {
                return Err(FormatError::WeightType { found, expected: GGML_TYPES });
            }
        };
        if let Some(encoding) = encoding {
            *tensor = tensor.encode(encoding).map_err(|error| error.in_tensor(name))?;
        }
    }
    archive::write(&model, path)?;
    Ok(matrices(&model).next().map_or(Encoding::F32, Tensor::encoding))
}

fn write_gguf(model: &PackedModel, path: &Path, options: &WriteOptions) -> Result<Encoding, FormatError> {
    model.validate()?;
    let blocks = match options.weights {
        None => gguf_blocks(model),
        Some(WeightType::Encoded(encoding)) => encoding,
        Some(found) => {
            return Err(FormatError::WeightType { found, expected: GGML_TYPES });
        }
    };
    let table = |name| {
        let table: &Tensor = &model.tensors[name];
        let ternary = (table.encoding().is_ternary() && blocks.is_ternary()).then_some(blocks);
        let known =
            [Encoding::F16, Encoding::Q8_0, Encoding::Q4_0, Encoding::Tq2_0, Encoding::Tq1_0, Encoding::Q2_0];
        options.embedding.or(ternary).unwrap_or_else(|| options.table(table, &known))
    };
    let embedding = table("token_embd.weight");
    let head = if model.spec.tied { embedding } else { table("output.weight") };
    gguf::write(model, path, &GgufOptions { blocks, embedding, head })?;
    Ok(blocks)
}

/// Default weight type of a GGUF file: TQ2_0 if rows and scales fit its blocks of 256 weights, else Q2_0. For a model
/// that is not ternary, the type of its first float matrix.
fn gguf_blocks(model: &PackedModel) -> Encoding {
    let Some(float) = matrices(model).find(|matrix| !matrix.encoding().is_ternary()) else {
        let fits = matrices(model).all(|matrix| matrix.encode(Encoding::Tq2_0).is_ok());
        return if fits { Encoding::Tq2_0 } else { Encoding::Q2_0 };
    };
    let known = [Encoding::F16, Encoding::Q8_0, Encoding::Q4_0];
    Some(float.encoding()).filter(|own| known.contains(own)).unwrap_or(Encoding::F32)
}
