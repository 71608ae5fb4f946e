//! Train language models whose weights are -1, 0 or +1, on any Burn backend.
//!
//! The way of a batch, one function an arrow: text becomes token windows and batches in [`data`], the model in
//! [`nn`] turns ids into logits through the quantizers of [`quant`] and the backend ops of [`ops`], and [`train`]
//! turns logits into a loss, gradients, metrics and checkpoints.

pub mod data;
pub mod device;
mod export;
mod import;
pub mod nn;
pub mod ops;
pub mod quant;
mod seed;
pub mod train;

pub use export::{ExportError, export_for_inference};
pub use import::ImportError;

/// The README's program compiles.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
