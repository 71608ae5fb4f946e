//! `duck`: trains, converts, evaluates, serves and chats with language models with ternary weights.

mod bench;
mod chat;
#[cfg(feature = "train")]
mod convert;
#[cfg(feature = "train")]
mod distill_logits;
mod error;
mod eval;
mod export;
mod generate;
mod inspect;
mod log;
mod model;
#[cfg(feature = "train")]
mod new;
#[cfg(feature = "train")]
mod processes;
mod serve;
mod shell;
mod terminal;
#[cfg(feature = "train")]
mod train;

use clap::{Parser, Subcommand};
use error::Error;
use std::process::ExitCode;
use ternary_format::threads;

#[global_allocator]
static ALLOCATOR: ternary_kernels::ExitAllocator = ternary_kernels::ExitAllocator;

const EXAMPLES: &str = "\
Examples:
  duck chat                               chat with the built-in Duck
  duck new poems.toml --data poems/       write an experiment for your own text
  duck train poems.toml                   train it; the run folder is a MODEL
  duck generate runs/mine-1 --prompt 'One day'
  duck convert --from SmolLM2-135M --data my_texts/
  duck eval runs/mine-1 runs/float-1      compare them on the validation text of the runs
  duck export runs/mine-1 mine.onnx
  duck serve mine.gguf --port 8080

A MODEL is a file (.gguf, .ternary), a Hugging Face folder, or a run folder. Without one, most commands use the built-in
Duck. Exit codes: 0 success, 2 usage, 3 data or model file, 4 device or memory, 5 disk, 6 training diverged, 7 training
interrupted, 8 a training's other processes do not answer, 1 other errors.";

/// Train, convert, evaluate, serve and chat with language models with ternary weights.
#[derive(Parser)]
#[command(name = "duck", version, propagate_version = true, after_help = EXAMPLES)]
struct Duck {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    #[cfg(feature = "train")]
    #[command(after_help = train::EXAMPLES)]
    Train(Box<burn_ternary::run::TrainCommand>),
    #[cfg(feature = "train")]
    Convert(Box<convert::Command>),
    #[cfg(feature = "train")]
    DistillLogits(Box<distill_logits::Command>),
    #[cfg(feature = "train")]
    New(Box<new::Command>),
    Export(export::Command),
    Inspect(inspect::Command),
    Eval(eval::Command),
    Generate(generate::Command),
    Chat(chat::Command),
    Serve(serve::Command),
    Bench(bench::Command),
    Completions(shell::Completions),
    Man(shell::Man),
}

impl Command {
    fn run(self) -> Result<(), Error> {
        match self {
            // MPI begins before threads: `train::run`.
            #[cfg(feature = "train")]
            Self::Train(_) | Self::Convert(_) => (),
            Self::Completions(_) | Self::Man(_) => (),
            _ => drop(threads::start()?),
        }
        match self {
            #[cfg(feature = "train")]
            Self::Train(command) => train::run(&command),
            #[cfg(feature = "train")]
            Self::Convert(command) => command.run(),
            #[cfg(feature = "train")]
            Self::DistillLogits(command) => command.run(),
            #[cfg(feature = "train")]
            Self::New(command) => command.run(),
            Self::Export(command) => command.run(),
            Self::Inspect(command) => command.run(),
            Self::Eval(command) => command.run(),
            Self::Generate(command) => command.run(),
            Self::Chat(command) => command.run(),
            Self::Serve(command) => command.run(),
            Self::Bench(command) => command.run(),
            Self::Completions(command) => command.run(),
            Self::Man(command) => command.run(),
        }
    }
}

fn main() -> ExitCode {
    let Err(error) = Duck::parse().command.run() else { return ExitCode::SUCCESS };
    if !error.is_closed_pipe() && !error.is_reported() {
        terminal::print_stderr(format_args!("error: {}", terminal::line(&error)));
    }
    ExitCode::from(error.exit_code())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_command_is_well_formed_and_shows_an_example() {
        let mut duck = Duck::command();
        duck.clone().debug_assert();
        for command in duck.get_subcommands_mut() {
            let help = command.render_long_help().to_string();
            assert!(help.contains(&format!("Examples:\n  duck {}", command.get_name())), "{help}");
        }
    }
}
