//! Checkpoints: model, optimizer and loop state as one atomic unit on disk.
//!
//! A checkpoint is a folder `step-00001200/` that appears by one rename once every byte of it is on disk:
//!
//! | file | holds |
//! |---|---|
//! | `model.bpk` | Burn's [`ModuleRecord`] |
//! | `optimizer.bpk` | Burn's [`OptimizerRecord`] |
//! | `codes.bin` | of a ternary model, a [`CodeTracker`](crate::report::code_stats::CodeTracker) |
//! | `manifest.json` | format version, [`Identity`] of the run, [`TrainState`], length and SHA-256 of the files above |
//! | `manifest.sha256` | SHA-256 of `manifest.json`, as `sha256sum --check` reads it |
//!
//! A killed process may leave other folders next to the checkpoints. Scratch folders are never read. A checkpoint that
//! was about to be replaced (`.old-step-…`) counts as long as its successor is missing.
//! One process writes a folder at a time, the one that has the [`RunLock`] of the run; readers change nothing.
//!
//! [`RunLock`]: ternary_format::disk::RunLock

mod manifest;

use super::version;
use crate::train::TrainState;
use manifest::{FileEntry, Manifest};
pub use manifest::{Identity, Inputs};
use std::{
    cmp::Reverse,
    fmt::Display,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use burn::{
    optim::OptimizerRecord,
    store::{ModuleRecord, RecordError},
    tensor::Bytes,
};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use ternary_format::{
    disk::{self, NewFolder},
    memory::{self, OutOfMemory},
};

const MODEL: &str = "model.bpk";
const OPTIMIZER: &str = "optimizer.bpk";
const CODES: &str = "codes.bin";
const MANIFEST: &str = "manifest.json";
const MANIFEST_HASH: &str = "manifest.sha256";
/// Format of the folder; any other is refused.
const VERSION: u64 = 1;
/// Bytes; a manifest has a few thousand, so a larger file is no manifest and is not read.
const MANIFEST_LIMIT: u64 = 1 << 20;
const STEP_PREFIX: &str = "step-";
/// Of scratch folders of earlier versions.
const SCRATCH_PREFIX: &str = ".tmp-";
/// Attempts to find the newest checkpoint while a run that is being written removes older ones.
const ATTEMPTS: usize = 5;
/// Of a checkpoint that is about to be replaced.
const REPLACED_PREFIX: &str = ".old-";

/// Why checkpoints could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A file or folder that cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file or folder that cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Checkpoints, each of which was refused.
    #[error("no good checkpoint in {path}: {}", join(refused))]
    NoneGood {
        /// The file or folder.
        path: PathBuf,
        /// Each checkpoint with the reason.
        refused: Vec<Refusal>,
    },
    /// A checkpoint that cannot be read here.
    #[error("{}: {source}", path.display())]
    Memory {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: OutOfMemory,
    },
    /// A checkpoint that is whole and of another model than its experiment's.
    #[error(transparent)]
    Unfit(Refusal),
}

impl CheckpointError {
    /// A sound model record whose tensors are not those of the model.
    pub(crate) fn unfit(path: &Path, detail: impl Display) -> Self {
        Self::Unfit(Refusal { path: path.into(), reason: bad_tensors(MODEL)(detail) })
    }

    /// The same of its codes.
    pub(crate) fn unfit_codes(path: &Path) -> Self {
        let reason = bad_tensors(CODES)("expected the codes and scales of the model in [model] and [quant]");
        Self::Unfit(Refusal { path: path.into(), reason })
    }
}

/// A checkpoint that is not used, and why.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct Refusal {
    /// The checkpoint's folder.
    pub path: PathBuf,
    /// Why it is not used.
    pub reason: RefusalReason,
}

