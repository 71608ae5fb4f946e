//! The model that a command works with, and the flags of the engine and the sampler.

use crate::{Error, terminal};
use clap::{Args, ValueEnum};
use std::{
    fs,
    hash::{BuildHasher, Hasher, RandomState},
    path::{Path, PathBuf},
};
use ternary_format::{PackedModel, Tokenizer, gguf, huggingface, read_model};
use ternary_infer::{ActivationMode, CacheType, Engine, EngineOptions, GenerateOptions, Sampling};

/// The Duck of this program.
const DUCK: &[u8] = include_bytes!("../duck.gguf");

/// What the Duck of this program is called where others have their path.
const NAME: &str = "duck";

/// What a run folder holds, among others.
const RUN_MODEL: &str = "model.gguf";
const RUN_EXPERIMENT: &str = "experiment.toml";

/// How a model is called: by its path.
pub fn name(path: Option<&Path>) -> String {
    path.map_or(NAME.into(), |path| path.display().to_string())
}

/// Reads a model file of any kind or a run folder; `None`: the Duck of this program.
pub fn read(path: Option<&Path>) -> Result<PackedModel, Error> {
    let Some(path) = path else {
        return gguf::parse(DUCK.to_vec().into()).map_err(Error::Model);
    };
    let mut file = path.to_path_buf();
    if path.join(RUN_EXPERIMENT).exists() {
        file.push(RUN_MODEL);
        if !file.exists() {
            return unfinished(path);
        }
    }
    let bytes = fs::metadata(&file).map_or(0, |file| file.len() as usize);
    let reading = format!("reading {}", path.display());
    let model = terminal::waiting(reading, bytes, || read_model(&file)).map_err(Error::Model)?;
    warn(path, &model.warnings);
    Ok(model)
}

/// Says what the reader of a file did not understand.
fn warn(path: &Path, warnings: &[String]) {
    for warning in warnings {
        let warning = format!("warning: {}: {warning}", path.display());
        terminal::say(terminal::line(&warning));
    }
}

/// The model of a run that has not ended, or that no GGUF file can hold: that of its last checkpoint.
fn unfinished(run: &Path) -> Result<PackedModel, Error> {
    let data =
        |expected: String, found: String| Error::Data { origin: run.display().to_string(), expected, found };
    #[cfg(feature = "train")]
    return burn_ternary::run::packed_model(run).map_err(|error| match error.exit_code() {
        4 => Error::Train(error),
        _ => data(format!("a run folder with {RUN_MODEL} or a good checkpoint"), error.to_string()),
    });
    #[cfg(not(feature = "train"))]
    Err(data(format!("a run folder with {RUN_MODEL}, as a finished run leaves it"), "none".into()))
}

/// How keys and values are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    F16,
    Int8,
}

/// What matrices multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Activations {
    Int8,
    F32,
}

/// How the model is run.
#[derive(Args, Clone, Debug)]
pub struct EngineFlags {
    /// Threads; 0: one per core
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
    /// Context length in tokens, at most the model's
    #[arg(long, value_name = "TOKENS", default_value_t = 4096)]
    pub context: usize,
    /// KV cache: f16, or int8 at half the memory
    #[arg(long, value_enum, value_name = "TYPE", default_value = "f16")]
    pub cache: Cache,
    /// Activations: int8, or f32, which is exact and slow
    #[arg(long, value_enum, value_name = "TYPE", default_value = "int8")]
    pub activations: Activations,
    #[command(flatten)]
    pub adapter: AdapterFlag,
}

/// What stands beside the matrices of a model.
#[derive(Args, Clone, Debug)]
pub struct AdapterFlag {
    /// LoRA adapter of the model: the folder `adapter` of a run, or one of PEFT's
    #[arg(long, value_name = "FOLDER")]
    pub adapter: Option<PathBuf>,
}

