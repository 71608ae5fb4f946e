//! Tokenizes documents into a token file, once. Data cannot fail after this.
//!
//! The file, all numbers little endian:
//!
//! | bytes | what |
//! |---|---|
//! | 8 | magic and version |
//! | 4 x 8 | tokens, learned tokens, bytes of text, learned bytes of text |
//! | 32 | seal: SHA-256 of the source digest, the four numbers and the words |
//! | 4 x tokens | words: the id, with the top bit set where the token is learned |
//!
//! The source digest covers the tokenizer and every document: a file with a valid seal equals the one that tokenizing again
//! would write.

use super::{
    DataError,
    chat::{self, Part},
    corpus::{self, Document},
};
use memmap2::Mmap;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::{
    fs,
    io::{self, Read, Write},
    ops::Range,
    path::Path,
};
use ternary_format::{
    Tokenizer,
    disk::{self, NewFile},
};

const MAGIC: [u8; 8] = *b"BTTOKEN1";
const SEAL: Range<usize> = 40..72;
const HEADER: usize = 72;
const WORD: usize = 4;
const LEARNED: u32 = 1 << 31;

/// A tokenized corpus: memory-mapped and verified, so that reading it cannot fail.
#[derive(Debug)]
pub struct TokenFile {
    map: Mmap,
    split: String,
    counts: Counts,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    tokens: usize,
    target_tokens: usize,
    text_bytes: usize,
    target_bytes: usize,
}

impl Counts {
    fn to_bytes(self) -> [u8; 32] {
        let counts = [self.tokens, self.target_tokens, self.text_bytes, self.target_bytes];
        bytemuck::cast(counts.map(|count| (count as u64).to_le_bytes()))
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut counts =
            bytes.chunks_exact(8).map(|count| u64::from_le_bytes(count.try_into().unwrap()).try_into().ok());
        let mut next = || counts.next().flatten();
        Some(Self { tokens: next()?, target_tokens: next()?, text_bytes: next()?, target_bytes: next()? })
    }

    /// Of texts every token is learned, of dialogues only the answers.
    fn have_dialogues(&self) -> bool {
        self.target_tokens < self.tokens
    }
}

/// [`TokenFile::makes_chat_model`] of the file at `path`, whatever it was made from; `false` if there is none.
pub fn makes_chat_model(path: &Path) -> bool {
    let mut header = [0; HEADER];
    let read = disk::open(path).and_then(|mut file| file.read_exact(&mut header));
    let counts = Counts::from_bytes(&header[MAGIC.len()..SEAL.start]);
    let dialogues =
        read.is_ok() && header.starts_with(&MAGIC) && counts.is_some_and(|counts| counts.have_dialogues());
    dialogues && disk::read(path).is_ok_and(|bytes| are_of_chat_model(&bytes[HEADER.min(bytes.len())..]))
}

/// [`corpus::make_chat_model`] of the documents that `words` are the tokens of. Each ends with the same token, which is the last, and
/// a dialogue begins with tokens that are not learned.
fn are_of_chat_model(words: &[u8]) -> bool {
    let words = words.chunks_exact(WORD).map(|word| u32::from_le_bytes(word.try_into().expect("four bytes")));
    let Some(end) = words.clone().next_back() else { return false };
    let (mut documents, mut dialogues, mut begins) = (0, 0, true);
    for word in words {
        dialogues += usize::from(begins && word & LEARNED == 0);
        begins = word == end;
        documents += usize::from(begins);
    }
    corpus::make_chat_model(dialogues, documents)
}

impl TokenFile {
    /// Opens the token file at `path` if it is whole and was made from this `source` (see [`source_digest`]).
    ///
    /// # Errors
    /// `Read`: the file cannot be mapped.
    pub fn open(path: &Path, source: &[u8; 32]) -> Result<Option<Self>, DataError> {
        let Ok(file) = disk::open(path) else { return Ok(None) };
        // SAFETY: the map is only read, as bytes, and the file is only ever replaced by a rename (see `replace`),
        // which leaves the mapped one as it is. Another program that shortens it in place would end ours with SIGBUS.
        #[allow(unsafe_code)]
        match unsafe { Mmap::map(&file) } {
            Ok(map) => Ok(Self::of_map(map, path, source)),
            Err(source) if source.kind() == io::ErrorKind::OutOfMemory => {
                Err(DataError::Read { path: path.into(), source })
            }
            Err(_) => Ok(None),
        }
    }

