//! Text to batches. Everything that can fail fails in [`Dataset::prepare`]; batches are infallible.

pub mod batch;
pub mod chat;
pub mod corpus;
mod error;
pub mod tokenizer;
pub mod tokens;
pub mod window;

pub use batch::{LmBatch, LmBatcher, LmLoader};
pub use error::DataError;

use chat::Special;
use corpus::Document;
use getset::WithSetters;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{path::Path, sync::Arc};
use ternary_format::{FormatError, Tokenizer, disk};
use tokens::{TokenFile, source_digest};
use window::{TokenWindows, training_windows};

/// Which documents are held out, and the order of the others, does not depend on the run's seed: runs with different seeds are
/// measured on the same text, and share a token file.
pub(crate) const SPLIT_SEED: u64 = 0;

const TOKENIZER: &str = "tokenizer.json";
const TRAIN: &str = "train.tokens";
const VALID: &str = "valid.tokens";
/// The validation documents as text, for `duck eval`.
const VALID_TEXT: &str = "valid.jsonl";

/// The `[data]` section of an experiment: the texts, and how they become tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema, WithSetters)]
#[serde(default, deny_unknown_fields)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct DataConfig {
    /// Training texts: `.txt` and `.jsonl` files, or folders of them; `"embedded"` is the corpus that comes with the program.
    pub train: Vec<String>,
    /// Validation texts, as for `train`. Empty: the share `valid_fraction` of the training documents is held out.
    pub valid: Vec<String>,
    /// Share of the training documents that is held out for validation if `valid` is empty; above 0, at most 0.5.
    pub valid_fraction: f64,
    /// Tokenizer: `"byte"`, `"char"`, `"bpe"` (byte-pair encoding, trained on the training texts), or the path of a
    /// `tokenizer.json`, of a folder that contains one, or of a model file.
    pub tokenizer: String,
    /// Maximum vocabulary size of a trained `bpe` tokenizer, special tokens included; other tokenizers ignore it. 257 to 1048576.
    pub bpe_vocab_size: usize,
}

impl Default for DataConfig {
    /// No text yet, and a byte-pair encoding of 1024 tokens.
    fn default() -> Self {
        Self {
            train: Vec::new(),
            valid: Vec::new(),
            valid_fraction: 0.05,
            tokenizer: "bpe".into(),
            bpe_vocab_size: 1024,
        }
    }
}

/// A corpus that is ready to train on.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// The tokenizer of the texts, which exported model files contain.
    pub tokenizer: Tokenizer,
    /// The training windows: an endless, shuffled sequence.
    pub train: TokenWindows,
    /// The validation windows, in the order of the text.
    pub valid: TokenWindows,
}

impl Dataset {
    /// Reads, splits and tokenizes the texts of `config`, and cuts them into windows of `seq_len` inputs.
    ///
    /// Leaves `tokenizer.json`, `train.tokens`, `valid.tokens` and `valid.jsonl` (the validation documents) in `cache_dir`; what is there
    /// from the same texts and settings is used again, the trained tokenizer too.
    ///
    /// # Errors
    /// Every [`DataError`]: bad settings, texts that cannot be read, a tokenizer that cannot be used or does not fit
    /// the text, a text shorter than one window, a folder that cannot be written.
    pub fn prepare(
        config: &DataConfig,
        seq_len: usize,
        seed: u64,
        cache_dir: &Path,
    ) -> Result<Self, DataError> {
        Texts::read(config, cache_dir, false)?.prepare(seq_len, seed, cache_dir)
    }
}

/// The texts of a run and their tokenizer, in memory, before anything is written.
#[derive(Clone, Debug)]
pub struct Texts {
    /// Of the texts.
    pub tokenizer: Tokenizer,
    recipe: String,
    train: Vec<Document>,
    valid: Vec<Document>,
}

impl Texts {
    /// Checks that the texts of `config` exist, before a run folder is locked for them.
    ///
    /// # Errors
    /// `Read`, `UnknownKind`, `NothingFound`, as [`read`](Self::read).
    pub fn expect_there(config: &DataConfig) -> Result<(), DataError> {
        config.train.iter().chain(&config.valid).try_for_each(|source| corpus::expect_there(source))
    }

