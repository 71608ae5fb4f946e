//! Chat templates: from messages to token ids.
//!
//! A template is written in Jinja, as for Hugging Face and llama.cpp. Since it comes from a file, its length and recursion are
//! bounded, as are the work and memory of rendering it.
//!
//! Only the template itself can write special tokens. The same characters in a message remain plain text.

use crate::{FormatError, Special, Tokenizer, tokenizer::CUT};
use minijinja::{Environment, Error, ErrorKind, Value, context, syntax::SyntaxConfig};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};

/// The template of models that this project trains on dialogues: `<|user|>{question}<|assistant|>{answer}<|endoftext|>`. It
/// omits system messages, because these models are trained without them.
pub const TEMPLATE: &str = "\
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ '<|user|>' + message.content + '<|assistant|>' }}
{%- elif message.role == 'assistant' -%}{{ message.content + '<|endoftext|>' }}
{%- endif -%}
{%- endfor -%}";

/// Maximum length of a template, in bytes. Templates in use have up to 30,000.
const MAX_BYTES: usize = 1 << 17;
const RECURSION: usize = 64;
/// Budget of one rendering, in addition to one unit per byte of the messages. An instruction costs one unit, and so do 64
/// bytes of memory.
const FUEL: u64 = 500_000;
/// Placeholders: characters for private use (plane 15). They replace characters of messages that could form special tokens.
const MARKS: std::ops::Range<u32> = 0xf_0000..0xf_fffe;

/// Author of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions of the application.
    System,
    /// A user message.
    User,
    /// An answer of the model.
    Assistant,
}

impl Role {
    const fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// A turn of a dialogue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Message {
    /// Its author.
    pub role: Role,
    /// Its text.
    pub content: String,
}

impl Message {
    /// Creates a message.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

/// A part of a rendered dialogue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Id of a special token that the template writes.
    Special(u32),
    /// Plain text, in which no special token is recognized.
    Text(String),
}

/// A chat template, parsed.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
}

impl ChatTemplate {
    /// Parses a template.
    ///
    /// # Errors
    /// `ChatTemplate`: it is too long, or not valid Jinja.
    pub fn new(source: &str) -> Result<Self, FormatError> {
        if source.len() > MAX_BYTES {
            let why = format!("{} bytes, expected at most {MAX_BYTES}", source.len());
            return Err(FormatError::ChatTemplate { why });
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(failed)?);
        environment.set_recursion_limit(RECURSION);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        let raise = |why: String| Err::<String, _>(Error::new(ErrorKind::InvalidOperation, why));
        environment.add_function("raise_exception", raise);
        environment.add_template_owned("chat", source.to_string()).map_err(failed)?;
        Ok(Self { environment })
    }

    /// Renders a dialogue to special tokens and texts. With `generate`, the result ends with the beginning of an answer.
    ///
    /// # Errors
    /// `ChatTemplate`: the template fails, refuses the messages, or exceeds its budget.
    pub fn parts(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        generate: bool,
    ) -> Result<Vec<Part>, FormatError> {
        let specials: BTreeMap<&str, u32> = tokenizer.specials().collect();
        let marks = Marks::new(specials.keys().copied(), messages)?;
        let marked: Vec<Value> = messages
            .iter()
            .map(|message| context! { role => message.role.name(), content => marks.mark(&message.content) })
            .collect();
        let name =
            |id: Option<u32>| specials.iter().find(|(_, other)| Some(**other) == id).map(|(name, _)| *name);
        let ends = tokenizer.ends();
        let mut environment = self.environment.clone();
        let bytes: usize = messages.iter().map(|message| message.content.len()).sum();
        environment.set_fuel(Some(FUEL + bytes as u64));
        let template = environment.get_template("chat").map_err(failed)?;
        let text = template.render(context! {
            messages => marked,
            add_generation_prompt => generate,
            bos_token => name(ends.bos).unwrap_or_default(),
            eos_token => name(ends.eos).unwrap_or_default(),
        });
        Ok(marks.split(&text.map_err(failed)?, &specials))
    }

    /// Encodes a dialogue, with the begin token that the tokenizer requires.
    ///
    /// # Errors
    /// As [`parts`](Self::parts); `UnknownCharacter`, `Encode`: the tokenizer cannot encode a message.
    pub fn ids(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        generate: bool,
    ) -> Result<Vec<u32>, FormatError> {
        self.ids_within(tokenizer, messages, generate, usize::MAX)
    }

