//! Checkpoints: model, optimizer and loop state as one atomic unit on disk.
//!
//! A checkpoint is a folder `step-00001200/` that appears by one rename once every byte of it is on disk:
//!
//! | file | holds |
//! |---|---|
//! | `model.bpk` | Burn's [`ModuleRecord`] |
//! | `optimizer.bpk` | Burn's [`OptimizerRecord`] |
//! | `manifest.json` | format version, experiment hash, [`TrainState`], length and SHA-256 of the two files above |
//! | `manifest.sha256` | SHA-256 of `manifest.json`, as `sha256sum --check` reads it |
//!
//! Beside the checkpoints may lie what a killed process left: `.tmp-…`, unfinished or already given up, is never
//! read; `.old-step-…`, a checkpoint that was about to be replaced, counts as long as its successor is not there.
//! One process writes a folder at a time; readers change nothing.

use super::TrainState;
use std::{
    cmp::Reverse,
    fmt::Display,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    process,
};

use burn::{
    optim::OptimizerRecord,
    store::{ModuleRecord, RecordError},
    tensor::Bytes,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

const MODEL: &str = "model.bpk";
const OPTIMIZER: &str = "optimizer.bpk";
const MANIFEST: &str = "manifest.json";
const MANIFEST_HASH: &str = "manifest.sha256";
/// Format of the folder; any other is refused.
const VERSION: u64 = 1;
/// Bytes; a manifest has about a thousand, so a larger file is no manifest and is not read.
const MANIFEST_LIMIT: u64 = 1 << 20;
const STEP: &str = "step-";
const SCRATCH: &str = ".tmp-";
const ASIDE: &str = ".old-";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    version: u64,
    experiment_sha256: String,
    state: TrainState,
    #[serde(rename = "model.bpk")]
    model: FileEntry,
    #[serde(rename = "optimizer.bpk")]
    optimizer: FileEntry,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileEntry {
    bytes: u64,
    sha256: String,
}

/// Why checkpoints could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("no good checkpoint in {path}: {}", join(refused))]
    NoneGood { path: PathBuf, refused: Vec<Refusal> },
}

/// A checkpoint that is not used, and why.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct Refusal {
    /// The checkpoint's folder.
    pub path: PathBuf,
    pub reason: RefusalReason,
}

