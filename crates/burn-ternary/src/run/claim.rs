//! The right to write a run folder, and what becomes of the run in it.

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};
use ternary_format::disk::RunLock;

/// A run folder that is this process's until the lock is dropped.
pub(super) struct Claim {
    pub lock: RunLock,
    /// The files of an earlier run, which the new one replaces.
    pub replaced: Vec<OsString>,
}

impl From<RunLock> for Claim {
    fn from(lock: RunLock) -> Self {
        Self { lock, replaced: Vec::new() }
    }
}

/// Moves the contents of a run folder to `<run_dir>.old-N`. The folder and its lock stay, so that no other process can take
/// the name meanwhile; a move that fails is undone.
pub(super) fn move_aside(run_dir: &Path, mut names: Vec<OsString>) -> io::Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let mut number = 1;
    let aside = loop {
        let mut name = run_dir.as_os_str().to_owned();
        name.push(format!(".old-{number}"));
        match fs::create_dir(&name) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
            created => break created.map(|()| PathBuf::from(name))?,
        }
    };
    // Killed in between, the folder still has its checkpoints.
    names.sort_by_key(|name| name == "checkpoints");
    for (moved, name) in names.iter().enumerate() {
        if let Err(error) = fs::rename(run_dir.join(name), aside.join(name)) {
            for name in &names[..moved] {
                let _ = fs::rename(aside.join(name), run_dir.join(name));
            }
            let _ = fs::remove_dir(&aside);
            return Err(error);
        }
    }
    Ok(())
}
