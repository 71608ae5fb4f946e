//! A whole run: data, model, Burn's `SupervisedTraining`, and the files that stay.

use super::checkpoint::{Checkpoints, Loaded, sha256};
use super::codes::CodeTracker;
use super::distill::Teacher;
use super::metrics;
use super::optim::Moments;
use super::plot;
use super::progress::PlainRenderer;
use super::report::{self, History, MetricsFile, RunResult, write_atomic};
use super::saved::{check_frozen, frozen_model, start_model};
use super::schedule::Schedule;
use super::step::{SpikeGuard, TrainPlan};
use super::strategy::{Outcome, Session, StepStrategy, expect_in_place};
use super::{Experiment, TrainError, TrainState};
use crate::data::{Dataset, LmLoader};
use crate::device;
use crate::nn::DuckQuantized;
use crate::quant::Products;
use crate::{ExportError, export_for_inference};
use burn::module::Module;
use burn::tensor::Device;
use burn::train::logger::InMemoryMetricLogger;
use burn::train::{SupervisedTraining, TrainingStrategy};
use std::fs;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use ternary_format::{
    Tokenizer, WriteOptions,
    disk::{self, RunLock},
    huggingface::write_adapter,
    write_model,
};

/// How a run is run; what it computes is the experiment's alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunOptions {
    /// Go on from the last good checkpoint of the run folder, if it has one.
    pub resume: bool,
    /// Print warnings and the summary only.
    pub quiet: bool,
    /// Passes over the training text, in place of the experiment's steps.
    pub epochs: Option<f64>,
}

/// Runs an experiment from its start, in an empty run folder.
///
/// # Errors
/// Every [`TrainError`].
pub fn train_duck_quantized(experiment: &Experiment) -> Result<RunResult, TrainError> {
    run(experiment.clone(), &RunOptions::default())
}

/// Goes when a run ends, well or not, after all that the run made: then what a step needed goes back to the system.
struct StepMemory;

impl Drop for StepMemory {
    fn drop(&mut self) {
        #[cfg(feature = "flex")]
        ternary_kernels::release_rooms();
    }
}

/// Runs an experiment, or goes on with it.
///
/// Leaves in the run folder: `experiment.toml` (resolved), `tokenizer.json`, token files, `metrics.jsonl`,
/// `samples.txt`, `checkpoints/`, `model.gguf` (where a model file can hold the model), `adapter/` (where `[lora]` is
/// on), `loss.svg`, `codes.svg` (not for a float twin) and `result.json`; the last three also when the run stops with an
/// error after its first step.
///
/// The run folder is locked from the start to the end: [`TrainError::Lock`] names the process that has it already.
///
/// # Errors
/// Every [`TrainError`].
pub fn run(experiment: Experiment, options: &RunOptions) -> Result<RunResult, TrainError> {
    run_locked(experiment, options, |run_dir| Ok(RunLock::acquire(run_dir)?))
}