    fn of_map(map: Mmap, path: &Path, source: &[u8; 32]) -> Option<Self> {
        if map.len() < HEADER || map[..8] != MAGIC {
            return None;
        }
        let counts = Counts::from_bytes(&map[8..SEAL.start])?;
        if counts.tokens.checked_mul(WORD)?.checked_add(HEADER)? != map.len() {
            return None;
        }
        if map[SEAL] != seal(source, counts, &map[HEADER..]) {
            return None;
        }
        let split = path.file_stem()?.to_string_lossy().into_owned();
        Some(Self { map, split, counts })
    }

    /// The name of the file without its extension (`train`, `valid`).
    pub fn split(&self) -> &str {
        &self.split
    }

    /// Tokens in the file.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.counts.tokens
    }

    /// Tokens that count in the loss.
    pub fn target_tokens(&self) -> usize {
        self.counts.target_tokens
    }

    /// Whether enough documents are dialogues for a chat model; see [`corpus::make_chat_model`].
    pub fn makes_chat_model(&self) -> bool {
        self.counts.have_dialogues() && are_of_chat_model(&self.map[HEADER..])
    }

    /// Bytes of all texts; special tokens have none.
    pub fn text_bytes(&self) -> usize {
        self.counts.text_bytes
    }

    /// Bytes of the texts that are learned.
    pub fn target_bytes(&self) -> usize {
        self.counts.target_bytes
    }

    /// What a loss of `nats_per_token` over learned tokens is in bits per byte of learned text: with N tokens and B
    /// bytes, `nats * N / (B ln 2)`. Comparable between tokenizers.
    pub fn bits_per_byte(&self, nats_per_token: f64) -> f64 {
        nats_per_token * self.target_tokens() as f64 / (self.target_bytes() as f64 * std::f64::consts::LN_2)
    }

    /// The id of token `i`.
    ///
    /// # Panics
    /// `i` is beyond the file.
    pub fn id(&self, i: usize) -> u32 {
        self.word(i) & !LEARNED
    }

    /// Whether token `i` counts in the loss when it is the target.
    ///
    /// # Panics
    /// `i` is beyond the file.
    pub fn target(&self, i: usize) -> bool {
        self.word(i) & LEARNED != 0
    }

    fn word(&self, i: usize) -> u32 {
        let start = HEADER + i * WORD;
        u32::from_le_bytes(self.map[start..start + WORD].try_into().unwrap())
    }
}

/// Digest of the inputs of a token file: the tokenizer, `recipe` (the origin of the tokenizer) and the documents.
pub fn source_digest(tokenizer: &Tokenizer, recipe: &str, documents: &[Document]) -> [u8; 32] {
    let mut digest = Sha256::new();
    add(&mut digest, &tokenizer.to_json());
    add(&mut digest, recipe);
    add_documents(&mut digest, documents);
    digest.finalize().into()
}

/// SHA-256 of the documents in their order, independent of the tokenizer.
pub fn text_digest(documents: &[Document]) -> [u8; 32] {
    let mut digest = Sha256::new();
    add_documents(&mut digest, documents);
    digest.finalize().into()
}

fn add_documents(digest: &mut Sha256, documents: &[Document]) {
    for document in documents {
        // The number of texts of a document shows its kind.
        document.texts().for_each(|text| add(digest, text));
        add(digest, if matches!(document, Document::Text(_)) { "text" } else { "dialogue" });
    }
}

fn add(digest: &mut Sha256, text: &str) {
    digest.update((text.len() as u64).to_le_bytes());
    digest.update(text);
}

/// Tokens of `documents`, counted without writing anything: those of the file at `path` if it was made from the same.
///
/// # Errors
/// `UnknownCharacter`, `Encode`: the tokenizer cannot encode a text.
pub fn count(
    path: &Path,
    documents: &[Document],
    tokenizer: &Tokenizer,
    recipe: &str,
) -> Result<usize, DataError> {
    if let Some(file) = TokenFile::open(path, &source_digest(tokenizer, recipe, documents))? {
        return Ok(file.len());
    }
    let lengths = documents.par_iter().map(|document| Ok(encode(document, tokenizer)?.words.len()));
    lengths.sum()
}

