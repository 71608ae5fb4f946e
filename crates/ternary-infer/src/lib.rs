//! Generates text from model files with ternary weights, on CPUs.

mod cache;
mod engine;
mod error;
mod forward;
mod model;
pub mod random;
pub mod reference;
mod sampler;
mod spec;

pub use engine::{ActivationMode, Engine, EngineOptions, Finish, GenerateOptions, Generation, Sequence};
pub use error::EngineError;
pub use sampler::{Sampler, Sampling};
