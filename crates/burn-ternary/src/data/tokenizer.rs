//! Text to ids and back: bytes, characters, or a byte-level BPE in the `tokenizer.json` format.

use super::{DataError, chat::Special, corpus::Document, tokens::replace};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, fs, io::Write, path::Path};
use tokenizers::{
    AddedToken,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainer},
    },
    pre_tokenizers::byte_level::ByteLevel,
};

/// Longer texts are encoded in pieces of about this many bytes: in parallel, and in bounded memory.
const PIECE: usize = 1 << 18;

/// Turns text into ids and back.
///
/// Plain text never becomes a special token: `<|user|>` typed by a user is encoded as the eight characters it is.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    kind: Kind,
    specials: [u32; Special::ALL.len()],
    vocab_size: usize,
}

#[derive(Clone, Debug)]
enum Kind {
    /// Id = byte.
    Byte,
    /// Id = place in this sorted list.
    Char(Vec<char>),
    Hf(Box<tokenizers::Tokenizer>),
}

/// The file of a byte or char tokenizer; the others are a Hugging Face `tokenizer.json`.
#[derive(Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
enum Saved {
    Byte,
    Char { characters: String },
}

impl Tokenizer {
    /// 256 bytes, then the special tokens.
    pub fn byte() -> Self {
        Self::after(Kind::Byte, 256)
    }

