//! Damaged, truncated and foreign model files.

use crate::{duck, failure, home};
use std::{fs, path::Path};

/// Every command that reads a model, up to its path.
const COMMANDS: [&[&str]; 7] = [
    &["inspect"],
    &["generate", "--prompt", "a"],
    &["chat"],
    &["bench"],
    &["serve", "--port", "0"],
    &["eval", "--data", "text.txt"],
    &["export", "--overwrite", "model.gguf"],
];

#[test]
fn a_model_file_that_cannot_be_read_is_one_line_and_exit_code_3() {
    let home = home();
    let path = |name: &str| home.path().join(name);
    let whole = fs::read(path("model.gguf")).unwrap();
    fs::write(path("text.txt"), "a text").unwrap();
    for (name, length) in [("empty", 0), ("magic", 4), ("header", 300), ("half", whole.len() / 2)] {
        fs::write(path(name), &whole[..length]).unwrap();
    }
    fs::write(path("last"), &whole[..whole.len() - 1]).unwrap();
    fs::write(path("noise"), [b'\n'; 500]).unwrap();
    fs::create_dir(path("folder")).unwrap();
    fs::create_dir(path("run")).unwrap();
    fs::write(path("run/experiment.toml"), "").unwrap();
    for name in ["missing", "empty", "magic", "header", "half", "last", "noise", "folder", "run"] {
        for command in COMMANDS {
            let mut arguments = command.to_vec();
            // OUT follows MODEL.
            let place = if command[0] == "export" { arguments.len() - 1 } else { arguments.len() };
            arguments.insert(place, name);
            let error = failure(&home, &arguments, 3);
            assert!(error.lines().count() == 1 && error.contains(name), "{arguments:?}: {error}");
        }
    }
    assert_eq!(fs::read(path("model.gguf")).unwrap(), whole, "an export that fails replaces nothing");
}

#[test]
fn a_path_that_is_not_a_model_is_an_error_with_what_is_expected() {
    let home = home();
    fs::write(home.path().join("text.txt"), "a text").unwrap();
    crate::output(&home, &["export", "model.gguf", "model.onnx", "--type", "INT2"]);
    for (model, said) in [
        (
            "text.txt",
            "text.txt: expected a model (a .gguf or .ternary file, a Hugging Face folder), found a file that begins with \"a te\"",
        ),
        (
            "none.gguf",
            "none.gguf: expected a model (a .gguf or .ternary file, a Hugging Face folder or a run folder), found no file",
        ),
        ("model.onnx", "model.onnx: ONNX files are written for onnxruntime and not read"),
        (
            ".",
            ".: expected a Hugging Face folder (with config.json) or a run folder (with experiment.toml), found neither",
        ),
    ] {
        for command in [&["generate", "--prompt", "a"][..], &["chat"], &["inspect"]] {
            let error = failure(&home, &[command, &[model]].concat(), 3);
            assert!(error.contains(said), "{error}");
        }
    }
}

/// A conversion that overflowed: one weight of the last tensor, a norm, is NaN or infinite.
#[test]
fn a_weight_that_is_not_finite_is_named_by_every_command() {
    let home = home();
    fs::write(home.path().join("text.txt"), "a text").unwrap();
    duck(&home, &["export", "model.gguf", "floats", "--type", "F32"]).assert().success();
    let file = home.path().join("floats/model.safetensors");
    let whole = fs::read(&file).unwrap();
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut damaged = whole.clone();
        let end = damaged.len() - 4;
        damaged[end..].copy_from_slice(&value.to_le_bytes());
        fs::write(&file, damaged).unwrap();
        // `inspect` reports the damage; all other commands refuse the model.
        let table = crate::output(&home, &["inspect", "floats"]);
        assert!(table.contains("\ndamaged       tensor `"), "{table}");
        for command in COMMANDS.into_iter().filter(|command| command[0] != "inspect") {
            let mut arguments = command.to_vec();
            let place = if command[0] == "export" { arguments.len() - 1 } else { arguments.len() };
            arguments.insert(place, "floats");
            let error = failure(&home, &arguments, 3);
            assert!(error.contains("tensor `") && error.contains("finite"), "{arguments:?}: {error}");
        }
    }
}

#[test]
fn a_model_without_a_tokenizer_has_bench_and_inspect_only() {
    let home = home();
    let source = home.path().join("model.gguf");
    let mut model = ternary_format::read_model(&source).unwrap();
    (model.tokenizer, model.chat_template) = (None, None);
    let path = home.path().join("ids.gguf");
    ternary_format::write_model(&model, Path::new(&path), &Default::default()).unwrap();
    fs::write(home.path().join("text.txt"), "a text").unwrap();
    for arguments in [
        &["generate", "ids.gguf", "--prompt", "a"][..],
        &["chat", "ids.gguf"],
        &["serve", "ids.gguf"],
        &["eval", "ids.gguf", "--data", "text.txt"],
    ] {
        assert!(failure(&home, arguments, 3).contains("no tokenizer"), "{arguments:?}");
    }
    crate::output(&home, &["inspect", "ids.gguf"]);
    let sizes = ["--prompt", "8", "--generate", "4", "--batch", "2", "--repetitions", "1"];
    crate::output(&home, &[&["bench", "ids.gguf"][..], &sizes].concat());
}
