//! A whole run: data, model, Burn's `SupervisedTraining`, and the files that stay.

use super::checkpoint::{CheckpointError, Checkpoints, Loaded};
use super::command::{Claim, move_aside};
use super::identity::{Identity, Inputs, model_digest};
use super::run_folder::{check_frozen, frozen_model, read_template, start_model, write_template};
use super::signals::Signals;
use super::training_loop::{Outcome, Session, StepStrategy, expect_in_place};
use super::{
    Experiment, TrainError,
    experiment::{LARGEST_COUNT, RunConfig},
};
use crate::data::{DataError, Dataset, LmLoader, Texts};
use crate::device;
use crate::nn::DuckQuantized;
use crate::quant::Products;
use crate::report::burn_metrics;
use crate::report::code_stats::CodeTracker;
use crate::report::display::Display;
use crate::report::plot;
use crate::report::progress::{PlainRenderer, ProgressLine, say};
use crate::report::terminal::{self, Screen};
use crate::report::{self, History, MetricsFile, Place, RunResult, write_atomic};
use crate::train::distill::{Teacher, TeacherFile};
use crate::train::optim::Moments;
use crate::train::schedule::Schedule;
use crate::train::{SpikeGuard, TrainPlan, TrainState};
use crate::{ExportError, ImportError, export_for_inference};
use burn::module::Module;
use burn::tensor::Device;
use burn::train::logger::InMemoryMetricLogger;
use burn::train::{SupervisedTraining, TrainingStrategy};
use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use ternary_format::{
    PackedModel, Tokenizer, WriteOptions,
    chat::{self, encode_prompt},
    disk::{self, RunLock},
    huggingface::write_adapter,
    memory, write_model,
};

/// How a run is run; what it computes is the experiment's alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunOptions {
    /// Go on from the last good checkpoint of the run folder, if it has one.
    pub resume: bool,
    /// Print warnings and the summary only.
    pub quiet: bool,
    /// Print lines on a terminal too, in place of the full-screen display.
    pub plain: bool,
    /// Passes over the training text, in place of the experiment's steps.
    pub epochs: Option<f64>,
    /// On INT, TERM and HUP, save a checkpoint after the current step and end with [`TrainError::Interrupted`]; another signal ends
    /// the process at once. For programs that do nothing else; after the run these signals are ignored.
    pub signals: bool,
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
        ternary_kernels::release_cached_memory();
    }
}

/// Runs an experiment, or goes on with it.
///
/// Leaves in the run folder: `experiment.toml` (resolved), `tokenizer.json`, token files, `metrics.jsonl`,
/// `samples.txt`, `chat_template.jinja` (where the model has one), `checkpoints/`, `model.gguf` (where a model file can hold the model), `adapter/` (where `[lora]` is
/// on), `loss.svg`, `codes.svg` (not for a float twin) and `result.json`; the last three also when the run stops with an
/// error after its first step.
///
/// The run folder is locked from the start to the end: [`TrainError::Lock`] names the process that has it already.
///
/// # Errors
/// Every [`TrainError`].
pub fn run(experiment: Experiment, options: &RunOptions) -> Result<RunResult, TrainError> {
    run_claimed(experiment, options, |run_dir| Ok(RunLock::acquire(run_dir)?.into()))
}

