//! The training loop by steps, which Burn's training runs instead of its loop by epochs.
//!
//! Validation and checkpoints are due by step, skipped steps and rollbacks are part of the loop, and a resumed run seeks in the data
//! instead of restarting the shuffle.

use super::TrainError;
use super::checkpoint::{self, Checkpoints};
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
use ternary_parallel::Phase;

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
        training.interrupted = !done && (training.stopped || events.interrupter.interruption().is_some());
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
    /// Whether a process was to stop after the last step.
    stopped: bool,
    /// The first error in writing a file since the processes last agreed.
    unwritten: Option<TrainError>,
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
            stopped: false,
            unwritten: None,
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
        let context = self.run.clone();
        let (run, ranks) = (&context.experiment.run, &context.ranks);
        let (steps, first) = (run.steps, self.trainer.state().step);
        let micro_batches = run.gradient_accumulation / ranks.size();
        let train = train
            .slice(first * micro_batches, steps * micro_batches)
            .to_device(&context.device.clone().autodiff());
        let valid = valid.to_device(&context.device);
        let mut batches = train.iter();
        self.start_session(events, &valid, first)?;
        for step in first + 1..=steps {
            ranks.enter(Phase::Step(step));
            let batches: Vec<LmBatch> = (0..micro_batches)
                .map(|_| batches.next().expect("the loader holds every step of the run"))
                .collect::<Result<_, _>>()
                .map_err(|error| TrainError::Burn(error.into()))?;
            let report = self.train_step(batches)?;
            let (report, stopped) = self.agree_to_stop(report, events);
            self.stopped = stopped;
            events.trained(report);

            let last = step == steps;
            let logs = step % run.log_every == 0 || last;
            if logs {
                self.write(|this| this.log_train(report))?;
            }
            let rolled_back = self.trainer.state().bad_steps >= run.max_bad_steps.max(1);
            if rolled_back {
                self.roll_back(step)?;
            }
            // A step that went back to the last checkpoint is not saved: the run stops after the next.
            let mut stop = stopped && !rolled_back;
            let evaluates = step % run.eval_every == 0 || last;
            let saves = (step % run.checkpoint_every == 0 || last || stop) && !rolled_back;
            if evaluates || saves {
                ranks.enter(Phase::Files(step));
            }
            if evaluates {
                let evaluated = self.evaluate(events, &valid, !last && !rolled_back)?;
                stop |= !evaluated;
                events.end_interval(step);
                if !last && !stop {
                    events.start_interval(step);
                }
            }
            // An evaluation may have been left to the next session.
            let saves = saves || (stop && !rolled_back);
            if saves {
                self.write(Self::save)?;
            }
            if logs || evaluates || saves {
                ranks.agree(self.unwritten.take().map_or(Ok(()), Err))?;
            }
            if saves {
                ranks.saved(&checkpoint::path(&context.experiment.run_dir(), step));
            }
            if stop {
                break;
            }
        }
        Ok(())
    }

    /// Does work that writes files, on process 0. The other processes go on and learn of an error when they next agree.
    fn write(&mut self, work: impl FnOnce(&mut Self) -> Result<(), TrainError>) -> Result<(), TrainError> {
        if !self.run.ranks.is_first() {
            return Ok(());
        }
        match work(self) {
            Err(error) if self.run.ranks.size() > 1 => {
                self.unwritten.get_or_insert(error);
                Ok(())
            }
            done => done,
        }
    }

    /// Whether any process is to stop after this step, and the report with the time that the processes waited for the slowest.
    fn agree_to_stop(&self, report: StepReport, events: &Events) -> (StepReport, bool) {
        let (ranks, stop) = (&self.run.ranks, events.interrupter.should_stop());
        if ranks.size() == 1 {
            return (report, stop);
        }
        let own = [f64::from(stop), self.trainer.waited().as_secs_f64()];
        let all = ranks.group().gather_numbers(&own);
        let wait_s = all.chunks_exact(2).fold(0.0, |longest: f64, own| longest.max(own[1]));
        let stop = all.chunks_exact(2).any(|own| own[0] == 1.0);
        (StepReport { processes: Some(ranks.size()), wait_s: Some(wait_s), ..report }, stop)
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
        let evaluated = self.run.ranks.number_of_first(evaluated);
        if first.is_multiple_of(eval_every) && evaluated < first {
            self.evaluate(events, valid, false)?;
            self.run.ranks.agree(self.unwritten.take().map_or(Ok(()), Err))?;
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
        self.run.ranks.stepped(duration);
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
        let batches = valid.num_items();
        events.start_validation(step, batches);
        let alone = self.run.ranks.size() == 1;
        let stops = |events: &Events| can_wait && alone && events.interrupter.should_stop();
        let sum = self.validate(&model, valid, |report, done| {
            events.validated(self.complete(StepReport { step, ..report }), done, batches);
            !stops(events)
        })?;
        let Some(sum) = sum else { return Ok(false) };
        events.end_validation(step);
        self.update_code_stats();
        let report = StepReport {
            bits_per_byte: Some(self.run.data.valid.tokens().bits_per_byte(sum.loss)),
            ..self.complete(StepReport { step, ..sum })
        };
        let loss = report.loss;
        self.write(|this| this.log(Split::Valid, report))?;
        self.run.print(|| ProgressLine::valid(&report, steps));
        let state = self.trainer.state_mut();
        if loss.is_finite() && state.best_valid_loss.is_none_or(|best| loss < best) {
            state.best_valid_loss = Some(loss);
            state.best_valid_step = Some(step);
        }
        self.write(|this| this.sample(&model.model, step))?;
        Ok(true)
    }

    /// Tokens, and means over them of loss and accuracy, on the validation windows; NaN where no window has a learned token. Process `r`
    /// of `n` computes batch `r` of every `n`, and the sums are made in the order of batches. `each` gets the report of every batch
    /// of this process, and the number of batches so far; `None` where it returns false.
    fn validate(
        &self,
        model: &LanguageModel,
        valid: &ValidLoader<LanguageModel>,
        mut each: impl FnMut(StepReport, usize) -> bool,
    ) -> Result<Option<StepReport>, TrainError> {
        const NUMBERS: usize = 3;
        let ranks = &self.run.ranks;
        let (rank, size) = (ranks.rank(), ranks.size());
        let mut own = Vec::new();
        let learned = |batch: &Result<LmBatch, _>| batch.as_ref().map_or(true, |batch| batch.tokens > 0);
        for (index, batch) in valid.iter().filter(learned).enumerate().skip(rank).step_by(size) {
            let batch = batch.map_err(|error| TrainError::Burn(error.into()))?;
            let LmItem(part) = InferenceStep::step(model, batch);
            own.extend([part.tokens as f64, part.loss, part.accuracy]);
            if !each(part, index + 1) {
                return Ok(None);
            }
        }
        let own: Vec<u8> = own.iter().flat_map(|number| number.to_le_bytes()).collect();
        let shares = ranks.group().gather(&own);
        let mut sum = StepReport::default();
        for batch in 0.. {
            let Some(bytes) = shares[batch % size].chunks_exact(8 * NUMBERS).nth(batch / size) else { break };
            let numbers: Vec<f64> = bytes
                .chunks_exact(8)
                .map(|bytes| f64::from_le_bytes(bytes.try_into().expect("eight bytes")))
                .collect();
            sum.tokens += numbers[0] as usize;
            sum.loss += numbers[1] * numbers[0];
            sum.accuracy += numbers[2] * numbers[0];
        }
        let tokens = sum.tokens as f64;
        Ok(Some(StepReport { loss: sum.loss / tokens, accuracy: sum.accuracy / tokens, ..sum }))
    }

    /// Validation loss of the weights that the run starts from, in float and rounded.
    fn evaluate_initial_weights(&mut self, valid: &ValidLoader<LanguageModel>) -> Result<(), TrainError> {
        let model = self.trainer.validation_model();
        let lambda = &model.model.schedule_handle().lambda;
        let before = lambda.get();
        let loss_at = |share: f32| -> Result<f64, TrainError> {
            lambda.set(share);
            Ok(self.validate(&model, valid, |_, _| true)?.map_or(f64::NAN, |sum| sum.loss))
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
            let path = self.run.home.dir().join("samples.txt");
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
            .map_err(|source| TrainError::Write { path: self.run.home.dir().join("metrics.jsonl"), source })
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
        let context = self.run.clone();
        context.ranks.enter(Phase::Files(step));
        let found = context.ranks.on_first(|| {
            let loaded = self.checkpoints.latest_regular()?;
            if loaded.is_some() && rollbacks < context.experiment.run.max_rollbacks {
                return Ok(loaded);
            }
            let checkpoint = self.checkpoints.latest_good()?.map(|loaded| loaded.path);
            Err(TrainError::Diverged { step, rollbacks, checkpoint })
        });
        let loaded = context.ranks.share_checkpoint(found, context.home.dir())?;
        let loaded = loaded.expect("process 0 has found a checkpoint");
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