/// What is wrong with a checkpoint.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RefusalReason {
    /// A file is missing.
    #[error("{file} is missing")]
    Missing {
        /// Name of the file in the checkpoint.
        file: &'static str,
    },
    /// A file cannot be read.
    #[error("{file} cannot be read: {detail}")]
    Unreadable {
        /// Name of the file in the checkpoint.
        file: &'static str,
        /// What the reader reported.
        detail: String,
    },
    /// A file has another length than the manifest records.
    #[error("{file} holds {found} bytes, expected {expected}")]
    Length {
        /// Name of the file in the checkpoint.
        file: &'static str,
        /// Bytes that the manifest records.
        expected: u64,
        /// Bytes of the file.
        found: u64,
    },
    /// A file has other contents than the manifest records.
    #[error("{file} was altered: its sha256 is not the recorded one")]
    Altered {
        /// Name of the file in the checkpoint.
        file: &'static str,
    },
    /// The manifest cannot be parsed.
    #[error("{MANIFEST} is not valid: {detail}")]
    Manifest {
        /// What the reader reported.
        detail: String,
    },
    /// The checkpoint has another format.
    #[error("format version {found}, expected {VERSION}")]
    Version {
        /// Version of the checkpoint.
        found: u64,
    },
    /// A record does not fit the model.
    #[error("{file} does not hold the expected tensors: {detail}")]
    Tensors {
        /// Name of the file in the checkpoint.
        file: &'static str,
        /// What the reader reported.
        detail: String,
    },
}

/// A checkpoint that was read and verified.
#[derive(Debug)]
pub struct Loaded {
    /// The checkpoint's folder.
    pub path: PathBuf,
    /// The weights.
    pub model: ModuleRecord,
    /// Length of the file of the weights.
    pub model_bytes: u64,
    /// Of all files, which are in memory.
    pub bytes: u64,
    /// The optimizer state.
    pub optimizer: OptimizerRecord,
    /// Position and running means of the run.
    pub state: TrainState,
    /// What is known of the ternary codes; none of a float model, and of earlier versions of this crate.
    pub codes: Option<Vec<u8>>,
    /// As given to [`Checkpoints::save`]; those that version 0.1.0 of this crate saved have none.
    pub identity: Option<Identity>,
    /// Of the experiment as TOML, in place of an identity.
    pub experiment_sha256: Option<String>,
    /// Newer checkpoints that were passed over.
    pub refused: Vec<Refusal>,
}

/// The checkpoint folder of one run.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    keep: usize,
    /// Steps between regular checkpoints; those of other steps were saved because a run ended there.
    every: usize,
}

