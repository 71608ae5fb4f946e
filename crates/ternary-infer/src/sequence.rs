//! [`Sequence`]: the state of one text.

use crate::{EngineError, cache::KvCache};

/// A text that is being generated: its KV cache, and the logits of the next token.
#[derive(Clone, Debug)]
pub struct Sequence {
    pub(crate) cache: KvCache,
    pub(crate) length: usize,
    pub(crate) logits: Vec<f32>,
}

impl Sequence {
    /// Number of tokens so far.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Returns whether there is no token yet.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Logits of the next token, `[vocab]`; zeros before the first token.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Drops all tokens from position `length` on. The logits do not change: they still follow the last token that was
    /// read.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    /// Replaces tokens and logits by copies of those of `other`. The cost is proportional to the number of tokens.
    ///
    /// # Panics
    /// If the sequences belong to different engines.
    pub fn copy_from(&mut self, other: &Self) {
        self.cache.copy_from(&other.cache, other.length);
        self.length = other.length;
        self.logits.copy_from_slice(&other.logits);
    }

    /// Size of the KV cache when the context is full, in bytes.
    pub fn cache_bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// # Errors
    /// `NotFinite`: a logit of the next token is NaN or infinite.
    pub(crate) fn check_logits(&self) -> Result<(), EngineError> {
        check_finite(&self.logits)
    }
}

/// Checks that no logit is NaN or infinite. It has no early exit, so that it vectorizes: it reads all logits of each
/// generated token.
///
/// # Errors
/// `NotFinite`: a logit is.
pub(crate) fn check_finite(logits: &[f32]) -> Result<(), EngineError> {
    let finite = logits.iter().fold(true, |all, logit| all & logit.is_finite());
    if finite { Ok(()) } else { Err(EngineError::NotFinite) }
}
