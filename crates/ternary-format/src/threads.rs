//! The threads of rayon, which would end the program with a panic where they cannot be started.

use std::{error::Error, io, thread};

/// Most threads that may be asked for, unless there are more cores. Beyond the cores, threads only take turns: 512 on two
/// cores made training fifty times as slow.
const MOST: usize = 256;

/// Why the threads did not start.
#[derive(Debug, thiserror::Error)]
pub enum ThreadError {
    #[error("RAYON_NUM_THREADS is {found}, expected at most {most}")]
    TooMany { found: usize, most: usize },
    #[error("cannot start {threads} threads: {source}; expected fewer (RAYON_NUM_THREADS), or higher limits")]
    Start { threads: usize, source: io::Error },
}

/// Most threads that may be asked for: 256, or one per core.
pub fn most() -> usize {
    cores().max(MOST)
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Starts the threads that all parallel work shares, one per core or as many as the environment variable
/// `RAYON_NUM_THREADS` says; returns how many. Later calls start none.
///
/// # Errors
/// `TooMany`: more than [`most`]. `Start`: the system has no memory or no place for them.
pub fn start() -> Result<usize, ThreadError> {
    let asked = std::env::var("RAYON_NUM_THREADS").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    if asked > most() {
        return Err(ThreadError::TooMany { found: asked, most: most() });
    }
    match rayon::ThreadPoolBuilder::new().build_global() {
        Err(error) if error.source().is_some() => {
            let threads = if asked == 0 { cores() } else { asked };
            Err(ThreadError::Start { threads, source: io::Error::other(error) })
        }
        // Or they have been started already.
        _ => Ok(rayon::current_num_threads()),
    }
}
