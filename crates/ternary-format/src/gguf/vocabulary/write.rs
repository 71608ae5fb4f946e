//! From a [`Tokenizer`] to metadata keys.

use super::{
    super::container::Value, BYTE, CONTROL, HF_JSON, NORMAL, OWN_JSON, UNKNOWN, UNUSED, USER_DEFINED,
    byte_character, pre_tokenizers, sentence_piece_normalizer,
};
use crate::{
    FormatError, Tokenizer,
    tokenizer::{Ends, Kind},
};
use serde_json::Value as Json;
use std::collections::{BTreeSet, HashMap};

/// Tokens by id, and their types.
struct Vocabulary {
    tokens: Vec<String>,
    types: Vec<i32>,
}

impl Vocabulary {
    /// Adds unused tokens up to the rows of the embedding. Their names are new, since readers refuse duplicate
    /// tokens.
    fn pad(&mut self, rows: usize) {
        let known: BTreeSet<&String> = self.tokens.iter().collect();
        let free = (0..).map(|i| format!("[PAD{i}]")).filter(|name| !known.contains(name));
        let padding: Vec<String> = free.take(rows.saturating_sub(self.tokens.len())).collect();
        self.tokens.extend(padding);
        self.types.resize(self.tokens.len(), UNUSED);
    }
}

/// Keys of a tokenizer, for an embedding of `rows` rows.
///
/// # Errors
/// `Vocabulary`: more tokens than rows. `NotInGguf`: llama.cpp does not support the tokenizer.
pub(in crate::gguf) fn metadata(
    tokenizer: &Tokenizer,
    rows: usize,
) -> Result<Vec<(String, Value)>, FormatError> {
    if tokenizer.vocab_size() > rows {
        return Err(FormatError::Vocabulary { tokens: tokenizer.vocab_size(), rows });
    }
    let json = tokenizer.to_json();
    let (mut vocabulary, mut keys) = match tokenizer.kind() {
        Kind::Byte => {
            let tokens = (0..=255).map(|byte| byte_character(byte).to_string()).collect();
            own(tokenizer, tokens, Vec::new(), json)
        }
        Kind::Char(characters) => {
            let spelt: Vec<String> = characters.iter().map(|c| byte_level(*c)).collect();
            // A character of several bytes is joined byte by byte. No other merge can begin with its first byte.
            let merges = spelt.iter().flat_map(|token| {
                let ends: Vec<usize> = token.char_indices().map(|(i, _)| i).skip(1).collect();
                ends.into_iter().map(|i| {
                    let end = i + token[i..].chars().next().map_or(0, char::len_utf8);
                    format!("{} {}", &token[..i], &token[i..end])
                })
            });
            let merges: BTreeSet<String> = merges.collect();
            own(tokenizer, spelt, merges.into_iter().collect(), json)
        }
        Kind::Hf(_) => hugging_face(&json, tokenizer.vocab_size())?,
    };
    vocabulary.pad(rows);
    let Ends { bos, eos, add_bos } = tokenizer.ends();
    keys.extend([
        ("tokenizer.ggml.tokens".to_string(), Value::Texts(vocabulary.tokens)),
        ("tokenizer.ggml.token_type".into(), Value::i32s(vocabulary.types)),
        ("tokenizer.ggml.add_bos_token".into(), Value::Bool(add_bos)),
        ("tokenizer.ggml.add_eos_token".into(), Value::Bool(false)),
    ]);
    for (key, id) in [("bos", bos), ("eos", eos)] {
        keys.extend(id.map(|id| (format!("tokenizer.ggml.{key}_token_id"), Value::U32(id))));
    }
    Ok(keys)
}

/// Keys of a byte or character tokenizer.
fn own(
    tokenizer: &Tokenizer,
    mut tokens: Vec<String>,
    merges: Vec<String>,
    json: String,
) -> (Vocabulary, Vec<(String, Value)>) {
    let mut types = vec![NORMAL; tokens.len()];
    let mut specials: Vec<_> = tokenizer.specials().collect();
    specials.sort_by_key(|&(_, id)| id);
    tokens.extend(specials.iter().map(|(text, _)| text.to_string()));
    types.resize(tokens.len(), CONTROL);
    let mut keys = model_keys("gpt2", "gpt-2");
    keys.push(("tokenizer.ggml.merges".into(), Value::Texts(merges)));
    keys.push((OWN_JSON.into(), Value::Text(json)));
    (Vocabulary { tokens, types }, keys)
}

fn model_keys(model: &str, pre: &str) -> Vec<(String, Value)> {
    vec![
        ("tokenizer.ggml.model".into(), Value::Text(model.into())),
        ("tokenizer.ggml.pre".into(), Value::Text(pre.into())),
    ]
}

/// The error for a tokenizer that GGUF's keys cannot describe.
fn not_in_gguf(what: String) -> FormatError {
    let why = "llama.cpp would split text differently: train with tokenizer \"bpe\" or \"byte\"";
    FormatError::NotInGguf { what, why: why.into() }
}

