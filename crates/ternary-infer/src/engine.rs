//! [`Engine`]: a loaded model that continues [`Sequence`]s.

use crate::{
    EngineError, EngineOptions, Sampler, Sequence,
    cache::KvCache,
    forward::{SequenceChunk, Workspace},
    model::Model,
    sequence::check_finite,
};
use std::{
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};
use ternary_format::{ModelSpec, PackedModel, Tokenizer, read_model, threads};
use ternary_kernels::Pool;

/// Tokens of a prompt that pass through the layers together (prefill chunk).
const PREFILL_CHUNK: usize = 128;

/// A model, packed for this CPU, with its thread pool.
///
/// It can be shared between threads; forward passes wait for each other.
#[derive(Debug)]
pub struct Engine {
    name: String,
    model: Model,
    tokenizer: Option<Tokenizer>,
    chat_template: Option<String>,
    workspace: Mutex<Workspace>,
    /// With the context that is in effect.
    options: EngineOptions,
}

impl Engine {
    /// Reads a GGUF file, an archive or a Hugging Face folder.
    ///
    /// # Errors
    /// `Format`: it cannot be read. Those of [`from_model`](Self::from_model).
    pub fn load(path: impl AsRef<Path>, options: EngineOptions) -> Result<Self, EngineError> {
        Self::from_model(read_model(path.as_ref())?, options)
    }

    /// Packs the weights, and those of an adapter, for this CPU. The model, and the file that it is mapped from, are
    /// then released.
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
        let workspace = Mutex::new(Workspace::new(&packed, pool, activations, context));
        let PackedModel { name, tokenizer, chat_template, .. } = model;
        let options = EngineOptions { context, ..options };
        Ok(Self { name, model: packed, tokenizer, chat_template, workspace, options })
    }

    /// The name of the model.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Architecture and sizes of the model.
    pub fn spec(&self) -> &ModelSpec {
        &self.model.spec
    }

    /// The tokenizer; `None` if the file has none: the model works on token ids only.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The chat template, in Jinja; `None` if the file has none: the model continues text.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Maximum length of a sequence, in tokens.
    pub fn context(&self) -> usize {
        self.options.context
    }

    /// Creates an empty sequence.
    pub fn sequence(&self) -> Sequence {
        Sequence {
            cache: KvCache::new(&self.model.spec, &self.options),
            length: 0,
            logits: vec![0.0; self.model.spec.vocab_size],
        }
    }

    /// Prefill: appends `ids` to a sequence, chunk by chunk, and computes the logits of the token after them.
    ///
    /// # Errors
    /// `EmptyPrompt`, `UnknownToken`, `ContextFull`; the sequence is then unchanged. `NotFinite`: a logit is NaN or
    /// infinite.
    pub fn prefill(&self, sequence: &mut Sequence, ids: &[u32]) -> Result<(), EngineError> {
        self.check(ids, sequence.length)?;
        let workspace = &mut *self.workspace();
        for (index, chunk) in ids.chunks(PREFILL_CHUNK).enumerate() {
            let chunks = &mut [(&mut *sequence, chunk)];
            workspace.forward(&self.model, chunks);
            if (index + 1) * PREFILL_CHUNK >= ids.len() {
                workspace.last_logits(&self.model, chunks);
            }
        }
        sequence.check_logits()
    }

    /// Decode: appends one token to each of several sequences in one forward pass. Each sequence gets the logits that it
    /// would get alone.
    ///
    /// # Errors
    /// `UnknownToken`, `ContextFull`; the sequences are then unchanged.
    pub fn decode_batch(&self, batch: &mut [(&mut Sequence, u32)]) -> Result<(), EngineError> {
        self.forward_batch(batch)
    }

    /// As [`decode_batch`](Self::decode_batch), with several tokens per sequence, at least one: chunked prefill of one
    /// prompt in the same pass as decoding others. Memory is allocated for all tokens at once, so split long prompts into
    /// chunks.
    ///
    /// # Errors
    /// `EmptyPrompt`, `UnknownToken`, `ContextFull`; the sequences are then unchanged.
    pub fn extend_batch(&self, batch: &mut [(&mut Sequence, &[u32])]) -> Result<(), EngineError> {
        self.forward_batch(batch)
    }

    fn forward_batch<S: SequenceChunk>(&self, batch: &mut [S]) -> Result<(), EngineError> {
        for chunk in batch.iter() {
            self.check(chunk.ids(), chunk.sequence().length)?;
        }
        if batch.is_empty() {
            return Ok(());
        }
        let workspace = &mut *self.workspace();
        workspace.forward(&self.model, batch);
        workspace.last_logits(&self.model, batch);
        Ok(())
    }

    /// Draws the next token of each sequence with its sampler, in parallel.
    ///
    /// # Errors
    /// Per sequence, `NotFinite`: a logit is NaN or infinite.
    pub fn sample_batch(&self, batch: Vec<(&Sequence, &mut Sampler)>) -> Vec<Result<u32, EngineError>> {
        let mut draws: Vec<_> =
            batch.into_iter().map(|(sequence, sampler)| (sequence, sampler, Ok(0))).collect();
        self.workspace().pool.chunks(&mut draws, 1, |_, _, draw| {
            let (sequence, sampler, id) = &mut draw[0];
            *id = sequence.check_logits().map(|()| sampler.sample(sequence.logits()));
        });
        draws.into_iter().map(|(_, _, id)| id).collect()
    }

    /// Computes the logits at every position of a text: `logits[i]` is for the token after `ids[i]`.
    ///
    /// # Shapes
    /// `[ids, vocab]`
    ///
    /// # Errors
    /// `EmptyPrompt`, `UnknownToken`, `ContextFull`, `NotFinite`
    pub fn logits(&self, ids: &[u32]) -> Result<Vec<f32>, EngineError> {
        self.check(ids, 0)?;
        let vocab = self.model.spec.vocab_size;
        let mut logits = vec![0.0; ids.len() * vocab];
        let mut sequence = self.sequence();
        let workspace = &mut *self.workspace();
        for (chunk, logits) in ids.chunks(PREFILL_CHUNK).zip(logits.chunks_mut(PREFILL_CHUNK * vocab)) {
            workspace.forward(&self.model, &mut [(&mut sequence, chunk)]);
            workspace.all_logits(&self.model, logits);
            check_finite(logits)?;
        }
        Ok(logits)
    }

    /// Checks that `ids` can follow `length` tokens.
    fn check(&self, ids: &[u32], length: usize) -> Result<(), EngineError> {
        check_ids(ids, self.model.spec.vocab_size)?;
        let found = length + ids.len();
        let context = self.options.context;
        if found > context {
            return Err(EngineError::ContextFull { found, context });
        }
        Ok(())
    }

    fn workspace(&self) -> MutexGuard<'_, Workspace> {
        // After a panic the workspace is safe to reuse: each pass writes what it reads.
        self.workspace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Checks that there are ids, and that all are in the vocabulary.
///
/// # Errors
/// `EmptyPrompt`, `UnknownToken`
pub(crate) fn check_ids(ids: &[u32], vocab_size: usize) -> Result<(), EngineError> {
    if ids.is_empty() {
        return Err(EngineError::EmptyPrompt);
    }
    match ids.iter().find(|id| **id as usize >= vocab_size) {
        Some(&id) => Err(EngineError::UnknownToken { id, vocab_size }),
        None => Ok(()),
    }
}
