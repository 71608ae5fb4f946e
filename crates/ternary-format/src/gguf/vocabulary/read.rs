//! From metadata keys to a [`Tokenizer`].

use super::{
    super::container::{Container, Value, unexpected},
    CONTROL, HF_JSON, NORMAL, OWN_JSON, UNKNOWN, USER_DEFINED, pre_tokenizers, sentence_piece_normalizer,
};
use crate::{FormatError, Tokenizer, tokenizer::Ends};
use serde_json::{Value as Json, json};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Tokens of more bytes have no merges: finding the pairs of a token takes the square of its length.
const MAX_MERGED_BYTES: usize = 256;

/// The tokenizer of a file, for an embedding of `rows` rows; `None` if the file has none.
///
/// # Errors
/// `Vocabulary`, `DuplicateToken`, `Value`, `Tokenizer`: it does not fit the model, or is not supported.
pub(in crate::gguf) fn read(container: &Container, rows: usize) -> Result<Option<Tokenizer>, FormatError> {
    let keys = Metadata(&container.metadata);
    let Some(model) = keys.text("tokenizer.ggml.model")? else { return Ok(None) };
    if model == "no_vocab" || model == "none" {
        return Ok(None);
    }
    let tokens = keys.texts("tokenizer.ggml.tokens")?;
    if tokens.len() != rows {
        return Err(FormatError::Vocabulary { tokens: tokens.len(), rows });
    }
    let mut seen = BTreeSet::new();
    if let Some(token) = tokens.iter().find(|token| !token.is_empty() && !seen.insert(token.as_str())) {
        return Err(FormatError::DuplicateToken { token: token.clone() });
    }
    let spm = model == "llama";
    let pre = keys.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let (first, last) = if spm { (Some(1), Some(2)) } else { (None, None) };
    let ends = Ends {
        bos: keys.id("tokenizer.ggml.bos_token_id", rows)?.or(first),
        eos: keys.id("tokenizer.ggml.eos_token_id", rows)?.or(last),
        add_bos: keys.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(spm || pre == "llama-bpe"),
    };
    let tokenizer = if let Some(json) = [HF_JSON, OWN_JSON].iter().find_map(|key| keys.text(key).transpose())
    {
        let tokenizer = Tokenizer::from_json(json?.as_bytes())?;
        if tokenizer.vocab_size() > rows {
            return Err(FormatError::Vocabulary { tokens: tokenizer.vocab_size(), rows });
        }
        tokenizer
    } else {
        let types = keys.numbers("tokenizer.ggml.token_type", rows)?;
        let vocabulary = Vocabulary::new(
            tokens,
            types.map_or(vec![NORMAL; rows], |types| types.into_iter().map(|kind| kind as i32).collect()),
        );
        let json = match model {
            "gpt2" => vocabulary.byte_level(&keys, pre)?,
            "llama" => vocabulary.sentence_piece(&keys)?,
            found => {
                let (key, expected) = ("tokenizer.ggml.model".into(), "`gpt2` or `llama`".into());
                return Err(FormatError::Value { key, expected, found: format!("`{found}`") });
            }
        };
        Tokenizer::from_json(json.to_string().as_bytes())?
    };
    Ok(Some(tokenizer.with_ends(ends)))
}

/// Tokens by id, and their types.
struct Vocabulary {
    tokens: Vec<String>,
    types: Vec<i32>,
}

impl Vocabulary {
    fn new(tokens: &[String], types: Vec<i32>) -> Self {
        let name = |(id, token): (usize, &String)| {
            if token.is_empty() { format!("[EMPTY_{id}]") } else { token.clone() }
        };
        Self { tokens: tokens.iter().enumerate().map(name).collect(), types }
    }

    fn added_tokens(&self) -> Json {
        let tokens = self.tokens.iter().zip(&self.types).enumerate();
        let added = tokens.filter(|(_, (_, kind))| matches!(**kind, CONTROL | UNKNOWN | USER_DEFINED));
        let token = |(id, (token, &kind)): (usize, (&String, &i32))| {
            json!({
                "id": id, "content": token, "special": kind != USER_DEFINED, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false,
            })
        };
        added.map(token).collect()
    }

    fn ids(&self) -> serde_json::Map<String, Json> {
        self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect()
    }

