//! [`QuantizationTrainer`]: one optimizer step, from batches to updated weights.

use super::TrainState;
use super::distill::Teacher;
use super::gradients::{accumulate, clip_factor, global_norm, sum_over_processes};
use super::language_model::LanguageModel;
use super::micro_batch::MicroBatchReport;
use super::optim::{OptimConfig, OptimScheduleHandle};
use super::schedule::{Schedule, ScheduleConfig};
use super::spike_guard::SpikeGuard;
use crate::data::LmBatch;
use crate::nn::DuckQuantized;
use crate::report::{StepReport, burn_metrics::LmItem};
use burn::lr_scheduler::module_lr_scheduler::{ModuleLearningRate, ModuleLrScheduler};
use burn::module::{Module, ParamGroup};
use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord};
use burn::store::{ModuleRecord, RecordError};
use burn::train::{Learner, TrainStep};
use std::sync::Arc;
use std::time::{Duration, Instant};
use ternary_parallel::{Alone, Group, TreeSum};

/// Message of a panic that cannot occur: only an update takes the model out, and puts it back.
const BETWEEN_STEPS: &str = "a trainer has a model between steps";

/// Trains a [`DuckQuantized`], one optimizer step per call, for training loops of your own.
///
/// # Example
/// ```
/// # use burn_ternary::{data::LmBatch, nn::DuckConfig, quant::QuantConfig, train::*};
/// # use burn_ternary::train::{optim::OptimConfig, schedule::ScheduleConfig};
/// # fn run(config: DuckConfig, optim: OptimConfig, schedule: ScheduleConfig, batches: Vec<LmBatch>) {
/// let device = burn::tensor::Device::default().autodiff();
/// let model = config.init(&QuantConfig::default(), 1, &device);
/// let mut trainer = QuantizationTrainer::new(model, &optim, &schedule, 1000, 1);
/// for batch in batches {
///     let report = trainer.train_step(vec![batch]);
///     println!("{}: {} nats per token", report.step, report.loss);
/// }
/// # }
/// ```
pub struct QuantizationTrainer {
    /// `None` while a step updates it: shared weights would be copied.
    model: Option<LanguageModel>,
    optimizer: ModuleOptimizer,
    lr_scheduler: ModuleLrScheduler,
    schedule: Schedule,
    handle: OptimScheduleHandle,
    clip_norm: f64,
    guard: SpikeGuard,
    state: TrainState,
    group: Arc<dyn Group>,
    /// What the last step waited for the slowest process.
    waited: Duration,
}

impl QuantizationTrainer {
    /// A trainer at step 0 of `steps`, without a spike guard; only losses and gradients that are not finite are
    /// skipped.
    pub fn new(
        model: DuckQuantized,
        optim: &OptimConfig,
        schedule: &ScheduleConfig,
        steps: usize,
        seed: u64,
    ) -> Self {
        let plan = TrainPlan {
            optim: optim.clone(),
            schedule: Schedule::new(schedule, steps),
            teacher: None,
            group: Arc::new(Alone),
        };
        plan.trainer(model, TrainState { seed, ..TrainState::default() }, SpikeGuard { factor: 0.0 })
    }

    /// Shares each step among the processes of `group`; see [`train_step`](Self::train_step).
    pub fn with_group(self, group: Arc<dyn Group>) -> Self {
        Self { group, ..self }
    }

