//! Whole runs: experiments, run folders, checkpoints, resuming, and the command line of training.

mod cache_teacher;
pub mod checkpoint;
mod claim;
#[cfg(feature = "cli")]
pub mod command;
mod context;
mod error;
mod events;
pub mod experiment;
mod home;
mod identity;
mod initial_model;
mod memory;
mod outputs;
mod phases;
mod proposal;
mod ranks;
pub mod reference;
mod resolve;
mod run_folder;
mod signals;
mod teacher;
mod training_loop;
pub mod version;
mod warnings;

pub use cache_teacher::cache_teacher_logits;
#[cfg(feature = "cli")]
pub use command::{ExperimentArgs, TEACHER_LOGITS, TrainCommand};
pub use error::TrainError;
pub use experiment::Experiment;
pub use phases::{RunOptions, run, train_duck_quantized};
pub use proposal::{Proposal, Size, TextCounts, propose};
pub use run_folder::{SavedRun, packed_model};
pub use ternary_format::disk::{LockError, RunLock};
