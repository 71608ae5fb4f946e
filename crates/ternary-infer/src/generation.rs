//! [`Generation`]: tokens that continue a prompt, one by one.

use crate::{Engine, EngineError, Sampler, Sampling, Sequence};
use getset::WithSetters;

/// Options of [`Engine::generate`].
///
/// ```
/// use ternary_infer::{GenerateOptions, Sampling};
///
/// let options = GenerateOptions::default().with_sampling(Sampling::greedy()).with_max_tokens(100);
/// ```
#[derive(Clone, Debug, WithSetters)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct GenerateOptions {
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Maximum number of generated tokens.
    pub max_tokens: usize,
    /// Stop tokens: they end the generation, and are not returned.
    pub stop: Vec<u32>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { sampling: Sampling::default(), max_tokens: usize::MAX, stop: Vec::new() }
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// This stop token was drawn.
    Stop(u32),
    /// `max_tokens` were generated.
    MaxTokens,
    /// The context is full.
    Context,
    /// A logit of the next token is NaN or infinite; [`EngineError::NotFinite`].
    NotFinite,
}

impl FinishReason {
    /// Returns the reason, unless it is a failure of the model.
    ///
    /// # Errors
    /// `NotFinite`: a logit is NaN or infinite.
    pub fn check(self) -> Result<Self, EngineError> {
        if self == Self::NotFinite { Err(EngineError::NotFinite) } else { Ok(self) }
    }
}

impl Engine {
    /// Returns an iterator of the tokens that follow `prompt`.
    ///
    /// # Errors
    /// `EmptyPrompt`, `UnknownToken`, `ContextFull`: the prompt does not fit. `Option`: a sampling parameter is out of
    /// range. `NotFinite`: a logit after the prompt is NaN or infinite.
    pub fn generate(&self, prompt: &[u32], options: GenerateOptions) -> Result<Generation<'_>, EngineError> {
        self.resume(self.sequence(), prompt, options)
    }

    /// As [`generate`](Self::generate), after the tokens that `sequence` already contains.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn resume(
        &self,
        mut sequence: Sequence,
        ids: &[u32],
        options: GenerateOptions,
    ) -> Result<Generation<'_>, EngineError> {
        let mut sampler = Sampler::new(options.sampling, self.spec().vocab_size)?;
        self.prefill(&mut sequence, ids)?;
        ids.iter().for_each(|id| sampler.accept(*id));
        Ok(Generation {
            engine: self,
            sequence,
            sampler,
            stop: options.stop,
            remaining: options.max_tokens,
            pending: None,
            finish_reason: None,
        })
    }
}

/// An iterator of generated tokens; see [`Engine::generate`].
#[derive(Debug)]
pub struct Generation<'a> {
    engine: &'a Engine,
    sequence: Sequence,
    sampler: Sampler,
    stop: Vec<u32>,
    remaining: usize,
    /// The last token, which is not in the sequence yet.
    pending: Option<u32>,
    finish_reason: Option<FinishReason>,
}

impl Generation<'_> {
    /// Why it ended; `None` before its end.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish_reason
    }

    /// The sequence, for [`Engine::resume`], and the last token, which is not in the sequence yet.
    pub fn into_sequence(self) -> (Sequence, Option<u32>) {
        (self.sequence, self.pending)
    }

    fn draw(&mut self) -> Result<u32, FinishReason> {
        if self.remaining == 0 {
            return Err(FinishReason::MaxTokens);
        }
        if let Some(id) = self.pending.take() {
            // The id comes from the sampler, so only a full context can fail.
            let decoded = self.engine.decode_batch(&mut [(&mut self.sequence, id)]);
            decoded.map_err(|_| FinishReason::Context)?;
            self.sequence.check_logits().map_err(|_| FinishReason::NotFinite)?;
        }
        let id = self.sampler.sample(self.sequence.logits());
        if self.stop.contains(&id) {
            return Err(FinishReason::Stop(id));
        }
        self.sampler.accept(id);
        self.remaining -= 1;
        self.pending = Some(id);
        Ok(id)
    }
}

impl Iterator for Generation<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        if self.finish_reason.is_some() {
            return None;
        }
        match self.draw() {
            Ok(id) => Some(id),
            Err(reason) => {
                self.finish_reason = Some(reason);
                None
            }
        }
    }
}
