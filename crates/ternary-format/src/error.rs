//! [`FormatError`]: what can be wrong with a model file.

use crate::Encoding;
use std::path::{Path, PathBuf};

/// A file that cannot be read or written, or a model that does not fit a file type.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    /// Where: the file. [`kind`](Self::kind) is what.
    #[error("{path}: {source}")]
    InFile { path: PathBuf, source: Box<FormatError> },
    /// Where: the tensor. [`kind`](Self::kind) is what.
    #[error("tensor `{tensor}`: {source}")]
    InTensor { tensor: String, source: Box<FormatError> },

    #[error(
        "expected a model (a .gguf or .ternary file, a Hugging Face folder), found a file that begins with {:?}",
        String::from_utf8_lossy(found)
    )]
    Magic { found: Vec<u8> },
    #[error(
        "ONNX files are written for onnxruntime and not read: expected the run folder, .gguf or .ternary file that it was \
         exported from"
    )]
    Onnx,
    #[error(
        "expected a Hugging Face folder (with config.json) or a run folder (with experiment.toml), found neither"
    )]
    NoModelFolder,
    #[error("GGUF version {found}, expected 2 or 3, little-endian")]
    Version { found: u32 },
    #[error("offset {offset}: {what} takes {expected} bytes, the file has {left} more")]
    Truncated { what: &'static str, offset: usize, expected: u64, left: usize },
    #[error("offset {offset}: {found} {what} in the {left} bytes that are left of the file")]
    Count { what: &'static str, offset: usize, found: u64, left: usize },
    #[error("offset {offset}: {what} is no UTF-8")]
    NotUtf8 { what: &'static str, offset: usize },
    #[error("offset {offset}: an empty key")]
    EmptyKey { offset: usize },
    #[error("key `{key}` is there twice")]
    DuplicateKey { key: String },
    #[error("key `{key}` has type {found}, which GGUF does not know")]
    ValueType { key: String, found: u32 },
    #[error("alignment {found}, expected a power of two of at most the file's {file} bytes")]
    Alignment { found: u32, file: usize },
    #[error("key `{key}` is missing")]
    MissingKey { key: String },
    #[error("key `{key}` is {found}, expected {expected}")]
    Value { key: String, found: String, expected: String },
    #[error("a tensor name of {bytes} bytes, expected less than 64")]
    TensorName { bytes: usize },
    #[error("tensor `{tensor}` is there twice")]
    DuplicateTensor { tensor: String },
    #[error("tensor `{tensor}` has {found} dimensions, expected 1 to 4")]
    Dimensions { tensor: String, found: u32 },
    #[error("tensor `{tensor}` has type {found}, which is not read here")]
    TensorType { tensor: String, found: u32 },
    #[error("offset {found} within the data, expected {expected}: tensors follow each other")]
    Offset { expected: u64, found: u64 },
    #[error("architecture `{found}`, expected gpt2, llama or bitnet")]
    Architecture { found: String },
    #[error("{tokens} tokens for an embedding of {rows} rows")]
    Vocabulary { tokens: usize, rows: usize },
    #[error("token `{token}` is there twice")]
    DuplicateToken { token: String },
    #[error("no tokenizer that can be used: {why}")]
    Tokenizer { why: String },
    #[error("a text of more than {most} tokens")]
    TooManyTokens { most: usize },
    #[error("no id for {character:?} (U+{:04X}) among {known} characters", *character as u32)]
    UnknownCharacter { character: char, known: usize },
    #[error("cannot encode {text:?}: {why}")]
    Encode { text: String, why: String },
    #[error("chat template: {why}")]
    ChatTemplate { why: String },
    #[error("{what}: {why}")]
    NotInGguf { what: String, why: String },
    #[error(
        "{setting} is {width}, {encoding} needs a multiple of {block}: {instead} or train with {setting} a multiple \
         of {block}"
    )]
    Width { setting: &'static str, width: usize, encoding: Encoding, block: usize, instead: String },

    #[error("`{key}` is {found}, expected {expected}")]
    Spec { key: &'static str, found: String, expected: String },
    #[error("tensor `{tensor}` is missing")]
    MissingTensor { tensor: String },
    #[error("tensor `{tensor}` belongs to no model of this family")]
    UnknownTensor { tensor: String },
    #[error("expected shape {expected:?}, found {found:?}")]
    WrongShape { expected: Vec<usize>, found: Vec<usize> },
    #[error("shape {shape:?}: expected dimensions above 0 whose product fits in memory")]
    Shape { shape: Vec<usize> },
    #[error("{encoding} tensor of shape {shape:?}: expected {expected} bytes, found {found}")]
    TensorBytes { encoding: Encoding, shape: Vec<usize>, expected: usize, found: usize },
    #[error(
        "rows of {cols} weights, {encoding} needs a multiple of {block}: use another type or train with one"
    )]
    RowLength { encoding: Encoding, cols: usize, block: usize },
    #[error("row {row}: a code that is none of -1, 0, +1 in a {encoding} tensor")]
    NotACode { encoding: Encoding, row: usize },
    #[error(
        "{found} weights cannot become {expected}: only ternary weights can, train with a ternary quantizer"
    )]
    NotTernary { found: Encoding, expected: Encoding },
    #[error(
        "row {row}: scales differ within {block} weights, {encoding} has one for them: \
         train with granularity \"per_tensor\", \"per_channel\" or groups of a multiple of {block}"
    )]
    ScalesDiffer { encoding: Encoding, row: usize, block: usize },
    #[error(
        "an adapter cannot be merged into {encoding} weights, as their sum would be none of these: keep it beside the \
         model (`--adapter` of duck), or merge it into a float model"
    )]
    Unmergeable { encoding: Encoding },
    #[error(
        "row {row}: a weight or scale that is NaN, infinite or too large for its type: expected finite numbers; was the \
         model damaged, or converted to a type with too small a range, such as F16?"
    )]
    NotFinite { row: usize },
    #[error("{encoding} is read, never written")]
    ReadOnly { encoding: Encoding },

    #[error("expected the magic bytes \"TRNA\", found {found:?}")]
    ArchiveMagic { found: [u8; 4] },
    #[error("archive version {found}, expected {expected}")]
    ArchiveVersion { found: u8, expected: u8 },
    #[error(
        "its first {packed} bytes unpack to {found}, expected at most {expected}: no model packs so well that is not \
         zero nearly everywhere"
    )]
    Expands { packed: usize, found: usize, expected: usize },
    #[error("{part}: {why}: the file is damaged")]
    Damaged { part: String, why: &'static str },

    #[error("not the JSON that it should be: {source}")]
    Json { source: serde_json::Error },
    #[error("not a safetensors file: {source}")]
    Safetensors { source: safetensors::SafeTensorError },
    #[error("expected values of type {expected}, found {found:?}")]
    StoredType { expected: &'static str, found: safetensors::Dtype },
    #[error("{found} bytes, expected at most {expected}")]
    TooLong { expected: u64, found: u64 },
    #[error("shard `{shard}`: expected the name of a file in the same folder")]
    Shard { shard: String },
    #[error("weight scale {scale}, expected a finite number, at least 0")]
    Scale { scale: f32 },
    #[error("{rows} rows, BitNet packs a multiple of 4")]
    RowCount { rows: usize },
    #[error(
        "row {row} has another scale than the rows before it, and a BitNet folder has one scale per matrix: write floats \
         (`--type F32` or `--type F16` of duck export), or train with `[quant] granularity = \"per_tensor\"`"
    )]
    NotPerTensor { row: usize },
    #[error("BitNet's packed weights are read in the llama and bitnet families only: write F32 or F16")]
    Unpackable,
    #[error(
        "{group} weights share a scale, onnxruntime's blocks need a multiple of 16: train with granularity \
         \"per_channel\" or groups of a multiple of 16, or write INT2"
    )]
    Group { group: usize },
    #[error("more than the {limit} bytes that an ONNX file can hold: write a GGUF file or smaller weights")]
    OnnxSize { limit: usize },
    #[error("weight type {found}, expected {expected}")]
    WeightType { found: crate::WeightType, expected: &'static str },
}

impl FormatError {
    /// What is wrong, without where.
    pub fn kind(&self) -> &Self {
        match self {
            Self::InFile { source, .. } | Self::InTensor { source, .. } => source.kind(),
            other => other,
        }
    }

    /// The error of an IO operation on `path`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { path: path.into(), source }
    }

    /// Adds the file.
    pub(crate) fn in_file(self, path: &Path) -> Self {
        match self {
            Self::Io { .. } | Self::InFile { .. } => self,
            _ => Self::InFile { path: path.into(), source: self.into() },
        }
    }

    /// Adds the tensor.
    pub fn in_tensor(self, tensor: &str) -> Self {
        match self {
            Self::Io { .. } | Self::InTensor { .. } => self,
            _ => Self::InTensor { tensor: tensor.into(), source: self.into() },
        }
    }
}

impl From<serde_json::Error> for FormatError {
    fn from(source: serde_json::Error) -> Self {
        Self::Json { source }
    }
}
