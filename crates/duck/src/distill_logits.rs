//! `duck distill-logits`: what a teacher thinks of a training text, written down once for many runs.

use crate::{Error, terminal};
use burn_ternary::run::{ExperimentArgs, TEACHER_LOGITS, cache_teacher_logits};
use std::path::PathBuf;
use toml::Value;

const EXAMPLES: &str = "\
Examples:
  duck distill-logits mine.toml --teacher runs/float-1
  duck train mine.toml --set distill.teacher=runs/mine-1/teacher.logits
  duck distill-logits mine.toml --teacher SmolLM2-135M --top 64 --to smol.logits

The texts and the tokenizer must be those of the run that reads the file. It takes 6 bytes for each of TOP tokens at every
position of the training text.";

/// Write down what a teacher thinks of the training text of an experiment: the likeliest next tokens at every position
///
/// A run whose distill.teacher is that file learns from the teacher without computing it at every step.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Command {
    /// Teacher: a run folder or a model file; without it, distill.teacher of the experiment
    #[arg(long, value_name = "MODEL")]
    teacher: Option<PathBuf>,
    /// Tokens that are kept at a position; all others are one
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    top: u32,
    /// File to write; without it, teacher.logits in the run folder
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
    /// Replace the file if it is there and a plain file
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
        terminal::say(format_args!("wrote {}", path.display()));
        Ok(())
    }
}
