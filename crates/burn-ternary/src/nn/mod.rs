//! Layers and models: float twins and ternary ones from one description.

mod config;
pub use config::*;