/// The same, in a folder that `claim` locks before anything is written.
pub(crate) fn run_claimed(
    mut experiment: Experiment,
    options: &RunOptions,
    claim: impl FnOnce(&Path) -> Result<Claim, TrainError>,
) -> Result<RunResult, TrainError> {
    let _memory = StepMemory;
    let started = Instant::now();
    device::start_threads()?;
    let device = device::device(&experiment.run.device)?;
    check_device(&experiment, &device)?;
    Texts::expect_there(&experiment.data)?;
    let run_dir = experiment.run_dir();
    let Claim { lock, replaced } = claim(&run_dir)?;
    let lock = Arc::new(lock);
    let loaded = match options.resume {
        true => resumed(&run_dir)?,
        false => None,
    };
    let texts = Texts::read(&experiment.data, &run_dir, loaded.is_some())?;
    resolve_vocabulary(&mut experiment, &texts.tokenizer)?;
    let teacher = TeacherFile::open(&experiment.distill)?;
    let (start, start_digest) = start(&experiment, loaded.as_ref())?;
    let read = [
        (&experiment.run.start_from, start.as_ref().map_or(&[][..], |model| &model.warnings)),
        (&experiment.distill.teacher, teacher.as_ref().map_or(&[][..], TeacherFile::warnings)),
    ];
    // `duck convert` starts from the model that teaches.
    let warnings: BTreeSet<_> = read
        .into_iter()
        .flat_map(|(path, warnings)| warnings.iter().map(move |warning| (path, warning)))
        .collect();
    for (path, warning) in warnings {
        say(format_args!("warning: {path}: {warning}"));
    }
    let inputs = Inputs {
        teacher: teacher.as_ref().map(TeacherFile::digest),
        start: start_digest,
        ..Inputs::of(&texts)
    };
    let mut identity = Identity::new(&experiment, inputs);
    if let Some(loaded) = &loaded {
        if loaded.identity.is_none() {
            say(format_args!(
                "warning: {} is of an older version and has no digests: texts, tokenizer, teacher and model to start from are \
                 taken for those of the run",
                loaded.path.display()
            ));
        }
        let mut asked = experiment.clone();
        identity.expect_same(loaded, &run_dir, &experiment.schedule, |same_text| {
            if options.epochs.is_some() {
                if !same_text {
                    return Ok(None);
                }
                let windows = texts.windows(asked.model.context, &run_dir)?;
                resolve_steps(&mut asked, options, windows)?;
            }
            Ok(Some(asked.run.steps))
        })?;
        say(format_args!("resuming {} at step {}", loaded.path.display(), loaded.state.step));
    }
    let held = loaded.as_ref().map_or(0, |loaded| loaded.bytes);
    let taught = teacher.as_ref().map_or(0, TeacherFile::bytes);
    check_memory(&experiment, &device, taught, held)?;
    let automatic = texts.sample_prompts();
    if experiment.run.sample_prompts.is_empty() {
        experiment.run.sample_prompts = automatic.clone();
    }
    // From here on files are written.
    move_aside(&run_dir, replaced).map_err(|source| TrainError::Write { path: run_dir.clone(), source })?;
    let data = texts.prepare(experiment.model.context, experiment.run.seed, &run_dir)?;
    resolve_steps(&mut experiment, options, data.train.per_epoch())?;
    identity.steps = experiment.run.steps;
    preflight(&experiment, &data, &device, options)?;
    let chats = data.train.tokens().has_dialogues();
    let template = chat_template(chats, &experiment, start.as_ref(), &run_dir)?;
    let prompts = sample_prompts(&experiment.run, &data.tokenizer);
    let prompt = prompts.first().map(|(prompt, _)| prompt).or(automatic.first()).cloned();
    let text = data.train.tokens();
    let Experiment { distill, model, .. } = &experiment;
    let teacher =
        teacher.map(|file| Teacher::new(file, distill, &data.tokenizer, text, model, &device)).transpose()?;

    let checkpoints = Checkpoints::open(
        run_dir.join("checkpoints"),
        experiment.run.keep_checkpoints,
        experiment.run.checkpoint_every,
    )?;
    remove_results(&run_dir)?;
    write(&run_dir.join("experiment.toml"), experiment.to_toml().as_bytes())?;
    write_template(&run_dir, template.as_deref())?;

    let autodiff = device.clone().autodiff();
    let model = match (start, &loaded) {
        (Some(start), None) => begun(&experiment, &start, &autodiff)?,
        // A checkpoint has all weights.
        _ => experiment.model.init(&experiment.quant, experiment.run.seed, &autodiff),
    };
    let model = model.with_lora(&experiment.lora, experiment.run.seed);
    let codes = match loaded.as_ref().and_then(|loaded| Some((loaded, loaded.codes.as_ref()?))) {
        Some((loaded, bytes)) => {
            let unfit = || CheckpointError::unfit_codes(&loaded.path);
            Some(CodeTracker::from_bytes(bytes, &model.valid()).ok_or_else(unfit)?)
        }
        None => CodeTracker::new(&model.valid()),
    };
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
    let TrainState { step, elapsed_s: earlier, .. } = *trainer.state();

    let metrics_path = run_dir.join("metrics.jsonl");
    let at_metrics = |source| TrainError::Write { path: metrics_path.clone(), source };
    let metrics = MetricsFile::open(&metrics_path, (step > 0).then_some(step)).map_err(at_metrics)?;
    let history = report::read(&metrics_path).map_err(at_metrics)?;
    let path = run_dir.join("samples.txt");
    report::keep_samples(&path, options.resume.then_some(step))
        .map_err(|source| TrainError::Write { path, source })?;
    let size = trainer.model().size();
    let run = &experiment.run;
    let epochs_per_step = (run.batch_size * run.accumulation) as f64 / data.train.per_epoch() as f64;
    let display = (terminal::can_draw() && !options.quiet && !options.plain)
        .then(|| Display::new(format!("{}-{}", run.name, run.seed), run.steps, epochs_per_step));
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
        identity,
        run_dir: run_dir.clone(),
        lock: lock.clone(),
        device: autodiff,
        tokenizer: data.tokenizer,
        prompts,
        train: data.train,
        valid: data.valid,
        checkpoints,
        metrics,
        history,
        codes,
        size,
        prints: display.is_none() && !options.quiet,
        display: display.clone(),
        samples: Vec::new(),
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
    for metric in burn_metrics::all() {
        training = training.metric_train_numeric(metric.clone());
        if metric.validates() {
            training = training.metric_valid_numeric(metric);
        }
    }
    let interrupter = training.interrupter();
    let signals =
        options.signals.then(|| Signals::listen(interrupter.clone(), display.is_none())).transpose();
    let _signals =
        signals.map_err(|error| TrainError::Burn(format!("signals cannot be handled: {error}")))?;
    let screen = match display {
        Some(display) => {
            training = training.renderer(Box::new(display.clone()));
            let opened = Screen::open(display, interrupter, options.signals);
            Some(opened.map_err(TrainError::Terminal)?)
        }
        None => {
            training = training.renderer(Box::new(PlainRenderer));
            None
        }
    };
    let learned = training.launch(learner);
    let mut outcome =
        outcome.lock().expect("held for one line").take().expect("the strategy leaves an outcome");
    if screen.is_some() {
        drop(screen);
        // The display is gone with them.
        for (prompt, text) in &outcome.samples {
            let _ = writeln!(std::io::stdout(), "{}", ProgressLine::sample_dimmed(prompt, text));
        }
    }
    let mut archive = None;
    let mut result = summarize(&experiment, &device, &outcome);
    result.wall_s = earlier + started.elapsed().as_secs_f64();
    let size = learned.model.model.size();
    result.parameters = size.parameters as u64;
    result.fp32_bytes = size.fp32_bytes() as u64;
    result.packed_bytes = size.packed_bytes() as u64;
    for warning in doubtful(&outcome.state) {
        say(format_args!("warning: {warning}"));
    }
    let mut failed = outcome.error.take();
    expect_in_place(&lock, &run_dir)?;
    if failed.is_none() && outcome.interrupted {
        let (steps, path) = (experiment.run.steps, run_dir.clone());
        failed = Some(TrainError::Interrupted { step: result.steps, steps, path });
    }
    if failed.is_none() && learned.error.is_none() {
        let model = learned.model.model.valid();
        archive = export(&model, &tokenizer, template, &run_dir, &mut result);
        failed = export_adapter(&model, &experiment.run.start_from, &run_dir, &mut result).err();
    }
    result.error = failed.as_ref().map(ToString::to_string);
    let bytes = result.file_bytes.unwrap_or(result.packed_bytes);
    result.compression = Some(result.fp32_bytes as f64 / bytes as f64);
    let path = run_dir.join("result.json");
    let written = result.write(&path).map_err(|source| TrainError::Write { path, source });
    let drawn = illustrate(&run_dir, &result, &outcome);
    // The first error is the cause of the others.
    if let Some(error) = failed.or(learned.error.map(|error| TrainError::Burn(error.to_string()))) {
        return Err(error);
    }
    written?;
    drawn?;
    result.place = Some(Place { run_dir, chats, prompt, archive });
    Ok(result)
}

