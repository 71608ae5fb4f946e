//! A whole run, in five phases: prepare, build, train, export, summarize.

use super::checkpoint::{CheckpointError, Checkpoints, Identity, Inputs, Loaded};
use super::claim::Claim;
use super::context::RunContext;
use super::home::Home;
use super::initial_model::{init_from, load_initial_model};
use super::memory::{check_memory, memory_estimate};
use super::outputs::{self, Exported, write_plots};
use super::ranks::{Facts, Ranks};
use super::resolve::{check_device, resolve_steps, resolve_vocabulary};
use super::run_folder::{chat_template, checkpoint_to_resume, remove_results, write, write_template};
use super::signals::Signals;
use super::teacher::TeacherSource;
use super::training_loop::{Outcome, StepStrategy, TrainingLoop};
use super::warnings::{doubtful_end, sample_prompts, without_effect};
use super::{Experiment, TrainError, identity};
use crate::data::{DataError, Dataset, LmLoader, Texts};
use crate::device;
use crate::report::code_stats::CodeTracker;
use crate::report::progress::{PlainRenderer, ProgressLine};
use crate::report::screen::{Display, Screen};
use crate::report::{History, MetricsFile, Place, RunResult, burn_metrics, keep_samples, terminal};
use crate::train::distill::Teacher;
use crate::train::schedule::Schedule;
use crate::train::{LanguageModel, SpikeGuard, TrainPlan, TrainState};
use burn::module::Module;
use burn::tensor::Device;
use burn::train::logger::InMemoryMetricLogger;
use burn::train::{SupervisedTraining, TrainingStrategy};
use getset::WithSetters;
use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use ternary_format::{PackedModel, disk::RunLock, print_stderr};
use ternary_parallel::{Group, Phase};

/// How a run is executed; what it computes depends on the experiment alone.
#[derive(Clone, Default, WithSetters)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct RunOptions {
    /// Continue from the last good checkpoint of the run folder, if it has one.
    pub resume: bool,
    /// Print warnings and the summary only.
    pub quiet: bool,
    /// Print lines on a terminal too, instead of the full-screen display.
    pub plain: bool,
    /// Passes over the training text, instead of the experiment's steps.
    pub epochs: Option<f64>,
    /// On INT, TERM and HUP, save a checkpoint after the current step and end with [`TrainError::Interrupted`]; another signal ends
    /// the process at once. For programs that do nothing else; after the run these signals are ignored.
    pub signals: bool,
    /// The processes that share the run, this one included; `None`: it runs in this process alone. Every process of the group
    /// runs the same experiment with the same options. Process 0 writes the run folder, and the results are those of one process,
    /// bit for bit.
    pub group: Option<Arc<dyn Group>>,
    /// How long a process waits for the others, after the preparation, before it ends with exit code 8. Without it, ten times the
    /// median duration of a step, at least 60 s, and 30 minutes at evaluations and checkpoints.
    pub timeout: Option<Duration>,
}

/// Runs an experiment from its start, in an empty run folder.
///
/// # Errors
/// Every [`TrainError`].
pub fn train_duck_quantized(experiment: &Experiment) -> Result<RunResult, TrainError> {
    run(experiment.clone(), &RunOptions::default())
}

/// Returns the cached memory of training steps to the system when a run ends, well or not. Declared first, so that it is dropped
/// after everything that the run allocated.
struct AllocatorGuard;

impl Drop for AllocatorGuard {
    fn drop(&mut self) {
        #[cfg(feature = "flex")]
        ternary_kernels::release_cached_memory();
    }
}

/// Runs an experiment, or continues it.
///
/// Writes to the run folder: `experiment.toml` (resolved), `tokenizer.json`, token files, `valid.jsonl` (the validation documents),
/// `metrics.jsonl`, `samples.txt`, `chat_template.jinja` (where the model has one), `checkpoints/`, `model.gguf` (where a model file
/// can hold the model), `adapter/` (where `[lora]` is on), `loss.svg`, `codes.svg` (with the feature `plot`; codes not for a float twin) and
/// `result.json`; the last three also when the run stops with an error after its first step.
///
/// The run folder is locked from the start to the end: [`TrainError::Lock`] names the process that has it already.
///
/// # Errors
/// Every [`TrainError`].
pub fn run(experiment: Experiment, options: &RunOptions) -> Result<RunResult, TrainError> {
    run_claimed(Ok(experiment), options, |run_dir| Ok(RunLock::acquire(run_dir)?.into()))
}