impl Checkpoints {
    /// The folder of a run that is only read.
    pub fn existing(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), keep: 1, every: 1 }
    }

    /// Opens the folder to write it; it is created where it does not exist. Of its checkpoints the last `keep` (at least one) of those
    /// whose steps are multiples of `every` stay, and the newest one.
    ///
    /// # Errors
    /// `Write`: the folder cannot be created.
    pub fn open(dir: impl Into<PathBuf>, keep: usize, every: usize) -> Result<Self, CheckpointError> {
        let dir = dir.into();
        fs::create_dir_all(&dir).map_err(write_error(&dir))?;
        Ok(Self { dir, keep: keep.max(1), every: every.max(1) })
    }

    /// Writes the checkpoint of `state.step` and returns its folder; one of the same step is replaced.
    ///
    /// Killed at any point, the folder holds the checkpoints of before or of after. Checkpoints of later steps,
    /// which a run that fell back has left behind, are neither counted nor removed.
    ///
    /// # Errors
    /// `Write`, `Read`: the file or folder at this path could not be; the earlier checkpoints are untouched.
    pub fn save(
        &self,
        model: ModuleRecord,
        optimizer: OptimizerRecord,
        state: &TrainState,
        identity: &Identity,
        codes: Option<&[u8]>,
    ) -> Result<PathBuf, CheckpointError> {
        self.recover()?;
        let path = self.dir.join(folder_name(state.step));
        let folder = NewFolder::successor(&path).map_err(write_error(&path))?;
        write_folder(&folder, &path, model, optimizer, state, identity, codes)?;
        self.publish(folder, &path, state.step)?;
        self.prune(state.step)?;
        Ok(path)
    }

    /// Reads the newest checkpoint whose every byte is as written; `None` where the folder has no checkpoint.
    ///
    /// Lengths and hashes are verified before anything is parsed.
    ///
    /// # Errors
    /// `Read`: the folder cannot be listed. `NoneGood`: there are checkpoints, and each was refused.
    pub fn latest_good(&self) -> Result<Option<Loaded>, CheckpointError> {
        self.latest(|_| true)
    }

    /// The same of the regular ones, which are those of any number of sessions: a run that was interrupted falls back to
    /// where it would have fallen back to.
    ///
    /// # Errors
    /// As [`latest_good`](Self::latest_good).
    pub fn latest_regular(&self) -> Result<Option<Loaded>, CheckpointError> {
        self.latest(|step| self.is_regular(step))
    }

    fn is_regular(&self, step: usize) -> bool {
        step.is_multiple_of(self.every)
    }

    fn latest(&self, admits: impl Fn(usize) -> bool) -> Result<Option<Loaded>, CheckpointError> {
        // A run that is being written removes its oldest checkpoint after each new one, perhaps the one that is read.
        for _ in 1..ATTEMPTS {
            match self.latest_now(&admits) {
                Err(CheckpointError::NoneGood { refused, .. })
                    if refused.iter().any(|refusal| !refusal.path.exists()) => {}
                found => return found,
            }
        }
        self.latest_now(&admits)
    }

    fn latest_now(&self, admits: impl Fn(usize) -> bool) -> Result<Option<Loaded>, CheckpointError> {
        let mut folders = self.folders("")?;
        folders.extend(self.folders(REPLACED_PREFIX)?);
        // Stable: of the same step, the checkpoint comes before the one it replaced.
        folders.sort_by_key(|&(step, _)| Reverse(step));
        let mut refused = Vec::new();
        for (step, path) in folders.into_iter().filter(|(step, _)| admits(*step)) {
            // The files are read whole, and tensors are views of them.
            let bytes: u64 =
                [MODEL, OPTIMIZER].into_iter().filter_map(|file| file_length(&path, file).ok()).sum();
            memory::check(bytes).map_err(|source| CheckpointError::Memory { path: path.clone(), source })?;
            match read_folder(&path, step) {
                Ok(loaded) => return Ok(Some(Loaded { refused, ..loaded })),
                Err(reason) => refused.push(Refusal { path, reason }),
            }
        }
        if refused.is_empty() {
            return Ok(None);
        }
        Err(CheckpointError::NoneGood { path: self.dir.clone(), refused })
    }

    /// Clears up after a process that was killed inside [`save`](Self::save).
    fn recover(&self) -> Result<(), CheckpointError> {
        disk::remove_leftovers(&self.dir).map_err(write_error(&self.dir))?;
        for path in self.entries()? {
            // As earlier versions called them.
            if name(&path).starts_with(&format!("{SCRATCH_PREFIX}{STEP_PREFIX}")) {
                fs::remove_dir_all(&path).map_err(write_error(&path))?;
            }
        }
        for (step, aside) in self.folders(REPLACED_PREFIX)? {
            let path = self.dir.join(folder_name(step));
            if path.exists() {
                fs::remove_dir_all(&aside).map_err(write_error(&aside))?;
            } else {
                fs::rename(&aside, &path).map_err(write_error(&path))?;
            }
        }
        Ok(())
    }

    /// Gives a complete folder its name, in place of an older checkpoint of the same step.
    fn publish(&self, folder: NewFolder, path: &Path, step: usize) -> Result<(), CheckpointError> {
        let aside = self.dir.join(format!("{REPLACED_PREFIX}{}", folder_name(step)));
        // A folder cannot be renamed over a full one, so the old one steps aside first.
        let replaces = path.exists();
        if replaces {
            fs::rename(path, &aside).map_err(write_error(path))?;
        }
        if let Err(source) = folder.commit() {
            if replaces {
                // Where this fails too, `recover` does it.
                let _ = fs::rename(&aside, path);
            }
            return Err(write_error(path)(source));
        }
        if replaces {
            fs::remove_dir_all(&aside).map_err(write_error(&aside))?;
        }
        Ok(())
    }

    /// Removes all but the last `keep` regular checkpoints up to `step`, and the one of that step.
    fn prune(&self, step: usize) -> Result<(), CheckpointError> {
        let mut regular = 0;
        let mut folders = self.folders("")?;
        folders.retain(|&(other, _)| {
            regular += usize::from(other <= step && self.is_regular(other));
            let kept = self.is_regular(other) && regular <= self.keep;
            other < step && !kept
        });
        // The oldest first.
        for (_, path) in folders.into_iter().rev() {
            disk::remove_folder(&path).map_err(write_error(&path))?;
        }
        Ok(())
    }

    /// Step and path of everything named `<prefix>step-00001200`, newest first.
    fn folders(&self, prefix: &str) -> Result<Vec<(usize, PathBuf)>, CheckpointError> {
        let step_of = |path: &PathBuf| {
            let name = name(path).strip_prefix(prefix)?;
            let step = name.strip_prefix(STEP_PREFIX)?.parse().ok()?;
            (folder_name(step) == name).then_some(step)
        };
        let mut folders: Vec<_> =
            self.entries()?.into_iter().filter_map(|path| Some((step_of(&path)?, path))).collect();
        folders.sort_by_key(|&(step, _)| Reverse(step));
        Ok(folders)
    }

    fn entries(&self) -> Result<Vec<PathBuf>, CheckpointError> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect()),
        };
        entries.map_err(|source| CheckpointError::Read { path: self.dir.clone(), source })
    }
}