    /// A `tokenizer.json` of byte-level BPE.
    fn byte_level(&self, keys: &Metadata, pre: &str) -> Result<Json, FormatError> {
        let known = pre_tokenizers().into_iter().find(|(names, _)| names.contains(&pre));
        let (names, pre_tokenizer) = known.ok_or_else(|| FormatError::Value {
            key: "tokenizer.ggml.pre".into(),
            expected: "a supported pre-tokenizer, such as `gpt-2`, `llama-bpe` or `qwen2`".into(),
            found: format!("`{pre}`"),
        })?;
        let merges: Vec<Json> = keys
            .texts("tokenizer.ggml.merges")?
            .iter()
            .map(|merge| {
                // Not the first character, since a token may be a space itself.
                let space = merge.char_indices().skip(1).find(|&(_, c)| c == ' ').map(|(i, _)| i);
                let (left, right) = space.map_or((merge.as_str(), ""), |i| (&merge[..i], &merge[i + 1..]));
                json!([left, right])
            })
            .collect();
        let bytes =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": self.added_tokens(), "pre_tokenizer": pre_tokenizer, "decoder": bytes,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": names[0] == "llama-bpe", "vocab": self.ids(), "merges": merges,
            },
        }))
    }

    /// A `tokenizer.json` of BPE with byte fallback. Its merges are all pairs of tokens that form a token, ordered by
    /// the score of the result.
    fn sentence_piece(&self, keys: &Metadata) -> Result<Json, FormatError> {
        let scores = keys.numbers("tokenizer.ggml.scores", self.tokens.len())?;
        let scores = scores.ok_or_else(|| FormatError::MissingKey { key: "tokenizer.ggml.scores".into() })?;
        let normal = self.tokens.iter().enumerate().filter(|&(id, _)| self.types[id] == NORMAL);
        let ids: HashMap<&str, usize> = normal.map(|(id, token)| (token.as_str(), id)).collect();
        let mut order: Vec<usize> = ids.values().copied().collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        let mut merges = Vec::new();
        for id in order {
            let token = &self.tokens[id];
            if token.len() > MAX_MERGED_BYTES {
                continue;
            }
            let cuts = token.char_indices().skip(1).map(|(i, _)| token.split_at(i));
            let mut pairs: Vec<_> =
                cuts.filter_map(|(left, right)| Some((*ids.get(left)?, *ids.get(right)?))).collect();
            pairs.sort_unstable();
            merges.extend(pairs.into_iter().map(|(l, r)| json!([self.tokens[l], self.tokens[r]])));
        }
        let unknown = keys.id("tokenizer.ggml.unknown_token_id", self.tokens.len())?.unwrap_or(0) as usize;
        let add_prefix = keys.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let spaces = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let mut decoders = vec![spaces, json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
        if add_prefix {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "pre_tokenizer": null, "post_processor": null,
            "added_tokens": self.added_tokens(), "normalizer": sentence_piece_normalizer(add_prefix),
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": self.tokens.get(unknown),
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
                "byte_fallback": true, "ignore_merges": false, "vocab": self.ids(), "merges": merges,
            },
        }))
    }
}

/// The metadata of a file. A value of another type is an error.
struct Metadata<'a>(&'a BTreeMap<String, Value>);

impl<'a> Metadata<'a> {
    /// Applies `get` to a value; `None` if the key is missing.
    fn get<T>(
        &self,
        key: &str,
        expected: &str,
        get: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, FormatError> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        get(value).map(Some).ok_or_else(|| unexpected(key, expected, value))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, FormatError> {
        self.get(key, "a string", Value::as_text)
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, FormatError> {
        self.get(key, "true or false", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    fn texts(&self, key: &str) -> Result<&'a [String], FormatError> {
        let texts = self.get(key, "an array of strings", |value| match value {
            Value::Texts(texts) => Some(texts.as_slice()),
            _ => None,
        })?;
        texts.ok_or_else(|| FormatError::MissingKey { key: key.into() })
    }

    /// A token id.
    fn id(&self, key: &str, rows: usize) -> Result<Option<u32>, FormatError> {
        self.get(key, &format!("a token id below {rows}"), |value| {
            value.as_size().filter(|&id| id < rows).map(|id| id as u32)
        })
    }

    /// One number per token.
    fn numbers(&self, key: &str, tokens: usize) -> Result<Option<Vec<f64>>, FormatError> {
        self.get(key, &format!("an array of {tokens} numbers"), |value| {
            let numbers: Vec<f64> = value.items()?.filter_map(|item| item.as_f64()).collect();
            (numbers.len() == tokens).then_some(numbers)
        })
    }
}
