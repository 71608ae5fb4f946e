//! Values that the schedule of a run sets at each step.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// A scheduled value: set by the training loop, read by modules and optimizers. Clones share it.
///
/// It brings the values of a schedule (the share of the ternary weight, the strength of weight decay) to places that Burn
/// calls without the step number. It is not a parameter and is not saved: the schedule recomputes it from the step.
#[derive(Clone)]
pub struct ScheduledValue(Arc<AtomicU32>);

impl ScheduledValue {
    /// A handle with an initial value.
    pub fn new(value: f32) -> Self {
        Self(Arc::new(AtomicU32::new(value.to_bits())))
    }

    /// The current value.
    pub fn get(&self) -> f32 {
        f32::from_bits(self.0.load(Ordering::Relaxed))
    }

    /// Sets the value of this handle and its clones.
    pub fn set(&self, value: f32) {
        self.0.store(value.to_bits(), Ordering::Relaxed);
    }
}

impl Default for ScheduledValue {
    /// 1.
    fn default() -> Self {
        Self::new(1.0)
    }
}

/// The scheduled values of all quantizers of a model; clones share them.
#[derive(Clone, Debug, Default)]
pub struct ScheduleHandle {
    /// Lambda, the share of the ternary weight in the fake-quantized weight; 1 except in float-first schedules.
    pub lambda: ScheduledValue,
    /// Progress of growing sparsity, from 0 to 1.
    pub sparsity: ScheduledValue,
}

impl std::fmt::Debug for ScheduledValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ScheduledValue({})", self.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_shared_by_its_clones() {
        let value = ScheduledValue::default();
        let clone = value.clone();
        assert_eq!(clone.get(), 1.0);
        value.set(0.3);
        assert_eq!(clone.get().to_bits(), 0.3f32.to_bits());
        assert_eq!(format!("{clone:?}"), "ScheduledValue(0.3)");
    }
}
