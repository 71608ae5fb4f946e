//! Valid files, the seeds of the corpus.

use crate::small;
use std::{fs, path::Path};
use ternary_format::{Encoding, Family, Tokenizer, WeightType, WriteOptions, write_model};

const BPE: &str = r###"{
    "version": "1.0",
    "added_tokens": [{"id": 6, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
    "normalizer": null,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
    "post_processor": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
    "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
    "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": {"a": 0, "b": 1, "Ġ": 2, "h": 3, "ab": 4, "Ġab": 5}, "merges": [["a", "b"], ["Ġ", "ab"]]}
}"###;

const SENTENCE_PIECE: &str = r###"{
    "version": "1.0",
    "added_tokens": [
        {"id": 0, "content": "<unk>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
        {"id": 1, "content": "<s>", "single_word": false, "lstrip": true, "rstrip": false, "normalized": false, "special": true},
        {"id": 2, "content": "</s>", "single_word": true, "lstrip": false, "rstrip": true, "normalized": true, "special": true}
    ],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
    "pre_tokenizer": null,
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
    "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "▁": 4, "a": 5, "b": 6, "ab": 7}, "merges": ["a b"]}
}"###;

const WORD_PIECE: &str = r###"{
    "version": "1.0",
    "added_tokens": [{"id": 0, "content": "[UNK]", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
    "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": {"type": "BertProcessing", "sep": ["b", 2], "cls": ["a", 1]},
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
    "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "a": 1, "b": 2, "##b": 3}}
}"###;

const UNIGRAM: &str = r###"{
    "version": "1.0",
    "added_tokens": [],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Strip", "strip_left": true, "strip_right": true}]},
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
    "post_processor": null,
    "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
    "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁", -1.0], ["a", -2.0], ["b", -2.5], ["▁ab", -1.5]], "byte_fallback": false}
}"###;

/// Number of seeds that every target has.
pub const SEEDS: usize = 4;

/// The contents of `tokenizer.json`s of each model type.
pub fn tokenizers() -> [&'static str; SEEDS] {
    [BPE, SENTENCE_PIECE, WORD_PIECE, UNIGRAM]
}

fn tokenizer(json: &str) -> Tokenizer {
    Tokenizer::from_json(json.as_bytes()).expect("a sound tokenizer")
}

fn write(model: &ternary_format::PackedModel, path: &Path, weights: WeightType) {
    let options = WriteOptions::default().with_weights(Some(weights));
    write_model(model, path, &options).expect("a sound model");
}

/// GGUF files of each family, in several encodings and with several tokenizers.
pub fn files() -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("seed.gguf");
    let character = || {
        Tokenizer::from_characters(
            "ab é".chars().collect::<std::collections::BTreeSet<_>>().into_iter().collect(),
        )
    };
    let models = [
        (small(Family::Gpt2, 4, tokenizer(BPE)), Encoding::F16),
        (small(Family::Llama, 64, tokenizer(SENTENCE_PIECE)), Encoding::Q2_0),
        (small(Family::Llama, 32, character().expect("characters in order")), Encoding::Q8_0),
        (small(Family::Bitnet, 256, tokenizer(BPE)), Encoding::Tq1_0),
        (small(Family::Bitnet, 256, tokenizer(BPE)), Encoding::Tq2_0),
    ];
    let mut files = Vec::new();
    for (model, encoding) in models {
        write(&model, &path, WeightType::Encoded(encoding));
        let file = fs::read(&path).expect("the file that was written");
        // The same without our own keys, as other programs write it; the tokenizer is read from llama.cpp's keys.
        let mut stock = crate::container::Sections::parse(&file);
        stock.keys.retain(|key| !key.0.ends_with(b"json"));
        files.extend([stock.bytes(), file]);
    }
    files
}

/// Archives of each family, in several encodings and with several tokenizers.
pub fn archives() -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("seed.ternary");
    let models = [
        (small(Family::Gpt2, 4, tokenizer(BPE)), Encoding::F16),
        (small(Family::Llama, 32, tokenizer(UNIGRAM)), Encoding::Q4_0),
        (small(Family::Llama, 64, tokenizer(SENTENCE_PIECE)), Encoding::Ternary { group: 16 }),
        (small(Family::Bitnet, 256, Tokenizer::byte()), Encoding::Tq1_0),
    ];
    let written = models.into_iter().map(|(model, encoding)| {
        write(&model, &path, WeightType::Encoded(encoding));
        fs::read(&path).expect("the file that was written")
    });
    written.collect()
}

/// Folders as names and contents of their files.
pub fn folders() -> Vec<Vec<(String, Vec<u8>)>> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let models = [
        (small(Family::Gpt2, 4, tokenizer(BPE)), WeightType::Encoded(Encoding::F32)),
        (small(Family::Llama, 4, tokenizer(SENTENCE_PIECE)), WeightType::Encoded(Encoding::F16)),
        (small(Family::Llama, 8, tokenizer(UNIGRAM)), WeightType::Bitnet),
        (small(Family::Bitnet, 8, tokenizer(WORD_PIECE)), WeightType::Bitnet),
    ];
    let read = |(i, (model, weights)): (usize, (ternary_format::PackedModel, WeightType))| {
        let path = folder.path().join(i.to_string());
        write(&model, &path, weights);
        let entries = fs::read_dir(&path).expect("the folder that was written").flatten();
        let mut files: Vec<_> = entries
            .map(|entry| {
                (entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).expect("a file"))
            })
            .filter(|(name, _)| name != "README.md")
            .collect();
        files.sort();
        files
    };
    models.into_iter().enumerate().map(read).collect()
}
