//! Tokenizers, to and from the metadata keys of llama.cpp.
//!
//! | tokenizer | `tokenizer.ggml.model` | merges |
//! |---|---|---|
//! | byte-level BPE, as GPT-2 has it | `gpt2` | `tokenizer.ggml.merges`, in order |
//! | BPE with byte fallback (SentencePiece) | `llama` | implied by `tokenizer.ggml.scores`: the pair whose token has the highest score is joined first |
//! | bytes or characters, of this project | `gpt2` | those that join the bytes of a character |
//!
//! llama.cpp does not store pre-tokenizers, but a name per set of regular expressions (`tokenizer.ggml.pre`). A
//! `tokenizer.json` whose pre-tokenizer has no such name cannot be written.
//!
//! In addition, the writer stores the whole `tokenizer.json` in a key that llama.cpp ignores, so that this crate
//! restores it exactly. For files of other programs, the reader reconstructs a `tokenizer.json` from the keys.
//!
//! # Source
//! `llama-vocab.cpp` of llama.cpp: `llama_vocab::impl::load` and the regular expressions of `llm_tokenizer_bpe`.

mod read;
mod write;

pub(super) use read::read;
pub(super) use write::metadata;

use serde_json::{Value as Json, json};

/// A whole `tokenizer.json`. llama.cpp ignores the key.
const HF_JSON: &str = "tokenizer.huggingface.json";
/// A byte or character tokenizer of this project. llama.cpp ignores the key.
const OWN_JSON: &str = "burn_ternary.tokenizer.json";

// Token types, LLAMA_TOKEN_TYPE_*.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Regular expressions of llama.cpp for the names `llama-bpe` and `qwen2`.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Supported pre-tokenizers: their names in files (the first is written), and their JSON in a `tokenizer.json`.
fn pre_tokenizers() -> [(&'static [&'static str], Json); 4] {
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let sequence = |first: Json, then: Json| json!({"type": "Sequence", "pretokenizers": [first, then]});
    let split = |regex: &str| {
        let split =
            json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        sequence(split, bytes(false))
    };
    [
        (&["gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "olmo"], bytes(true)),
        (
            &["smollm", "starcoder", "refact", "command-r"],
            sequence(json!({"type": "Digits", "individual_digits": true}), bytes(true)),
        ),
        (&["llama-bpe", "llama3", "llama-v3"], split(LLAMA3)),
        (&["qwen2", "deepseek-r1-qwen", "stablelm2"], split(QWEN2)),
    ]
}

/// The character by which byte-level BPE writes a byte: printable bytes as they are, the others from U+0100 on.
fn byte_character(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return byte.into();
    }
    let place = (0..byte).filter(|&other| !printable(other)).count() as u32;
    char::from_u32(256 + place).expect("68 characters follow U+0100")
}

/// The normalizer of SentencePiece: it writes spaces as `▁`, and may put one before the text.
fn sentence_piece_normalizer(add_prefix: bool) -> Json {
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    if !add_prefix {
        return spaces;
    }
    json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_written_as_in_gpt2() {
        let expected = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let ours: std::collections::BTreeSet<char> = (0..=255).map(byte_character).collect();
        assert_eq!(ours.len(), 256);
        assert!(ours.iter().all(|c| expected.contains(c)));
        assert_eq!((byte_character(b' '), byte_character(b'\n'), byte_character(0xad)), ('Ġ', 'Ċ', 'Ń'));
    }
}
