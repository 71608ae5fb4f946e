//! Schedules: learning rate, weight decay, the share of the ternary weight, and sparsity, as functions of the step.
//!
//! Steps count from 0: step `k` is the `k`-th optimizer update, and the last of `total` is `total - 1`.

use std::f64::consts::PI;

use crate::quant::ScheduleHandle;
use burn::{
    lr_scheduler::{LrScheduler, LrSchedulerRecord},
    optim::LearningRate,
};
use getset::WithSetters;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Learning rate schedule after the warm-up, from the peak learning rate to the final one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// The peak learning rate.
    Constant,
    /// Half a cosine wave.
    Cosine,
    /// A straight line.
    Linear,
    /// Constant, then linear over the last `decay_fraction` of the steps.
    WarmupStableDecay,
}

/// The `[schedule]` section of an experiment: what changes during a run. Fractions are shares of `run.steps`, from 0 to 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema, WithSetters)]
#[serde(default, deny_unknown_fields)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct ScheduleConfig {
    /// Learning rate schedule after the warm-up.
    pub shape: Shape,
    /// Warm-up: number of steps over which the learning rate rises linearly from 0.
    pub warmup_steps: usize,
    /// Fraction of the steps over which `"warmup_stable_decay"` decays; the other shapes ignore it.
    pub decay_fraction: f64,
    /// Final learning rate as a fraction of the peak learning rate.
    pub min_lr_ratio: f64,
    /// Fraction of the steps with weight decay; 1: all.
    pub weight_decay_until: f64,
    /// Fraction of the steps that train in float before weights are quantized; 0: quantized from the start.
    pub float_until: f64,
    /// Quantization ramp: from `float_until` to this fraction of the steps, weights blend linearly from float to ternary. At most
    /// `float_until`: a switch.
    pub ramp_until: f64,
    /// Sparsity ramp: from `float_until` to this fraction of the steps, the share of zeros grows to `quant.sparsity`. At most
    /// `float_until`: at once. Below 1.
    pub sparse_until: f64,
}

impl Default for ScheduleConfig {
    /// Float for the first 60 % of the steps, and a learning rate that falls to zero: the best values of our runs.
    fn default() -> Self {
        Self {
            shape: Shape::Cosine,
            warmup_steps: 50,
            decay_fraction: 0.2,
            min_lr_ratio: 0.0,
            weight_decay_until: 1.0,
            float_until: 0.6,
            ramp_until: 0.0,
            sparse_until: 0.0,
        }
    }
}

/// The scheduled factors of a run. They are pure functions of the step, so a resumed run needs only its step.
///
/// Every ramp is `ramp(k, a, b) = clamp((k - a + 1) / (b - a + 1), 0, 1)`: 0 before step `a`, 1 from step `b` on (from `a` on if
/// `b <= a`). Its first step is above 0, so the warm-up has no step with a learning rate of 0.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    shape: Shape,
    warmup: usize,
    decay_from: usize,
    last: usize,
    min_lr_ratio: f64,
    weight_decay_until: usize,
    float_until: usize,
    ramp_until: usize,
    sparse_until: usize,
}

impl Schedule {
    /// The schedule of a run of `total_steps`; fractions of it are rounded to the nearest step.
    pub fn new(config: &ScheduleConfig, total_steps: usize) -> Self {
        let at = |fraction: f64| (fraction * total_steps as f64).round() as usize;
        // In every shape, the first step after the warm-up has the peak rate, and the decay starts after that step.
        let peak = config.warmup_steps;
        let decay_from = match config.shape {
            Shape::Constant => usize::MAX,
            Shape::Cosine | Shape::Linear => peak + 1,
            Shape::WarmupStableDecay => total_steps.saturating_sub(at(config.decay_fraction)).max(peak + 1),
        };
        Self {
            shape: config.shape,
            warmup: config.warmup_steps,
            decay_from,
            last: total_steps.saturating_sub(1),
            min_lr_ratio: config.min_lr_ratio,
            weight_decay_until: at(config.weight_decay_until),
            float_until: at(config.float_until),
            ramp_until: at(config.ramp_until),
            sparse_until: at(config.sparse_until),
        }
    }

