//! `duck bench`: speed of a model on this machine.

use crate::{
    Error,
    model::{self, EngineFlags, ModelArgument},
    terminal::{self, Progress},
};
use clap::ValueEnum;
use serde::Serialize;
use std::time::Instant;
use ternary_infer::{Engine, EngineError, Sequence};

const EXAMPLES: &str = "\
Examples:
  duck bench model.gguf
  duck bench model.gguf --threads 2 --prompt 512 --generate 128 --batch 8 --json";

/// Measure tokens per second: prefill of a prompt, decoding of one sequence, decoding of a batch.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Command {
    #[command(flatten)]
    model: ModelArgument,
    /// Tokens of the prompt [default: 512, or half of the context]
    #[arg(long, value_name = "N")]
    prompt: Option<usize>,
    /// Tokens to generate [default: 128, or half of the context]
    #[arg(long, value_name = "N")]
    generate: Option<usize>,
    /// Number of sequences in the batch
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = at_least_one)]
    batch: usize,
    /// Number of measurements after a warm-up; the median is reported
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = at_least_one)]
    repetitions: usize,
    #[command(flatten)]
    engine: EngineFlags,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| (1..=1_000_000).contains(n)).ok_or("expected 1 to 1000000".into())
}

#[derive(Serialize)]
struct Report {
    model: String,
    threads: usize,
    cache: String,
    activations: String,
    prompt: usize,
    generate: usize,
    batch: usize,
    repetitions: usize,
    load_s: f64,
    /// Tokens per second, like the two below.
    prompt_speed: Speed,
    generate_speed: Speed,
    /// Of all sequences of the batch together.
    batch_speed: Speed,
    /// KV cache of one sequence.
    cache_bytes: usize,
}

/// Repeated measurements, in tokens per second.
#[derive(Serialize)]
struct Speed {
    median: f64,
    least: f64,
    most: f64,
}

impl Command {
    pub fn run(self) -> Result<(), Error> {
        let path = self.model.path();
        let name = model::name(path);
        let start = Instant::now();
        let engine = self.engine.load(path)?;
        let load_s = start.elapsed().as_secs_f64();
        let half = (engine.context() / 2).max(1);
        let [prompt, generate] = [(self.prompt, 512), (self.generate, 128)]
            .map(|(tokens, usual)| tokens.unwrap_or(usual.min(half)).max(1));
        for (flag, tokens) in [("prompt", prompt), ("generate", generate)] {
            if tokens > engine.context() {
                let context = engine.context();
                let message =
                    format!("--{flag} is {tokens}, expected at most the context of {context} tokens");
                return Err(Error::Usage(message));
            }
        }
        let total = (self.repetitions + 1) * (prompt + generate + generate * self.batch);
        let bench = Bench {
            engine: &engine,
            repetitions: self.repetitions,
            progress: Progress::new("tokens", total as u64),
        };
        let failed = |error: EngineError| Error::engine(&name)(error);
        let ids = bench.ids(prompt);
        let prompt_speed = bench.speed(1, |sequences| {
            engine.prefill(&mut sequences[0], &ids)?;
            Ok(prompt)
        });
        let prompt_speed = prompt_speed.map_err(failed)?;
        let generate_speed = bench.speed(1, |sequences| bench.decode(sequences, generate)).map_err(failed)?;
        let batch_speed = bench.speed(self.batch, |sequences| bench.decode(sequences, generate));
        let batch_speed = batch_speed.map_err(failed)?;
        drop(bench);
        let report = Report {
            threads: threads(self.engine.threads),
            cache: spelled(self.engine.cache),
            activations: spelled(self.engine.activations),
            prompt,
            generate,
            batch: self.batch,
            repetitions: self.repetitions,
            load_s,
            prompt_speed,
            generate_speed,
            batch_speed,
            cache_bytes: engine.sequence().cache_bytes(),
            model: name,
        };
        if self.json { terminal::print_json(&report) } else { terminal::print(report.table()) }
    }
}

/// How the value of a flag is written.
fn spelled(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().into())
}

fn threads(asked: usize) -> usize {
    match asked {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        asked => asked,
    }
}

struct Bench<'a> {
    engine: &'a Engine,
    repetitions: usize,
    progress: Progress,
}

impl Bench<'_> {
    /// The speed of `work`, which returns its number of tokens, on empty sequences.
    fn speed(
        &self,
        sequences: usize,
        work: impl Fn(&mut [Sequence]) -> Result<usize, EngineError>,
    ) -> Result<Speed, EngineError> {
        let mut sequences: Vec<Sequence> = (0..sequences).map(|_| self.engine.sequence()).collect();
        let mut speeds = Vec::new();
        for _ in 0..=self.repetitions {
            sequences.iter_mut().for_each(|sequence| sequence.truncate(0));
            let start = Instant::now();
            let tokens = work(&mut sequences)?;
            speeds.push(tokens as f64 / start.elapsed().as_secs_f64());
            self.progress.advance(tokens);
        }
        // The first one warms up.
        let speeds = &mut speeds[1..];
        speeds.sort_by(f64::total_cmp);
        Ok(Speed { median: speeds[speeds.len() / 2], least: speeds[0], most: speeds[speeds.len() - 1] })
    }

    /// Feeds tokens to all sequences side by side: what generation costs but for the drawing.
    fn decode(&self, sequences: &mut [Sequence], tokens: usize) -> Result<usize, EngineError> {
        let count = tokens * sequences.len();
        for id in self.ids(tokens) {
            let mut batch: Vec<_> = sequences.iter_mut().map(|sequence| (sequence, id)).collect();
            self.engine.decode_batch(&mut batch)?;
        }
        Ok(count)
    }

    /// Ids from all over the vocabulary.
    fn ids(&self, count: usize) -> Vec<u32> {
        (0..count).map(|i| (i * 7919 % self.engine.spec().vocab_size) as u32).collect()
    }
}

impl Report {
    fn table(&self) -> String {
        let row = |what: String, speed: &Speed| {
            let Speed { median, least, most } = speed;
            format!("{what:<26}{median:>10.1}{least:>10.1}{most:>10.1}")
        };
        [
            format!("{}, {} threads, loaded in {:.2} s", self.model, self.threads, self.load_s),
            format!("{:<26}{:>10}{:>10}{:>10}", "tokens per second", "median", "least", "most"),
            row(format!("prefill of {}", self.prompt), &self.prompt_speed),
            row(format!("decode of {}", self.generate), &self.generate_speed),
            row(format!("decode, batch of {}", self.batch), &self.batch_speed),
            format!("KV cache per sequence: {:.1} MiB", self.cache_bytes as f64 / f64::from(1 << 20)),
        ]
        .join("\n")
    }
}