    /// One optimizer step on micro-batches whose weights sum to 1 (or a single batch).
    ///
    /// In a group of processes every process makes the step, with its own share of the micro-batches, in order: process 0
    /// has the first ones. All get the same report, and the same weights, which are those of a single process bit for bit.
    ///
    /// The step is skipped, and counted, when the loss or the gradient norm is not finite or the guard sees a spike;
    /// schedule and data order go on all the same. So they do in a step without a learned token, which changes neither weights nor
    /// moments nor the mean of the guard; its loss is NaN. A pure function of the trainer's state and the batches: dropout
    /// draws from a generator that is seeded with (seed, step, micro-batch).
    ///
    /// # Panics
    /// Without a batch.
    pub fn train_step(&mut self, batches: Vec<LmBatch>) -> StepReport {
        assert!(!batches.is_empty(), "a step has at least one batch");
        let step = self.state.step;
        self.schedule.apply(step, self.model().schedule_handle());
        self.handle.decay.set(self.schedule.weight_decay_factor(step) as f32);

        let (mut report, grads) = self.forward_backward(batches);
        let rate = self.lr_scheduler.step();
        let lr = rate.base();
        match grads {
            Some(grads) => report.grad_norm = self.update(rate, grads, &report),
            None => {
                (report.loss, report.accuracy) = (f64::NAN, f64::NAN);
                self.state.empty_steps += 1;
            }
        }
        self.state.step += 1;
        self.state.tokens += report.tokens as u64;
        StepReport {
            step: self.state.step,
            lr,
            lambda: self.model().quant().enabled.then(|| self.schedule.lambda(step)),
            skipped_steps: self.state.skipped_steps,
            ..report
        }
    }

    /// Losses and gradients of the step's micro-batches, each times the weight of its batch; no gradients without a learned token.
    fn forward_backward(&mut self, batches: Vec<LmBatch>) -> (StepReport, Option<GradientsParams>) {
        let seed = crate::seed::mix(self.state.seed, self.state.step as u64);
        let first = self.group.rank() * batches.len();
        let mut reports = Vec::new();
        let mut sums = TreeSum::default();
        for (index, batch) in (first..).zip(batches) {
            // Also where this micro-batch has no gradient: it may complete a subtree of others that have one.
            let add = &mut |left, right| accumulate(left, right, self.model());
            let (weight, windows) = (f64::from(batch.weight), batch.inputs.dims()[0]);
            // A mean over no tokens has no gradient.
            if batch.tokens == 0 {
                reports.extend(MicroBatchReport::empty(windows).to_numbers());
                sums.push(index, None, add);
                continue;
            }
            // A device has one generator per process: a run without dropout leaves it to those with dropout.
            if self.model().config().dropout > 0.0 {
                batch.inputs.device().seed(crate::seed::mix(seed, index as u64));
            }
            let output = TrainStep::step(self.language_model(), batch);
            let LmItem(report) = output.item;
            reports.extend(MicroBatchReport::new(windows, weight, &report).to_numbers());
            sums.push(index, Some(output.grads), add);
        }
        let began = Instant::now();
        let numbers = self.group.gather_numbers(&reports);
        self.waited = began.elapsed();
        let reports: Vec<_> =
            numbers.chunks_exact(MicroBatchReport::NUMBERS).map(MicroBatchReport::from_numbers).collect();
        self.state.windows_seen += reports.iter().map(|report| report.windows as u64).sum::<u64>();
        let present: Vec<bool> = reports.iter().map(|report| report.tokens > 0).collect();
        let grads = sum_over_processes(&*self.group, &present, sums, self.model());
        (MicroBatchReport::sum(&reports), grads)
    }

    /// What the last step waited for the slowest process of the group.
    pub(crate) fn waited(&self) -> Duration {
        self.waited
    }

    /// Takes the step, or skips it; returns the norm of the gradient.
    fn update(&mut self, rate: ModuleLearningRate, grads: GradientsParams, report: &StepReport) -> f64 {
        let (grads, norm) = global_norm(grads, self.model());
        let learned_steps = self.state.step - self.state.empty_steps;
        if !self.guard.admits(&mut self.state, report.loss, norm, report.tokens, learned_steps) {
            self.state.skipped_steps += 1;
            return norm;
        }
        self.handle.clip.set(clip_factor(norm, self.clip_norm));
        let model = self.model.take().expect(BETWEEN_STEPS);
        self.model = Some(self.optimizer.step(rate, model, grads));
        SpikeGuard::record(&mut self.state, report.loss, learned_steps);
        norm
    }

    /// The model as it stands, under autodiff.
    pub fn model(&self) -> &DuckQuantized {
        &self.language_model().model
    }

    /// The model with the terms of its loss.
    pub(crate) fn language_model(&self) -> &LanguageModel {
        self.model.as_ref().expect(BETWEEN_STEPS)
    }

