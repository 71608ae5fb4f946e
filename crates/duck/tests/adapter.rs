//! LoRA adapters applied to models.

use crate::{duck, failure, home, json, model, output};
use serde_json::Value;
use std::fs;
use tempfile::TempDir;
use ternary_format::{
    Adapter, Encoding, LowRank, WriteOptions,
    huggingface::{read_adapter, write_adapter},
    read_model, write_model,
};

/// A folder with `model.gguf`, `adapter` for its queries and values, and `float.gguf` of the same shape.
fn adapted() -> TempDir {
    let home = home();
    let float = model(Encoding::F32, Encoding::F32, 3);
    write_model(&float, &home.path().join("float.gguf"), &WriteOptions::default()).unwrap();
    let chosen = float.tensors.iter().filter(|(name, _)| name.contains("attn_q") || name.contains("attn_v"));
    let pairs = chosen.map(|(name, tensor)| {
        let values = |n: usize| (0..n).map(|i| (i * 31 % 17) as f32 / 17.0 - 0.5).collect::<Vec<f32>>();
        let pair = LowRank::new(2, 4.0, values(2 * tensor.cols()), values(2 * tensor.rows()));
        (name.clone(), pair.unwrap())
    });
    let adapter = Adapter::new(pairs.collect());
    write_adapter(&adapter, &float.spec, "model.gguf", &home.path().join("adapter")).unwrap();
    fs::write(home.path().join("text.txt"), "the duck swims on the pond").unwrap();
    home
}

fn loss(home: &TempDir, model: &str, flags: &[&str]) -> f64 {
    let eval = ["eval", model, "--data", "text.txt", "--activations", "f32", "--json"];
    json(&output(home, &[&eval[..], flags].concat()))["files"][0]["models"][0]["loss"]["value"]
        .as_f64()
        .unwrap()
}

#[test]
fn every_command_takes_an_adapter_and_export_merges_it() {
    let home = adapted();
    let beside = ["--adapter", "adapter"];
    for model in ["model.gguf", "float.gguf"] {
        assert!((loss(&home, model, &[]) - loss(&home, model, &beside)).abs() > 1e-3, "{model}");
        let generate = ["generate", model, "--prompt", "One day", "--temperature", "0", "--json"];
        let text = |flags: &[&str]| json(&output(&home, &[&generate[..], flags].concat()))["text"].clone();
        let [without, with]: [Value; 2] = [text(&[]), text(&beside)];
        assert_ne!(without, with, "{model}");
    }
    output(&home, &["export", "float.gguf", "merged.gguf", "--adapter", "adapter"]);
    let (merged, with) = (loss(&home, "merged.gguf", &[]), loss(&home, "float.gguf", &beside));
    assert!((merged - with).abs() < 1e-5, "{merged} {with}");
}

#[test]
fn an_adapter_of_another_model_of_the_same_shape_is_reported() {
    let home = adapted();
    let path = |name: &str| home.path().join(name);
    let float = read_model(&path("float.gguf")).unwrap();
    let own = read_adapter(&path("adapter"), &float.spec).unwrap();
    write_adapter(&own.with_base(&float.tensors), &float.spec, "float.gguf", &path("own")).unwrap();
    output(&home, &["export", "float.gguf", "half.gguf", "--type", "F16"]);
    output(&home, &["export", "float.gguf", "eight.ternary", "--type", "Q8_0"]);
    output(&home, &["export", "float.gguf", "folder", "--type", "F32"]);
    for (model, adapter, reported) in [
        ("float.gguf", "own", false),
        ("half.gguf", "own", false),
        ("eight.ternary", "own", false),
        ("folder", "own", false),
        ("model.gguf", "own", true),
        // As PEFT writes them.
        ("model.gguf", "adapter", false),
    ] {
        let generate = ["generate", model, "--prompt", "a", "--max-tokens", "1", "--adapter", adapter];
        let assert = duck(&home, &generate).assert().success();
        let said = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
        assert_eq!(
            said.contains("own: trained on other weights than those of model.gguf"),
            reported,
            "{model}: {said}"
        );
        assert_eq!(said.is_empty(), !reported, "{model}: {said}");
    }
}

#[test]
fn an_invalid_adapter_is_an_error() {
    let home = adapted();
    let error = failure(&home, &["export", "model.gguf", "merged.gguf", "--adapter", "adapter"], 3);
    assert!(error.contains("cannot be merged") && error.contains("--adapter"), "{error}");
    assert!(!home.path().join("merged.gguf").exists());
    let generate = ["generate", "model.gguf", "--prompt", "a", "--adapter"];
    let refused = |folder: &str| failure(&home, &[&generate[..], &[folder]].concat(), 3);
    assert!(refused("nowhere").contains("nowhere"));
    assert!(refused("text.txt").contains("text.txt"));
    // One of another shape: the Duck of this program is wider.
    let error = failure(&home, &["generate", "--prompt", "a", "--adapter", "adapter"], 3);
    assert!(error.contains("lora_A") && error.contains("expected shape"), "{error}");
    let path = home.path().join("adapter/adapter_config.json");
    let config = fs::read_to_string(&path).unwrap();
    fs::write(&path, config.replace("\"LORA\"", "\"IA3\"")).unwrap();
    assert!(refused("adapter").contains("peft_type"));
}