    /// Reads and splits the texts of `config`, and loads or trains their tokenizer.
    ///
    /// A `bpe` tokenizer that was trained on the same texts is taken from `cache_dir`. A run that goes on (`resumes`) takes the
    /// one that is there, whatever the texts are now, and never trains another: weights and ids belong together.
    ///
    /// # Errors
    /// As [`Dataset::prepare`], but for those of encoding and writing. `Read`, `Tokenizer`: a resumed run without its tokenizer.
    pub fn read(config: &DataConfig, cache_dir: &Path, resumes: bool) -> Result<Self, DataError> {
        let documents = corpus::read("train", &config.train)?;
        let (mut train, valid) = if config.valid.is_empty() {
            corpus::split(documents, config.checked_fraction()?, SPLIT_SEED)
        } else {
            (documents, corpus::read("valid", &config.valid)?)
        };
        corpus::shuffle(&mut train, SPLIT_SEED);
        let tokenizer_path = cache_dir.join(TOKENIZER);
        let recipe = config.recipe();
        let tokenizer = match config.tokenizer.as_str() {
            "byte" => Tokenizer::byte(),
            "char" => {
                // A character that only the held-out share has is no surprise: both come from the same text.
                let held_out: &[Document] = if config.valid.is_empty() { &valid } else { &[] };
                tokenizer::char(train.iter().chain(held_out))
            }
            "bpe" if resumes => tokenizer::load(&tokenizer_path)?,
            "bpe" => match tokenizer::load(&tokenizer_path) {
                Ok(trained) if is_made_from(&cache_dir.join(TRAIN), &trained, &recipe, &train) => trained,
                _ => tokenizer::train_bpe(&train, config.bpe_vocab_size)?,
            },
            path => tokenizer::load(Path::new(path))?,
        };
        Ok(Self { tokenizer, recipe, train, valid })
    }

    /// Whether enough training documents are dialogues for a chat model; see [`corpus::make_chat_model`].
    pub fn make_chat_model(&self) -> bool {
        let dialogues = self.train.iter().filter(|document| document.is_dialogue()).count();
        corpus::make_chat_model(dialogues, self.train.len())
    }

    /// How text samples may begin: with the first words of two held-out texts, or, where the training text has dialogues, with
    /// a held-out question besides (`<|user|>question`), or two where no text is held out.
    pub fn sample_prompts(&self) -> Vec<String> {
        let dialogues = self.make_chat_model();
        let prompt = |document: &Document| match document {
            Document::Text(text) => corpus::opening(text).into(),
            Document::Dialogue { question, .. } => format!("{}{question}", Special::User.text()),
        };
        let (questions, texts): (Vec<_>, Vec<_>) =
            self.valid.iter().filter(|d| dialogues || !d.is_dialogue()).partition(|d| d.is_dialogue());
        let first = texts.iter().take(1).chain(questions.iter().take(1));
        first.chain(texts.iter().skip(1)).chain(questions.iter().skip(1)).take(2).map(|d| prompt(d)).collect()
    }

    /// SHA-256 of the training and of the validation text.
    pub fn digests(&self) -> [[u8; 32]; 2] {
        [&self.train, &self.valid].map(|documents| tokens::text_digest(documents))
    }

    /// Training windows of `seq_len` inputs per epoch.
    ///
    /// # Errors
    /// `UnknownCharacter`, `Encode`: the tokenizer cannot encode a text.
    pub fn windows(&self, seq_len: usize, cache_dir: &Path) -> Result<usize, DataError> {
        let tokens = tokens::count(&cache_dir.join(TRAIN), &self.train, &self.tokenizer, &self.recipe)?;
        Ok(training_windows(tokens, seq_len))
    }