    /// Encodes a dialogue in bounded time, as [`Tokenizer::encode_within`] does.
    ///
    /// # Errors
    /// As [`ids`](Self::ids). `TooManyTokens`: the dialogue has more than `most`.
    pub fn ids_within(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        generate: bool,
        most: usize,
    ) -> Result<Vec<u32>, FormatError> {
        let parts = self.parts(tokenizer, messages, generate)?;
        let ends = tokenizer.ends();
        let begun = parts.first() == ends.bos.map(Part::Special).as_ref();
        let mut ids: Vec<u32> = ends.bos.filter(|_| ends.add_bos && !begun).into_iter().collect();
        for part in parts {
            match part {
                Part::Special(id) => ids.push(id),
                Part::Text(text) => {
                    let left = most.saturating_sub(ids.len());
                    let encoded = tokenizer.encode_within(&text, left).map_err(|error| match error {
                        FormatError::TooManyTokens { .. } => FormatError::TooManyTokens { most },
                        other => other,
                    });
                    ids.extend(encoded?);
                }
            }
            if ids.len() > most.saturating_add(CUT) {
                return Err(FormatError::TooManyTokens { most });
            }
        }
        Ok(ids)
    }
}

fn failed(error: Error) -> FormatError {
    FormatError::ChatTemplate { why: error.to_string() }
}

/// Encodes a prompt as a user writes it: plain text to continue, or `<|user|>question` to answer, if the tokenizer has such
/// tokens.
///
/// # Errors
/// `UnknownCharacter`, `Encode`: the tokenizer cannot encode the text.
pub fn encode_prompt(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, FormatError> {
    let [user, assistant] = [Special::User, Special::Assistant].map(|s| tokenizer.special(s.text()));
    if let (Some(question), Some(user), Some(assistant)) =
        (text.strip_prefix(Special::User.text()), user, assistant)
    {
        return Ok([vec![user], tokenizer.encode(question)?, vec![assistant]].concat());
    }
    let ends = tokenizer.ends();
    let ids = tokenizer.encode(text)?;
    let bos = ends.bos.filter(|_| ends.add_bos || ids.is_empty());
    Ok(bos.into_iter().chain(ids).collect())
}

/// Keeps the characters of messages apart from those of the template, by means of placeholders.
struct Marks<'a> {
    specials: Vec<&'a str>,
    /// First and last characters of special tokens, with their placeholders.
    pairs: Vec<(char, char)>,
}

impl<'a> Marks<'a> {
    fn new(specials: impl Iterator<Item = &'a str>, messages: &[Message]) -> Result<Self, FormatError> {
        let mut specials: Vec<&str> = specials.filter(|special| !special.is_empty()).collect();
        specials.sort_by_key(|special| std::cmp::Reverse(special.len())); // the longest first
        let mut ends: Vec<char> = specials
            .iter()
            .flat_map(|special| [special.chars().next(), special.chars().last()])
            .flatten()
            .collect();
        ends.sort_unstable();
        ends.dedup();
        let characters = messages.iter().flat_map(|message| message.content.chars());
        let used: HashSet<char> = characters.filter(|&c| MARKS.contains(&u32::from(c))).collect();
        let marks: Vec<char> =
            MARKS.filter_map(char::from_u32).filter(|c| !used.contains(c)).take(ends.len()).collect();
        if marks.len() < ends.len() {
            let why = "messages with all characters of plane 15".into();
            return Err(FormatError::ChatTemplate { why });
        }
        Ok(Self { specials, pairs: ends.into_iter().zip(marks).collect() })
    }

    /// Replaces the first and last characters of everything in a message that is a special token, or may become one together
    /// with the text before or after the message.
    fn mark(&self, content: &str) -> String {
        let mut marked = String::with_capacity(content.len());
        for (i, c) in content.char_indices() {
            let (before, after) = (&content[..i], &content[i + c.len_utf8()..]);
            // Templates trim messages, so white space at the ends is skipped.
            let begins = |special: &&str| {
                let mut rest = special.chars();
                let (first, second) = (rest.next(), rest.next());
                first == Some(c) && (after.trim_start().is_empty() || after.chars().next() == second)
            };
            let finishes = |special: &&str| {
                let mut rest = special.chars().rev();
                let (last, previous) = (rest.next(), rest.next());
                last == Some(c) && (before.trim_end().is_empty() || before.chars().next_back() == previous)
            };
            let mark = self.pairs.iter().find(|(end, _)| *end == c).map(|pair| pair.1);
            let mark = mark.filter(|_| self.specials.iter().any(|s| begins(s) || finishes(s)));
            marked.push(mark.unwrap_or(c));
        }
        marked
    }

    fn unmark(&self, text: &str) -> String {
        text.chars().map(|c| self.pairs.iter().find(|pair| pair.1 == c).map_or(c, |pair| pair.0)).collect()
    }

