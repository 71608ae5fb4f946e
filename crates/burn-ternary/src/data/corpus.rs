//! Reads documents from files, and splits them into a training and a validation set.

use super::DataError;
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use std::{
    fs,
    path::{Path, PathBuf},
};
use ternary_format::{
    disk,
    document::{parse_jsonl, parse_text, without_byte_order_mark},
};

pub use ternary_format::document::Document;

const STORIES: &str = include_str!("../../data/pond_stories.txt");
const DIALOGUES: &str = include_str!("../../data/duck_dialogues.jsonl");

/// Minimum number of documents that are split between documents; with fewer, the validation set is cut from inside a text.
const MIN_SPLIT_DOCUMENTS: usize = 20;

/// Whether a model that is trained on these documents is a chat model: at least 1 % of them are dialogues. A model does not learn to
/// chat from fewer, and its chat template would make every program present it as a chat model.
pub fn make_chat_model(dialogues: usize, documents: usize) -> bool {
    dialogues > 0 && dialogues >= documents.div_ceil(100)
}

/// Reads documents from `sources`, the value of the key `data.{key}`, in their order.
///
/// A source is a `.txt` file (documents are separated by lines that are exactly `<|endoftext|>`), a `.jsonl` file
/// (a line is an object with `text`, or with `question` and `answer`; other keys and blank lines are ignored), a
/// folder of such files (recursive, sorted by path; linked folders are not followed), or the corpus of this crate:
/// `embedded`, `embedded:stories`, `embedded:dialogues`.
///
/// # Errors
/// `Read`: missing, or no permission. `UnknownKind`, `NothingFound`, `Empty`, `NotUtf8`, `BadLine`: see there.
/// `BadValue`: no source at all, or an unknown `embedded:` name.
pub fn read(key: &'static str, sources: &[String]) -> Result<Vec<Document>, DataError> {
    if sources.is_empty() {
        return Err(DataError::BadValue {
            key,
            expected: "at least one file, folder or `embedded`".into(),
            found: "an empty list".into(),
        });
    }
    let mut documents = Vec::new();
    for source in sources {
        match source.strip_prefix("embedded") {
            Some("") => {
                documents.extend(parse_text(STORIES));
                documents.extend(parse_documents(Path::new(source), DIALOGUES)?);
            }
            Some(":stories") => documents.extend(parse_text(STORIES)),
            Some(":dialogues") => documents.extend(parse_documents(Path::new(source), DIALOGUES)?),
            Some(name) if name.starts_with(':') => {
                return Err(DataError::BadValue {
                    key,
                    expected: "`embedded`, `embedded:stories` or `embedded:dialogues`".into(),
                    found: format!("`{source}`"),
                });
            }
            _ => {
                for file in files(Path::new(source))? {
                    documents.extend(read_file(&file)?);
                }
            }
        }
    }
    Ok(documents)
}

/// Writes documents as a `.jsonl` file, unless it has them already.
///
/// # Errors
/// `Write`: no permission, no space.
pub fn write(path: &Path, documents: &[Document]) -> Result<(), DataError> {
    let lines: String = documents.iter().map(|document| format!("{}\n", document.to_json())).collect();
    match disk::read(path) {
        Ok(found) if found == lines.as_bytes() => Ok(()),
        _ => disk::write(path, lines.as_bytes())
            .map_err(|source| DataError::Write { path: path.into(), source }),
    }
}

/// Looks whether the files of a source can be found.
///
/// # Errors
/// `Read`, `UnknownKind`, `NothingFound`: as [`read`].
pub fn expect_there(source: &str) -> Result<(), DataError> {
    if source.starts_with("embedded") { Ok(()) } else { files(Path::new(source)).map(drop) }
}