/// Vocabulary and keys of a `tokenizer.json`.
fn hugging_face(text: &str, size: usize) -> Result<(Vocabulary, Vec<(String, Value)>), FormatError> {
    let json: Json =
        serde_json::from_str(text).map_err(|error| FormatError::Tokenizer { why: error.to_string() })?;
    let model = &json["model"];
    if model["type"] != "BPE" {
        return Err(not_in_gguf(format!("a tokenizer of type {}", model["type"])));
    }
    let vocabulary = hugging_face_vocabulary(&json, size);
    let pairs = model["merges"].as_array().into_iter().flatten().map(|merge| match merge {
        Json::String(merge) => merge.clone(),
        pair => format!("{} {}", pair[0].as_str().unwrap_or_default(), pair[1].as_str().unwrap_or_default()),
    });
    let mut keys = match model["byte_fallback"] == true {
        true => sentence_piece_keys(&json, &vocabulary, pairs)?,
        false => byte_level_keys(&json, pairs)?,
    };
    keys.push((HF_JSON.into(), Value::Text(text.into())));
    Ok((vocabulary, keys))
}

/// Tokens and their types, in the order of their ids.
fn hugging_face_vocabulary(json: &Json, size: usize) -> Vocabulary {
    let model = &json["model"];
    let mut vocabulary = Vocabulary { tokens: vec![String::new(); size], types: vec![UNUSED; size] };
    let mut put = |token: &str, id: Option<u64>, kind: i32| {
        let id = id.and_then(|id| usize::try_from(id).ok()).filter(|&id| id < size);
        if let Some(id) = id {
            vocabulary.tokens[id] = token.into();
            vocabulary.types[id] = kind;
        }
    };
    let fallback = model["byte_fallback"] == true;
    for (token, id) in model["vocab"].as_object().into_iter().flatten() {
        let byte = fallback && is_byte_token(token);
        put(token, id.as_u64(), if byte { BYTE } else { NORMAL });
    }
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let kind = if token["special"] == true { CONTROL } else { USER_DEFINED };
        let content = token["content"].as_str().unwrap_or_default();
        put(
            content,
            token["id"].as_u64(),
            if fallback && *content == model["unk_token"] { UNKNOWN } else { kind },
        );
    }
    for (id, token) in vocabulary.tokens.iter_mut().enumerate().filter(|(_, token)| token.is_empty()) {
        *token = format!("[UNUSED{id}]");
    }
    vocabulary
}

/// Keys of a SentencePiece tokenizer, which joins the pair whose token has the highest score. The score here is the negative rank of
/// its first merge.
fn sentence_piece_keys(
    json: &Json,
    vocabulary: &Vocabulary,
    pairs: impl Iterator<Item = String>,
) -> Result<Vec<(String, Value)>, FormatError> {
    let known = |add_prefix| json["normalizer"] == sentence_piece_normalizer(add_prefix);
    let add_prefix = known(true);
    if !json["pre_tokenizer"].is_null() || !(add_prefix || known(false)) {
        return Err(not_in_gguf("a normalizer or pre-tokenizer that SentencePiece does not have".into()));
    }
    let mut scores = vec![-1e6f32; vocabulary.tokens.len()];
    let ids: HashMap<&str, usize> =
        vocabulary.tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
    for (rank, pair) in pairs.enumerate() {
        if let Some(&id) = ids.get(pair.replacen(' ', "", 1).as_str()) {
            scores[id] = scores[id].max(-(rank as f32));
        }
    }
    let mut keys = model_keys("llama", "default");
    keys.push(("tokenizer.ggml.scores".into(), Value::f32s(scores)));
    keys.push(("tokenizer.ggml.add_space_prefix".into(), Value::Bool(add_prefix)));
    Ok(keys)
}

/// Keys of a byte-level BPE tokenizer, whose pre-tokenizer llama.cpp must have by name.
fn byte_level_keys(
    json: &Json,
    pairs: impl Iterator<Item = String>,
) -> Result<Vec<(String, Value)>, FormatError> {
    let (normalizer, pre_tokenizer) = (&json["normalizer"], &json["pre_tokenizer"]);
    let known = pre_tokenizers().into_iter().find(|known| known.1 == *pre_tokenizer);
    let Some((names, _)) = known.filter(|_| normalizer.is_null()) else {
        return Err(not_in_gguf(format!("normalizer {normalizer}, pre-tokenizer {pre_tokenizer}")));
    };
    let mut keys = model_keys("gpt2", names[0]);
    keys.push(("tokenizer.ggml.merges".into(), Value::Texts(pairs.collect())));
    Ok(keys)
}

/// A character in the notation of byte-level BPE.
fn byte_level(character: char) -> String {
    character.encode_utf8(&mut [0; 4]).bytes().map(byte_character).collect()
}

/// Returns whether the token is one of `<0x00>` to `<0xFF>`.
fn is_byte_token(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}
