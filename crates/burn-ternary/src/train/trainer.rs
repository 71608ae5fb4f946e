//! One optimizer step: forward, backward, spike guard, clipping, update.

use super::TrainState;
use super::distill::Teacher;
use super::gradients::{accumulate, clip_factor, global_norm};
use super::loss::language_model_loss;
use super::optim::{OptimConfig, OptimScheduleHandle};
use super::schedule::{Schedule, ScheduleConfig};
use crate::data::LmBatch;
use crate::nn::DuckQuantized;
use crate::report::{StepReport, burn_metrics::LmItem};
use burn::lr_scheduler::module_lr_scheduler::{ModuleLearningRate, ModuleLrScheduler};
use burn::module::{Module, ParamGroup};
use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord};
use burn::store::{ModuleRecord, RecordError};
use burn::tensor::Tensor;
use burn::train::{InferenceStep, Learner, TrainOutput, TrainStep};
use std::sync::Arc;

/// Share of a new loss in the running mean that the spike guard compares with.
const AVERAGE_RATE: f64 = 0.02;
/// Steps before which the running mean is too young to call anything a spike.
const GUARD_AFTER: usize = 20;
/// Nats per token by which a spike exceeds the running mean at least: a perplexity `e` times as high.
const SPIKE_FLOOR: f64 = 1.0;
/// The same for a step of one token, by which its loss may exceed the mean by chance: four standard deviations, where one is
/// taken to be 2.5 nats (an assumption, not a measurement).
const TOKEN_NOISE: f64 = 10.0;
/// Share of spikes above which they are what the text is like, and learned: the fourth of some fifty steps. A run that breaks
/// has them in a row, and goes back to its last checkpoint.
const SPIKE_SHARE: f64 = 0.05;

/// A model with the terms of its training loss.
#[derive(Module, Debug)]
pub struct LanguageModel {
    /// The model.
    pub model: DuckQuantized,
    #[module(skip)]
    objective: Objective,
    #[module(skip)]
    teacher: Option<Arc<Teacher>>,
}

/// Weights of the terms of the loss besides cross entropy.
#[derive(Clone, Copy, Debug)]
struct Objective {
    z_loss: f64,
    quantization_penalty: f64,
    scale_penalty: f64,
}

impl LanguageModel {
    fn new(model: DuckQuantized, optim: &OptimConfig, teacher: Option<Teacher>) -> Self {
        let quant = model.quant();
        let objective = Objective {
            z_loss: optim.z_loss,
            quantization_penalty: quant.quantization_penalty,
            scale_penalty: quant.scale_penalty,
        };
        Self { model, objective, teacher: teacher.map(Arc::new) }
    }

    /// Total loss (with a gradient) and what is reported of it.
    fn loss(&self, batch: LmBatch, teacher: Option<&Teacher>) -> (Tensor<1>, StepReport) {
        let tokens = batch.tokens;
        let block = teacher.and_then(Teacher::block);
        let (logits, states) = self.model.forward_with_states(batch.inputs.clone(), block);
        let compared = teacher.map(|teacher| (teacher, teacher.compare(&batch, logits.clone(), states)));
        let loss = language_model_loss(logits, batch.targets, batch.mask, tokens);
        let mut total = loss.cross_entropy.clone();
        if let Some((teacher, distances)) = &compared {
            total = teacher.blend(total, distances);
        }
        if self.objective.z_loss > 0.0 {
            total = total + loss.z.clone().mul_scalar(self.objective.z_loss);
        }
        if let Some(penalty) = self.penalty() {
            total = total + penalty;
        }
        // One read for all numbers: a read waits for the device.
        let [divergence, hidden, relation] = match compared {
            Some((_, distances)) => [Some(distances.divergence), distances.hidden, distances.relation],
            None => [None, None, None],
        };
        let parts =
            [Some(loss.cross_entropy), Some(loss.z), Some(loss.correct), divergence, hidden, relation];
        let read = Tensor::cat(parts.iter().flatten().cloned().map(Tensor::detach).collect(), 0);
        let data = read.into_data();
        let mut numbers = data.iter::<f64>();
        let [nats, z_loss, correct, divergence, hidden, relation] =
            parts.map(|part| part.and_then(|_| numbers.next()));
        let report = StepReport {
            tokens,
            loss: nats.unwrap_or(f64::NAN),
            z_loss,
            divergence,
            hidden,
            relation,
            accuracy: correct.unwrap_or(0.0) / tokens.max(1) as f64,
            ..StepReport::default()
        };
        (total, report)
    }

