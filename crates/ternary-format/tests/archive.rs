//! Archives restore a model bit for bit, and take little more than its entropy.

use half::f16;
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{collections::BTreeMap, path::Path, time::Instant};
use ternary_format::{
    Activation, Encoding, Ends, Family, FormatError, ModelSpec, PackedModel, SizeReport, Tensor, Tokenizer,
    WeightType, WriteOptions, archive, chat, read_model, write_model,
};

const FAMILIES: [Family; 3] = [Family::Gpt2, Family::Llama, Family::Bitnet];

/// All encodings except `Ternary`.
const ENCODINGS: [Encoding; 11] = [
    Encoding::F32,
    Encoding::F16,
    Encoding::Bf16,
    Encoding::Q8_0,
    Encoding::Q4_0,
    Encoding::Q4_1,
    Encoding::Q4K,
    Encoding::Q6K,
    Encoding::Tq1_0,
    Encoding::Tq2_0,
    Encoding::Q2_0,
];

fn spec(family: Family, d_model: usize, d_ff: usize) -> ModelSpec {
    let gpt2 = family == Family::Gpt2;
    ModelSpec::new(family)
        .with_vocab_size(259)
        .with_context(5)
        .with_d_model(d_model)
        .with_n_layers(1)
        .with_n_heads(if d_model.is_multiple_of(4) { 2 } else { 1 })
        .with_n_kv_heads(if gpt2 && d_model.is_multiple_of(4) { 2 } else { 1 })
        .with_d_ff(d_ff)
        .with_activation(if gpt2 { Activation::Gelu } else { Activation::SquaredRelu })
        .with_tied(family != Family::Bitnet)
        .with_norm_eps(1e-6)
        .with_rope_theta(if gpt2 { f32::NAN } else { 5e5 })
}

fn model(spec: ModelSpec, mut tensor: impl FnMut(&str, Vec<usize>) -> Tensor) -> PackedModel {
    let tensors = spec.tensors().map(|(name, shape)| (name.clone(), tensor(&name, shape))).collect();
    PackedModel::new("duck \u{1f986}", spec, tensors)
        .with_tokenizer(Some(Tokenizer::byte()))
        .with_chat_template(Some(chat::TEMPLATE.into()))
}

/// Random codes if the encoding has codes, else random bytes.
fn random(rng: &mut StdRng, shape: Vec<usize>, encoding: Encoding) -> Tensor {
    let cols = shape[shape.len() - 1];
    let (limit, zeros, same) = match encoding {
        Encoding::Q8_0 => (127, 0.1, 0.5),
        Encoding::Q4_0 => (7, 0.3, 1.0),
        Encoding::F32 if rng.random_bool(0.5) => {
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
            return Tensor::f32(&shape, &values).unwrap();
        }
        _ if encoding.is_ternary() => (1, rng.random_range(0.0..=1.0), rng.random_range(0.0..=1.0)),
        _ => {
            let bytes = encoding.bytes(&shape).unwrap();
            return Tensor::new(shape, encoding, (0..bytes).map(|_| rng.random()).collect::<Vec<u8>>())
                .unwrap();
        }
    };
    let rows = shape.iter().product::<usize>() / cols;
    let codes = Tensor::from_codes(encoding, rows, cols, |_, codes, scales| {
        for code in codes {
            *code = if rng.random_bool(zeros) { 0 } else { rng.random_range(-limit..=limit) };
        }
        for i in 0..scales.len() {
            let before = scales[i.saturating_sub(1)];
            scales[i] = if rng.random_bool(same) { before } else { f16::from_bits(rng.random()) };
        }
    });
    Tensor::new(shape, encoding, codes.unwrap().bytes().to_vec()).unwrap()
}

fn packed(model: &PackedModel) -> Vec<u8> {
    let mut file = Vec::new();
    archive::write_to(model, &mut file, Path::new("memory")).unwrap();
    file
}

fn unpacked(file: &[u8]) -> Result<PackedModel, FormatError> {
    archive::read_from(file, Path::new("memory"))
}

type Parts = (
    String,
    String,
    Option<(String, Ends)>,
    Option<String>,
    BTreeMap<String, (Vec<usize>, Encoding, Vec<u8>)>,
);

/// Everything that a model contains, for comparison.
fn parts(model: &PackedModel) -> Parts {
    let tensors = model.tensors.iter().map(|(name, tensor)| {
        (name.clone(), (tensor.shape().to_vec(), tensor.encoding(), tensor.bytes().to_vec()))
    });
    let PackedModel { name, spec, tokenizer, chat_template, .. } = model;
    let bits = [spec.norm_eps.to_bits(), spec.rope_theta.to_bits()];
    (
        name.clone(),
        format!("{spec:?} {bits:?}"),
        tokenizer.as_ref().map(|tokenizer| (tokenizer.to_json(), tokenizer.ends())),
        chat_template.clone(),
        tensors.collect(),
    )
}

