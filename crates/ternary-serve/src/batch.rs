//! [`Batch`]: the texts in the making of one engine, and a step of all of them.

use crate::{
    metric::ModelMetric,
    scheduler::{Event, Finish, Job},
    score::Score,
    stop::Stops,
};
use std::collections::VecDeque;
use ternary_format::{Decoder, Tokenizer};
use ternary_infer::{Engine, Sampler, Sequence};
use tokio::sync::mpsc::UnboundedSender;

/// Tokens of a prompt that are read in a step: the others wait for so long.
const CHUNK: usize = 64;

/// Texts in the making.
///
/// Sequences are kept when their text has ended, and a prompt that begins like one of them is read from where it
/// differs.
pub struct Batch<'a> {
    engine: &'a Engine,
    tokenizer: &'a Tokenizer,
    metric: &'a ModelMetric,
    /// Tokens that end a text.
    ends: Vec<u32>,
    /// Whose turn it is first.
    reading: Vec<Reading>,
    writing: Vec<Writing<'a>>,
    /// The oldest first.
    idle: Vec<Slot>,
    /// Texts in the making, and so sequences, at most.
    size: usize,
}

/// A sequence, and the tokens that it holds.
struct Slot {
    sequence: Sequence,
    ids: Vec<u32>,
}

impl Slot {
    /// Tokens of a prompt that need not be read: the last one has to be, for its logits.
    fn common(&self, prompt: &[u32]) -> usize {
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

/// A prompt that is being read.
struct Reading {
    job: Job,
    slot: Slot,
}

/// A text that is being written.
struct Writing<'a> {
    choice: usize,
    slot: Slot,
    sampler: Sampler,
    decoder: Option<Decoder<'a>>,
    stops: Stops,
    scores: Option<usize>,
    /// Scores of tokens whose text has not gone out.
    held: VecDeque<Score>,
    /// Characters of the text so far, and of what has gone out.
    characters: usize,
    sent: usize,
    /// Tokens that are drawn, and how many there may be, at least one.
    drawn: usize,
    tokens: usize,
    events: UnboundedSender<Event>,
}

impl<'a> Batch<'a> {
    /// # Panics
    /// Without a tokenizer.
    pub fn new(engine: &'a Engine, metric: &'a ModelMetric, size: usize) -> Self {
        let tokenizer = engine.tokenizer().expect("`Models` take no engine without a tokenizer");
        let ends = tokenizer.specials().map(|(_, id)| id).chain(tokenizer.ends().eos).collect();
        let (reading, writing, idle) = Default::default();
        Self { engine, tokenizer, metric, ends, reading, writing, idle, size }
    }

    /// Texts in the making.
    pub fn len(&self) -> usize {
        let reading: usize = self.reading.iter().map(|reading| reading.job.choices.len()).sum();
        reading + self.writing.len()
    }

    /// Takes a job.
    pub fn begin(&mut self, job: Job) {
        let likest = (0..self.idle.len()).max_by_key(|&i| self.idle[i].common(&job.prompt));
        // What another dialogue may go on with is kept while there is room.
        let own = likest.filter(|&i| 2 * self.idle[i].common(&job.prompt) >= self.idle[i].ids.len());
        let mut slot = match own {
            Some(own) => self.idle.remove(own),
            None => self.room(0),
        };
        slot.truncate(slot.common(&job.prompt));
        self.metric.prompt(job.prompt.len());
        self.metric.reused(slot.ids.len());
        self.reading.push(Reading { job, slot });
    }

    /// A sequence whose tokens nobody waits for: a new one, or the oldest. `held` sequences are not in any list.
    fn room(&mut self, held: usize) -> Slot {
        let used = self.idle.len() + self.reading.len() + self.writing.len() + held;
        if used < self.size || self.idle.is_empty() {
            return Slot { sequence: self.engine.sequence(), ids: Vec::new() };
        }
        self.idle.remove(0)
    }

    /// Draws the next token of every text, and reads all of them in one pass together with a part of one prompt.
    pub fn step(&mut self) {
        self.abandon();
        let reading = self.prepare();
        self.draw();
        self.pass(reading);
    }

    /// Ends all texts with an error.
    pub fn fail(&mut self, why: &'static str) {
        self.reading.drain(..).for_each(|Reading { job, .. }| drop(job.events.send(Event::Failed(why))));
        self.writing.drain(..).for_each(|text| drop(text.events.send(Event::Failed(why))));
    }

    /// Lets go what nobody waits for.
    fn abandon(&mut self) {
        let reading = self.reading.extract_if(.., |reading| reading.job.events.is_closed());
        let writing = self.writing.extract_if(.., |text| text.events.is_closed());
        self.idle.extend(reading.map(|reading| reading.slot).chain(writing.map(|text| text.slot)));
    }

    /// The prompt whose turn it is, with what others have read of it already.
    fn prepare(&mut self) -> Option<Reading> {
        if self.reading.is_empty() {
            return None;
        }
        let mut reading = self.reading.remove(0);
        let Reading { job, slot } = &mut reading;
        // Prompts that begin alike, as with one system message, are read once and copied.
        let others = self.idle.iter().chain(self.writing.iter().map(|text| &text.slot));
        let others = others.chain(self.reading.iter().map(|reading| &reading.slot));
        let common = |slot: &Slot| slot.common(&job.prompt);
        if let Some(other) = others.max_by_key(|slot| common(slot))
            && let known = slot.ids.len()
            && common(other) > known
        {
            slot.copy_from(other);
            slot.truncate(common(other));
            self.metric.reused(slot.ids.len() - known);
        }
        Some(reading)
    }