/// Removes what an earlier end of the run has left, before the run goes on: it would be taken for the run as it is now. The
/// checkpoint that the run goes on from has all that is lost.
fn remove_results(run_dir: &Path) -> Result<(), TrainError> {
    let at = |name: &str| run_dir.join(name);
    let remove = |path: PathBuf, removed: io::Result<()>| match removed {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(TrainError::Write { path, source }),
        _ => Ok(()),
    };
    for name in ["result.json", "model.gguf", "loss.svg", "codes.svg"] {
        remove(at(name), fs::remove_file(at(name)))?;
    }
    remove(at("adapter"), disk::remove_folder(&at("adapter")))
}

/// What `run.start_from` names, and its digest; `None` where the experiment names none.
///
/// The checkpoint of a resumed run has all weights: where the model is gone, the digest is the recorded one, with a warning.
fn start(
    experiment: &Experiment,
    loaded: Option<&Loaded>,
) -> Result<(Option<PackedModel>, Option<String>), TrainError> {
    let path = Path::new(&experiment.run.start_from);
    if path.as_os_str().is_empty() {
        return Ok((None, None));
    }
    let model = match experiment.lora.is_on() {
        true => frozen_model(path, &experiment.quant),
        false => start_model(path),
    };
    let recorded =
        loaded.map(|loaded| loaded.identity.as_ref().map(|identity| identity.inputs.start.clone()));
    match (model, recorded) {
        (Ok(model), _) => {
            model.check_finite().map_err(ImportError::from)?;
            let digest = model_digest(&model);
            Ok((Some(model), Some(digest)))
        }
        // Not a run that started from nothing.
        (Err(error), Some(recorded)) if recorded != Some(None) => {
            say(format_args!(
                "warning: {error}; run.start_from cannot be compared, the checkpoint has all weights"
            ));
            Ok((None, recorded.flatten()))
        }
        (Err(error), _) => Err(error),
    }
}