/// SHA-256 of `bytes`, in lower-case hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

/// The checkpoint of `step` in a run folder.
pub(super) fn path(run_dir: &Path, step: usize) -> PathBuf {
    run_dir.join("checkpoints").join(folder_name(step))
}

fn folder_name(step: usize) -> String {
    format!("{STEP_PREFIX}{step:08}")
}

/// The last part of a path; empty where it is not UTF-8, which no name of ours is.
fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// What `manifest.sha256` must hold.
fn manifest_hash(manifest: &[u8]) -> String {
    format!("{}  {MANIFEST}\n", sha256(manifest))
}

/// Writes the files of the checkpoint that will be at `path`.
fn write_folder(
    folder: &NewFolder,
    path: &Path,
    model: ModuleRecord,
    optimizer: OptimizerRecord,
    state: &TrainState,
    identity: &Identity,
    codes: Option<&[u8]>,
) -> Result<(), CheckpointError> {
    // Burn streams the tensors to the file and syncs it; hashing what it wrote costs no second copy in memory.
    let record_error = |name| {
        let path = path.join(name);
        move |error: RecordError| write_error(&path)(io::Error::other(error))
    };
    let folder = folder.scratch();
    model.save(folder.join(MODEL)).map_err(record_error(MODEL))?;
    optimizer.save(folder.join(OPTIMIZER)).map_err(record_error(OPTIMIZER))?;
    if let Some(codes) = codes {
        disk::write_new(&folder.join(CODES), codes).map_err(write_error(&path.join(CODES)))?;
    }
    let manifest = Manifest {
        version: VERSION,
        experiment_sha256: None,
        experiment_version: version::VERSION,
        identity: Some(identity.clone()),
        state: state.clone(),
        model: file_entry(folder.join(MODEL))?,
        optimizer: file_entry(folder.join(OPTIMIZER))?,
        codes: codes.map(|_| file_entry(folder.join(CODES))).transpose()?,
    };
    let manifest = serde_json::to_vec_pretty(&manifest).expect("plain structs are always JSON");
    for (name, bytes) in [(MANIFEST, &manifest[..]), (MANIFEST_HASH, manifest_hash(&manifest).as_bytes())] {
        disk::write_new(&folder.join(name), bytes).map_err(write_error(&path.join(name)))?;
    }
    Ok(())
}

fn file_entry(path: PathBuf) -> Result<FileEntry, CheckpointError> {
    let mut hash = Sha256::new();
    let bytes = File::open(&path)
        .and_then(|mut file| io::copy(&mut file, &mut hash))
        .map_err(|source| CheckpointError::Read { path, source })?;
    Ok(FileEntry { bytes, sha256: format!("{:x}", hash.finalize()) })
}

fn write_error(path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.to_owned();
    |source| CheckpointError::Write { path, source }
}

