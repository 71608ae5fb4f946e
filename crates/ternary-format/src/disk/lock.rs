//! [`RunLock`]: one writer a run folder.

use super::{open_in_place, parent, remove_leftovers};
use std::{
    fs::{self, File, TryLockError},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process,
};

/// The file that is locked in a run folder.
pub const LOCK: &str = "run.lock";

/// The right to write a run folder, which one process has at a time: an exclusive lock on `run.lock`.
///
/// The system releases the lock when its process ends, however it ends. The file stays, empty, and is never moved nor
/// removed, so that whoever opens it meets the same lock. Readers need none.
#[derive(Debug)]
pub struct RunLock {
    file: File,
    path: PathBuf,
}

/// Why a run folder may not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Another process, or another run of this one, writes the folder.
    #[error(
        "{}: expected a run folder that no other process writes, found one in use by {}; wait for it, stop it, or choose \
         another run.name or run.seed",
        folder.display(),
        process.map_or("another process".into(), |id| format!("process {id}"))
    )]
    Held { folder: PathBuf, process: Option<u32> },
    #[error("{}: cannot write: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl RunLock {
    /// Locks a run folder, which is created where it is missing, and removes what killed processes left in it.
    ///
    /// # Errors
    /// `Held`; `Io`: the folder or the file cannot be made, or the file system has no locks.
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
            // Somebody may have moved the folder between the two calls.
            if is_at(&file, &path) {
                let written = file.set_len(0).and_then(|()| writeln!(file, "{}", process::id()));
                written.and_then(|()| remove_leftovers(folder)).map_err(at(&path))?;
                return Ok(Self { file, path });
            }
        }
    }

    /// Locks the folder of `path` where it is a run folder that was ever locked.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire).
    pub fn of_file(path: &Path) -> Result<Option<Self>, LockError> {
        let folder = parent(path);
        let is_run = [LOCK, "experiment.toml"].iter().all(|name| folder.join(name).exists());
        is_run.then(|| Self::acquire(folder)).transpose()
    }

    /// Whether the locked file is still that of the folder: nobody moved or removed the folder since.
    pub fn is_in_place(&self) -> bool {
        is_at(&self.file, &self.path)
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        // Nobody's from now on; where this fails, the next owner writes over it.
        let _ = self.file.set_len(0);
    }
}

/// The process that wrote its id into the file.
fn owner(file: &File) -> Option<u32> {
    let mut text = String::new();
    file.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// Whether `file` is what `path` names.
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
        // A folder with an open file cannot be moved.
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
        // What a killed process leaves: its id, and no lock.
        fs::write(folder.join(LOCK), "4294967295\n").unwrap();
        drop(RunLock::acquire(&folder).unwrap());
    }

    #[cfg(unix)]
    #[test]
    fn a_lock_does_not_go_to_a_folder_that_took_the_place_of_its_own() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("run");
        let lock = RunLock::acquire(&folder).unwrap();
        assert!(lock.is_in_place());
        fs::rename(&folder, home.path().join("moved")).unwrap();
        assert!(!lock.is_in_place());
        let other = RunLock::acquire(&folder).unwrap();
        assert!(!lock.is_in_place() && other.is_in_place());
        // A link in place of the lock file is replaced.
        drop(other);
        write(&home.path().join("mine"), b"mine").unwrap();
        fs::remove_file(folder.join(LOCK)).unwrap();
        std::os::unix::fs::symlink(home.path().join("mine"), folder.join(LOCK)).unwrap();
        drop(RunLock::acquire(&folder).unwrap());
        assert_eq!(read(&home.path().join("mine")).unwrap(), b"mine");
    }
}