    /// Mean over the linear layers of: the squared distance between latent and fake quantized weights; the squared
    /// log distance of learned scales from their least-squares value.
    fn penalty(&self) -> Option<Tensor<1>> {
        let Objective { quantization_penalty, scale_penalty, .. } = self.objective;
        if quantization_penalty == 0.0 && scale_penalty == 0.0 {
            return None;
        }
        let linears = self.model.linears();
        let share = 1.0 / linears.len() as f64;
        let mut terms = Vec::new();
        for (_, linear) in &linears {
            let Some(quantizer) = &linear.quantizer else { continue };
            let latent = linear.weight.val();
            if quantization_penalty > 0.0 {
                let distance = latent.clone() - quantizer.fake_quantize(latent.clone()).detach();
                terms.push(distance.square().mean().mul_scalar(quantization_penalty * share));
            }
            if let (Some(scale), true) = (quantizer.learned_scale(), scale_penalty > 0.0) {
                let best = quantizer.optimal_scale(latent.detach());
                let distance =
                    scale.clamp_min(f32::MIN_POSITIVE).log() - best.clamp_min(f32::MIN_POSITIVE).log();
                terms.push(distance.square().mean().mul_scalar(scale_penalty * share));
            }
        }
        terms.into_iter().reduce(|sum, term| sum + term)
    }
}

impl TrainStep for LanguageModel {
    type Input = LmBatch;
    type Output = LmItem;

    fn step(&self, batch: LmBatch) -> TrainOutput<LmItem> {
        let weight = batch.weight;
        let (loss, report) = self.loss(batch, self.teacher.as_deref());
        TrainOutput::new(self, loss.mul_scalar(weight).backward(), LmItem(report))
    }
}

impl InferenceStep for LanguageModel {
    type Input = LmBatch;
    type Output = LmItem;

    fn step(&self, batch: LmBatch) -> LmItem {
        LmItem(self.loss(batch, None).1)
    }
}

/// Only an update takes the model out, and puts it back.
const BETWEEN_STEPS: &str = "a trainer has a model between steps";

/// When a step is skipped.
///
/// The loss of a step with `n` learned tokens is a spike if it exceeds its running mean both by the factor and by
/// `max(1, 10 / sqrt(n))` nats per token. The ratio alone would call every step of a text that is learned by heart a spike,
/// whose mean is near 0, and rare tokens of a step that has few.
///
/// A spike is rare. Where more than 5 % of the steps are spikes (as the running mean of the loss counts), the text has parts that
/// are harder than the rest; were they skipped, they would never be learned. So such steps are taken. They still count as bad
/// steps, of which `run.max_bad_steps` in a row are a run that diverges.
///
/// # Source
/// Relative and absolute tolerance as in Lightning's `SpikeDetection` (`rtol`, `atol`).
#[derive(Clone, Copy, Debug)]
pub struct SpikeGuard {
    /// A loss above this multiple of its running mean may be a spike; 0: none is.
    pub factor: f64,
}

impl SpikeGuard {
    /// Whether the mean `loss` of `tokens` learned tokens is a spike above the running mean `average`.
    fn is_spike(self, loss: f64, tokens: usize, average: f64) -> bool {
        let floor = SPIKE_FLOOR.max(TOKEN_NOISE / (tokens as f64).sqrt());
        self.factor > 0.0 && loss > average * self.factor && loss > average + floor
    }

