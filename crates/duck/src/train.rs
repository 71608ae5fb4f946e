//! `duck train`: runs an experiment.

use crate::{Error, terminal};
use burn_ternary::run::TrainCommand;

pub const EXAMPLES: &str = "\
Examples:
  duck train                                         the default experiment, on the embedded texts
  duck train mine.toml --data my_texts/ --tokenizer bpe --epochs 5
  duck train mine.toml --seed 2 --set quant.scale=learned --set optim.lr=3e-3
  duck train mine.toml --set distill.teacher=runs/float-1 --set run.start_from=runs/float-1
  duck train mine.toml --resume                      goes on where that run stopped

`duck new` writes an experiment. Ctrl-C, SIGTERM and SIGHUP stop the run after the current step, with a checkpoint; a
second one stops it at once. Exit codes: 0 finished, 2 usage or experiment, 3 data, 4 device or memory, 5 disk, 6
diverged, 7 interrupted, 1 anything else.";

pub fn run(command: &TrainCommand) -> Result<(), Error> {
    let result = command.run()?;
    terminal::print(result.summary())
}
