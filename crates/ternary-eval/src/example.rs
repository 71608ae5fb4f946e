//! [`Example`]: what an evaluation reads from a file.

use serde_json::{Map, Value};
use std::{
    io,
    path::{Path, PathBuf},
};
use ternary_format::{
    disk,
    document::{Document, parse_jsonl, parse_text, without_byte_order_mark},
};

/// One part of an evaluation file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Example {
    /// A text or a dialogue, read as training reads it: the text, or the answer, is scored.
    Document(Document),
    /// Multiple choice: the likelihoods of the choices are compared.
    Choice {
        /// The user's turn, or the text that the choices continue.
        question: String,
        /// At least two.
        choices: Vec<String>,
        /// The index of the correct choice.
        answer: usize,
    },
}

/// Why a file has no examples.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExampleError {
    /// The file is missing, or cannot be read.
    #[error("{}: cannot read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file, or one of its lines, does not hold examples.
    #[error("{origin}: expected {expected}, found {found}")]
    Content {
        /// The file, and the line if it is one line.
        origin: String,
        /// What the reader takes.
        expected: &'static str,
        /// What is there instead.
        found: String,
    },
}

const LINE: &str = "an object with a string \"text\", the strings \"question\" and \"answer\", or \"question\", \
                    \"choices\" and \"answer\" (an index from 0 on, or one of the choices)";

/// Reads a `.txt` file, whose texts are separated by lines `<|endoftext|>`, or a `.jsonl` file of objects with `text`,
/// with `question` and `answer`, or with `question`, `choices` and `answer`. Other keys are ignored.
///
/// # Errors
/// `Read`: the file cannot be read. `Content`: it has another extension, is empty or not UTF-8, or a line is no example.
pub fn read_examples(path: &Path) -> Result<Vec<Example>, ExampleError> {
    let content = |expected: &'static str, found: String| ExampleError::Content {
        origin: path.display().to_string(),
        expected,
        found,
    };
    let has_extension =
        |known: &str| path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(known));
    if !has_extension("txt") && !has_extension("jsonl") {
        return Err(content("a file that ends in .txt or .jsonl", "another extension".into()));
    }
    let bytes = disk::read(path).map_err(|source| ExampleError::Read { path: path.into(), source })?;
    let text = str::from_utf8(&bytes).map_err(|error| {
        content("UTF-8 text", format!("an invalid byte at offset {}", error.valid_up_to()))
    })?;
    let text = without_byte_order_mark(text);
    let examples = if has_extension("jsonl") {
        parse_jsonl(text, Example::from_json).map_err(|(line, found)| ExampleError::Content {
            origin: format!("{}, line {line}", path.display()),
            expected: LINE,
            found,
        })?
    } else {
        parse_text(text).into_iter().map(Example::Document).collect()
    };
    if examples.is_empty() { Err(content("text", "an empty file".into())) } else { Ok(examples) }
}

impl Example {
    /// The example that a JSON object describes, or what was found instead of one.
    fn from_json(mut object: Map<String, Value>) -> Result<Self, String> {
        match object.remove("choices") {
            None => Document::from_json(object).map(Self::Document),
            Some(_) if object.contains_key("text") => Err("\"text\" together with \"choices\"".into()),
            Some(choices) => Self::choice(choices, object),
        }
    }

    fn choice(choices: Value, mut object: Map<String, Value>) -> Result<Self, String> {
        let choices: Option<Vec<String>> = match choices {
            Value::Array(choices) => choices.iter().map(|choice| choice.as_str().map(Into::into)).collect(),
            _ => None,
        };
        let choices = choices
            .filter(|choices| choices.len() > 1)
            .ok_or("\"choices\" that are not two or more strings")?;
        let Some(Value::String(question)) = object.remove("question") else {
            return Err("\"choices\" without a string \"question\"".into());
        };
        let answer = object.remove("answer").ok_or("\"choices\" without \"answer\"")?;
        let index = match &answer {
            Value::String(text) => choices.iter().position(|choice| choice == text),
            index => index.as_u64().map(|index| index as usize).filter(|index| *index < choices.len()),
        };
        let answer = index.ok_or_else(|| format!("the answer {answer}, which is no choice"))?;
        Ok(Self::Choice { question, choices, answer })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn read_as(name: &str, text: &str) -> Result<Vec<Example>, ExampleError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        read_examples(&path)
    }

    fn text(text: &str) -> Example {
        Example::Document(Document::Text(text.into()))
    }

    #[test]
    fn text_files_are_split_at_their_separators() {
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
            |answer| Example::Choice { question: "q".into(), choices: vec!["a".into(), "b".into()], answer };
        let dialogue = Document::Dialogue { question: "q".into(), answer: "a".into() };
        let expected = [text("a"), Example::Document(dialogue), choice(1), choice(0)];
        assert_eq!(read_as("a.jsonl", lines).unwrap(), expected);
    }

    #[test]
    fn what_is_no_example_is_named_with_its_line() {
        for (line, found) in [
            ("{", "invalid JSON"),
            ("[]", "another JSON value"),
            ("{}", "without these keys"),
            (r#"{"text": 1}"#, "not a string"),
            (r#"{"text": "a", "answer": "b"}"#, "\"text\" together with"),
            (r#"{"text": "a", "choices": ["b", "c"]}"#, "\"text\" together with"),
            (r#"{"question": "a"}"#, "\"question\" without"),
            (r#"{"choices": ["a", "b"], "answer": 0}"#, "without a string \"question\""),
            (r#"{"question": "q", "choices": ["a", "b"]}"#, "without \"answer\""),
            (r#"{"question": "q", "choices": ["a"], "answer": 0}"#, "two or more"),
            (r#"{"question": "q", "choices": ["a", 1], "answer": 0}"#, "two or more"),
            (r#"{"question": "q", "choices": ["a", "b"], "answer": 2}"#, "the answer 2"),
            (r#"{"question": "q", "choices": ["a", "b"], "answer": "c"}"#, "the answer \"c\""),
        ] {
            let error = read_as("a.jsonl", &format!("\n{line}\n")).unwrap_err().to_string();
            assert!(error.contains(found) && error.contains("a.jsonl, line 2"), "{error}");
        }
        for (name, text, found) in
            [("a.md", "x", "another extension"), ("a.txt", " \n", "empty"), ("a.jsonl", "", "empty")]
        {
            assert!(read_as(name, text).unwrap_err().to_string().contains(found));
        }
        assert!(matches!(read_examples(Path::new("missing.txt")), Err(ExampleError::Read { .. })));
    }
}
