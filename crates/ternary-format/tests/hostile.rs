//! Hostile GGUF files and archives: each mistake has its own error, nothing panics, and no unchecked length is
//! allocated.
//!
//! The first table has every case of `test-gguf.cpp` of llama.cpp, under its name there.

use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};
use ternary_format::{
    Activation, Encoding, Family, FormatError, ModelSpec, PackedModel, Tensor, Tokenizer, archive, chat, gguf,
};

/// The system allocator, which also records the largest request.
struct Watched;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is forwarded to the system allocator.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

#[derive(Clone)]
struct Info {
    name: Vec<u8>,
    dims: Vec<u64>,
    kind: u32,
    offset: u64,
}

/// A GGUF file, before it is corrupted.
#[derive(Clone)]
struct File {
    magic: [u8; 4],
    version: u32,
    counts: Option<[u64; 2]>,
    keys: Vec<(Vec<u8>, u32, Vec<u8>)>,
    tensors: Vec<Info>,
    alignment: usize,
    data: Vec<u8>,
}

fn text(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text].concat()
}

fn array(kind: u32, n: u64, items: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &n.to_le_bytes(), items].concat()
}

fn texts(texts: &[&str]) -> Vec<u8> {
    let items: Vec<u8> = texts.iter().flat_map(|item| text(item.as_bytes())).collect();
    array(TEXT, texts.len() as u64, &items)
}

impl File {
    /// A llama model of one block with a vocabulary of three tokens.
    fn valid() -> Self {
        let mut file = Self {
            magic: *b"GGUF",
            version: 3,
            counts: None,
            keys: vec![],
            tensors: vec![],
            alignment: 32,
            data: vec![],
        };
        file.set("general.architecture", TEXT, text(b"llama"));
        for (key, size) in [
            ("context_length", 8u32),
            ("embedding_length", 4),
            ("block_count", 1),
            ("feed_forward_length", 256),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
        ] {
            file.set(&format!("llama.{key}"), U32, size.to_le_bytes().into());
        }
        file.set("llama.attention.layer_norm_rms_epsilon", F32, 1e-5f32.to_le_bytes().into());
        file.set("tokenizer.ggml.model", TEXT, text(b"gpt2"));
        file.set("tokenizer.ggml.pre", TEXT, text(b"gpt-2"));
        file.set("tokenizer.ggml.tokens", ARRAY, texts(&["a", "b", "ab"]));
        file.set("tokenizer.ggml.merges", ARRAY, texts(&["a b"]));
        file.set("tokenizer.ggml.token_type", ARRAY, array(I32, 3, &[1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]));
        file.set("tokenizer.ggml.eos_token_id", U32, 1u32.to_le_bytes().into());
        file.set("tokenizer.chat_template", TEXT, text(chat::TEMPLATE.as_bytes()));
        for (name, dims, kind) in [
            ("token_embd.weight", &[4u64, 3][..], 0),
            ("output_norm.weight", &[4], 0),
            ("blk.0.attn_norm.weight", &[4], 0),
            ("blk.0.attn_q.weight", &[4, 4], 0),
            ("blk.0.attn_k.weight", &[4, 2], 1),
            ("blk.0.attn_v.weight", &[4, 2], 30),
            ("blk.0.attn_output.weight", &[4, 4], 0),
            ("blk.0.ffn_norm.weight", &[4], 0),
            ("blk.0.ffn_gate.weight", &[4, 256], 0),
            ("blk.0.ffn_up.weight", &[4, 256], 0),
            ("blk.0.ffn_down.weight", &[256, 4], 35),
        ] {
            file.tensors.push(Info { name: name.into(), dims: dims.into(), kind, offset: 0 });
        }
        file.place();
        file
    }

    fn set(&mut self, key: &str, kind: u32, value: Vec<u8>) -> &mut Self {
        self.keys.retain(|known| known.0 != key.as_bytes());
        self.keys.push((key.into(), kind, value));
        self
    }

    fn tensor(&mut self, name: &str) -> &mut Info {
        self.tensors.iter_mut().find(|info| info.name == name.as_bytes()).unwrap()
    }

    /// Sets offsets and data of the tensors.
    fn place(&mut self) {
        let mut offset = 0;
        for info in &mut self.tensors {
            info.offset = offset as u64;
            let weights: u64 = info.dims.iter().product();
            let bytes = match info.kind {
                0 => weights * 4,
                1 | 30 => weights * 2,
                35 => weights / 256 * 66,
                _ => 0,
            };
            offset += (bytes as usize).next_multiple_of(self.alignment);
        }
        self.data = vec![0; offset];
    }