fn check(model: &PackedModel) -> usize {
    let file = packed(model);
    assert!(parts(&unpacked(&file).unwrap()) == parts(model));
    file.len()
}

#[test]
fn every_encoding_round_trips() {
    let mut rng = StdRng::seed_from_u64(1);
    for family in FAMILIES {
        for encoding in ENCODINGS {
            check(&model(spec(family, 256, 512), |name, shape| {
                let table = name.starts_with("token_embd") || name.starts_with("output.");
                let block = name.starts_with("blk.") && shape.len() == 2;
                random(&mut rng, shape, if table || block { encoding } else { Encoding::F32 })
            }));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn odd_shapes_round_trip(half in 1usize..30, d_ff in 1usize..70, groups in 1usize..4, family in 0usize..3, seed: u64) {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut any = model(spec(FAMILIES[family], 2 * half, d_ff), |_, shape| {
            let cols = shape[shape.len() - 1];
            let group = if cols.is_multiple_of(groups) { cols / groups } else { cols };
            let encodings = [Encoding::F32, Encoding::F16, Encoding::Bf16, Encoding::Ternary { group }];
            let encoding = encodings[rng.random_range(0..encodings.len())];
            random(&mut rng, shape, encoding)
        });
        any.tokenizer = any.tokenizer.filter(|_| seed % 3 > 0).map(|tokenizer| {
            tokenizer.with_ends(Ends::default().with_bos((seed % 3 > 1).then_some(7)).with_eos(Some(u32::MAX)).with_add_bos(true))
        });
        any.chat_template = any.chat_template.filter(|_| seed % 2 > 0);
        check(&any);
    }
}

#[test]
fn unused_bits_of_other_writers_round_trip() {
    let mut rng = StdRng::seed_from_u64(2);
    // With 3 codes per row, the fourth field of a byte is unused. TQ1_0 can read all 256 bytes, but the writer uses
    // 243.
    let padded = check(&model(spec(Family::Llama, 6, 3), |name, shape| {
        if !name.ends_with("ffn_down.weight") {
            return Tensor::f32(&shape, &vec![0.0; shape.iter().product()]).unwrap();
        }
        let bytes = [vec![0b1000_0000; 6], vec![0x3c; 12]].concat();
        Tensor::new(shape, Encoding::Ternary { group: 3 }, bytes).unwrap()
    }));
    let any = check(&model(spec(Family::Llama, 256, 256), |name, shape| {
        if !name.ends_with("ffn_down.weight") {
            return Tensor::f32(&shape, &vec![0.0; shape.iter().product()]).unwrap();
        }
        let bytes = Encoding::Tq1_0.bytes(&shape).unwrap();
        Tensor::new(shape, Encoding::Tq1_0, (0..bytes).map(|_| rng.random()).collect::<Vec<u8>>()).unwrap()
    }));
    assert!(padded < 1000 && any > 54 * 256);
}

#[test]
fn tensors_of_several_chunks_round_trip() {
    let mut rng = StdRng::seed_from_u64(3);
    let spec = spec(Family::Llama, 512, 64).with_vocab_size(5000);
    check(&model(spec, |name, shape| {
        let table = name.starts_with("token_embd");
        let encoding = if table { Encoding::Ternary { group: 256 } } else { Encoding::F32 };
        random(&mut rng, shape, encoding)
    }));
}

/// A sparse ternary model with a ternary embedding, and one scale per row.
fn sparse(zeros: f64) -> PackedModel {
    let mut rng = StdRng::seed_from_u64(4);
    let spec = spec(Family::Llama, 256, 1024)
        .with_vocab_size(4096)
        .with_context(512)
        .with_n_layers(4)
        .with_n_heads(4)
        .with_n_kv_heads(4)
        .with_activation(Activation::Swiglu);
    model(spec, |_, shape| match shape[..] {
        [rows, cols] => Tensor::ternary(rows, cols, cols, |_, codes, scales| {
            for code in codes {
                *code = if rng.random_bool(zeros) { 0 } else { 2 * rng.random_range(0..2) - 1 };
            }
            scales.fill(f16::from_f32(rng.random_range(0.01..0.04)));
        })
        .unwrap(),
        _ => {
            let values: Vec<f32> = (0..shape[0]).map(|_| rng.random_range(0.8..1.2)).collect();
            Tensor::f32(&shape, &values).unwrap()
        }
    })
}

#[test]
fn sparse_models_are_within_one_percent_of_their_entropies() {
    let folder = tempfile::tempdir().unwrap();
    for (zeros, ratio) in [(0.31, 19.5), (0.77, 30.0), (0.926, 63.0), (0.948, 80.0)] {
        let model = sparse(zeros);
        let path = folder.path().join("sparse.ternary");
        write_model(&model, &path, &WriteOptions::default()).unwrap();
        assert!(parts(&read_model(&path).unwrap()) == parts(&model));
        let report = SizeReport::of_file(&path, &model.spec).unwrap();
        let bytes = std::fs::metadata(&path).unwrap().len();
        assert_eq!(report.total.bytes, bytes);
        // Weights at H(z), scales at 13 of 16 bits, norms at 27 of 32 bits, and a header.
        let h = -zeros * zeros.log2() - (1.0 - zeros) * ((1.0 - zeros) / 2.0).log2();
        let (mut weights, mut rest) = (0, 0);
        for tensor in model.tensors.values() {
            match tensor.ternary_group() {
                Some(_) => {
                    (weights, rest) = (weights + tensor.rows() * tensor.cols(), rest + 13 * tensor.rows())
                }
                None => rest += 27 * tensor.cols(),
            }
        }
        let ideal = (weights as f64 * h + rest as f64) / 8.0;
        assert!((bytes as f64) < 1.01 * ideal + 1000.0, "{zeros}: {bytes} of {ideal}");
        println!(
            "zeros {zeros}: H(z) {h:.4}, {bytes} bytes, {:.2}x, ideal {ideal:.0}\n{report}",
            report.total.compression
        );
        assert!(report.total.compression > ratio, "{zeros}: {}", report.total.compression);
        assert!(report.embedding.compression > ratio && report.head.bytes == 0);
    }
}

#[test]
fn options_select_the_encodings_of_an_archive() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.ternary");
    let options = WriteOptions::default()
        .with_weights(Some(WeightType::Encoded(Encoding::Tq2_0)))
        .with_embedding(Some(Encoding::Q8_0));
    let model = sparse(0.5);
    write_model(&model, &path, &options).unwrap();
    let found = read_model(&path).unwrap();
    for (name, tensor) in &found.tensors {
        let expected = match (name.as_str(), tensor.shape().len()) {
            ("token_embd.weight", _) => Encoding::Q8_0,
            (_, 2) => Encoding::Tq2_0,
            _ => Encoding::F32,
        };
        assert_eq!(tensor.encoding(), expected, "{name}");
        assert_eq!(tensor.bytes(), model.tensors[name].encode(expected).unwrap().bytes());
    }
    let options = WriteOptions::default().with_weights(Some(WeightType::Int2));
    let error = write_model(&model, &path, &options).unwrap_err();
    assert!(matches!(error, FormatError::WeightType { .. }), "{error}");
}

#[test]
fn tokenizers_round_trip_in_few_bytes() {
    for (path, most) in
        [("tokenizers/gpt2", 170_000), ("tokenizers/smollm2", 170_000), ("models/stories260k", 1500)]
    {
        let path = format!("{}/../../../shared/data/{path}/tokenizer.json", env!("CARGO_MANIFEST_DIR"));
        let Ok(tokenizer) = Tokenizer::load(Path::new(&path)) else {
            println!("skipped: {path}: no reference data");
            continue;
        };
        let mut model = model(spec(Family::Llama, 2, 1), |_, shape| {
            Tensor::f32(&shape, &vec![0.0; shape.iter().product()]).unwrap()
        });
        model.chat_template = None;
        model.spec.vocab_size = tokenizer.vocab_size();
        let table = vec![0.0; 2 * tokenizer.vocab_size()];
        model.tensors.insert("token_embd.weight".into(), Tensor::f32(&[table.len() / 2, 2], &table).unwrap());
        model.tokenizer = Some(tokenizer);
        let with = check(&model);
        model.tokenizer = None;
        let size = with - check(&model);
        println!("{path}: {size} bytes");
        assert!(size < most, "{path}: {size}");
    }
}

/// `cargo test --release -p ternary-format --test archive -- --ignored --nocapture`
#[test]
#[ignore = "takes seconds; prints the speed"]
fn speed() {
    let (rows, cols) = (100_000, 1024);
    for zeros in [0.33, 0.95] {
        let mut rng = StdRng::seed_from_u64(6);
        let spec = spec(Family::Llama, cols, 1).with_vocab_size(rows);
        let model = model(spec, |name, shape| match name {
            "token_embd.weight" => Tensor::ternary(rows, cols, cols, |_, codes, scales| {
                for code in codes {
                    *code = if rng.random_bool(zeros) { 0 } else { 2 * rng.random_range(0..2) - 1 };
                }
                scales.fill(f16::ONE);
            })
            .unwrap(),
            _ => Tensor::f32(&shape, &vec![0.0; shape.iter().product()]).unwrap(),
        });
        let stored = model.tensors["token_embd.weight"].bytes().len() as f64 / 1e6;
        let start = Instant::now();
        let file = packed(&model);
        let pack = start.elapsed().as_secs_f64();
        let start = Instant::now();
        unpacked(&file).unwrap();
        let unpack = start.elapsed().as_secs_f64();
        let mb = |seconds: f64| {
            format!("{:.1} MB/s ({:.0} M weights/s)", stored / seconds, 1e-6 * (rows * cols) as f64 / seconds)
        };
        println!(
            "zeros {zeros}: {stored:.1} MB to {:.1} MB, packed at {}, unpacked at {}",
            file.len() as f64 / 1e6,
            mb(pack),
            mb(unpack)
        );
    }
}
