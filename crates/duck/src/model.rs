//! The model of a command, and the flags of the engine and the sampler.

use crate::{Error, terminal};
use clap::{Args, ValueEnum};
use std::{
    fs,
    hash::{BuildHasher, Hasher, RandomState},
    path::{Path, PathBuf},
};
use ternary_format::{PackedModel, Tokenizer, gguf, huggingface, read_model};
use ternary_infer::{ActivationMode, CacheType, Engine, EngineOptions, GenerateOptions, Sampling};

/// The built-in Duck.
const DUCK: &[u8] = include_bytes!("../duck.gguf");

/// Name of the built-in Duck, where other models have a path.
const NAME: &str = "duck";

/// Files of a run folder.
const RUN_MODEL: &str = "model.gguf";
const RUN_EXPERIMENT: &str = "experiment.toml";

/// The name of a model: its path.
pub fn name(path: Option<&Path>) -> String {
    path.map_or(NAME.into(), |path| path.display().to_string())
}

/// Whether a path is a run folder.
pub fn is_run(path: &Path) -> bool {
    path.join(RUN_EXPERIMENT).exists()
}

/// Reads a model file of any format or a run folder; `None`: the built-in Duck.
pub fn read(path: Option<&Path>) -> Result<PackedModel, Error> {
    let Some(path) = path else {
        return gguf::parse(DUCK.to_vec().into()).map_err(Error::Model);
    };
    let mut file = path.to_path_buf();
    if is_run(path) {
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

/// Prints what the reader of a file ignored.
fn warn(path: &Path, warnings: &[String]) {
    for warning in warnings {
        let warning = format!("warning: {}: {warning}", path.display());
        terminal::print_stderr(terminal::line(&warning));
    }
}

/// The model of the last checkpoint, for a run that has not ended or that GGUF cannot store.
#[cfg(feature = "train")]
fn unfinished(run: &Path) -> Result<PackedModel, Error> {
    burn_ternary::run::packed_model(run).map_err(|error| match error.exit_code() {
        4 => Error::Train(error),
        _ => Error::Run { run: run.into(), source: error.into() },
    })
}

/// Without training, the program cannot read checkpoints.
#[cfg(not(feature = "train"))]
fn unfinished(run: &Path) -> Result<PackedModel, Error> {
    let expected = format!("a run folder with {RUN_MODEL}, which a finished run has");
    Err(Error::Data { origin: run.display().to_string(), expected, found: "none".into() })
}

/// Data type of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    F16,
    Int8,
}

/// Data type of activations in matrix products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Activations {
    Int8,
    F32,
}

/// Flags of the engine.
#[derive(Args, Clone, Debug)]
pub struct EngineFlags {
    /// Number of threads; 0: one per core
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
    /// Context length in tokens, at most the model's
    #[arg(long, value_name = "TOKENS", default_value_t = 4096)]
    pub context: usize,
    /// KV cache: f16, or int8 at half the memory
    #[arg(long, value_enum, value_name = "TYPE", default_value = "f16")]
    pub cache: Cache,
    /// Activations: int8, or f32, which is exact and slower
    #[arg(long, value_enum, value_name = "TYPE", default_value = "int8")]
    pub activations: Activations,
    #[command(flatten)]
    pub adapter: AdapterFlag,
}

/// The flag of a LoRA adapter.
#[derive(Args, Clone, Debug)]
pub struct AdapterFlag {
    /// LoRA adapter: the folder `adapter` of a run, or a PEFT adapter folder
    #[arg(long, value_name = "FOLDER")]
    pub adapter: Option<PathBuf>,
}

impl AdapterFlag {
    /// Reads a model with its adapter.
    pub fn read(&self, path: Option<&Path>) -> Result<PackedModel, Error> {
        let mut model = read(path)?;
        if let Some(folder) = &self.adapter {
            if model.adapter.is_some() {
                let name = name(path);
                return Err(Error::Usage(format!(
                    "{name}: has an adapter already; --adapter expects the model from which that run started"
                )));
            }
            let adapter = huggingface::read_adapter(folder, &model.spec).map_err(Error::Model)?;
            warn(folder, &adapter.warnings);
            if !adapter.was_trained_on(&model.tensors) {
                let other = format!(
                    "trained on other weights than those of {}, so its output may be wrong; expected the model that its run \
                     started from (a float model in 8 bits or more)",
                    name(path)
                );
                warn(folder, &[other]);
            }
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

    /// Reads a model and packs its weights for the engine.
    pub fn load(&self, path: Option<&Path>) -> Result<Engine, Error> {
        let (model, name) = (self.adapter.read(path)?, name(path));
        let bytes = bytes(&model);
        let pack = || Engine::from_model(model, self.options());
        terminal::waiting(format!("loading {name}"), bytes, pack).map_err(Error::engine(&name))
    }
}

/// Size of the tensors, in bytes.
pub fn bytes(model: &PackedModel) -> usize {
    model.tensors.values().map(|tensor| tensor.bytes().len()).sum()
}

/// Flags of the sampler.
#[derive(Args, Clone, Debug)]
pub struct SamplingFlags {
    /// Sampling temperature; 0: greedy decoding
    #[arg(long, value_name = "X", default_value_t = 0.7, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Top-k: sample from the N most likely tokens; 0: from all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub top_k: usize,
    /// Top-p (nucleus): sample from the smallest set of most likely tokens with a total probability of SHARE
    #[arg(long, value_name = "SHARE", default_value_t = 0.95, allow_negative_numbers = true)]
    pub top_p: f32,
    /// Min-p: sample from tokens at least SHARE times as likely as the most likely one
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, allow_negative_numbers = true)]
    pub min_p: f32,
    /// Repetition penalty of tokens that are already in the text; 1: none
    #[arg(long, value_name = "X", default_value_t = 1.0, allow_negative_numbers = true)]
    pub repetition_penalty: f32,
    /// Random seed, for reproducible text [default: random]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Maximum number of tokens to generate
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_tokens: usize,
}

impl SamplingFlags {
    /// Options of a generation that ends at one of `stop`.
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

/// The tokens that end a text or an answer.
pub fn stop(tokenizer: &Tokenizer) -> Vec<u32> {
    tokenizer.specials().map(|(_, id)| id).chain(tokenizer.ends().eos).collect()
}

/// The argument MODEL of a command.
#[derive(Args, Clone, Debug)]
pub struct ModelArgument {
    /// Model file (.gguf, .ternary), Hugging Face folder or run folder; without it, the built-in Duck
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
    fn the_built_in_duck_has_a_tokenizer_and_a_chat_template() {
        let duck = read(None).unwrap();
        duck.validate().unwrap();
        assert!(duck.tokenizer.is_some() && duck.chat_template.is_some());
    }
}
