//! An experiment: everything that a run depends on, as strict TOML.

use crate::{data::DataConfig, nn::DuckConfig, quant::QuantConfig, train::{optim::OptimConfig, schedule::ScheduleConfig}};
use serde::{Deserialize, Serialize};

/// One run, complete and explicit: every key is written, an unknown one is an error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experiment {
    pub data: DataConfig,
    pub model: DuckConfig,
    pub quant: QuantConfig,
    pub optim: OptimConfig,
    pub schedule: ScheduleConfig,
    pub run: RunConfig,
}

/// The `[run]` section: how long, where, how often.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// The run folder is `<out_dir>/<name>-<seed>`.
    pub name: String,
    pub out_dir: String,
    pub seed: u64,
    /// `auto`, `flex`, `ndarray`, `wgpu`, `tch` or `cuda`; `auto` takes the fastest that was compiled in.
    pub device: String,
    /// Optimizer steps.
    pub steps: usize,
    /// Windows a forward pass.
    pub batch_size: usize,
    /// Forward passes an optimizer step; the gradient is their mean over tokens.
    pub accumulation: usize,
    /// Steps between two metric lines.
    pub log_every: usize,
    /// Steps between two evaluations (validation loss and a text sample); the last step is always evaluated.
    pub eval_every: usize,
    /// Windows of the validation text an evaluation looks at; 0: all.
    pub eval_windows: usize,
    /// Steps between two checkpoints; the last step is always saved.
    pub checkpoint_every: usize,
    /// How many checkpoints are kept.
    pub keep_checkpoints: usize,
    /// What the text samples start with; `` for none.
    pub sample_prompt: String,
    /// Tokens of a text sample; 0: no samples.
    pub sample_tokens: usize,
    /// A step whose loss exceeds this multiple of its running mean is skipped; 0: never.
    pub spike_factor: f64,
    /// After so many skipped steps in a row the run goes back to its last checkpoint.
    pub max_bad_steps: usize,
    /// After so many returns the run stops with an error, the last good checkpoint kept.
    pub max_rollbacks: usize,
}
