//! [`Tokenizer`]: text to ids and back: bytes, characters, or what a Hugging Face `tokenizer.json` says.

use crate::{FormatError, disk, guard, spec::LARGEST_SIZE};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, io::Write, path::Path};
use tokenizers::AddedToken;

/// Longer texts are encoded in pieces of about this many bytes: in parallel, and in bounded memory.
const PIECE: usize = 1 << 18;

/// More tokens than cutting a text adds: it changes the tokens beside the cut only.
pub(crate) const CUT: usize = 1024;

/// Bytes of a text for each token that it may have: more than ordinary text has.
const BYTES_PER_TOKEN: usize = 8;

/// More ids than this without a character of text, and what there is of them is given out as it is.
const PENDING: usize = 16;

/// A token of our own models that stands for structure and never comes out of plain text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    EndOfText,
    User,
    Assistant,
}

impl Special {
    /// Every special token; `ALL[s as usize] == s`.
    pub const ALL: [Self; 3] = [Self::EndOfText, Self::User, Self::Assistant];

    /// How the token is written in a `tokenizer.json` and in chat templates.
    pub const fn text(self) -> &'static str {
        match self {
            Self::EndOfText => "<|endoftext|>",
            Self::User => "<|user|>",
            Self::Assistant => "<|assistant|>",
        }
    }
}

/// Turns text into ids and back.
///
/// Plain text never becomes a special token: `<|user|>` typed by a user is encoded as the eight characters it is.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    kind: Kind,
    specials: BTreeMap<String, u32>,
    vocab_size: usize,
    ends: Ends,
}

#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// Id = byte.
    Byte,
    /// Id = place in this sorted list.
    Char(Vec<char>),
    Hf(Box<tokenizers::Tokenizer>),
}

