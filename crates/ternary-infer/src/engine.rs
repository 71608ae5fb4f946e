//! [`Engine`]: a loaded model, and the [`Sequence`]s that it continues.

use crate::{
    EngineError, Sampler, Sampling,
    cache::Cache,
    forward::{Segment, Work},
    model::Model,
};
use std::{
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};
use ternary_format::{ModelSpec, PackedModel, Tokenizer, read_model, threads};
use ternary_kernels::Pool;

/// Tokens of a prompt that pass through the layers together (prefill chunk).
const CHUNK: usize = 128;

/// Precision of the activations that matrices multiply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ActivationMode {
    /// Int8 with one scale per token, KV cache of [`CacheType`]: fast.
    #[default]
    Int8,
    /// f32, including the KV cache: exact and slow, for comparison.
    F32,
}

/// Precision of the KV cache; [`ActivationMode::F32`] always uses f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheType {
    #[default]
    F16,
    /// Int8 with one f32 scale per key and per value (one head, one position): about half of the memory.
    Int8,
}

/// Options of [`Engine::load`].
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Number of threads; 0: one per core.
    pub threads: usize,
    /// What matrices multiply.
    pub activations: ActivationMode,
    /// How keys and values are kept.
    pub cache: CacheType,
    /// Longest sequence, in tokens, at most that of the model. The KV cache of a sequence is this long.
    pub context: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            threads: 0,
            activations: ActivationMode::default(),
            cache: CacheType::default(),
            context: 4096,
        }
    }
}

/// A model, packed for this CPU, with its thread pool.
///
/// It can be shared between threads; forward passes wait for each other.
#[derive(Debug)]
pub struct Engine {
    name: String,
    model: Model,
    tokenizer: Option<Tokenizer>,
    chat_template: Option<String>,
    work: Mutex<Work>,
    /// With the context that is in effect.
    options: EngineOptions,
}

/// A text that is being generated: its KV cache, and the logits of the next token.
#[derive(Clone, Debug)]
pub struct Sequence {
    pub(crate) cache: Cache,
    pub(crate) length: usize,
    pub(crate) logits: Vec<f32>,
}

impl Sequence {
    /// Number of tokens so far.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there is no token yet.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Drops all tokens from position `length` on. The logits stay those of the last token read.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    /// Replaces its tokens and logits by copies of those of `other`. The cost is proportional to their number.
    ///
    /// # Panics
    /// If the sequences belong to different engines.
    pub fn copy_from(&mut self, other: &Self) {
        self.cache.copy_from(&other.cache, other.length);
        self.length = other.length;
        self.logits.copy_from_slice(&other.logits);
    }

    /// Size of the KV cache when the context is full, in bytes.
    pub fn cache_bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// # Errors
    /// `NotFinite`: a logit of the next token is NaN or infinite.
    fn check_logits(&self) -> Result<(), EngineError> {
        check_finite(&self.logits)
    }

    /// Logits of the next token, `[vocab]`; zeros before the first.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }
}

impl Engine {
    /// Reads a GGUF file or a Hugging Face folder.
    ///
    /// # Errors
    /// `Format`: it cannot be read. Those of [`from_model`](Self::from_model).
    pub fn load(path: impl AsRef<Path>, options: EngineOptions) -> Result<Self, EngineError> {
        Self::from_model(read_model(path.as_ref())?, options)
    }