    /// From one prompt to the texts that follow it.
    fn fork(&mut self, Reading { job, slot }: Reading) {
        for choice in job.choices.clone().skip(1) {
            let mut copy = self.room(1);
            copy.copy_from(&slot);
            self.open(&job, choice, copy);
        }
        self.open(&job, job.choices.start, slot);
    }

    fn open(&mut self, job: &Job, choice: usize, slot: Slot) {
        let seed = job.sampling.seed.wrapping_add(choice as u64);
        let sampling = job.sampling.clone().with_seed(seed);
        let mut sampler = match Sampler::new(sampling, self.engine.spec().vocab_size) {
            Ok(sampler) => sampler,
            Err(error) => {
                tracing::error!(%error, "checked sampling was refused");
                job.events.send(Event::Failed("the engine refused the sampling")).ok();
                return self.idle.push(slot);
            }
        };
        job.prompt.iter().for_each(|id| sampler.accept(*id));
        self.writing.push(Writing {
            choice,
            slot,
            sampler,
            decoder: Some(self.tokenizer.decoder()),
            stops: Stops::new(job.stops.clone()),
            scores: job.scores,
            held: VecDeque::new(),
            characters: 0,
            sent: 0,
            drawn: 0,
            tokens: job.tokens,
            events: job.events.clone(),
        });
    }

    /// Draws a token for every text; those that end leave.
    fn draw(&mut self) {
        let context = self.engine.context();
        let mut going = Vec::with_capacity(self.writing.len());
        let drawing = self.writing.iter_mut().map(|text| (&text.slot.sequence, &mut text.sampler)).collect();
        let drawn = self.engine.sample_batch(drawing);
        for (mut text, id) in self.writing.drain(..).zip(drawn) {
            let Ok(id) = id else {
                text.events.send(Event::NotFinite).ok();
                self.idle.push(text.slot);
                continue;
            };
            match text.take(id, &self.ends, context) {
                Ok(()) => {
                    self.metric.generated(1);
                    text.slot.ids.push(id);
                    going.push(text);
                }
                Err((finish, drawn)) => {
                    self.metric.generated(drawn);
                    text.end(finish);
                    self.idle.push(text.slot);
                }
            }
        }
        self.writing = going;
    }

    /// Reads the drawn tokens, and the next chunk of a prompt.
    fn pass(&mut self, mut reading: Option<Reading>) {
        let texts = self.writing.iter_mut().map(|Writing { slot, .. }| {
            let Slot { sequence, ids } = slot;
            (sequence, &ids[ids.len() - 1..])
        });
        let prompt = reading.as_mut().map(|Reading { job, slot }| {
            let rest = &job.prompt[slot.ids.len()..];
            (&mut slot.sequence, &rest[..rest.len().min(CHUNK)])
        });
        let mut batch: Vec<(&mut Sequence, &[u32])> = texts.chain(prompt).collect();
        if let Err(error) = self.engine.extend_batch(&mut batch) {
            tracing::error!(%error, "checked tokens were refused");
            self.reading.extend(reading);
            return self.fail("the engine refused a token");
        }
        self.metric.step(self.writing.len());
        let Some(mut reading) = reading else { return };
        let Reading { job, slot } = &mut reading;
        let read = job.prompt.len().min(slot.ids.len() + CHUNK);
        slot.ids.extend(&job.prompt[slot.ids.len()..read]);
        if read < job.prompt.len() {
            self.reading.push(reading);
        } else {
            self.fork(reading);
        }
    }
}

impl Writing<'_> {
    /// Takes a drawn token that the sequence can go on with, or says why the text ends and how many tokens this took.
    fn take(&mut self, id: u32, ends: &[u32], context: usize) -> Result<(), (Finish, usize)> {
        let logits = self.slot.sequence.logits();
        if ends.contains(&id) {
            return Err((Finish::Stop, 0));
        }
        if let Some(top) = self.scores {
            self.held.push_back(Score::new(logits, id, top, self.characters));
        }
        self.sampler.accept(id);
        self.drawn += 1;
        let piece = self.decoder.as_mut().map(|decoder| decoder.push(id)).unwrap_or_default();
        self.say(&piece);
        if self.stops.found() {
            Err((Finish::Stop, 1))
        } else if self.drawn == self.tokens || self.slot.sequence.len() == context {
            Err((Finish::Length, 1))
        } else {
            Ok(())
        }
    }

    fn say(&mut self, piece: &str) {
        self.characters += piece.chars().count();
        let text = self.stops.push(piece);
        self.send(text);
    }

    fn send(&mut self, text: String) {
        if text.is_empty() {
            return;
        }
        self.sent += text.chars().count();
        let gone = self.held.iter().take_while(|score| score.offset < self.sent).count();
        let scores = self.held.drain(..gone).collect();
        self.events.send(Event::Text { choice: self.choice, text, scores }).ok();
    }

    /// Sends what was held back, and the end.
    fn end(&mut self, finish: Finish) {
        let rest = self.decoder.take().map(Decoder::finish).unwrap_or_default();
        self.say(&rest);
        let held = self.stops.finish();
        self.send(held);
        let finish = if self.stops.found() { Finish::Stop } else { finish };
        if !self.stops.found() && !self.held.is_empty() {
            // Tokens without a text, at the end of it.
            let scores = self.held.drain(..).collect();
            self.events.send(Event::Text { choice: self.choice, text: String::new(), scores }).ok();
        }
        self.events.send(Event::End { choice: self.choice, finish, tokens: self.drawn }).ok();
    }
}