/// The same, in a folder that `lock` locks before anything is written.
pub(super) fn run_locked(
    mut experiment: Experiment,
    options: &RunOptions,
    lock: impl FnOnce(&Path) -> Result<RunLock, TrainError>,
) -> Result<RunResult, TrainError> {
    let _memory = StepMemory;
    let started = Instant::now();
    let device = device::device(&experiment.run.device)?;
    check_device(&experiment, &device)?;
    let run_dir = experiment.run_dir();
    let lock = Arc::new(lock(&run_dir)?);
    let data = Dataset::prepare(&experiment.data, experiment.model.context, experiment.run.seed, &run_dir)?;
    resolve(&mut experiment, options, &data)?;
    let experiment_sha256 = sha256(experiment.to_toml().as_bytes());
    preflight(&experiment, &device, options)?;
    let text = data.train.tokens();
    let teacher = Teacher::load(&experiment.distill, &data.tokenizer, text, &experiment.model, &device)?;

    let checkpoints = Checkpoints::open(run_dir.join("checkpoints"), experiment.run.keep_checkpoints)?;
    let loaded = match options.resume {
        true => resumed(&checkpoints, &experiment_sha256, &run_dir)?,
        false => None,
    };
    write(&run_dir.join("experiment.toml"), experiment.to_toml().as_bytes())?;

    let autodiff = device.clone().autodiff();
    // A checkpoint has all weights.
    let model = match experiment.run.start_from.is_empty() || loaded.is_some() {
        true => experiment.model.init(&experiment.quant, experiment.run.seed, &autodiff),
        false => begun(&experiment, &autodiff)?,
    };
    let model = model.with_lora(&experiment.lora, experiment.run.seed);
    let codes = CodeTracker::new(&model.valid());
    let schedule = Schedule::new(&experiment.schedule, experiment.run.steps);
    let plan = TrainPlan { optim: experiment.optim.clone(), schedule, teacher };
    let guard = SpikeGuard { factor: experiment.run.spike_factor };
    let trainer = match loaded {
        None => {
            let state = TrainState { seed: experiment.run.seed, ..TrainState::default() };
            plan.trainer(model, state, guard)
        }
        Some(loaded) => plan.resume(model, loaded, guard)?,
    };
    let step = trainer.state().step;

    let metrics_path = run_dir.join("metrics.jsonl");
    let at_metrics = |source| TrainError::Write { path: metrics_path.clone(), source };
    let metrics = MetricsFile::open(&metrics_path, (step > 0).then_some(step)).map_err(at_metrics)?;
    let history = report::read(&metrics_path).map_err(at_metrics)?;
    let path = run_dir.join("samples.txt");
    report::keep_samples(&path, options.resume.then_some(step))
        .map_err(|source| TrainError::Write { path, source })?;
    let size = trainer.model().size();
    let tui = std::io::stdout().is_terminal() && !options.quiet;
    let run = &experiment.run;
    let train = LmLoader::training(
        data.train.clone(),
        run.batch_size,
        run.accumulation,
        run.steps * run.accumulation,
        &autodiff,
    );
    let valid = LmLoader::evaluation(data.valid.clone(), run.batch_size, run.eval_windows, &device);
    let tokenizer = data.tokenizer.clone();
    let session = Session {
        experiment: experiment.clone(),
        experiment_sha256,
        run_dir: run_dir.clone(),
        lock: lock.clone(),
        device: autodiff,
        tokenizer: data.tokenizer,
        train: data.train,
        valid: data.valid,
        checkpoints,
        metrics,
        history,
        codes,
        size,
        prints: !tui && !options.quiet,
    };
    let intervals_done = step / run.eval_every;
    let learner = trainer.learner();
    let outcome = Arc::new(Mutex::new(None));
    let strategy = StepStrategy { session: Mutex::new(Some((session, trainer))), outcome: outcome.clone() };

    let mut training = SupervisedTraining::new(&run_dir, Arc::new(train), Arc::new(valid))
        .with_training_strategy(TrainingStrategy::Custom(Arc::new(strategy)))
        .with_metric_logger(InMemoryMetricLogger::default())
        .with_application_logger(None)
        .num_epochs(run.steps.div_ceil(run.eval_every))
        .checkpoint(intervals_done);
    for metric in metrics::all() {
        training = training.metric_train_numeric(metric.clone()).metric_valid_numeric(metric);
    }
    if !tui {
        training = training.renderer(Box::new(PlainRenderer));
    }
    let learned = training.launch(learner);
    drop(learned.renderer);

    let mut outcome =
        outcome.lock().expect("held for one line").take().expect("the strategy leaves an outcome");
    let mut result = summarize(&experiment, &device, &outcome);
    result.wall_s = started.elapsed().as_secs_f64();
    let size = learned.model.model.size();
    result.parameters = size.parameters as u64;
    result.fp32_bytes = size.fp32_bytes() as u64;
    result.packed_bytes = size.packed_bytes() as u64;
    let mut failed = outcome.error.take();
    expect_in_place(&lock, &run_dir)?;
    if failed.is_none() && learned.error.is_none() {
        let model = learned.model.model.valid();
        export(&model, &tokenizer, &run_dir, &mut result);
        failed = export_adapter(&model, &experiment.run.start_from, &run_dir, &mut result).err();
    }
    result.error = failed.as_ref().map(ToString::to_string);
    let bytes = result.file_bytes.unwrap_or(result.packed_bytes);
    result.compression = Some(result.fp32_bytes as f64 / bytes as f64);
    illustrate(&run_dir, &result, &outcome)?;
    let path = run_dir.join("result.json");
    result.write(&path).map_err(|source| TrainError::Write { path, source })?;
    match (failed, learned.error) {
        (Some(error), _) => Err(error),
        (None, Some(error)) => Err(TrainError::Burn(error.to_string())),
        (None, None) => Ok(result),
    }
}

