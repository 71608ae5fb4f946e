//! Logits to losses, gradients, metrics and checkpoints.

mod adamw;
pub mod checkpoint;
pub mod codes;
pub mod command;
mod display;
pub mod distill;
mod error;
pub mod experiment;
mod gradients;
pub mod identity;
pub mod loss;
pub mod metrics;
mod moment;
mod muon;
pub mod optim;
pub mod plot;
pub mod progress;
mod proposal;
pub mod report;
mod run;
mod saved;
pub mod schedule;
mod signals;
mod state;
mod step;
mod strategy;
mod terminal;

pub use command::{ExperimentArgs, RECORDING, TrainCommand};
pub use error::TrainError;
pub use experiment::Experiment;
pub use proposal::{Proposal, Size, TextCounts, propose};
pub use run::{RunOptions, run, train_duck_quantized};
pub use saved::{SavedRun, packed_model};
pub use state::TrainState;
pub use step::{LanguageModel, QuantizationTrainer, SpikeGuard};
pub use ternary_format::disk::{LockError, RunLock};
