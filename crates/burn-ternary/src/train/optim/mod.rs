//! The optimizers of a run, by parameter group: AdamW and Muon as Burn optimizers whose step is one op.

mod adamw;
mod config;
mod moment;
mod muon;
mod schedule_handle;
#[cfg(test)]
pub(super) mod tests;

pub use adamw::Moments;
pub use config::{MatrixOptimizer, OptimConfig};
pub use schedule_handle::OptimScheduleHandle;