/// The same, in a folder that `claim` locks before anything is written. An experiment that one process cannot read ends all.
pub(super) fn run_claimed(
    experiment: Result<Experiment, TrainError>,
    options: &RunOptions,
    claim: impl FnOnce(&Path) -> Result<Claim, TrainError>,
) -> Result<RunResult, TrainError> {
    let _guard = AllocatorGuard;
    let started = Instant::now();
    let (run, inputs) = prepare(experiment, options, claim)?;
    let run = Arc::new(run);
    let training = run.ranks.agree(build(&run, inputs, options))?;
    let mut trained = train(&run, training, options, started)?;
    let exported = export(&run, &mut trained)?;
    summarize(&run, trained, exported)
}

/// Inputs of a run that are loaded.
struct LoadedInputs {
    /// The model that `run.start_from` names.
    initial: Option<PackedModel>,
    /// The checkpoint that the run continues.
    checkpoint: Option<Loaded>,
    teacher: Option<Teacher>,
    /// The folder of checkpoints, open for writing.
    checkpoints: Checkpoints,
}

/// Claims the run folder, reads and checks all inputs, and writes the prepared texts and settings. Nothing is written before all
/// inputs are known to be good, on every process.
fn prepare(
    experiment: Result<Experiment, TrainError>,
    options: &RunOptions,
    claim: impl FnOnce(&Path) -> Result<Claim, TrainError>,
) -> Result<(RunContext, LoadedInputs), TrainError> {
    let ranks = Ranks::new(options.group.clone(), options.timeout);
    let mut experiment = ranks.agree(experiment)?;
    let device = ranks.agree(check_start(&experiment, &ranks))?;
    ranks.expect_same(&settings(&experiment, options, &device))?;
    let home = ranks.agree(Home::new(&experiment.run_dir(), ranks.is_first(), claim))?;
    let run_dir = home.dir();
    if let Home::Scratch(scratch) = &home {
        ranks.remove_at_exit(scratch.path());
    }
    let found = ranks.on_first(|| match options.resume {
        true => checkpoint_to_resume(run_dir),
        false => Ok(None),
    });
    let checkpoint = ranks.share_checkpoint(found, run_dir)?;
    let texts = read_texts(&experiment, run_dir, checkpoint.is_some(), &ranks)?;
    ranks.agree(resolve_vocabulary(&mut experiment, &texts.tokenizer))?;
    let teacher = ranks.agree(TeacherSource::open(&experiment.distill))?;
    let (initial, initial_digest) = ranks.agree(load_initial_model(&experiment, checkpoint.as_ref()))?;
    if ranks.is_first() {
        print_reader_warnings(&experiment, initial.as_ref(), teacher.as_ref());
    }
    let inputs = Inputs {
        teacher: teacher.as_ref().map(TeacherSource::digest),
        start: initial_digest,
        ..Inputs::of(&texts)
    };
    ranks.expect_same(&identity::facts(&inputs))?;
    let mut identity = Identity::new(&experiment, inputs, &device);
    if let Some(loaded) = &checkpoint {
        let checked = ranks.on_first(|| expect_same_run(&experiment, options, &texts, &identity, loaded));
        ranks.agree(checked)?;
        ranks.saved(
            &experiment.run_dir().join("checkpoints").join(loaded.path.file_name().unwrap_or_default()),
        );
    }
    let checkpoint_bytes = checkpoint.as_ref().map_or(0, |loaded| loaded.bytes);
    let teacher_bytes = teacher.as_ref().map_or(0, TeacherSource::bytes);
    ranks.agree(check_memory(&experiment, &device, teacher_bytes, checkpoint_bytes))?;
    let text_prompts = texts.sample_prompts();
    if experiment.run.sample_prompts.is_empty() {
        experiment.run.sample_prompts = text_prompts.clone();
    }
    // From here on files are written.
    let data = prepare_texts(texts, &experiment, &home, &ranks)?;
    ranks.agree(resolve_steps(&mut experiment, options.epochs, data.train.per_epoch()))?;
    identity.steps = experiment.run.steps;
    ranks.agree(ranks.on_first(|| preflight(&experiment, &data, &device, options, &ranks)))?;
    let chats = data.train.tokens().makes_chat_model();
    let chat_template =
        ranks.agree(ranks.on_first(|| chat_template(chats, &experiment, initial.as_ref(), run_dir)))?;
    let prompts = sample_prompts(&experiment.run, &data.tokenizer);
    let example_prompt = prompts.first().map(|(prompt, _)| prompt).or(text_prompts.first()).cloned();
    let Experiment { distill, model, .. } = &experiment;
    let text = data.train.tokens();
    let teacher =
        teacher.map(|source| source.load(distill, &data.tokenizer, text, model, &device)).transpose();
    let teacher = ranks.agree(teacher)?;
    let display = if ranks.is_first() { open_display(&experiment, options, &data) } else { None };
    let opened = match ranks.is_first() {
        true => open_folder(&experiment, run_dir, chat_template.as_deref()),
        false => Ok(Checkpoints::existing(run_dir.join("checkpoints"))),
    };
    let checkpoints = ranks.agree(opened)?;
    let prints = ranks.is_first() && display.is_none() && !options.quiet;
    let run = RunContext {
        experiment,
        identity,
        home,
        ranks,
        device,
        data,
        chat_template,
        prompts,
        example_prompt,
        display,
        prints,
    };
    Ok((run, LoadedInputs { initial, checkpoint, teacher, checkpoints }))
}

