//! `duck generate`: continues a text.

use crate::{
    Error,
    model::{self, EngineFlags, ModelArgument, SamplingFlags},
    terminal::{self, Progress},
};
use serde::Serialize;
use std::{
    io::{self, IsTerminal, Read},
    time::Instant,
};
use ternary_format::chat::encode_prompt;
use ternary_infer::{EngineError, FinishReason};

const EXAMPLES: &str = "\
Examples:
  duck generate --prompt 'One day'
  duck generate model.gguf --prompt '<|user|>Who are you?' --temperature 0
  duck generate base.gguf --adapter runs/lora-1/adapter --prompt 'One day'
  echo 'The little duck' | duck generate model.gguf --seed 1 --json";

/// Continue a text.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Command {
    #[command(flatten)]
    model: ModelArgument,
    /// Text to continue, or `<|user|>question`; without it, standard input
    #[arg(long, short, value_name = "TEXT")]
    prompt: Option<String>,
    #[command(flatten)]
    sampling: SamplingFlags,
    #[command(flatten)]
    engine: EngineFlags,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
}

/// The output of `--json`.
#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    prompt: &'a str,
    text: &'a str,
    /// `stop`: the model ended the text; `max_tokens`: the limit is reached; `context`: the context is full.
    finish: &'static str,
    seed: u64,
    prompt_tokens: usize,
    tokens: usize,
    prompt_s: f64,
    generate_s: f64,
}

impl Command {
    pub fn run(self) -> Result<(), Error> {
        let name = model::name(self.model.path());
        let failed = |error: EngineError| Error::engine(&name)(error);
        let prompt = match &self.prompt {
            Some(prompt) => prompt.clone(),
            None => read_prompt()?,
        };
        let engine = self.engine.load(self.model.path())?;
        let tokenizer = engine.tokenizer().ok_or_else(|| failed(EngineError::NoTokenizer))?;
        let ids = encode_prompt(tokenizer, &prompt).map_err(|error| failed(error.into()))?;
        let options = self.sampling.options(model::stop(tokenizer));
        let seed = options.sampling.seed;
        let start = Instant::now();
        let mut generation = engine.generate(&ids, options).map_err(failed)?;
        let prompt_s = start.elapsed().as_secs_f64();
        let mut decoder = tokenizer.decoder();
        let (mut text, mut tokens) = (String::new(), 0);
        // Streamed text shows the progress itself.
        let progress = self.json.then(|| Progress::new("tokens", self.sampling.max_tokens as u64));
        let write = |piece: &str| match &progress {
            Some(progress) => {
                progress.advance(1);
                Ok(())
            }
            None => terminal::stream(piece),
        };
        for id in generation.by_ref() {
            tokens += 1;
            let piece = decoder.push(id);
            write(&piece)?;
            text.push_str(&piece);
        }
        let rest = decoder.finish();
        write(&rest)?;
        text.push_str(&rest);
        if !self.json {
            terminal::print("")?;
        }
        let finish = generation.finish_reason().map(FinishReason::check).transpose().map_err(failed)?;
        if !self.json {
            return Ok(());
        }
        terminal::print_json(&Report {
            model: &name,
            prompt: &prompt,
            text: &text,
            finish: finish_name(finish),
            seed,
            prompt_tokens: ids.len(),
            tokens,
            prompt_s,
            generate_s: start.elapsed().as_secs_f64() - prompt_s,
        })
    }
}

/// The reason of the end, for scripts.
pub fn finish_name(finish: Option<FinishReason>) -> &'static str {
    match finish {
        Some(FinishReason::Stop(_)) => "stop",
        Some(FinishReason::Context) => "context",
        Some(FinishReason::NotFinite) => "not_finite",
        Some(FinishReason::MaxTokens) | None => "max_tokens",
    }
}

/// Standard input without its last line end; empty if that is a terminal.
fn read_prompt() -> Result<String, Error> {
    let mut text = String::new();
    if io::stdin().is_terminal() {
        return Ok(text);
    }
    io::stdin().read_to_string(&mut text).map_err(Error::Input)?;
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}
