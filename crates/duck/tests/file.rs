//! Model files: `inspect`, `export`, `bench` and `generate`.

use crate::{duck, failure, home, json, output, piped, shared, write};
use std::fs;

#[test]
fn inspect_counts_what_is_in_the_file() {
    let home = home();
    let report = json(&output(&home, &["inspect", "model.gguf", "--json"]));
    let tensors = report["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), 2 + 2 * 9);
    let bytes: u64 = tensors.iter().map(|tensor| tensor["bytes"].as_u64().unwrap()).sum();
    let file = fs::metadata(home.path().join("model.gguf")).unwrap().len();
    assert!(bytes < file && file < bytes + 16_384, "{bytes} of {file}");
    assert_eq!(report["spec"]["family"], "llama");
    assert_eq!(report["tokens"], 259);
    let query = tensors.iter().find(|tensor| tensor["name"] == "blk.0.attn_q.weight").unwrap();
    assert_eq!((&query["encoding"], &query["bits_per_weight"]), (&"Q2_0".into(), &2.25.into()));
    // The codes are drawn evenly.
    for share in [&report["zero_fraction"], &query["zero_fraction"]] {
        assert!((share.as_f64().unwrap() - 1.0 / 3.0).abs() < 0.03, "{share}");
    }
    let table = output(&home, &["inspect", "model.gguf"]);
    assert!(table.contains("blk.1.ffn_down.weight") && table.contains("64 x 128"), "{table}");
    assert!(table.contains("Q2_0") && table.contains("2.250") && table.contains("bits/weight"), "{table}");
}

#[test]
fn without_a_model_commands_use_the_built_in_duck() {
    let home = home();
    assert_eq!(json(&output(&home, &["inspect", "--json"]))["model"], "duck");
    let generate = ["generate", "--prompt", "a", "--max-tokens", "4", "--json"];
    assert_eq!(json(&output(&home, &generate))["model"], "duck");
    assert_eq!(piped(&home, &["chat", "--max-tokens", "4", "--json"], "hi\n").lines().count(), 1);
    let bench = ["bench", "--prompt", "8", "--generate", "4", "--repetitions", "1", "--json"];
    assert_eq!(json(&output(&home, &bench))["model"], "duck");
}

#[test]
fn an_exported_model_is_the_same_model() {
    let home = home();
    let loss = |model: &str| {
        fs::write(home.path().join("text.txt"), "the duck swims on the pond").unwrap();
        json(&output(&home, &["eval", model, "--data", "text.txt", "--json"]))["files"][0]["models"][0]["loss"]["value"]
            .as_f64()
            .unwrap()
    };
    let first = loss("model.gguf");
    for (out, flags) in [
        ("other.gguf", &[][..]),
        ("archive.ternary", &[]),
        ("floats.gguf", &["--type", "F32"]),
        ("folder", &["--type", "F32", "--json"]),
    ] {
        let printed = output(&home, &[&["export", "model.gguf", out], flags].concat());
        assert!((loss(out) - first).abs() < 1e-2, "{out}");
        assert!(printed.contains("blocks"), "{printed}");
        let error = failure(&home, &["export", "model.gguf", out], 2);
        let expected =
            if out == "folder" { "folder: a folder is there already" } else { "--overwrite replaces it" };
        assert!(error.contains(expected), "{error}");
    }
    let export = ["export", "model.gguf", "again.gguf"];
    let assert = duck(&home, &export).assert().success();
    let said = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
    assert!(said.starts_with("wrote again.gguf (") && said.ends_with(" kB, weights as Q2_0)\n"), "{said}");
    let error = failure(&home, &["export", "model.gguf", "a.gguf", "--type", "INT2"], 3);
    assert!(
        error.contains("weight type INT2, expected F32, F16, Q8_0, Q4_0, TQ1_0, TQ2_0 or Q2_0"),
        "{error}"
    );
    // Sizes of an archive are those of the file.
    let report = json(&output(&home, &["inspect", "archive.ternary", "--json"]));
    assert_eq!(
        report["sizes"]["total"]["bytes"],
        fs::metadata(home.path().join("archive.ternary")).unwrap().len()
    );
    assert!(output(&home, &["inspect", "archive.ternary"]).contains("compressed, as in the file"));
    let sizes = json(&output(&home, &["export", "model.gguf", "model.onnx", "--type", "INT2", "--json"]));
    let file = fs::metadata(home.path().join("model.onnx")).unwrap().len();
    assert_eq!(sizes["total"]["bytes"], file);
    let error = failure(&home, &["export", "model.gguf", "missing/out.gguf"], 5);
    assert!(error.ends_with("missing/out.gguf: the folder missing does not exist\n"), "{error}");
    // TQ2_0 needs rows of whole blocks of 256 weights, and bitnet one scale per matrix.
    assert!(failure(&home, &["export", "model.gguf", "a.gguf", "--type", "TQ2_0"], 3).contains("256"));
    let error = failure(&home, &["export", "model.gguf", "bitnet"], 3);
    assert!(error.contains("one scale per matrix") && error.contains("`--type F32`"), "{error}");
    // A folder that is not meant to be one.
    let error = failure(&home, &["export", "model.gguf", "e.bin"], 2);
    assert!(error.contains("e.bin: expected a name that ends in .gguf, .onnx or .ternary"), "{error}");
    output(&home, &["export", "model.gguf", "e.bin/", "--type", "F32"]);
    assert!(home.path().join("e.bin/config.json").exists());
    assert!(!home.path().join("a.gguf").exists());
}

#[test]
fn a_finished_run_folder_is_a_model() {
    let home = home();
    let run = home.path().join("run");
    fs::create_dir(&run).unwrap();
    fs::write(run.join("experiment.toml"), "").unwrap();
    fs::rename(home.path().join("model.gguf"), run.join("model.gguf")).unwrap();
    assert_eq!(json(&output(&home, &["inspect", "run", "--json"]))["spec"]["d_model"], 64);
    output(&home, &["export", "run", "out.gguf"]);
}

#[test]
fn generate_repeats_itself_with_a_seed_only() {
    let home = home();
    let run = |seed: &[&str]| {
        output(
            &home,
            &[&["generate", "model.gguf", "--prompt", "One day", "--max-tokens", "20"], seed].concat(),
        )
    };
    assert_eq!(run(&["--seed", "1"]), run(&["--seed", "1"]));
    assert_ne!(run(&["--seed", "1"]), run(&["--seed", "2"]));
    assert_ne!(run(&[]), run(&[]));
    assert_eq!(run(&["--temperature", "0"]), run(&["--temperature", "0", "--threads", "1"]));
}

#[test]
fn generate_reports_to_scripts_as_json() {
    let home = home();
    let arguments = ["generate", "model.gguf", "--max-tokens", "20", "--seed", "3", "--json"];
    let report = json(&piped(&home, &arguments, "One day\n"));
    assert_eq!(report["prompt"], "One day");
    assert_eq!(report["seed"], 3);
    assert_eq!(report["prompt_tokens"], 7);
    let ended = report["finish"] == "stop";
    assert!(ended || report["finish"] == "max_tokens" && report["tokens"] == 20, "{report}");
    let text = piped(&home, &arguments[..6], "One day\n");
    assert_eq!(text, format!("{}\n", report["text"].as_str().unwrap()));
    // A context that fills up ends the text.
    let full =
        ["generate", "model.gguf", "--context", "10", "--temperature", "0", "--json", "--prompt", "One day"];
    let report = json(&output(&home, &full));
    assert!(report["finish"] == "context" || report["finish"] == "stop", "{report}");
}

#[test]
fn a_published_model_continues_as_its_authors_report() {
    let Some(folder) = shared("models/stories260k") else { return };
    let reference = fs::read_to_string(folder.join("reference.json")).unwrap();
    let reference: serde_json::Value = serde_json::from_str(&reference).unwrap();
    let home = home();
    let folder = folder.to_str().unwrap();
    for case in reference["prompts"].as_array().unwrap() {
        let prompt = case["prompt"].as_str().unwrap();
        let flags = ["--prompt", prompt, "--temperature", "0", "--max-tokens", "32", "--activations", "f32"];
        let text = output(&home, &[&["generate", folder][..], &flags].concat());
        let expected = case["greedy_text"].as_str().unwrap().strip_prefix(prompt).unwrap();
        assert_eq!(text.trim(), expected.trim());
    }
    // It has no chat template: a chat goes on with each line.
    let case = &reference["prompts"][0];
    let flags = ["chat", folder, "--temperature", "0", "--max-tokens", "32", "--activations", "f32"];
    let prompt = case["prompt"].as_str().unwrap();
    let text = duck(&home, &flags).write_stdin(prompt).assert().success().get_output().stdout.clone();
    let expected = case["greedy_text"].as_str().unwrap().strip_prefix(prompt).unwrap();
    assert_eq!(String::from_utf8(text).unwrap().trim(), expected.trim());
}

#[test]
fn bench_reports_speeds_as_a_table_and_as_json() {
    let home = home();
    let flags =
        ["bench", "model.gguf", "--prompt", "16", "--generate", "8", "--batch", "2", "--repetitions", "3"];
    let report = json(&output(&home, &[&flags[..], &["--json", "--cache", "int8"]].concat()));
    for key in ["prompt_speed", "generate_speed", "batch_speed"] {
        let [least, median, most] =
            ["least", "median", "most"].map(|name| report[key][name].as_f64().unwrap());
        assert!(0.0 < least && least <= median && median <= most, "{report}");
    }
    assert_eq!((&report["cache"], &report["prompt"]), (&"int8".into(), &16.into()));
    let table = output(&home, &flags);
    assert!(table.contains("prefill of 16") && table.contains("decode, batch of 2"), "{table}");
}

#[test]
fn two_models_of_one_name_are_distinguished() {
    let home = home();
    write(&home.path().join("other.gguf"), 2);
    let one = output(&home, &["generate", "model.gguf", "--prompt", "a", "--temperature", "0"]);
    let two = output(&home, &["generate", "other.gguf", "--prompt", "a", "--temperature", "0"]);
    assert_ne!(one, two);
}
