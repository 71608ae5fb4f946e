//! [`DuckChatQuantized`]: a dialogue with a model.

use crate::{Engine, EngineError, EngineOptions, FinishReason, GenerateOptions, Generation, Sequence};
use std::{path::Path, sync::Arc};
use ternary_format::{
    Decoder, FormatError, Tokenizer,
    chat::{ChatTemplate, Message, Role, encode_prompt},
};

/// A dialogue with a model, whose answers are streamed.
///
/// A model without a chat template was trained on plain text: it continues each text independently of the earlier ones.
///
/// The KV cache is kept between turns, so that only the tokens of a new message are prefilled.
///
/// # Example
/// ```no_run
/// # use ternary_infer::{DuckChatQuantized, EngineOptions, GenerateOptions};
/// let options = GenerateOptions::default().with_max_tokens(200);
/// let mut chat = DuckChatQuantized::load("duck.gguf", EngineOptions::default(), options)?;
/// for piece in chat.say("Who are you?")? {
///     print!("{piece}");
/// }
/// # Ok::<(), ternary_infer::EngineError>(())
/// ```
#[derive(Debug)]
pub struct DuckChatQuantized {
    engine: Arc<Engine>,
    /// `None`: the model continues text.
    template: Option<ChatTemplate>,
    options: GenerateOptions,
    messages: Vec<Message>,
    /// The ids whose keys and values are in the KV cache of `sequence`.
    cached: Vec<u32>,
    /// `None` after an error, and while an answer is generated.
    sequence: Option<Sequence>,
}

impl Engine {
    /// Returns the tokenizer, and the parsed chat template of the model file.
    ///
    /// # Errors
    /// `NoTokenizer`, `NoChatTemplate`: the file has none. `Format`: the template cannot be parsed.
    pub fn dialogues(&self) -> Result<(&Tokenizer, ChatTemplate), EngineError> {
        let tokenizer = self.tokenizer().ok_or(EngineError::NoTokenizer)?;
        let source = self.chat_template().ok_or(EngineError::NoChatTemplate)?;
        Ok((tokenizer, ChatTemplate::new(source)?))
    }

    /// Encodes a dialogue so that `room` tokens of the context remain for the answer. Removes the oldest turns from
    /// `messages` as needed, but never system messages, the last question, or messages after it.
    ///
    /// It bisects over the turns: a dialogue of `n` turns takes about `log2(n)` encodings, each bounded by the context.
    ///
    /// # Errors
    /// `MessageTooLong`: the last question does not fit. `EmptyPrompt`: the template renders nothing. `NoTokenizer`;
    /// `Format`: a message cannot be rendered or encoded. `messages` is then unchanged.
    pub fn fit_dialogue(
        &self,
        template: &ChatTemplate,
        messages: &mut Vec<Message>,
        room: usize,
    ) -> Result<Vec<u32>, EngineError> {
        let tokenizer = self.tokenizer().ok_or(EngineError::NoTokenizer)?;
        let context = self.context();
        let most = context.saturating_sub(room);
        let from = |first: usize| -> Vec<Message> {
            let kept = messages.iter().enumerate().filter(|(i, m)| *i >= first || m.role == Role::System);
            kept.map(|(_, message)| message.clone()).collect()
        };
        // A question is dropped together with its answer, so the rest begins with a question.
        let questions = messages.iter().enumerate().filter(|(i, m)| *i > 0 && m.role == Role::User);
        let firsts: Vec<usize> = std::iter::once(0).chain(questions.map(|(i, _)| i)).collect();
        // Fewer messages have fewer tokens, so bisection finds the first cut that fits. The whole dialogue is tried first.
        let (mut low, mut high, mut middle) = (0, firsts.len(), 0);
        let mut fitting = None;
        let mut excess = None; // tokens of the last cut that did not fit
        while low < high {
            let kept = from(firsts[middle]);
            match template.ids_within(tokenizer, &kept, true, most) {
                Ok(ids) if ids.is_empty() => return Err(EngineError::EmptyPrompt),
                Ok(ids) if ids.len() <= most => {
                    fitting = Some((ids, kept));
                    high = middle;
                }
                Ok(ids) => (excess, low) = (Some(ids.len()), middle + 1),
                Err(FormatError::TooManyTokens { .. }) => (excess, low) = (None, middle + 1),
                Err(other) => return Err(other.into()),
            }
            middle = (low + high) / 2;
        }
        let (ids, kept) = fitting.ok_or(EngineError::MessageTooLong { found: excess, context, room })?;
        *messages = kept;
        Ok(ids)
    }
}