fn read_folder(folder: &Path, step: usize) -> Result<Loaded, RefusalReason> {
    let manifest = read_manifest(folder, step)?;
    let model = read_tensors(folder, MODEL, &manifest.model)?;
    let optimizer = read_tensors(folder, OPTIMIZER, &manifest.optimizer)?;
    let codes = manifest.codes.map(|entry| read_sealed(folder, CODES, &entry)).transpose()?;
    Ok(Loaded {
        path: folder.to_owned(),
        model_bytes: manifest.model.bytes,
        bytes: manifest.model.bytes + manifest.optimizer.bytes,
        model: ModuleRecord::from_bytes(model).map_err(bad_tensors(MODEL))?,
        optimizer: OptimizerRecord::from_bytes(optimizer).map_err(bad_tensors(OPTIMIZER))?,
        state: manifest.state,
        codes,
        identity: manifest.identity,
        experiment_sha256: manifest.experiment_sha256,
        refused: Vec::new(),
    })
}

fn read_manifest(folder: &Path, step: usize) -> Result<Manifest, RefusalReason> {
    #[derive(Deserialize)]
    struct AnyVersion {
        version: u64,
    }

    let found = file_length(folder, MANIFEST)?;
    if found > MANIFEST_LIMIT {
        return Err(bad_manifest(format!("{found} bytes, expected at most {MANIFEST_LIMIT}")));
    }
    let text = read_file(folder, MANIFEST)?;
    let hash = manifest_hash(&text);
    check_length(folder, MANIFEST_HASH, hash.len() as u64)?;
    if read_file(folder, MANIFEST_HASH)? != hash.as_bytes() {
        return Err(RefusalReason::Altered { file: MANIFEST });
    }
    let AnyVersion { version } = serde_json::from_slice(&text).map_err(bad_manifest)?;
    if version != VERSION {
        return Err(RefusalReason::Version { found: version });
    }
    let mut manifest: Manifest = serde_json::from_slice(&text).map_err(bad_manifest)?;
    if manifest.state.step != step {
        return Err(bad_manifest(format!("step {} in a folder of step {step}", manifest.state.step)));
    }
    let identity = manifest.identity.map(|identity| identity.migrated(manifest.experiment_version));
    manifest.identity = identity.transpose().map_err(bad_manifest)?;
    Ok(manifest)
}

fn read_tensors(folder: &Path, file: &'static str, entry: &FileEntry) -> Result<Bytes, RefusalReason> {
    Ok(Bytes::from_bytes_vec(read_sealed(folder, file, entry)?))
}

fn read_sealed(folder: &Path, file: &'static str, entry: &FileEntry) -> Result<Vec<u8>, RefusalReason> {
    check_length(folder, file, entry.bytes)?;
    let bytes = read_file(folder, file)?;
    if sha256(&bytes) != entry.sha256 {
        return Err(RefusalReason::Altered { file });
    }
    Ok(bytes)
}

fn check_length(folder: &Path, file: &'static str, expected: u64) -> Result<(), RefusalReason> {
    let found = file_length(folder, file)?;
    if found == expected {
        return Ok(());
    }
    Err(RefusalReason::Length { file, expected, found })
}

fn file_length(folder: &Path, file: &'static str) -> Result<u64, RefusalReason> {
    let metadata = fs::metadata(folder.join(file)).map_err(unreadable(file))?;
    Ok(metadata.len())
}

fn read_file(folder: &Path, file: &'static str) -> Result<Vec<u8>, RefusalReason> {
    disk::read(&folder.join(file)).map_err(unreadable(file))
}

fn unreadable(file: &'static str) -> impl FnOnce(io::Error) -> RefusalReason {
    move |error| match error.kind() {
        io::ErrorKind::NotFound => RefusalReason::Missing { file },
        _ => RefusalReason::Unreadable { file, detail: error.to_string() },
    }
}

fn bad_manifest(detail: impl Display) -> RefusalReason {
    let detail = detail.to_string();
    RefusalReason::Manifest { detail }
}

fn bad_tensors<E: Display>(file: &'static str) -> impl FnOnce(E) -> RefusalReason {
    move |error| RefusalReason::Tensors { file, detail: error.to_string() }
}

fn join(refused: &[Refusal]) -> String {
    let lines: Vec<_> = refused.iter().map(Refusal::to_string).collect();
    lines.join("; ")
}

#[cfg(all(test, feature = "flex"))]
mod tests;
