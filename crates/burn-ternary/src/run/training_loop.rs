//! The training loop: what Burn's training runs in place of its loop by epochs.
//!
//! Validation and checkpoints go by step, a skipped step or a rollback is part of the loop, and a resumed run seeks
//! in the data instead of starting the shuffle again.

use super::checkpoint::Checkpoints;
use super::identity::Identity;
use super::{Experiment, TrainError};
use crate::ImportError;
use crate::data::window::TokenWindows;
use crate::data::{LmBatch, chat};
use crate::nn::{DuckQuantized, ModelSize};
use crate::report::burn_metrics::{LmItem, Split, StepReport};
use crate::report::code_stats::{CodeStats, CodeTracker};
use crate::report::display::Display;
use crate::report::progress::ProgressLine;
use crate::report::{History, MetricsFile, terminal};
use crate::train::{LanguageModel, QuantizationTrainer, StartLoss, TrainState};
use burn::data::dataloader::Progress;
use burn::module::Module;
use burn::tensor::Device;
use burn::train::{
    EventProcessorTraining, InferenceStep, Interrupter, Learner, LearnerEvent, SupervisedLearningStrategy,
    SupervisedTrainingEventProcessor, TrainLoader, TrainingComponents, TrainingItem, ValidLoader,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use ternary_format::{
    Tokenizer,
    disk::{self, RunLock},
};

/// Temperature of the text samples.
const SAMPLE_TEMPERATURE: f64 = 0.7;

/// One session of a run: from its start or its last checkpoint to its end.
pub(super) struct Session {
    pub experiment: Experiment,
    pub identity: Identity,
    pub run_dir: PathBuf,
    /// Held until the run has written its result.
    pub lock: Arc<RunLock>,
    pub device: Device,
    pub tokenizer: Tokenizer,
    /// What the text samples start with, as text and as ids.
    pub prompts: Vec<(String, Vec<u32>)>,
    pub train: TokenWindows,
    pub valid: TokenWindows,
    pub checkpoints: Checkpoints,
    pub metrics: MetricsFile,
    pub history: History,
    pub codes: Option<CodeTracker>,
    pub size: ModelSize,
    /// Whether progress lines go to standard output.
    pub prints: bool,
    pub display: Option<Display>,
    /// Prompts of the last text samples, and what followed them.
    pub samples: Vec<(String, String)>,
}

/// What a session leaves besides files.
pub(super) struct Outcome {
    pub history: History,
    pub state: TrainState,
    pub counts: Vec<(String, [u64; 3])>,
    /// The last text samples of this session.
    pub samples: Vec<(String, String)>,
    /// Whether a signal or the terminal interface ended it before its last step.
    pub interrupted: bool,
    pub error: Option<TrainError>,
}

/// Hands a [`Session`] to Burn, and its [`Outcome`] back.
pub(super) struct StepStrategy {
    pub session: Mutex<Option<(Session, QuantizationTrainer)>>,
    pub outcome: Arc<Mutex<Option<Outcome>>>,
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
        let (session, trainer) =
            self.session.lock().expect("held for one line").take().expect("a run fits once");
        // It would hold the weights of the start as long as the run lasts.
        drop(learner);
        let mut run = Loop {
            trainer,
            events: Events {
                processor: components.event_processor,
                interrupter: components.interrupter,
                steps: session.experiment.run.steps,
                eval_every: session.experiment.run.eval_every,
            },
            stats: None,
            started: Instant::now(),
            elapsed_before: 0.0,
            stepping: Duration::ZERO,
            tokens: 0,
            loss: 0.0,
            accuracy: 0.0,
            session,
        };
        let error = run.run(train, valid).err();
        let done = run.trainer.state().step == run.session.experiment.run.steps;
        let interrupted = !done && run.events.interrupter.interruption().is_some();
        run.trainer.state_mut().elapsed_s = run.elapsed();
        let outcome = Outcome {
            history: run.session.history,
            state: run.trainer.state().clone(),
            counts: run.stats.map(|stats| stats.counts).unwrap_or_default(),
            samples: run.session.samples,
            interrupted,
            error,
        };
        *self.outcome.lock().expect("held for one line") = Some(outcome);
        (run.trainer.language_model().clone(), run.events.processor)
    }
}

struct Loop {
    session: Session,
    trainer: QuantizationTrainer,
    events: Events,
    stats: Option<CodeStats>,
    started: Instant,
    /// Seconds that earlier sessions of this run took.
    elapsed_before: f64,
    /// Time in steps and tokens trained on since the last log line.
    stepping: Duration,
    tokens: usize,
    /// Sums over these tokens, in this session.
    loss: f64,
    accuracy: f64,
}

