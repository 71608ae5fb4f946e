//! Ternary quantizers: scale rules, granularity, and one rounding rule.

mod config;
pub use config::*;
