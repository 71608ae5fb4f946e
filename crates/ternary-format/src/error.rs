//! [`FormatError`]: why a model file cannot be read or written.

use crate::Encoding;
use std::path::{Path, PathBuf};

/// Why a model file cannot be read or written, or why a model does not fit a file type.
///
/// A message states what was found, what was expected and what to do. [`InFile`](Self::InFile) and
/// [`InTensor`](Self::InTensor) add the place; [`kind`](Self::kind) returns the error without it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// An operation of the file system failed.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// Adds the file to another error. [`kind`](Self::kind) returns the error without it.
    #[error("{path}: {source}")]
    InFile {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<FormatError>,
    },
    /// Adds the tensor to another error. [`kind`](Self::kind) returns the error without it.
    #[error("tensor `{tensor}`: {source}")]
    InTensor {
        /// Name of the tensor.
        tensor: String,
        /// What is wrong with it.
        source: Box<FormatError>,
    },

    /// A file does not start with `GGUF`, so it is no model that we read.
    #[error(
        "expected a model (a .gguf or .ternary file, a Hugging Face folder), found a file that begins with {:?}",
        String::from_utf8_lossy(found)
    )]
    Magic {
        /// The first bytes of the file.
        found: Vec<u8>,
    },
    /// The file is an ONNX graph, which this crate writes but does not read.
    #[error(
        "ONNX files are written for onnxruntime and not read: expected the run folder, .gguf or .ternary file that it was \
         exported from"
    )]
    Onnx,
    /// There is nothing at the path of a model.
    #[error(
        "expected a model (a .gguf or .ternary file, a Hugging Face folder or a run folder), found no file or folder of this name"
    )]
    NoModel,
    /// The folder is neither a run folder nor a Hugging Face folder.
    #[error(
        "expected a Hugging Face folder (with config.json) or a run folder (with experiment.toml), found neither"
    )]
    NoModelFolder,
    /// A GGUF file has an unsupported version, or is big-endian.
    #[error("GGUF version {found}, expected 2 or 3, little-endian")]
    Version {
        /// The version field.
        found: u32,
    },
    /// The file ends inside a field.
    #[error("offset {offset}: {what} takes {expected} bytes, the file has {left} more")]
    Truncated {
        /// The field.
        what: &'static str,
        /// Where the field starts, in bytes.
        offset: usize,
        /// Length of the field, in bytes.
        expected: u64,
        /// Bytes from `offset` to the end of the file.
        left: usize,
    },
    /// A count is larger than the rest of the file can hold.
    #[error(
        "offset {offset}: a count of {found} {what}, expected no more than fit into the remaining {left} \
         bytes"
    )]
    Count {
        /// What is counted.
        what: &'static str,
        /// Where the count is, in bytes.
        offset: usize,
        /// The count.
        found: u64,
        /// Bytes from the end of the count to the end of the file.
        left: usize,
    },
    /// A string is not UTF-8.
    #[error("offset {offset}: {what} is not valid UTF-8")]
    NotUtf8 {
        /// The string.
        what: &'static str,
        /// Where it starts, in bytes.
        offset: usize,
    },
    /// A metadata key has no characters.
    #[error("offset {offset}: the key is empty, expected a name")]
    EmptyKey {
        /// Where the key is, in bytes.
        offset: usize,
    },
    /// A metadata key occurs twice.
    #[error("key `{key}` occurs twice, expected once")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// A metadata value has a type that GGUF does not define, or is an array of arrays.
    #[error("key `{key}` has value type {found}, expected a number, a string or an array of these (0 to 12)")]
    ValueType {
        /// The key.
        key: String,
        /// Number of the type.
        found: u32,
    },
    /// `general.alignment` is not usable.
    #[error(
        "alignment {found}, expected a power of two that is at most the length of the file, {file} bytes"
    )]
    Alignment {
        /// The alignment, in bytes.
        found: u32,
        /// Length of the file, in bytes.
        file: usize,
    },
    /// A required metadata key is missing.
    #[error("key `{key}` is missing")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A key has a value of the wrong type, or one that this crate does not support.
    #[error("key `{key}` is {found}, expected {expected}")]
    Value {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// Supported values.
        expected: String,
    },
    /// A tensor name is longer than GGML allows.
    #[error("tensor name of {bytes} bytes, expected less than 64")]
    TensorName {
        /// Length of the name, in bytes.
        bytes: usize,
    },
    /// Two tensors have the same name.
    #[error("tensor `{tensor}` occurs twice, expected once")]
    DuplicateTensor {
        /// The name.
        tensor: String,
    },
    /// A tensor has no dimension, or more than GGML allows.
    #[error("tensor `{tensor}` has {found} dimensions, expected 1 to 4")]
    Dimensions {
        /// Name of the tensor.
        tensor: String,
        /// Its number of dimensions.
        found: u32,
    },
    /// A tensor has a GGML type that this crate does not read.
    #[error(
        "tensor `{tensor}` has GGML type {found}, expected F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K, \
         TQ1_0, TQ2_0 or Q2_0: convert the file to one of these"
    )]
    TensorType {
        /// Name of the tensor.
        tensor: String,
        /// Number of the type.
        found: u32,
    },
    /// The data of a tensor does not directly follow the data of the tensor before it.
    #[error(
        "data offset {found}, expected {expected}: tensors must be contiguous, in the order of their \
         headers"
    )]
    Offset {
        /// Offset from the start of the data, in bytes.
        expected: u64,
        /// Offset in the file.
        found: u64,
    },
    /// The model has an architecture that this crate does not support.
    #[error("architecture `{found}`, expected gpt2, llama or bitnet")]
    Architecture {
        /// The value of `general.architecture`.
        found: String,
    },
    /// The tokenizer does not fit the token embedding.
    #[error(
        "vocabulary of {tokens} tokens, but the token embedding has {rows} rows: expected the tokenizer of \
         this model"
    )]
    Vocabulary {
        /// Size of the vocabulary.
        tokens: usize,
        /// Rows of the embedding.
        rows: usize,
    },
    /// Two tokens of a vocabulary have the same text.
    #[error("token `{token}` occurs twice, expected once")]
    DuplicateToken {
        /// The text.
        token: String,
    },
    /// A tokenizer is malformed, or not supported.
    #[error("unusable tokenizer: {why}")]
    Tokenizer {
        /// The reason.
        why: String,
    },
    /// A text has more tokens than the caller allows.
    #[error("the text has more than {most} tokens")]
    TooManyTokens {
        /// The limit.
        most: usize,
    },
    /// A character tokenizer does not know a character.
    #[error("{character:?} (U+{:04X}) is not one of the {known} characters of this tokenizer", *character as u32)]
    UnknownCharacter {
        /// The character.
        character: char,
        /// Number of characters that the tokenizer knows.
        known: usize,
    },
    /// A `tokenizer.json` cannot encode a text.
    #[error("cannot encode {text:?}: {why}")]
    Encode {
        /// The start of the text.
        text: String,
        /// The reason.
        why: String,
    },
    /// A chat template cannot be parsed or rendered.
    #[error("chat template: {why}")]
    ChatTemplate {
        /// The reason.
        why: String,
    },
    /// llama.cpp cannot run the model, so no GGUF file is written.
    #[error("{what}: {why}")]
    NotInGguf {
        /// The unsupported setting.
        what: String,
        /// What llama.cpp supports, and what to do.
        why: String,
    },
    /// A setting of the model does not fit the blocks of a GGUF type.
    #[error(
        "{setting} is {width}, {encoding} needs a multiple of {block}: {instead}, or train with {setting} a multiple \
         of {block}"
    )]
    Width {
        /// The setting.
        setting: &'static str,
        /// Its value.
        width: usize,
        /// The type.
        encoding: Encoding,
        /// Weights per block.
        block: usize,
        /// How to store the model as it is.
        instead: String,
    },

    /// A setting of the model is out of range, or contradicts another.
    #[error("`{key}` is {found}, expected {expected}")]
    Spec {
        /// The setting.
        key: &'static str,
        /// Its value.
        found: String,
        /// Supported values.
        expected: String,
    },
    /// A tensor of the model is missing.
    #[error("tensor `{tensor}` is missing")]
    MissingTensor {
        /// Name of the tensor.
        tensor: String,
    },
    /// A tensor does not belong to the model.
    #[error("unexpected tensor `{tensor}`: models of this family and size do not have it")]
    UnknownTensor {
        /// Name of the tensor.
        tensor: String,
    },
    /// A tensor does not have the shape that the model requires.
    #[error("expected shape {expected:?}, found {found:?}")]
    WrongShape {
        /// The required shape.
        expected: Vec<usize>,
        /// The shape of the tensor.
        found: Vec<usize>,
    },
    /// A shape has no weights, or more than memory can address.
    #[error("shape {shape:?}: expected dimensions above 0 whose product fits in memory")]
    Shape {
        /// The shape.
        shape: Vec<usize>,
    },
    /// The number of bytes does not match shape and encoding.
    #[error("{encoding} tensor of shape {shape:?}: expected {expected} bytes, found {found}")]
    TensorBytes {
        /// The encoding.
        encoding: Encoding,
        /// The shape.
        shape: Vec<usize>,
        /// Bytes that shape and encoding require.
        expected: usize,
        /// Bytes of the data.
        found: usize,
    },
    /// A row is not a whole number of blocks.
    #[error(
        "rows of {cols} weights, {encoding} needs a multiple of {block}: use another type, or train with a \
         multiple of {block}"
    )]
    RowLength {
        /// The encoding.
        encoding: Encoding,
        /// Weights per row.
        cols: usize,
        /// Weights per block.
        block: usize,
    },
    /// A code is outside the range of its encoding.
    #[error("row {row}: a code of the {encoding} tensor is none of {}", encoding.code_range())]
    NotACode {
        /// The encoding.
        encoding: Encoding,
        /// The first row with such a code.
        row: usize,
    },
    /// Weights that are not ternary cannot be stored in a ternary encoding.
    #[error(
        "{found} weights cannot become {expected}: only ternary weights can; make the model ternary (duck convert), or use \
         a float type (`--type F16` of duck export)"
    )]
    NotTernary {
        /// The encoding of the weights.
        found: Encoding,
        /// The requested encoding.
        expected: Encoding,
    },
    /// One block would need several scales.
    #[error(
        "row {row}: scales differ within {block} weights, {encoding} stores one scale per {block}: use F16 (`--type F16` of \
         duck export), a .ternary or an .onnx file, which keep all scales, or train with granularity \"per_tensor\", \
         \"per_channel\" or groups of a multiple of {block}"
    )]
    ScalesDiffer {
        /// The requested encoding.
        encoding: Encoding,
        /// The first such row.
        row: usize,
        /// Weights per block.
        block: usize,
    },
    /// A LoRA adapter cannot be merged into weights that are not float.
    #[error(
        "an adapter cannot be merged into {encoding} weights, which cannot store the sum: keep it in a file of its own \
         (`--adapter` of duck), or merge it into a float model"
    )]
    Unmergeable {
        /// The encoding of the weights.
        encoding: Encoding,
    },
    /// A weight or scale is NaN or infinite.
    #[error(
        "row {row}: weight or scale is NaN, infinite or out of range for its type, expected finite numbers: the model may \
         be damaged, or converted to a type with too small a range, such as F16"
    )]
    NotFinite {
        /// The first such row.
        row: usize,
    },
    /// The encoding can be read, but not written.
    #[error("{encoding} can be read but not written: choose another type")]
    ReadOnly {
        /// The encoding.
        encoding: Encoding,
    },

    /// An archive does not start with `TRNA`.
    #[error("expected the magic bytes \"TRNA\", found {found:?}")]
    ArchiveMagic {
        /// The first bytes of the file.
        found: [u8; 4],
    },
    /// An archive has an unsupported version.
    #[error("archive version {found}, expected {expected}")]
    ArchiveVersion {
        /// The version of the file.
        found: u8,
        /// The supported version.
        expected: u8,
    },
    /// An archive would expand far more than any real model: a decompression bomb.
    #[error(
        "the first {packed} bytes expand to {found}, expected at most {expected}: only a model that is zero nearly \
         everywhere compresses so well, so the file is refused"
    )]
    Expands {
        /// Compressed bytes so far.
        packed: usize,
        /// Bytes that they expand to.
        found: usize,
        /// The limit.
        expected: usize,
    },
    /// An archive is damaged.
    #[error("{part}: {why}: the file is damaged")]
    Damaged {
        /// The damaged part.
        part: String,
        /// How it is damaged.
        why: &'static str,
    },

    /// A JSON file is malformed, or has another structure.
    #[error("unexpected or malformed JSON: {source}")]
    Json {
        /// The error of the JSON parser.
        source: serde_json::Error,
    },
    /// A safetensors file is malformed.
    #[error("not a valid safetensors file: {source}")]
    Safetensors {
        /// The error of the safetensors parser.
        source: safetensors::SafeTensorError,
    },
    /// A stored tensor has another type than expected.
    #[error("expected values of type {expected}, found {found:?}")]
    StoredType {
        /// Supported types.
        expected: &'static str,
        /// The type in the file.
        found: safetensors::Dtype,
    },
    /// A text file is too long.
    #[error("file of {found} bytes, expected at most {expected}")]
    TooLong {
        /// The limit, in bytes.
        expected: u64,
        /// Length of the file, in bytes.
        found: u64,
    },
    /// An index names a shard outside its folder.
    #[error("shard `{shard}`: expected the name of a file in the same folder")]
    Shard {
        /// The name in the index.
        shard: String,
    },
    /// The scale of a packed matrix is negative or not finite.
    #[error("weight scale {scale}, expected a finite number, at least 0")]
    Scale {
        /// The scale.
        scale: f32,
    },
    /// A matrix cannot be packed as BitNet does.
    #[error("{rows} rows, BitNet's packing needs a multiple of 4: write F32 or F16")]
    RowCount {
        /// Rows of the matrix.
        rows: usize,
    },
    /// A matrix has several scales, and BitNet's packing stores one.
    #[error(
        "the scale of row {row} differs from the rows before it, and a BitNet folder has one scale per matrix: write floats \
         (`--type F32` or `--type F16` of duck export), or train with `[quant] granularity = \"per_tensor\"`"
    )]
    NotPerTensor {
        /// The first row with another scale.
        row: usize,
    },
    /// The family has no packed weights in transformers.
    #[error("BitNet's packed weights are supported in the llama and bitnet families only: write F32 or F16")]
    Unpackable,
    /// The scales of a matrix do not fit the blocks of onnxruntime.
    #[error(
        "{group} weights share a scale, onnxruntime's blocks need a multiple of 16: train with granularity \
         \"per_channel\" or groups of a multiple of 16, or write INT2"
    )]
    Group {
        /// Weights per scale.
        group: usize,
    },
    /// The model is larger than an ONNX file may be.
    #[error(
        "the model exceeds {limit} bytes, the limit of an ONNX file: write a GGUF file or smaller weights"
    )]
    OnnxSize {
        /// The limit, in bytes.
        limit: usize,
    },
    /// The kind of file does not support the weight type.
    #[error("weight type {found}, expected {expected}")]
    WeightType {
        /// The requested type.
        found: crate::WeightType,
        /// Supported types.
        expected: &'static str,
    },
}

impl FormatError {
    /// The error without its file and tensor.
    pub fn kind(&self) -> &Self {
        match self {
            Self::InFile { source, .. } | Self::InTensor { source, .. } => source.kind(),
            other => other,
        }
    }

    /// Turns an error of the file system on `path` into [`Io`](Self::Io).
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { path: path.into(), source }
    }

    /// Adds the file, unless the error already names one.
    pub(crate) fn in_file(self, path: &Path) -> Self {
        match self {
            Self::Io { .. } | Self::InFile { .. } => self,
            _ => Self::InFile { path: path.into(), source: self.into() },
        }
    }

    /// Adds the tensor, unless the error already names one.
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