/// What can be checked before a folder is locked: threads, device, texts, and the number of processes. Returns the device.
fn check_start(experiment: &Experiment, ranks: &Ranks) -> Result<Device, TrainError> {
    let micro_batches = experiment.run.gradient_accumulation;
    if !micro_batches.is_multiple_of(ranks.size()) {
        let counts = (1..=micro_batches).filter(|count| micro_batches.is_multiple_of(*count));
        let counts = counts.map(|count| count.to_string()).collect::<Vec<_>>().join(", ");
        return Err(TrainError::Experiment {
            origin: format!("run.gradient_accumulation = {micro_batches}"),
            message: format!(
                "the micro-batches of a step are shared among {} processes; expected a number of processes that divides them: \
                 {counts}",
                ranks.size()
            ),
        });
    }
    device::start_threads()?;
    let device = device::device(&experiment.run.device)?;
    check_device(experiment, &device)?;
    Texts::expect_there(&experiment.data)?;
    Ok(device)
}

/// What must be equal on all processes before they begin: settings, program, and the instruction sets, which decide the last bits.
fn settings(experiment: &Experiment, options: &RunOptions, device: &Device) -> Facts {
    let mut facts = identity::all_settings(experiment);
    let program = RunResult::new("", 0);
    let commit = program.git.unwrap_or_default();
    let changed = if program.git_dirty == Some(true) { " with changes" } else { "" };
    facts.extend([
        ("the program".into(), format!("{} {commit}{changed}", program.version)),
        ("the device".into(), device::describe(device)),
        ("the instruction sets".into(), device::instruction_sets()),
        ("--resume".into(), options.resume.to_string()),
        ("--epochs".into(), options.epochs.map_or("missing".into(), |epochs| epochs.to_string())),
    ]);
    facts
}

/// The texts of a run, with the tokenizer of process 0.
fn read_texts(
    experiment: &Experiment,
    run_dir: &Path,
    resumes: bool,
    ranks: &Ranks,
) -> Result<Texts, TrainError> {
    let first = ranks.agree(ranks.on_first(|| Ok(Some(Texts::read(&experiment.data, run_dir, resumes)?))))?;
    if ranks.size() == 1 {
        return first.ok_or_else(|| unreachable!("process 0 has read them"));
    }
    let json = first.as_ref().map(|texts| texts.tokenizer.to_json().into_bytes());
    let json = ranks.broadcast(Ok(json.unwrap_or_default()))?;
    ranks.agree(match first {
        Some(texts) => Ok(texts),
        None => Texts::write_tokenizer(&json, run_dir)
            .and_then(|()| Texts::read(&experiment.data, run_dir, true))
            .map_err(TrainError::from),
    })
}

/// The windows of a run: process 0 writes the token files to the run folder, the others open them there, or make them in their
/// scratch folder.
fn prepare_texts(
    texts: Texts,
    experiment: &Experiment,
    home: &Home,
    ranks: &Ranks,
) -> Result<Dataset, TrainError> {
    let (context, seed) = (experiment.model.context, experiment.run.seed);
    if ranks.is_first() {
        let data = home.make_room().and_then(|()| Ok(texts.prepare(context, seed, home.dir())?));
        let data = ranks.agree(data)?;
        return ranks.agree(Ok(data));
    }
    ranks.agree(Ok(()))?;
    let shared = texts.prepared(context, seed, &experiment.run_dir());
    ranks.agree(match shared.unwrap_or_default() {
        Some(data) => Ok(data),
        None => texts.prepare(context, seed, home.dir()).map_err(TrainError::from),
    })
}