/// Holds out about `fraction` of the text for validation: `(training, validation)`.
///
/// From 20 documents on, whole documents are held out, chosen by `seed`. Fewer are cut once, near the end of the
/// text and after a line if there is one, so that the validation text is the tail.
pub fn split(documents: Vec<Document>, fraction: f64, seed: u64) -> (Vec<Document>, Vec<Document>) {
    if documents.len() < MIN_SPLIT_DOCUMENTS {
        split_tail(documents, fraction)
    } else {
        split_documents(documents, fraction, seed)
    }
}

/// Shuffles 20 or more documents by `seed`; fewer keep their order.
///
/// Consecutive documents share windows. In files they often share a subject or an answer too, which a model would learn to copy.
pub fn shuffle(documents: &mut [Document], seed: u64) {
    if documents.len() >= MIN_SPLIT_DOCUMENTS {
        documents.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    }
}

fn split_documents(documents: Vec<Document>, fraction: f64, seed: u64) -> (Vec<Document>, Vec<Document>) {
    let held_out = ((documents.len() as f64 * fraction).round() as usize).max(1);
    let mut order: Vec<usize> = (0..documents.len()).collect();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    let mut is_held_out = vec![false; documents.len()];
    for &i in &order[..held_out] {
        is_held_out[i] = true;
    }
    let (mut train, mut valid) = (Vec::new(), Vec::new());
    for (document, is_held_out) in documents.into_iter().zip(is_held_out) {
        if is_held_out { valid.push(document) } else { train.push(document) }
    }
    (train, valid)
}

fn split_tail(mut documents: Vec<Document>, fraction: f64) -> (Vec<Document>, Vec<Document>) {
    let total: usize = documents.iter().map(bytes).sum();
    let mut wanted = (total as f64 * fraction) as usize;
    let mut valid = Vec::new();
    while let Some(document) = documents.pop() {
        if bytes(&document) <= wanted {
            wanted -= bytes(&document);
            valid.push(document);
            continue;
        }
        match document {
            Document::Text(text) if wanted > 0 => {
                let (head, tail) = text.split_at(cut(&text, wanted));
                documents.push(Document::Text(head.into()));
                valid.push(Document::Text(tail.into()));
            }
            whole => documents.push(whole),
        }
        break;
    }
    valid.reverse();
    (documents, valid)
}

/// Where to cut `text` so that about `tail` bytes follow: after the first line end in the first half of the tail,
/// otherwise between two characters.
fn cut(text: &str, tail: usize) -> usize {
    let start = text.floor_char_boundary(text.len() - tail);
    let limit = text.floor_char_boundary(start + tail / 2);
    text[start..limit].find('\n').map_or(start, |line_end| start + line_end + 1)
}

/// The first words of a text, of at most 24 characters; exactly 24 where it has no spaces.
pub fn opening(text: &str) -> &str {
    const MAX_CHARACTERS: usize = 24;
    let line = text.trim_start().lines().next().unwrap_or_default().trim_end();
    match line.char_indices().nth(MAX_CHARACTERS) {
        None => line,
        Some((end, _)) => {
            line[..end].rsplit_once(char::is_whitespace).map_or(&line[..end], |(words, _)| words)
        }
    }
}

/// The texts that a path names: itself, or what lies under it.
fn files(path: &Path) -> Result<Vec<PathBuf>, DataError> {
    let unreadable = |source| DataError::Read { path: path.into(), source };
    if !fs::metadata(path).map_err(unreadable)?.is_dir() {
        return match kind(path) {
            Some(_) => Ok(vec![path.into()]),
            None => Err(DataError::UnknownKind { path: path.into() }),
        };
    }
    let mut found = Vec::new();
    collect(path, &mut found)?;
    if found.is_empty() {
        return Err(DataError::NothingFound { path: path.into() });
    }
    found.sort();
    Ok(found)
}

