//! [`RunLock`]: at most one writer per run folder.
//!
//! ```text
//! acquire:  create the folder
//!           loop:  open `run.lock` (create it, follow no link)
//!                  try to lock it exclusively            locked elsewhere: error with the id in the file
//!                  is the open file still at its path?   no: the folder was moved meanwhile, try again
//!           write the process id, remove leftovers of killed processes
//! drop:     truncate the file; closing it releases the lock
//! ```
//!
//! The lock is a lock of the operating system, not the existence of the file: it ends with its process, however that
//! ends, so there are no stale locks. The file is never removed, because a process could then lock a file that is no
//! longer reachable while another locks a new one of the same name. For the same reason, `acquire` compares device
//! and inode after locking.

use super::{open_in_place, parent, remove_leftovers};
use std::{
    fs::{self, File, TryLockError},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process,
};

/// Name of the locked file in a run folder.
pub const LOCK: &str = "run.lock";

/// The exclusive right to write a run folder: a lock on its file `run.lock`.
///
/// The system releases the lock when the process ends, in any way. The file stays, empty, and is never moved or
/// removed, so that every process locks the same file. Readers need no lock.
#[derive(Debug)]
pub struct RunLock {
    file: File,
    path: PathBuf,
}

/// Why a run folder cannot be locked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Another process, or another run of this process, has locked the folder.
    #[error(
        "{}: the run folder is locked by {}, expected one that is not in use: wait for that process, stop it, or choose \
         another run.name or run.seed",
        folder.display(),
        process.map_or("another process".into(), |id| format!("process {id}"))
    )]
    Held {
        /// The run folder.
        folder: PathBuf,
        /// Id of the process that holds the lock, if it is known.
        process: Option<u32>,
    },
    /// The folder or its lock file cannot be written.
    #[error("{}: cannot write: {source}", path.display())]
    Io {
        /// The folder or file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
}

impl RunLock {
    /// Locks a run folder, creating it if it is missing, and removes the scratch files that killed processes left in
    /// it.
    ///
    /// # Errors
    /// `Held`: another run uses the folder. `Io`: the folder or file cannot be created, or the file system has no
    /// locks.
    pub fn acquire(folder: &Path) -> Result<Self, LockError> {
        let at = |path: &Path| {
            let path = path.to_path_buf();
            |source| LockError::Io { path, source }
        };
        fs::create_dir_all(folder).map_err(at(folder))?;
        let path = folder.join(LOCK);
        loop {
            let mut options = File::options();
            let options = options.read(true).write(true).create(true).truncate(false);
            let mut file = open_in_place(&path, options).map_err(at(&path))?;
            match file.try_lock() {
                Ok(()) => (),
                Err(TryLockError::WouldBlock) => {
                    return Err(LockError::Held { folder: folder.into(), process: owner(&file) });
                }
                Err(TryLockError::Error(source)) => return Err(at(&path)(source)),
            }
            // The folder may have been moved between opening and locking the file.
            if is_at(&file, &path) {
                let written = file.set_len(0).and_then(|()| writeln!(file, "{}", process::id()));
                written.and_then(|()| remove_leftovers(folder)).map_err(at(&path))?;
                return Ok(Self { file, path });
            }
        }
    }

    /// Locks the folder of `path` if it is a run folder: one with an experiment that was locked before.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire).
    pub fn of_file(path: &Path) -> Result<Option<Self>, LockError> {
        let folder = parent(path);
        let is_run = [LOCK, "experiment.toml"].iter().all(|name| folder.join(name).exists());
        is_run.then(|| Self::acquire(folder)).transpose()
    }

    /// Returns whether the locked file is still at its path: the folder was neither moved nor removed.
    pub fn is_in_place(&self) -> bool {
        is_at(&self.file, &self.path)
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        // The file then names no process. If this fails, the next owner overwrites the id.
        let _ = self.file.set_len(0);
    }
}

/// The process id in the file.
fn owner(file: &File) -> Option<u32> {
    let mut text = String::new();
    file.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// Returns whether `path` names the open `file`.
fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let [found, expected] = [fs::symlink_metadata(path), file.metadata()].map(|of| of.ok().map(identity));
        found.is_some() && found == expected
    }
    #[cfg(not(unix))]
    {
        // Windows does not move a folder that contains an open file.
        let _ = (file, path);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{read, write},
        *,
    };

    #[test]
    fn a_run_folder_has_one_writer_at_a_time() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("run");
        let lock = RunLock::acquire(&folder).unwrap();
        let error = RunLock::acquire(&folder).unwrap_err();
        assert!(
            matches!(error, LockError::Held { process, .. } if process == Some(process::id())),
            "{error}"
        );
        assert!(error.to_string().contains(&format!("process {}", process::id())), "{error}");
        assert!(RunLock::of_file(&folder.join("x.gguf")).unwrap().is_none(), "there is no run yet");
        write(&folder.join("experiment.toml"), b"").unwrap();
        assert!(RunLock::of_file(&folder.join("x.gguf")).is_err());
        assert!(RunLock::of_file(&home.path().join("x.gguf")).unwrap().is_none());
        drop(lock);
        assert_eq!(read(&folder.join(LOCK)).unwrap(), b"");
        // A killed process leaves its id, and no lock.
        fs::write(folder.join(LOCK), "4294967295\n").unwrap();
        drop(RunLock::acquire(&folder).unwrap());
    }

    #[cfg(unix)]
    #[test]
    fn a_lock_does_not_extend_to_a_folder_that_replaced_its_own() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("run");
        let lock = RunLock::acquire(&folder).unwrap();
        assert!(lock.is_in_place());
        fs::rename(&folder, home.path().join("moved")).unwrap();
        assert!(!lock.is_in_place());
        let other = RunLock::acquire(&folder).unwrap();
        assert!(!lock.is_in_place() && other.is_in_place());
        // A symbolic link at the path of the lock file is replaced.
        drop(other);
        write(&home.path().join("mine"), b"mine").unwrap();
        fs::remove_file(folder.join(LOCK)).unwrap();
        std::os::unix::fs::symlink(home.path().join("mine"), folder.join(LOCK)).unwrap();
        drop(RunLock::acquire(&folder).unwrap());
        assert_eq!(read(&home.path().join("mine")).unwrap(), b"mine");
    }
}
