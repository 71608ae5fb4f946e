//! The one chat template, as training texts have it; model files have it as [`ternary_format::chat::TEMPLATE`].
//!
//! A dialogue is `<|user|>{question}<|assistant|>{answer}<|endoftext|>`, learned from the answer on; a text is
//! `{text}<|endoftext|>`, all of it learned.

use super::corpus::Document;
pub use ternary_format::Special;
use ternary_format::Tokenizer;

/// The id of a special token.
///
/// # Panics
/// When the tokenizer was made without them.
pub fn special(tokenizer: &Tokenizer, special: Special) -> u32 {
    tokenizer.special(special.text()).expect("tokenizers of models have the special tokens")
}

/// A part of a templated document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// A special token, such as the end of a turn.
    Special(Special),
    /// Text between special tokens.
    Text(&'a str),
}

/// The template: the parts of a document in order, each with whether it is learned (carries loss).
pub fn parts(document: &Document) -> Vec<(Part<'_>, bool)> {
    let end = (Part::Special(Special::EndOfText), true);
    match document {
        Document::Text(text) => vec![(Part::Text(text), true), end],
        Document::Dialogue { question, answer } => {
            let prompt =
                [Part::Special(Special::User), Part::Text(question), Part::Special(Special::Assistant)];
            let prompt = prompt.map(|part| (part, false));
            prompt.into_iter().chain([(Part::Text(answer), true), end]).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ternary_format::chat::{ChatTemplate, Message, Role, TEMPLATE, encode_prompt};

    #[test]
    fn a_dialogue_is_learned_from_the_answer_on() {
        let document = Document::Dialogue { question: "hi".into(), answer: "quack".into() };
        let mut written = String::new();
        let mut learned = String::new();
        for (part, loss) in parts(&document) {
            let text = match part {
                Part::Special(special) => special.text(),
                Part::Text(text) => text,
            };
            written += text;
            learned += if loss { text } else { "" };
        }
        assert_eq!(written, "<|user|>hi<|assistant|>quack<|endoftext|>");
        assert_eq!(learned, "quack<|endoftext|>");
    }

    #[test]
    fn the_template_of_model_files_writes_what_is_trained_on() {
        let tokenizer = Tokenizer::byte();
        let document = Document::Dialogue { question: "hi <|user|>".into(), answer: "quack".into() };
        let ids = |(part, _): &(Part<'_>, bool)| match part {
            Part::Special(special) => vec![super::special(&tokenizer, *special)],
            Part::Text(text) => tokenizer.encode(text).unwrap(),
        };
        let parts = parts(&document);
        let ids_of = |parts: &[(Part<'_>, bool)]| parts.iter().flat_map(ids).collect::<Vec<_>>();
        let message = |role, content: &str| Message::new(role, content);
        let question = message(Role::User, "hi <|user|>");
        let answer = message(Role::Assistant, "quack");
        let template = ChatTemplate::new(TEMPLATE).unwrap();
        let rendered = |messages: &[Message], generate| template.ids(&tokenizer, messages, generate).unwrap();
        assert_eq!(rendered(&[question.clone(), answer], false), ids_of(&parts));
        let unlearned = parts.iter().position(|(_, learned)| *learned).unwrap();
        assert_eq!(rendered(&[question], true), ids_of(&parts[..unlearned]));
        let prompt = encode_prompt(&tokenizer, "<|user|>hi <|user|>").unwrap();
        assert_eq!(prompt, ids_of(&parts[..unlearned]));
    }
}