impl Loop {
    fn run(
        &mut self,
        train: TrainLoader<LanguageModel>,
        valid: ValidLoader<LanguageModel>,
    ) -> Result<(), TrainError> {
        let run = self.session.experiment.run.clone();
        let (steps, first) = (run.steps, self.trainer.state().step);
        self.elapsed_before = self.trainer.state().elapsed_s;
        let train =
            train.slice(first * run.accumulation, steps * run.accumulation).to_device(&self.session.device);
        let valid = valid.to_device(&self.session.device.clone().inner());
        let mut batches = train.iter();
        let mut session_steps = 0usize;
        let mut session_stepping = Duration::ZERO;
        let model = self.trainer.model().valid();
        self.stats = self.session.codes.as_ref().and_then(|codes| codes.recall(&model));
        if self.stats.is_none() {
            self.look_at_codes();
        }
        if first == 0 && !run.start_from.is_empty() {
            self.look_at_start(&valid)?;
        }
        if self.session.display.is_some() {
            self.events.recall(&self.session.history);
        }
        self.events.start_interval(first);
        let evaluated = self.session.history.valid.last().map_or(0, |report| report.step);
        if first % run.eval_every == 0 && evaluated < first {
            // The last session was stopped before.
            self.evaluate(&valid, false)?;
        }
        for step in first + 1..=steps {
            let mut micro_batches: Vec<LmBatch> = Vec::with_capacity(run.accumulation);
            for _ in 0..run.accumulation {
                let batch = batches.next().expect("the loader holds every step of the run");
                micro_batches.push(batch.map_err(|error| TrainError::Burn(error.to_string()))?);
            }
            let began = Instant::now();
            let report = self.trainer.train_step(micro_batches);
            // The model's own logits are finite.
            if report.loss.is_finite() && report.divergence.is_some_and(|divergence| !divergence.is_finite())
            {
                return Err(ImportError::NotFinite.into());
            }
            session_steps += 1;
            session_stepping += began.elapsed();
            self.stepping += began.elapsed();
            self.tokens += report.tokens;
            if report.tokens > 0 {
                self.loss += report.loss * report.tokens as f64;
                self.accuracy += report.accuracy * report.tokens as f64;
            }
            let report = self.complete(report);
            self.events.trained(report);

            let last = step == steps;
            if step % run.log_every == 0 || last {
                let eta = session_stepping.as_secs_f64() / session_steps as f64 * (steps - step) as f64;
                self.log(Split::Train, report)?;
                // One batch is noise: a person sees the mean since the last line, `metrics.jsonl` each step as it was.
                let tokens = self.tokens as f64;
                let means = (self.loss / tokens, self.accuracy / tokens);
                let shown = StepReport { loss: means.0, accuracy: means.1, tokens: self.tokens, ..report };
                self.print(|| ProgressLine::train(&shown, steps, eta));
                (self.stepping, self.tokens) = (Duration::ZERO, 0);
                (self.loss, self.accuracy) = (0.0, 0.0);
            }
            let rolled_back = self.trainer.state().bad_steps >= run.max_bad_steps.max(1);
            if rolled_back {
                self.roll_back(step)?;
            }
            // A step that went back to the last checkpoint is not saved: the run stops after the next.
            let mut stop = self.events.interrupter.should_stop() && !rolled_back;
            if step % run.eval_every == 0 || last {
                let evaluated = self.evaluate(&valid, !last && !rolled_back)?;
                stop |= !evaluated;
                self.events.end_interval(step);
                if !last && !stop {
                    self.events.start_interval(step);
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

    /// Adds to a report what the loop knows and the step does not.
    fn complete(&self, report: StepReport) -> StepReport {
        let run = &self.session.experiment.run;
        let ternary = self.session.codes.is_some().then_some(self.session.size);
        let windows_a_step = run.batch_size * run.accumulation;
        let shares = self.stats.as_ref().map(|stats| stats.shares);
        StepReport {
            epoch: (report.step * windows_a_step) as f64 / self.session.train.per_epoch() as f64,
            bits_per_byte: Some(self.session.train.tokens().bits_per_byte(report.loss)),
            tokens_per_s: self.tokens as f64 / self.stepping.as_secs_f64().max(1e-9),
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

    /// Validation loss over the held-out windows, and a text sample. One that can wait is left to the next session where the run
    /// is to stop: false.
    fn evaluate(&mut self, valid: &ValidLoader<LanguageModel>, can_wait: bool) -> Result<bool, TrainError> {
        let steps = self.session.experiment.run.steps;
        let model = self.trainer.validation_model();
        let step = self.trainer.state().step;
        let mut sum = StepReport { step, ..StepReport::default() };
        let batches = valid.num_items();
        self.events.start_validation(step, batches);
        for (index, part) in losses(&model, valid).enumerate() {
            let part = part?;
            if can_wait && self.events.interrupter.should_stop() {
                return Ok(false);
            }
            sum.tokens += part.tokens;
            sum.loss += part.loss * part.tokens as f64;
            sum.accuracy += part.accuracy * part.tokens as f64;
            self.events.validated(self.complete(StepReport { step, ..part }), index + 1, batches);
        }
        self.events.end_validation(step);
        self.look_at_codes();
        // NaN where no window has a learned token.
        let tokens = sum.tokens as f64;
        let loss = sum.loss / tokens;
        let report = StepReport {
            bits_per_byte: Some(self.session.valid.tokens().bits_per_byte(loss)),
            ..self.complete(StepReport { loss, accuracy: sum.accuracy / tokens, ..sum })
        };
        self.log(Split::Valid, report)?;
        self.print(|| ProgressLine::valid(&report, steps));
        let state = self.trainer.state_mut();
        if loss.is_finite() && state.best_valid_loss.is_none_or(|best| loss < best) {
            state.best_valid_loss = Some(loss);
            state.best_valid_step = Some(step);
        }
        self.sample(&model.model, step)?;
        Ok(true)
    }

    /// What the weights that the run starts from are worth, in float and rounded.
    fn look_at_start(&mut self, valid: &ValidLoader<LanguageModel>) -> Result<(), TrainError> {
        let model = self.trainer.validation_model();
        let lambda = &model.model.dials().lambda;
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
        self.print(|| {
            format!("start: packed valid loss {:.4} in float, {:.4} rounded", start.float, start.rounded)
        });
        Ok(())
    }

    /// Writes what the model says to each prompt into `samples.txt`, and shows it.
    fn sample(&mut self, model: &DuckQuantized, step: usize) -> Result<(), TrainError> {
        let run = &self.session.experiment.run;
        expect_in_place(&self.session.lock, &self.session.run_dir)?;
        let mut samples = Vec::new();
        for (prompt, ids) in &self.session.prompts {
            let tokenizer = &self.session.tokenizer;
            let stop = chat::special(tokenizer, chat::Special::EndOfText);
            let mut rng = ChaCha8Rng::seed_from_u64(crate::seed::mix(run.seed, step as u64));
            let text =
                tokenizer.decode(&model.sample(ids, run.sample_tokens, SAMPLE_TEMPERATURE, stop, &mut rng));
            let line = ProgressLine::sample(prompt, &text);
            let path = self.session.run_dir.join("samples.txt");
            disk::open_in_place(&path, File::options().create(true).append(true))
                .and_then(|mut file| writeln!(file, "step {step}  {line}"))
                .map_err(|source| TrainError::Write { path, source })?;
            self.print(
                || if terminal::can_draw() { ProgressLine::sample_dimmed(prompt, &text) } else { line },
            );
            samples.push((prompt.clone(), text));
        }
        if let Some(display) = &self.session.display {
            display.sampled(step, &samples);
        }
        self.session.samples = samples;
        Ok(())
    }

    fn look_at_codes(&mut self) {
        let model = self.trainer.model();
        self.stats = self.session.codes.as_mut().map(|codes| codes.look(&model.valid()));
    }

    fn log(&mut self, split: Split, report: StepReport) -> Result<(), TrainError> {
        match split {
            Split::Train => self.session.history.train.push(report),
            Split::Valid => self.session.history.valid.push(report),
        }
        self.session
            .metrics
            .append(split, &report)
            .map_err(|source| TrainError::Write { path: self.session.run_dir.join("metrics.jsonl"), source })
    }

    fn print(&self, line: impl FnOnce() -> String) {
        if self.session.prints {
            // A reader that has gone away (`| head`) must not stop a run.
            let _ = writeln!(std::io::stdout(), "{}", line());
        }
    }

    fn save(&mut self) -> Result<(), TrainError> {
        expect_in_place(&self.session.lock, &self.session.run_dir)?;
        let elapsed = self.elapsed();
        self.trainer.state_mut().elapsed_s = elapsed;
        let (model, optimizer) = self.trainer.records();
        let codes = self.session.codes.as_ref().map(CodeTracker::to_bytes);
        let Session { checkpoints, identity, .. } = &self.session;
        checkpoints.save(model, optimizer, self.trainer.state(), identity, codes.as_deref())?;
        Ok(())
    }

    /// Back to the weights of the last good checkpoint that is regular, on with the next texts.
    fn roll_back(&mut self, step: usize) -> Result<(), TrainError> {
        let rollbacks = self.trainer.state().rollbacks;
        let loaded = self.session.checkpoints.latest_regular()?;
        let Some(loaded) = loaded.filter(|_| rollbacks < self.session.experiment.run.max_rollbacks) else {
            let checkpoint = self.session.checkpoints.latest_good()?.map(|loaded| loaded.path);
            return Err(TrainError::Diverged { step, rollbacks, checkpoint });
        };
        self.print(|| {
            format!("step {step}: too many bad steps, back to the weights of {}", loaded.path.display())
        });
        self.trainer.roll_back(loaded.model, loaded.optimizer, &loaded.state);
        Ok(())
    }

    fn elapsed(&self) -> f64 {
        self.elapsed_before + self.started.elapsed().as_secs_f64()
    }
}

/// Refuses to write under a name that is no longer that of the run's folder: another run may be there.
pub(super) fn expect_in_place(lock: &RunLock, run_dir: &Path) -> Result<(), TrainError> {
    if lock.is_in_place() {
        return Ok(());
    }
    Err(TrainError::Moved { path: run_dir.into() })
}

/// The losses of the validation batches that have a learned token.
fn losses<'a>(
    model: &'a LanguageModel,
    valid: &'a ValidLoader<LanguageModel>,
) -> impl Iterator<Item = Result<StepReport, TrainError>> + 'a {
    let learned = |batch: &Result<LmBatch, _>| batch.as_ref().map_or(true, |batch| batch.tokens > 0);
    valid.iter().filter(learned).map(|batch| {
        let batch = batch.map_err(|error| TrainError::Burn(error.to_string()))?;
        let LmItem(part) = InferenceStep::step(model, batch);
        Ok(part)
    })
}

/// Burn's metrics and renderer; an interval between evaluations is what Burn calls an epoch, and its items are steps of the run.
struct Events {
    processor: SupervisedTrainingEventProcessor<LanguageModel>,
    interrupter: Interrupter,
    steps: usize,
    eval_every: usize,
}

impl Events {
    fn train(&mut self, event: LearnerEvent<LmItem>) {
        self.interrupter.fail_on_error(self.processor.process_train(event));
    }

    fn valid(&mut self, event: LearnerEvent<LmItem>) {
        self.interrupter.fail_on_error(self.processor.process_valid(event));
    }

    /// What earlier sessions of the run reported.
    fn recall(&mut self, history: &History) {
        let mut trained = history.train.iter().peekable();
        for report in &history.valid {
            while let Some(before) = trained.next_if(|before| before.step <= report.step) {
                self.trained(*before);
            }
            self.start_validation(report.step, 1);
            self.validated(*report, 1, 1);
            self.end_validation(report.step);
        }
        for report in trained {
            self.trained(*report);
        }
        self.train(LearnerEvent::EndSplit(1));
    }

    /// The interval of the step after `done`.
    fn start_interval(&mut self, done: usize) {
        let epoch_number = done / self.eval_every + 1;
        self.train(LearnerEvent::StartSplit { epoch_number, total_items: self.steps });
    }

    fn trained(&mut self, report: StepReport) {
        let progress = Progress::new(report.step, self.steps, Some("steps".into()));
        let item = TrainingItem::new(LmItem(report), progress, Some(report.step), Some(report.lr.into()));
        self.train(LearnerEvent::ProcessedItem(item));
    }

    fn start_validation(&mut self, step: usize, batches: usize) {
        let epoch_number = step.div_ceil(self.eval_every);
        self.valid(LearnerEvent::StartSplit { epoch_number, total_items: batches });
    }

    fn validated(&mut self, report: StepReport, batch: usize, batches: usize) {
        let progress = Progress::new(batch, batches, Some("batches".into()));
        let item = TrainingItem::new(LmItem(report), progress, Some(batch), None);
        self.valid(LearnerEvent::ProcessedItem(item));
    }

    fn end_validation(&mut self, step: usize) {
        self.valid(LearnerEvent::EndSplit(step.div_ceil(self.eval_every)));
    }

    fn end_interval(&mut self, step: usize) {
        let number = step.div_ceil(self.eval_every);
        self.train(LearnerEvent::EndSplit(number));
        self.train(LearnerEvent::EndEpoch(number));
    }
}