    /// The windows of token files that [`prepare`](Self::prepare) has left in `cache_dir` from these texts, without writing anything;
    /// `None` where there are none.
    ///
    /// # Errors
    /// `Read`: a file cannot be mapped. `TooShort`: a text is shorter than a window.
    pub fn prepared(
        &self,
        seq_len: usize,
        seed: u64,
        cache_dir: &Path,
    ) -> Result<Option<Dataset>, DataError> {
        let open = |name: &str, documents: &[Document]| {
            let digest = source_digest(&self.tokenizer, &self.recipe, documents);
            TokenFile::open(&cache_dir.join(name), &digest)
        };
        let (Some(train), Some(valid)) = (open(TRAIN, &self.train)?, open(VALID, &self.valid)?) else {
            return Ok(None);
        };
        let train = TokenWindows::new(Arc::new(train), seq_len, seed)?;
        let valid = TokenWindows::sequential(Arc::new(valid), seq_len)?;
        Ok(Some(Dataset { tokenizer: self.tokenizer.clone(), train, valid }))
    }

    /// Writes the tokenizer to `cache_dir`, where [`read`](Self::read) finds it for a run that continues.
    ///
    /// # Errors
    /// `Write`.
    pub(crate) fn write_tokenizer(json: &[u8], cache_dir: &Path) -> Result<(), DataError> {
        let path = cache_dir.join(TOKENIZER);
        disk::write(&path, json).map_err(|source| DataError::Write { path, source })
    }

    /// Tokenizes the texts and cuts them into windows of `seq_len` inputs; writes what [`Dataset::prepare`] leaves.
    ///
    /// # Errors
    /// As [`Dataset::prepare`].
    pub fn prepare(self, seq_len: usize, seed: u64, cache_dir: &Path) -> Result<Dataset, DataError> {
        let Self { tokenizer, recipe, train, valid } = self;
        let train = tokens::prepare(&cache_dir.join(TRAIN), &train, &tokenizer, &recipe)?;
        let train = TokenWindows::new(Arc::new(train), seq_len, seed)?;
        corpus::write(&cache_dir.join(VALID_TEXT), &valid)?;
        let valid = tokens::prepare(&cache_dir.join(VALID), &valid, &tokenizer, &recipe)?;
        let valid = TokenWindows::sequential(Arc::new(valid), seq_len)?;
        tokenizer.save(&cache_dir.join(TOKENIZER)).map_err(|error| match error {
            FormatError::Io { path, source } => DataError::Write { path, source },
            other => DataError::Encode(other),
        })?;
        Ok(Dataset { tokenizer, train, valid })
    }
}

impl DataConfig {
    fn checked_fraction(&self) -> Result<f64, DataError> {
        let fraction = self.valid_fraction;
        if fraction > 0.0 && fraction <= 0.5 {
            return Ok(fraction);
        }
        Err(DataError::BadValue {
            key: "valid_fraction",
            expected: "a number above 0 and at most 0.5".into(),
            found: fraction.to_string(),
        })
    }

    /// How the tokenizer is come by: what else a trained one depends on than its text.
    fn recipe(&self) -> String {
        match self.tokenizer.as_str() {
            "bpe" => format!("bpe {}", self.bpe_vocab_size),
            other => other.into(),
        }
    }
}

/// Whether [`Dataset::prepare`] left its files in `cache_dir`.
pub(crate) fn has_token_files(cache_dir: &Path) -> bool {
    cache_dir.join(TRAIN).exists()
}

/// Whether the run in `cache_dir` was trained on enough dialogues for a chat model, by the files that [`Dataset::prepare`] left.
pub(crate) fn makes_chat_model(cache_dir: &Path) -> bool {
    tokens::makes_chat_model(&cache_dir.join(TRAIN))
}