/// Tokens of the context that are reserved for the answer when a dialogue is truncated: `max_tokens` if given, else the
/// larger of 64 and a quarter of the context. At most half of the context, and at least 1.
pub fn answer_room(context: usize, max_tokens: Option<usize>) -> usize {
    max_tokens.unwrap_or(64.max(context / 4)).min(context / 2).max(1)
}

impl DuckChatQuantized {
    /// Loads a model file and begins a dialogue.
    ///
    /// # Errors
    /// Those of [`Engine::load`] and [`new`](Self::new).
    pub fn load(
        path: impl AsRef<Path>,
        engine: EngineOptions,
        options: GenerateOptions,
    ) -> Result<Self, EngineError> {
        Self::new(Arc::new(Engine::load(path, engine)?), options)
    }

    /// Begins a dialogue. Answers end at any special token, in addition to the tokens of `options.stop`.
    ///
    /// # Errors
    /// `NoTokenizer`: the model works on token ids only. `Format`: its template cannot be parsed. `Option`: a sampling
    /// parameter is out of range.
    pub fn new(engine: Arc<Engine>, options: GenerateOptions) -> Result<Self, EngineError> {
        options.sampling.check()?;
        let template = match engine.dialogues() {
            Ok((_, template)) => Some(template),
            Err(EngineError::NoChatTemplate) => None,
            Err(error) => return Err(error),
        };
        Ok(Self { engine, template, options, messages: Vec::new(), cached: Vec::new(), sequence: None })
    }

    /// The engine that answers.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Returns whether the model has no chat template, so that it continues text instead of answering.
    pub fn continues_text(&self) -> bool {
        self.template.is_none()
    }

    /// The dialogue so far. The oldest turns are removed when the context is full.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Number of tokens of the dialogue in the KV cache.
    pub fn tokens(&self) -> usize {
        self.cached.len()
    }

    /// How answers are generated.
    pub fn options(&self) -> &GenerateOptions {
        &self.options
    }

    /// Sets how the answers from now on are generated.
    ///
    /// # Errors
    /// `Option`: a sampling parameter is out of range.
    pub fn set_options(&mut self, options: GenerateOptions) -> Result<(), EngineError> {
        options.sampling.check()?;
        self.options = options;
        Ok(())
    }

    /// Begins a new dialogue, with an optional system message. Returns whether the template renders that message: templates of
    /// models that were trained without system messages omit it.
    ///
    /// # Errors
    /// `Format`: the template refuses the message. The dialogue is then unchanged.
    pub fn restart(&mut self, system: Option<&str>) -> Result<bool, EngineError> {
        let tokenizer = self.engine.tokenizer().ok_or(EngineError::NoTokenizer)?;
        let Some(template) = &self.template else {
            self.messages.clear();
            return Ok(false);
        };
        let question = Message::new(Role::User, "?");
        let system = Vec::from_iter(system.map(|text| Message::new(Role::System, text)));
        let ids = |messages: &[Message]| template.ids(tokenizer, messages, true);
        let rendered = ids(&[&system[..], std::slice::from_ref(&question)].concat())? != ids(&[question])?;
        self.messages = system;
        Ok(rendered)
    }

