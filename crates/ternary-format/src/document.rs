//! Documents of a corpus, as training, evaluation and conversion read them.
//!
//! A `.txt` file consists of texts, separated by lines that are exactly `<|endoftext|>`. A line of a `.jsonl` file is an
//! object with `text`, or with `question` and `answer`.

use crate::Special;
use serde_json::{Map, Value, json};

/// One text or dialogue.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Document {
    /// Plain text. All of it is learned, or scored.
    Text(String),
    /// A question and its answer. Only the answer is learned, or scored.
    Dialogue {
        /// The user's turn.
        question: String,
        /// The assistant's turn.
        answer: String,
    },
}

impl Document {
    /// The texts of the document, without the special tokens of a chat template.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        let (first, second) = match self {
            Self::Text(text) => (text, None),
            Self::Dialogue { question, answer } => (question, Some(answer)),
        };
        std::iter::once(first.as_str()).chain(second.map(String::as_str))
    }

    /// Whether the document is a question and its answer.
    pub fn is_dialogue(&self) -> bool {
        matches!(self, Self::Dialogue { .. })
    }

    /// The JSON object of this document: a line of a `.jsonl` file. [`from_json`](Self::from_json) is the inverse.
    pub fn to_json(&self) -> Value {
        match self {
            Self::Text(text) => json!({ "text": text }),
            Self::Dialogue { question, answer } => json!({ "question": question, "answer": answer }),
        }
    }

    /// The document that a JSON object describes. Keys besides `text`, `question` and `answer` are ignored.
    ///
    /// # Errors
    /// What was found instead of a document.
    pub fn from_json(mut object: Map<String, Value>) -> Result<Self, String> {
        match ["text", "question", "answer"].map(|key| object.remove(key)) {
            [Some(Value::String(text)), None, None] => Ok(Self::Text(text)),
            [None, Some(Value::String(question)), Some(Value::String(answer))] => {
                Ok(Self::Dialogue { question, answer })
            }
            [Some(_), Some(_), _] | [Some(_), _, Some(_)] => {
                Err("\"text\" together with \"question\" or \"answer\"".into())
            }
            [None, None, None] => Err("an object without these keys".into()),
            [None, Some(_), None] => Err("\"question\" without \"answer\"".into()),
            [None, None, Some(_)] => Err("\"answer\" without \"question\"".into()),
            _ => Err("a value that is not a string".into()),
        }
    }
}

/// Removes the byte order mark that Windows editors put before a text.
pub fn without_byte_order_mark(text: &str) -> &str {
    text.trim_start_matches('\u{feff}')
}

/// Splits a text at its lines `<|endoftext|>`. Line ends around a separator belong to the separator; a text without
/// separators is taken as it is. Blank texts are left out.
pub fn parse_text(text: &str) -> Vec<Document> {
    let mut texts = Vec::new();
    let (mut start, mut position) = (0, 0);
    for line in text.split_inclusive('\n') {
        if line.trim_end_matches(['\r', '\n']) == Special::EndOfText.text() {
            texts.push(&text[start..position]);
            start = position + line.len();
        }
        position += line.len();
    }
    if texts.is_empty() {
        texts.push(text);
    } else {
        texts.push(&text[start..]);
        texts.iter_mut().for_each(|text| *text = text.trim_matches(['\r', '\n']));
    }
    texts.into_iter().filter(|text| !text.trim().is_empty()).map(|text| Document::Text(text.into())).collect()
}

/// Parses the lines of a `.jsonl` file with `parse`, which gets the object of each line. Blank lines are skipped.
///
/// # Errors
/// The number of the first line that is no document, from 1 on, and what was found in it.
pub fn parse_jsonl<T>(
    text: &str,
    mut parse: impl FnMut(Map<String, Value>) -> Result<T, String>,
) -> Result<Vec<T>, (usize, String)> {
    let lines = text.lines().zip(1..).filter(|(line, _)| !line.trim().is_empty());
    let parsed = lines.map(|(line, number)| {
        let object = match serde_json::from_str(line) {
            Ok(Value::Object(object)) => Ok(object),
            Ok(_) => Err("another JSON value".into()),
            Err(error) => Err(format!("invalid JSON ({error})")),
        };
        object.and_then(&mut parse).map_err(|found| (number, found))
    });
    parsed.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Document {
        Document::Text(text.into())
    }

    #[test]
    fn texts_are_split_at_separator_lines() {
        let stories = "one\ntwo\n<|endoftext|>\r\n\nthree <|endoftext|>\nfour\n<|endoftext|>\n\n";
        assert_eq!(parse_text(stories), [text("one\ntwo"), text("three <|endoftext|>\nfour")]);
        assert_eq!(parse_text("\nas it is\n\n"), [text("\nas it is\n\n")]);
        assert_eq!(parse_text(" \n"), []);
    }

    #[test]
    fn lines_are_texts_or_dialogues() {
        let lines = "{\"question\": \"q\", \"answer\": \"a\", \"more\": 1}\n\n{\"text\": \"t\"}";
        let dialogue = Document::Dialogue { question: "q".into(), answer: "a".into() };
        assert_eq!(parse_jsonl(lines, Document::from_json).unwrap(), [dialogue, text("t")]);
    }

    #[test]
    fn a_written_document_is_the_same_document() {
        let odd = "\u{feff} \"a\"\r\n<|endoftext|>\n\u{2028}é";
        let dialogue = Document::Dialogue { question: odd.into(), answer: String::new() };
        let documents = [text(odd), text(""), dialogue];
        let lines: String = documents.iter().map(|document| format!("{}\n", document.to_json())).collect();
        assert_eq!(parse_jsonl(&lines, Document::from_json).unwrap(), documents);
    }

    #[test]
    fn lines_that_are_no_documents_are_refused() {
        for (line, found) in [
            ("{\"text\": \"a\"", "invalid JSON"),
            ("[1]", "another JSON value"),
            ("{}", "an object without these keys"),
            ("{\"question\": \"q\"}", "\"question\" without"),
            ("{\"answer\": \"q\"}", "\"answer\" without"),
            ("{\"question\": \"q\", \"answer\": null}", "not a string"),
            ("{\"text\": \"t\", \"question\": \"q\", \"answer\": \"a\"}", "together with"),
        ] {
            let lines = format!("\n{{\"text\": \"t\"}}\n{line}");
            let (number, message) = parse_jsonl(&lines, Document::from_json).unwrap_err();
            assert!(number == 3 && message.contains(found), "{line}: {message}");
        }
    }
}