/// Tokenizes `documents` into the file at `path`, or opens the one that is there if it was made from the same.
///
/// # Errors
/// `UnknownCharacter`, `Encode`: the tokenizer cannot encode a text. `Write`: no permission, no space. `Read`: the
/// file that was just written cannot be mapped.
pub fn prepare(
    path: &Path,
    documents: &[Document],
    tokenizer: &Tokenizer,
    recipe: &str,
) -> Result<TokenFile, DataError> {
    let source = source_digest(tokenizer, recipe, documents);
    if let Some(file) = TokenFile::open(path, &source)? {
        return Ok(file);
    }
    tracing::info!("tokenizing {} documents into {}", documents.len(), path.display());
    let encoded: Vec<Encoded> =
        documents.par_iter().map(|document| encode(document, tokenizer)).collect::<Result<_, _>>()?;
    let mut counts = Counts::default();
    let mut words = Vec::new();
    for document in encoded {
        counts.text_bytes += document.counts.text_bytes;
        counts.target_bytes += document.counts.target_bytes;
        counts.target_tokens += document.counts.target_tokens;
        words.extend(document.words.into_iter().flat_map(u32::to_le_bytes));
    }
    counts.tokens = words.len() / WORD;
    replace(path, |file| {
        file.write_all(&MAGIC)?;
        file.write_all(&counts.to_bytes())?;
        file.write_all(&seal(&source, counts, &words))?;
        file.write_all(&words)
    })?;
    TokenFile::open(path, &source)?.ok_or_else(|| DataError::Read {
        path: path.into(),
        source: io::Error::other("the token file changed while it was written"),
    })
}

/// The words of a document, and its contribution to the counts of the file.
struct Encoded {
    words: Vec<u32>,
    counts: Counts,
}

fn encode(document: &Document, tokenizer: &Tokenizer) -> Result<Encoded, DataError> {
    let (mut words, mut counts) = (Vec::new(), Counts::default());
    for (part, learned) in chat::parts(document) {
        let start = words.len();
        match part {
            Part::Special(special) => words.push(chat::special(tokenizer, special)),
            Part::Text(text) => {
                words.extend(tokenizer.encode(text)?);
                counts.text_bytes += text.len();
                counts.target_bytes += if learned { text.len() } else { 0 };
            }
        }
        if learned {
            words[start..].iter_mut().for_each(|word| *word |= LEARNED);
            counts.target_tokens += words.len() - start;
        }
    }
    Ok(Encoded { words, counts })
}

fn seal(source: &[u8; 32], counts: Counts, words: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update(source).chain_update(counts.to_bytes()).chain_update(words).finalize().into()
}

