//! [`FormatError`]: what can be wrong with a model file.

use std::path::PathBuf;

/// A file that cannot be read or written, or a model that does not fit a file type.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
}
