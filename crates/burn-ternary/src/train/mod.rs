//! One optimizer step: loss, distillation, gradients, schedule and optimizers. Nothing here reads or writes a file.

pub mod distill;
mod gradients;
pub mod loss;
pub mod optim;
pub mod schedule;
mod state;
mod trainer;

pub use state::{StartLoss, TrainState};
pub use trainer::{LanguageModel, QuantizationTrainer, SpikeGuard};
pub(crate) use trainer::{TrainPlan, restore};
