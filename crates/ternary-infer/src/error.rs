//! [`EngineError`]: errors of loading a model and of generating text.

use std::io;
use ternary_format::{FormatError, memory::OutOfMemory};

/// Why a model cannot be loaded, or why text cannot be generated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The model file cannot be read, its tensors are not those of its spec, or a text cannot be encoded.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The weights do not fit into memory.
    #[error("{0}; a smaller model fits")]
    Memory(#[from] OutOfMemory),
    /// The system refused to allocate the memory of the weights.
    #[error("no memory for {} MiB of weights: {source}", bytes >> 20)]
    Weights {
        /// Size of the packed weights.
        bytes: usize,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The system refused to start the threads of the pool.
    #[error("cannot start {threads} threads: {source}; expected fewer, or higher limits")]
    Threads {
        /// Number of threads.
        threads: usize,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The model has no tokenizer: it works on token ids only.
    #[error("the model has no tokenizer")]
    NoTokenizer,
    /// The model has no chat template: it continues text.
    #[error(
        "the model has no chat template, as one that was trained on dialogues has; it continues text (`duck generate`)"
    )]
    NoChatTemplate,
    /// A token id is not in the vocabulary.
    #[error("token id {id} is outside of the vocabulary of {vocab_size}")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Number of ids.
        vocab_size: usize,
    },
    /// A prompt has no tokens.
    #[error("the prompt is empty, expected at least one token")]
    EmptyPrompt,
    /// A sequence would become longer than the context.
    #[error("{found} tokens exceed the context of {context}")]
    ContextFull {
        /// Tokens of the sequence and of the prompt.
        found: usize,
        /// Maximum length of a sequence.
        context: usize,
    },
    /// The last question of a dialogue is too long, even without the turns before it.
    #[error(
        "the last message has {} tokens, expected at most {}: the model's context has {context}, and {room} are for the \
         answer; shorten the message",
        found.map_or_else(|| format!("more than {}", context.saturating_sub(*room)), |found| found.to_string()),
        context.saturating_sub(*room)
    )]
    MessageTooLong {
        /// Tokens of the message; `None` if it is so long that they were not counted.
        found: Option<usize>,
        /// Maximum length of a sequence.
        context: usize,
        /// Tokens that are reserved for the answer.
        room: usize,
    },
    /// The weights are finite, but a logit is not.
    #[error(
        "the model computes logits that are not finite (NaN or infinite): it is damaged, or its weights are too large"
    )]
    NotFinite,
    /// An option is out of range.
    #[error("`{key}` is {found}, expected {expected}")]
    Option {
        /// Name of the option.
        key: &'static str,
        /// Its value.
        found: String,
        /// Supported values.
        expected: &'static str,
    },
}