fn collect(folder: &Path, found: &mut Vec<PathBuf>) -> Result<(), DataError> {
    let unreadable = |source| DataError::Read { path: folder.into(), source };
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let path = entry.path();
        if entry.file_type().map_err(unreadable)?.is_dir() {
            collect(&path, found)?;
        } else if kind(&path).is_some() && !path.is_dir() {
            found.push(path);
        }
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Kind {
    Text,
    Jsonl,
}

fn kind(path: &Path) -> Option<Kind> {
    let extension = path.extension()?;
    if extension.eq_ignore_ascii_case("txt") {
        Some(Kind::Text)
    } else if extension.eq_ignore_ascii_case("jsonl") {
        Some(Kind::Jsonl)
    } else {
        None
    }
}

fn read_file(path: &Path) -> Result<Vec<Document>, DataError> {
    let bytes = disk::read(path).map_err(|source| DataError::Read { path: path.into(), source })?;
    let text = str::from_utf8(&bytes)
        .map_err(|error| DataError::NotUtf8 { path: path.into(), offset: error.valid_up_to() })?;
    let text = without_byte_order_mark(text);
    let documents = match kind(path) {
        Some(Kind::Jsonl) => parse_documents(path, text)?,
        _ => parse_text(text),
    };
    if documents.is_empty() { Err(DataError::Empty { path: path.into() }) } else { Ok(documents) }
}

fn parse_documents(path: &Path, text: &str) -> Result<Vec<Document>, DataError> {
    parse_jsonl(text, Document::from_json).map_err(|(line, found)| DataError::BadLine {
        path: path.into(),
        line,
        found,
    })
}

fn bytes(document: &Document) -> usize {
    document.texts().map(str::len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn text(text: &str) -> Document {
        Document::Text(text.into())
    }

    fn dialogue(question: &str, answer: &str) -> Document {
        Document::Dialogue { question: question.into(), answer: answer.into() }
    }

    /// Writes `(name, bytes)` files into a fresh folder.
    fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        folder
    }

    fn read_one(path: &Path) -> Result<Vec<Document>, DataError> {
        read("train", &[path.to_str().unwrap().to_owned()])
    }

    #[test]
    fn a_chat_model_needs_one_dialogue_in_a_hundred_documents() {
        let counts = [(0, 0), (0, 50), (1, 100), (1, 101), (2, 200), (2, 201), (7, 7)];
        let chat = counts.map(|(dialogues, documents)| make_chat_model(dialogues, documents));
        assert_eq!(chat, [false, false, true, false, true, false, true]);
    }

    #[test]
    fn folders_are_read_recursively_in_path_order() {
        let folder = folder(&[
            ("b.txt", b"bee"),
            ("a/z.jsonl", b"{\"question\": \"q\", \"answer\": \"a\", \"more\": 1}\n\n{\"text\": \"t\"}"),
            ("a/b.TXT", b"\xef\xbb\xbfbom"),
            ("c.md", b"\xff"),
        ]);
        let documents = read_one(folder.path()).unwrap();
        assert_eq!(documents, [text("bom"), dialogue("q", "a"), text("t"), text("bee")]);
    }

    #[test]
    fn bad_files_are_named() {
        let folder = folder(&[
            ("empty.txt", b""),
            ("blank.jsonl", b"\n\n"),
            ("latin.txt", b"caf\xe9"),
            ("line.jsonl", b"{\"text\": \"ok\"}\n{\"text\": 3}"),
            ("no.json", b"{}"),
            ("nothing/readme.md", b"x"),
        ]);
        let message = |name: &str| read_one(&folder.path().join(name)).unwrap_err().to_string();
        for (name, expected) in [
            ("missing.txt", "cannot read"),
            ("empty.txt", "found an empty file"),
            ("blank.jsonl", "found an empty file"),
            ("latin.txt", "invalid byte at offset 3"),
            ("line.jsonl", "line 2: expected an object with a string \"text\""),
            ("no.json", "expected a folder or a file that ends in .txt or .jsonl"),
            ("nothing", "found none"),
        ] {
            let message = message(name);
            assert!(message.contains(expected) && message.contains(name), "{name}: {message}");
        }
        assert!(matches!(read("train", &[]), Err(DataError::BadValue { key: "train", .. })));
        assert!(matches!(read("train", &["embedded:duck".into()]), Err(DataError::BadValue { .. })));
    }

    #[test]
    fn the_embedded_corpus_has_both_kinds() {
        let both = read("train", &["embedded".into()]).unwrap();
        let stories = read("train", &["embedded:stories".into()]).unwrap();
        let dialogues = read("train", &["embedded:dialogues".into()]).unwrap();
        assert!(stories.iter().all(|d| matches!(d, Document::Text(_))) && stories.len() > 1);
        assert!(dialogues.iter().all(|d| matches!(d, Document::Dialogue { .. })) && dialogues.len() > 1);
        assert_eq!(both, [stories, dialogues].concat());
    }

    /// The file is what the shipped Duck is measured on.
    #[test]
    fn held_out_questions_are_new_but_their_answers_are_known() {
        let letters = |text: &str| text.to_lowercase().replace(|c: char| !c.is_ascii_lowercase(), "");
        let dialogues = read("train", &["embedded:dialogues".into()]).unwrap();
        let [questions, answers] = [0, 1].map(|part| {
            dialogues.iter().map(|d| letters(d.texts().nth(part).unwrap())).collect::<BTreeSet<String>>()
        });
        let held_out = read(
            "valid",
            &[concat!(env!("CARGO_MANIFEST_DIR"), "/crates/burn-ternary/data/duck_questions.jsonl").into()],
        )
        .unwrap();
        assert!(held_out.len() > 100);
        for document in held_out {
            let [question, answer] = [0, 1].map(|part| letters(document.texts().nth(part).unwrap()));
            assert!(!questions.contains(&question) && answers.contains(&answer), "{document:?}");
        }
    }

    #[test]
    fn many_documents_are_split_between_documents() {
        let documents: Vec<_> = (0..100).map(|i| text(&i.to_string())).collect();
        let (train, valid) = split(documents.clone(), 0.1, 7);
        assert_eq!((train.len(), valid.len()), (90, 10));
        let mut all = [train, valid.clone()].concat();
        all.sort_by_key(|d| d.texts().next().unwrap().parse::<u32>().unwrap());
        assert_eq!(all, documents);
        assert_eq!(split(documents.clone(), 0.1, 7).1, valid);
        assert_ne!(split(documents, 0.1, 8).1, valid);
    }

    #[test]
    fn many_documents_are_shuffled_and_few_are_not() {
        for (count, moves) in [(19, false), (20, true), (200, true)] {
            let documents: Vec<_> = (0..count).map(|i| text(&i.to_string())).collect();
            let [mut first, mut same, mut other] = std::array::from_fn(|_| documents.clone());
            shuffle(&mut first, 7);
            shuffle(&mut same, 7);
            shuffle(&mut other, 8);
            assert_eq!(first, same);
            assert_eq!([first != documents, first != other], [moves, moves], "{count}");
            first.sort_by_key(|d| d.texts().next().unwrap().parse::<u32>().unwrap());
            assert_eq!(first, documents);
        }
    }

    #[test]
    fn few_documents_are_split_at_the_tail() {
        let lines: String = (0..1000).map(|i| format!("line é {i}\n")).collect();
        let documents = vec![dialogue("q", "a"), text(&lines), text("a last line\n")];
        let (train, valid) = split(documents, 0.1, 0);
        let [_, Document::Text(head)] = &train[..] else { panic!("{train:?}") };
        let [Document::Text(tail), last] = &valid[..] else { panic!("{valid:?}") };
        assert_eq!(format!("{head}{tail}"), lines);
        assert!(head.ends_with('\n') && *last == text("a last line\n"));
        let share = tail.len() as f64 / lines.len() as f64;
        assert!((0.09..=0.1).contains(&share), "{share}");

        // Without line ends, between characters, wherever the cut falls.
        for n in 1..40 {
            let ducks = "🦆".repeat(n);
            let (train, valid) = split(vec![text(&ducks)], 0.3, 0);
            let joined: String = train.iter().chain(&valid).flat_map(Document::texts).collect();
            assert_eq!(joined, ducks);
        }
    }
}