    /// Packs the weights, and those of an adapter, for this CPU. The model, and the file that it is mapped from, are then released.
    ///
    /// # Errors
    /// `Format`: the tensors are not those of the spec. `Option`: no context, or more threads than [`threads::most`].
    /// `Memory`, `Weights`, `Threads`: the system has too little memory for the model, or refuses to start threads.
    pub fn from_model(model: PackedModel, options: EngineOptions) -> Result<Self, EngineError> {
        if options.context == 0 {
            let found = options.context.to_string();
            return Err(EngineError::Option { key: "context", found, expected: "at least 1" });
        }
        if options.threads > threads::most() {
            let found = options.threads.to_string();
            let expected = "0 (one per core) to 256, or to the number of cores where there are more";
            return Err(EngineError::Option { key: "threads", found, expected });
        }
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, |threads| threads.get()),
            threads => threads,
        };
        let activations = options.activations;
        let packed = Model::pack(&model, activations)?;
        let context = options.context.min(packed.spec.context);
        let pool = Pool::try_new(threads).map_err(|source| EngineError::Threads { threads, source })?;
        let work = Mutex::new(Work::new(&packed, pool, activations, context));
        let PackedModel { name, tokenizer, chat_template, .. } = model;
        let options = EngineOptions { context, ..options };
        Ok(Self { name, model: packed, tokenizer, chat_template, work, options })
    }

    /// The name of the model.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The shape of the model.
    pub fn spec(&self) -> &ModelSpec {
        &self.model.spec
    }

    /// `None` if the file has none: the model works on ids only.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The chat template, in Jinja.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Longest sequence, in tokens.
    pub fn context(&self) -> usize {
        self.options.context
    }

    /// An empty sequence.
    pub fn sequence(&self) -> Sequence {
        Sequence {
            cache: Cache::new(&self.model.spec, &self.options),
            length: 0,
            logits: vec![0.0; self.model.spec.vocab_size],
        }
    }

    /// Prefill: appends `ids`, chunk by chunk. The sequence then has the logits of the token after them.
    ///
    /// # Errors
    /// `EmptyPrompt`, `UnknownToken`, `ContextFull`; the sequence is then unchanged. `NotFinite`: a logit is NaN or infinite.
    pub fn prefill(&self, sequence: &mut Sequence, ids: &[u32]) -> Result<(), EngineError> {
        self.check(ids, sequence.length)?;
        let work = &mut *self.work();
        for (index, chunk) in ids.chunks(CHUNK).enumerate() {
            let segments = &mut [(&mut *sequence, chunk)];
            work.forward(&self.model, segments);
            if (index + 1) * CHUNK >= ids.len() {
                work.last_logits(&self.model, segments);
            }
        }
        sequence.check_logits()
    }

    /// Decode: appends one token to each of several sequences in one pass. Each gets the logits it would get alone.
    ///
    /// # Errors
    /// `UnknownToken`, `ContextFull`; the sequences are then unchanged.
    pub fn decode_batch(&self, batch: &mut [(&mut Sequence, u32)]) -> Result<(), EngineError> {
        self.pass(batch)
    }

    /// The same with several tokens for each, at least one: chunked prefill of a prompt in the same pass as decoding others.
    /// Memory is allocated for all tokens at once, so split long prompts into chunks.
    ///
    /// # Errors
    /// `EmptyPrompt`, `UnknownToken`, `ContextFull`; the sequences are then unchanged.
    pub fn extend_batch(&self, batch: &mut [(&mut Sequence, &[u32])]) -> Result<(), EngineError> {
        self.pass(batch)
    }

    fn pass<S: Segment>(&self, batch: &mut [S]) -> Result<(), EngineError> {
        for segment in batch.iter() {
            self.check(segment.ids(), segment.sequence().length)?;
        }
        if batch.is_empty() {
            return Ok(());
        }
        let work = &mut *self.work();
        work.forward(&self.model, batch);
        work.last_logits(&self.model, batch);
        Ok(())
    }

    /// Draws the next token of each sequence with its sampler, in parallel; `NotFinite` for a sequence with NaN or infinite
    /// logits.
    pub fn sample_batch(&self, batch: Vec<(&Sequence, &mut Sampler)>) -> Vec<Result<u32, EngineError>> {
        let mut draws: Vec<_> =
            batch.into_iter().map(|(sequence, sampler)| (sequence, sampler, Ok(0))).collect();
        self.work().pool.chunks(&mut draws, 1, |_, _, draw| {
            let (sequence, sampler, id) = &mut draw[0];
            *id = sequence.check_logits().map(|()| sampler.sample(sequence.logits()));
        });
        draws.into_iter().map(|(_, _, id)| id).collect()
    }

    /// Logits at every position of a text, `[ids][vocab]`: `logits[i]` is for the token after `ids[i]`.
    ///
    /// # Errors
    /// `EmptyPrompt`, `UnknownToken`, `ContextFull`, `NotFinite`
    pub fn logits(&self, ids: &[u32]) -> Result<Vec<f32>, EngineError> {
        self.check(ids, 0)?;
        let vocab = self.model.spec.vocab_size;
        let mut logits = vec![0.0; ids.len() * vocab];
        let mut sequence = self.sequence();
        let work = &mut *self.work();
        for (chunk, logits) in ids.chunks(CHUNK).zip(logits.chunks_mut(CHUNK * vocab)) {
            work.forward(&self.model, &mut [(&mut sequence, chunk)]);
            work.all_logits(&self.model, logits);
            check_finite(logits)?;
        }
        Ok(logits)
    }

    /// The tokens that follow `prompt`, drawn one by one.
    ///
    /// # Errors
    /// `EmptyPrompt`, `UnknownToken`, `ContextFull`: the prompt does not fit. `Option`: a sampling number is out of
    /// range. `NotFinite`: a logit after the prompt is NaN or infinite.
    pub fn generate(&self, prompt: &[u32], options: GenerateOptions) -> Result<Generation<'_>, EngineError> {
        self.resume(self.sequence(), prompt, options)
    }

    /// The same, after the tokens that `sequence` already holds.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn resume(
        &self,
        mut sequence: Sequence,
        ids: &[u32],
        options: GenerateOptions,
    ) -> Result<Generation<'_>, EngineError> {
        let mut sampler = Sampler::new(options.sampling, self.model.spec.vocab_size)?;
        self.prefill(&mut sequence, ids)?;
        ids.iter().for_each(|id| sampler.accept(*id));
        Ok(Generation {
            engine: self,
            sequence,
            sampler,
            stop: options.stop,
            left: options.max_tokens,
            drawn: None,
            finish: None,
        })
    }

    /// Checks that `ids` can follow `seen` tokens.
    fn check(&self, ids: &[u32], seen: usize) -> Result<(), EngineError> {
        check_ids(ids, self.model.spec.vocab_size)?;
        let found = seen + ids.len();
        let context = self.options.context;
        if found > context {
            return Err(EngineError::ContextFull { found, context });
        }
        Ok(())
    }

    fn work(&self) -> MutexGuard<'_, Work> {
        // After a panic the workspace is safe to reuse: each pass writes what it reads.
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Without an early exit, so that it vectorizes: it reads all logits for each drawn token.
fn check_finite(logits: &[f32]) -> Result<(), EngineError> {
    let finite = logits.iter().fold(true, |all, logit| all & logit.is_finite());
    if finite { Ok(()) } else { Err(EngineError::NotFinite) }
}

