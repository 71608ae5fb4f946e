//! [`Batch`]: the active completions of one engine, and one step of continuous batching.
//!
//! A step samples one token per active completion, and computes all of them in one forward pass together with the next
//! [`PREFILL_CHUNK`] tokens of one prompt. Prompts take turns, chunk by chunk.
//!
//! # Prefix caching
//!
//! A [`SequenceSlot`] is a KV cache with the tokens in it. Slots outlive their completions. A new prompt takes the idle slot
//! with the longest common prefix if at least half of that slot is common, and otherwise a free one; before its next chunk
//! it copies the KV cache of any slot with a longer common prefix. Only the rest is computed.

use crate::{
    job::{Event, FinishReason, Job},
    logprob::TokenLogprob,
    metric::ModelMetric,
    stop_sequence::StopSequences,
};
use std::collections::VecDeque;
use ternary_format::{Decoder, Tokenizer};
use ternary_infer::{Engine, Sampler, Sequence};
use tokio::sync::mpsc::UnboundedSender;

/// Tokens of a prompt that one step computes. The active completions wait for them.
const PREFILL_CHUNK: usize = 64;

/// The active completions of an engine.
pub struct Batch<'a> {
    engine: &'a Engine,
    tokenizer: &'a Tokenizer,
    metric: &'a ModelMetric,
    /// Tokens that end a completion.
    end_tokens: Vec<u32>,
    /// The next one first.
    prefills: Vec<Prefill>,
    decodes: Vec<Decode<'a>>,
    /// The least recently used first.
    idle: Vec<SequenceSlot>,
    /// Maximum number of active completions, and so of slots.
    size: usize,
}

/// A sequence, and the tokens in its KV cache.
struct SequenceSlot {
    sequence: Sequence,
    ids: Vec<u32>,
}

impl SequenceSlot {
    /// The length of the common prefix with a prompt, at most all but its last token: that one must be computed, for its
    /// logits.
    fn common_prefix(&self, prompt: &[u32]) -> usize {
        let same = self.ids.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        same.min(prompt.len() - 1)
    }

    fn copy_from(&mut self, other: &Self) {
        self.sequence.copy_from(&other.sequence);
        self.ids.clone_from(&other.ids);
    }

    fn truncate(&mut self, length: usize) {
        self.sequence.truncate(length);
        self.ids.truncate(length);
    }
}

/// A prompt that is being computed.
struct Prefill {
    job: Job,
    slot: SequenceSlot,
}

/// A completion that is being generated.
struct Decode<'a> {
    choice: usize,
    slot: SequenceSlot,
    sampler: Sampler,
    decoder: Option<Decoder<'a>>,
    stop_sequences: StopSequences,
    top_logprobs: Option<usize>,
    /// Log probabilities of tokens whose text has not been sent.
    pending_logprobs: VecDeque<TokenLogprob>,
    /// Characters that were generated, and that were sent.
    characters: usize,
    sent_characters: usize,
    generated: usize,
    /// At least 1.
    max_tokens: usize,
    events: UnboundedSender<Event>,
}

impl<'a> Batch<'a> {
    /// # Panics
    /// If the engine has no tokenizer.
    pub fn new(engine: &'a Engine, metric: &'a ModelMetric, size: usize) -> Self {
        let tokenizer = engine.tokenizer().expect("`Models` take no engine without a tokenizer");
        let end_tokens = tokenizer.specials().map(|(_, id)| id).chain(tokenizer.ends().eos).collect();
        let (prefills, decodes, idle) = Default::default();
        Self { engine, tokenizer, metric, end_tokens, prefills, decodes, idle, size }
    }

    /// Number of active completions.
    pub fn len(&self) -> usize {
        let prefills: usize = self.prefills.iter().map(|prefill| prefill.job.choices.len()).sum();
        prefills + self.decodes.len()
    }

    /// Adds a job.
    pub fn add(&mut self, job: Job) {
        let longest = (0..self.idle.len()).max_by_key(|&i| self.idle[i].common_prefix(&job.prompt));
        // A slot that mostly differs is kept for its own dialogue while another one is free.
        let own = longest.filter(|&i| 2 * self.idle[i].common_prefix(&job.prompt) >= self.idle[i].ids.len());
        let mut slot = match own {
            Some(own) => self.idle.remove(own),
            None => self.take_slot(0),
        };
        slot.truncate(slot.common_prefix(&job.prompt));
        self.metric.prompt(job.prompt.len());
        self.metric.reused(slot.ids.len());
        self.prefills.push(Prefill { job, slot });
    }