    fn bytes(&self) -> Vec<u8> {
        let [tensors, keys] = self.counts.unwrap_or([self.tensors.len() as u64, self.keys.len() as u64]);
        let mut bytes = self.magic.to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(keys.to_le_bytes());
        for (key, kind, value) in &self.keys {
            bytes.extend(text(key));
            bytes.extend(kind.to_le_bytes());
            bytes.extend(value);
        }
        for Info { name, dims, kind, offset } in &self.tensors {
            bytes.extend(text(name));
            bytes.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
            bytes.extend(kind.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
        bytes.extend(&self.data);
        bytes
    }
}

fn parse(bytes: Vec<u8>) -> Result<PackedModel, FormatError> {
    gguf::parse(bytes.into())
}

/// Name of the error variant, without its file and tensor.
fn variant(bytes: Vec<u8>) -> String {
    match parse(bytes) {
        Ok(_) => "none".into(),
        Err(error) => {
            assert!(!error.to_string().is_empty());
            let name = format!("{:?}", error.kind());
            name.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().into()
        }
    }
}

/// Name of the case, the corruption, and the expected error.
type Case = (&'static str, fn(&mut File), &'static str);

fn check(cases: &[Case]) {
    for (name, corrupt, expected) in cases {
        let mut file = File::valid();
        corrupt(&mut file);
        assert_eq!(variant(file.bytes()), *expected, "{name}");
    }
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(largest < 1 << 26, "{largest} bytes allocated at once");
}

#[test]
fn the_uncorrupted_file_is_valid() {
    let model = parse(File::valid().bytes()).unwrap();
    model.validate().unwrap();
    let tokenizer = model.tokenizer.unwrap();
    assert_eq!(tokenizer.encode("abba").unwrap(), [2, 1, 0]);
    assert_eq!(tokenizer.ends().eos, Some(1));
}

#[test]
fn every_case_of_llama_cpp_is_its_own_error() {
    check(&[
        ("HEADER_BAD_MAGIC", |f| f.magic = *b"FUGG", "Magic"),
        ("HEADER_BAD_VERSION_0", |f| f.version = 0, "Version"),
        ("HEADER_BAD_VERSION_1", |f| f.version = 1, "Version"),
        ("HEADER_BAD_VERSION_FUTURE", |f| f.version = 4, "Version"),
        ("HEADER_BAD_N_TENSORS", |f| f.counts = Some([u64::MAX, 1]), "Count"),
        ("HEADER_BAD_N_KV", |f| f.counts = Some([0, u64::MAX]), "Count"),
        // A container without a model.
        ("HEADER_EMPTY", |f| f.counts = Some([0, 0]), "MissingKey"),
        ("KV_EMPTY_KEY", |f| f.keys[3].0.clear(), "EmptyKey"),
        ("KV_BAD_TYPE", |f| f.keys[0].1 = 13, "ValueType"),
        ("KV_BAD_TYPE of an array", |f| f.keys[10].2[0] = 13, "ValueType"),
        ("KV_DUPLICATE_KEY", |f| f.keys[1].0 = f.keys[2].0.clone(), "DuplicateKey"),
        ("KV_BAD_ALIGN", |f| _ = f.set("general.alignment", U32, vec![13, 0, 0, 0]), "Alignment"),
        ("KV_WRONG_TYPE_ALIGN", |f| _ = f.set("general.alignment", I32, vec![32, 0, 0, 0]), "Value"),
        ("KV_SUCCESS", |f| _ = f.set("my_key", ARRAY, texts(&["", "duck"])), "none"),
        ("TENSORS_BAD_NAME_SIZE", |f| f.tensors[0].name = vec![b'x'; 64], "TensorName"),
        ("TENSORS_BAD_N_DIMS", |f| f.tensors[0].dims = vec![1; 5], "Dimensions"),
        ("TENSORS_BAD_SHAPE", |f| f.tensors[0].dims = vec![u64::MAX; 2], "Shape"),
        // llama.cpp takes it; no model has a tensor of nothing.
        ("TENSORS_ZERO_DIM", |f| f.tensors[0].dims = vec![4, 0], "Shape"),
        ("TENSORS_NE_TOO_BIG", |f| f.tensors[0].dims = vec![4 * 0x7fff_ffff; 2], "Shape"),
        ("TENSORS_NBYTES_TOO_BIG", |f| f.tensors[0].dims = vec![1 << 31, 1 << 31], "Shape"),
        ("TENSORS_NBYTES_PAD_WRAP", |f| f.tensors[0].dims = vec![4, 1_073_741_823, 1_073_741_825], "Shape"),
        ("TENSORS_BAD_TYPE", |f| f.tensors[0].kind = 99, "TensorType"),
        ("TENSORS_BAD_OFFSET", |f| f.tensors[0].offset = u64::MAX, "Offset"),
        ("TENSORS_DUPLICATE_NAME", |f| f.tensors[1].name = f.tensors[0].name.clone(), "DuplicateTensor"),
        (
            "TENSORS_INCONSISTENT_ALIGN",
            |f| {
                f.alignment = 1;
                f.place();
            },
            "Offset",
        ),
        (
            "TENSORS_CUSTOM_ALIGN",
            |f| {
                f.set("general.alignment", U32, vec![1, 0, 0, 0]);
                f.alignment = 1;
                f.place();
            },
            "none",
        ),
        (
            "DATA_NOT_ENOUGH_DATA",
            |f| {
                f.set("general.alignment", U32, vec![1, 0, 0, 0]);
                f.alignment = 1;
                f.place();
                f.data.pop();
            },
            "Truncated",
        ),
        ("DATA_MEM_SIZE_OVERFLOW", |f| f.tensors[0].dims = vec![1 << 60], "Truncated"),
    ]);
    // The length of a key is the only case that the table cannot corrupt.
    let mut bytes = File::valid().bytes();
    bytes[24..32].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_eq!(variant(bytes), "Count", "KV_BAD_KEY_SIZE");
}

#[test]
fn numbers_that_overflow_are_errors() {
    check(&[
        ("texts", |f| f.keys[10].2 = array(TEXT, u64::MAX, &[]), "Count"),
        ("numbers", |f| f.keys[12].2 = array(I32, u64::MAX / 4 + 2, &[]), "Count"),
        ("a text", |f| f.keys[0].2[..8].copy_from_slice(&u64::MAX.to_le_bytes()), "Count"),
        ("a text past the end", |f| f.keys[0].2[..8].copy_from_slice(&(1u64 << 20).to_le_bytes()), "Count"),
        ("arrays of arrays", |f| f.keys[10].2 = array(ARRAY, 1, &[]), "ValueType"),
        ("an array of an unknown type", |f| f.keys[10].2 = array(77, 1, &[]), "ValueType"),
        ("a key that is not UTF-8", |f| f.keys[0].0 = vec![0xff], "NotUtf8"),
        ("a tensor name that is not UTF-8", |f| f.tensors[0].name = vec![0xc3], "NotUtf8"),
        ("alignment 0", |f| _ = f.set("general.alignment", U32, vec![0; 4]), "Alignment"),
        ("alignment 2^31", |f| _ = f.set("general.alignment", U32, vec![0, 0, 0, 0x80]), "Alignment"),
        ("no dimensions", |f| f.tensors[0].dims.clear(), "Dimensions"),
        ("rows of half a block", |f| f.tensors[10].dims = vec![128, 8], "RowLength"),
        ("more tensors than there are", |f| f.counts = Some([12, f.keys.len() as u64]), "Dimensions"),
        ("no data", |f| f.data.clear(), "Truncated"),
        ("a code that is not ternary", |f| *f.data.iter_mut().rev().nth(40).unwrap() = 255, "NotACode"),
    ]);
}

#[test]
fn files_without_a_valid_model_are_errors() {
    check(&[
        ("no architecture", |f| drop(f.keys.remove(0)), "MissingKey"),
        ("another architecture", |f| f.keys[0].2 = text(b"mamba"), "Architecture"),
        ("an architecture that is a number", |f| _ = f.set("general.architecture", U32, vec![0; 4]), "Value"),
        ("no heads", |f| f.keys[5].2 = vec![0; 4], "Spec"),
        ("too many blocks", |f| f.keys[3].2 = vec![0xff; 4], "Spec"),
        ("a context that is too long", |f| f.keys[1].2 = vec![0xff; 4], "Spec"),
        ("epsilon", |f| f.keys[7].2 = f32::NAN.to_le_bytes().into(), "Spec"),
        ("a width that is a text", |f| (f.keys[2].1, f.keys[2].2) = (TEXT, text(b"4")), "Value"),
        ("experts", |f| _ = f.set("llama.expert_count", U32, vec![8, 0, 0, 0]), "Value"),
        ("scaled positions", |f| _ = f.set("llama.rope.scaling.type", TEXT, text(b"yarn")), "Value"),
        ("no embedding", |f| f.tensors[0].name = b"x".into(), "MissingTensor"),
        ("a block too few", |f| f.keys[3].2 = vec![2, 0, 0, 0], "MissingTensor"),
        ("a shape of another model", |f| f.tensor("blk.0.attn_q.weight").dims = vec![2, 8], "WrongShape"),
        (
            "an unknown tensor",
            |f| {
                f.tensors.push(Info { name: b"rope_freqs.weight".into(), dims: vec![1], kind: 0, offset: 0 });
                f.place();
            },
            "UnknownTensor",
        ),
        ("a vocabulary shorter than ids", |f| f.keys[10].2 = texts(&["a", "b"]), "Vocabulary"),
        ("a vocabulary longer than ids", |f| f.keys[10].2 = texts(&["a", "b", "c", "d"]), "Vocabulary"),
        ("a token twice", |f| f.keys[10].2 = texts(&["a", "b", "a"]), "DuplicateToken"),
        ("types of other tokens", |f| f.keys[12].2 = array(I32, 1, &[1, 0, 0, 0]), "Value"),
        ("an end beyond the vocabulary", |f| f.keys[13].2 = vec![3, 0, 0, 0], "Value"),
        ("a merge of nothing", |f| f.keys[11].2 = texts(&["x y"]), "Tokenizer"),
        ("no merges", |f| drop(f.keys.remove(11)), "MissingKey"),
        ("no tokens", |f| drop(f.keys.remove(10)), "MissingKey"),
        ("an unknown pre-tokenizer", |f| f.keys[9].2 = text(b"duck"), "Value"),
        ("an unknown tokenizer", |f| f.keys[8].2 = text(b"bert"), "Value"),
        ("no scores", |f| f.keys[8].2 = text(b"llama"), "MissingKey"),
        ("an invalid tokenizer", |f| _ = f.set("tokenizer.huggingface.json", TEXT, text(b"{}")), "Tokenizer"),
        (
            "a tokenizer of more ids",
            |f| _ = f.set("burn_ternary.tokenizer.json", TEXT, text(br#"{"type":"byte"}"#)),
            "Vocabulary",
        ),
    ]);
}

#[test]
fn files_that_end_early_are_errors() {
    let file = File::valid();
    let bytes = file.bytes();
    // The last tensor ends before its padding.
    let needed = bytes.len() - (264usize.next_multiple_of(32) - 264);
    assert_eq!(variant(bytes[..needed].to_vec()), "none");
    for end in 0..needed {
        let found = variant(bytes[..end].to_vec());
        assert!(["Truncated", "Count"].contains(&found.as_str()), "{end} of {needed}: {found}");
    }
}

#[test]
fn changed_bytes_never_cause_a_panic() {
    let mut rng = StdRng::seed_from_u64(7);
    let sound = File::valid();
    let mut spm = sound.clone();
    spm.set("tokenizer.ggml.model", TEXT, text(b"llama"));
    spm.set("tokenizer.ggml.scores", ARRAY, array(F32, 3, &[0; 12]));
    let head = sound.bytes().len() - sound.data.len();
    let mut parsed = 0;
    for n in 0..4000 {
        let mut bytes = if n % 2 == 0 { sound.bytes() } else { spm.bytes() };
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..head);
            match rng.random_range(0..3) {
                0 => bytes[at] = rng.random(),
                1 => bytes[at] ^= 1 << rng.random_range(0..8),
                _ => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][rng.random_range(0..5)],
            }
        }
        let Ok(model) = parse(bytes) else { continue };
        parsed += 1;
        let Some(tokenizer) = model.tokenizer else { continue };
        let ids = tokenizer.encode("ab 🦆 <|user|>").unwrap_or_default();
        tokenizer.decode(&ids);
        if let Some(template) = model.chat_template.and_then(|source| chat::ChatTemplate::new(&source).ok()) {
            let message = chat::Message::new(chat::Role::User, "<|user|>");
            let _ = template.ids(&tokenizer, &[message], true);
        }
    }
    assert!(parsed > 100, "{parsed}: most changes must leave something to parse");
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(largest < 1 << 26, "{largest} bytes allocated at once");
}

/// A `tokenizer.json` of two tokens, with `part` next to the model.
fn tokenizer(part: &str, model: &str) -> Result<Tokenizer, FormatError> {
    let comma = if part.is_empty() { "" } else { "," };
    let vocab = r#""type": "BPE", "vocab": {"a": 0, "ab": 1}"#;
    Tokenizer::from_json(format!(r#"{{{part}{comma} "model": {{{vocab}, {model}}}}}"#).as_bytes())
}

#[test]
fn tokenizers_that_would_panic_or_not_terminate_are_errors() {
    let no_merges = r#""merges": []"#;
    tokenizer("", no_merges).unwrap();
    let replace = |pattern: &str, content: &str| {
        format!(r#"{{"type": "Replace", "pattern": {pattern}, "content": "{content}"}}"#)
    };
    let twice = vec![replace(r#"{"String": "a"}"#, "aa"); 30].join(",");
    let empty = vec![replace(r#"{"Regex": ""}"#, "aaaaaaaa"); 2].join(",");
    let split = |regex: &str| {
        let pattern = format!(r#""pattern": {{"Regex": "{regex}"}}"#);
        format!(r#""pre_tokenizer": {{"type": "Split", {pattern}, "behavior": "Isolated", "invert": false}}"#)
    };
    let strip = r#""decoder": {"type": "Sequence", "decoders": [{"type": "Strip", "content": "a", "start": 0, "stop": 2}]}"#;
    let template = r#"{"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {}}"#;
    let templates = vec![template; 30].join(",");
    for (name, part, model, expected) in [
        (
            "a normalizer that doubles texts 30 times",
            format!(r#""normalizer": {{"type": "Sequence", "normalizers": [{twice}]}}"#),
            no_merges,
            "times as long",
        ),
        (
            "an empty pattern",
            format!(r#""decoder": {{"type": "Sequence", "decoders": [{empty}]}}"#),
            no_merges,
            "times as long",
        ),
        (
            "a post-processor that copies texts",
            format!(r#""post_processor": {{"type": "Sequence", "processors": [{templates}]}}"#),
            no_merges,
            "times as long",
        ),
        ("repeats of nothing", split("(?:(?=a)){1000000000000}"), no_merges, "repeats"),
        ("repeats of repeats", split("(?:(?:(?=a)){100,}){1,100}"), no_merges, "repeats"),
        ("the ends of empty tokens", strip.into(), no_merges, "Strip"),
        (
            "a prefix longer than a token",
            String::new(),
            r#""continuing_subword_prefix": "abc", "merges": ["a a"]"#,
            "panicked",
        ),
        ("an id of four billion", String::new(), r#""vocab": {"a": 4294967295}, "merges": []"#, "4294967295"),
    ] {
        let error = tokenizer(&part, model).expect_err(name);
        assert!(
            matches!(error, FormatError::Tokenizer { .. }) && error.to_string().contains(expected),
            "{name}: {error}"
        );
    }
}

/// An archive of a model with one block, in several encodings.
fn archived() -> Vec<u8> {
    let spec = ModelSpec::new(Family::Llama)
        .with_vocab_size(6)
        .with_context(8)
        .with_d_model(32)
        .with_n_layers(1)
        .with_n_heads(2)
        .with_n_kv_heads(1)
        .with_d_ff(5)
        .with_activation(Activation::Swiglu)
        .with_tied(true)
        .with_norm_eps(1e-5)
        .with_rope_theta(1e4);
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| (i % 5) as f32 - 2.0).collect();
        let floats = Tensor::f32(&shape, &values).unwrap();
        let tensor = match name.trim_start_matches("blk.0.").trim_end_matches(".weight") {
            "token_embd" => floats.encode(Encoding::Q4_0).unwrap(),
            "attn_q" => floats.encode(Encoding::Q8_0).unwrap(),
            "attn_k" => floats.encode(Encoding::F16).unwrap(),
            "ffn_up" | "ffn_down" => Tensor::ternary(shape[0], shape[1], shape[1], |row, codes, scales| {
                codes.iter_mut().enumerate().for_each(|(i, code)| *code = ((i * i + row) % 3) as i8 - 1);
                scales.fill(half::f16::from_f32(row as f32));
            })
            .unwrap(),
            _ => floats,
        };
        (name, tensor)
    };
    let tensors = spec.tensors().map(tensor).collect();
    let model = PackedModel::new("a", spec, tensors)
        .with_tokenizer(Some(Tokenizer::from_characters(vec!['a', 'b', 'c']).unwrap()));
    let mut file = Vec::new();
    archive::write_to(&model, &mut file, Path::new("memory")).unwrap();
    file
}

/// Positions of the checksums in an archive whose tensors have one chunk each.
fn checksums(file: &[u8]) -> Option<Vec<usize>> {
    let varint = |at: &mut usize| {
        let (mut number, mut shift) = (0u64, 0);
        loop {
            let byte = *file.get(*at)?;
            *at += 1;
            number |= u64::from(byte & 127).checked_shl(shift)?;
            shift += 7;
            if byte < 128 {
                return Some(number as usize);
            }
        }
    };
    let mut at = 5;
    varint(&mut at)?;
    let mut places = Vec::new();
    loop {
        at = varint(&mut at)?.checked_add(at)?;
        if at > file.len() - 4 {
            return None;
        }
        places.push(at);
        at += 4;
        match file.get(at) {
            None => return Some(places),
            Some(encoding) => {
                at += 1 + usize::from(*encoding == 255) * {
                    let mut end = at + 1;
                    varint(&mut end).map_or(0, |_| end - at - 1)
                }
            }
        }
    }
}

/// Recomputes the checksums of an archive.
fn seal(file: &mut [u8]) {
    let mut crc = u32::MAX;
    let mut from = 0;
    for place in checksums(file).unwrap_or_default() {
        for &byte in &file[from..place] {
            crc ^= u32::from(byte);
            (0..8).for_each(|_| crc = crc >> 1 ^ if crc & 1 == 1 { 0xEDB8_8320 } else { 0 });
        }
        file[place..place + 4].copy_from_slice(&(!crc).to_le_bytes());
        from = place + 4;
    }
}

fn unpack(file: &[u8]) -> Result<PackedModel, FormatError> {
    archive::read_from(file, Path::new("memory"))
}

#[test]
fn archives_with_missing_added_or_changed_bytes_are_errors() {
    let file = archived();
    unpack(&file).unwrap();
    for end in 0..file.len() {
        let error = unpack(&file[..end]).unwrap_err();
        assert!(matches!(error.kind(), FormatError::Truncated { .. }), "{end}: {error}");
    }
    assert!(unpack(&[&file[..], &[0]].concat()).unwrap_err().to_string().contains("after the last tensor"));
    for at in 0..file.len() {
        let mut corrupt = file.clone();
        for change in (0..8).map(|bit| 1 << bit).chain([255]) {
            corrupt[at] = file[at] ^ change;
            assert!(unpack(&corrupt).is_err(), "{at} of {}: {change}", file.len());
        }
    }
}

#[test]
fn archive_errors_name_the_damaged_part() {
    let file = archived();
    let last = checksums(&file).unwrap().pop().unwrap();
    for (at, value, expected) in [
        (0, b'G', "expected the magic bytes \"TRNA\", found [71, 82, 78, 65]"),
        (4, 2, "archive version 2, expected 1"),
        (5, 0, "header: "),
        (20, 0, "header: its checksum does not match its bytes: the file is damaged"),
        (last - 1, 0, "tensor `output_norm.weight`: chunk 1 of 1: its checksum does not match its bytes"),
        (last, 0, "tensor `output_norm.weight`: chunk 1 of 1: its checksum does not match its bytes"),
    ] {
        let mut corrupt = file.clone();
        corrupt[at] = value;
        let error = unpack(&corrupt).unwrap_err().to_string();
        assert!(error.starts_with("memory: ") && error.contains(expected), "{at}: {error}");
    }
}

#[test]
fn archives_with_correct_checksums_never_cause_a_panic() {
    let sound = archived();
    let mut again = sound.clone();
    seal(&mut again);
    assert_eq!(again, sound);
    let mut rng = StdRng::seed_from_u64(8);
    let mut unpacked = 0;
    for _ in 0..4000 {
        let mut file = sound.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(4..file.len());
            match rng.random_range(0..3) {
                0 => file[at] = rng.random(),
                1 => file[at] ^= 1 << rng.random_range(0..8),
                _ => file[at] = [0, 1, 0x7f, 0x80, 0xff][rng.random_range(0..5)],
            }
        }
        seal(&mut file);
        unpacked += usize::from(unpack(&file).is_ok_and(|model| model.validate().is_ok()));
    }
    println!("{unpacked} of 4000 unpacked");
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(largest < 1 << 26, "{largest} bytes allocated at once");
}
