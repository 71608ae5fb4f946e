//! [`DuckChatQuantized`]: a dialogue with a model.

use crate::{Engine, EngineError, EngineOptions, GenerateOptions, Generation, Sequence};
use std::{path::Path, sync::Arc};
use ternary_format::{
    Decoder, Special, Tokenizer,
    chat::{self, ChatTemplate, Message, Role},
};

/// Keeps a dialogue, and streams the answers of a model.
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
    template: ChatTemplate,
    options: GenerateOptions,
    messages: Vec<Message>,
    /// The ids of the last turn, and the sequence that holds them.
    seen: Vec<u32>,
    sequence: Option<Sequence>,
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
    /// `NoTokenizer`, `NoChatTemplate`: the model cannot talk. `Format`: its template is not one. `Option`: a sampling
    /// number is out of range.
    pub fn new(engine: Arc<Engine>, options: GenerateOptions) -> Result<Self, EngineError> {
        options.sampling.check()?;
        let tokenizer = engine.tokenizer().ok_or(EngineError::NoTokenizer)?;
        // Models of our own are asked in our own way, if their file does not say so.
        let own = tokenizer.special(Special::User.text()).map(|_| chat::TEMPLATE);
        let template = engine.chat_template().or(own).ok_or(EngineError::NoChatTemplate)?;
        let template = ChatTemplate::new(template)?;
        let mut stop = options.stop;
        stop.extend(tokenizer.specials().map(|(_, id)| id).chain(tokenizer.ends().eos));
        let options = GenerateOptions { stop, ..options };
        Ok(Self { engine, template, options, messages: Vec::new(), seen: Vec::new(), sequence: None })
    }

    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// The dialogue so far; the oldest turns go when the context is full.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Begins a new dialogue, with a system message if there is one.
    pub fn restart(&mut self, system: Option<&str>) {
        self.messages = Vec::from_iter(system.map(|text| message(Role::System, text)));
    }

    /// Says something; the answer comes in pieces of text. An answer that is dropped ends there.
    ///
    /// # Errors
    /// `ContextFull`: the message alone is too long. `Format`: it cannot be rendered or encoded. The dialogue is then
    /// as before.
    pub fn say(&mut self, text: &str) -> Result<Answer<'_>, EngineError> {
        let Self { engine, template, options, messages, seen, sequence } = self;
        let tokenizer = engine.tokenizer().ok_or(EngineError::NoTokenizer)?;
        let before = messages.clone();
        messages.push(message(Role::User, text));
        let ids = match fit(engine, tokenizer, template, options, messages) {
            Ok(ids) => ids,
            Err(error) => {
                *messages = before;
                return Err(error);
            }
        };
        // What the sequence already holds need not be computed again, but the last token, for its logits.
        let same = ids.iter().zip(&*seen).take_while(|(new, old)| new == old).count().min(ids.len() - 1);
        let mut held = sequence.take().unwrap_or_else(|| engine.sequence());
        held.truncate(same);
        let mut options = options.clone();
        options.sampling.seed = options.sampling.seed.wrapping_add(messages.len() as u64);
        let generation = engine.resume(held, &ids[same..], options)?;
        *seen = ids;
        let text = String::new();
        let decoder = Some(tokenizer.decoder());
        Ok(Answer { generation: Some(generation), decoder, text, messages, seen, sequence })
    }
}

fn message(role: Role, content: &str) -> Message {
    Message { role, content: content.into() }
}

/// The ids of the dialogue, without its oldest turns where it would leave no room for an answer.
fn fit(
    engine: &Engine,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    options: &GenerateOptions,
    messages: &mut Vec<Message>,
) -> Result<Vec<u32>, EngineError> {
    let room = options.max_tokens.min(engine.context() / 4).max(1);
    loop {
        let ids = template.ids(tokenizer, messages, true)?;
        let found = ids.len() + room;
        if found <= engine.context() && !ids.is_empty() {
            return Ok(ids);
        }
        let oldest = messages.iter().position(|message| message.role != Role::System);
        match oldest {
            Some(oldest) if oldest + 1 < messages.len() => {
                // A question goes with its answer.
                let next = (oldest + 1..messages.len()).find(|&i| messages[i].role == Role::User);
                messages.drain(oldest..next.unwrap_or(oldest + 1));
            }
            _ if ids.is_empty() => return Err(EngineError::EmptyPrompt),
            _ => return Err(EngineError::ContextFull { found, context: engine.context() }),
        }
    }
}

/// An answer in the making: an iterator of pieces of text that never break a character.
#[derive(Debug)]
pub struct Answer<'a> {
    /// `None` at the end.
    generation: Option<Generation<'a>>,
    decoder: Option<Decoder<'a>>,
    text: String,
    messages: &'a mut Vec<Message>,
    seen: &'a mut Vec<u32>,
    sequence: &'a mut Option<Sequence>,
}

impl Answer<'_> {
    /// Puts the answer into the dialogue, once.
    fn end(&mut self) {
        let Some(generation) = self.generation.take() else { return };
        let (sequence, _) = generation.into_sequence();
        self.seen.truncate(sequence.len());
        *self.sequence = Some(sequence);
        self.messages.push(message(Role::Assistant, &self.text));
    }
}

impl Iterator for Answer<'_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            let piece = match self.generation.as_mut()?.next() {
                Some(id) => {
                    self.seen.push(id);
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
