//! `duck distill-logits`: caches the top-k logits of a teacher on a training text, for many runs.

use crate::{Error, terminal};
use burn_ternary::run::{ExperimentArgs, TEACHER_LOGITS, cache_teacher_logits};
use std::path::PathBuf;
use toml::Value;

const EXAMPLES: &str = "\
Examples:
  duck distill-logits mine.toml --teacher runs/float-1
  duck train mine.toml --set distill.teacher=runs/mine-1/teacher.logits
  duck distill-logits mine.toml --teacher SmolLM2-135M --top 64 --to smol.logits

A run that reads the file must have the same texts and tokenizer. The file takes 6 bytes for each of TOP tokens at each
position of the training text.";

/// Cache a teacher's logits of the most likely next tokens, at each position of an experiment's training text.
///
/// A run whose distill.teacher is that file learns from the teacher without computing it in each step.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Command {
    /// Teacher: a run folder or a model file [default: distill.teacher of the experiment]
    #[arg(long, value_name = "MODEL")]
    teacher: Option<PathBuf>,
    /// Number of most likely tokens that are stored per position; the others share one probability
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    top: u32,
    /// File to write [default: teacher.logits in the run folder]
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
    /// Replace the file if it exists
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    args: ExperimentArgs,
}

impl Command {
    pub fn run(mut self) -> Result<(), Error> {
        if let Some(teacher) = &self.teacher {
            let path = Value::from(teacher.display().to_string());
            self.args.set.push(format!("distill.teacher={path}"));
        }
        let experiment = self.args.experiment()?;
        let path = self.to.unwrap_or_else(|| experiment.run_dir().join(TEACHER_LOGITS));
        terminal::expect_free(&path, self.overwrite)?;
        let mut progress = None;
        cache_teacher_logits(experiment, self.top as usize, &path, |done, total| {
            progress.get_or_insert_with(|| terminal::Progress::new("recording", total as u64)).advance(done);
        })?;
        terminal::print_stderr(format_args!("wrote {}", path.display()));
        Ok(())
    }
}
