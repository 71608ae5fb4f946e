//! Lets the model of a run folder speak: `cargo run --release --example generate -- runs/00-default-1 "One day"`.
//! A prompt that starts with `<|user|>` is a question.

use burn_ternary::data::DataError;
use burn_ternary::data::chat::{Special, special};
use burn_ternary::device::device;
use burn_ternary::train::{SavedRun, TrainError};
use clap::Parser;
use rand::SeedableRng;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use ternary_format::chat::encode_prompt;

#[derive(Parser)]
struct Command {
    /// A folder that `--example train` left
    run: PathBuf,
    /// Text to go on with, or `<|user|>question`
    #[arg(default_value = "<|user|>Who are you?")]
    prompt: String,
    /// At most so many tokens
    #[arg(long, default_value_t = 80)]
    tokens: usize,
    /// 0 takes the likeliest token
    #[arg(long, default_value_t = 0.7)]
    temperature: f64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[arg(long, default_value = "auto")]
    device: String,
}

impl Command {
    fn run(&self) -> Result<String, TrainError> {
        let run = SavedRun::open(&self.run, &device(&self.device)?)?;
        let prompt = encode_prompt(&run.tokenizer, &self.prompt).map_err(DataError::from)?;
        let stop = special(&run.tokenizer, Special::EndOfText);
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(self.seed);
        let ids = run.model.sample(&prompt, self.tokens, self.temperature, stop, &mut rng);
        Ok(run.tokenizer.decode(&ids))
    }
}

fn main() -> ExitCode {
    match Command::parse().run() {
        Ok(text) => {
            let _ = writeln!(std::io::stdout(), "{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
