//! The training loop by steps, which Burn's training runs instead of its loop by epochs.
//!
//! Validation and checkpoints are due by step, skipped steps and rollbacks are part of the loop, and a resumed run seeks in the data
//! instead of restarting the shuffle.

use super::TrainError;
use super::checkpoint::Checkpoints;
use super::context::RunContext;
use super::events::Events;
use crate::ImportError;
use crate::data::{LmBatch, chat};
use crate::nn::{DuckQuantized, ModelSize};
use crate::report::burn_metrics::LmItem;
use crate::report::code_stats::{CodeStats, CodeTracker};
use crate::report::progress::ProgressLine;
use crate::report::{History, MetricsFile, Split, StepReport, terminal};
use crate::train::{LanguageModel, QuantizationTrainer, StartLoss, TrainState};
use burn::module::Module;
use burn::train::{
    InferenceStep, Learner, SupervisedLearningStrategy, SupervisedTrainingEventProcessor, TrainLoader,
    TrainingComponents, ValidLoader,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use ternary_format::disk;

/// Temperature of the text samples.
const SAMPLE_TEMPERATURE: f64 = 0.7;

/// The end of a training loop.
pub(super) struct Outcome {
    pub history: History,
    pub state: TrainState,
    /// Counts of the codes -1, 0 and +1 per layer, for a plot.
    #[cfg_attr(not(feature = "plot"), expect(dead_code))]
    pub counts: Vec<(String, [u64; 3])>,
    /// The last text samples of this session.
    pub samples: Vec<(String, String)>,
    /// Whether a signal or the terminal interface ended it before its last step.
    pub interrupted: bool,
}

/// A [`TrainingLoop`] as Burn's training runs it: by a shared reference.
pub(super) struct StepStrategy(Mutex<TrainingLoop>);

impl StepStrategy {
    pub fn new(training: TrainingLoop) -> Self {
        Self(Mutex::new(training))
    }

    /// The outcome of the loop, and the error that ended it. What only steps need is dropped.
    pub fn finish(strategy: Arc<Self>) -> (Outcome, Option<TrainError>) {
        let strategy = Arc::into_inner(strategy).expect("Burn drops its strategy when it returns");
        let training = strategy.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        let outcome = Outcome {
            state: training.trainer.state().clone(),
            history: training.history,
            counts: training.stats.map(|stats| stats.counts).unwrap_or_default(),
            samples: training.samples,
            interrupted: training.interrupted,
        };
        (outcome, training.error)
    }
}

impl SupervisedLearningStrategy<LanguageModel> for StepStrategy {
    fn fit(
        &self,
        components: TrainingComponents<LanguageModel>,
        learner: Learner<LanguageModel>,
        train: TrainLoader<LanguageModel>,
        valid: ValidLoader<LanguageModel>,
        _starting_epoch: usize,
    ) -> (LanguageModel, SupervisedTrainingEventProcessor<LanguageModel>) {
        // It would hold the initial weights as long as the run lasts.
        drop(learner);
        let mut training = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let run = &training.run.experiment.run;
        let mut events = Events {
            processor: components.event_processor,
            interrupter: components.interrupter,
            steps: run.steps,
            eval_every: run.eval_every,
        };
        training.started = Instant::now();
        training.error = training.run(&mut events, train, valid).err();
        let done = training.trainer.state().step == events.steps;
        training.interrupted = !done && events.interrupter.interruption().is_some();
        let elapsed = training.elapsed();
        training.trainer.state_mut().elapsed_s = elapsed;
        (training.trainer.language_model().clone(), events.processor)
    }
}

/// Sums over steps.
#[derive(Default)]
struct StepSums {
    steps: usize,
    duration: Duration,
    /// Learned tokens.
    tokens: usize,
    /// Nats, over these tokens.
    loss: f64,
    /// Tokens predicted right.
    correct: f64,
}

impl StepSums {
    fn add(&mut self, report: &StepReport, duration: Duration) {
        self.steps += 1;
        self.duration += duration;
        self.tokens += report.tokens;
        // The loss of a step without learned tokens is NaN.
        if report.tokens > 0 {
            self.loss += report.loss * report.tokens as f64;
            self.correct += report.accuracy * report.tokens as f64;
        }
    }
}

/// The steps of one session of a run, from its start or its last checkpoint to its end.
pub(super) struct TrainingLoop {
    run: Arc<RunContext>,
    trainer: QuantizationTrainer,
    checkpoints: Checkpoints,
    metrics: MetricsFile,
    history: History,
    codes: Option<CodeTracker>,
    size: ModelSize,
    /// Prompts of the last text samples, and their continuations.
    samples: Vec<(String, String)>,
    stats: Option<CodeStats>,
    started: Instant,
    /// Seconds of earlier sessions of this run.
    elapsed_before: f64,
    /// Steps since the last log line.
    since_log: StepSums,
    /// Steps of this session.
    session: StepSums,
    interrupted: bool,
    error: Option<TrainError>,
}

impl TrainingLoop {
    pub fn new(
        run: Arc<RunContext>,
        trainer: QuantizationTrainer,
        checkpoints: Checkpoints,
        metrics: MetricsFile,
        history: History,
        codes: Option<CodeTracker>,
    ) -> Self {
        Self {
            size: trainer.model().size(),
            elapsed_before: trainer.state().elapsed_s,
            run,
            trainer,
            checkpoints,
            metrics,
            history,
            codes,
            samples: Vec::new(),
            stats: None,
            started: Instant::now(),
            since_log: StepSums::default(),
            session: StepSums::default(),
            interrupted: false,
            error: None,
        }
    }

    pub fn trainer(&self) -> &QuantizationTrainer {
        &self.trainer
    }

    fn run(
        &mut self,
        events: &mut Events,
        train: TrainLoader<LanguageModel>,
        valid: ValidLoader<LanguageModel>,
    ) -> Result<(), TrainError> {
        let run = self.run.experiment.run.clone();
        let (steps, first) = (run.steps, self.trainer.state().step);
        let train = train
            .slice(first * run.gradient_accumulation, steps * run.gradient_accumulation)
            .to_device(&self.run.device.clone().autodiff());
        let valid = valid.to_device(&self.run.device);
        let mut batches = train.iter();
        self.start_session(events, &valid, first)?;
        for step in first + 1..=steps {
            let micro_batches: Vec<LmBatch> = (0..run.gradient_accumulation)
                .map(|_| batches.next().expect("the loader holds every step of the run"))
                .collect::<Result<_, _>>()
                .map_err(|error| TrainError::Burn(error.into()))?;
            let report = self.train_step(micro_batches)?;
            events.trained(report);

            let last = step == steps;
            if step % run.log_every == 0 || last {
                self.log_train(report)?;
            }
            let rolled_back = self.trainer.state().bad_steps >= run.max_bad_steps.max(1);
            if rolled_back {
                self.roll_back(step)?;
            }
            // A step that went back to the last checkpoint is not saved: the run stops after the next.
            let mut stop = events.interrupter.should_stop() && !rolled_back;
            if step % run.eval_every == 0 || last {
                let evaluated = self.evaluate(events, &valid, !last && !rolled_back)?;
                stop |= !evaluated;
                events.end_interval(step);
                if !last && !stop {
                    events.start_interval(step);
                }
            }
            if (step % run.checkpoint_every == 0 || last || stop) && !rolled_back {
                self.save()?;
            }
            if stop {
                break;
            }
        }
        Ok(())
    }

    /// Evaluates the initial weights of a new run, shows the reports of earlier sessions, and catches up on the evaluation that an
    /// earlier session was stopped before.
    fn start_session(
        &mut self,
        events: &mut Events,
        valid: &ValidLoader<LanguageModel>,
        first: usize,
    ) -> Result<(), TrainError> {
        let model = self.trainer.model().valid();
        self.stats = self.codes.as_ref().and_then(|codes| codes.recall(&model));
        if self.stats.is_none() {
            self.update_code_stats();
        }
        let run = &self.run.experiment.run;
        let eval_every = run.eval_every;
        if first == 0 && !run.start_from.is_empty() {
            self.evaluate_initial_weights(valid)?;
        }
        if self.run.display.is_some() {
            events.recall(&self.history);
        }
        events.start_interval(first);
        let evaluated = self.history.valid.last().map_or(0, |report| report.step);
        if first.is_multiple_of(eval_every) && evaluated < first {
            self.evaluate(events, valid, false)?;
        }
        Ok(())
    }

    /// One optimizer step, timed.
    fn train_step(&mut self, micro_batches: Vec<LmBatch>) -> Result<StepReport, TrainError> {
        let began = Instant::now();
        let report = self.trainer.train_step(micro_batches);
        let duration = began.elapsed();
        // The model's own logits are finite, so the teacher's are not.
        if report.loss.is_finite() && report.divergence.is_some_and(|divergence| !divergence.is_finite()) {
            return Err(ImportError::NotFinite.into());
        }
        self.since_log.add(&report, duration);
        self.session.add(&report, duration);
        Ok(self.complete(report))
    }

    /// Writes the report of a step to `metrics.jsonl`, and prints the means since the last line: one batch is noise.
    fn log_train(&mut self, report: StepReport) -> Result<(), TrainError> {
        self.log(Split::Train, report)?;
        let steps = self.run.experiment.run.steps;
        let step_s = self.session.duration.as_secs_f64() / self.session.steps as f64;
        let eta = step_s * (steps - report.step) as f64;
        let StepSums { tokens, loss, correct, .. } = std::mem::take(&mut self.since_log);
        let (loss, accuracy) = (loss / tokens as f64, correct / tokens as f64);
        let shown = StepReport { loss, accuracy, tokens, ..report };
        self.run.print(|| ProgressLine::train(&shown, steps, eta));
        Ok(())
    }

    /// Adds to a report what the loop knows and the step does not.
    fn complete(&self, report: StepReport) -> StepReport {
        let run = &self.run.experiment.run;
        let ternary = self.codes.is_some().then_some(self.size);
        let windows_per_step = run.batch_size * run.gradient_accumulation;
        let shares = self.stats.as_ref().map(|stats| stats.shares);
        StepReport {
            epoch: (report.step * windows_per_step) as f64 / self.run.data.train.per_epoch() as f64,
            bits_per_byte: Some(self.run.data.train.tokens().bits_per_byte(report.loss)),
            tokens_per_s: self.since_log.tokens as f64 / self.since_log.duration.as_secs_f64().max(1e-9),
            zero_fraction: shares.map(|shares| shares.zero_fraction),
            bits_per_weight: ternary.map(|size| size.bits_per_weight()),
            compression: ternary.map(|size| size.compression()),
            flipped: shares.and_then(|shares| shares.flipped),
            scale_drift: shares.map(|shares| shares.scale_drift),
            peak_rss_bytes: crate::device::peak_rss_bytes(),
            elapsed_s: self.elapsed(),
            ..report
        }
    }

    /// Validation loss over the held-out windows, and text samples. Returns false if it `can_wait` for the next session and the run is
    /// to stop.
    fn evaluate(
        &mut self,
        events: &mut Events,
        valid: &ValidLoader<LanguageModel>,
        can_wait: bool,
    ) -> Result<bool, TrainError> {
        let steps = self.run.experiment.run.steps;
        let model = self.trainer.validation_model();
        let step = self.trainer.state().step;
        let mut sum = StepReport { step, ..StepReport::default() };
        let batches = valid.num_items();
        events.start_validation(step, batches);
        for (index, part) in losses(&model, valid).enumerate() {
            let part = part?;
            if can_wait && events.interrupter.should_stop() {
                return Ok(false);
            }
            sum.tokens += part.tokens;
            sum.loss += part.loss * part.tokens as f64;
            sum.accuracy += part.accuracy * part.tokens as f64;
            events.validated(self.complete(StepReport { step, ..part }), index + 1, batches);
        }
        events.end_validation(step);
        self.update_code_stats();
        // NaN where no window has a learned token.
        let tokens = sum.tokens as f64;
        let loss = sum.loss / tokens;
        let report = StepReport {
            bits_per_byte: Some(self.run.data.valid.tokens().bits_per_byte(loss)),
            ..self.complete(StepReport { loss, accuracy: sum.accuracy / tokens, ..sum })
        };
        self.log(Split::Valid, report)?;
        self.run.print(|| ProgressLine::valid(&report, steps));
        let state = self.trainer.state_mut();
        if loss.is_finite() && state.best_valid_loss.is_none_or(|best| loss < best) {
            state.best_valid_loss = Some(loss);
            state.best_valid_step = Some(step);
        }
        self.sample(&model.model, step)?;
        Ok(true)
    }

    /// Validation loss of the weights that the run starts from, in float and rounded.
    fn evaluate_initial_weights(&mut self, valid: &ValidLoader<LanguageModel>) -> Result<(), TrainError> {
        let model = self.trainer.validation_model();
        let lambda = &model.model.schedule_handle().lambda;
        let before = lambda.get();
        let loss_at = |share: f32| -> Result<f64, TrainError> {
            lambda.set(share);
            let (mut sum, mut tokens) = (0.0, 0);
            for part in losses(&model, valid) {
                let part = part?;
                sum += part.loss * part.tokens as f64;
                tokens += part.tokens;
            }
            Ok(sum / tokens as f64)
        };
        let start = StartLoss { float: loss_at(0.0)?, rounded: loss_at(1.0)? };
        lambda.set(before);
        self.trainer.state_mut().start = Some(start);
        self.run.print(|| {
            format!("start: packed valid loss {:.4} in float, {:.4} rounded", start.float, start.rounded)
        });
        Ok(())
    }

    /// Continues each prompt, writes the texts to `samples.txt` and shows them.
    fn sample(&mut self, model: &DuckQuantized, step: usize) -> Result<(), TrainError> {
        let run = &self.run.experiment.run;
        self.run.expect_in_place()?;
        let mut samples = Vec::new();
        for (prompt, ids) in &self.run.prompts {
            let tokenizer = &self.run.data.tokenizer;
            let stop = chat::special(tokenizer, chat::Special::EndOfText);
            let mut rng = ChaCha8Rng::seed_from_u64(crate::seed::mix(run.seed, step as u64));
            let text =
                tokenizer.decode(&model.sample(ids, run.sample_tokens, SAMPLE_TEMPERATURE, stop, &mut rng));
            let line = ProgressLine::sample(prompt, &text);
            let path = self.run.run_dir.join("samples.txt");
            disk::open_in_place(&path, File::options().create(true).append(true))
                .and_then(|mut file| writeln!(file, "step {step}  {line}"))
                .map_err(|source| TrainError::Write { path, source })?;
            self.run.print(|| {
                if terminal::can_draw() { ProgressLine::sample_dimmed(prompt, &text) } else { line }
            });
            samples.push((prompt.clone(), text));
        }
        if let Some(display) = &self.run.display {
            display.sampled(step, &samples);
        }
        self.samples = samples;
        Ok(())
    }

    fn update_code_stats(&mut self) {
        let model = self.trainer.model();
        self.stats = self.codes.as_mut().map(|codes| codes.update(&model.valid()));
    }

    fn log(&mut self, split: Split, report: StepReport) -> Result<(), TrainError> {
        match split {
            Split::Train => self.history.train.push(report),
            Split::Valid => self.history.valid.push(report),
        }
        self.metrics
            .append(split, &report)
            .map_err(|source| TrainError::Write { path: self.run.run_dir.join("metrics.jsonl"), source })
    }

    fn save(&mut self) -> Result<(), TrainError> {
        self.run.expect_in_place()?;
        let elapsed = self.elapsed();
        self.trainer.state_mut().elapsed_s = elapsed;
        let (model, optimizer) = self.trainer.records();
        let codes = self.codes.as_ref().map(CodeTracker::to_bytes);
        let state = self.trainer.state();
        self.checkpoints.save(model, optimizer, state, &self.run.identity, codes.as_deref())?;
        Ok(())
    }

    /// Restores the weights of the last good regular checkpoint; the run continues with the next texts.
    fn roll_back(&mut self, step: usize) -> Result<(), TrainError> {
        let rollbacks = self.trainer.state().rollbacks;
        let loaded = self.checkpoints.latest_regular()?;
        let Some(loaded) = loaded.filter(|_| rollbacks < self.run.experiment.run.max_rollbacks) else {
            let checkpoint = self.checkpoints.latest_good()?.map(|loaded| loaded.path);
            return Err(TrainError::Diverged { step, rollbacks, checkpoint });
        };
        self.run.print(|| {
            format!("step {step}: too many bad steps, back to the weights of {}", loaded.path.display())
        });
        if let Some(display) = &self.run.display {
            display.rolled_back(rollbacks + 1, step);
        }
        self.trainer.roll_back(loaded.model, loaded.optimizer, &loaded.state);
        Ok(())
    }

    fn elapsed(&self) -> f64 {
        self.elapsed_before + self.started.elapsed().as_secs_f64()
    }
}

/// The losses of the validation batches that have a learned token.
fn losses<'a>(
    model: &'a LanguageModel,
    valid: &'a ValidLoader<LanguageModel>,
) -> impl Iterator<Item = Result<StepReport, TrainError>> + 'a {
    let learned = |batch: &Result<LmBatch, _>| batch.as_ref().map_or(true, |batch| batch.tokens > 0);
    valid.iter().filter(learned).map(|batch| {
        let batch = batch.map_err(|error| TrainError::Burn(error.into()))?;
        let LmItem(part) = InferenceStep::step(model, batch);
        Ok(part)
    })
}