    /// A new slot, or the least recently used one. `held` slots are in none of the lists.
    fn take_slot(&mut self, held: usize) -> SequenceSlot {
        let used = self.idle.len() + self.prefills.len() + self.decodes.len() + held;
        if used < self.size || self.idle.is_empty() {
            return SequenceSlot { sequence: self.engine.sequence(), ids: Vec::new() };
        }
        self.idle.remove(0)
    }

    /// Samples the next token of every completion, and computes all of them in one pass with a chunk of one prompt.
    pub fn step(&mut self) {
        self.release_abandoned();
        let prefill = self.next_prefill();
        self.sample();
        self.forward(prefill);
    }

    /// Ends all completions with an error.
    pub fn fail(&mut self, why: &'static str) {
        self.prefills.drain(..).for_each(|Prefill { job, .. }| drop(job.events.send(Event::Failed(why))));
        self.decodes.drain(..).for_each(|decode| drop(decode.events.send(Event::Failed(why))));
    }

    /// Ends completions whose receiver has gone.
    fn release_abandoned(&mut self) {
        let prefills = self.prefills.extract_if(.., |prefill| prefill.job.events.is_closed());
        let decodes = self.decodes.extract_if(.., |decode| decode.events.is_closed());
        self.idle.extend(prefills.map(|prefill| prefill.slot).chain(decodes.map(|decode| decode.slot)));
    }

    /// The next prompt, after copying what other slots have computed of it.
    fn next_prefill(&mut self) -> Option<Prefill> {
        if self.prefills.is_empty() {
            return None;
        }
        let mut prefill = self.prefills.remove(0);
        let Prefill { job, slot } = &mut prefill;
        // Prompts with a common prefix, such as a system message, are computed once and copied.
        let others = self.idle.iter().chain(self.decodes.iter().map(|decode| &decode.slot));
        let others = others.chain(self.prefills.iter().map(|prefill| &prefill.slot));
        let common = |slot: &SequenceSlot| slot.common_prefix(&job.prompt);
        if let Some(other) = others.max_by_key(|slot| common(slot))
            && let known = slot.ids.len()
            && common(other) > known
        {
            slot.copy_from(other);
            slot.truncate(common(other));
            self.metric.reused(slot.ids.len() - known);
        }
        Some(prefill)
    }

    /// Starts all completions of a prompt that has been computed.
    fn fork(&mut self, Prefill { job, slot }: Prefill) {
        for choice in job.choices.clone().skip(1) {
            let mut copy = self.take_slot(1);
            copy.copy_from(&slot);
            self.start_decode(&job, choice, copy);
        }
        self.start_decode(&job, job.choices.start, slot);
    }

    fn start_decode(&mut self, job: &Job, choice: usize, slot: SequenceSlot) {
        let seed = job.sampling.seed.wrapping_add(choice as u64);
        let sampling = job.sampling.clone().with_seed(seed);
        let mut sampler = match Sampler::new(sampling, self.engine.spec().vocab_size) {
            Ok(sampler) => sampler,
            Err(error) => {
                tracing::error!(%error, "the sampler refused checked options");
                job.events.send(Event::Failed("the engine refused the sampling options")).ok();
                return self.idle.push(slot);
            }
        };
        job.prompt.iter().for_each(|id| sampler.accept(*id));
        self.decodes.push(Decode {
            choice,
            slot,
            sampler,
            decoder: Some(self.tokenizer.decoder()),
            stop_sequences: StopSequences::new(job.stop_sequences.clone()),
            top_logprobs: job.top_logprobs,
            pending_logprobs: VecDeque::new(),
            characters: 0,
            sent_characters: 0,
            generated: 0,
            max_tokens: job.max_tokens,
            events: job.events.clone(),
        });
    }

