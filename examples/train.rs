//! Trains a language model with ternary weights; without arguments, the default experiment on the embedded texts.
//!
//! `cargo run --release --example train -- --help` lists the flags.

use burn_ternary::format::print_stderr;
use burn_ternary::run::TrainCommand;
use clap::Parser;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

/// Where memory is out, it ends with exit code 4.
#[cfg(feature = "flex")]
#[global_allocator]
static ALLOCATOR: ternary_kernels::ExitAllocator = ternary_kernels::ExitAllocator;

fn main() -> ExitCode {
    match TrainCommand::parse().run() {
        Ok(result) => match writeln!(std::io::stdout(), "{}", result.summary()) {
            // The reader of a pipe may have gone (`| head`).
            Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                print_stderr(format_args!("error: standard output: {error}"));
                ExitCode::from(5)
            }
            _ => ExitCode::SUCCESS,
        },
        Err(error) => {
            print_stderr(format_args!("error: {error}"));
            ExitCode::from(error.exit_code())
        }
    }
}