/// How texts begin and end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    /// The token before a text.
    pub bos: Option<u32>,
    /// The token after a text, at which generation stops.
    pub eos: Option<u32>,
    /// Whether a prompt begins with `bos`.
    pub add_bos: bool,
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

    /// Characters, then the special tokens.
    ///
    /// # Errors
    /// `Tokenizer`: characters that are not in the order of their code points, or there twice.
    pub fn from_characters(characters: Vec<char>) -> Result<Self, FormatError> {
        if !characters.is_sorted_by(|a, b| a < b) {
            return Err(FormatError::Tokenizer { why: "characters that are not in order".into() });
        }
        let known = characters.len();
        Ok(Self::after(Kind::Char(characters), known))
    }

    /// The special tokens follow the `known` ids of `kind`.
    fn after(kind: Kind, known: usize) -> Self {
        let specials = Special::ALL.map(|s| (s.text().to_string(), (known + s as usize) as u32));
        let end = Some((known + Special::EndOfText as usize) as u32);
        let ends = Ends { bos: end, eos: end, add_bos: false };
        Self { kind, specials: specials.into(), vocab_size: known + Special::ALL.len(), ends }
    }

    /// What a `tokenizer.json` describes, without its truncation and padding.
    ///
    /// # Errors
    /// `Tokenizer`: it cannot be used.
    pub fn from_hf(tokenizer: tokenizers::Tokenizer) -> Result<Self, FormatError> {
        guard::run(|| Self::without_limits(tokenizer)).map_err(|why| FormatError::Tokenizer { why })
    }

    fn without_limits(mut tokenizer: tokenizers::Tokenizer) -> tokenizers::Result<Self> {
        tokenizer.with_truncation(None)?;
        tokenizer.with_padding(None);
        tokenizer.set_encode_special_tokens(true);
        let vocab = tokenizer.get_vocab(true);
        let vocab_size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        if vocab_size > LARGEST_SIZE {
            return Err(format!("an id of {}, expected below {LARGEST_SIZE}", vocab_size - 1).into());
        }
        let added = tokenizer.get_added_tokens_decoder();
        let specials: BTreeMap<String, u32> = added
            .into_iter()
            .filter(|(_, token)| token.special)
            .map(|(id, token)| (token.content, id))
            .collect();
        // What its post-processor writes before an empty text; most files say nothing of an end.
        let before = tokenizer.encode_fast("", true)?.get_ids().first().copied();
        let find = |names: &[&str]| names.iter().find_map(|&name| specials.get(name).copied());
        let eos = find(&[Special::EndOfText.text(), "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "</s>"]);
        let bos = before.or_else(|| find(&["<s>", "<|begin_of_text|>", Special::EndOfText.text()]));
        let ends = Ends { bos, eos, add_bos: before.is_some() };
        Ok(Self { kind: Kind::Hf(Box::new(tokenizer)), specials, vocab_size, ends })
    }

    /// Adds the special tokens of our own models where they are missing; texts then end with `<|endoftext|>`.
    ///
    /// # Errors
    /// `Tokenizer`: ids with holes, which would cost rows of an embedding, or two tokens for an id.
    pub fn with_specials(self) -> Result<Self, FormatError> {
        let Kind::Hf(mut tokenizer) = self.kind else { return Ok(self) };
        let new = guard::run(|| {
            tokenizer.add_special_tokens(&Special::ALL.map(|s| AddedToken::from(s.text(), true)));
            Self::without_limits(*tokenizer)
        });
        let mut new = new.map_err(|why| FormatError::Tokenizer { why })?;
        let Kind::Hf(tokenizer) = &new.kind else { unreachable!("from_hf makes no other") };
        let known = tokenizer.get_vocab_size(true);
        if known != new.vocab_size {
            let why = format!("{known} tokens with ids up to {}", new.vocab_size - 1);
            return Err(FormatError::Tokenizer { why });
        }
        let end = new.special(Special::EndOfText.text());
        new.ends = Ends { bos: end, eos: end, add_bos: false };
        Ok(new)
    }

    /// The same tokenizer with other ends, as the file of a model names them.
    pub fn with_ends(self, ends: Ends) -> Self {
        Self { ends, ..self }
    }

    /// The ids of plain text.
    ///
    /// # Errors
    /// `UnknownCharacter`: the char tokenizer has no id for a character. `Encode`: a `tokenizer.json` refused the text.
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
                    let encoding = guard::run(|| tokenizer.encode_fast(piece, false)).map_err(failed)?;
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

    /// The ids of plain text, in time and memory that are bounded by `most` tokens and not by the length of the text.
    ///
    /// A growing beginning of the text is encoded, until it is the whole text or has too many tokens. No bound on the
    /// bytes alone would do: normalizers shrink texts, and a token for what is unknown may stand for any number of bytes.
    ///
    /// # Errors
    /// `TooManyTokens`: it has more than `most`, which shows before all of it is encoded. A text that is not much longer
    /// is encoded nevertheless. Those of [`encode`](Self::encode).
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

    /// The text of `ids`: without special tokens and unknown ids, and with U+FFFD for bytes that are no UTF-8.
    pub fn decode(&self, ids: &[u32]) -> String {
        match &self.kind {
            Kind::Byte => {
                let bytes: Vec<u8> = ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            Kind::Char(characters) => ids.iter().filter_map(|&id| characters.get(id as usize)).collect(),
            // Only a decoder that is broken for every text fails here; a sample is no reason to stop.
            Kind::Hf(tokenizer) => guard::run(|| tokenizer.decode(ids, true)).unwrap_or_default(),
        }
    }

    /// Decodes ids one by one, as they are generated.
    pub fn decoder(&self) -> Decoder<'_> {
        Decoder { tokenizer: self, ids: Vec::new(), context: 0, known: String::new() }
    }

    /// A long text in pieces that can be encoded, or learned from, one by one.
    pub fn pieces(text: &str) -> impl Iterator<Item = &str> {
        pieces(text)
    }

    /// The id of a special token, `<|user|>` for example.
    pub fn special(&self, text: &str) -> Option<u32> {
        self.specials.get(text).copied()
    }

    /// All special tokens.
    pub fn specials(&self) -> impl Iterator<Item = (&str, u32)> {
        self.specials.iter().map(|(text, &id)| (text.as_str(), id))
    }

    /// How texts begin and end.
    pub fn ends(&self) -> Ends {
        self.ends
    }

    /// How many ids there are, special tokens included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    pub(crate) fn kind(&self) -> &Kind {
        &self.kind
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
    /// `Io`: no permission, no space.
    pub fn save(&self, path: &Path) -> Result<(), FormatError> {
        disk::replace(path, |file| file.write_all(self.to_json().as_bytes()).map_err(FormatError::io(path)))
    }

    /// Reads a Hugging Face `tokenizer.json`, or what [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// `Io`: missing, or no permission. `Tokenizer`: no JSON, or no tokenizer that can be used.
    pub fn load(path: &Path) -> Result<Self, FormatError> {
        let json = disk::read(path).map_err(FormatError::io(path))?;
        Self::from_json(&json).map_err(|error| error.in_file(path))
    }

    /// Reads the contents of such a file.
    ///
    /// # Errors
    /// `Tokenizer`: no JSON, or no tokenizer that can be used.
    pub fn from_json(json: &[u8]) -> Result<Self, FormatError> {
        let failed = |what: &str, error: &dyn std::fmt::Display| FormatError::Tokenizer {
            why: format!("{what} ({error})"),
        };
        let value: serde_json::Value =
            serde_json::from_slice(json).map_err(|error| failed("no JSON", &error))?;
        if value.get("type").is_none() {
            guard::check(&value)?;
            let tokenizer = guard::run(|| tokenizers::Tokenizer::from_bytes(json));
            return Self::from_hf(tokenizer.map_err(|error| failed("other JSON", &error))?);
        }
        match serde_json::from_value(value).map_err(|error| failed("other JSON", &error))? {
            Saved::Byte => Ok(Self::byte()),
            Saved::Char { characters } => Self::from_characters(characters.chars().collect()),
        }
    }
}

/// Text of ids that come one by one: never a part of a character, and put together what [`Tokenizer::decode`] says of
/// ids that are text.
#[derive(Clone, Debug)]
pub struct Decoder<'a> {
    tokenizer: &'a Tokenizer,
    /// The ids whose text was given out last, and those whose text is still to come.
    ids: Vec<u32>,
    /// How many of `ids` are the former: some decoders look at what is before.
    context: usize,
    /// The text of the former.
    known: String,
}

impl Decoder<'_> {
    /// The text that `id` completes; empty while a character is not complete.
    pub fn push(&mut self, id: u32) -> String {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids);
        let pending = self.ids.len() - self.context;
        if pending < PENDING
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

    /// What is left when no more ids come.
    pub fn finish(self) -> String {
        let text = self.tokenizer.decode(&self.ids);
        text.strip_prefix(&self.known).unwrap_or_default().to_string()
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
