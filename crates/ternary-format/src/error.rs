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
    #[error("{encoding} is read, never written")]
    ReadOnly { encoding: Encoding },
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
    pub(crate) fn in_tensor(self, tensor: &str) -> Self {
        match self {
            Self::Io { .. } | Self::InTensor { .. } => self,
            _ => Self::InTensor { tensor: tensor.into(), source: self.into() },
        }
    }
}
