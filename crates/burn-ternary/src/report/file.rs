//! Files of a report: errors name the path.

use std::{io, path::Path};
use ternary_format::disk;

/// Names the file in an error about it.
pub(super) fn at(path: &Path) -> impl Fn(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Replaces the file atomically: a reader, or a process that dies at any time, finds the old bytes or the new ones.
///
/// # Errors
/// What the file system says, with the path.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    disk::write(path, bytes).map_err(at(path))
}