    /// The learning rate of `step` over its peak, in [0, 1].
    ///
    /// Warm-up of `w` steps: `(k + 1) / (w + 1)`, which is 1 at `k = w`. Afterwards, with `m` the `min_lr_ratio` and
    /// `p = ramp(k, s, total - 1)`; except for `constant`, the last step has exactly `m`:
    ///
    /// - constant: 1
    /// - cosine, `s = w + 1`: `m + (1 - m) (1 + cos(pi p)) / 2`
    /// - linear, `s = w + 1`: `m + (1 - m) (1 - p)`
    /// - warmup-stable-decay, `s = total - decay_fraction * total`: 1 before `s`, then as linear
    ///
    /// A run that ends within its warm-up never reaches the peak. A run of one step without warm-up is at the peak.
    ///
    /// # Source
    /// Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", equation 5, for the cosine.
    pub fn lr_factor(&self, step: usize) -> f64 {
        if step < self.decay_from {
            return ramp(step, 0, self.warmup);
        }
        let progress = ramp(step, self.decay_from, self.last);
        let remaining = match self.shape {
            Shape::Cosine => (1.0 + (PI * progress).cos()) / 2.0,
            _ => 1.0 - progress,
        };
        self.min_lr_ratio + (1.0 - self.min_lr_ratio) * remaining
    }

    /// The factor of weight decay: 1, and 0 from step `weight_decay_until * total` on.
    ///
    /// # Source
    /// Late removal of weight decay: "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (BitNet b1.58, 2024).
    pub fn weight_decay_factor(&self, step: usize) -> f64 {
        if step < self.weight_decay_until { 1.0 } else { 0.0 }
    }

    /// The share of the ternary weight in the forward pass, in [0, 1]: `ramp(k, f, r)` with `f` and `r` the steps
    /// of `float_until` and `ramp_until`; 0 is the float model, 1 the ternary one.
    pub fn lambda(&self, step: usize) -> f64 {
        ramp(step, self.float_until, self.ramp_until)
    }

    /// The progress of growing sparsity, in [0, 1]: `1 - (1 - ramp(k, f, s))^3` with `f` and `s` the steps of `float_until` and
    /// `sparse_until`. It prunes fast at first, while many weights are redundant.
    ///
    /// # Source
    /// Zhu and Gupta, To prune, or not to prune, 2017, equation 1.
    pub fn sparsity(&self, step: usize) -> f64 {
        1.0 - (1.0 - ramp(step, self.float_until, self.sparse_until)).powi(3)
    }

    /// The first step below `steps` at which two schedules of one shape differ, with the key whose factor differs there.
    pub fn first_difference(&self, other: &Self, steps: usize) -> Option<(&'static str, usize)> {
        type Factor = fn(&Schedule, usize) -> f64;
        let rate = match self.shape {
            Shape::WarmupStableDecay => "schedule.decay_fraction",
            _ => "the decay of schedule.shape",
        };
        let factors: [(&str, Factor); 4] = [
            (rate, Self::lr_factor),
            ("schedule.weight_decay_until", Self::weight_decay_factor),
            ("schedule.float_until or ramp_until", Self::lambda),
            ("schedule.sparse_until", Self::sparsity),
        ];
        let first = |(key, factor): (&'static str, Factor)| {
            let step = (0..steps).find(|&step| factor(self, step) != factor(other, step))?;
            Some((key, step))
        };
        factors.into_iter().filter_map(first).min_by_key(|&(_, step)| step)
    }

    /// Sets the scheduled values of a model for a step.
    pub fn apply(&self, step: usize, handle: &ScheduleHandle) {
        handle.lambda.set(self.lambda(step) as f32);
        handle.sparsity.set(self.sparsity(step) as f32);
    }
}

/// `clamp((step - from + 1) / (to - from + 1), 0, 1)`.
fn ramp(step: usize, from: usize, to: usize) -> f64 {
    let done = (step + 1).saturating_sub(from) as f64;
    (done / (to.saturating_sub(from) + 1) as f64).min(1.0)
}

/// A [`Schedule`] as a learning rate scheduler of Burn: the `k`-th call of `step` returns `peak * lr_factor(k)`.
///
/// Its record has the next step only, which is the number of steps that a resumed run has already taken.
#[derive(Clone, Debug)]
pub struct PeakSchedule {
    /// Peak learning rate.
    pub peak: LearningRate,
    /// The factor of each step.
    pub schedule: Schedule,
    /// The next step, from 0.
    pub step: usize,
}