/// The model that `run.start_from` names.
fn begun(experiment: &Experiment, device: &Device) -> Result<DuckQuantized, TrainError> {
    let Experiment { model, quant, run, lora, .. } = experiment;
    let path = Path::new(&run.start_from);
    let start = match lora.is_on() {
        true => frozen_model(path, quant)?,
        false => start_model(path)?,
    };
    let begun = model.init_from(&start, quant, run.seed, device).map_err(|error| {
        let origin = format!("run.start_from = \"{}\"", run.start_from);
        TrainError::Experiment { origin, message: error.to_string() }
    })?;
    if lora.is_on() {
        check_frozen(&begun.valid(), &start)?;
    }
    Ok(begun)
}

/// Products of other factors than floats, and moments at eight bits, are there on flex only, yet.
fn check_device(experiment: &Experiment, device: &Device) -> Result<(), TrainError> {
    if device::device("flex").is_ok_and(|flex| flex == *device) {
        return Ok(());
    }
    let key = if experiment.quant.compute != Products::Float {
        "quant.compute"
    } else if experiment.optim.moments != Moments::Float {
        "optim.moments"
    } else {
        return Ok(());
    };
    let message = format!(
        "{key}: {} has \"float\" only; expected that, or run.device = \"flex\"",
        device::describe(device)
    );
    Err(TrainError::Experiment { origin: experiment.run.name.clone(), message })
}

/// Puts in what only the data can tell: the vocabulary, and the steps of so many epochs.
pub(super) fn resolve(
    experiment: &mut Experiment,
    options: &RunOptions,
    data: &Dataset,
) -> Result<(), TrainError> {
    let found = data.tokenizer.vocab_size();
    let vocab_size = &mut experiment.model.vocab_size;
    if *vocab_size == 0 {
        *vocab_size = found;
    }
    if *vocab_size < found {
        let message = format!(
            "model.vocab_size = {vocab_size}: the tokenizer `{}` has {found} tokens; expected 0 (as many as the \
             tokenizer has) or at least {found}",
            experiment.data.tokenizer
        );
        return Err(TrainError::Experiment { origin: experiment.run.name.clone(), message });
    }
    if let Some(epochs) = options.epochs {
        let windows = epochs * data.train.per_epoch() as f64;
        let windows_a_step = experiment.run.batch_size * experiment.run.accumulation;
        experiment.run.steps = (windows / windows_a_step as f64).ceil().max(1.0) as usize;
    }
    Ok(())
}

/// Says what is about to happen, and refuses what cannot fit into memory.
fn preflight(experiment: &Experiment, device: &Device, options: &RunOptions) -> Result<(), TrainError> {
    let needed = memory_estimate(experiment);
    let run = &experiment.run;
    let tokens = run.steps * run.batch_size * run.accumulation * experiment.model.context;
    if !options.quiet {
        let trained = match experiment.lora.is_on() {
            true => format!(", {} of adapters trained", experiment.lora.num_params(&experiment.model)),
            false => String::new(),
        };
        let mut line = format!(
            "{}: {} parameters{trained}, {} steps, {:.2} M tokens, about {} MiB, on {}",
            run.name,
            experiment.model.num_params(),
            run.steps,
            tokens as f64 / 1e6,
            needed >> 20,
            device::describe(device)
        );
        if !device::is_cpu(device) {
            line += "\nthe first steps tune their kernels and take longer";
        }
        if device::is_software(device) {
            line += "\nthis is a program that poses as a graphics card: --device flex is faster";
        }
        let _ = writeln!(std::io::stdout(), "{line}");
    }
    match device::available_memory_bytes() {
        Some(available) if device::is_cpu(device) && needed > available => {
            Err(TrainError::MemoryTooSmall { needed, available })
        }
        _ => Ok(()),
    }
}

/// Bytes that training takes, roughly: latent and fake quantized weights, gradients, optimizer moments and one
/// temporary, of which a frozen model has the first two; and the activations that the backward pass reads.
fn memory_estimate(Experiment { model, run, lora, optim, .. }: &Experiment) -> u64 {
    let trained = |params: usize| match optim.moments {
        Moments::Float => 6 * params,
        Moments::Int8 => 9 * params / 2,
    };
    let weights = match lora.is_on() {
        true => 2 * model.num_params() + trained(lora.num_params(model)),
        false => trained(model.num_params()),
    };
    let tokens = run.batch_size * model.context;
    let layer = 16 * model.d_model + 8 * model.d_ff + 4 * model.n_heads * model.context;
    let activations = tokens * (model.n_layers * layer + 6 * model.vocab_size);
    4 * (weights + activations) as u64
}

