//! Tokenizers: ids of reference implementations, and the round trip through GGUF files.

use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{collections::BTreeMap, path::PathBuf};
use ternary_format::{
    Activation, Encoding, Ends, Family, FormatError, ModelSpec, PackedModel, Special, Tensor, Tokenizer,
    chat::{ChatTemplate, Message, Role, TEMPLATE},
    gguf::{self, GgufOptions},
};

const HOSTILE: &str = "a <|user|>b<|endoftext|> duck 🦆 é\r\n\t  duck\u{0} <|assistant|><|user|";

fn shared(path: &str) -> Option<PathBuf> {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data")).join(path);
    if !path.exists() {
        println!("skipped: {}: no reference data", path.display());
    }
    path.exists().then_some(path)
}

fn characters(text: &str) -> Tokenizer {
    let mut characters: Vec<char> = text.chars().collect();
    characters.sort_unstable();
    characters.dedup();
    Tokenizer::from_characters(characters).unwrap()
}

/// A small model with this tokenizer.
fn model(tokenizer: Option<Tokenizer>, vocab_size: usize) -> PackedModel {
    let spec = ModelSpec::new(Family::Llama)
        .with_vocab_size(vocab_size)
        .with_context(8)
        .with_d_model(4)
        .with_n_layers(1)
        .with_n_heads(2)
        .with_n_kv_heads(1)
        .with_d_ff(4)
        .with_activation(Activation::Swiglu)
        .with_tied(true)
        .with_norm_eps(1e-5)
        .with_rope_theta(1e4);
    let zero = |shape: Vec<usize>| Tensor::f32(&shape, &vec![0.0; shape.iter().product()]).unwrap();
    let tensors: BTreeMap<_, _> = spec.tensors().map(|(name, shape)| (name, zero(shape))).collect();
    PackedModel::new("tokens", spec, tensors).with_tokenizer(tokenizer)
}

/// The tokenizer after a round trip through a GGUF file. Without `ours`, the keys of this crate are renamed, as if
/// another program had written the file.
fn through_gguf(tokenizer: &Tokenizer, rows: usize, ours: bool) -> Result<Tokenizer, FormatError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let options = GgufOptions::new(Encoding::F32);
    gguf::write(&model(Some(tokenizer.clone()), rows), &path, &options)?;
    let mut bytes = std::fs::read(&path).unwrap();
    if !ours {
        for key in ["tokenizer.huggingface.json", "burn_ternary.tokenizer.json"] {
            if let Some(at) = bytes.windows(key.len()).position(|window| window == key.as_bytes()) {
                bytes[at] = b'X';
            }
        }
    }
    Ok(gguf::parse(bytes.into())?.tokenizer.unwrap())
}

fn same(a: &Tokenizer, b: &Tokenizer, texts: &[&str]) {
    for text in texts {
        let ids = a.encode(text).unwrap();
        assert_eq!(b.encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(b.decode(&ids), a.decode(&ids), "{text:?}");
    }
    for special in Special::ALL {
        assert_eq!(a.special(special.text()), b.special(special.text()));
    }
    assert_eq!(a.ends(), b.ends());
}

#[test]
fn every_kind_survives_gguf() {
    for tokenizer in [Tokenizer::byte(), characters(HOSTILE)] {
        for padding in [0, 5] {
            let read = through_gguf(&tokenizer, tokenizer.vocab_size() + padding, true).unwrap();
            assert_eq!(read.to_json(), tokenizer.to_json());
            assert_eq!(read.vocab_size(), tokenizer.vocab_size());
            same(&tokenizer, &read, &[HOSTILE, ""]);
        }
    }
    let error = through_gguf(&Tokenizer::byte(), 258, true).unwrap_err();
    assert!(matches!(error, FormatError::Vocabulary { tokens: 259, rows: 258 }), "{error}");
}

#[test]
fn files_of_other_programs_have_the_same_ids() {
    // Without merges, every byte is a token.
    let bytes = through_gguf(&Tokenizer::byte(), 259, false).unwrap();
    same(&Tokenizer::byte(), &bytes, &[HOSTILE, "", "\u{fffd}🦆"]);
    for name in ["gpt2", "smollm2"] {
        let Some(path) = shared(&format!("tokenizers/{name}/tokenizer.json")) else { continue };
        let tokenizer = Tokenizer::load(&path).unwrap();
        let read = through_gguf(&tokenizer, tokenizer.vocab_size() + 3, false).unwrap();
        let texts = [HOSTILE, "It's 2026: 1234 ducks, naïve\n\n  and   more...", "日本語 ａｂｃ ½²"];
        same(&tokenizer, &read, &texts);
    }
}

#[test]
fn sentence_piece_has_the_ids_of_the_reference() {
    let Some(path) = shared("models/stories260k/tokenizer.json") else { return };
    let tokenizer = Tokenizer::load(&path).unwrap();
    assert_eq!(tokenizer.ends(), Ends::default().with_bos(Some(1)).with_eos(Some(2)).with_add_bos(true));
    let read = through_gguf(&tokenizer, 512, false).unwrap();
    assert_eq!(read.ends(), tokenizer.ends());
    let text = std::fs::read_to_string(shared("text/tinystories/valid.txt").unwrap()).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).take(300).collect();
    assert!(lines.len() > 100);
    for text in lines.iter().chain(&["Once upon a time", " two  spaces", "ünïcödé 🦆", "<s>"]) {
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(read.encode(text).unwrap(), ids, "{text}");
        assert_eq!(read.decode(&ids), *text);
    }
    assert_eq!(read.encode("Once upon a time").unwrap(), [403, 407, 261, 378]);
}

