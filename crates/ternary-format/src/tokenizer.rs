//! [`Tokenizer`]: text to token ids and back, by bytes, by characters, or with a Hugging Face `tokenizer.json`.

use crate::{FormatError, disk, spec::LARGEST_SIZE, tokenizer_limit};
use getset::WithSetters;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, io::Write, path::Path};
use tokenizers::AddedToken;

/// Longer texts are split into pieces of about this many bytes, which are encoded in parallel and in bounded memory.
const PIECE_BYTES: usize = 1 << 18;

/// Upper bound of the tokens that splitting a text adds. Only tokens next to the cut change.
pub(crate) const CUT: usize = 1024;

/// Bytes per token by which [`Tokenizer::encode_within`] chooses its first prefix; more than in ordinary text.
const BYTES_PER_TOKEN: usize = 8;

/// Limit of ids that the decoder holds back while they do not form a character.
const MAX_PENDING: usize = 16;

/// A special token of this project's models. Plain text never encodes to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// `<|endoftext|>`: the end of a document, and of an answer.
    EndOfText,
    /// `<|user|>`: a user message follows.
    User,
    /// `<|assistant|>`: an answer follows.
    Assistant,
}

impl Special {
    /// All special tokens; `ALL[s as usize] == s`.
    pub const ALL: [Self; 3] = [Self::EndOfText, Self::User, Self::Assistant];

    /// Text of the token in `tokenizer.json` and in chat templates.
    pub const fn text(self) -> &'static str {
        match self {
            Self::EndOfText => "<|endoftext|>",
            Self::User => "<|user|>",
            Self::Assistant => "<|assistant|>",
        }
    }
}

/// Converts text to token ids and back.
///
/// Plain text never becomes a special token: if a user types `<|user|>`, it is encoded as the eight characters.
///
/// # Example
/// ```
/// use ternary_format::Tokenizer;
///
/// let tokenizer = Tokenizer::byte();
/// let ids = tokenizer.encode("duck")?;
/// assert_eq!(ids, [100, 117, 99, 107]);
/// assert_eq!(tokenizer.decode(&ids), "duck");
/// # Ok::<(), ternary_format::FormatError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Tokenizer {
    kind: Kind,
    specials: BTreeMap<String, u32>,
    vocab_size: usize,
    ends: Ends,
}

#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// The id is the byte.
    Byte,
    /// The id is the index in this sorted list.
    Char(Vec<char>),
    /// A tokenizer of the crate `tokenizers`.
    Hf(Box<tokenizers::Tokenizer>),
}

/// Begin and end tokens of texts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, WithSetters)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct Ends {
    /// Begin-of-sequence token.
    pub bos: Option<u32>,
    /// End-of-sequence token, at which generation stops.
    pub eos: Option<u32>,
    /// Whether a prompt starts with `bos`.
    pub add_bos: bool,
}

/// File of a byte or character tokenizer. Other tokenizers are stored as a Hugging Face `tokenizer.json`.
#[derive(Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
enum TokenizerFile {
    Byte,
    Char { characters: String },
}

impl Tokenizer {
    /// A byte tokenizer: ids 0 to 255 are bytes, followed by the special tokens.
    pub fn byte() -> Self {
        Self::with_specials_after(Kind::Byte, 256)
    }

    /// A character tokenizer: one id per character, followed by the special tokens.
    ///
    /// # Errors
    /// `Tokenizer`: the characters are not sorted by code point, or one occurs twice.
    pub fn from_characters(characters: Vec<char>) -> Result<Self, FormatError> {
        if !characters.is_sorted_by(|a, b| a < b) {
            return Err(FormatError::Tokenizer {
                why: "characters out of order, expected them sorted by code point, each once".into(),
            });
        }
        let known = characters.len();
        Ok(Self::with_specials_after(Kind::Char(characters), known))
    }

    /// A tokenizer whose special tokens follow the `known` ids of `kind`.
    fn with_specials_after(kind: Kind, known: usize) -> Self {
        let specials = Special::ALL.map(|s| (s.text().to_string(), (known + s as usize) as u32));
        let end = Some((known + Special::EndOfText as usize) as u32);
        let ends = Ends { bos: end, eos: end, add_bos: false };
        Self { kind, specials: specials.into(), vocab_size: known + Special::ALL.len(), ends }
    }

    /// A tokenizer from a parsed `tokenizer.json`. Its truncation and padding are disabled.
    ///
    /// # Errors
    /// `Tokenizer`: the tokenizer cannot be used.
    pub fn from_hf(tokenizer: tokenizers::Tokenizer) -> Result<Self, FormatError> {
        tokenizer_limit::catch_panic(|| Self::without_limits(tokenizer))
            .map_err(|why| FormatError::Tokenizer { why })
    }