impl LrScheduler for PeakSchedule {
    fn step(&mut self) -> LearningRate {
        let lr = self.peak * self.schedule.lr_factor(self.step);
        self.step += 1;
        lr
    }

    fn to_record(&self) -> LrSchedulerRecord {
        LrSchedulerRecord::new().with_scalar("step", self.step)
    }

    /// A record without a step leaves the schedule where it is, as Burn's own schedulers do.
    fn load_record(&mut self, record: LrSchedulerRecord) {
        self.step = record.scalar("step").unwrap_or(self.step);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config(shape: Shape, warmup_steps: usize, min_lr_ratio: f64) -> ScheduleConfig {
        ScheduleConfig {
            shape,
            warmup_steps,
            decay_fraction: 0.2,
            min_lr_ratio,
            weight_decay_until: 1.0,
            float_until: 0.0,
            ramp_until: 0.0,
            sparse_until: 0.0,
        }
    }

    fn factors(config: &ScheduleConfig, total: usize) -> Vec<f64> {
        let schedule = Schedule::new(config, total);
        (0..total).map(|step| schedule.lr_factor(step)).collect()
    }

    fn assert_close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (step, (a, b)) in found.iter().zip(expected).enumerate() {
            assert!((a - b).abs() < 1e-12, "step {step}: {a} instead of {b}");
        }
    }

