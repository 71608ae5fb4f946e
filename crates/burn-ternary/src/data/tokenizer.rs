//! Tokenizers made from the training text: its characters, or a byte-level BPE.

use super::{DataError, chat::Special, corpus::Document};
use std::{
    collections::BTreeSet,
    path::Path,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};
use ternary_format::{FormatError, Tokenizer, print_stderr, read_model};
use tokenizers::{
    AddedToken, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Trainer,
    models::bpe::{BPE, BpeTrainer},
    pre_tokenizers::byte_level::ByteLevel,
};

/// Bytes of the longest word that a BPE is trained on. Merging takes time quadratic in the length of a word; longer ones (DNA, base64,
/// a line of one character) are learned in parts of this length. Ordinary texts have none, not even those without spaces.
const LONGEST_WORD: usize = 1024;

/// Time between two lines about a training that lasts.
const PROGRESS: Duration = Duration::from_secs(5);

/// The characters of `documents` in code point order, then the special tokens.
pub fn char<'a>(documents: impl IntoIterator<Item = &'a Document>) -> Tokenizer {
    let characters: BTreeSet<char> =
        documents.into_iter().flat_map(Document::texts).flat_map(str::chars).collect();
    Tokenizer::from_characters(characters.into_iter().collect()).expect("a set is in order")
}

/// Trains a byte-level BPE of at most `vocab_size` ids, special tokens included, on `documents`.
///
/// # Errors
/// `BadValue`: `vocab_size` has no room for the 256 bytes and the special tokens. `Training`: the trainer failed.
pub fn train_bpe(documents: &[Document], vocab_size: usize) -> Result<Tokenizer, DataError> {
    let least = 256 + Special::ALL.len();
    if vocab_size < least {
        return Err(DataError::BadValue {
            key: "bpe_vocab_size",
            expected: format!("at least {least}"),
            found: vocab_size.to_string(),
        });
    }
    let bytes = ByteLevel::new(false, true, true);
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(Special::ALL.map(|s| AddedToken::from(s.text(), true)).into())
        .build();
    // The specials are not known yet, so that one written in a text is learned as the characters it is.
    let texts = documents.iter().flat_map(Document::texts).flat_map(Tokenizer::pieces);
    let mut model = BPE::default();
    let failed = |error: tokenizers::Error| DataError::Training { reason: error.to_string() };
    let specials = telling_progress(documents, || {
        trainer.feed(texts, |text| words(text, bytes))?;
        trainer.train(&mut model)
    });
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes));
    tokenizer.add_special_tokens(&specials.map_err(failed)?);
    let tokenizer = Tokenizer::from_hf(tokenizer).and_then(Tokenizer::with_specials);
    tokenizer.map_err(|error| failed(error.into()))
}

/// The words of `text`, a character a byte, and long ones in parts.
fn words(text: &str, bytes: ByteLevel) -> tokenizers::Result<Vec<String>> {
    let mut text = PreTokenizedString::from(text);
    bytes.pre_tokenize(&mut text)?;
    let mut words = Vec::new();
    for (word, ..) in text.get_splits(OffsetReferential::Original, OffsetType::Byte) {
        let mut rest = word;
        while let Some((end, _)) = rest.char_indices().nth(LONGEST_WORD) {
            let (part, tail) = rest.split_at(end);
            words.push(part.into());
            rest = tail;
        }
        words.push(rest.into());
    }
    Ok(words)
}

/// Writes to standard error every few seconds that a tokenizer is still being trained.
fn telling_progress<T>(documents: &[Document], train: impl FnOnce() -> T) -> T {
    let (done, waiting) = mpsc::channel::<()>();
    let began = Instant::now();
    let tell = move || {
        let bytes: usize = documents.iter().flat_map(Document::texts).map(str::len).sum();
        while let Err(RecvTimeoutError::Timeout) = waiting.recv_timeout(PROGRESS) {
            let (megabytes, seconds) = (bytes as f64 / 1e6, began.elapsed().as_secs());
            print_stderr(format_args!(
                "training the bpe tokenizer on {megabytes:.1} MB of text: {seconds} s"
            ));
        }
    };
    thread::scope(|scope| {
        // Without a thread it is trained all the same.
        let _ = thread::Builder::new().spawn_scoped(scope, tell);
        let trained = train();
        drop(done);
        trained
    })
}