/// Opens the folder of checkpoints, and writes the settings of the run. A folder that cannot be written must not cost the results
/// of an earlier session, so that it comes first.
fn open_folder(
    experiment: &Experiment,
    run_dir: &Path,
    chat_template: Option<&str>,
) -> Result<Checkpoints, TrainError> {
    let run = &experiment.run;
    let checkpoints =
        Checkpoints::open(run_dir.join("checkpoints"), run.keep_checkpoints, run.checkpoint_every)?;
    remove_results(run_dir)?;
    write(&run_dir.join("experiment.toml"), experiment.to_toml().as_bytes())?;
    write_template(run_dir, chat_template)?;
    Ok(checkpoints)
}

/// Prints what the readers of the initial model and of the teacher warned of, once where they are one file, as in `duck convert`.
fn print_reader_warnings(
    experiment: &Experiment,
    initial: Option<&PackedModel>,
    teacher: Option<&TeacherSource>,
) {
    let read = [
        (&experiment.run.start_from, initial.map_or(&[][..], |model| &model.warnings)),
        (&experiment.distill.teacher, teacher.map_or(&[][..], TeacherSource::warnings)),
    ];
    let warnings: BTreeSet<_> = read
        .into_iter()
        .flat_map(|(path, warnings)| warnings.iter().map(move |warning| (path, warning)))
        .collect();
    for (path, warning) in warnings {
        print_stderr(format_args!("warning: {path}: {warning}"));
    }
}

/// Checks that the checkpoint to continue is one of this run; prints its step, and a warning if this is another device.
///
/// # Errors
/// `OtherRun`: every setting and input that differs.
fn expect_same_run(
    experiment: &Experiment,
    options: &RunOptions,
    texts: &Texts,
    identity: &Identity,
    loaded: &Loaded,
) -> Result<(), TrainError> {
    if loaded.identity.is_none() {
        print_stderr(format_args!(
            "warning: {} was written by an older version and has no digests; texts, tokenizer, teacher and the model to start \
             from cannot be compared",
            loaded.path.display()
        ));
    }
    let run_dir = experiment.run_dir();
    identity.expect_same(loaded, &run_dir, &experiment.schedule, |same_text| {
        let mut requested = experiment.clone();
        if options.epochs.is_some() {
            if !same_text {
                return Ok(None);
            }
            let windows = texts.windows(requested.model.context, &run_dir)?;
            resolve_steps(&mut requested, options.epochs, windows)?;
        }
        Ok(Some(requested.run.steps))
    })?;
    if let Some(warning) = loaded.identity.as_ref().and_then(|recorded| identity.other_device(recorded)) {
        print_stderr(format_args!("warning: {warning}"));
    }
    print_stderr(format_args!("resuming {} at step {}", loaded.path.display(), loaded.state.step));
    Ok(())
}

/// The full-screen display, where standard output is a terminal and plain lines were not requested.
fn open_display(experiment: &Experiment, options: &RunOptions, data: &Dataset) -> Option<Display> {
    if options.quiet || options.plain || !terminal::can_draw() {
        return None;
    }
    let run = &experiment.run;
    let epochs_per_step = (run.batch_size * run.gradient_accumulation) as f64 / data.train.per_epoch() as f64;
    Display::open(format!("{}-{}", run.name, run.seed), run.steps, epochs_per_step)
}

