//! Ternary quantizers: scale rules, granularity, sparsity, and [`prepare`] for any Burn module.

mod config;
mod granularity;
mod prepare;
mod quantizer;
mod rule;
mod scale_rule;
mod schedule_handle;
mod sparsity;
mod table;

pub use config::*;
pub(crate) use prepare::REPARAMETERIZATION;
pub use prepare::{PrepareError, PrepareReport, PreparedMatrix, TernaryReparameterization, prepare};
pub use quantizer::{TernaryQuantizer, TernaryQuantizerConfig, compute_optimal_scale};
pub use scale_rule::GAUSSIAN_SCALE;
pub use schedule_handle::{ScheduleHandle, ScheduledValue};
