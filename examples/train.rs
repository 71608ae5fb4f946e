//! Trains a language model with ternary weights; without arguments, the default experiment on the embedded texts.
//!
//! `cargo run --release --example train -- --help` lists the flags.

use burn_ternary::train::TrainCommand;
use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    match TrainCommand::parse().run() {
        Ok(result) => {
            println!("{}", result.summary());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