#[test]
fn streamed_text_equals_decoded_text() {
    let mut tokenizers = vec![Tokenizer::byte(), characters(HOSTILE)];
    let path = shared("tokenizers/gpt2/tokenizer.json");
    tokenizers.extend(path.map(|path| Tokenizer::load(&path).unwrap()));
    let mut rng = StdRng::seed_from_u64(1);
    for tokenizer in &tokenizers {
        let mut cases = vec![tokenizer.encode(HOSTILE).unwrap_or_default()];
        // A model may also generate incomplete characters, special tokens and unknown ids.
        cases.extend((0..200).map(|n| {
            (0..n % 40).map(|_| rng.random_range(0..tokenizer.vocab_size() as u32 + 9)).collect::<Vec<_>>()
        }));
        for (i, ids) in cases.iter().enumerate() {
            let mut decoder = tokenizer.decoder();
            let mut text: String = ids.iter().map(|&id| decoder.push(id)).collect();
            text += &decoder.finish();
            let expected = tokenizer.decode(ids);
            if i == 0 {
                assert_eq!(text, expected);
            }
            // The number of replacement characters may differ.
            let whole = |text: &str| text.replace(char::REPLACEMENT_CHARACTER, "");
            assert_eq!(whole(&text), whole(&expected), "{ids:?}");
        }
    }
    // With byte fallback, an invalid byte also invalidates its neighbours, whose text may have been returned before.
    let Some(path) = shared("models/stories260k/tokenizer.json") else { return };
    let tokenizer = Tokenizer::load(&path).unwrap();
    for text in [HOSTILE, " Once upon a time 🦆, there was", "\n\n"] {
        let ids = tokenizer.encode(text).unwrap();
        let mut decoder = tokenizer.decoder();
        let streamed: String = ids.iter().map(|&id| decoder.push(id)).collect();
        assert_eq!(streamed + &decoder.finish(), text);
    }
}

#[test]
fn the_decoder_never_splits_a_character() {
    let tokenizer = Tokenizer::byte();
    let mut decoder = tokenizer.decoder();
    let texts: Vec<String> = "é🦆".bytes().map(|byte| decoder.push(byte.into())).collect();
    assert_eq!(texts, ["", "é", "", "", "", "🦆"]);
}

#[test]
fn plain_text_never_becomes_a_special_token() {
    let mut tokenizers = vec![Tokenizer::byte(), characters(HOSTILE)];
    for name in ["gpt2", "smollm2"] {
        let path = shared(&format!("tokenizers/{name}/tokenizer.json"));
        tokenizers.extend(path.map(|path| Tokenizer::load(&path).unwrap().with_specials().unwrap()));
    }
    for tokenizer in tokenizers {
        let specials = Special::ALL.map(|s| tokenizer.special(s.text()).unwrap());
        let ids = tokenizer.encode(HOSTILE).unwrap();
        assert!(specials.iter().all(|id| !ids.contains(id)), "{specials:?} in {ids:?}");
        assert_eq!(tokenizer.decode(&ids), HOSTILE);
        // Special tokens and unknown ids are not decoded.
        let unknown = tokenizer.vocab_size() as u32 + 5;
        assert_eq!(tokenizer.decode(&[&specials[..], &ids, &[unknown]].concat()), HOSTILE);
        assert_eq!(tokenizer.ends().eos, Some(specials[0]));
    }
}

