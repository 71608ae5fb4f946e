//! One optimizer step: loss, distillation, gradients, schedule and optimizers. Nothing here reads or writes a file.

pub mod distill;
mod gradients;
mod language_model;
pub mod loss;
mod micro_batch;
pub mod optim;
pub mod schedule;
mod spike_guard;
mod state;
mod trainer;

pub use language_model::LanguageModel;
pub use spike_guard::SpikeGuard;
pub use state::{StartLoss, TrainState};
pub use trainer::QuantizationTrainer;
pub(crate) use trainer::{TrainPlan, restore};
