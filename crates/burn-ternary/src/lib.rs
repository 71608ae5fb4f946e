//! Train language models whose weights are -1, 0 or +1, on any Burn backend.
//!
//! Two dependencies are enough, Burn of the same version and this crate. It is not on crates.io yet: name the folder of a
//! clone, or its `git` address.
//!
//! ```toml
//! [dependencies]
//! burn = { version = "=0.22.1", default-features = false }
//! burn-ternary = { path = "../burn-ternary", default-features = false, features = ["flex", "infer"] }
//! ```
//!
//! # Train, export, generate
//! ```no_run
#![doc = include_str!("../../../examples/library.rs")]
//! ```
//!
//! # Your own model
//! [`quant::prepare`] makes the matrices of any Burn module ternary; [`prepared`] saves, loads and exports it.
//!
//! ```
//! use burn::{nn::LinearConfig, tensor::Device};
//! use burn_ternary::quant::{QuantConfig, prepare};
//!
//! let layer = LinearConfig::new(64, 32).init(&Device::default());
//! let (layer, report) = prepare(layer, &QuantConfig::default(), |path| path == "weight")?;
//! assert_eq!(report.weights(), 64 * 32);
//! # Ok::<(), burn_ternary::quant::PrepareError>(())
//! ```
//!
//! # Modules
//! Data flows one way: text becomes token windows and batches in [`data`], a model of [`nn`] turns ids into logits through
//! the quantizers of [`quant`] and the backend ops of [`ops`], [`train`] turns logits into a loss, gradients and an update,
//! [`run`](mod@run) repeats that for a whole experiment, and [`report`] shows what happened.
//!
//! | module | for | begin with |
//! |---|---|---|
//! | [`data`] | text to batches | [`Dataset::prepare`](data::Dataset::prepare), [`LmLoader`](data::LmLoader) |
//! | [`nn`] | layers and models | [`DuckConfig`](nn::DuckConfig), [`DuckQuantized`](nn::DuckQuantized), [`QuantizedLinear`](nn::QuantizedLinear) |
//! | [`quant`] | ternary quantizers, and any Burn module | [`QuantConfig`](quant::QuantConfig), [`TernaryQuantizer`](quant::TernaryQuantizer), [`prepare`](quant::prepare) |
//! | [`train`] | an optimizer step | [`QuantizationTrainer`](train::QuantizationTrainer) |
//! | [`run`](mod@run) | a whole run from an experiment file | [`Experiment`](run::Experiment), [`run::run()`], [`SavedRun`](run::SavedRun) |
//! | [`report`] | metrics, results and plots of a run | [`RunResult`](report::RunResult), [`History`](report::History) |
//! | [`prepared`] | files of your own models | [`save`](prepared::save), [`load`](prepared::load), [`export`](prepared::export) |
//! | [`export_for_inference`] | a trained Duck to a model file; back by [`DuckQuantized::load`](nn::DuckQuantized::load) | [`format::write_model`] |
//! | [`format`](mod@format) | the crate `ternary-format`: GGUF, ONNX, Hugging Face folders, tokenizers | [`PackedModel`](format::PackedModel) |
//! | `infer` | the crate `ternary-infer`: an engine for these files on CPUs | `Engine`, `GenerateOptions` |
//! | [`device`](mod@device) | devices by name | [`device::device`] |
//! | [`ops`] | the ops themselves, for layers of your own | [`ops::ternary_codes`] |
//!
//! # Features
//! | feature | default | adds |
//! |---|---|---|
//! | `flex` | yes | the CPU backend, with fused passes |
//! | `infer` | yes | the engine as `burn_ternary::infer`; one small crate |
//! | `cli` | yes | the command line of training, `run::TrainCommand` |
//! | `plot` | yes | plots of a run, `report::plot` |
//! | `tui` | yes | the full-screen display of a run |
//! | `wgpu`, `cuda`, `tch`, `ndarray` | | a further backend; enable them here, never in Burn itself |
//!
//! Programs that only run models need neither Burn nor this crate: `ternary-infer` builds in a minute.

#![warn(missing_docs)]

pub mod data;
pub mod device;
mod export;
mod import;
mod invalid_value;
pub mod nn;
pub mod ops;
pub mod prepared;
pub mod quant;
pub mod report;
pub mod run;
mod seed;
mod tensor_name;
pub mod train;

pub use export::{ExportError, export_for_inference};
pub use import::ImportError;
pub use ternary_format as format;
#[cfg(feature = "infer")]
pub use ternary_infer as infer;