    #[test]
    fn warmup_rises_from_above_zero_to_the_peak() {
        let found = factors(&config(Shape::Constant, 3, 0.1), 6);
        assert_close(&found, &[0.25, 0.5, 0.75, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn linear_ends_at_the_minimum() {
        let found = factors(&config(Shape::Linear, 1, 0.2), 6);
        assert_close(&found, &[0.5, 1.0, 0.8, 0.6, 0.4, 0.2]);
    }

    #[test]
    fn cosine_is_halfway_in_the_middle_and_ends_at_the_minimum() {
        let found = factors(&config(Shape::Cosine, 0, 0.1), 5);
        let quarter = |cos: f64| 0.1 + 0.9 * (1.0 + cos) / 2.0;
        let root = 0.5f64.sqrt();
        assert_close(&found, &[1.0, quarter(root), 0.55, quarter(-root), 0.1]);
    }

    #[test]
    fn stable_rate_decays_over_the_last_steps() {
        let found = factors(&config(Shape::WarmupStableDecay, 2, 0.0), 10);
        let third = 1.0 / 3.0;
        assert_close(&found, &[third, 2.0 * third, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0]);
        // A decay that would begin within the warm-up begins at the peak instead.
        let all = ScheduleConfig { decay_fraction: 1.0, ..config(Shape::WarmupStableDecay, 1, 0.0) };
        assert_close(&factors(&all, 4), &[0.5, 1.0, 0.5, 0.0]);
    }

    #[test]
    fn one_step_has_the_peak_rate_and_a_long_warmup_never_does() {
        let shapes = [Shape::Constant, Shape::Cosine, Shape::Linear, Shape::WarmupStableDecay];
        for shape in shapes {
            assert_close(&factors(&config(shape, 0, 0.1), 1), &[1.0]);
            assert_close(&factors(&config(shape, 3, 0.1), 2), &[0.25, 0.5]);
        }
    }

    #[test]
    fn weight_decay_ends_at_its_share() {
        let late = ScheduleConfig { weight_decay_until: 0.5, ..config(Shape::Cosine, 0, 0.0) };
        let schedule = Schedule::new(&late, 4);
        assert_eq!([0, 1, 2, 3].map(|k| schedule.weight_decay_factor(k)), [1.0, 1.0, 0.0, 0.0]);
        let always = Schedule::new(&config(Shape::Cosine, 0, 0.0), 4);
        assert_eq!(always.weight_decay_factor(3), 1.0);
        let never = ScheduleConfig { weight_decay_until: 0.0, ..late };
        assert_eq!(Schedule::new(&never, 4).weight_decay_factor(0), 0.0);
    }

    #[test]
    fn lambda_switches_ramps_or_is_one_from_the_start() {
        let lambda = |float_until, ramp_until| {
            let config = ScheduleConfig { float_until, ramp_until, ..config(Shape::Constant, 0, 0.0) };
            let schedule = Schedule::new(&config, 8);
            (0..8).map(|k| schedule.lambda(k)).collect::<Vec<_>>()
        };
        assert_close(&lambda(0.0, 0.0), &[1.0; 8]);
        assert_close(&lambda(0.5, 0.0), &[0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]);
        assert_close(&lambda(0.25, 0.625), &[0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]);
        assert_close(&lambda(1.0, 1.0), &[0.0; 8]);
    }

    #[test]
    fn sparsity_grows_as_a_cubic_or_is_there_at_once() {
        let sparsity = |float_until, sparse_until| {
            let config = ScheduleConfig { float_until, sparse_until, ..config(Shape::Constant, 0, 0.0) };
            let schedule = Schedule::new(&config, 8);
            (0..8).map(|k| schedule.sparsity(k)).collect::<Vec<_>>()
        };
        assert_close(&sparsity(0.0, 0.0), &[1.0; 8]);
        assert_close(&sparsity(0.25, 0.625), &[0.0, 0.0, 0.578125, 0.875, 0.984375, 1.0, 1.0, 1.0]);
        let handle = ScheduleHandle::default();
        let ramp = ScheduleConfig { ramp_until: 0.25, sparse_until: 0.25, ..config(Shape::Constant, 0, 0.0) };
        Schedule::new(&ramp, 12).apply(1, &handle);
        assert_eq!((handle.lambda.get(), handle.sparsity.get()), (0.5, 0.875));
    }

    #[test]
    fn a_resumed_peak_schedule_goes_on_where_it_was() {
        let schedule = Schedule::new(&config(Shape::Cosine, 2, 0.1), 9);
        let at = |step| PeakSchedule { peak: 3e-3, schedule: schedule.clone(), step };
        let mut whole = at(0);
        let rates: Vec<_> = (0..9).map(|_| whole.step()).collect();
        let expected: Vec<_> = (0..9).map(|k| 3e-3 * schedule.lr_factor(k)).collect();
        assert_eq!(rates, expected);

        let mut first = at(0);
        for _ in 0..4 {
            first.step();
        }
        let bytes = first.to_record().into_bytes().unwrap();
        let mut loaded = at(0);
        loaded.load_record(LrSchedulerRecord::from_bytes(bytes).unwrap());
        let mut placed = at(4);
        for &rate in &rates[4..] {
            assert_eq!((loaded.step(), placed.step()), (rate, rate));
        }
    }

    fn any_config() -> impl Strategy<Value = ScheduleConfig> {
        let shape = prop_oneof![
            Just(Shape::Constant),
            Just(Shape::Cosine),
            Just(Shape::Linear),
            Just(Shape::WarmupStableDecay)
        ];
        let share = || 0.0..=1.0;
        (shape, 0usize..60, share(), share(), share(), share(), share(), share()).prop_map(|c| {
            ScheduleConfig {
                shape: c.0,
                warmup_steps: c.1,
                decay_fraction: c.2,
                min_lr_ratio: c.3,
                weight_decay_until: c.4,
                float_until: c.5,
                ramp_until: c.6,
                sparse_until: c.7,
            }
        })
    }

    proptest! {
        #[test]
        fn factors_stay_in_range_and_turn_once(config in any_config(), total in 1usize..200) {
            let schedule = Schedule::new(&config, total);
            let mut before = (0.0, 1.0, 0.0, 0.0);
            for step in 0..total {
                let lr = schedule.lr_factor(step);
                let decay = schedule.weight_decay_factor(step);
                let now = (lr, decay, schedule.lambda(step), schedule.sparsity(step));
                for factor in [now.0, now.1, now.2, now.3] {
                    prop_assert!((0.0..=1.0).contains(&factor));
                }
                if step <= config.warmup_steps {
                    prop_assert!(lr > before.0);
                } else {
                    prop_assert!(lr <= before.0 && lr >= config.min_lr_ratio - 1e-12);
                }
                if step == config.warmup_steps {
                    prop_assert_eq!(lr, 1.0);
                }
                prop_assert!(now.1 <= before.1 && now.2 >= before.2 && now.3 >= before.3);
                before = now;
            }
            let decays = matches!(config.shape, Shape::Cosine | Shape::Linear);
            if decays && total > config.warmup_steps + 1 {
                prop_assert!((before.0 - config.min_lr_ratio).abs() < 1e-12);
            }
        }
    }
}