    fn without_limits(mut tokenizer: tokenizers::Tokenizer) -> tokenizers::Result<Self> {
        tokenizer.with_truncation(None)?;
        tokenizer.with_padding(None);
        tokenizer.set_encode_special_tokens(true);
        let vocab = tokenizer.get_vocab(true);
        let vocab_size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        if vocab_size > LARGEST_SIZE {
            return Err(format!("token id {}, expected less than {LARGEST_SIZE}", vocab_size - 1).into());
        }
        let added = tokenizer.get_added_tokens_decoder();
        let specials: BTreeMap<String, u32> = added
            .into_iter()
            .filter(|(_, token)| token.special)
            .map(|(id, token)| (token.content, id))
            .collect();
        // The token that the post-processor adds to an empty text is the begin token. Most files do not name an end
        // token.
        let before = tokenizer.encode_fast("", true)?.get_ids().first().copied();
        let find = |names: &[&str]| names.iter().find_map(|&name| specials.get(name).copied());
        let eos = find(&[Special::EndOfText.text(), "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "</s>"]);
        let bos = before.or_else(|| find(&["<s>", "<|begin_of_text|>", Special::EndOfText.text()]));
        let ends = Ends { bos, eos, add_bos: before.is_some() };
        Ok(Self { kind: Kind::Hf(Box::new(tokenizer)), specials, vocab_size, ends })
    }

    /// Adds the [special tokens](Special) of this project where they are missing. `<|endoftext|>` becomes the begin
    /// and end token.
    ///
    /// # Errors
    /// `Tokenizer`: the ids have gaps, which would waste rows of the embedding, or two tokens share an id.
    pub fn with_specials(self) -> Result<Self, FormatError> {
        let Kind::Hf(mut tokenizer) = self.kind else { return Ok(self) };
        let new = tokenizer_limit::catch_panic(|| {
            tokenizer.add_special_tokens(&Special::ALL.map(|s| AddedToken::from(s.text(), true)));
            Self::without_limits(*tokenizer)
        });
        let mut new = new.map_err(|why| FormatError::Tokenizer { why })?;
        let Kind::Hf(tokenizer) = &new.kind else { unreachable!("`without_limits` returns `Kind::Hf`") };
        let known = tokenizer.get_vocab_size(true);
        if known != new.vocab_size {
            let why =
                format!("{known} tokens with ids up to {}, expected ids without gaps", new.vocab_size - 1);
            return Err(FormatError::Tokenizer { why });
        }
        let end = new.special(Special::EndOfText.text());
        new.ends = Ends { bos: end, eos: end, add_bos: false };
        Ok(new)
    }

    /// The same tokenizer with other begin and end tokens, as the configuration of a model names them.
    pub fn with_ends(self, ends: Ends) -> Self {
        Self { ends, ..self }
    }

    /// Encodes plain text.
    ///
    /// # Errors
    /// `UnknownCharacter`: a character tokenizer has no id for a character. `Encode`: a `tokenizer.json` cannot
    /// encode the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, FormatError> {
        match &self.kind {
            Kind::Byte => Ok(text.bytes().map(u32::from).collect()),
            Kind::Char(characters) => text
                .chars()
                .map(|character| {
                    let place = characters.binary_search(&character);
                    let known = characters.len();
                    place.map(|i| i as u32).map_err(|_| FormatError::UnknownCharacter { character, known })
                })
                .collect(),
            Kind::Hf(tokenizer) => {
                let encode = |piece: &str| {
                    let failed = |why| FormatError::Encode { text: piece.chars().take(20).collect(), why };
                    let encoding = tokenizer_limit::catch_panic(|| tokenizer.encode_fast(piece, false))
                        .map_err(failed)?;
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

    /// Encodes plain text in time and memory bounded by `most` tokens, however long the text is.
    ///
    /// A prefix of the text is encoded and doubled until it is the whole text or has too many tokens. A limit on
    /// bytes alone would not work: normalizers shrink texts, and an unknown token may stand for any number of bytes.
    ///
    /// # Errors
    /// `TooManyTokens`: the text has more than `most` tokens. This is detected before all of it is encoded; a text
    /// that is only slightly longer is encoded nevertheless. Those of [`encode`](Self::encode).
    pub fn encode_within(&self, text: &str, most: usize) -> Result<Vec<u32>, FormatError> {
        let enough = most.saturating_add(CUT);
        let mut end = enough.saturating_mul(BYTES_PER_TOKEN);
        loop {
            let beginning = &text[..text.floor_char_boundary(end)];
            let ids = self.encode(beginning)?;
            if beginning.len() == text.len() {
                return Ok(ids);
            }
            if ids.len() > enough {
                return Err(FormatError::TooManyTokens { most });
            }
            end = end.saturating_mul(2);
        }
    }

    /// Decodes ids to text. Special tokens and unknown ids are skipped; invalid UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        match &self.kind {
            Kind::Byte => {
                let bytes: Vec<u8> = ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            Kind::Char(characters) => ids.iter().filter_map(|&id| characters.get(id as usize)).collect(),
            // Only a decoder that fails for every text fails here. A sample without text is better than a stopped
            // program.
            Kind::Hf(tokenizer) => {
                tokenizer_limit::catch_panic(|| tokenizer.decode(ids, true)).unwrap_or_default()
            }
        }
    }

    /// A decoder for ids that are generated one by one.
    pub fn decoder(&self) -> Decoder<'_> {
        Decoder { tokenizer: self, ids: Vec::new(), context: 0, known: String::new() }
    }

    /// Splits a long text into pieces that can be encoded, or used for training a tokenizer, one by one.
    pub fn pieces(text: &str) -> impl Iterator<Item = &str> {
        pieces(text)
    }

    /// Id of a special token, such as `<|user|>`.
    pub fn special(&self, text: &str) -> Option<u32> {
        self.specials.get(text).copied()
    }

    /// All special tokens with their ids.
    pub fn specials(&self) -> impl Iterator<Item = (&str, u32)> {
        self.specials.iter().map(|(text, &id)| (text.as_str(), id))
    }

    /// Begin and end tokens of texts.
    pub fn ends(&self) -> Ends {
        self.ends
    }

    /// Number of ids, including special tokens.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    pub(crate) fn kind(&self) -> &Kind {
        &self.kind
    }

    /// The content of the file that [`save`](Self::save) writes. For BPE, it is a Hugging Face `tokenizer.json`.
    pub fn to_json(&self) -> String {
        let saved = match &self.kind {
            Kind::Byte => TokenizerFile::Byte,
            Kind::Char(characters) => TokenizerFile::Char { characters: characters.iter().collect() },
            Kind::Hf(tokenizer) => return tokenizer.to_string(false).expect("a tokenizer is JSON"),
        };
        serde_json::to_string(&saved).expect("strings are JSON")
    }

    /// Writes the tokenizer to `path` atomically, replacing an existing file.
    ///
    /// # Errors
    /// `Io`: no permission, or no space.
    pub fn save(&self, path: &Path) -> Result<(), FormatError> {
        disk::atomic_write(path, |file| {
            file.write_all(self.to_json().as_bytes()).map_err(FormatError::io(path))
        })
    }

    /// Reads a Hugging Face `tokenizer.json`, or a file that [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// `Io`: missing, or no permission. `Tokenizer`: not JSON, or not a supported tokenizer.
    pub fn load(path: &Path) -> Result<Self, FormatError> {
        let json = disk::read(path).map_err(FormatError::io(path))?;
        Self::from_json(&json).map_err(|error| error.in_file(path))
    }

    /// Parses the content of such a file.
    ///
    /// # Errors
    /// `Tokenizer`: not JSON, or not a supported tokenizer.
    pub fn from_json(json: &[u8]) -> Result<Self, FormatError> {
        let failed = |what: &str, error: &dyn std::fmt::Display| FormatError::Tokenizer {
            why: format!("{what} ({error})"),
        };
        let value: serde_json::Value =
            serde_json::from_slice(json).map_err(|error| failed("not valid JSON", &error))?;
        if value.get("type").is_none() {
            tokenizer_limit::check_limits(&value)?;
            let tokenizer = tokenizer_limit::catch_panic(|| tokenizers::Tokenizer::from_bytes(json));
            return Self::from_hf(tokenizer.map_err(|error| failed("unexpected JSON", &error))?);
        }
        match serde_json::from_value(value).map_err(|error| failed("unexpected JSON", &error))? {
            TokenizerFile::Byte => Ok(Self::byte()),
            TokenizerFile::Char { characters } => Self::from_characters(characters.chars().collect()),
        }
    }
}

/// Decodes ids one by one, as they are generated.
///
/// It never returns a part of a character. For ids that form text, the concatenated pieces equal
/// [`Tokenizer::decode`] of all ids.
#[derive(Clone, Debug)]
pub struct Decoder<'a> {
    tokenizer: &'a Tokenizer,
    /// The ids of the last returned piece, then the pending ids.
    ids: Vec<u32>,
    /// Number of ids of the last piece. They are kept because some decoders depend on the token before.
    context: usize,
    /// Text of the ids of the last piece.
    known: String,
}

impl Decoder<'_> {
    /// Adds an id and returns the text that it completes; empty while a character is incomplete.
    pub fn push(&mut self, id: u32) -> String {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids);
        let pending = self.ids.len() - self.context;
        if pending < MAX_PENDING
            && (text.ends_with(char::REPLACEMENT_CHARACTER) || text.len() <= self.known.len())
        {
            return String::new();
        }
        let new = text.strip_prefix(&self.known).unwrap_or_default().to_string();
        self.ids.drain(..self.context);
        self.context = self.ids.len();
        self.known = self.tokenizer.decode(&self.ids);
        new
    }

    /// Returns the text of the pending ids, after the last id.
    pub fn finish(self) -> String {
        let text = self.tokenizer.decode(&self.ids);
        text.strip_prefix(&self.known).unwrap_or_default().to_string()
    }
}

/// Splits a long text before white space that follows a letter or digit. The pre-tokenizers in use split there as well, so
/// the ids are those of the whole text.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest.take()?;
        let from = text.floor_char_boundary(PIECE_BYTES);
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
