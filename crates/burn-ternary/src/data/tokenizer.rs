//! Tokenizers made from the training text: its characters, or a byte-level BPE.

use super::{DataError, chat::Special, corpus::Document};
use std::{collections::BTreeSet, path::Path};
use ternary_format::{FormatError, Tokenizer, read_model};
use tokenizers::{
    AddedToken,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainer},
    },
    pre_tokenizers::byte_level::ByteLevel,
};

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
    let mut tokenizer = tokenizers::Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes));
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(Special::ALL.map(|s| AddedToken::from(s.text(), true)).into())
        .build();
    // The specials are not known yet, so that one written in a text is learned as the characters it is.
    let texts = documents.iter().flat_map(Document::texts).flat_map(Tokenizer::pieces);
    let trained = tokenizer.train(&mut TrainerWrapper::BpeTrainer(trainer), texts);
    trained.map_err(|error| DataError::Training { reason: error.to_string() })?;
    let tokenizer = Tokenizer::from_hf(tokenizer).and_then(Tokenizer::with_specials);
    tokenizer.map_err(|error| DataError::Training { reason: error.to_string() })
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
            ("quack", "no JSON"),
            ("", "no JSON"),
            ("{}", "other JSON"),
            (r#"{"type": "word"}"#, "other JSON"),
            (r#"{"type": "char", "characters": "ba"}"#, "not in order"),
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
