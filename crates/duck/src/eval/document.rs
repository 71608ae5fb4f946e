//! [`Document`]: what is scored, read as training reads it, and multiple choice besides.

use crate::Error;
use serde_json::{Map, Value};
use std::path::Path;
use ternary_format::{Special, disk};

/// A part of a text file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    /// All of it is scored.
    Text(String),
    /// The answer is scored.
    Dialogue { question: String, answer: String },
    /// The choices are compared; `answer` is the place of the right one.
    Choice { question: String, choices: Vec<String>, answer: usize },
}

/// What a line of a `.jsonl` file has to be.
const EXPECTED: &str = "an object with a string \"text\", the strings \"question\" and \"answer\", or \"question\", \
                        \"choices\" and \"answer\" (a place from 0 on, or one of the choices)";

/// Reads a `.txt` file, whose documents are separated by lines `<|endoftext|>`, or a `.jsonl` file of objects with
/// `text`, with `question` and `answer`, or with `question`, `choices` and `answer`; other keys are ignored.
pub fn read(path: &Path) -> Result<Vec<Document>, Error> {
    let extension = path.extension().map(|extension| extension.to_ascii_lowercase());
    let origin = || path.display().to_string();
    let unfit =
        |expected: &str, found: String| Error::Data { origin: origin(), expected: expected.into(), found };
    let is_jsonl = match extension.as_ref().and_then(|extension| extension.to_str()) {
        Some("txt") => false,
        Some("jsonl") => true,
        _ => return Err(unfit("a file that ends in .txt or .jsonl", "another ending".into())),
    };
    let bytes = disk::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
    let text = str::from_utf8(&bytes)
        .map_err(|error| unfit("UTF-8 text", format!("an invalid byte at offset {}", error.valid_up_to())))?;
    // Windows editors put a byte order mark in front; it is no part of the text.
    let text = text.trim_start_matches('\u{feff}');
    let documents = if is_jsonl {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let parsed = lines.map(|(i, line)| {
            let origin = format!("{}, line {}", origin(), i + 1);
            parse_line(line).map_err(|found| Error::Data { origin, expected: EXPECTED.into(), found })
        });
        parsed.collect::<Result<_, _>>()?
    } else {
        parse_text(text)
    };
    if documents.is_empty() { Err(unfit("text", "an empty file".into())) } else { Ok(documents) }
}

fn parse_text(text: &str) -> Vec<Document> {
    let mut texts = Vec::new();
    let (mut start, mut position) = (0, 0);
    for line in text.split_inclusive('\n') {
        if line.trim_end_matches(['\r', '\n']) == Special::EndOfText.text() {
            texts.push(&text[start..position]);
            start = position + line.len();
        }
        position += line.len();
    }
    // A text without separators is taken as it is; the line ends around a separator belong to the separator.
    if texts.is_empty() {
        texts.push(text);
    } else {
        texts.push(&text[start..]);
        texts.iter_mut().for_each(|text| *text = text.trim_matches(['\r', '\n']));
    }
    texts.into_iter().filter(|text| !text.trim().is_empty()).map(|text| Document::Text(text.into())).collect()
}

/// The error says what was found instead.
fn parse_line(line: &str) -> Result<Document, String> {
    let value = serde_json::from_str(line).map_err(|error| format!("no JSON ({error})"))?;
    let Value::Object(object) = value else { return Err("another JSON value".into()) };
    let has = |key: &str| object.contains_key(key);
    match (has("text"), has("question"), has("answer"), has("choices")) {
        (true, false, false, false) => Ok(Document::Text(text(&object, "text")?)),
        (false, true, true, false) => {
            Ok(Document::Dialogue { question: text(&object, "question")?, answer: text(&object, "answer")? })
        }
        (false, true, true, true) => choice(&object),
        (false, false, false, false) => Err("an object without them".into()),
        _ => Err(format!("the keys {}", object.keys().map(String::as_str).collect::<Vec<_>>().join(", "))),
    }
}

fn text(object: &Map<String, Value>, key: &str) -> Result<String, String> {
    let text = object[key].as_str().ok_or_else(|| format!("a value of \"{key}\" that is no string"))?;
    Ok(text.into())
}

fn choice(object: &Map<String, Value>) -> Result<Document, String> {
    let choices = object["choices"].as_array().into_iter().flatten();
    let choices: Option<Vec<String>> = choices.map(|choice| choice.as_str().map(Into::into)).collect();
    let choices =
        choices.filter(|choices| choices.len() > 1).ok_or("\"choices\" that are not two or more strings")?;
    let answer = match &object["answer"] {
        Value::String(text) => choices.iter().position(|choice| choice == text),
        place => place.as_u64().map(|place| place as usize).filter(|place| *place < choices.len()),
    };
    let answer = answer.ok_or_else(|| format!("the answer {}, which is no choice", object["answer"]))?;
    Ok(Document::Choice { question: text(object, "question")?, choices, answer })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn read_as(name: &str, text: &str) -> Result<Vec<Document>, Error> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn texts_are_cut_at_their_separators() {
        let text = |text: &str| Document::Text(text.into());
        assert_eq!(read_as("a.txt", " one\n").unwrap(), [text(" one\n")]);
        let two = "\u{feff}one\ntwo\r\n<|endoftext|>\r\n\nthree\n<|endoftext|>\n \n";
        assert_eq!(read_as("a.TXT", two).unwrap(), [text("one\ntwo"), text("three")]);
    }

    #[test]
    fn lines_are_texts_dialogues_or_choices() {
        let lines = r#"{"text": "a", "id": 1}

{"question": "q", "answer": "a"}
{"question": "q", "choices": ["a", "b"], "answer": 1}
{"question": "q", "choices": ["a", "b"], "answer": "a"}"#;
        let choice =
            |answer| Document::Choice { question: "q".into(), choices: vec!["a".into(), "b".into()], answer };
        let dialogue = Document::Dialogue { question: "q".into(), answer: "a".into() };
        let expected = [Document::Text("a".into()), dialogue, choice(1), choice(0)];
        assert_eq!(read_as("a.jsonl", lines).unwrap(), expected);
    }

    #[test]
    fn what_is_no_document_is_named_with_its_line() {
        for (line, found) in [
            ("{", "no JSON"),
            ("[]", "another JSON value"),
            ("{}", "without them"),
            (r#"{"text": 1}"#, "no string"),
            (r#"{"text": "a", "answer": "b"}"#, "the keys answer, text"),
            (r#"{"question": "a"}"#, "the keys question"),
            (r#"{"question": "q", "choices": ["a"], "answer": 0}"#, "two or more"),
            (r#"{"question": "q", "choices": ["a", 1], "answer": 0}"#, "two or more"),
            (r#"{"question": "q", "choices": ["a", "b"], "answer": 2}"#, "the answer 2"),
            (r#"{"question": "q", "choices": ["a", "b"], "answer": "c"}"#, "the answer \"c\""),
        ] {
            let error = read_as("a.jsonl", &format!("\n{line}\n")).unwrap_err();
            assert_eq!(error.exit_code(), 3);
            let error = error.to_string();
            assert!(error.contains(found) && error.contains("a.jsonl, line 2"), "{error}");
        }
        for (name, text, found) in
            [("a.md", "x", "another ending"), ("a.txt", " \n", "empty"), ("a.jsonl", "", "empty")]
        {
            assert!(read_as(name, text).unwrap_err().to_string().contains(found));
        }
        assert_eq!(read(Path::new("missing.txt")).unwrap_err().exit_code(), 3);
    }
}