fn is_made_from(path: &Path, tokenizer: &Tokenizer, recipe: &str, documents: &[Document]) -> bool {
    let file = TokenFile::open(path, &source_digest(tokenizer, recipe, documents));
    file.is_ok_and(|file| file.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const SHARED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data");

    fn config(train: &str, valid: Option<&str>, tokenizer: &str) -> DataConfig {
        DataConfig {
            train: vec![train.into()],
            valid: valid.into_iter().map(String::from).collect(),
            valid_fraction: 0.1,
            tokenizer: tokenizer.into(),
            bpe_vocab_size: 512,
        }
    }

    fn shared(path: &str) -> Option<String> {
        let path = format!("{SHARED}/{path}");
        let is_there = Path::new(&path).exists();
        if !is_there {
            println!("skipped: no {path}");
        }
        is_there.then_some(path)
    }

    #[test]
    fn the_embedded_corpus_trains_with_every_tokenizer() {
        for tokenizer in ["byte", "char", "bpe"] {
            let folder = tempfile::tempdir().unwrap();
            let data = Dataset::prepare(&config("embedded", None, tokenizer), 64, 1, folder.path()).unwrap();
            let (train, valid) = (data.train.tokens(), data.valid.tokens());
            let share = valid.text_bytes() as f64 / (train.text_bytes() + valid.text_bytes()) as f64;
            assert!((0.05..0.15).contains(&share), "{share}");
            assert!((0..train.len()).all(|i| (train.id(i) as usize) < data.tokenizer.vocab_size()));
            let reopened = tokenizer::load(&folder.path().join("tokenizer.json")).unwrap();
            assert_eq!(reopened.to_json(), data.tokenizer.to_json());
        }
    }

    #[test]
    fn the_validation_documents_are_stored_as_text() {
        let folder = tempfile::tempdir().unwrap();
        let config = config("embedded", None, "byte");
        let documents = corpus::read("train", &config.train).unwrap();
        let (_, expected) = corpus::split(documents, config.valid_fraction, SPLIT_SEED);
        let path = folder.path().join(VALID_TEXT);
        for _ in 0..2 {
            Dataset::prepare(&config, 32, 1, folder.path()).unwrap();
            assert_eq!(corpus::read("valid", &[path.display().to_string()]).unwrap(), expected);
            // Those of another text are replaced.
            fs::write(&path, "{\"text\": \"quack\"}\n").unwrap();
        }
    }

    #[test]
    fn seeds_change_the_order_and_not_the_held_out_text() {
        let folder = tempfile::tempdir().unwrap();
        let config = config("embedded", None, "byte");
        let [a, b] = [1, 2].map(|seed| Dataset::prepare(&config, 32, seed, folder.path()).unwrap());
        assert_eq!(a.valid.get(3), b.valid.get(3));
        assert_ne!(a.train.get(3), b.train.get(3));
    }

    #[test]
    fn a_trained_tokenizer_is_kept_until_text_or_size_change() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config("embedded", None, "bpe");
        let first = Dataset::prepare(&config, 32, 0, folder.path()).unwrap();
        assert_eq!(first.tokenizer.vocab_size(), 512);
        // Put another tokenizer in its place, with the token file it makes: it is used, so nothing was trained.
        let path = folder.path().join("tokenizer.json");
        let documents = corpus::read("train", &config.train).unwrap();
        let (mut train, _) = corpus::split(documents, 0.1, SPLIT_SEED);
        corpus::shuffle(&mut train, SPLIT_SEED);
        let other = tokenizer::train_bpe(&train, 400).unwrap();
        other.save(&path).unwrap();
        tokens::prepare(&folder.path().join("train.tokens"), &train, &other, "bpe 512").unwrap();
        let again = Dataset::prepare(&config, 32, 0, folder.path()).unwrap();
        assert_eq!(again.tokenizer.to_json(), other.to_json());
        config.bpe_vocab_size = 300;
        let smaller = Dataset::prepare(&config, 32, 0, folder.path()).unwrap();
        assert_eq!(smaller.tokenizer.vocab_size(), 300);
        fs::write(&path, "quack").unwrap();
        let repaired = Dataset::prepare(&config, 32, 0, folder.path()).unwrap();
        assert_eq!(repaired.tokenizer.to_json(), smaller.tokenizer.to_json());
    }

    #[test]
    fn samples_begin_as_held_out_texts_and_questions_do() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text.jsonl");
        let prompts = |train: &str, valid: &str| {
            fs::write(&path, valid).unwrap();
            let config = config(train, path.to_str(), "byte");
            Texts::read(&config, folder.path(), false).unwrap().sample_prompts()
        };
        let text = |text: &str| format!("{{\"text\": \"{text}\"}}\n");
        let question = |text: &str| format!("{{\"question\": \"{text}\", \"answer\": \"no\"}}\n");
        let dna = "ACGT".repeat(20);
        let texts = [text(&dna), text("  It is a truth universally known"), text("third")].concat();
        assert_eq!(prompts("embedded:stories", &texts), [&dna[..24], "It is a truth"]);
        let questions = [question("Who?"), question("Why?"), question("What?")].concat();
        assert_eq!(prompts("embedded:dialogues", &questions), ["<|user|>Who?", "<|user|>Why?"]);
        assert_eq!(prompts("embedded", &(questions.clone() + &text("a"))), ["a", "<|user|>Who?"]);
        // A model of texts has learned no answers.
        assert_eq!(prompts("embedded:stories", &(questions + &text("a"))), ["a"]);
    }

    #[test]
    fn shakespeare_by_characters() {
        let (Some(train), Some(valid)) =
            (shared("text/tinyshakespeare/train.txt"), shared("text/tinyshakespeare/valid.txt"))
        else {
            return;
        };
        let folder = tempfile::tempdir().unwrap();
        let data = Dataset::prepare(&config(&train, Some(&valid), "char"), 64, 1, folder.path()).unwrap();
        assert_eq!(data.tokenizer.vocab_size(), 65 + 3);
        // A token a character, and the end of text.
        assert_eq!(data.train.tokens().len(), 1_003_854 + 1);
        assert_eq!(data.valid.tokens().text_bytes(), 111_540);
        assert_eq!(data.valid.per_epoch(), 111_540 / 64);
        let start = fs::read_to_string(valid).unwrap()[..65].to_owned();
        assert_eq!(data.tokenizer.decode(&data.valid.get(0).ids), start);
    }

    #[test]
    fn duck_dialogues_learn_their_answers() {
        let (Some(train), Some(valid)) = (
            shared("dialogue/personality_chat/duck_train.jsonl"),
            shared("dialogue/personality_chat/duck_dev.jsonl"),
        ) else {
            return;
        };
        let folder = tempfile::tempdir().unwrap();
        let data = Dataset::prepare(&config(&train, Some(&valid), "bpe"), 64, 1, folder.path()).unwrap();
        // The last dialogue of the file, read independently.
        let text = fs::read_to_string(&valid).unwrap();
        let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        let tokens = data.valid.tokens();
        let first_learned = (0..tokens.len()).rev().find(|&i| !tokens.target(i)).unwrap() + 1;
        let ids: Vec<u32> = (first_learned..tokens.len()).map(|i| tokens.id(i)).collect();
        assert_eq!(data.tokenizer.decode(&ids), last["answer"].as_str().unwrap());
        assert_eq!(ids.last(), Some(&chat::special(&data.tokenizer, chat::Special::EndOfText)));
        let answers: usize = text
            .lines()
            .map(|line| {
                serde_json::from_str::<serde_json::Value>(line).unwrap()["answer"].as_str().unwrap().len()
            })
            .sum();
        assert_eq!(tokens.target_bytes(), answers);
    }

    #[test]
    fn bad_settings_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("short.txt");
        fs::write(&text, "a short text").unwrap();
        let text = text.to_str().unwrap();
        let missing = folder.path().join("tokenizer.json");
        let message = |config: &DataConfig| {
            Dataset::prepare(config, 64, 0, &folder.path().join("run")).unwrap_err().to_string()
        };
        let no_fraction = DataConfig { valid_fraction: 0.0, ..config("embedded", None, "byte") };
        let too_small = DataConfig { bpe_vocab_size: 100, ..config("embedded", None, "bpe") };
        let nan = DataConfig { valid_fraction: f64::NAN, ..no_fraction.clone() };
        let nothing = DataConfig { train: vec![], ..no_fraction.clone() };
        for (config, expected) in [
            (no_fraction, "data.valid_fraction: expected a number above 0 and at most 0.5, found 0"),
            (nan, "found NaN"),
            (nothing, "data.train: expected"),
            (too_small, "data.bpe_vocab_size: expected at least 259, found 100"),
            (config(text, None, "byte"), "the train text has 12 tokens, but one window needs 65"),
            (config("embedded", Some(text), "byte"), "the valid text has 13 tokens, but one window needs 65"),
            (config("embedded", Some("embedded:duck"), "byte"), "data.valid: expected `embedded`"),
            (config("embedded", None, missing.to_str().unwrap()), "cannot read"),
            (config("embedded", None, text), "expected a tokenizer.json or a model, found another file"),
        ] {
            let message = message(&config);
            assert!(message.contains(expected), "{message}");
        }
    }
}