impl AdapterFlag {
    /// Reads a model, and its adapter beside it.
    pub fn read(&self, path: Option<&Path>) -> Result<PackedModel, Error> {
        let mut model = read(path)?;
        if let Some(folder) = &self.adapter {
            if model.adapter.is_some() {
                let name = name(path);
                return Err(Error::Usage(format!(
                    "{name}: has an adapter of its own; expected the model that it started from for --adapter"
                )));
            }
            let adapter = huggingface::read_adapter(folder, &model.spec).map_err(Error::Model)?;
            warn(folder, &adapter.warnings);
            model.adapter = Some(adapter);
        }
        Ok(model)
    }
}

impl EngineFlags {
    pub fn options(&self) -> EngineOptions {
        EngineOptions::default()
            .with_threads(self.threads)
            .with_context(self.context)
            .with_cache(match self.cache {
                Cache::F16 => CacheType::F16,
                Cache::Int8 => CacheType::Int8,
            })
            .with_activations(match self.activations {
                Activations::Int8 => ActivationMode::Int8,
                Activations::F32 => ActivationMode::F32,
            })
    }

    /// Reads a model and makes it ready to run.
    pub fn load(&self, path: Option<&Path>) -> Result<Engine, Error> {
        let (model, name) = (self.adapter.read(path)?, name(path));
        let bytes = bytes(&model);
        let pack = || Engine::from_model(model, self.options());
        terminal::waiting(format!("loading {name}"), bytes, pack).map_err(Error::engine(&name))
    }
}

/// Of the tensors.
pub fn bytes(model: &PackedModel) -> usize {
    model.tensors.values().map(|tensor| tensor.bytes().len()).sum()
}

/// How tokens are drawn.
#[derive(Args, Clone, Debug)]
pub struct SamplingFlags {
    /// Sampling temperature; 0 takes the most likely token
    #[arg(long, value_name = "X", default_value_t = 0.7, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Top-k: sample from the N most likely tokens; 0 takes all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub top_k: usize,
    /// Top-p (nucleus): sample from the fewest most likely tokens whose probabilities add up to SHARE
    #[arg(long, value_name = "SHARE", default_value_t = 0.95, allow_negative_numbers = true)]
    pub top_p: f32,
    /// Min-p: sample from tokens at least SHARE times as likely as the most likely one
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, allow_negative_numbers = true)]
    pub min_p: f32,
    /// Repetition penalty on tokens that the text already has; 1 is none
    #[arg(long, value_name = "X", default_value_t = 1.0, allow_negative_numbers = true)]
    pub repetition_penalty: f32,
    /// Random seed: equal seeds give equal texts; without one, each text is another
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_tokens: usize,
}

impl SamplingFlags {
    /// What to generate, until one of `stop`.
    pub fn options(&self, stop: Vec<u32>) -> GenerateOptions {
        let sampling = Sampling::default()
            .with_repetition_penalty(self.repetition_penalty)
            .with_temperature(self.temperature)
            .with_top_k(self.top_k)
            .with_top_p(self.top_p)
            .with_min_p(self.min_p)
            .with_seed(self.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish()));
        GenerateOptions::default().with_sampling(sampling).with_max_tokens(self.max_tokens).with_stop(stop)
    }
}

/// The tokens at which a text or an answer ends.
pub fn stop(tokenizer: &Tokenizer) -> Vec<u32> {
    tokenizer.specials().map(|(_, id)| id).chain(tokenizer.ends().eos).collect()
}

/// The argument MODEL of a command.
#[derive(Args, Clone, Debug)]
pub struct ModelArgument {
    /// Model file (.gguf, .ternary), folder of Hugging Face's or run folder; without it, the Duck of this program
    pub model: Option<PathBuf>,
}

impl ModelArgument {
    pub fn path(&self) -> Option<&Path> {
        self.model.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_duck_of_this_program_can_be_read_from_its_bytes_and_talk() {
        let duck = read(None).unwrap();
        duck.validate().unwrap();
        assert!(duck.tokenizer.is_some() && duck.chat_template.is_some());
    }
}
