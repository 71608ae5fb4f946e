//! Trains a language model with ternary weights; without arguments, the default experiment on the embedded texts.
//!
//! `cargo run --release --example train -- --help` lists the flags.

use burn_ternary::train::TrainCommand;
use clap::Parser;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    match TrainCommand::parse().run() {
        Ok(result) => {
            // Whoever reads this may have gone away (`| head`).
            let _ = writeln!(std::io::stdout(), "{}", result.summary());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