/// The checkpoint to go on from; warns of those that were refused.
fn resumed(
    checkpoints: &Checkpoints,
    experiment_sha256: &str,
    run_dir: &Path,
) -> Result<Option<Loaded>, TrainError> {
    let Some(loaded) = checkpoints.latest_good()? else {
        eprintln!("{}: no checkpoint yet, starting from the first step", run_dir.display());
        return Ok(None);
    };
    for refusal in &loaded.refused {
        eprintln!("warning: {refusal}");
    }
    if loaded.experiment_sha256 != experiment_sha256 {
        let message = format!(
            "the run in {} was made by another experiment (see experiment.toml there); expected the same settings to \
             resume it",
            run_dir.display()
        );
        return Err(TrainError::Experiment { origin: "--resume".into(), message });
    }
    eprintln!("resuming {} at step {}", loaded.path.display(), loaded.state.step);
    Ok(Some(loaded))
}

fn summarize(experiment: &Experiment, device: &Device, outcome: &Outcome) -> RunResult {
    let run = &experiment.run;
    let train = outcome.history.train.last();
    let valid = outcome.history.valid.last();
    let step = outcome.state.step;
    RunResult {
        device: device::describe(device),
        threads: rayon::current_num_threads(),
        steps: step,
        tokens: outcome.state.tokens,
        tokens_per_s: outcome.state.tokens as f64 / outcome.state.elapsed_s.max(1e-9),
        peak_rss_bytes: device::peak_rss_bytes(),
        start_float_loss: outcome.state.start.map(|start| start.float),
        start_rounded_loss: outcome.state.start.map(|start| start.rounded),
        train_loss: train.map(|report| report.loss),
        valid_loss: valid.map(|report| report.loss),
        valid_bits_per_byte: valid.and_then(|report| report.bits_per_byte),
        valid_perplexity: valid.map(|report| report.perplexity()),
        best_valid_loss: outcome.state.best_valid_loss,
        best_valid_step: outcome.best_valid_step,
        zero_fraction: valid.and_then(|report| report.zero_fraction),
        bits_per_weight: valid.and_then(|report| report.bits_per_weight),
        skipped_steps: outcome.state.skipped_steps,
        rollbacks: outcome.state.rollbacks,
        finished: step == run.steps,
        ..RunResult::new(&run.name, run.seed)
    }
}

/// Leaves the model in the run folder as other programs load it; that no file can hold it is no error of the run.
fn export(model: &DuckQuantized, tokenizer: &Tokenizer, run_dir: &Path, result: &mut RunResult) {
    let path = run_dir.join("model.gguf");
    let written = export_for_inference(model, Some(tokenizer), &result.name).and_then(|packed| {
        write_model(&packed, &path, &WriteOptions::default())?;
        Ok(())
    });
    match written {
        Ok(()) => result.file_bytes = fs::metadata(&path).ok().map(|file| file.len()),
        Err(error) => result.no_file = Some(error.to_string()),
    }
}

/// Leaves the adapters in the run folder, as PEFT loads them beside `base`.
fn export_adapter(
    model: &DuckQuantized,
    base: &str,
    run_dir: &Path,
    result: &mut RunResult,
) -> Result<(), TrainError> {
    let Some(adapter) = model.adapter().map_err(ExportError::from)? else {
        return Ok(());
    };
    let path = run_dir.join("adapter");
    if path.exists() {
        // Of a session of this run that ended here too.
        disk::remove_folder(&path).map_err(|source| TrainError::Write { path: path.clone(), source })?;
    }
    write_adapter(&adapter, &model.config().spec(), base, &path).map_err(ExportError::from)?;
    result.adapter_bytes = Some(adapter.bytes() as u64);
    Ok(())
}

/// The pictures of a run.
fn illustrate(run_dir: &Path, result: &RunResult, outcome: &Outcome) -> Result<(), TrainError> {
    let History { train, valid } = &outcome.history;
    let path = run_dir.join("loss.svg");
    let title = format!("{}, seed {}", result.name, result.seed);
    plot::loss_curve(&path, train, valid, &title).map_err(|source| TrainError::Write { path, source })?;
    if !outcome.counts.is_empty() {
        let path = run_dir.join("codes.svg");
        plot::code_histogram(&path, &outcome.counts).map_err(|source| TrainError::Write { path, source })?;
    }
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    write_atomic(path, bytes).map_err(|source| TrainError::Write { path: path.into(), source })
}
