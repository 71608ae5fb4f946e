//! [`StepReport`]: what is measured at a log step or an evaluation.

use super::real;
use serde::{Deserialize, Serialize};

/// The text that a report is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// The training text.
    Train,
    /// The validation text.
    Valid,
}

/// The state of a run at one step, in plain numbers. A number that may be missing is an `Option`; one that is not
/// finite stays so, in memory and in JSON (as the string `NaN`, `inf` or `-inf`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Optimizer steps done.
    pub step: usize,
    /// Passes over the training text.
    #[serde(with = "real")]
    pub epoch: f64,
    /// Learned tokens that `loss` and `accuracy` are means over: the weight of this report in an average. Where there
    /// is none, both are NaN.
    pub tokens: usize,
    /// Cross entropy in nats per token, without regularizers.
    #[serde(with = "real")]
    pub loss: f64,
    /// Mean squared log partition function.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub z_loss: Option<f64>,
    /// Divergence from the teacher, in nats per token.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub divergence: Option<f64>,
    /// Mean squared distance of normalized hidden states from the teacher's.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub hidden: Option<f64>,
    /// Divergence of the relations between positions from the teacher's, in nats per position.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub relation: Option<f64>,
    /// Cross entropy in bits per byte of text, which does not depend on the tokenizer.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
    /// Share of target tokens whose logit is the largest, in [0, 1].
    #[serde(with = "real")]
    pub accuracy: f64,
    /// Learned tokens per second.
    #[serde(with = "real")]
    pub tokens_per_s: f64,
    /// Learning rate.
    #[serde(with = "real")]
    pub lr: f64,
    /// Global gradient norm before clipping.
    #[serde(with = "real")]
    pub grad_norm: f64,
    /// Share of ternary codes that are 0.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub zero_fraction: Option<f64>,
    /// Bits per weight of the quantized layers, scales included.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub bits_per_weight: Option<f64>,
    /// FP32 bytes over packed bytes of the whole model.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<f64>,
    /// Share of the ternary weight in the forward pass: 0 is float, 1 is ternary; `None` for a model without a quantizer.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub lambda: Option<f64>,
    /// Share of codes that changed since the last evaluation.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub flipped: Option<f64>,
    /// `mean |ln(scale now / scale at start)|`.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub scale_drift: Option<f64>,
    /// Processes that share the run, if several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processes: Option<usize>,
    /// How long the first process to finish its share of the step waited for the last one, in seconds.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub wait_s: Option<f64>,
    /// Largest resident set of the process so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_rss_bytes: Option<u64>,
    /// Steps that the spike guard has skipped so far.
    pub skipped_steps: usize,
    /// Seconds since the run began, those before a resume included.
    #[serde(with = "real")]
    pub elapsed_s: f64,
}

impl StepReport {
    /// `exp(loss)`.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}