    /// Whether to take a step, after `learned_steps` steps with learned tokens; counts bad steps.
    fn admits(
        self,
        state: &mut TrainState,
        loss: f64,
        norm: f64,
        tokens: usize,
        learned_steps: usize,
    ) -> bool {
        if !(loss.is_finite() && norm.is_finite()) {
            state.bad_steps += 1;
            return false;
        }
        let average = state.loss_average.filter(|_| learned_steps >= GUARD_AFTER);
        let spike = average.is_some_and(|average| self.is_spike(loss, tokens, average));
        let common = state.spike_share > SPIKE_SHARE;
        state.bad_steps = if spike { state.bad_steps + 1 } else { 0 };
        state.spike_share += AVERAGE_RATE * (f64::from(spike) - state.spike_share);
        !spike || common
    }
}

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
    /// Taken out while a step updates it: weights that are shared would be copied.
    model: Option<LanguageModel>,
    optimizer: ModuleOptimizer,
    rates: ModuleLrScheduler,
    schedule: Schedule,
    handle: OptimScheduleHandle,
    clip_norm: f64,
    guard: SpikeGuard,
    state: TrainState,
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
        let plan =
            TrainPlan { optim: optim.clone(), schedule: Schedule::new(schedule, steps), teacher: None };
        plan.trainer(model, TrainState { seed, ..TrainState::default() }, SpikeGuard { factor: 0.0 })
    }

    /// One optimizer step on micro-batches whose weights sum to 1 (or a single batch).
    ///
    /// The step is skipped, and counted, when the loss or the gradient norm is not finite or the guard sees a spike;
    /// schedule and data order go on all the same. So they do in a step without a learned token, which changes neither weights nor
    /// moments nor the mean of the guard; its loss is NaN. A pure function of the trainer's state and the batches: dropout
    /// draws from a generator that is seeded with (seed, step).
    ///
    /// # Panics
    /// Without a batch.
    pub fn train_step(&mut self, batches: Vec<LmBatch>) -> StepReport {
        assert!(!batches.is_empty(), "a step has at least one batch");
        let step = self.state.step;
        let model = self.model();
        self.schedule.apply(step, model.schedule_handle());
        self.handle.decay.set(self.schedule.weight_decay_factor(step) as f32);
        // A device has one generator a process: a run that draws nothing leaves it to those that do.
        if model.config().dropout > 0.0 {
            batches[0].inputs.device().seed(crate::seed::mix(self.state.seed, step as u64));
        }

        let mut report = StepReport::default();
        let mut grads = None;
        for batch in batches {
            let weight = f64::from(batch.weight);
            self.state.windows_seen += batch.inputs.dims()[0] as u64;
            // Its gradient would be that of nothing.
            if batch.tokens == 0 {
                continue;
            }
            let output = TrainStep::step(self.language_model(), batch);
            let LmItem(part) = output.item;
            report.tokens += part.tokens;
            report.loss += part.loss * weight;
            report.accuracy += part.accuracy * weight;
            for (sum, part) in [
                (&mut report.z_loss, part.z_loss),
                (&mut report.divergence, part.divergence),
                (&mut report.hidden, part.hidden),
                (&mut report.relation, part.relation),
            ] {
                if let Some(part) = part {
                    *sum = Some(sum.unwrap_or(0.0) + part * weight);
                }
            }
            grads = Some(accumulate(grads, output.grads, self.model()));
        }
        let rate = self.rates.step();
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
            lambda: Some(self.schedule.lambda(step)),
            skipped_steps: self.state.skipped_steps,
            ..report
        }
    }

    /// Takes the step, or skips it; the gradient's norm.
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
        let average = self.state.loss_average.unwrap_or(report.loss);
        let average = average + AVERAGE_RATE * (report.loss - average);
        self.state.loss_average = Some(average);
        if learned_steps >= GUARD_AFTER {
            self.state.lowest_average =
                Some(self.state.lowest_average.map_or(average, |lowest| lowest.min(average)));
        }
        norm
    }

    /// The model as it stands, under autodiff.
    pub fn model(&self) -> &DuckQuantized {
        &self.language_model().model
    }

    /// The same with what its training needs.
    pub(crate) fn language_model(&self) -> &LanguageModel {
        self.model.as_ref().expect(BETWEEN_STEPS)
    }

    /// The model, optimizer and rates that Burn's training is launched with.
    pub(crate) fn learner(&self) -> Learner<LanguageModel> {
        Learner::new(self.language_model().clone(), self.optimizer.clone(), self.rates.clone())
    }

    /// Model and optimizer as records, for a checkpoint.
    pub fn records(&self) -> (ModuleRecord, OptimizerRecord) {
        (self.language_model().clone().into_record(), self.optimizer.to_record())
    }

    /// Takes back model, optimizer and running mean of a checkpoint; step and data position go on, so that the texts
    /// that broke the run are not met again.
    pub(crate) fn roll_back(&mut self, model: ModuleRecord, optimizer: OptimizerRecord, state: &TrainState) {
        let broken = self.model.take().expect(BETWEEN_STEPS);
        self.model = Some(broken.load_record(model));
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
    // The record is of the model with what its training needs.
    let holder = LanguageModel::new(model, optim, None);
    Ok(holder.try_load_record(record)?.model)
}

