//! What a run reports: metrics, progress lines, the full-screen display, plots and `result.json`.

pub mod burn_metrics;
pub mod code_stats;
pub(crate) mod display;
pub mod plot;
pub mod progress;
mod result;
pub(crate) mod terminal;

pub use burn_metrics::{Split, StepReport};
pub use result::{History, MetricsFile, Place, RunResult, read};
pub(crate) use result::{keep_samples, write_atomic};
