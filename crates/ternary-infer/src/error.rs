//! [`EngineError`]: errors of loading a model and of generating text.

use std::io;
use ternary_format::{FormatError, memory::OutOfMemory};

/// A model that the engine cannot run, or a request that it cannot serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The file cannot be read, or its tensors are not those of its spec.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The weights do not fit into memory.
    #[error("{0}; a smaller model fits")]
    Memory(#[from] OutOfMemory),
    #[error("no memory for {} MiB of weights: {source}", bytes >> 20)]
    Weights { bytes: usize, source: io::Error },
    #[error("cannot start {threads} threads: {source}; expected fewer, or higher limits")]
    Threads { threads: usize, source: io::Error },
    /// The model has no tokenizer: it works on ids only.
    #[error("the model has no tokenizer")]
    NoTokenizer,
    /// The model has no chat template: it continues text.
    #[error(
        "the model has no chat template, as one that was trained on dialogues has; it continues text (`duck generate`)"
    )]
    NoChatTemplate,
    #[error("token id {id} is outside of the vocabulary of {vocab_size}")]
    UnknownToken { id: u32, vocab_size: usize },
    #[error("the prompt is empty, expected at least one token")]
    EmptyPrompt,
    #[error("{found} tokens exceed the context of {context}")]
    ContextFull { found: usize, context: usize },
    /// The last question of a dialogue is too long, even without the turns before it. `found` is `None` where the message
    /// is so long that its tokens were not counted.
    #[error(
        "the last message has {} tokens, expected at most {}: the model's context has {context}, and {room} are for the \
         answer; shorten the message",
        found.map_or_else(|| format!("more than {}", context.saturating_sub(*room)), |found| found.to_string()),
        context.saturating_sub(*room)
    )]
    MessageTooLong { found: Option<usize>, context: usize, room: usize },
    /// The weights are finite, but a logit is not.
    #[error(
        "the model computes logits that are not finite (NaN or infinite): it is damaged, or its weights are too large"
    )]
    NotFinite,
    #[error("`{key}` is {found}, expected {expected}")]
    Option { key: &'static str, found: String, expected: &'static str },
}
