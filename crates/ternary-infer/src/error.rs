//! [`EngineError`]: what can be wrong with a model or a request.

use ternary_format::FormatError;

/// A model that the engine cannot run, or a request that it cannot serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The file cannot be read.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The description of the model contradicts itself.
    #[error("`{key}` of the model is {found}, expected {expected}")]
    Spec { key: &'static str, found: String, expected: String },
    #[error("tensor {name} is missing")]
    MissingTensor { name: String },
    #[error("tensor {name} has shape {found:?}, expected {expected:?}")]
    Shape { name: String, found: Vec<usize>, expected: Vec<usize> },
    /// The model has no tokenizer, so it speaks ids only.
    #[error("the model has no tokenizer")]
    NoTokenizer,
    #[error("token id {id} is outside of the vocabulary of {vocab_size}")]
    UnknownToken { id: u32, vocab_size: usize },
    #[error("the prompt is empty, expected at least one token")]
    EmptyPrompt,
    #[error("{found} tokens exceed the context of {context}")]
    ContextFull { found: usize, context: usize },
    #[error("`{key}` is {found}, expected {expected}")]
    Option { key: &'static str, found: String, expected: &'static str },
}