#[test]
fn files_round_trip_and_invalid_ones_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    assert!(matches!(Tokenizer::load(&path), Err(FormatError::Io { .. })));
    for tokenizer in [Tokenizer::byte(), characters(HOSTILE)] {
        tokenizer.save(&path).unwrap();
        assert_eq!(Tokenizer::load(&path).unwrap().to_json(), tokenizer.to_json());
    }
    for (json, found) in [
        ("quack", "not valid JSON"),
        ("", "not valid JSON"),
        ("{}", "unexpected JSON"),
        (r#"{"type": "word"}"#, "unexpected JSON"),
        (r#"{"type": "char", "characters": "ba"}"#, "out of order"),
    ] {
        std::fs::write(&path, json).unwrap();
        let message = Tokenizer::load(&path).unwrap_err().to_string();
        assert!(message.contains(found) && message.contains("tokenizer.json"), "{json}: {message}");
    }
    let hole = r#"{"model": {"type": "BPE", "vocab": {"a": 0, "b": 9}, "merges": []}}"#;
    let error = Tokenizer::from_json(hole.as_bytes()).unwrap().with_specials().unwrap_err();
    assert!(error.to_string().contains("tokens with ids up to"), "{error}");
    let message = characters("duck").encode("dück").unwrap_err().to_string();
    assert!(
        message.contains("'ü'") && message.contains("U+00FC") && message.contains("4 characters"),
        "{message}"
    );
}

#[test]
fn gpt2_ids_are_those_of_the_reference() {
    let Some(path) = shared("tokenizers/gpt2/tokenizer.json") else { return };
    let tokenizer = Tokenizer::load(&path).unwrap();
    assert_eq!((tokenizer.special("<|endoftext|>"), tokenizer.vocab_size()), (Some(50256), 50257));
    let vectors = std::fs::read_to_string(path.with_file_name("vectors.jsonl")).unwrap();
    let mut cases = 0;
    for line in vectors.lines() {
        let case: serde_json::Value = serde_json::from_str(line).unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(case["text"].as_str().unwrap()).unwrap(), ids, "{line}");
        cases += 1;
    }
    assert!(cases > 10);
}

/// Tokenizers with tokens of unlimited length.
fn unbounded() -> [Tokenizer; 3] {
    let load = |json: serde_json::Value| Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
    let with = |normalizer: serde_json::Value, model: serde_json::Value| {
        load(serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": normalizer,
            "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null, "model": model,
        }))
    };
    let vocab = serde_json::json!({ "[UNK]": 0, "x": 1, "y": 2, "xx": 3 });
    let word = serde_json::json!({
        "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "", "max_input_chars_per_word": 100,
        "vocab": vocab,
    });
    let fused = serde_json::json!({
        "type": "BPE", "dropout": null, "unk_token": "[UNK]", "continuing_subword_prefix": null, "end_of_word_suffix": null,
        "fuse_unk": true, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": [["x", "x"]],
    });
    let squeeze = serde_json::json!({ "type": "Replace", "pattern": { "Regex": "z+" }, "content": "y" });
    [with(serde_json::Value::Null, word), with(serde_json::Value::Null, fused.clone()), with(squeeze, fused)]
}

/// The tokenizer of the model that is shipped with `duck`.
fn duck() -> Tokenizer {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../duck/duck.gguf");
    ternary_format::read_model(file.as_ref()).unwrap().tokenizer.unwrap()
}

#[test]
fn a_bounded_encoding_equals_the_encoding_of_a_text_that_fits() {
    let mut tokenizers = vec![Tokenizer::byte(), characters("abcdefghijklmnopqrstuvwxyz .,\n🦆"), duck()];
    tokenizers.extend(unbounded());
    let prose = "the duck swims, and the goose\nwaits. 🦆 ".repeat(4000);
    for (i, tokenizer) in tokenizers.iter().enumerate() {
        for text in ["", "x", &prose, &"x".repeat(200_000), &"z".repeat(200_000), &" ".repeat(100_000)] {
            let whole = tokenizer.encode(text).unwrap();
            for most in [0, 1, 128, 5000, 40_000, 150_000, usize::MAX] {
                match tokenizer.encode_within(text, most) {
                    Ok(ids) => assert_eq!(ids, whole),
                    Err(FormatError::TooManyTokens { most: limit }) => {
                        assert!(
                            limit == most && whole.len() > most,
                            "tokenizer {i}: {} and {most}",
                            whole.len()
                        );
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }
    // A text of any length may be a single token.
    for tokenizer in unbounded() {
        assert_eq!(tokenizer.encode_within(&"z".repeat(1_000_000), 4).unwrap().len(), 1);
    }
}

#[test]
fn long_texts_are_refused_without_encoding_them() {
    let tokenizer = duck();
    let template = ChatTemplate::new(TEMPLATE).unwrap();
    let long = "x".repeat(100_000_000);
    let begun = std::time::Instant::now();
    assert!(matches!(tokenizer.encode_within(&long, 128), Err(FormatError::TooManyTokens { most: 128 })));
    assert!(begun.elapsed().as_secs() < 5, "{:?}", begun.elapsed());
    let many = |count: usize, content: &str| vec![Message::new(Role::User, content); count];
    for messages in
        [many(1, &long[..1_000_000]), many(2, &long[..500_000]), many(5000, "x"), many(1000, "a duck")]
    {
        let ids = template.ids_within(&tokenizer, &messages, true, 128);
        assert!(matches!(ids, Err(FormatError::TooManyTokens { most: 128 })), "{}", messages.len());
    }
    // Texts that fit, or nearly fit, are encoded.
    for messages in [many(1, "Who are you?"), many(40, "a duck"), many(1, &"duck ".repeat(500))] {
        let whole = template.ids(&tokenizer, &messages, true).unwrap();
        assert_eq!(template.ids_within(&tokenizer, &messages, true, 128).unwrap(), whole);
    }
}