    /// The characters of `documents` in code point order, then the special tokens.
    pub fn char<'a>(documents: impl IntoIterator<Item = &'a Document>) -> Self {
        let characters: BTreeSet<char> =
            documents.into_iter().flat_map(Document::texts).flat_map(str::chars).collect();
        Self::from_characters(characters.into_iter().collect())
    }

    fn from_characters(characters: Vec<char>) -> Self {
        let known = characters.len();
        Self::after(Kind::Char(characters), known)
    }

    /// The special tokens follow the `known` ids of `kind`.
    fn after(kind: Kind, known: usize) -> Self {
        let specials = std::array::from_fn(|i| (known + i) as u32);
        Self { kind, specials, vocab_size: known + Special::ALL.len() }
    }

    /// Trains a byte-level BPE of at most `vocab_size` ids, special tokens included, on `documents`.
    ///
    /// # Errors
    /// `BadValue`: `vocab_size` has no room for the 256 bytes and the special tokens. `Training`: the trainer failed.
    pub fn train_bpe(documents: &[Document], vocab_size: usize) -> Result<Self, DataError> {
        let least = 256 + Special::ALL.len();
        if vocab_size < least {
            return Err(DataError::BadValue {
                key: "bpe_vocab_size",
                expected: format!("at least {least}"),
                found: vocab_size.to_string(),
            });
        }
        let failed = |error: tokenizers::Error| DataError::Training { reason: error.to_string() };
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
        let texts = documents.iter().flat_map(Document::texts).flat_map(pieces);
        tokenizer.train(&mut TrainerWrapper::BpeTrainer(trainer), texts).map_err(failed)?;
        Self::from_hf(tokenizer).map_err(|reason| DataError::Training { reason })
    }

    /// Adds the special tokens where they are missing; the error says why the tokenizer cannot be used.
    fn from_hf(mut tokenizer: tokenizers::Tokenizer) -> Result<Self, String> {
        tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
        tokenizer.with_padding(None);
        tokenizer.add_special_tokens(&Special::ALL.map(|s| AddedToken::from(s.text(), true)));
        tokenizer.set_encode_special_tokens(true);
        let vocab = tokenizer.get_vocab(true);
        let vocab_size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        // Ids are the rows of the embedding: a tokenizer with holes would cost rows, one with two tokens for an id
        // would mix them up (new tokens are numbered by the count of the old).
        if vocab.len() != vocab_size {
            return Err(format!("{} tokens with ids up to {}", vocab.len(), vocab_size - 1));
        }
        let specials = Special::ALL.map(|s| vocab[s.text()]);
        Ok(Self { kind: Kind::Hf(Box::new(tokenizer)), specials, vocab_size })
    }

    /// The ids of plain text.
    ///
    /// # Errors
    /// `UnknownCharacter`: the char tokenizer has no id for a character. `Encode`: a `tokenizer.json` refused the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        match &self.kind {
            Kind::Byte => Ok(text.bytes().map(u32::from).collect()),
            Kind::Char(characters) => text
                .chars()
                .map(|character| {
                    let place = characters.binary_search(&character);
                    let known = characters.len();
                    place.map(|i| i as u32).map_err(|_| DataError::UnknownCharacter { character, known })
                })
                .collect(),
            Kind::Hf(tokenizer) => {
                let encode = |piece: &str| {
                    let encoding =
                        tokenizer.encode_fast(piece, false).map_err(|error| DataError::Encode {
                            text: piece.chars().take(20).collect(),
                            reason: error.to_string(),
                        })?;
                    Ok(encoding.get_ids().to_vec())
                };
                let pieces: Vec<&str> = pieces(text).collect();
                match pieces[..] {
                    [piece] => encode(piece),
                    _ => Ok(pieces.into_par_iter().map(encode).collect::<Result<Vec<_>, _>>()?.concat()),
                }
            }
        }
    }

    /// The text of `ids`: without special tokens and unknown ids, and with U+FFFD for bytes that are no UTF-8.
    pub fn decode(&self, ids: &[u32]) -> String {
        match &self.kind {
            Kind::Byte => {
                let bytes: Vec<u8> = ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            Kind::Char(characters) => ids.iter().filter_map(|&id| characters.get(id as usize)).collect(),
            // Only a decoder that is broken for every text fails here; a sample is no reason to stop a run.
            Kind::Hf(tokenizer) => tokenizer.decode(ids, true).unwrap_or_default(),
        }
    }

    /// The id of a special token.
    pub fn special(&self, special: Special) -> u32 {
        self.specials[special as usize]
    }

    /// How many ids there are, special tokens included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The file that [`save`](Self::save) writes: for BPE a Hugging Face `tokenizer.json`.
    pub fn to_json(&self) -> String {
        let saved = match &self.kind {
            Kind::Byte => Saved::Byte,
            Kind::Char(characters) => Saved::Char { characters: characters.iter().collect() },
            Kind::Hf(tokenizer) => return tokenizer.to_string(false).expect("a tokenizer is JSON"),
        };
        serde_json::to_string(&saved).expect("strings are JSON")
    }

    /// Writes the tokenizer to `path`, replacing what was there at once.
    ///
    /// # Errors
    /// `Write`: no permission, no space.
    pub fn save(&self, path: &Path) -> Result<(), DataError> {
        replace(path, |file| file.write_all(self.to_json().as_bytes()))
    }

    /// Reads a Hugging Face `tokenizer.json`, or what [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// `Read`: missing, or no permission. `Tokenizer`: no JSON, or no tokenizer that can be used.
    pub fn load(path: &Path) -> Result<Self, DataError> {
        let json = fs::read(path).map_err(|source| DataError::Read { path: path.into(), source })?;
        Self::from_json(&json).map_err(|found| DataError::Tokenizer { path: path.into(), found })
    }

    fn from_json(json: &[u8]) -> Result<Self, String> {
        let value: serde_json::Value =
            serde_json::from_slice(json).map_err(|error| format!("no JSON ({error})"))?;
        if value.get("type").is_none() {
            let tokenizer =
                tokenizers::Tokenizer::from_bytes(json).map_err(|error| format!("other JSON ({error})"))?;
            return Self::from_hf(tokenizer);
        }
        match serde_json::from_value(value).map_err(|error| format!("other JSON ({error})"))? {
            Saved::Byte => Ok(Self::byte()),
            Saved::Char { characters } => {
                let characters: Vec<char> = characters.chars().collect();
                if !characters.is_sorted_by(|a, b| a < b) {
                    return Err("characters that are not in order".into());
                }
                Ok(Self::from_characters(characters))
            }
        }
    }
}

