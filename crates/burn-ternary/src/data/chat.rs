//! The special tokens and the one chat template.
//!
//! A dialogue is `<|user|>{question}<|assistant|>{answer}<|endoftext|>`, learned from the answer on; a text is
//! `{text}<|endoftext|>`, all of it learned.

use super::{DataError, corpus::Document, tokenizer::Tokenizer};

/// A token that stands for structure and never comes out of plain text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    EndOfText,
    User,
    Assistant,
}

impl Special {
    /// Every special token; `ALL[s as usize] == s`.
    pub const ALL: [Self; 3] = [Self::EndOfText, Self::User, Self::Assistant];

    /// How the token is written in a `tokenizer.json` and in `.txt` files.
    pub const fn text(self) -> &'static str {
        match self {
            Self::EndOfText => "<|endoftext|>",
            Self::User => "<|user|>",
            Self::Assistant => "<|assistant|>",
        }
    }
}

/// A part of a templated document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    Special(Special),
    Text(&'a str),
}

/// The template: the parts of a document in order, each with whether it is learned (carries loss).
pub fn parts(document: &Document) -> Vec<(Part<'_>, bool)> {
    let end = (Part::Special(Special::EndOfText), true);
    match document {
        Document::Text(text) => vec![(Part::Text(text), true), end],
        Document::Dialogue { question, answer } => {
            let prompt = question_parts(question).map(|part| (part, false));
            prompt.into_iter().chain([(Part::Text(answer), true), end]).collect()
        }
    }
}

/// The ids after which a model writes its answer to `question`: `<|user|>{question}<|assistant|>`.
///
/// # Errors
/// `UnknownCharacter`, `Encode`: the tokenizer cannot encode the question.
pub fn prompt(tokenizer: &Tokenizer, question: &str) -> Result<Vec<u32>, DataError> {
    let mut ids = Vec::new();
    for part in question_parts(question) {
        match part {
            Part::Special(special) => ids.push(tokenizer.special(special)),
            Part::Text(text) => ids.extend(tokenizer.encode(text)?),
        }
    }
    Ok(ids)
}

/// The ids of a prompt as an experimenter writes it: plain text to go on with (empty: the start of a text), or
/// `<|user|>question` to be answered.
///
/// # Errors
/// `UnknownCharacter`, `Encode`: the tokenizer cannot encode the text.
pub fn encode_prompt(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, DataError> {
    if let Some(question) = text.strip_prefix(Special::User.text()) {
        return prompt(tokenizer, question);
    }
    let ids = tokenizer.encode(text)?;
    Ok(if ids.is_empty() { vec![tokenizer.special(Special::EndOfText)] } else { ids })
}

fn question_parts(question: &str) -> [Part<'_>; 3] {
    [Part::Special(Special::User), Part::Text(question), Part::Special(Special::Assistant)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specials_are_numbered_in_the_order_of_all() {
        for (i, special) in Special::ALL.into_iter().enumerate() {
            assert_eq!(special as usize, i);
        }
    }

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
    fn a_prompt_is_the_part_of_a_dialogue_that_is_not_learned() {
        let tokenizer = Tokenizer::byte();
        let ids = prompt(&tokenizer, "hi").unwrap();
        let [user, assistant] = [Special::User, Special::Assistant].map(|s| tokenizer.special(s));
        assert_eq!(ids, [user, u32::from(b'h'), u32::from(b'i'), assistant]);
    }
}
