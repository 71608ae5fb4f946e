//! Generates text from model files with ternary weights, on CPUs.

mod error;
pub mod reference;
mod sampler;
mod spec;

pub use error::EngineError;
pub use sampler::{Sampler, Sampling};
