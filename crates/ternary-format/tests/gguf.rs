//! GGUF files: they round trip, and have the layout that llama.cpp expects.

use half::f16;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{collections::BTreeMap, path::Path};
use ternary_format::{
    Activation, Encoding, Family, FormatError, ModelSpec, PackedModel, Tensor,
    gguf::{self, GgufOptions},
};

fn spec(family: Family, d_model: usize, d_ff: usize, tied: bool) -> ModelSpec {
    ModelSpec::new(family)
        .with_vocab_size(300)
        .with_context(32)
        .with_d_model(d_model)
        .with_n_layers(2)
        .with_n_heads(8)
        .with_n_kv_heads(if family == Family::Gpt2 { 8 } else { 2 })
        .with_d_ff(d_ff)
        .with_activation(if family == Family::Gpt2 { Activation::Gelu } else { Activation::Swiglu })
        .with_tied(tied)
        .with_norm_eps(1e-5)
        .with_rope_theta(if family == Family::Gpt2 { 1e4 } else { 5e4 })
}

/// A model with random weights: ternary matrices with one scale per row, everything else float.
fn random(spec: ModelSpec, seed: u64) -> PackedModel {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut tensors = BTreeMap::new();
    for (name, shape) in spec.tensors() {
        let tensor = if name.starts_with("blk.") && shape.len() == 2 {
            Tensor::ternary(shape[0], shape[1], shape[1], |_, codes, scales| {
                codes.fill_with(|| rng.random_range(-1..=1));
                scales.fill_with(|| f16::from_f32(rng.random_range(1e-3..1.0)));
            })
        } else {
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
            Tensor::f32(&shape, &values)
        };
        tensors.insert(name, tensor.unwrap());
    }
    PackedModel::new("random", spec, tensors).with_chat_template(Some("{{ messages }}".into()))
}

fn options(blocks: Encoding) -> GgufOptions {
    GgufOptions::new(blocks).with_embedding(Encoding::F16).with_head(Encoding::Q8_0)
}

fn values(tensor: &Tensor) -> Vec<f32> {
    let mut values = vec![0.0; tensor.rows() * tensor.cols()];
    for (row, values) in values.chunks_exact_mut(tensor.cols()).enumerate() {
        tensor.read_row(row, values);
    }
    values
}

fn temporary() -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    (folder, path)
}

#[test]
fn every_family_and_encoding_survives() {
    let (folder, path) = temporary();
    for family in [Family::Gpt2, Family::Llama, Family::Bitnet] {
        for tied in [true, false] {
            let model = random(spec(family, 256, 512, tied), 1);
            for blocks in [
                Encoding::Tq1_0,
                Encoding::Tq2_0,
                Encoding::Q2_0,
                Encoding::Q8_0,
                Encoding::Q4_0,
                Encoding::F32,
                Encoding::F16,
            ] {
                let written = gguf::write(&model, &path, &options(blocks));
                if family == Family::Bitnet && !tied {
                    assert!(matches!(written, Err(FormatError::NotInGguf { .. })));
                    continue;
                }
                written.unwrap();
                let read = gguf::read(&path).unwrap();
                assert_eq!(read.spec, model.spec);
                assert_eq!((&read.name, &read.chat_template), (&model.name, &model.chat_template));
                read.validate().unwrap();
                for (name, tensor) in &model.tensors {
                    let found = &read.tensors[name];
                    let expected = match name.as_str() {
                        "token_embd.weight" => tensor.encode(Encoding::F16),
                        "output.weight" => tensor.encode(Encoding::Q8_0),

                        _ => Ok(tensor.clone()),
                    };
                    assert_eq!(values(found), values(&expected.unwrap()), "{family:?} {blocks} {name}");
                }
            }
        }
    }
    // No scratch file is left.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn errors_of_widths_name_the_setting() {
    let (folder, path) = temporary();
    let error = |spec: ModelSpec, blocks| gguf::write(&random(spec, 2), &path, &options(blocks)).unwrap_err();
    let narrow = spec(Family::Llama, 256, 384, true);
    assert_eq!(
        error(narrow.clone(), Encoding::Tq2_0).to_string(),
        "tensor `blk.0.ffn_down.weight`: d_ff is 384, TQ2_0 needs a multiple of 256: use Q2_0 (`--type Q2_0` of duck export), \
         a .ternary or an .onnx file, or train with d_ff a multiple of 256"
    );
    assert!(error(spec(Family::Llama, 96, 96, true), Encoding::Q2_0).to_string().contains("d_model is 96"));
    let squared = narrow.with_activation(Activation::SquaredRelu);
    assert!(error(squared, Encoding::Q2_0).to_string().contains("squared_relu in the llama family"));
    // A float model is never rounded to ternary.
    let mut model = random(spec(Family::Gpt2, 256, 256, true), 3);
    let name = "blk.1.attn_v.weight";
    model.tensors.insert(name.into(), Tensor::f32(&[256, 256], &[0.5; 256 * 256]).unwrap());
    let error = gguf::write(&model, &path, &options(Encoding::Tq1_0)).unwrap_err();
    assert!(
        matches!(error.kind(), FormatError::NotTernary { .. }) && error.to_string().contains(name),
        "{error}"
    );
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// Rows of queries and keys are in the order of interleaved rotation, as the converter of llama.cpp writes them.
/// Attention scores do not depend on this order if both share it.
#[test]
fn queries_and_keys_are_permuted_as_llama_cpp_does() {
    let (_folder, path) = temporary();
    let model = random(spec(Family::Llama, 256, 256, true), 5);
    gguf::write(&model, &path, &options(Encoding::F32)).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let name = b"blk.0.attn_q.weight";
    assert!(bytes.windows(name.len()).any(|window| window == name));
    let ours = values(&model.tensors["blk.0.attn_q.weight"]);
    // weights.reshape(n_head, 2, head_dim / 2, cols).swapaxes(1, 2)
    let mut expected = Vec::new();
    for head in 0..8 {
        for pair in 0..16 {
            for half in 0..2 {
                let row = head * 32 + half * 16 + pair;
                expected
                    .extend(ours[row * 256..(row + 1) * 256].iter().flat_map(|value| value.to_le_bytes()));
            }
        }
    }
    assert!(bytes.windows(expected.len()).any(|window| window == expected));
}

#[test]
fn the_reference_file_is_read() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/gguf_ternary/fixture.gguf");
    if !Path::new(path).exists() {
        println!("skipped: {path}: no reference data");
        return;
    }
    // The file has tensors but no model. This is detected after the container was parsed.
    let error = gguf::read(Path::new(path)).unwrap_err();
    assert!(matches!(error.kind(), FormatError::MissingKey { .. }), "{error}");
}
