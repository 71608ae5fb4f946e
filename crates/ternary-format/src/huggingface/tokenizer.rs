//! Tokenizers of folders: `tokenizer.json`, and the begin and end tokens in the files next to it.

use crate::{FormatError, Tokenizer, tokenizer::Kind};
use serde_json::{Map, Value, json};

/// The `tokenizer.json` of a tokenizer. Byte and character tokenizers become BPE without merges.
pub(super) fn to_json(tokenizer: &Tokenizer) -> Value {
    let (vocab, byte_fallback): (Map<_, _>, _) = match tokenizer.kind() {
        Kind::Hf(_) => return serde_json::from_str(&tokenizer.to_json()).expect("a tokenizer is JSON"),
        Kind::Byte => ((0..256).map(|byte| (format!("<0x{byte:02X}>"), byte.into())).collect(), true),
        Kind::Char(characters) => {
            let numbered = characters.iter().enumerate();
            (numbered.map(|(id, character)| (character.to_string(), id.into())).collect(), false)
        }
    };
    let mut specials: Vec<(&str, u32)> = tokenizer.specials().collect();
    specials.sort_by_key(|(_, id)| *id);
    let added = specials.into_iter().map(|(content, id)| {
        json!({
            "id": id, "content": content, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        })
    });
    json!({
        "version": "1.0",
        "added_tokens": added.collect::<Vec<_>>(),
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": byte_fallback,
            "fuse_unk": false, "ignore_merges": false,
        },
    })
}

/// The `tokenizer_config.json` of a model.
pub(super) fn config(tokenizer: &Tokenizer, context: usize, chat_template: Option<&str>) -> Value {
    let text =
        |id: Option<u32>| tokenizer.specials().find(|special| Some(special.1) == id).map(|special| special.0);
    let ends = tokenizer.ends();
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": false,
    });
    for (key, value) in
        [("bos_token", text(ends.bos)), ("eos_token", text(ends.eos)), ("chat_template", chat_template)]
    {
        if let Some(value) = value {
            config[key] = value.into();
        }
    }
    config
}

/// Writes the ids of the begin and end tokens to a configuration.
pub(super) fn set_ends(tokenizer: &Tokenizer, config: &mut Value) {
    let ends = tokenizer.ends();
    for (key, id) in [("bos_token_id", ends.bos), ("eos_token_id", ends.eos)] {
        config[key] = id.map_or(Value::Null, Value::from);
    }
}

/// A tokenizer with the begin and end tokens of `configs`; the first configuration that sets a token decides.
///
/// # Errors
/// `Tokenizer`: the JSON is not a supported tokenizer.
pub(super) fn from_json(json: &[u8], configs: &[Value]) -> Result<Tokenizer, FormatError> {
    let tokenizer = Tokenizer::from_json(json)?;
    let id = |key: &str| {
        let mut ids = configs.iter().map(|config| &config[key]).filter(|id| !id.is_null());
        // A model may have several end tokens. The first is the usual one.
        let id = ids.next().and_then(|id| id.as_u64().or_else(|| id.get(0)?.as_u64()))?;
        u32::try_from(id).ok().filter(|&id| (id as usize) < tokenizer.vocab_size())
    };
    let mut ends = tokenizer.ends();
    ends.bos = id("bos_token_id").or(ends.bos);
    ends.eos = id("eos_token_id").or(ends.eos);
    Ok(tokenizer.with_ends(ends))
}
