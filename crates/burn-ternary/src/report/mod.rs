//! Reports of a run: metrics, progress lines, the full-screen display, plots and `result.json`.

pub mod burn_metrics;
pub mod code_stats;
#[cfg(feature = "tui")]
mod display;
mod file;
mod format;
mod metrics_file;
#[cfg(feature = "plot")]
pub mod plot;
pub mod progress;
mod real;
mod result;
#[cfg_attr(not(feature = "tui"), path = "no_screen.rs")]
pub(crate) mod screen;
mod step_report;
pub(crate) mod terminal;

pub(crate) use file::write_atomic;
pub(crate) use metrics_file::keep_samples;
pub use metrics_file::{History, MetricsFile};
pub use result::{Place, RunResult};
pub use step_report::{Split, StepReport};
