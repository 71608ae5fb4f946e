use serde::{Deserialize, Serialize};

/// How the learning rate goes from its peak to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    Constant,
    Cosine,
    Linear,
    /// Constant, then linear over the last `decay_fraction` of the steps.
    WarmupStableDecay,
}

/// The `[schedule]` section of an experiment. Fractions are of the run's steps, in [0, 1].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScheduleConfig {
    pub shape: Shape,
    /// Steps over which the rate rises linearly from 0.
    pub warmup_steps: usize,
    /// Share of the steps that decays, for `warmup_stable_decay`.
    pub decay_fraction: f64,
    /// The last rate over the peak rate.
    pub min_lr_ratio: f64,
    /// Weight decay acts until here; 1: to the end.
    pub weight_decay_until: f64,
    /// Weights are float until here; 0: ternary from the start.
    pub float_until: f64,
    /// The share of the ternary weight (lambda) rises linearly from `float_until` to here; at most
    /// `float_until` means a switch.
    pub ramp_until: f64,
}
