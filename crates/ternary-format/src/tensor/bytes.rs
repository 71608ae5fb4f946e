//! [`Bytes`]: shared memory of tensors, owned or memory-mapped.

use crate::{FormatError, disk};
use std::{ops::Range, path::Path, sync::Arc};

/// A slice of bytes, owned or memory-mapped. Cloning and slicing share the memory.
#[derive(Clone, Debug)]
pub struct Bytes {
    owner: Arc<dyn AsBytes>,
    range: Range<usize>,
}

trait AsBytes: std::fmt::Debug + Send + Sync {
    fn as_bytes(&self) -> &[u8];

    /// See [`Tensor::release`](crate::Tensor::release).
    fn release(&self, _range: Range<usize>) {}
}

impl AsBytes for Vec<u8> {
    fn as_bytes(&self) -> &[u8] {
        self
    }
}

impl AsBytes for memmap2::Mmap {
    fn as_bytes(&self) -> &[u8] {
        self
    }

    #[cfg(unix)]
    fn release(&self, range: Range<usize>) {
        let advice = memmap2::UncheckedAdvice::DontNeed;
        // SAFETY: the map is read-only and backed by a file, from which its pages are read again on the next access.
        // The call is advice: if the system refuses it, the pages stay in memory.
        #[allow(unsafe_code)]
        let _ = unsafe { self.unchecked_advise_range(advice, range.start, range.len()) };
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { owner: Arc::new(bytes), range }
    }
}

impl Bytes {
    /// Maps a file into memory.
    ///
    /// # Errors
    /// `Io`: the file is missing, may not be read, or cannot be mapped.
    pub fn map(path: &Path) -> Result<Self, FormatError> {
        let file = disk::open(path).map_err(FormatError::io(path))?;
        if file.metadata().map_err(FormatError::io(path))?.len() == 0 {
            return Ok(Vec::new().into()); // an empty file cannot be mapped
        }
        // SAFETY: the map is read-only. Another program that truncates the file while it is mapped would kill this
        // process with SIGBUS. This workspace never does that: it replaces a model file by renaming a new one over
        // it.
        #[allow(unsafe_code)]
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(FormatError::io(path))?;
        let range = 0..map.len();
        Ok(Self { owner: Arc::new(map), range })
    }

    /// Lets the system drop the pages of a memory-mapped file; see [`Tensor::release`](crate::Tensor::release).
    pub(super) fn release(&self) {
        self.owner.release(self.range.clone());
    }

    /// Returns a part of the bytes without copying it.
    ///
    /// # Panics
    /// If `range` ends after the bytes.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.range.len());
        let start = self.range.start;
        Self { owner: self.owner.clone(), range: start + range.start..start + range.end }
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.owner.as_bytes()[self.range.clone()]
    }
}
