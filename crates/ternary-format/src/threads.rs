//! The global thread pool of rayon.
//!
//! Rayon panics if it cannot start its threads on first use. [`start`] starts them early and returns an error
//! instead.

use std::{error::Error, io, thread};

/// Limit of threads on machines with fewer cores. More threads than cores only take turns: 512 on two cores made
/// training 50 times slower.
const MAX_THREADS: usize = 256;

/// Why the thread pool did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ThreadError {
    /// `RAYON_NUM_THREADS` exceeds the limit.
    #[error("RAYON_NUM_THREADS is {found}, expected at most {most}")]
    TooMany {
        /// The value of the environment variable.
        found: usize,
        /// The limit, see [`most`].
        most: usize,
    },
    /// The operating system refused to start the threads.
    #[error("cannot start {threads} threads: {source}; expected fewer (RAYON_NUM_THREADS), or higher limits")]
    Start {
        /// Number of threads.
        threads: usize,
        /// The error of the operating system.
        source: io::Error,
    },
}

/// Maximum number of threads: 256, or one per core if there are more cores.
pub fn most() -> usize {
    cores().max(MAX_THREADS)
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Starts the global thread pool: `RAYON_NUM_THREADS` threads, or one per core. Returns the number of threads. Later
/// calls have no effect.
///
/// # Errors
/// `TooMany`: more than [`most`]. `Start`: the system has no memory for the threads, or a limit of processes was
/// reached.
pub fn start() -> Result<usize, ThreadError> {
    let requested = std::env::var("RAYON_NUM_THREADS").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    if requested > most() {
        return Err(ThreadError::TooMany { found: requested, most: most() });
    }
    match rayon::ThreadPoolBuilder::new().build_global() {
        Err(error) if error.source().is_some() => {
            let threads = if requested == 0 { cores() } else { requested };
            Err(ThreadError::Start { threads, source: io::Error::other(error) })
        }
        // Started now, or before.
        _ => Ok(rayon::current_num_threads()),
    }
}