    /// Model, optimizer and learning rates, as Burn's `SupervisedTraining` takes them.
    pub(crate) fn learner(&self) -> Learner<LanguageModel> {
        Learner::new(self.language_model().clone(), self.optimizer.clone(), self.lr_scheduler.clone())
    }

    /// Model and optimizer as records, for a checkpoint.
    pub fn records(&self) -> (ModuleRecord, OptimizerRecord) {
        (self.language_model().clone().into_record(), self.optimizer.to_record())
    }

    /// Restores model, optimizer and running means of a checkpoint. Step and data position go on, so that the run does not repeat the
    /// texts at which it diverged.
    pub(crate) fn roll_back(&mut self, model: ModuleRecord, optimizer: OptimizerRecord, state: &TrainState) {
        let diverged = self.model.take().expect(BETWEEN_STEPS);
        self.model = Some(diverged.load_record(model));
        self.optimizer = self.optimizer.clone().load_record(optimizer);
        self.state.loss_average = state.loss_average;
        self.state.lowest_average = state.lowest_average;
        self.state.spike_share = state.spike_share;
        self.state.bad_steps = 0;
        self.state.rollbacks += 1;
    }

    /// Steps, tokens and running means so far.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    pub(crate) fn state_mut(&mut self) -> &mut TrainState {
        &mut self.state
    }

    pub(crate) fn validation_model(&self) -> LanguageModel {
        self.language_model().valid()
    }
}

/// `model` with the weights of a record, and their ids.
///
/// # Errors
/// The record is of another model.
pub(crate) fn restore(
    model: DuckQuantized,
    optim: &OptimConfig,
    record: ModuleRecord,
) -> Result<DuckQuantized, RecordError> {
    // Records are of a `LanguageModel`; see `QuantizationTrainer::records`.
    let language_model = LanguageModel::new(model, optim, None);
    Ok(language_model.try_load_record(record)?.model)
}

/// Settings of a trainer, and its teacher.
pub(crate) struct TrainPlan {
    pub optim: OptimConfig,
    pub schedule: Schedule,
    pub teacher: Option<Teacher>,
    /// The processes that share each step.
    pub group: Arc<dyn Group>,
}

impl TrainPlan {
    /// A trainer that continues from `state`. Parameter groups match by id, which a record brings: load the record of the model first.
    pub fn trainer(self, model: DuckQuantized, state: TrainState, guard: SpikeGuard) -> QuantizationTrainer {
        let weights = model.linears().iter().map(|(_, linear)| linear.weight.id).collect::<Vec<_>>();
        let mut decayed = weights.clone();
        for pair in model.linears().iter().filter_map(|(_, linear)| linear.adapter.as_ref()) {
            decayed.extend([pair.a.id, pair.b.id]);
        }
        decayed.push(model.embedding.id);
        decayed.extend(model.head.as_ref().map(|head| head.id));
        let matrices = ParamGroup::from_ids(weights);
        let Self { optim, schedule, teacher, group } = self;
        let handle = OptimScheduleHandle::default();
        let optimizer = optim.init(matrices.clone(), ParamGroup::from_ids(decayed), &handle);
        let lr_scheduler = optim.lr_scheduler(matrices, &schedule, state.step);
        let model = LanguageModel::new(model, &optim, teacher);
        let clip_norm = optim.clip_norm;
        QuantizationTrainer {
            model: Some(model),
            optimizer,
            lr_scheduler,
            schedule,
            handle,
            clip_norm,
            guard,
            state,
            group,
            waited: Duration::ZERO,
        }
    }

    /// A trainer that continues from the records of a checkpoint.
    ///
    /// # Errors
    /// The record is of another model.
    pub fn resume(
        self,
        model: DuckQuantized,
        (record, optimizer): (ModuleRecord, OptimizerRecord),
        state: TrainState,
        guard: SpikeGuard,
    ) -> Result<QuantizationTrainer, RecordError> {
        // The record's ids must be in place before the optimizer's groups are made.
        let model = restore(model, &self.optim, record)?;
        let mut trainer = self.trainer(model, state, guard);
        trainer.optimizer = trainer.optimizer.load_record(optimizer);
        Ok(trainer)
    }
}