/// Everything a trainer is made of besides the model.
pub(crate) struct TrainPlan {
    pub optim: OptimConfig,
    pub schedule: Schedule,
    pub teacher: Option<Teacher>,
}

impl TrainPlan {
    /// A trainer that goes on from `state`. Groups go by parameter id: make it after the model's record is loaded, which
    /// brings the ids.
    pub fn trainer(self, model: DuckQuantized, state: TrainState, guard: SpikeGuard) -> QuantizationTrainer {
        let weights = model.linears().iter().map(|(_, linear)| linear.weight.id).collect::<Vec<_>>();
        let mut decayed = weights.clone();
        for pair in model.linears().iter().filter_map(|(_, linear)| linear.adapter.as_ref()) {
            decayed.extend([pair.a.id, pair.b.id]);
        }
        decayed.push(model.embedding.id);
        decayed.extend(model.head.as_ref().map(|head| head.id));
        let matrices = ParamGroup::from_ids(weights);
        let Self { optim, schedule, teacher } = self;
        let handle = OptimScheduleHandle::default();
        let optimizer = optim.init(matrices.clone(), ParamGroup::from_ids(decayed), &handle);
        let rates = optim.lr_scheduler(matrices, &schedule, state.step);
        let model = LanguageModel::new(model, &optim, teacher);
        let clip_norm = optim.clip_norm;
        QuantizationTrainer {
            model: Some(model),
            optimizer,
            rates,
            schedule,
            handle,
            clip_norm,
            guard,
            state,
        }
    }

    /// A trainer that goes on from the records of a checkpoint.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spike_exceeds_the_mean_by_its_ratio_and_by_a_floor() {
        let guard = SpikeGuard { factor: 3.0 };
        // Loss, learned tokens and mean.
        for (loss, tokens, average, spike) in [
            (6.1, 2048, 2.0, true),
            (5.9, 2048, 2.0, false),
            (f64::INFINITY, 2048, 2.0, true),
            // Three times nothing.
            (1e-3, 2048, 1e-5, false),
            (0.9, 2048, 1e-5, false),
            (1.1, 2048, 1e-5, true),
            (1.1, 100, 0.3, false),
            // Few tokens, of which one may be rare.
            (9.0, 1, 0.3, false),
            (9.0, 16, 0.3, true),
        ] {
            assert_eq!(guard.is_spike(loss, tokens, average), spike, "{loss} {tokens} {average}");
        }
        assert!(!SpikeGuard { factor: 0.0 }.is_spike(1e9, 2048, 1.0));
    }

    /// Steps that are taken of a run with the mean 1 whose losses, from the hundredth on, are those given.
    fn taken(losses: impl IntoIterator<Item = f64>) -> (Vec<bool>, TrainState) {
        let mut state = TrainState { loss_average: Some(1.0), ..TrainState::default() };
        let guard = SpikeGuard { factor: 3.0 };
        let admit = |loss| guard.admits(&mut state, loss, 1.0, 2048, 100);
        (losses.into_iter().map(admit).collect(), state)
    }

    #[test]
    fn rare_spikes_are_skipped_and_common_ones_are_what_the_text_is_like() {
        let rare = (0..3000).map(|step| if step % 60 == 59 { 9.0 } else { 1.0 });
        let (steps, _) = taken(rare);
        assert_eq!(steps.iter().filter(|taken| !**taken).count(), 50);
        let common = (0..3000).map(|step| if step % 6 == 5 { 9.0 } else { 1.0 });
        let (steps, state) = taken(common);
        assert!(steps.iter().filter(|taken| !**taken).count() < 10, "hard parts of a text are learned");
        assert_eq!(state.bad_steps, 1);
        // In a row, taken or not.
        let (steps, state) = taken([9.0; 5]);
        assert_eq!((steps, state.bad_steps), (vec![false, false, false, true, true], 5));
        let (steps, state) = taken([f64::NAN, 1.0, f64::INFINITY, f64::NAN]);
        assert_eq!((steps, state.bad_steps), (vec![false, true, false, false], 2));
    }
}
