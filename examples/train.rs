//! Trains a language model with ternary weights; without arguments, the default experiment on the embedded texts.
//!
//! `cargo run --release --example train -- --help` lists the flags.

use burn_ternary::train::TrainCommand;
use clap::Parser;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

fn main() -> ExitCode {
    match TrainCommand::parse().run() {
        Ok(result) => match writeln!(std::io::stdout(), "{}", result.summary()) {
            // Whoever reads this may have gone away (`| head`).
            Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                let _ = writeln!(std::io::stderr(), "error: standard output: {error}");
                ExitCode::from(5)
            }
            _ => ExitCode::SUCCESS,
        },
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