/// What is wrong with a checkpoint.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RefusalReason {
    #[error("{file} is missing")]
    Missing { file: &'static str },
    #[error("{file} cannot be read: {detail}")]
    Unreadable { file: &'static str, detail: String },
    #[error("{file} holds {found} bytes, expected {expected}")]
    Length { file: &'static str, expected: u64, found: u64 },
    #[error("{file} was altered: its sha256 is not the recorded one")]
    Altered { file: &'static str },
    #[error("{MANIFEST} is not valid: {detail}")]
    Manifest { detail: String },
    #[error("format version {found}, expected {VERSION}")]
    Version { found: u64 },
    #[error("{file} does not hold the expected tensors: {detail}")]
    Tensors { file: &'static str, detail: String },
}

/// A checkpoint that was read and verified.
#[derive(Debug)]
pub struct Loaded {
    pub path: PathBuf,
    pub model: ModuleRecord,
    pub optimizer: OptimizerRecord,
    pub state: TrainState,
    /// As given to [`Checkpoints::save`].
    pub experiment_sha256: String,
    /// Newer checkpoints that were passed over.
    pub refused: Vec<Refusal>,
}

/// The checkpoint folder of one run.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    keep: usize,
}

impl Checkpoints {
    /// Opens the folder, which is created where it does not exist; of its checkpoints the last `keep` stay
    /// (at least one).
    ///
    /// # Errors
    /// `Write`: the folder cannot be created.
    pub fn open(dir: impl Into<PathBuf>, keep: usize) -> Result<Self, CheckpointError> {
        let dir = dir.into();
        fs::create_dir_all(&dir).map_err(write_error(&dir))?;
        Ok(Self { dir, keep: keep.max(1) })
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
        experiment_sha256: &str,
    ) -> Result<PathBuf, CheckpointError> {
        self.recover()?;
        let path = self.dir.join(folder_name(state.step));
        let scratch = self.scratch(state.step);
        write_folder(&scratch, model, optimizer, state, experiment_sha256)
            .and_then(|()| self.publish(&scratch, &path, state.step))
            .inspect_err(|_| {
                // The write has failed; a scratch folder that stays as well is the next save's to remove.
                let _ = fs::remove_dir_all(&scratch);
            })?;
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
        let mut folders = self.folders("")?;
        folders.extend(self.folders(ASIDE)?);
        // Stable: of the same step, the checkpoint comes before the one it replaced.
        folders.sort_by_key(|&(step, _)| Reverse(step));
        let mut refused = Vec::new();
        for (step, path) in folders {
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
        for path in self.entries()? {
            if name(&path).starts_with(&format!("{SCRATCH}{STEP}")) {
                fs::remove_dir_all(&path).map_err(write_error(&path))?;
            }
        }
        for (step, aside) in self.folders(ASIDE)? {
            let path = self.dir.join(folder_name(step));
            if path.exists() {
                fs::remove_dir_all(&aside).map_err(write_error(&aside))?;
            } else {
                fs::rename(&aside, &path).map_err(write_error(&path))?;
            }
        }
        Ok(())
    }

    /// Moves a complete scratch folder to its name, over an older checkpoint of the same step.
    fn publish(&self, scratch: &Path, path: &Path, step: usize) -> Result<(), CheckpointError> {
        let aside = self.dir.join(format!("{ASIDE}{}", folder_name(step)));
        // A folder cannot be renamed over a full one, so the old one steps aside first.
        let replaces = path.exists();
        if replaces {
            fs::rename(path, &aside).map_err(write_error(path))?;
        }
        if let Err(source) = fs::rename(scratch, path) {
            if replaces {
                // Where this fails too, `recover` does it.
                let _ = fs::rename(&aside, path);
            }
            return Err(write_error(path)(source));
        }
        sync_folder(&self.dir)?;
        if replaces {
            fs::remove_dir_all(&aside).map_err(write_error(&aside))?;
        }
        Ok(())
    }

    /// Removes all but the last `keep` checkpoints up to `step`.
    fn prune(&self, step: usize) -> Result<(), CheckpointError> {
        let mut folders = self.folders("")?;
        folders.retain(|&(other, _)| other <= step);
        for (other, path) in folders.drain(..).skip(self.keep).rev() {
            // Renamed first, so that a kill in between leaves no half a checkpoint under a good name.
            let scratch = self.scratch(other);
            fs::rename(&path, &scratch).map_err(write_error(&path))?;
            fs::remove_dir_all(&scratch).map_err(write_error(&scratch))?;
        }
        Ok(())
    }

    fn scratch(&self, step: usize) -> PathBuf {
        self.dir.join(format!("{SCRATCH}{}-{}", folder_name(step), process::id()))
    }

    /// Step and path of everything named `<prefix>step-00001200`, newest first.
    fn folders(&self, prefix: &str) -> Result<Vec<(usize, PathBuf)>, CheckpointError> {
        let step_of = |path: &PathBuf| {
            let name = name(path).strip_prefix(prefix)?;
            let step = name.strip_prefix(STEP)?.parse().ok()?;
            (folder_name(step) == name).then_some(step)
        };
        let mut folders: Vec<_> =
            self.entries()?.into_iter().filter_map(|path| Some((step_of(&path)?, path))).collect();
        folders.sort_by_key(|&(step, _)| Reverse(step));
        Ok(folders)
    }

    fn entries(&self) -> Result<Vec<PathBuf>, CheckpointError> {
        fs::read_dir(&self.dir)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
            .map_err(|source| CheckpointError::Read { path: self.dir.clone(), source })
    }
}

/// SHA-256 of `bytes`, in lower-case hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

fn folder_name(step: usize) -> String {
    format!("{STEP}{step:08}")
}

/// The last part of a path; empty where it is not UTF-8, which no name of ours is.
fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// What `manifest.sha256` must hold.
fn manifest_hash(manifest: &[u8]) -> String {
    format!("{}  {MANIFEST}\n", sha256(manifest))
}

fn write_folder(
    folder: &Path,
    model: ModuleRecord,
    optimizer: OptimizerRecord,
    state: &TrainState,
    experiment_sha256: &str,
) -> Result<(), CheckpointError> {
    fs::create_dir(folder).map_err(write_error(folder))?;
    // Burn streams the tensors to the file and syncs it; hashing what it wrote costs no second copy in memory.
    let record_error = |name| {
        let path = folder.join(name);
        move |error: RecordError| write_error(&path)(io::Error::other(error))
    };
    model.save(folder.join(MODEL)).map_err(record_error(MODEL))?;
    optimizer.save(folder.join(OPTIMIZER)).map_err(record_error(OPTIMIZER))?;
    let manifest = Manifest {
        version: VERSION,
        experiment_sha256: experiment_sha256.to_owned(),
        state: state.clone(),
        model: file_entry(folder.join(MODEL))?,
        optimizer: file_entry(folder.join(OPTIMIZER))?,
    };
    let manifest = serde_json::to_vec_pretty(&manifest).expect("plain structs are always JSON");
    write_file(&folder.join(MANIFEST), &manifest)?;
    write_file(&folder.join(MANIFEST_HASH), manifest_hash(&manifest).as_bytes())?;
    sync_folder(folder)
}

fn file_entry(path: PathBuf) -> Result<FileEntry, CheckpointError> {
    let mut hash = Sha256::new();
    let bytes = File::open(&path)
        .and_then(|mut file| io::copy(&mut file, &mut hash))
        .map_err(|source| CheckpointError::Read { path, source })?;
    Ok(FileEntry { bytes, sha256: format!("{:x}", hash.finalize()) })
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    File::create(path)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .map_err(write_error(path))
}

/// Makes the names in a folder durable; only Unix has a call for it.
fn sync_folder(path: &Path) -> Result<(), CheckpointError> {
    if cfg!(unix) {
        File::open(path).and_then(|folder| folder.sync_all()).map_err(write_error(path))?;
    }
    Ok(())
}

fn write_error(path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.to_owned();
    |source| CheckpointError::Write { path, source }
}

fn read_folder(folder: &Path, step: usize) -> Result<Loaded, RefusalReason> {
    let manifest = read_manifest(folder, step)?;
    let model = read_tensors(folder, MODEL, &manifest.model)?;
    let optimizer = read_tensors(folder, OPTIMIZER, &manifest.optimizer)?;
    Ok(Loaded {
        path: folder.to_owned(),
        model: ModuleRecord::from_bytes(model).map_err(bad_tensors(MODEL))?,
        optimizer: OptimizerRecord::from_bytes(optimizer).map_err(bad_tensors(OPTIMIZER))?,
        state: manifest.state,
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
    let manifest: Manifest = serde_json::from_slice(&text).map_err(bad_manifest)?;
    if manifest.state.step != step {
        return Err(bad_manifest(format!("step {} in a folder of step {step}", manifest.state.step)));
    }
    Ok(manifest)
}

fn read_tensors(folder: &Path, file: &'static str, entry: &FileEntry) -> Result<Bytes, RefusalReason> {
    check_length(folder, file, entry.bytes)?;
    let bytes = read_file(folder, file)?;
    if sha256(&bytes) != entry.sha256 {
        return Err(RefusalReason::Altered { file });
    }
    Ok(Bytes::from_bytes_vec(bytes))
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
    fs::read(folder.join(file)).map_err(unreadable(file))
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

fn bad_tensors(file: &'static str) -> impl FnOnce(RecordError) -> RefusalReason {
    move |error| RefusalReason::Tensors { file, detail: error.to_string() }
}

fn join(refused: &[Refusal]) -> String {
    let lines: Vec<_> = refused.iter().map(Refusal::to_string).collect();
    lines.join("; ")
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use burn::{
        module::{Module, Param},
        nn::{Linear, LinearConfig},
        optim::{AdamWConfig, GradientsParams, ModuleOptimizer},
        tensor::{Device, Distribution, Tensor},
    };
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use std::{env, process::Command, thread, time::Duration};
    use tempfile::TempDir;

    const FILES: [&str; 4] = [MODEL, OPTIMIZER, MANIFEST, MANIFEST_HASH];

    #[derive(Module, Debug)]
    struct Tiny {
        first: Linear,
        second: Linear,
    }

    impl Tiny {
        fn new(device: &Device) -> Self {
            Self { first: LinearConfig::new(5, 7).init(device), second: LinearConfig::new(7, 3).init(device) }
        }

        fn bits(&self) -> Vec<u32> {
            let bits = |data: burn::tensor::TensorData| data.try_into_vec::<f32>().unwrap();
            [&self.first, &self.second]
                .into_iter()
                .flat_map(|linear| {
                    let bias = linear.bias.as_ref().unwrap().val().into_data();
                    [bits(linear.weight.val().into_data()), bits(bias)].concat()
                })
                .map(f32::to_bits)
                .collect()
        }
    }

    fn autodiff() -> Device {
        Device::flex().autodiff()
    }

    fn inputs(count: usize) -> Vec<Tensor<2>> {
        let random = |_| Tensor::random([4, 5], Distribution::Default, &autodiff());
        (0..count).map(random).collect()
    }

    fn train(mut model: Tiny, optimizer: &mut ModuleOptimizer, inputs: &[Tensor<2>]) -> Tiny {
        for input in inputs {
            let hidden = burn::tensor::activation::tanh(model.first.forward(input.clone()));
            let loss = model.second.forward(hidden).powi_scalar(2).mean();
            let gradients = GradientsParams::from_grads(loss.backward(), &model);
            model = optimizer.step(0.01, model, gradients);
        }
        model
    }

    fn optimizer() -> ModuleOptimizer {
        AdamWConfig::new().init()
    }

    fn state(step: usize) -> TrainState {
        TrainState { step, windows_seen: step as u64 * 12, ..TrainState::default() }
    }

    /// Saves a model after two steps of AdamW, a different one each time.
    fn save(checkpoints: &Checkpoints, step: usize) -> PathBuf {
        let mut optimizer = optimizer();
        let model = train(Tiny::new(&autodiff()), &mut optimizer, &inputs(2));
        checkpoints.save(model.into_record(), optimizer.to_record(), &state(step), "abc").unwrap()
    }

    fn folder() -> (TempDir, Checkpoints) {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(dir.path().join("checkpoints"), 3).unwrap();
        (dir, checkpoints)
    }

    fn latest(checkpoints: &Checkpoints) -> Loaded {
        checkpoints.latest_good().unwrap().unwrap()
    }

    fn names(checkpoints: &Checkpoints) -> Vec<String> {
        let entries = checkpoints.entries().unwrap();
        let mut names: Vec<_> = entries.iter().map(|path| name(path).to_owned()).collect();
        names.sort();
        names
    }

    fn copy(from: &Path, to: &Path) {
        fs::create_dir(to).unwrap();
        for file in FILES {
            fs::copy(from.join(file), to.join(file)).unwrap();
        }
    }

    /// Replaces a file of the newest of two checkpoints and expects the older one, with the newer one named.
    fn refusal_of(checkpoints: &Checkpoints, bad: &Path, file: &str, bytes: &[u8]) -> RefusalReason {
        let path = bad.join(file);
        let good = fs::read(&path).unwrap();
        fs::write(&path, bytes).unwrap();
        let loaded = latest(checkpoints);
        fs::write(&path, good).unwrap();
        assert_eq!(loaded.state.step, 1, "{file}");
        assert_eq!(loaded.refused.len(), 1, "{file}");
        assert_eq!(loaded.refused[0].path, bad, "{file}");
        loaded.refused[0].reason.clone()
    }

    /// Replaces the manifest, and its hash with it.
    fn forge(folder: &Path, manifest: &[u8]) {
        fs::write(folder.join(MANIFEST), manifest).unwrap();
        fs::write(folder.join(MANIFEST_HASH), manifest_hash(manifest)).unwrap();
    }

    #[test]
    fn training_goes_on_bit_for_bit() {
        let (_dir, checkpoints) = folder();
        let inputs = inputs(5);
        let mut kept = optimizer();
        let model = train(Tiny::new(&autodiff()), &mut kept, &inputs[..2]);
        let record = model.clone().into_record();
        let path = checkpoints.save(record, kept.to_record(), &state(2), "abc").unwrap();
        assert_eq!(name(&path), "step-00000002");

        let loaded = latest(&checkpoints);
        assert_eq!(loaded.path, path);
        assert_eq!(loaded.state, state(2));
        assert_eq!(loaded.experiment_sha256, "abc");
        assert_eq!(loaded.refused, []);
        let resumed = Tiny::new(&autodiff()).load_record(loaded.model);
        assert_eq!(resumed.bits(), model.bits());
        let mut restored = optimizer().load_record(loaded.optimizer);

        let forgetful = train(resumed.clone(), &mut optimizer(), &inputs[2..]);
        let resumed = train(resumed, &mut restored, &inputs[2..]);
        let model = train(model, &mut kept, &inputs[2..]);
        assert_eq!(resumed.bits(), model.bits());
        assert_ne!(forgetful.bits(), model.bits(), "the test does not see the optimizer's state");
    }

    #[test]
    fn an_empty_folder_has_no_checkpoint() {
        let (_dir, checkpoints) = folder();
        assert!(checkpoints.latest_good().unwrap().is_none());
        fs::create_dir(checkpoints.dir.join("step-1")).unwrap();
        fs::create_dir(checkpoints.dir.join("step-last")).unwrap();
        assert!(checkpoints.latest_good().unwrap().is_none());
    }

    #[test]
    fn truncated_files_are_refused_by_name() {
        let (_dir, checkpoints) = folder();
        save(&checkpoints, 1);
        let bad = save(&checkpoints, 2);
        let mut random = ChaCha8Rng::from_os_rng();
        for file in FILES {
            let bytes = fs::read(bad.join(file)).unwrap();
            let mut lengths = vec![0, 1, bytes.len() / 2, bytes.len() - 1];
            lengths.extend((0..20).map(|_| random.random_range(0..bytes.len())));
            for length in lengths {
                let reason = refusal_of(&checkpoints, &bad, file, &bytes[..length]);
                // A shorter manifest shows in its hash.
                assert!(
                    matches!(reason, RefusalReason::Length { file: f, found, .. }
                        if f == file && found == length as u64)
                        || matches!(reason, RefusalReason::Altered { file: MANIFEST } if file == MANIFEST),
                    "{file} cut to {length}: {reason}"
                );
            }
            refusal_of(&checkpoints, &bad, file, &[&bytes[..], b"\n"].concat());
        }
        assert_eq!(latest(&checkpoints).state.step, 2);
    }

    #[test]
    fn flipped_bits_are_refused_by_name() {
        let (_dir, checkpoints) = folder();
        save(&checkpoints, 1);
        let bad = save(&checkpoints, 2);
        let mut random = ChaCha8Rng::from_os_rng();
        for file in FILES {
            let bytes = fs::read(bad.join(file)).unwrap();
            for _ in 0..60 {
                let mut altered = bytes.clone();
                altered[random.random_range(0..bytes.len())] ^= 1 << random.random_range(0..8);
                let reason = refusal_of(&checkpoints, &bad, file, &altered);
                // A wrong hash cannot be told from a wrong manifest.
                let file = if file == MANIFEST_HASH { MANIFEST } else { file };
                assert_eq!(reason, RefusalReason::Altered { file });
            }
        }
    }

    #[test]
    fn missing_files_are_refused_by_name() {
        let (_dir, checkpoints) = folder();
        save(&checkpoints, 1);
        let bad = save(&checkpoints, 2);
        for file in FILES {
            let bytes = fs::read(bad.join(file)).unwrap();
            fs::remove_file(bad.join(file)).unwrap();
            let loaded = latest(&checkpoints);
            assert_eq!(loaded.state.step, 1);
            let refusal = Refusal { path: bad.clone(), reason: RefusalReason::Missing { file } };
            assert_eq!(loaded.refused, [refusal]);
            fs::write(bad.join(file), bytes).unwrap();
        }
    }

    #[test]
    fn hostile_manifests_are_refused() {
        let (_dir, checkpoints) = folder();
        save(&checkpoints, 1);
        let bad = save(&checkpoints, 2);
        let text = fs::read_to_string(bad.join(MANIFEST)).unwrap();
        let length = fs::metadata(bad.join(MODEL)).unwrap().len();
        let replace = |from: &str, to: &str| {
            assert!(text.contains(from), "{from}");
            text.replacen(from, to, 1)
        };
        let version = replace("\"version\": 1", "\"version\": 2, \"new\": []");
        let manifests = [
            (version, "format version 2, expected 1"),
            (replace("\"step\": 2", "\"step\": 3"), "step 3 in a folder of step 2"),
            (replace("\"step\": 2", "\"step\": -2"), "not valid"),
            (replace("\"bad_steps\": 0,", ""), "bad_steps"),
            (replace("\"bad_steps\": 0,", "\"bad_steps\": 0, \"more\": 0,"), "more"),
            (replace("\"elapsed_s\": \"0.0\"", "\"elapsed_s\": \"soon\""), "soon"),
            (replace(MODEL, "../../../etc/passwd"), "etc/passwd"),
            (replace(&length.to_string(), &u64::MAX.to_string()), "expected 18446744073709551615"),
            ("[".repeat(100_000), "not valid"),
            (" ".repeat(MANIFEST_LIMIT as usize + 1), "expected at most"),
            (String::new(), "not valid"),
        ];
        for (manifest, reason) in manifests {
            forge(&bad, manifest.as_bytes());
            let loaded = latest(&checkpoints);
            assert_eq!(loaded.state.step, 1);
            assert_eq!(loaded.refused[0].path, bad);
            let found = loaded.refused[0].to_string();
            assert!(found.contains(reason) && found.starts_with(bad.to_str().unwrap()), "{found}");
        }
        forge(&bad, text.as_bytes());
        assert_eq!(latest(&checkpoints).state.step, 2);
    }

    #[test]
    fn tensors_that_do_not_parse_are_refused() {
        let (_dir, checkpoints) = folder();
        save(&checkpoints, 1);
        let bad = save(&checkpoints, 2);
        let text = fs::read_to_string(bad.join(MANIFEST)).unwrap();
        for file in [MODEL, OPTIMIZER] {
            let good = fs::read(bad.join(file)).unwrap();
            let noise: Vec<u8> = good.iter().map(|byte| byte.wrapping_mul(31)).collect();
            for bytes in [&b""[..], b"burn", &good[..good.len() / 2], &noise] {
                fs::write(bad.join(file), bytes).unwrap();
                let manifest = text
                    .replace(&sha256(&good), &sha256(bytes))
                    .replace(&format!("\"bytes\": {}", good.len()), &format!("\"bytes\": {}", bytes.len()));
                forge(&bad, manifest.as_bytes());
                let loaded = latest(&checkpoints);
                assert_eq!(loaded.state.step, 1);
                let reason = &loaded.refused[0].reason;
                assert!(matches!(reason, RefusalReason::Tensors { file: f, .. } if *f == file), "{reason}");
            }
            fs::write(bad.join(file), good).unwrap();
        }
    }

    #[test]
    fn without_a_good_one_all_are_named() {
        let (_dir, checkpoints) = folder();
        let paths = [1, 2, 3].map(|step| save(&checkpoints, step));
        for path in &paths {
            fs::write(path.join(MODEL), b"").unwrap();
        }
        let error = checkpoints.latest_good().unwrap_err();
        for path in &paths {
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
        assert!(matches!(error, CheckpointError::NoneGood { refused, .. } if refused.len() == 3));
    }

    #[test]
    fn the_last_ones_are_kept() {
        let (_dir, checkpoints) = folder();
        for step in [1, 2, 9, 10, 100] {
            save(&checkpoints, step);
        }
        assert_eq!(names(&checkpoints), ["step-00000009", "step-00000010", "step-00000100"]);
        // After a return to step 10: what is later does not crowd out what is good.
        save(&checkpoints, 11);
        save(&checkpoints, 12);
        let later = ["step-00000010", "step-00000011", "step-00000012", "step-00000100"];
        assert_eq!(names(&checkpoints), later);
        let none = Checkpoints::open(&checkpoints.dir, 0).unwrap();
        save(&none, 101);
        assert_eq!(names(&checkpoints), ["step-00000101"]);
        assert_eq!(latest(&checkpoints).state.step, 101);
    }

    #[test]
    fn the_same_step_is_replaced() {
        let (_dir, checkpoints) = folder();
        save(&checkpoints, 1);
        let path = save(&checkpoints, 2);
        let before = fs::read(path.join(MODEL)).unwrap();
        assert_eq!(save(&checkpoints, 2), path);
        assert_ne!(fs::read(path.join(MODEL)).unwrap(), before);
        assert_eq!(names(&checkpoints), ["step-00000001", "step-00000002"]);
        assert_eq!(latest(&checkpoints).refused, []);
    }

    #[test]
    fn every_kill_point_leaves_a_checkpoint() {
        let stages = ["unfinished", "complete", "aside", "replaced", "half removed", "pruning"];
        for stage in stages {
            let (dir, checkpoints) = folder();
            save(&checkpoints, 1);
            let path = save(&checkpoints, 2);
            // A newer checkpoint of the same step, told apart by its window count.
            let other = Checkpoints::open(dir.path().join("other"), 1).unwrap();
            let newer = TrainState { windows_seen: 99, ..state(2) };
            let record = Tiny::new(&autodiff()).into_record();
            let newer = other.save(record, optimizer().to_record(), &newer, "abc").unwrap();
            let scratch = checkpoints.dir.join(".tmp-step-00000002-77");
            let aside = checkpoints.dir.join(".old-step-00000002");
            match stage {
                "unfinished" => {
                    copy(&newer, &scratch);
                    fs::remove_file(scratch.join(MANIFEST)).unwrap();
                    fs::write(scratch.join("model.bpk.77-0.tmp"), b"half").unwrap();
                }
                "complete" => copy(&newer, &scratch),
                "aside" => {
                    copy(&newer, &scratch);
                    fs::rename(&path, &aside).unwrap();
                }
                "replaced" | "half removed" => {
                    fs::rename(&path, &aside).unwrap();
                    copy(&newer, &path);
                    if stage == "half removed" {
                        fs::remove_file(aside.join(OPTIMIZER)).unwrap();
                    }
                }
                _ => fs::rename(checkpoints.dir.join("step-00000001"), &scratch).unwrap(),
            }
            let windows = if ["replaced", "half removed"].contains(&stage) { 99 } else { 24 };
            let loaded = latest(&checkpoints);
            assert_eq!((loaded.state.step, loaded.state.windows_seen), (2, windows), "{stage}");
            assert_eq!(loaded.refused, [], "{stage}");

            save(&checkpoints, 3);
            let mut expected = vec!["step-00000001", "step-00000002", "step-00000003"];
            if stage == "pruning" {
                expected.remove(0);
            }
            assert_eq!(names(&checkpoints), expected, "{stage}");
            fs::remove_dir_all(checkpoints.dir.join("step-00000003")).unwrap();
            assert_eq!(latest(&checkpoints).state.windows_seen, windows, "{stage}");
        }
    }

    /// Runs one test of this module in a process of its own, which finds `dir` in its environment.
    fn child(test: &str, dir: &Path, limit: &str) -> Command {
        let mut command = Command::new("sh");
        let script = format!("trap '' XFSZ; ulimit -f {limit}; exec \"$0\" --exact \"$1\"");
        let path = module_path!().split_once("::").unwrap().1;
        command
            .args(["-c", &script])
            .arg(env::current_exe().unwrap())
            .arg(format!("{path}::{test}"))
            .env(CHILD, dir)
            .stdout(process::Stdio::null());
        command
    }

    const CHILD: &str = "CHECKPOINT_TEST_DIR";

    /// A model of `size * size` weights that are all `value`.
    fn constant(size: usize, value: f32) -> Linear {
        let device = Device::flex();
        let mut linear = LinearConfig::new(size, size).with_bias(false).init(&device);
        linear.weight = Param::from_tensor(Tensor::full([size, size], value, &device));
        linear
    }

    #[cfg(unix)]
    #[test]
    fn a_killed_process_leaves_a_checkpoint() {
        const TEST: &str = "a_killed_process_leaves_a_checkpoint";
        if let Ok(dir) = env::var(CHILD) {
            let checkpoints = Checkpoints::open(dir, 2).unwrap();
            let start = latest(&checkpoints).state.windows_seen;
            for windows in start + 1.. {
                // Each step three times, so that most saves replace a checkpoint.
                let state = TrainState { windows_seen: windows, ..state(windows as usize / 3) };
                let model = constant(64, windows as f32).into_record();
                checkpoints.save(model, optimizer().to_record(), &state, "abc").unwrap();
            }
        }
        let (_dir, checkpoints) = folder();
        let model = constant(64, 0.0).into_record();
        checkpoints.save(model, optimizer().to_record(), &state(0), "abc").unwrap();
        let mut random = ChaCha8Rng::from_os_rng();
        for _ in 0..20 {
            let mut child = child(TEST, &checkpoints.dir, "unlimited").spawn().unwrap();
            thread::sleep(Duration::from_micros(random.random_range(20_000..120_000)));
            child.kill().unwrap();
            child.wait().unwrap();
            let loaded = latest(&checkpoints);
            assert_eq!(loaded.refused, []);
            let windows = loaded.state.windows_seen;
            let weight = constant(64, -1.0).load_record(loaded.model).weight.val();
            let weights = weight.into_data().try_into_vec::<f32>().unwrap();
            assert!(weights.iter().all(|&weight| weight == windows as f32), "{windows}");
        }
        assert!(latest(&checkpoints).state.windows_seen > 0, "the child never saved");
    }

    #[cfg(unix)]
    #[test]
    fn a_full_disk_keeps_the_earlier_checkpoints() {
        const TEST: &str = "a_full_disk_keeps_the_earlier_checkpoints";
        const RAN: i32 = 7;
        if let Ok(dir) = env::var(CHILD) {
            let checkpoints = Checkpoints::open(dir, 1).unwrap();
            for (step, size) in [(2, 256), (1, 256), (2, 512)] {
                let model = constant(size, 1.0).into_record();
                let error = checkpoints.save(model, optimizer().to_record(), &state(step), "abc");
                let error = error.unwrap_err().to_string();
                assert!(error.contains(MODEL) && error.contains(&folder_name(step)), "{error}");
                assert_eq!(names(&checkpoints), ["step-00000001"]);
            }
            // Tells the parent that this ran, which a test name without a test would not.
            process::exit(RAN);
        }
        // No disk is full here: a limit on the size of files fails the same calls.
        let (_dir, checkpoints) = folder();
        let path = save(&checkpoints, 1);
        let before = FILES.map(|file| fs::read(path.join(file)).unwrap());
        let status = child(TEST, &checkpoints.dir, "64").status().unwrap();
        assert_eq!(status.code(), Some(RAN));
        assert_eq!(FILES.map(|file| fs::read(path.join(file)).unwrap()), before);
        assert_eq!(latest(&checkpoints).refused, []);
    }

    #[test]
    fn a_file_in_place_of_the_folder_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, b"mine").unwrap();
        for path in [file.clone(), file.join("checkpoints")] {
            let error = Checkpoints::open(&path, 1).unwrap_err();
            assert!(matches!(error, CheckpointError::Write { .. }));
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
        assert_eq!(fs::read(&file).unwrap(), b"mine");
        let checkpoints = Checkpoints { dir: file.clone(), keep: 1 };
        let model = constant(4, 1.0).into_record();
        let error = checkpoints.save(model, optimizer().to_record(), &state(1), "abc");
        assert!(error.unwrap_err().to_string().contains(file.to_str().unwrap()));
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_without_permission_is_an_error_that_names_it() {
        use std::os::unix::fs::PermissionsExt;
        let (_dir, checkpoints) = folder();
        save(&checkpoints, 1);
        let set = |mode| {
            fs::set_permissions(&checkpoints.dir, fs::Permissions::from_mode(mode)).unwrap();
        };
        set(0o555);
        if fs::write(checkpoints.dir.join("probe"), b"").is_ok() {
            println!("skipped: permissions do not bind this user");
            return;
        }
        let model = constant(4, 1.0).into_record();
        let error = checkpoints.save(model, optimizer().to_record(), &state(2), "abc");
        set(0o755);
        assert!(error.unwrap_err().to_string().contains("step-00000002"));
        assert_eq!(latest(&checkpoints).state.step, 1);
    }
}