pub(crate) fn check_ids(ids: &[u32], vocab_size: usize) -> Result<(), EngineError> {
    if ids.is_empty() {
        return Err(EngineError::EmptyPrompt);
    }
    match ids.iter().find(|id| **id as usize >= vocab_size) {
        Some(&id) => Err(EngineError::UnknownToken { id, vocab_size }),
        None => Ok(()),
    }
}

/// Options of [`Engine::generate`].
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// How the next token is drawn.
    pub sampling: Sampling,
    /// Largest number of tokens.
    pub max_tokens: usize,
    /// Tokens that end the text; they are not returned.
    pub stop: Vec<u32>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { sampling: Sampling::default(), max_tokens: usize::MAX, stop: Vec::new() }
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// This stop token was drawn.
    Stop(u32),
    /// `max_tokens` were generated.
    MaxTokens,
    /// The context is full.
    Context,
    /// A logit of the next token is NaN or infinite; [`EngineError::NotFinite`].
    NotFinite,
}

impl Finish {
    /// # Errors
    /// `NotFinite`: the text ended because the model failed.
    pub fn check(self) -> Result<Self, EngineError> {
        if self == Self::NotFinite { Err(EngineError::NotFinite) } else { Ok(self) }
    }
}

/// An iterator of drawn tokens; see [`Engine::generate`].
#[derive(Debug)]
pub struct Generation<'a> {
    engine: &'a Engine,
    sequence: Sequence,
    sampler: Sampler,
    stop: Vec<u32>,
    left: usize,
    /// A drawn token that is not yet in the sequence.
    drawn: Option<u32>,
    finish: Option<Finish>,
}

impl Generation<'_> {
    /// Why it ended; `None` before its end.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// The sequence, to be resumed, and the last token, which is not yet in it.
    pub fn into_sequence(self) -> (Sequence, Option<u32>) {
        (self.sequence, self.drawn)
    }

    fn draw(&mut self) -> Result<u32, Finish> {
        if self.left == 0 {
            return Err(Finish::MaxTokens);
        }
        if let Some(id) = self.drawn.take() {
            // The id comes from the sampler, so only a full context can fail.
            let fed = self.engine.decode_batch(&mut [(&mut self.sequence, id)]);
            fed.map_err(|_| Finish::Context)?;
            self.sequence.check_logits().map_err(|_| Finish::NotFinite)?;
        }
        let id = self.sampler.sample(self.sequence.logits());
        if self.stop.contains(&id) {
            return Err(Finish::Stop(id));
        }
        self.sampler.accept(id);
        self.left -= 1;
        self.drawn = Some(id);
        Ok(id)
    }
}

impl Iterator for Generation<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        if self.finish.is_some() {
            return None;
        }
        match self.draw() {
            Ok(id) => Some(id),
            Err(finish) => {
                self.finish = Some(finish);
                None
            }
        }
    }
}
