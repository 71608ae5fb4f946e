//! Values that change from step to step: the factors of weight decay and of the gradients.

use crate::quant::ScheduledValue;
use burn::optim::LearningRate;

/// Values that the training loop sets in an optimizer before each step; clones share them.
#[derive(Clone, Debug, Default)]
pub struct OptimScheduleHandle {
    /// Factor of the experiment's weight decay.
    pub decay: ScheduledValue,
    /// Factor of the gradients, which clips them without another pass over memory.
    pub clip: ScheduledValue,
}

/// Decoupled weight decay, times the factor of the schedule.
#[derive(Clone)]
pub(super) struct Decay {
    /// `weight_decay` of the experiment.
    pub strength: f64,
    /// [`OptimScheduleHandle::decay`].
    pub factor: ScheduledValue,
}

impl Decay {
    /// Factor of a weight in a step: `1 - lr * weight_decay`.
    pub fn keep(&self, lr: LearningRate) -> f64 {
        1.0 - lr * self.strength * f64::from(self.factor.get())
    }
}
