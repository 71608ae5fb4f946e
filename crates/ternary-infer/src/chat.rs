//! [`DuckChatQuantized`]: a dialogue with a model.

use crate::{Engine, EngineError, EngineOptions, Finish, GenerateOptions, Generation, Sequence};
use std::{path::Path, sync::Arc};
use ternary_format::{
    Decoder, FormatError, Tokenizer,
    chat::{ChatTemplate, Message, Role, encode_prompt},
};

/// Keeps a dialogue, and streams the answers of a model.
///
/// A model without a chat template was trained on plain text: it continues each text by itself, as if nothing had been
/// said before.
///
/// # Example
/// ```no_run
/// # use ternary_infer::{DuckChatQuantized, EngineOptions, GenerateOptions};
/// let options = GenerateOptions { max_tokens: 200, ..GenerateOptions::default() };
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
    /// The ids that `sequence` holds.
    held: Vec<u32>,
    /// `None` after an error, and in the middle of an answer.
    sequence: Option<Sequence>,
}

impl Engine {
    /// The tokenizer, and the chat template that the model file has.
    ///
    /// # Errors
    /// `NoTokenizer`, `NoChatTemplate`; `Format`: a template that is not one.
    pub fn dialogues(&self) -> Result<(&Tokenizer, ChatTemplate), EngineError> {
        let tokenizer = self.tokenizer().ok_or(EngineError::NoTokenizer)?;
        let source = self.chat_template().ok_or(EngineError::NoChatTemplate)?;
        Ok((tokenizer, ChatTemplate::new(source)?))
    }

    /// Encodes a dialogue so that `room` tokens of the context remain for the answer. Removes the oldest turns from
    /// `messages` as needed, but never system messages, nor anything from the last question on.
    ///
    /// Bisects over the turns: a dialogue of `n` turns takes about `log2(n)` encodings, each bounded by the context.
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

    /// Begins a dialogue. Answers end at any special token, whatever else `options.stop` names.
    ///
    /// # Errors
    /// `NoTokenizer`: the model knows token ids only. `Format`: its template is not one. `Option`: a sampling number is
    /// out of range.
    pub fn new(engine: Arc<Engine>, options: GenerateOptions) -> Result<Self, EngineError> {
        options.sampling.check()?;
        let template = match engine.dialogues() {
            Ok((_, template)) => Some(template),
            Err(EngineError::NoChatTemplate) => None,
            Err(error) => return Err(error),
        };
        Ok(Self { engine, template, options, messages: Vec::new(), held: Vec::new(), sequence: None })
    }

    /// The engine that answers.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Whether the model has no chat template, and continues each text by itself.
    pub fn continues_text(&self) -> bool {
        self.template.is_none()
    }

    /// The dialogue so far; the oldest turns go when the context is full.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Tokens that the model holds of it.
    pub fn tokens(&self) -> usize {
        self.held.len()
    }

    /// How answers are generated.
    pub fn options(&self) -> &GenerateOptions {
        &self.options
    }

    /// How the answers from now on are drawn.
    ///
    /// # Errors
    /// `Option`: a sampling number is out of range.
    pub fn set_options(&mut self, options: GenerateOptions) -> Result<(), EngineError> {
        options.sampling.check()?;
        self.options = options;
        Ok(())
    }

    /// Begins a new dialogue, with a system message if there is one. Whether the model is told it: many have never seen
    /// one, and their templates leave it out.
    ///
    /// # Errors
    /// `Format`: the template refuses it. The dialogue is then as before.
    pub fn restart(&mut self, system: Option<&str>) -> Result<bool, EngineError> {
        let tokenizer = self.engine.tokenizer().ok_or(EngineError::NoTokenizer)?;
        let Some(template) = &self.template else {
            self.messages.clear();
            return Ok(false);
        };
        let question = Message::new(Role::User, "?");
        let system = Vec::from_iter(system.map(|text| Message::new(Role::System, text)));
        let ids = |messages: &[Message]| template.ids(tokenizer, messages, true);
        let told = ids(&[&system[..], std::slice::from_ref(&question)].concat())? != ids(&[question])?;
        self.messages = system;
        Ok(told)
    }

    /// Takes the last question and its answer back; the question.
    pub fn take_back(&mut self) -> Option<String> {
        let question = self.messages.iter().rposition(|message| message.role == Role::User)?;
        let taken = self.messages.drain(question..).next();
        taken.map(|message| message.content)
    }

    /// Says something; the answer comes in pieces of text. An answer that is dropped ends there.
    ///
    /// # Errors
    /// `MessageTooLong`: it does not fit. `Format`: it cannot be rendered or encoded. The dialogue is then
    /// as before.
    pub fn say(&mut self, text: &str) -> Result<Answer<'_>, EngineError> {
        let Self { engine, template, options, messages, held, sequence } = self;
        let (tokenizer, mut stop) =
            (engine.tokenizer().ok_or(EngineError::NoTokenizer)?, options.stop.clone());
        stop.extend(tokenizer.specials().map(|(_, id)| id).chain(tokenizer.ends().eos));
        let mut asked = [&messages[..], &[Message::new(Role::User, text)]].concat();
        let ids = match template {
            Some(template) => {
                let room = answer_room(engine.context(), None).min(options.max_tokens).max(1);
                engine.fit_dialogue(template, &mut asked, room)?
            }
            None => encode_prompt(tokenizer, text)?,
        };
        if ids.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        let mut known = sequence.take().unwrap_or_else(|| {
            held.clear();
            engine.sequence()
        });
        // What the sequence holds need not be read again, but the last token, for its logits.
        let same = ids.iter().zip(&*held).take_while(|(new, old)| new == old).count().min(ids.len() - 1);
        known.truncate(same);
        let mut options = GenerateOptions { stop, ..options.clone() };
        options.sampling.seed = options.sampling.seed.wrapping_add(asked.len() as u64);
        let generation = engine.resume(known, &ids[same..], options)?;
        let prompt_tokens = ids.len() - same;
        (*held, *messages) = (ids, asked);
        Ok(Answer {
            generation: Some(generation),
            decoder: Some(tokenizer.decoder()),
            text: String::new(),
            prompt_tokens,
            tokens: 0,
            finish: None,
            messages,
            held,
            sequence,
        })
    }
}

/// An answer in the making: an iterator of pieces of text that never break a character.
#[derive(Debug)]
pub struct Answer<'a> {
    /// `None` at the end.
    generation: Option<Generation<'a>>,
    decoder: Option<Decoder<'a>>,
    text: String,
    prompt_tokens: usize,
    tokens: usize,
    finish: Option<Finish>,
    messages: &'a mut Vec<Message>,
    held: &'a mut Vec<u32>,
    sequence: &'a mut Option<Sequence>,
}

impl Answer<'_> {
    /// What has come so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Tokens of the prompt that were read for it; those of earlier turns are known.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// Tokens of what has come so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Why it ended; `None` before its end.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// Puts the answer into the dialogue, once.
    fn end(&mut self) {
        let Some(generation) = self.generation.take() else { return };
        self.finish = generation.finish();
        let (sequence, _) = generation.into_sequence();
        self.held.truncate(sequence.len());
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
                    self.held.push(id);
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
