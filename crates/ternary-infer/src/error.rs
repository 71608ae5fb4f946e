//! [`EngineError`]: what can be wrong with a model or a request.

use ternary_format::FormatError;

/// A model that the engine cannot run, or a request that it cannot serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The file cannot be read, or its tensors are not those of its spec.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The model knows ids only.
    #[error("the model has no tokenizer")]
    NoTokenizer,
    /// The model continues text, but nobody says how dialogues are written.
    #[error("the model has no chat template and no token `<|user|>`")]
    NoChatTemplate,
    #[error("token id {id} is outside of the vocabulary of {vocab_size}")]
    UnknownToken { id: u32, vocab_size: usize },
    #[error("the prompt is empty, expected at least one token")]
    EmptyPrompt,
    #[error("{found} tokens exceed the context of {context}")]
    ContextFull { found: usize, context: usize },
    #[error("`{key}` is {found}, expected {expected}")]
    Option { key: &'static str, found: String, expected: &'static str },
}
