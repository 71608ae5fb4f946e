//! [`BodyPermits`]: bounds the memory of request bodies, however many requests arrive.

use std::{num::NonZero, sync::Arc, thread::available_parallelism};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Longest body that needs no permit to be buffered.
pub const SMALL_BODY_BYTES: usize = 64 << 10;
/// Number of larger bodies that are buffered at the same time.
const BUFFER_PERMITS: usize = 32;
/// Number of larger bodies that are parsed at the same time. Parsed JSON may take eighty times its bytes.
const MAX_LARGE_PARSE_PERMITS: usize = 4;

/// Permits to buffer and to parse bodies. As many are parsed at the same time as there are cores; small ones do not wait
/// for large ones.
#[derive(Debug)]
pub struct BodyPermits {
    buffered: Arc<Semaphore>,
    small: Arc<Semaphore>,
    large: Arc<Semaphore>,
}

impl Default for BodyPermits {
    fn default() -> Self {
        let cores = available_parallelism().map_or(1, NonZero::get);
        let large = (cores / 2).clamp(1, MAX_LARGE_PARSE_PERMITS);
        let [buffered, small, large] = [BUFFER_PERMITS, cores.saturating_sub(large).max(1), large];
        let new = |permits| Arc::new(Semaphore::new(permits));
        Self { buffered: new(buffered), small: new(small), large: new(large) }
    }
}

impl BodyPermits {
    /// A permit to buffer a body of more than [`SMALL_BODY_BYTES`] bytes.
    pub async fn buffer(&self) -> OwnedSemaphorePermit {
        acquire(&self.buffered).await
    }

    /// A permit to parse a body of this length.
    pub async fn parse(&self, bytes: usize) -> OwnedSemaphorePermit {
        acquire(if bytes > SMALL_BODY_BYTES { &self.large } else { &self.small }).await
    }
}

async fn acquire(semaphore: &Arc<Semaphore>) -> OwnedSemaphorePermit {
    semaphore.clone().acquire_owned().await.expect("the semaphore is never closed")
}