/// Cuts a long text before white space that follows a letter or digit: a place where the pre-tokenizers in use cut
/// as well, so that the ids are those of the whole text.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest.take()?;
        let from = text.floor_char_boundary(PIECE);
        let mut previous = ' ';
        for (i, character) in text[from..].char_indices() {
            if matches!(character, ' ' | '\n') && previous.is_alphanumeric() {
                let (piece, tail) = text.split_at(from + i);
                rest = Some(tail);
                return Some(piece);
            }
            previous = character;
        }
        Some(text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::corpus;

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
        [Tokenizer::byte(), Tokenizer::char(&documents), Tokenizer::train_bpe(&documents, 300).unwrap()]
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
                tokenizers.push(Tokenizer::load(Path::new(&path)).unwrap());
            } else {
                println!("skipped: no {path}");
            }
        }
        for tokenizer in tokenizers {
            let specials = Special::ALL.map(|s| tokenizer.special(s));
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
            let loaded = Tokenizer::load(&path).unwrap();
            assert_eq!(loaded.encode(HOSTILE).unwrap(), tokenizer.encode(HOSTILE).unwrap());
            assert_eq!(loaded.specials, tokenizer.specials);
            assert_eq!(loaded.vocab_size(), tokenizer.vocab_size());
            assert_eq!(loaded.to_json(), tokenizer.to_json());
        }
    }

    #[test]
    fn bad_tokenizer_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        assert!(matches!(Tokenizer::load(&path), Err(DataError::Read { .. })));
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
            let message = Tokenizer::load(&path).unwrap_err().to_string();
            assert!(message.contains(found) && message.contains("tokenizer.json"), "{json}: {message}");
        }
    }

    #[test]
    fn an_unknown_character_is_named() {
        let message = Tokenizer::char(&[text("duck")]).encode("dück").unwrap_err().to_string();
        assert!(
            message.contains("'ü'") && message.contains("U+00FC") && message.contains("4 characters"),
            "{message}"
        );
    }

    #[test]
    fn bpe_needs_room_for_bytes_and_specials() {
        let error = Tokenizer::train_bpe(&[text("duck")], 258).unwrap_err();
        assert!(matches!(error, DataError::BadValue { key: "bpe_vocab_size", .. }));
        assert_eq!(Tokenizer::train_bpe(&[text("duck")], 259).unwrap().vocab_size(), 259);
    }

    #[test]
    fn gpt2_ids_are_those_of_the_reference() {
        let Some(vectors) = shared("tokenizers/gpt2/vectors.jsonl") else {
            return;
        };
        let tokenizer =
            Tokenizer::load(Path::new(&format!("{SHARED}/tokenizers/gpt2/tokenizer.json"))).unwrap();
        assert_eq!(tokenizer.special(Special::EndOfText), 50256);
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
    fn pieces_have_the_ids_of_the_whole() {
        let Some(wiki) = shared("text/wikitext2/train.txt") else {
            return;
        };
        for name in ["gpt2", "smollm2"] {
            let tokenizer =
                Tokenizer::load(Path::new(&format!("{SHARED}/tokenizers/{name}/tokenizer.json"))).unwrap();
            let Kind::Hf(whole) = &tokenizer.kind else { unreachable!() };
            assert!(pieces(&wiki).count() > 2);
            assert_eq!(tokenizer.encode(&wiki).unwrap(), whole.encode_fast(&*wiki, false).unwrap().get_ids());
        }
        assert_eq!(pieces(&"🦆".repeat(PIECE)).count(), 1);
    }

    #[test]
    fn shakespeare_has_65_characters() {
        let Some(train) = shared("text/tinyshakespeare/train.txt") else {
            return;
        };
        let tokenizer = Tokenizer::char(&[text(&train)]);
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
        let tokenizer = Tokenizer::train_bpe(&documents, 4096).unwrap();
        assert_eq!(tokenizer.vocab_size(), 4096);
        assert_eq!(Tokenizer::train_bpe(&documents, 4096).unwrap().to_json(), tokenizer.to_json());
        let valid = shared("text/wikitext2/valid.txt").unwrap();
        let ids = tokenizer.encode(&valid).unwrap();
        assert_eq!(tokenizer.decode(&ids), valid);
        let bytes_per_token = valid.len() as f64 / ids.len() as f64;
        assert!(bytes_per_token > 3.0, "{bytes_per_token}");
    }
}