/// The model that a run begins with, made from `start`.
fn begun(experiment: &Experiment, start: &PackedModel, device: &Device) -> Result<DuckQuantized, TrainError> {
    let Experiment { model, quant, run, lora, .. } = experiment;
    let begun = model.init_from(start, quant, run.seed, device).map_err(|error| {
        let origin = format!("run.start_from = \"{}\"", run.start_from);
        TrainError::Experiment { origin, message: error.to_string() }
    })?;
    if lora.is_on() {
        check_frozen(&begun.valid(), start)?;
    }
    Ok(begun)
}

/// Products of other factors than floats, and moments at eight bits, are there on flex only, yet.
fn check_device(experiment: &Experiment, device: &Device) -> Result<(), TrainError> {
    if is_flex(device) {
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

fn is_flex(device: &Device) -> bool {
    device::device("flex").is_ok_and(|flex| flex == *device)
}

/// Puts in what only the tokenizer can tell: the vocabulary.
pub(crate) fn resolve_vocabulary(
    experiment: &mut Experiment,
    tokenizer: &Tokenizer,
) -> Result<(), TrainError> {
    let found = tokenizer.vocab_size();
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
    Ok(())
}

/// Puts in what only the text can tell: the steps of so many epochs of `windows`.
fn resolve_steps(
    experiment: &mut Experiment,
    options: &RunOptions,
    windows: usize,
) -> Result<(), TrainError> {
    if let Some(epochs) = options.epochs {
        let windows_a_step = experiment.run.batch_size * experiment.run.accumulation;
        let steps = (epochs * windows as f64 / windows_a_step as f64).ceil().max(1.0);
        if steps > LARGEST_COUNT as f64 {
            let message = format!("{epochs} are {steps} steps; expected at most {LARGEST_COUNT} steps");
            return Err(TrainError::Experiment { origin: "--epochs".into(), message });
        }
        experiment.run.steps = steps as usize;
    }
    Ok(())
}

/// Says what is about to happen, and refuses what cannot be learned.
fn preflight(
    experiment: &Experiment,
    data: &Dataset,
    device: &Device,
    options: &RunOptions,
) -> Result<(), TrainError> {
    let needed = memory_estimate(experiment, device);
    let run = &experiment.run;
    let tokens = run.steps * run.batch_size * run.accumulation * experiment.model.context;
    let (windows, empty) = (data.train.per_epoch(), data.train.without_targets(usize::MAX));
    if empty == windows {
        return Err(DataError::NothingLearned { windows, context: experiment.model.context }.into());
    }
    for warning in without_effect(experiment, data) {
        say(format_args!("warning: {warning}"));
    }
    if !options.quiet {
        let trained = match experiment.lora.is_on() {
            true => format!(", {} of adapters trained", experiment.lora.num_params(&experiment.model)),
            false => String::new(),
        };
        let text = data.train.tokens();
        let learned = match text.target_tokens() as f64 / text.len() as f64 {
            1.0 => String::new(),
            share => format!(" ({:.1} % learned)", 100.0 * share),
        };
        let mut line = format!(
            "{}: {} parameters{trained}, {} steps, {:.2} M tokens{learned}, about {} MiB, on {}",
            run.name,
            experiment.model.num_params(),
            run.steps,
            tokens as f64 / 1e6,
            needed >> 20,
            device::describe(device)
        );
        if empty > 0 {
            let share = 100.0 * empty as f64 / windows as f64;
            line += &format!(
                "\n{share:.1} % of the training windows ({empty} of {windows}) have no learned token; a step of such \
                 windows alone changes nothing"
            );
        }
        if !device::is_cpu(device) {
            line += "\nthe first steps tune their kernels and take longer";
        }
        if device::is_software(device) {
            line += "\nthis is a program that poses as a graphics card: --device flex is faster";
        }
        let _ = writeln!(std::io::stdout(), "{line}");
    }
    Ok(())
}

/// An error where the run cannot fit into memory, with a teacher of so many bytes and of which so many are taken already.
pub(crate) fn check_memory(
    experiment: &Experiment,
    device: &Device,
    teacher: u64,
    held: u64,
) -> Result<(), TrainError> {
    if device::is_cpu(device) {
        memory::check((memory_estimate(experiment, device) + teacher).saturating_sub(held) + PROGRAM)?;
    }
    Ok(())
}

/// Bytes for all that is not a tensor: the threads that are still to be started, and their stacks. Burn panics where one cannot be.
const PROGRAM: u64 = 64 << 20;

/// What of the run has no effect.
fn without_effect(Experiment { run, schedule, .. }: &Experiment, data: &Dataset) -> Vec<String> {
    let mut warnings = Vec::new();
    if schedule.warmup_steps >= run.steps {
        warnings.push(format!(
            "schedule.warmup_steps = {}, but the run has {} steps: the learning rate never reaches its peak; \
             expected fewer warm-up steps or a longer run",
            schedule.warmup_steps, run.steps
        ));
    }
    let limit = if run.eval_windows == 0 { usize::MAX } else { run.eval_windows };
    let windows = limit.min(data.valid.per_epoch());
    if data.valid.without_targets(windows) == windows {
        warnings.push(format!(
            "the {windows} windows of the validation text have no learned token: the run has no validation loss; \
             expected a longer validation text or more run.eval_windows"
        ));
    }
    warnings
}

/// What makes the end of a run doubtful.
fn doubtful(state: &TrainState) -> Vec<String> {
    /// Nats per token by which the mean loss may rise again, as it does when weights become ternary.
    const RISE: f64 = 1.0;
    let mut warnings = Vec::new();
    if state.step > 0 && state.tokens == 0 {
        warnings.push(
            "no step had a learned token, so the weights are those of the start; expected a longer model.context or \
             shorter prompts"
                .into(),
        );
    }
    if let (Some(lowest), Some(end)) = (state.lowest_average, state.loss_average)
        && end > lowest + RISE
    {
        warnings.push(format!(
            "the mean training loss rose from {lowest:.3} to {end:.3}: the run diverges; expected a lower optim.lr or \
             optim.muon_lr"
        ));
    }
    warnings
}

/// The prompts of text samples as ids; warns of those that the tokenizer cannot express, which are left out.
fn sample_prompts(run: &RunConfig, tokenizer: &Tokenizer) -> Vec<(String, Vec<u32>)> {
    if run.sample_tokens == 0 {
        return Vec::new();
    }
    let encode = |prompt: &String| {
        let why = match encode_prompt(tokenizer, prompt) {
            Ok(ids) if !ids.is_empty() => return Some((prompt.clone(), ids)),
            Ok(_) => "the tokenizer makes no token of it".into(),
            Err(error) => DataError::from(error).to_string(),
        };
        say(format_args!("warning: run.sample_prompts: {prompt:?} is left out: {why}"));
        None
    };
    run.sample_prompts.iter().filter_map(encode).collect()
}

/// Bytes that training takes, roughly: latent and fake quantized weights, gradients, optimizer moments and one
/// temporary, of which a frozen model has the first two; the activations that the backward pass reads, with the scores of attention
/// except on flex, which computes them again; and copies of weights and moments while a checkpoint is written.
pub(crate) fn memory_estimate(
    Experiment { model, run, lora, optim, .. }: &Experiment,
    device: &Device,
) -> u64 {
    let trained = |params: usize| match optim.moments {
        Moments::Float => 9 * params,
        Moments::Int8 => 6 * params,
    };
    let weights = match lora.is_on() {
        true => 3 * model.num_params() + trained(lora.num_params(model)),
        false => trained(model.num_params()),
    };
    let tokens = run.batch_size * model.context;
    let scores = if is_flex(device) { 0 } else { 4 * model.n_heads * model.context };
    let layer = 16 * model.d_model + 8 * model.d_ff + scores;
    let activations = tokens * (model.n_layers * layer + 6 * model.vocab_size);
    4 * (weights + activations) as u64
}

/// The last good checkpoint of a run folder; `None` where its run has none yet.
///
/// # Errors
/// `Experiment`: the run has ended, and its checkpoints are gone.
pub(crate) fn last_checkpoint(run_dir: &Path) -> Result<Option<Loaded>, TrainError> {
    let loaded = Checkpoints::existing(run_dir.join("checkpoints")).latest_good()?;
    if loaded.is_none() && RunResult::read(&run_dir.join("result.json")).is_ok_and(|result| result.steps > 0)
    {
        let message = "holds a run that has ended, without a checkpoint; expected its checkpoints, or another run.name or \
                       run.seed (`train --overwrite` moves the run aside)";
        return Err(TrainError::Experiment {
            origin: run_dir.display().to_string(),
            message: message.into(),
        });
    }
    Ok(loaded)
}

/// The checkpoint to go on from; warns of those that were refused. `None`: the run was killed before its first checkpoint.
///
/// # Errors
/// As [`last_checkpoint`].
fn resumed(run_dir: &Path) -> Result<Option<Loaded>, TrainError> {
    let Some(loaded) = last_checkpoint(run_dir)? else {
        say(format_args!("{}: no checkpoint yet, starting from the first step", run_dir.display()));
        return Ok(None);
    };
    for refusal in &loaded.refused {
        say(format_args!("warning: {refusal}"));
    }
    Ok(Some(loaded))
}

fn summarize(experiment: &Experiment, device: &Device, outcome: &Outcome) -> RunResult {
    let run = &experiment.run;
    let train = outcome.history.train.iter().rfind(|report| report.tokens > 0);
    let valid = outcome.history.valid.last().filter(|report| report.tokens > 0);
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
        best_valid_step: outcome.state.best_valid_step,
        zero_fraction: valid.and_then(|report| report.zero_fraction),
        bits_per_weight: valid.and_then(|report| report.bits_per_weight),
        skipped_steps: outcome.state.skipped_steps,
        empty_steps: outcome.state.empty_steps,
        rollbacks: outcome.state.rollbacks,
        interrupted: outcome.interrupted,
        finished: step == run.steps,
        ..RunResult::new(&run.name, run.seed)
    }
}

/// How dialogues are written for the model: as its training texts have them, otherwise as the model that the run started from
/// has it. Where that model is gone, the run folder of a resumed run knows.
fn chat_template(
    chats: bool,
    experiment: &Experiment,
    start: Option<&PackedModel>,
    run_dir: &Path,
) -> Result<Option<String>, TrainError> {
    match start {
        _ if chats => Ok(Some(chat::TEMPLATE.into())),
        Some(start) => Ok(start.chat_template.clone()),
        None if experiment.run.start_from.is_empty() => Ok(None),
        None => read_template(run_dir),
    }
}

/// Leaves the model in the run folder as other programs load it; that no file can hold it is no error of the run.
/// Returns the name of the archive that holds a model which only GGUF cannot.
fn export(
    model: &DuckQuantized,
    tokenizer: &Tokenizer,
    template: Option<String>,
    run_dir: &Path,
    result: &mut RunResult,
) -> Option<String> {
    let path = run_dir.join("model.gguf");
    let packed = match export_for_inference(model, Some(tokenizer), &result.name) {
        Ok(packed) => PackedModel { chat_template: template, ..packed },
        Err(error) => {
            result.no_file = Some(error.to_string());
            return None;
        }
    };
    match write_model(&packed, &path, &WriteOptions::default()).map_err(ExportError::from) {
        Ok(()) => result.file_bytes = fs::metadata(&path).ok().map(|file| file.len()),
        Err(error) => {
            result.no_file = Some(error.to_string());
            return (!error.is_io()).then(|| format!("{}.ternary", result.name));
        }
    }
    None
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tokenizer;

    #[test]
    fn prompts_that_the_tokenizer_cannot_express_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        // Words, and none for those that are unknown.
        let words = r#"{"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": {"duck": 0, "swims": 1}, "unk_token": "[UNK]"}}"#;
        fs::write(&path, words).unwrap();
        let mut run = Experiment::load("experiments/00-default.toml").unwrap().run;
        run.sample_prompts =
            ["duck", "One day", "<|user|>swims", "", "<|user|>Who?"].map(String::from).into();
        let kept = |run: &RunConfig, tokenizer: &Tokenizer| -> Vec<String> {
            sample_prompts(run, tokenizer)
                .into_iter()
                .map(|(prompt, ids)| {
                    assert!(!ids.is_empty());
                    prompt
                })
                .collect()
        };
        let letters = Tokenizer::from_characters("cdikmsuw".chars().collect()).unwrap();
        for tokenizer in [letters, tokenizer::load(&path).unwrap()] {
            assert_eq!(kept(&run, &tokenizer), ["duck", "<|user|>swims", ""]);
        }
        assert_eq!(kept(&run, &Tokenizer::byte()).len(), 5);
        run.sample_tokens = 0;
        assert!(kept(&run, &Tokenizer::byte()).is_empty());
    }

    #[test]
    fn a_run_that_learned_nothing_or_lost_it_is_told() {
        let state = TrainState { step: 100, tokens: 99, ..TrainState::default() };
        let of = |lowest, end| TrainState {
            lowest_average: Some(lowest),
            loss_average: Some(end),
            ..state.clone()
        };
        assert_eq!(doubtful(&state), [""; 0]);
        assert_eq!(doubtful(&of(2.0, 2.9)), [""; 0]);
        assert!(doubtful(&of(2.5, 5.6))[0].contains("rose from 2.500 to 5.600"));
        assert!(doubtful(&TrainState { tokens: 0, ..state })[0].contains("no step had a learned token"));
    }

    #[test]
    fn a_warm_up_as_long_as_the_run_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let mut experiment = Experiment::load("experiments/00-default.toml").unwrap();
        experiment.data.tokenizer = "byte".into();
        let data = Dataset::prepare(&experiment.data, 64, 1, folder.path()).unwrap();
        assert_eq!(without_effect(&experiment, &data), [""; 0]);
        experiment.run.steps = 50;
        let warnings = without_effect(&experiment, &data);
        assert!(warnings[0].contains("schedule.warmup_steps = 50, but the run has 50 steps"), "{warnings:?}");
        experiment.schedule.warmup_steps = 49;
        assert_eq!(without_effect(&experiment, &data), [""; 0]);
    }
}
