//! [`Job`]: work for a scheduler, and the [`Event`]s that come back.

use crate::logprob::TokenLogprob;
use std::ops::Range;
use ternary_infer::Sampling;
use tokio::sync::mpsc::UnboundedSender;

/// A prompt, and the completions to generate for it.
#[derive(Debug)]
pub struct Job {
    /// At least one token and at most the context, ids of the vocabulary.
    pub prompt: Vec<u32>,
    /// Checked. Each completion samples with `seed` plus its index.
    pub sampling: Sampling,
    /// The indices of the completions within the request.
    pub choices: Range<usize>,
    /// Maximum length of a completion, at least 1.
    pub max_tokens: usize,
    pub stop_sequences: Vec<String>,
    /// `Some(k)`: with the log probability of each token, and of the `k` most likely ones in its place.
    pub top_logprobs: Option<usize>,
    /// Receives the completions. The work ends when the receiver is dropped. Unbounded, since the number of messages is: at
    /// most two per token.
    pub events: UnboundedSender<Event>,
}

/// Progress of a completion.
#[derive(Debug)]
pub enum Event {
    /// The next characters, always whole ones.
    Text { choice: usize, text: String, logprobs: Vec<TokenLogprob> },
    /// The completion has ended, after this many tokens.
    End { choice: usize, finish: FinishReason, tokens: usize },
    /// The logits of a completion are not finite: it is given up.
    NotFinite,
    /// All completions of the request are given up.
    Failed(&'static str),
}

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended it, or it contains a stop sequence.
    Stop,
    /// It has `max_tokens` tokens, or the context is full.
    Length,
}

/// Why a scheduler takes no jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubmitError {
    /// The queue is full.
    Full,
    /// The server is stopping.
    Stopping,
    /// The thread of the engine has ended.
    Dead,
}
