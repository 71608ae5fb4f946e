//! [`Home`]: the folder that a process of a run writes.

use super::TrainError;
use super::claim::{Claim, move_aside};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use ternary_format::disk::RunLock;

/// The run folder, which process 0 has locked; a scratch folder on the other processes, which is removed with them.
pub(super) enum Home {
    RunFolder {
        dir: PathBuf,
        /// Held until the run has written its result.
        lock: RunLock,
        /// Files of an earlier run, which this one replaces.
        replaced: Vec<OsString>,
    },
    Scratch(TempDir),
}

impl Home {
    /// Claims `run_dir` for process 0; makes a scratch folder for another one.
    ///
    /// # Errors
    /// Those of `claim`. `Write`: no folder can be made among the temporary files.
    pub fn new(
        run_dir: &Path,
        is_first: bool,
        claim: impl FnOnce(&Path) -> Result<Claim, TrainError>,
    ) -> Result<Self, TrainError> {
        if is_first {
            let Claim { lock, replaced } = claim(run_dir)?;
            return Ok(Self::RunFolder { dir: run_dir.into(), lock, replaced });
        }
        let made = tempfile::Builder::new().prefix("burn-ternary-").tempdir();
        let path = std::env::temp_dir();
        Ok(Self::Scratch(made.map_err(|source| TrainError::Write { path, source })?))
    }

    pub fn dir(&self) -> &Path {
        match self {
            Self::RunFolder { dir, .. } => dir,
            Self::Scratch(dir) => dir.path(),
        }
    }

    /// Moves the files of an earlier run aside.
    ///
    /// # Errors
    /// `Write`; nothing was moved.
    pub fn make_room(&self) -> Result<(), TrainError> {
        let Self::RunFolder { dir, replaced, .. } = self else { return Ok(()) };
        move_aside(dir, replaced.clone()).map_err(|source| TrainError::Write { path: dir.clone(), source })
    }

    /// Whether the folder still has the name under which it was claimed.
    pub fn is_in_place(&self) -> bool {
        match self {
            Self::RunFolder { lock, .. } => lock.is_in_place(),
            Self::Scratch(_) => true,
        }
    }
}