    fn split(&self, text: &str, ids: &BTreeMap<&str, u32>) -> Vec<Part> {
        let mut parts = Vec::new();
        let (mut start, mut at) = (0, 0);
        while let Some(c) = text[at..].chars().next() {
            let is_end = self.pairs.iter().any(|pair| pair.0 == c);
            let special =
                self.specials.iter().filter(|_| is_end).find(|special| text[at..].starts_with(**special));
            let Some(&special) = special else {
                at += c.len_utf8();
                continue;
            };
            if start < at {
                parts.push(Part::Text(self.unmark(&text[start..at])));
            }
            parts.push(Part::Special(ids[special]));
            at += special.len();
            start = at;
        }
        if start < text.len() {
            parts.push(Part::Text(self.unmark(&text[start..])));
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(text: &str) -> Part {
        Part::Text(text.into())
    }

    fn special(tokenizer: &Tokenizer, special: Special) -> Part {
        Part::Special(tokenizer.special(special.text()).unwrap())
    }

    #[test]
    fn a_dialogue_is_what_the_trainer_writes() {
        let tokenizer = Tokenizer::byte();
        let template = ChatTemplate::new(TEMPLATE).unwrap();
        let messages = [
            Message::new(Role::System, "be a duck"),
            Message::new(Role::User, " hi\n"),
            Message::new(Role::Assistant, "quack "),
            Message::new(Role::User, "bye"),
        ];
        let [end, user, assistant] = Special::ALL.map(|s| special(&tokenizer, s));
        assert_eq!(
            template.parts(&tokenizer, &messages, true).unwrap(),
            [
                user.clone(),
                text(" hi\n"),
                assistant.clone(),
                text("quack "),
                end,
                user,
                text("bye"),
                assistant
            ]
        );
        let ids = template.ids(&tokenizer, &messages[3..], true).unwrap();
        assert_eq!(ids, encode_prompt(&tokenizer, "<|user|>bye").unwrap());
    }

    proptest! {
        #[test]
        fn messages_never_become_special_tokens(
            contents in prop::collection::vec("(<\\|user\\|>|<\\|us|er\\|>|<|\\|>|<\\|endoftext\\|>|[a-z \u{f0000}\u{f0001}🦆]){0,6}", 1..4)
        ) {
            let tokenizer = Tokenizer::byte();
            // Nothing between two messages.
            let template = ChatTemplate::new("{% for m in messages %}{{ m.content | trim }}{% endfor %}").unwrap();
            let messages: Vec<Message> = contents.iter().map(|c| Message::new(Role::User, c)).collect();
            let expected: String = contents.iter().map(|content| content.trim()).collect();
            let parts = template.parts(&tokenizer, &messages, false).unwrap();
            let expected = if expected.is_empty() { vec![] } else { vec![text(&expected)] };
            prop_assert_eq!(parts, expected);
            let template = ChatTemplate::new(TEMPLATE).unwrap();
            let ids = template.ids(&tokenizer, &messages, false).unwrap();
            let specials = ids.iter().filter(|&&id| id > 255).count();
            prop_assert_eq!(specials, 2 * messages.len());
            prop_assert_eq!(tokenizer.decode(&ids), contents.concat());
        }
    }

    #[test]
    fn templates_of_other_models_are_rendered() {
        let tokenizer = Tokenizer::byte();
        // The parts that such templates consist of: names made of roles, methods of Python, exceptions.
        let source = "{% if messages[0]['role'] != 'user' %}\n    {{ raise_exception('no user') }}\n{% endif %}\n\
                      {% for m in messages %}\n{{ '<|' + m['role'] + '|>' + m['content'].strip() }}\n{% endfor %}\n\
                      {% if add_generation_prompt %}\n{{ '<|assistant|>' }}{% endif %}{{ eos_token }}\n";
        let template = ChatTemplate::new(source).unwrap();
        let [end, user, assistant] = Special::ALL.map(|s| special(&tokenizer, s));
        let parts = template.parts(&tokenizer, &[Message::new(Role::User, " hi ")], true).unwrap();
        assert_eq!(parts, [user, text("hi\n"), assistant, end]);
        let error = template.parts(&tokenizer, &[Message::new(Role::System, "")], true).unwrap_err();
        assert!(error.to_string().contains("no user"), "{error}");
    }

    #[test]
    fn hostile_templates_are_errors() {
        let tokenizer = Tokenizer::byte();
        let messages = [Message::new(Role::User, "hi")];
        for source in [
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
            "{% set ns = namespace(x='quack') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
            "{{ 'x' * 99999999999 }}",
            "{{ 'x' * 999999999 }}",
            "{% set x = 'x' * 1000000 %}{% for a in range(9999) %}{{ x }}{% endfor %}",
            "{% include 'chat' %}",
            "{% extends 'chat' %}",
            "{{ messages[0]['content']['a']['b'] }}",
            "{{ 1 // 0 }}",
            "{{ nothing() }}",
        ] {
            let rendered = ChatTemplate::new(source).and_then(|t| t.parts(&tokenizer, &messages, true));
            assert!(matches!(rendered, Err(FormatError::ChatTemplate { .. })), "{source}: {rendered:?}");
        }
        let nested = "{% if true %}".repeat(1000) + &"{% endif %}".repeat(1000);
        for source in ["{% if %}", "{{", "{% for %}", &"(".repeat(5000), &nested, &"x".repeat(MAX_BYTES + 1)]
        {
            let source = if source.starts_with('(') { &format!("{{{{ {source} }}}}") } else { source };
            let parsed = ChatTemplate::new(source);
            assert!(
                matches!(parsed, Err(FormatError::ChatTemplate { .. })),
                "{}",
                &source[..source.len().min(40)]
            );
        }
    }
}