/// Writes a file that appears as a whole or not at all, and the folders above it where they are missing.
pub(crate) fn replace(
    path: &Path,
    write: impl FnOnce(&mut NewFile) -> io::Result<()>,
) -> Result<(), DataError> {
    let written = (|| {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut file = NewFile::create(path)?;
        write(&mut file)?;
        file.commit()
    })();
    written.map_err(|source| DataError::Write { path: path.into(), source })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::data::{chat::Special, tokenizer};
    use std::sync::Arc;

    /// `documents` as bytes, in a token file whose folder is gone when this returns (the map stays).
    pub fn byte_tokens(documents: &[Document]) -> Arc<TokenFile> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.tokens");
        Arc::new(prepare(&path, documents, &Tokenizer::byte(), "byte").unwrap())
    }

    fn documents() -> Vec<Document> {
        vec![
            Document::Text("pond é".into()),
            Document::Dialogue { question: "who?".into(), answer: "Duck.".into() },
        ]
    }

    #[test]
    fn tokens_and_their_loss_are_those_of_the_template() {
        let tokenizer = Tokenizer::byte();
        let file = byte_tokens(&documents());
        let [end, user, assistant] = Special::ALL.map(|s| chat::special(&tokenizer, s));
        let mut expected: Vec<(u32, bool)> = "pond é".bytes().map(|b| (b.into(), true)).collect();
        expected.extend([(end, true), (user, false)]);
        expected.extend("who?".bytes().map(|b| (u32::from(b), false)));
        expected.push((assistant, false));
        expected.extend("Duck.".bytes().map(|b| (u32::from(b), true)));
        expected.push((end, true));
        let found: Vec<_> = (0..file.len()).map(|i| (file.id(i), file.target(i))).collect();
        assert_eq!(found, expected);
        assert_eq!((file.text_bytes(), file.target_bytes()), (7 + 4 + 5, 7 + 5));
        assert!(file.makes_chat_model() && !byte_tokens(&[Document::Text("pond".into())]).makes_chat_model());
        assert_eq!(file.target_tokens(), expected.iter().filter(|(_, learned)| *learned).count());
        // 14 learned tokens for 12 learned bytes, at one bit a token.
        assert!((file.bits_per_byte(2f64.ln()) - 14.0 / 12.0).abs() < 1e-12);
    }

    #[test]
    fn a_dialogue_in_a_hundred_documents_makes_a_chat_model() {
        for (texts, expected) in [(98, true), (99, true), (100, false), (300, false)] {
            let mut documents = vec![Document::Text("pond".into()); texts];
            let dialogue = Document::Dialogue { question: "who?".into(), answer: "Duck.".into() };
            documents.insert(texts / 2, dialogue);
            assert_eq!(byte_tokens(&documents).makes_chat_model(), expected, "{texts}");
        }
    }

    #[test]
    fn the_order_of_documents_is_kept() {
        let documents: Vec<_> = (0..500).map(|i| Document::Text(format!("{i} "))).collect();
        let file = byte_tokens(&documents);
        let text = Tokenizer::byte().decode(&(0..file.len()).map(|i| file.id(i)).collect::<Vec<_>>());
        assert_eq!(text, (0..500).map(|i| format!("{i} ")).collect::<String>());
    }

    #[test]
    fn a_good_file_is_used_again_and_a_bad_one_is_rebuilt() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new").join("train.tokens");
        let tokenizer = Tokenizer::byte();
        let documents = documents();
        let source = source_digest(&tokenizer, "byte", &documents);
        prepare(&path, &documents, &tokenizer, "byte").unwrap();
        let good = fs::read(&path).unwrap();
        let written = fs::metadata(&path).unwrap().modified().unwrap();
        prepare(&path, &documents, &tokenizer, "byte").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), written);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "a scratch file was left");

        // Every truncation, one byte too many, and a flip of every byte.
        let truncated = (0..good.len()).map(|n| good[..n].to_vec());
        let flipped = (0..good.len()).map(|i| {
            let mut bytes = good.clone();
            bytes[i] ^= 1;
            bytes
        });
        for bad in truncated.chain(flipped).chain([[&good[..], &[0]].concat()]) {
            fs::write(&path, &bad).unwrap();
            assert!(TokenFile::open(&path, &source).unwrap().is_none());
        }
        prepare(&path, &documents, &tokenizer, "byte").unwrap();
        assert_eq!(fs::read(&path).unwrap(), good);
    }

    #[test]
    fn another_source_has_another_digest() {
        let tokenizer = Tokenizer::byte();
        let text = |text: &str| Document::Text(text.into());
        let dialogue = Document::Dialogue { question: "a".into(), answer: "b".into() };
        let corpora =
            [vec![text("a"), text("b")], vec![text("ab")], vec![text("b"), text("a")], vec![dialogue]];
        let mut digests: Vec<_> =
            corpora.iter().map(|corpus| source_digest(&tokenizer, "byte", corpus)).collect();
        digests.push(source_digest(&tokenizer::char(&corpora[0]), "byte", &corpora[0]));
        digests.push(source_digest(&tokenizer, "bpe", &corpora[0]));
        let distinct: std::collections::HashSet<_> = digests.iter().collect();
        assert_eq!(distinct.len(), digests.len());
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "in the way").unwrap();
        let error =
            prepare(&file.join("train.tokens"), &documents(), &Tokenizer::byte(), "byte").unwrap_err();
        assert!(matches!(error, DataError::Write { .. }) && error.to_string().contains("train.tokens"));
        assert_eq!(fs::read(&file).unwrap(), b"in the way");
    }
}