/// Reads a `tokenizer.json`, that of a folder, or that of a model file, and adds the special tokens where they are
/// missing.
///
/// # Errors
/// `Read`: missing, or no permission. `Tokenizer`: no JSON, or no tokenizer that can be used.
pub fn load(path: &Path) -> Result<Tokenizer, DataError> {
    let read = || {
        if path.is_dir() {
            return Tokenizer::load(&path.join("tokenizer.json"));
        }
        if path.extension().is_some_and(|extension| extension == "json") {
            return Tokenizer::load(path);
        }
        let none = || FormatError::Tokenizer { why: "a model without a tokenizer".into() };
        read_model(path)?.tokenizer.ok_or_else(none)
    };
    read().and_then(Tokenizer::with_specials).map_err(|error| match error {
        FormatError::Io { path, source } => DataError::Read { path, source },
        error => {
            let found = match error.kind() {
                FormatError::Tokenizer { why } => why.clone(),
                other => format!("another file ({other})"),
            };
            DataError::Tokenizer { path: path.into(), found }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{chat::special, corpus};
    use std::fs;

    const SHARED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data");

    fn shared(path: &str) -> Option<String> {
        let text = fs::read_to_string(format!("{SHARED}/{path}")).ok();
        if text.is_none() {
            println!("skipped: no {path} in the shared data");
        }
        text
    }

    fn text(text: &str) -> Document {
        Document::Text(text.into())
    }

    /// Every kind of tokenizer, the trained ones on `corpus`.
    fn every_kind(corpus: &str) -> [Tokenizer; 3] {
        let documents = [text(corpus)];
        [Tokenizer::byte(), char(&documents), train_bpe(&documents, 300).unwrap()]
    }

    const HOSTILE: &str = "a <|user|>b<|endoftext|> duck 🦆 é\r\n\t  duck\u{0} <|assistant|><|user|";

    #[test]
    fn decoding_undoes_encoding() {
        for tokenizer in every_kind(HOSTILE) {
            let ids = tokenizer.encode(HOSTILE).unwrap();
            assert_eq!(tokenizer.decode(&ids), HOSTILE);
            assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
        }
    }

    #[test]
    fn plain_text_never_becomes_a_special_token() {
        let mut tokenizers = every_kind(HOSTILE).to_vec();
        for name in ["gpt2", "smollm2"] {
            let path = format!("{SHARED}/tokenizers/{name}/tokenizer.json");
            if Path::new(&path).exists() {
                tokenizers.push(load(Path::new(&path)).unwrap());
            } else {
                println!("skipped: no {path}");
            }
        }
        for tokenizer in tokenizers {
            let specials = Special::ALL.map(|s| special(&tokenizer, s));
            let ids = tokenizer.encode(HOSTILE).unwrap();
            assert!(specials.iter().all(|id| !ids.contains(id)), "{specials:?} in {ids:?}");
            assert_eq!(tokenizer.decode(&ids), HOSTILE);
            // Special tokens and ids beyond the vocabulary leave no trace in the text.
            let unknown = tokenizer.vocab_size() as u32 + 5;
            assert_eq!(tokenizer.decode(&[&specials[..], &ids, &[unknown]].concat()), HOSTILE);
        }
    }

    #[test]
    fn a_saved_tokenizer_is_loaded_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        for tokenizer in every_kind(HOSTILE) {
            tokenizer.save(&path).unwrap();
            let loaded = load(&path).unwrap();
            assert_eq!(loaded.encode(HOSTILE).unwrap(), tokenizer.encode(HOSTILE).unwrap());
            assert!(loaded.specials().eq(tokenizer.specials()));
            assert_eq!(loaded.ends(), tokenizer.ends());
            assert_eq!(loaded.vocab_size(), tokenizer.vocab_size());
            assert_eq!(loaded.to_json(), tokenizer.to_json());
        }
    }

    #[test]
    fn bad_tokenizer_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        assert!(matches!(load(&path), Err(DataError::Read { .. })));
        let hole = r#"{"model": {"type": "BPE", "vocab": {"a": 0, "b": 9}, "merges": []}}"#;
        for (json, found) in [
            ("quack", "not valid JSON"),
            ("", "not valid JSON"),
            ("{}", "unexpected JSON"),
            (r#"{"type": "word"}"#, "unexpected JSON"),
            (r#"{"type": "char", "characters": "ba"}"#, "out of order"),
            (hole, "tokens with ids up to 9"),
        ] {
            fs::write(&path, json).unwrap();
            let message = load(&path).unwrap_err().to_string();
            assert!(message.contains(found) && message.contains("tokenizer.json"), "{json}: {message}");
        }
    }

    #[test]
    fn an_unknown_character_is_named() {
        let error = char(&[text("duck")]).encode("dück").unwrap_err();
        let message = DataError::from(error).to_string();
        assert!(
            message.contains("'ü'") && message.contains("U+00FC") && message.contains("4 characters"),
            "{message}"
        );
    }

    #[test]
    fn bpe_needs_room_for_bytes_and_specials() {
        let error = train_bpe(&[text("duck")], 258).unwrap_err();
        assert!(matches!(error, DataError::BadValue { key: "bpe_vocab_size", .. }));
        assert_eq!(train_bpe(&[text("duck")], 259).unwrap().vocab_size(), 259);
    }

    /// The vocabulary of the crate's own training, with words as long as they are.
    fn unbounded(documents: &[Document], vocab_size: usize) -> Tokenizer {
        let bytes = ByteLevel::new(false, true, true);
        let mut tokenizer = tokenizers::Tokenizer::new(BPE::default());
        tokenizer.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes));
        let trainer = BpeTrainer::builder()
            .vocab_size(vocab_size)
            .min_frequency(2)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(Special::ALL.map(|s| AddedToken::from(s.text(), true)).into())
            .build();
        let texts = documents.iter().flat_map(Document::texts).flat_map(Tokenizer::pieces);
        tokenizer.train(&mut tokenizers::models::TrainerWrapper::BpeTrainer(trainer), texts).unwrap();
        Tokenizer::from_hf(tokenizer).and_then(Tokenizer::with_specials).unwrap()
    }

    #[test]
    fn the_bound_on_words_changes_no_vocabulary_of_ordinary_text() {
        let chinese = "小鸭子在池塘里游泳然后慢慢地走回家去睡觉".repeat(16) + "。";
        let odd = text(&(chinese.repeat(3) + "\n\t  zwölf Boxkämpfer\u{0}🦆🦆 <|user|> it's 3.14159\r\n"));
        let documents = [corpus::read("train", &["embedded".into()]).unwrap(), vec![odd]].concat();
        for vocab_size in [259, 300, 1500] {
            let expected = unbounded(&documents, vocab_size).to_json();
            assert_eq!(train_bpe(&documents, vocab_size).unwrap().to_json(), expected);
        }
    }

    #[test]
    fn training_takes_time_linear_in_the_longest_word() {
        let mut state = 1u64;
        let mut base = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ['A', 'C', 'G', 'T'][(state >> 62) as usize]
        };
        let dna: String = (0..400_000).map(|_| base()).collect();
        for word in [dna, "a".repeat(3_000_000), "\u{0}".repeat(200_000), "é".repeat(100_000)] {
            let began = Instant::now();
            let tokenizer = train_bpe(&[text(&word)], 512).unwrap();
            // A word of a fourth of the DNA took 9 seconds, and time is quadratic in its length.
            assert!(began.elapsed() < Duration::from_secs(30), "{:?} {:?}", &word[..4], began.elapsed());
            let part = &word[..100];
            let ids = tokenizer.encode(part).unwrap();
            assert!(ids.len() < 60 && tokenizer.decode(&ids) == part, "{}", ids.len());
        }
    }

    #[test]
    fn gpt2_ids_are_those_of_the_reference() {
        let Some(vectors) = shared("tokenizers/gpt2/vectors.jsonl") else {
            return;
        };
        let tokenizer = load(Path::new(&format!("{SHARED}/tokenizers/gpt2/tokenizer.json"))).unwrap();
        assert_eq!(special(&tokenizer, Special::EndOfText), 50256);
        assert_eq!(tokenizer.vocab_size(), 50259);
        let mut cases = 0;
        for line in vectors.lines() {
            let case: serde_json::Value = serde_json::from_str(line).unwrap();
            let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            assert_eq!(tokenizer.encode(case["text"].as_str().unwrap()).unwrap(), ids, "{line}");
            cases += 1;
        }
        assert!(cases > 10);
    }

    #[test]
    fn shakespeare_has_65_characters() {
        let Some(train) = shared("text/tinyshakespeare/train.txt") else {
            return;
        };
        let tokenizer = char(&[text(&train)]);
        assert_eq!(tokenizer.vocab_size(), 65 + Special::ALL.len());
        let valid = shared("text/tinyshakespeare/valid.txt").unwrap();
        assert_eq!(tokenizer.encode(&valid).unwrap().len(), valid.len());
    }

    #[test]
    fn bpe_training_is_deterministic_and_compresses() {
        let Some(wiki) = shared("text/wikitext2/train.txt") else {
            return;
        };
        let documents = [corpus::read("train", &["embedded".into()]).unwrap(), vec![text(&wiki)]].concat();
        let tokenizer = train_bpe(&documents, 4096).unwrap();
        assert_eq!(tokenizer.vocab_size(), 4096);
        assert_eq!(train_bpe(&documents, 4096).unwrap().to_json(), tokenizer.to_json());
        let valid = shared("text/wikitext2/valid.txt").unwrap();
        let ids = tokenizer.encode(&valid).unwrap();
        assert_eq!(tokenizer.decode(&ids), valid);
        let bytes_per_token = valid.len() as f64 / ids.len() as f64;
        assert!(bytes_per_token > 3.0, "{bytes_per_token}");
    }
}
