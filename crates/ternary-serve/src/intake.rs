//! [`Intake`]: how many requests are read at a time, so that many large ones take no more memory than a few.

use std::{num::NonZero, sync::Arc, thread::available_parallelism};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The longest body, in bytes, that is taken and read whatever large ones are there.
pub const SMALL: usize = 64 << 10;
/// Large bodies that are held in memory until they are read.
const HELD: usize = 32;
/// Large bodies that are read at a time: JSON may take eighty times its bytes.
const LARGE: usize = 4;

/// As many requests are read at a time as there are cores; small ones do not wait for large ones.
#[derive(Debug)]
pub struct Intake {
    held: Arc<Semaphore>,
    small: Arc<Semaphore>,
    large: Arc<Semaphore>,
}

impl Default for Intake {
    fn default() -> Self {
        let cores = available_parallelism().map_or(1, NonZero::get);
        let large = (cores / 2).clamp(1, LARGE);
        let [held, small, large] = [HELD, cores.saturating_sub(large).max(1), large];
        let new = |permits| Arc::new(Semaphore::new(permits));
        Self { held: new(held), small: new(small), large: new(large) }
    }
}

impl Intake {
    /// The right to hold a large body.
    pub async fn hold(&self) -> OwnedSemaphorePermit {
        take(&self.held).await
    }

    /// The right to read a body of so many bytes.
    pub async fn read(&self, bytes: usize) -> OwnedSemaphorePermit {
        take(if bytes > SMALL { &self.large } else { &self.small }).await
    }
}

async fn take(semaphore: &Arc<Semaphore>) -> OwnedSemaphorePermit {
    semaphore.clone().acquire_owned().await.expect("nobody closes it")
}
