//! The command line of training: an experiment file, and flags that override its keys.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::claim::Claim;
use super::{
    Experiment, RunOptions, TrainError, experiment, phases::run_claimed, signals::ignore_file_limit,
};
use crate::report::RunResult;
use ternary_format::disk::{self, RunLock};
use ternary_parallel::{Group, Launcher};
use toml::Value;

/// File of a run folder that `duck distill-logits` writes.
pub const TEACHER_LOGITS: &str = "teacher.logits";

/// Files of a run folder with prepared texts, which exist before a run starts.
const PREPARED: [&str; 5] = ["tokenizer.json", "train.tokens", "valid.tokens", "valid.jsonl", TEACHER_LOGITS];

const EXAMPLES: &str = "\
Examples:
  train                                              the default experiment, on the embedded texts
  train experiments/60-text-1mb.toml --data my_texts/ --seed 2
  train --data my_texts/ --tokenizer bpe --epochs 5 --set run.name=mine
  train --set quant.scale=learned --set quant.granularity='{ per_group = 64 }' --out scale_runs
  train --resume                                     continues the default run where it stopped

Ctrl-C, SIGTERM and SIGHUP stop the run after the current step, with a checkpoint; a second one stops it at once.
Exit codes: 0 finished, 1 any other error, 2 usage or experiment, 3 data, 4 device or memory, 5 disk, 6 diverged,
7 interrupted, 8 no answer from the other processes of the run.

On a terminal, a full-screen display shows the progress; its last line lists its keys. --plain prints lines instead.";

/// An experiment file, and flags that override its keys.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ExperimentArgs {
    /// Experiment file; without it, the small default experiment
    pub experiment: Option<PathBuf>,
    /// Train on this .txt or .jsonl file, or folder of them; a share is held out for validation (repeatable)
    #[arg(long, value_name = "FILE_OR_FOLDER")]
    pub data: Vec<String>,
    /// byte, char, bpe (trained on the texts), or the path of a tokenizer.json or a model
    #[arg(long)]
    pub tokenizer: Option<String>,
    /// auto, flex, ndarray, wgpu, tch or cuda; it must be compiled in
    #[arg(long)]
    pub device: Option<String>,
    /// Seed of weights, data order and dropout; part of the run folder's name
    #[arg(long)]
    pub seed: Option<u64>,
    /// Folder of the run folders
    #[arg(long, value_name = "DIR")]
    pub out: Option<String>,
    /// Override any other key, after the flags above (repeatable); the value is TOML, a bare word is a string
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Overrides with lower precedence than all flags, for commands built on this one.
    #[arg(skip)]
    pub defaults: Vec<String>,
}

/// Train a language model with ternary weights.
///
/// A run leaves its metrics, checkpoints and result in OUT_DIR/NAME-SEED.
#[derive(Clone, Debug, Default, clap::Parser)]
#[command(after_help = EXAMPLES)]
pub struct TrainCommand {
    /// The experiment: its file and overrides.
    #[command(flatten)]
    pub args: ExperimentArgs,
    /// Epochs: passes over the training text; fractions are fine
    #[arg(long, value_name = "N", conflicts_with = "steps", value_parser = epochs)]
    pub epochs: Option<f64>,
    /// Optimizer steps
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Batch size: windows of text per forward pass
    #[arg(long, value_name = "N")]
    pub batch_size: Option<usize>,
    /// Peak learning rate of AdamW (that of Muon: --set optim.muon_lr=...)
    #[arg(long, allow_negative_numbers = true)]
    pub lr: Option<f64>,
    /// Continue the run folder from its last good checkpoint; texts, tokenizer, teacher and settings must be those of the run
    #[arg(long, conflicts_with = "overwrite")]
    pub resume: bool,
    /// Start a new run in an existing run folder; the old run is moved to FOLDER.old-N, never deleted
    #[arg(long)]
    pub overwrite: bool,
    /// Print nothing but warnings, errors and the summary
    #[arg(long)]
    pub quiet: bool,
    /// Print lines instead of the full-screen display
    #[arg(long, conflicts_with = "quiet")]
    pub plain: bool,
    /// Seconds that a process of several (mpirun, srun) waits for the others, after the preparation, before it gives up with exit
    /// code 8 [default: 10 median steps, at least 60; 1800 at evaluations and checkpoints]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Option<Duration>,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|&seconds: &f64| seconds > 0.0);
    seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or("expected a number above 0".into())
}

fn epochs(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(n) if n > 0.0 && n.is_finite() => Ok(n),
        _ => Err("expected a number above 0".into()),
    }
}

impl ExperimentArgs {
    /// The experiment that these arguments describe, validated.
    ///
    /// # Errors
    /// [`TrainError::Experiment`]: the file or an override is invalid.
    pub fn experiment(&self) -> Result<Experiment, TrainError> {
        self.overridden(vec![])
    }