/// Makes the model and its trainer, and opens the files that the training loop writes.
fn build(
    context: &Arc<RunContext>,
    inputs: LoadedInputs,
    options: &RunOptions,
) -> Result<TrainingLoop, TrainError> {
    let RunContext { experiment, home, ranks, .. } = &**context;
    let (run_dir, Experiment { run, .. }) = (home.dir(), experiment);
    let LoadedInputs { initial, checkpoint, teacher, checkpoints } = inputs;
    let autodiff = context.device.clone().autodiff();
    let model = match (initial, &checkpoint) {
        (Some(initial), None) => init_from(experiment, &initial, &autodiff)?,
        // A checkpoint has all weights.
        _ => experiment.model.init(&experiment.quant, run.seed, &autodiff),
    };
    let model = model.with_lora(&experiment.lora, run.seed);
    let codes = match checkpoint.as_ref().and_then(|loaded| Some((loaded, loaded.codes.as_ref()?))) {
        _ if !ranks.is_first() => None,
        Some((loaded, bytes)) => {
            let unfit = || CheckpointError::unfit_codes(&loaded.path);
            Some(CodeTracker::from_bytes(bytes, &model.valid()).ok_or_else(unfit)?)
        }
        None => CodeTracker::new(&model.valid()),
    };
    let schedule = Schedule::new(&experiment.schedule, run.steps);
    let plan = TrainPlan { optim: experiment.optim.clone(), schedule, teacher, group: ranks.group() };
    let guard = SpikeGuard { factor: run.spike_factor };
    let trainer = match checkpoint {
        None => plan.trainer(model, TrainState { seed: run.seed, ..TrainState::default() }, guard),
        Some(Loaded { path, model: weights, optimizer, state, .. }) => plan
            .resume(model, (weights, optimizer), state, guard)
            .map_err(|error| CheckpointError::unfit(&path, error))?,
    };
    let step = trainer.state().step;
    let path = run_dir.join("metrics.jsonl");
    let at_metrics = |source| TrainError::Write { path: path.clone(), source };
    let metrics = MetricsFile::open(&path, (step > 0).then_some(step)).map_err(at_metrics)?;
    let history = History::read(&path).map_err(at_metrics)?;
    let path = run_dir.join("samples.txt");
    keep_samples(&path, options.resume.then_some(step))
        .map_err(|source| TrainError::Write { path, source })?;
    Ok(TrainingLoop::new(context.clone(), trainer, checkpoints, metrics, history, codes))
}

/// A run after its last step.
struct Trained {
    model: LanguageModel,
    outcome: Outcome,
    /// The first error of the run.
    error: Option<TrainError>,
    /// Wall time of all sessions, in seconds.
    wall_s: f64,
    peak_rss_bytes: Option<u64>,
}

/// Runs the training loop under Burn's `SupervisedTraining`, with its metrics and a renderer.
fn train(
    context: &Arc<RunContext>,
    training_loop: TrainingLoop,
    options: &RunOptions,
    started: Instant,
) -> Result<Trained, TrainError> {
    let RunContext { experiment, home, ranks, data, device, display, .. } = &**context;
    let (run_dir, run) = (home.dir(), &experiment.run);
    let batches = run.steps * run.gradient_accumulation;
    let autodiff = device.clone().autodiff();
    let train =
        LmLoader::training(data.train.clone(), run.batch_size, run.gradient_accumulation, batches, &autodiff)
            .share_of(ranks.rank(), ranks.size());
    let valid = LmLoader::evaluation(data.valid.clone(), run.batch_size, run.eval_windows, device);
    let TrainState { step, elapsed_s: earlier, .. } = *training_loop.trainer().state();
    let learner = training_loop.trainer().learner();
    let strategy = Arc::new(StepStrategy::new(training_loop));
    let mut training = SupervisedTraining::new(run_dir, Arc::new(train), Arc::new(valid))
        .with_training_strategy(TrainingStrategy::Custom(strategy.clone()))
        .with_metric_logger(InMemoryMetricLogger::default())
        .with_application_logger(None)
        .num_epochs(run.steps.div_ceil(run.eval_every))
        .checkpoint(step / run.eval_every);
    for metric in burn_metrics::all() {
        training = training.metric_train_numeric(metric.clone());
        if metric.validates() {
            training = training.metric_valid_numeric(metric);
        }
    }
    let interrupter = training.interrupter();
    // From here on a signal stops the run well.
    ranks.enter(Phase::Files(step));
    let speaks = ranks.is_first() && display.is_none();
    let signals = options.signals.then(|| Signals::listen(interrupter.clone(), speaks)).transpose();
    let signals = ranks.agree(signals.map_err(TrainError::Signals))?;
    let interrupts = signals.as_ref().is_some_and(Signals::interrupts);
    let screen = display.clone().map(|display| Screen::open(display, interrupter, interrupts)).transpose();
    let screen = ranks.agree(screen.map_err(TrainError::Terminal))?;
    training = training.renderer(match display {
        Some(display) => display.renderer(),
        None => Box::new(PlainRenderer),
    });
    let learned = training.launch(learner);
    let (outcome, error) = StepStrategy::finish(strategy);
    if let Some(screen) = screen {
        screen.close();
        // The screen showed them last.
        for (prompt, text) in &outcome.samples {
            let _ = writeln!(std::io::stdout(), "{}", ProgressLine::sample_dimmed(prompt, text));
        }
    }
    // The first error is the cause of the others.
    let error = error.or_else(|| Some(TrainError::Burn(learned.error?.into())));
    let error = error.or_else(|| {
        let (step, steps, path) = (outcome.state.step, run.steps, experiment.run_dir());
        outcome.interrupted.then_some(TrainError::Interrupted { step, steps, path })
    });
    let error = error.map(|error| ranks.reported_once(error));
    let wall_s = earlier + started.elapsed().as_secs_f64();
    Ok(Trained { model: learned.model, outcome, error, wall_s, peak_rss_bytes: device::peak_rss_bytes() })
}

