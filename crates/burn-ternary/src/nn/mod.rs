//! Layers and models; one description makes the ternary model and its float twin.

mod attention;
mod config;
mod duck;
mod factory;
mod feed_forward;
mod init;
mod linear;
mod lora;
mod norm;
mod position;
mod sample;
mod transformer;

pub use crate::invalid_value::InvalidValue;
pub use attention::{CausalAttention, Projections};
pub use config::*;
pub use duck::{DuckQuantized, ModelSize};
pub use feed_forward::FeedForward;
pub use linear::{QuantizedLinear, QuantizedLinearConfig};
pub use lora::{LoraConfig, LowRank};
pub use norm::{MixedLayerNorm, Norm, RmsNorm, rms_normalize};
pub use position::Rotary;
pub use transformer::{BlockStates, QuantizedTransformer, TransformerBlock};
