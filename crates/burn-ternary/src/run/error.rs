use super::checkpoint::CheckpointError;
use crate::data::DataError;
use crate::report::terminal::INTERRUPTED;
use std::{io, path::PathBuf};
use ternary_format::{disk::LockError, memory, threads::ThreadError};

/// Why a run could not start or continue.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The experiment is not what it has to be; `origin` is its file, with the line if known, or the override.
    #[error("{origin}: {message}")]
    Experiment {
        /// The file, with the line if it is known, or the override.
        origin: String,
        /// What was expected and found.
        message: String,
    },
    /// The run folder holds a run already.
    #[error(
        "{}: expected an empty run folder, found a run; --resume continues it, --overwrite moves it aside, \
         and --set run.name=NAME starts another",
        path.display()
    )]
    NotEmpty {
        /// The file or folder.
        path: PathBuf,
    },
    /// `--resume` of a run that is not this one.
    #[error(
        "{}: expected the settings and inputs of the run to resume it, found others: {}. Restore them to resume it, or \
         train another run from its weights with run.start_from = \"{}\"; nothing in the folder was changed",
        path.display(),
        differences.join("; "),
        path.display()
    )]
    OtherRun {
        /// The file or folder.
        path: PathBuf,
        /// Each setting or input that differs, with both values.
        differences: Vec<String>,
    },
    /// A signal or the terminal interface ended the run; its last checkpoint is of this step.
    #[error("interrupted after step {step} of {steps}; the same command with --resume continues {}", path.display())]
    Interrupted {
        /// The last step.
        step: usize,
        /// Steps of the whole run.
        steps: usize,
        /// The file or folder.
        path: PathBuf,
    },
    /// The run folder cannot be locked: another process writes it, or the disk refuses.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The run folder was moved or removed while the run was writing it.
    #[error(
        "{}: the run folder was moved or removed during the run; expected it to stay until the run has ended",
        path.display()
    )]
    Moved {
        /// The file or folder.
        path: PathBuf,
    },
    /// Texts, tokenizer or token files.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The device is not there.
    #[error(transparent)]
    Device(#[from] crate::device::DeviceError),
    /// The run does not fit into memory.
    #[error("{0}; a smaller batch_size, context or model fits")]
    MemoryTooSmall(#[from] memory::OutOfMemory),
    /// CPU threads cannot be started.
    #[error(transparent)]
    Threads(#[from] ThreadError),
    /// A file cannot be read.
    #[error("{}: cannot read: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("{}: cannot write: {source}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A checkpoint cannot be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// No model file of this model, or one that cannot be written.
    #[error(transparent)]
    Model(#[from] crate::ExportError),
    /// A model file that cannot be read or is no model, as that of a teacher.
    #[error(transparent)]
    Import(#[from] crate::ImportError),
    /// The loss left the finite numbers, or its usual range, once too often.
    #[error(
        "diverged at step {step} after {rollbacks} rollbacks; {}; a lower optim.lr and optim.muon_lr, or a longer \
         schedule.warmup_steps, can prevent it",
        match checkpoint {
            Some(path) => format!("the last good checkpoint is {}", path.display()),
            None => "there is no good checkpoint yet".into(),
        }
    )]
    Diverged {
        /// The last step.
        step: usize,
        /// Returns to a checkpoint before it.
        rollbacks: usize,
        /// The last good checkpoint.
        checkpoint: Option<PathBuf>,
    },
    /// The processes of a run are not equal.
    #[error(
        "the processes of a run must have the same program, processor, experiment and inputs, or their results differ: {}",
        differences.join("; ")
    )]
    Ranks {
        /// Each process and what differs there.
        differences: Vec<String>,
    },
    /// An error of one process of several.
    #[error("{name}: {source}")]
    Rank {
        /// The process and its host.
        name: String,
        /// Its error.
        source: Box<TrainError>,
    },
    /// Another process of the run has failed, and reports why.
    #[error("another process of the run has failed")]
    Elsewhere {
        /// Exit code of that process.
        exit_code: u8,
    },
    /// A launcher started this process as one of several, and it cannot reach the others.
    #[error(
        "{command} started {size} processes, and this program cannot share a run among them: {reason}. Expected one process, or \
         `duck` built with --features mpi for the MPI of {command}"
    )]
    Launcher {
        /// The launcher's command.
        command: &'static str,
        /// Processes that it started.
        size: usize,
        /// Why they cannot share the run.
        reason: &'static str,
    },
    /// The full-screen display cannot be opened.
    #[error("the terminal: {0}; --plain runs without the full-screen display")]
    Terminal(#[source] io::Error),
    /// The process cannot listen to signals.
    #[error("signals cannot be handled: {0}")]
    Signals(#[source] io::Error),
    /// An error of Burn.
    #[error(transparent)]
    Burn(Box<dyn std::error::Error + Send + Sync>),
}

impl TrainError {
    /// Exit code of a program that stops with this error: 2 usage or experiment, 3 data, 4 device or memory, 5 disk,
    /// 6 diverged, 7 interrupted, 1 anything else (and 8 for a process that gave up waiting for the others of its run, which is no
    /// error that is returned). A model that does not fit a file, a file that holds no model, and a
    /// checkpoint of another model are data; a run folder that another process writes is usage.
    pub fn exit_code(&self) -> u8 {
        match self {
            // Wherever it was refused.
            _ if memory::is_cause_of(self) => 4,
            Self::Threads(ThreadError::TooMany { .. }) => 2,
            Self::Experiment { .. }
            | Self::NotEmpty { .. }
            | Self::OtherRun { .. }
            | Self::Ranks { .. }
            | Self::Launcher { .. }
            | Self::Lock(LockError::Held { .. }) => 2,
            Self::Lock(_) | Self::Moved { .. } | Self::Data(DataError::Write { .. }) => 5,
            Self::Data(_)
            | Self::Checkpoint(CheckpointError::Unfit(_) | CheckpointError::NoneGood { .. }) => 3,
            Self::Model(error) if error.is_io() => 5,
            Self::Model(_) | Self::Import(_) => 3,
            Self::Device(_) | Self::MemoryTooSmall(_) | Self::Threads(_) => 4,
            Self::Read { source, .. } | Self::Write { source, .. }
                if source.kind() == io::ErrorKind::InvalidData =>
            {
                3
            }
            Self::Read { .. } | Self::Write { .. } | Self::Checkpoint(_) => 5,
            Self::Diverged { .. } => 6,
            Self::Interrupted { .. } => INTERRUPTED,
            Self::Rank { source, .. } => source.exit_code(),
            Self::Elsewhere { exit_code } => *exit_code,
            Self::Terminal(_) | Self::Signals(_) | Self::Burn(_) => 1,
        }
    }

    /// Whether another process of the run reports the cause, so that this one can be silent.
    pub fn is_reported(&self) -> bool {
        matches!(self, Self::Elsewhere { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::checkpoint::{Refusal, RefusalReason};

    #[test]
    fn each_cause_has_its_exit_code_and_says_what_to_look_at() {
        let path = PathBuf::from("runs/x-1");
        let run = path.clone();
        let differences = vec!["optim.lr is 1".into(), "data.train".into()];
        let denied = || io::Error::from(io::ErrorKind::PermissionDenied);
        let (origin, message) = ("x.toml:3".to_string(), "bad".to_string());
        let checkpoint = Some(path.join("step-9"));
        let reason = RefusalReason::Tensors { file: "model.bpk", detail: "missing".into() };
        let refusal = Refusal { path: path.join("step-9"), reason };
        for (error, code, fragment) in [
            (TrainError::Experiment { origin, message: message.clone() }, 2, "x.toml:3: bad"),
            (TrainError::NotEmpty { path: path.clone() }, 2, "runs/x-1: expected an empty run folder"),
            (LockError::Held { folder: path.clone(), process: Some(77) }.into(), 2, "process 77"),
            (LockError::Io { path: path.clone(), source: denied() }.into(), 5, "runs/x-1: cannot write"),
            (TrainError::Moved { path: path.clone() }, 5, "runs/x-1: the run folder was moved"),
            (DataError::Write { path: path.clone(), source: denied() }.into(), 5, "cannot write runs/x-1"),
            (DataError::Read { path: path.clone(), source: denied() }.into(), 3, "cannot read runs/x-1"),
            (crate::ExportError::InputNorm.into(), 3, "input_norm = false"),
            (crate::device::device("abacus").unwrap_err().into(), 4, "flex"),
            (memory::check(u64::MAX).unwrap_err().into(), 4, "MiB are available"),
            (TrainError::Read { path: path.clone(), source: denied() }, 5, "runs/x-1: cannot read"),
            (TrainError::Write { path: path.clone(), source: denied() }, 5, "runs/x-1: cannot write"),
            (CheckpointError::Write { path, source: denied() }.into(), 5, "runs/x-1"),
            (CheckpointError::Unfit(refusal).into(), 3, "runs/x-1/step-9: model.bpk does not hold"),
            (TrainError::Diverged { step: 9, rollbacks: 3, checkpoint }, 6, "runs/x-1/step-9"),
            (TrainError::Diverged { step: 9, rollbacks: 0, checkpoint: None }, 6, "no good checkpoint"),
            (
                TrainError::OtherRun { path: run.clone(), differences },
                2,
                "found others: optim.lr is 1; data.train",
            ),
            (
                TrainError::Interrupted { step: 9, steps: 12, path: run },
                7,
                "after step 9 of 12; the same command with --resume continues runs/x-1",
            ),
            (TrainError::Burn("shape".into()), 1, "shape"),
            (TrainError::Elsewhere { exit_code: 5 }, 5, "another process"),
            (TrainError::Launcher { command: "srun", size: 4, reason: "why" }, 2, "srun started 4 processes"),
        ] {
            assert_eq!(error.exit_code(), code, "{error}");
            assert!(error.to_string().contains(fragment), "{error}");
        }
    }
}
