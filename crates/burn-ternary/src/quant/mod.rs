//! Ternary quantizers: scale rules, granularity, and one rounding rule.

mod config;
mod dial;
mod granularity;
mod prepare;
mod quantizer;
mod rule;
mod scale_rule;
mod sparsity;
mod table;

pub use config::*;
pub use dial::{Dial, Dials};
pub(crate) use prepare::REPARAMETERIZATION;
pub use prepare::{PrepareError, PrepareReport, PreparedMatrix, TernaryReparameterization, prepare};
pub use quantizer::{TernaryQuantizer, TernaryQuantizerConfig, compute_optimal_scale};
pub use scale_rule::GAUSSIAN_SCALE;