    /// Samples one token per completion, and removes those that end.
    fn sample(&mut self) {
        let context = self.engine.context();
        let mut active = Vec::with_capacity(self.decodes.len());
        let sampling =
            self.decodes.iter_mut().map(|decode| (&decode.slot.sequence, &mut decode.sampler)).collect();
        let sampled = self.engine.sample_batch(sampling);
        for (mut decode, id) in self.decodes.drain(..).zip(sampled) {
            let Ok(id) = id else {
                decode.events.send(Event::NotFinite).ok();
                self.idle.push(decode.slot);
                continue;
            };
            match decode.push_token(id, &self.end_tokens, context) {
                Ok(()) => {
                    self.metric.generated(1);
                    decode.slot.ids.push(id);
                    active.push(decode);
                }
                Err((finish, generated)) => {
                    self.metric.generated(generated);
                    decode.end(finish);
                    self.idle.push(decode.slot);
                }
            }
        }
        self.decodes = active;
    }

    /// Computes the sampled tokens, and the next chunk of a prompt.
    fn forward(&mut self, mut prefill: Option<Prefill>) {
        let decodes = self.decodes.iter_mut().map(|Decode { slot, .. }| {
            let SequenceSlot { sequence, ids } = slot;
            (sequence, &ids[ids.len() - 1..])
        });
        let prompt = prefill.as_mut().map(|Prefill { job, slot }| {
            let rest = &job.prompt[slot.ids.len()..];
            (&mut slot.sequence, &rest[..rest.len().min(PREFILL_CHUNK)])
        });
        let mut batch: Vec<(&mut Sequence, &[u32])> = decodes.chain(prompt).collect();
        if let Err(error) = self.engine.extend_batch(&mut batch) {
            tracing::error!(%error, "the engine refused checked tokens");
            self.prefills.extend(prefill);
            return self.fail("the engine refused a token");
        }
        self.metric.step(self.decodes.len());
        let Some(mut prefill) = prefill else { return };
        let Prefill { job, slot } = &mut prefill;
        let computed = job.prompt.len().min(slot.ids.len() + PREFILL_CHUNK);
        slot.ids.extend(&job.prompt[slot.ids.len()..computed]);
        if computed < job.prompt.len() {
            self.prefills.push(prefill);
        } else {
            self.fork(prefill);
        }
    }
}

impl Decode<'_> {
    /// Takes a sampled token with which the completion continues. Otherwise returns why the completion ends, and how many
    /// tokens this call added to it.
    fn push_token(
        &mut self,
        id: u32,
        end_tokens: &[u32],
        context: usize,
    ) -> Result<(), (FinishReason, usize)> {
        let logits = self.slot.sequence.logits();
        if end_tokens.contains(&id) {
            return Err((FinishReason::Stop, 0));
        }
        if let Some(top) = self.top_logprobs {
            self.pending_logprobs.push_back(TokenLogprob::new(logits, id, top, self.characters));
        }
        self.sampler.accept(id);
        self.generated += 1;
        let piece = self.decoder.as_mut().map(|decoder| decoder.push(id)).unwrap_or_default();
        self.push_text(&piece);
        if self.stop_sequences.found() {
            Err((FinishReason::Stop, 1))
        } else if self.generated == self.max_tokens || self.slot.sequence.len() == context {
            Err((FinishReason::Length, 1))
        } else {
            Ok(())
        }
    }

    fn push_text(&mut self, piece: &str) {
        self.characters += piece.chars().count();
        let text = self.stop_sequences.push(piece);
        self.send(text);
    }

    fn send(&mut self, text: String) {
        if text.is_empty() {
            return;
        }
        self.sent_characters += text.chars().count();
        let sent =
            self.pending_logprobs.iter().take_while(|token| token.offset < self.sent_characters).count();
        let logprobs = self.pending_logprobs.drain(..sent).collect();
        self.events.send(Event::Text { choice: self.choice, text, logprobs }).ok();
    }

    /// Sends the rest of the text, and the end.
    fn end(&mut self, finish: FinishReason) {
        let rest = self.decoder.take().map(Decoder::finish).unwrap_or_default();
        self.push_text(&rest);
        let rest = self.stop_sequences.finish();
        self.send(rest);
        let stopped = self.stop_sequences.found();
        let finish = if stopped { FinishReason::Stop } else { finish };
        if !stopped && !self.pending_logprobs.is_empty() {
            // Tokens at the end without text of their own.
            let logprobs = self.pending_logprobs.drain(..).collect();
            self.events.send(Event::Text { choice: self.choice, text: String::new(), logprobs }).ok();
        }
        self.events.send(Event::End { choice: self.choice, finish, tokens: self.generated }).ok();
    }
}