/// Writes the model of a run that ended well.
///
/// # Errors
/// `Moved`.
fn export(run: &RunContext, trained: &mut Trained) -> Result<Exported, TrainError> {
    if !run.ranks.is_first() {
        return Ok(Exported::default());
    }
    for warning in doubtful_end(&trained.outcome.state) {
        print_stderr(format_args!("warning: {warning}"));
    }
    run.expect_in_place()?;
    let mut exported = Exported::default();
    if trained.error.is_none() {
        let model = trained.model.model.valid();
        exported.write_model(run, &model);
        trained.error = exported.write_adapter(run, &model).err();
    }
    Ok(exported)
}

/// Writes `result.json` and the plots.
///
/// # Errors
/// The error that ended the run; `Write`.
fn summarize(run: &RunContext, trained: Trained, exported: Exported) -> Result<RunResult, TrainError> {
    let Trained { model, outcome, error, wall_s, peak_rss_bytes } = trained;
    let size = model.model.size();
    let (fp32_bytes, packed_bytes) = (size.fp32_bytes() as u64, size.packed_bytes() as u64);
    let bytes = exported.file_bytes.unwrap_or(packed_bytes);
    let mut result = RunResult {
        wall_s,
        peak_rss_bytes,
        parameters: size.parameters as u64,
        fp32_bytes,
        packed_bytes,
        compression: Some(fp32_bytes as f64 / bytes as f64),
        file_bytes: exported.file_bytes,
        no_file: exported.no_file,
        adapter_bytes: exported.adapter_bytes,
        error: error.as_ref().map(ToString::to_string),
        ..outputs::result(run, &outcome)
    };
    if !run.ranks.is_first() {
        return error.map_or(Ok(result), Err);
    }
    let run_dir = run.home.dir();
    let path = run_dir.join("result.json");
    let written = result.write(&path).map_err(|source| TrainError::Write { path, source });
    let drawn = write_plots(run, &outcome);
    if let Some(error) = error {
        return Err(error);
    }
    written?;
    drawn?;
    result.place = Some(Place {
        run_dir: run_dir.into(),
        chats: run.data.train.tokens().makes_chat_model(),
        prompt: run.example_prompt.clone(),
        archive: exported.archive,
        base: exported.adapter_bytes.is_some().then(|| run.experiment.run.start_from.clone()),
    });
    Ok(result)
}

/// Refuses a text without learned tokens, and prints what is about to be trained.
fn preflight(
    experiment: &Experiment,
    data: &Dataset,
    device: &Device,
    options: &RunOptions,
    ranks: &Ranks,
) -> Result<(), TrainError> {
    let needed = memory_estimate(experiment, device);
    let run = &experiment.run;
    let tokens = run.steps * run.batch_size * run.gradient_accumulation * experiment.model.context;
    let (windows, empty) = (data.train.per_epoch(), data.train.without_targets(usize::MAX));
    if empty == windows {
        return Err(DataError::NothingLearned { windows, context: experiment.model.context }.into());
    }
    for warning in without_effect(experiment, data) {
        print_stderr(format_args!("warning: {warning}"));
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
        if ranks.size() > 1 {
            line += &format!(", shared by {} processes", ranks.size());
        }
        if empty > 0 {
            let share = 100.0 * empty as f64 / windows as f64;
            line += &format!(
                "\n{share:.1} % of the training windows ({empty} of {windows}) have no learned token; a step of such \
                 windows alone changes nothing"
            );
        }
        if !device::is_cpu(device) {
            line += "\nthe first steps take longer, because they tune kernels";
        }
        if device::is_software(device) {
            line += "\nthis device is a software renderer; --device flex will be faster";
        }
        let _ = writeln!(std::io::stdout(), "{line}");
    }
    Ok(())
}