    /// The experiment with `defaults`, the flags (of `self`, then `flags`) and `set` applied, in this order.
    fn overridden(&self, flags: Vec<(&str, Option<String>)>) -> Result<Experiment, TrainError> {
        let (text, origin) = match &self.experiment {
            Some(path) => experiment::read(path)?,
            None => (experiment::DEFAULT.into(), "the default experiment".into()),
        };
        let texts = (!self.data.is_empty()).then(|| Value::from(self.data.clone()).to_string());
        let own = [
            ("data.valid", texts.as_ref().map(|_| "[]".into())),
            // The prompts of the default experiment continue its own text.
            ("run.sample_prompts", texts.as_ref().filter(|_| self.experiment.is_none()).map(|_| "[]".into())),
            ("data.train", texts),
            ("data.tokenizer", toml_value(&self.tokenizer)),
            ("run.device", toml_value(&self.device)),
            ("run.seed", self.seed.map(|n| n.to_string())),
            ("run.out_dir", toml_value(&self.out)),
        ];
        let flags = own.into_iter().chain(flags).filter_map(|(key, value)| Some(format!("{key}={}", value?)));
        let overrides: Vec<String> =
            self.defaults.iter().cloned().chain(flags).chain(self.set.iter().cloned()).collect();
        let mut experiment = Experiment::parse(&text, &origin)?;
        for assignment in &overrides {
            experiment.set(assignment)?;
        }
        experiment.validate(&match overrides.is_empty() {
            true => origin,
            false => format!("{origin}, overridden by {}", overrides.join(" ")),
        })?;
        Ok(experiment)
    }
}

/// The value of a flag as TOML.
fn toml_value<T: Clone + Into<Value>>(flag: &Option<T>) -> Option<String> {
    flag.clone().map(|value| value.into().to_string())
}

impl TrainCommand {
    /// The experiment that this command line describes, validated, without `epochs`: the number of steps per epoch is known only
    /// after tokenization.
    ///
    /// # Errors
    /// [`TrainError::Experiment`]: the file or an override is invalid.
    pub fn experiment(&self) -> Result<Experiment, TrainError> {
        self.args.overridden(vec![
            ("run.steps", self.steps.map(|n| n.to_string())),
            ("run.batch_size", self.batch_size.map(|n| n.to_string())),
            ("optim.lr", toml_value(&self.lr)),
        ])
    }

    /// Claims the run folder and runs the experiment in this process.
    ///
    /// # Errors
    /// Every [`TrainError`].
    pub fn run(&self) -> Result<RunResult, TrainError> {
        if let Some(Launcher { command, size }) =
            Launcher::of_this_process().filter(|launcher| launcher.size > 1)
        {
            let reason = "it was built without MPI, so each of them would train the whole run";
            return Err(TrainError::Launcher { command, size, reason });
        }
        self.run_in(None)
    }

    /// The same, shared among the processes of `group`; see [`RunOptions::group`].
    ///
    /// # Errors
    /// Every [`TrainError`].
    pub fn run_in(&self, group: Option<Arc<dyn Group>>) -> Result<RunResult, TrainError> {
        let Self { resume, quiet, plain, epochs, timeout, .. } = *self;
        let options = RunOptions { resume, quiet, plain, epochs, signals: true, group, timeout };
        ignore_file_limit();
        run_claimed(self.experiment(), &options, |run_dir| self.claim(run_dir))
    }

    /// Locks `run_dir` for a run: a folder that is missing, empty or holds only prepared texts (which a run that could not
    /// start may leave) is free, `--resume` keeps what is there, and what `--overwrite` replaces is moved to
    /// `<run_dir>.old-N` once the new run can start.
    ///
    /// # Errors
    /// [`TrainError::Lock`] when another process writes the folder; [`TrainError::NotEmpty`] when there is a run and
    /// neither flag says what becomes of it; [`TrainError::Read`] when the folder cannot be listed.
    fn claim(&self, run_dir: &Path) -> Result<Claim, TrainError> {
        let lock = RunLock::acquire(run_dir)?;
        let path = run_dir.to_path_buf();
        let names = fs::read_dir(run_dir)
            .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>());
        let mut names = names.map_err(|source| TrainError::Read { path: path.clone(), source })?;
        names.retain(|name| name != disk::LOCK);
        let free = names.iter().all(|name| PREPARED.iter().any(|prepared| name == prepared));
        if free || self.resume {
            return Ok(lock.into());
        }
        if !self.overwrite {
            return Err(TrainError::NotEmpty { path });
        }
        Ok(Claim { lock, replaced: names })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::claim::move_aside;
    use clap::{CommandFactory, Parser};

    fn command(arguments: &[&str]) -> TrainCommand {
        TrainCommand::try_parse_from([&["train"], arguments].concat()).unwrap()
    }

    #[test]
    fn no_arguments_mean_the_default_experiment() {
        TrainCommand::command().debug_assert();
        assert_eq!(command(&[]).experiment().unwrap(), Experiment::embedded());
    }