    /// Removes the last question and its answer, and returns the question.
    pub fn take_back(&mut self) -> Option<String> {
        let question = self.messages.iter().rposition(|message| message.role == Role::User)?;
        let removed = self.messages.drain(question..).next();
        removed.map(|message| message.content)
    }

    /// Sends a user message, and returns an iterator of the pieces of the answer. Dropping the iterator ends the answer early;
    /// the dialogue keeps what was generated.
    ///
    /// # Errors
    /// `MessageTooLong`: the message does not fit. `Format`: it cannot be rendered or encoded. The dialogue is then
    /// unchanged.
    pub fn say(&mut self, text: &str) -> Result<Answer<'_>, EngineError> {
        let Self { engine, template, options, messages, cached, sequence } = self;
        let (tokenizer, mut stop) =
            (engine.tokenizer().ok_or(EngineError::NoTokenizer)?, options.stop.clone());
        stop.extend(tokenizer.specials().map(|(_, id)| id).chain(tokenizer.ends().eos));
        let mut dialogue = [&messages[..], &[Message::new(Role::User, text)]].concat();
        let ids = match template {
            Some(template) => {
                let room = answer_room(engine.context(), Some(options.max_tokens));
                engine.fit_dialogue(template, &mut dialogue, room)?
            }
            None => encode_prompt(tokenizer, text)?,
        };
        if ids.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        let mut kept = sequence.take().unwrap_or_else(|| {
            cached.clear();
            engine.sequence()
        });
        // The common prefix is in the KV cache. The last token is read again, for its logits.
        let common = ids.iter().zip(&*cached).take_while(|(new, old)| new == old).count().min(ids.len() - 1);
        kept.truncate(common);
        let mut options = options.clone().with_stop(stop);
        options.sampling.seed = options.sampling.seed.wrapping_add(dialogue.len() as u64);
        let generation = engine.resume(kept, &ids[common..], options)?;
        let prompt_tokens = ids.len() - common;
        (*cached, *messages) = (ids, dialogue);
        Ok(Answer {
            generation: Some(generation),
            decoder: Some(tokenizer.decoder()),
            text: String::new(),
            prompt_tokens,
            tokens: 0,
            finish_reason: None,
            messages,
            cached,
            sequence,
        })
    }
}

/// An answer that is being generated: an iterator of pieces of text, none of which ends inside a character.
#[derive(Debug)]
pub struct Answer<'a> {
    /// `None` at the end.
    generation: Option<Generation<'a>>,
    decoder: Option<Decoder<'a>>,
    text: String,
    prompt_tokens: usize,
    tokens: usize,
    finish_reason: Option<FinishReason>,
    messages: &'a mut Vec<Message>,
    cached: &'a mut Vec<u32>,
    sequence: &'a mut Option<Sequence>,
}

impl Answer<'_> {
    /// The text so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Prefilled tokens of the prompt. Those of earlier turns are in the KV cache.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// Number of tokens generated so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Why it ended; `None` before its end.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish_reason
    }

    /// Adds the answer to the dialogue, once.
    fn end(&mut self) {
        let Some(generation) = self.generation.take() else { return };
        self.finish_reason = generation.finish_reason();
        let (sequence, _) = generation.into_sequence();
        self.cached.truncate(sequence.len());
        *self.sequence = Some(sequence);
        self.messages.push(Message::new(Role::Assistant, &*self.text));
    }
}

impl Iterator for Answer<'_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            let piece = match self.generation.as_mut()?.next() {
                Some(id) => {
                    self.cached.push(id);
                    self.tokens += 1;
                    self.decoder.as_mut()?.push(id)
                }
                None => {
                    let rest = self.decoder.take().map(Decoder::finish).unwrap_or_default();
                    self.text.push_str(&rest);
                    self.end();
                    return (!rest.is_empty()).then_some(rest);
                }
            };
            if !piece.is_empty() {
                self.text.push_str(&piece);
                return Some(piece);
            }
        }
    }
}

impl Drop for Answer<'_> {
    fn drop(&mut self) {
        self.end();
    }
}
