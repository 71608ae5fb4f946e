//! Optimizer steps in one pass over memory: AdamW, AdamW with moments at 8 bits, and Muon.

mod adamw;
mod adamw_8bit;
#[cfg(feature = "rayon")]
mod muon;

pub use adamw::{AdamWStep, adamw, square_sum};
pub use adamw_8bit::{MOMENT_BLOCK, MomentBlock, adamw_8bit};
#[cfg(feature = "rayon")]
pub use muon::{MuonStep, NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, muon};
