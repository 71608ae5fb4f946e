//! Text to batches. Everything that can fail fails in [`tokens::prepare`]; batches are infallible.

pub mod batch;
pub mod chat;
pub mod corpus;
mod error;
pub mod tokenizer;
pub mod tokens;
pub mod window;


pub use error::DataError;

use serde::{Deserialize, Serialize};

/// The `[data]` section of an experiment: which texts, and how they become tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Files or folders of `.txt` and `.jsonl`, or `embedded` for the corpus that comes with the crate.
    pub train: Vec<String>,
    /// The validation texts; empty: the share `valid_fraction` of the training documents is held out.
    pub valid: Vec<String>,
    /// Share of the training text that is held out when `valid` is empty, in (0, 0.5].
    pub valid_fraction: f64,
    /// `byte`, `char`, `bpe` (trained on the training text) or the path of a `tokenizer.json`.
    pub tokenizer: String,
    /// Largest vocabulary of a trained `bpe` tokenizer, special tokens included; ignored by the others.
    pub bpe_vocab_size: usize,
}
