//! [`Dialogue`]: turns with a model, whose settings may change between them.

use std::{sync::Arc, time::Instant};
use ternary_format::{
    Special, Tokenizer,
    chat::{self, ChatTemplate, Message, Role},
};
use ternary_infer::{Engine, EngineError, Finish, GenerateOptions, Sequence};

/// How a model is asked: as its file says, or in our own way where it knows our tokens.
///
/// # Errors
/// `NoTokenizer`, `NoChatTemplate`, `Format`: a template that is not one.
pub fn template(engine: &Engine) -> Result<(&Tokenizer, ChatTemplate), EngineError> {
    let tokenizer = engine.tokenizer().ok_or(EngineError::NoTokenizer)?;
    let own = tokenizer.special(Special::User.text()).map(|_| chat::TEMPLATE);
    let source = engine.chat_template().or(own).ok_or(EngineError::NoChatTemplate)?;
    Ok((tokenizer, ChatTemplate::new(source)?))
}

pub fn message(role: Role, content: &str) -> Message {
    Message { role, content: content.into() }
}

/// A dialogue.
#[derive(Debug)]
pub struct Dialogue {
    engine: Arc<Engine>,
    template: ChatTemplate,
    pub options: GenerateOptions,
    messages: Vec<Message>,
    /// The ids that `sequence` holds.
    held: Vec<u32>,
    sequence: Sequence,
}

/// What an answer took.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    pub text: String,
    pub finish: Option<Finish>,
    /// Of the prompt: those that were read now, the dialogue's older ones being known.
    pub prompt_tokens: usize,
    pub tokens: usize,
    pub prompt_s: f64,
    pub generate_s: f64,
}

impl Dialogue {
    /// # Errors
    /// `NoTokenizer`, `NoChatTemplate`, `Format`: the model cannot talk. `Option`: a sampling number is out of range.
    pub fn new(engine: Arc<Engine>, options: GenerateOptions) -> Result<Self, EngineError> {
        options.sampling.check()?;
        let (_, template) = template(&engine)?;
        let sequence = engine.sequence();
        Ok(Self { engine, template, options, messages: Vec::new(), held: Vec::new(), sequence })
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Tokens that the model holds of it.
    pub fn tokens(&self) -> usize {
        self.held.len()
    }

    /// Begins a new dialogue, with a system message if there is one. Whether the model is told it: many have never seen
    /// one, and their templates leave it out.
    ///
    /// # Errors
    /// `Format`: the template refuses it. The dialogue is then as before.
    pub fn restart(&mut self, system: Option<&str>) -> Result<bool, EngineError> {
        let tokenizer = self.engine.tokenizer().ok_or(EngineError::NoTokenizer)?;
        let question = message(Role::User, "?");
        let system = Vec::from_iter(system.map(|text| message(Role::System, text)));
        let ids = |messages: &[Message]| self.template.ids(tokenizer, messages, true);
        let told = ids(&[&system[..], std::slice::from_ref(&question)].concat())? != ids(&[question])?;
        self.messages = system;
        Ok(told)
    }

    /// Says something, and gives out the answer piece by piece; `piece` says whether to go on.
    ///
    /// # Errors
    /// `ContextFull`: the text alone is too long. `Format`: it cannot be encoded. The dialogue is then as before.
    pub fn say(&mut self, text: &str, mut piece: impl FnMut(&str) -> bool) -> Result<Answer, EngineError> {
        let tokenizer = self.engine.tokenizer().ok_or(EngineError::NoTokenizer)?;
        let mut messages = [&self.messages[..], &[message(Role::User, text)]].concat();
        let ids = self.fit(tokenizer, &mut messages)?;
        // What the sequence holds need not be read again, but the last token, for its logits.
        let same = ids.iter().zip(&self.held).take_while(|(new, old)| new == old).count().min(ids.len() - 1);
        let mut sequence = std::mem::replace(&mut self.sequence, self.engine.sequence());
        self.held.clear();
        sequence.truncate(same);
        let mut options = self.options.clone();
        options.sampling.seed = options.sampling.seed.wrapping_add(messages.len() as u64);
        let start = Instant::now();
        let mut generation = self.engine.resume(sequence, &ids[same..], options)?;
        let mut answer = Answer {
            prompt_tokens: ids.len() - same,
            prompt_s: start.elapsed().as_secs_f64(),
            ..Answer::default()
        };
        self.held = ids;
        let mut decoder = tokenizer.decoder();
        let mut goes_on = true;
        while goes_on && let Some(id) = generation.next() {
            self.held.push(id);
            answer.tokens += 1;
            let new = decoder.push(id);
            answer.text.push_str(&new);
            goes_on = new.is_empty() || piece(&new);
        }
        let rest = decoder.finish();
        answer.text.push_str(&rest);
        if !rest.is_empty() {
            piece(&rest);
        }
        answer.finish = generation.finish();
        answer.generate_s = start.elapsed().as_secs_f64() - answer.prompt_s;
        (self.sequence, _) = generation.into_sequence();
        self.held.truncate(self.sequence.len());
        messages.push(message(Role::Assistant, &answer.text));
        self.messages = messages;
        Ok(answer)
    }

    /// The ids of `messages`, without their oldest turns where these would leave no room for an answer.
    fn fit(&self, tokenizer: &Tokenizer, messages: &mut Vec<Message>) -> Result<Vec<u32>, EngineError> {
        let context = self.engine.context();
        let room = self.options.max_tokens.min(context / 4).max(1);
        loop {
            let ids = self.template.ids(tokenizer, messages, true)?;
            let found = ids.len() + room;
            if found <= context && !ids.is_empty() {
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
                _ => return Err(EngineError::ContextFull { found, context }),
            }
        }
    }
}