    #[test]
    fn each_flag_changes_its_key_and_nothing_else() {
        let default = command(&[]).experiment().unwrap();
        type Change = fn(&mut Experiment);
        let changes: [(&[&str], Change); 10] = [
            (&["--tokenizer", "byte"], |e| e.data.tokenizer = "byte".into()),
            (&["--steps", "7"], |e| e.run.steps = 7),
            (&["--batch-size", "3"], |e| e.run.batch_size = 3),
            (&["--lr", "1e-4"], |e| e.optim.lr = 1e-4),
            (&["--lr", "2"], |e| e.optim.lr = 2.0),
            (&["--device", "wgpu"], |e| e.run.device = "wgpu".into()),
            (&["--seed", "99"], |e| e.run.seed = 99),
            (&["--out", "2024"], |e| e.run.out_dir = "2024".into()),
            (&["--epochs", "0.5"], |_| ()),
            (&["--data", "a \"b\".txt", "--data", r"c\d"], |e| {
                e.data.train = vec!["a \"b\".txt".into(), r"c\d".into()];
                e.data.valid = vec![];
                e.run.sample_prompts = vec![];
            }),
        ];
        for (arguments, change) in changes {
            let mut expected = default.clone();
            change(&mut expected);
            assert_eq!(command(arguments).experiment().unwrap(), expected, "{arguments:?}");
        }
        assert_eq!(command(&["--epochs", "0.5"]).epochs, Some(0.5));
    }

    #[test]
    fn set_comes_after_the_flags_and_in_order() {
        let experiment =
            command(&["--set", "run.steps=5", "--steps", "4", "--set", "run.steps=6"]).experiment().unwrap();
        assert_eq!(experiment.run.steps, 6);
    }

    #[test]
    fn bad_arguments_are_usage_errors() {
        for arguments in [
            &["--epochs", "0"][..],
            &["--epochs", "nan"],
            &["--epochs", "1", "--steps", "1"],
            &["--steps", "-1"],
            &["--resume", "--overwrite"],
            &["--what"],
        ] {
            let parsed = TrainCommand::try_parse_from([&["train"], arguments].concat());
            assert_eq!(parsed.unwrap_err().exit_code(), 2, "{arguments:?}");
        }
        for (arguments, fragment) in [
            (&["--lr", "nan"][..], "`optim.lr` is nan"),
            (&["--lr", "-1"], "`optim.lr` is -1.0"),
            (&["--steps", "0"], "overridden by run.steps=0: `run.steps` is 0"),
            (&["--device", "tpu"], "one of auto, flex"),
            (&["--seed", "18446744073709551615"], "run.seed"),
            (&["--set", "optim.lrr=1"], "unknown key `optim.lrr`"),
            (&["--set", "lr"], "expected section.key=value"),
            (&["missing.toml"], "missing.toml: expected an experiment"),
        ] {
            let error = command(arguments).experiment().unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(fragment), "{error}");
        }
    }

    #[test]
    fn a_run_folder_is_never_lost() {
        let home = tempfile::tempdir().unwrap();
        let run = home.path().join("x-1");
        let names = || {
            let entries = fs::read_dir(home.path()).unwrap();
            let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        command(&[]).claim(&run).unwrap();
        command(&[]).claim(&run).unwrap();
        fs::write(run.join("metrics.jsonl"), "first").unwrap();
        assert!(matches!(command(&[]).claim(&run), Err(TrainError::NotEmpty { .. })));
        command(&["--resume"]).claim(&run).unwrap();
        assert_eq!(names(), ["x-1"]);
        let overwrite = || {
            let claim = command(&["--overwrite"]).claim(&run).unwrap();
            move_aside(&run, claim.replaced).unwrap();
            claim.lock
        };
        // A run that cannot start moves nothing.
        command(&["--overwrite"]).claim(&run).unwrap();
        assert_eq!(names(), ["x-1"]);
        overwrite();
        fs::write(run.join("metrics.jsonl"), "second").unwrap();
        fs::create_dir(run.join("checkpoints")).unwrap();
        let lock = overwrite();
        assert_eq!(names(), ["x-1", "x-1.old-1", "x-1.old-2"]);
        let old = home.path().join("x-1.old-1/metrics.jsonl");
        assert_eq!(fs::read_to_string(old).unwrap(), "first");
        assert!(home.path().join("x-1.old-2/checkpoints").exists());
        // Whatever another process was told, the folder is that of the first until it is done.
        for flags in [&[][..], &["--resume"], &["--overwrite"]] {
            assert!(matches!(command(flags).claim(&run), Err(TrainError::Lock(_))), "{flags:?}");
        }
        drop(lock);
        command(&[]).claim(&run).unwrap();
        assert_eq!(names(), ["x-1", "x-1.old-1", "x-1.old-2"]);
    }
}
