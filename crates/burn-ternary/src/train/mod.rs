//! Logits to losses, gradients, metrics and checkpoints.

pub mod checkpoint;
pub mod command;
mod error;
pub mod experiment;
pub mod loss;
pub mod metrics;
pub mod optim;
pub mod plot;
pub mod progress;
pub mod report;
pub mod run;
pub mod schedule;
pub mod step;
pub mod strategy;

pub use error::TrainError;
pub use experiment::Experiment;
