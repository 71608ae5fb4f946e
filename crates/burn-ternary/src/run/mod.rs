//! Whole runs: experiments, run folders, checkpoints, resuming, and the command line of training.

pub mod checkpoint;
pub mod command;
mod error;
pub mod experiment;
pub mod identity;
mod phases;
mod proposal;
mod run_folder;
mod signals;
mod training_loop;

pub use crate::train::distill::record_teacher;
pub use command::{ExperimentArgs, RECORDING, TrainCommand};
pub use error::TrainError;
pub use experiment::Experiment;
pub use phases::{RunOptions, run, train_duck_quantized};
pub(crate) use phases::{last_checkpoint, resolve_vocabulary};
pub use proposal::{Proposal, Size, TextCounts, propose};
pub use run_folder::{SavedRun, packed_model};
pub use ternary_format::disk::{LockError, RunLock};
