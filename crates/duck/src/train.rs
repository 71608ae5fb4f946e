//! `duck train`: trains a model as an experiment file describes.

use crate::{Error, processes, terminal};
use burn_ternary::run::TrainCommand;
use ternary_format::threads;

pub const EXAMPLES: &str = "\
Examples:
  duck train                                         the default experiment on the built-in texts
  duck train mine.toml --data my_texts/ --tokenizer bpe --epochs 5
  duck train mine.toml --seed 2 --set quant.scale=learned --set optim.lr=3e-3
  duck train mine.toml --set distill.teacher=runs/float-1 --set run.start_from=runs/float-1
  duck train mine.toml --resume                      continue an interrupted run

`duck new` writes an experiment. Ctrl-C, SIGTERM and SIGHUP stop the run after the current step, with a checkpoint; a
second signal stops it immediately. Exit codes: 0 finished, 2 usage or experiment, 3 data, 4 device or memory, 5 disk,
6 diverged, 7 interrupted, 8 no answer from the other processes of the run, 1 other errors.

A program built with --features mpi shares a run among processes: mpirun --bind-to none -n 4 duck train mine.toml. Their number
divides run.gradient_accumulation and changes no bit of the result.";

pub fn run(command: &TrainCommand) -> Result<(), Error> {
    // MPI begins before threads.
    let group = processes::group()?;
    threads::start()?;
    let result = match &group {
        Some(group) => command.run_in(Some(group.clone()))?,
        None => command.run()?,
    };
    match group.is_none_or(|group| group.is_first()) {
        true => terminal::print(result.summary()),
        false => Ok(()),
    }
}
