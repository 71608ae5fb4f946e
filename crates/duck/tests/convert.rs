//! From a float model to a ternary one.

use crate::{failure, home, json, model, output};
use std::fs;
use ternary_format::{Encoding, WriteOptions, write_model};

#[test]
fn convert_reports_the_loss_of_a_float_model_before_and_after() {
    let home = home();
    let float = model(Encoding::F32, Encoding::F32, 3);
    write_model(&float, &home.path().join("float.gguf"), &WriteOptions::default()).unwrap();
    fs::write(home.path().join("text.txt"), "The duck swims on the pond.\n".repeat(200)).unwrap();
    let convert =
        ["convert", "--from", "float.gguf", "--data", "text.txt", "--device", "flex", "--steps", "20"];
    let fast = ["--batch-size", "4", "--set", "run.sample_tokens=0", "--set", "model.context=64", "--quiet"];
    let summary = output(&home, &[&convert[..], &fast].concat());
    let number = |name: &str| -> f64 {
        let line =
            summary.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{summary}"));
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    let [before, rounded, after] = ["start, float", "start, rounded", "packed valid loss"].map(number);
    assert!(before != rounded && after < before.min(rounded), "{summary}");
    let report = json(&output(&home, &["inspect", "runs/converted-1", "--json"]));
    assert_eq!((&report["spec"]["d_model"], &report["tokens"]), (&64.into(), &259.into()));
    assert!(report["zero_fraction"].as_f64().unwrap() > 0.2, "{report}");
    let experiment = fs::read_to_string(home.path().join("runs/converted-1/experiment.toml")).unwrap();
    for line in ["start_from = \"float.gguf\"", "teacher = \"float.gguf\"", "tokenizer = \"float.gguf\""] {
        assert!(experiment.contains(line), "{experiment}");
    }
}

#[test]
fn a_folder_is_named_without_a_slash() {
    let home = home();
    let float = model(Encoding::F32, Encoding::F32, 3);
    let options = WriteOptions::default().with_weights(Some("F32".parse().unwrap()));
    write_model(&float, &home.path().join("float"), &options).unwrap();
    fs::write(home.path().join("text.txt"), "The duck swims on the pond.\n".repeat(200)).unwrap();
    let convert =
        ["convert", "--from", "float", "--data", "text.txt", "--device", "flex", "--steps", "1", "--quiet"];
    assert!(output(&home, &convert).contains("start, rounded"));
}

#[test]
fn an_impossible_conversion_is_an_error() {
    let home = home();
    fs::write(home.path().join("text.txt"), "The duck swims on the pond.\n".repeat(200)).unwrap();
    let error = failure(&home, &["convert", "--from", "model.gguf"], 2);
    assert!(error.contains("--data") && error.contains("--experiment"), "{error}");
    let error = failure(&home, &["convert", "--from", "missing.gguf", "--data", "text.txt"], 3);
    assert!(error.contains("missing.gguf"), "{error}");
    // This one is ternary already.
    let ternary = ["convert", "--from", "model.gguf", "--data", "text.txt", "--quiet", "--device", "flex"];
    let error = failure(&home, &ternary, 2);
    assert!(error.contains("is ternary") && error.contains("quant.scale"), "{error}");
}

#[test]
fn a_run_reads_the_cached_logits_of_a_teacher() {
    let home = home();
    let float = model(Encoding::F32, Encoding::F32, 3);
    write_model(&float, &home.path().join("float.gguf"), &WriteOptions::default()).unwrap();
    fs::write(home.path().join("text.txt"), "The duck swims on the pond.\n".repeat(200)).unwrap();
    let flags =
        ["--data", "text.txt", "--tokenizer", "byte", "--device", "flex", "--set", "model.context=64"];
    let record = [&["distill-logits"], &flags[..]].concat();
    output(&home, &[&record[..], &["--teacher", "float.gguf", "--top", "5"]].concat());
    let recording = fs::metadata(home.path().join("runs/00-default-1/teacher.logits")).unwrap();
    let tokens = fs::metadata(home.path().join("runs/00-default-1/train.tokens")).unwrap();
    // Five tokens of 6 bytes for each word of 4, behind headers of 96 and 72.
    assert_eq!(recording.len() - 96, (tokens.len() - 72) / 4 * 30);
    let train = ["train", "--quiet", "--steps", "2", "--batch-size", "2", "--set", "run.sample_tokens=0"];
    let teacher = ["--set", "distill.teacher=runs/00-default-1/teacher.logits"];
    output(&home, &[&train[..], &flags, &teacher].concat());
    let metrics = fs::read_to_string(home.path().join("runs/00-default-1/metrics.jsonl")).unwrap();
    assert!(metrics.contains("\"divergence\":"), "{metrics}");

    let error = failure(&home, &[&record[..], &["--steps", "2"]].concat(), 2);
    assert!(error.contains("--steps"), "{error}");
    let error = failure(&home, &[&record[..], &["--to", "other.logits"]].concat(), 2);
    assert!(error.contains("expected a run folder or a model file"), "{error}");
    assert!(!home.path().join("other.logits").exists());
}
