//! Training as a supervisor starts it.

#![cfg(unix)]

use crate::{failure, home, output};
use std::{
    fs::{self, File, OpenOptions},
    process::{Command, Stdio},
};

#[test]
fn a_training_whose_errors_cannot_be_written_trains() {
    let home = home();
    fs::write(home.path().join("text.txt"), "The duck swims on the pond.\n".repeat(200)).unwrap();
    let closed = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        Stdio::from(writer)
    };
    let full = || OpenOptions::new().write(true).open("/dev/full").map(File::into);
    let train = |errors: Stdio| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_duck"));
        command
            .current_dir(&home)
            .args(["train", "--resume", "--quiet", "--data", "text.txt", "--device", "flex"]);
        command.args([
            "--tokenizer",
            "byte",
            "--steps",
            "2",
            "--batch-size",
            "2",
            "--set",
            "model.context=64",
        ]);
        command.args(["--set", "run.sample_tokens=0"]);
        // One more line: a name that no CPU has.
        command.env("TERNARY_ISA", "quack").stdout(Stdio::null()).stderr(errors);
        assert!(command.status().unwrap().success());
    };
    // A run that begins, and one that goes on from its checkpoint, both say so.
    train(closed());
    match full() {
        Ok(full) => train(full),
        Err(error) => println!("skipped: /dev/full: {error}"),
    }
    train(closed());
    assert!(home.path().join("runs/00-default-1/result.json").exists());
}

/// Errors of the arguments are reported before those of the run folder.
#[test]
fn wrong_arguments_are_reported_before_an_existing_run() {
    let home = home();
    fs::create_dir_all(home.path().join("runs/00-default-1")).unwrap();
    fs::write(home.path().join("runs/00-default-1/metrics.jsonl"), "").unwrap();
    assert!(failure(&home, &["train", "--device", "flex"], 2).contains("--resume continues it"));
    let error = failure(&home, &["train", "--device", "flex", "--data", "nofolder"], 3);
    assert!(error.contains("nofolder") && !error.contains("--resume"), "{error}");
    assert!(failure(&home, &["train", "--device", "abacus"], 2).contains("abacus"));
}

/// Rows of 96 weights fit no ternary type of GGUF.
#[test]
fn a_model_that_fits_no_gguf_file_names_the_command_that_writes_it() {
    let home = home();
    fs::write(home.path().join("text.txt"), "The duck swims on the pond.\n".repeat(200)).unwrap();
    let train = "train --quiet --data text.txt --tokenizer byte --device flex --steps 2 --batch-size 2 --set run.name=x \
                 --set model.context=32 --set model.d_model=64 --set model.d_ff=96 --set run.sample_tokens=0";
    let summary = output(&home, &train.split_whitespace().collect::<Vec<_>>());
    let line =
        summary.lines().find(|line| line.starts_with("as an archive")).unwrap_or_else(|| panic!("{summary}"));
    let command = line.split_once("duck ").unwrap_or_else(|| panic!("{line}")).1;
    output(&home, &command.split(' ').collect::<Vec<_>>());
    output(&home, &["generate", "x.ternary", "--prompt", "The", "--max-tokens", "2"]);
}

#[test]
fn a_run_that_no_file_can_store_is_refused_with_the_setting() {
    let home = home();
    fs::write(home.path().join("text.txt"), "The duck swims on the pond.\n".repeat(200)).unwrap();
    let train = ["train", "--quiet", "--data", "text.txt", "--tokenizer", "byte", "--device", "flex"];
    let small =
        ["--steps", "2", "--batch-size", "2", "--set", "model.context=64", "--set", "run.sample_tokens=0"];
    output(&home, &[&train[..], &small, &["--set", "quant.input_norm=true"]].concat());
    let error = failure(&home, &["chat", "runs/00-default-1"], 3);
    for part in [
        "runs/00-default-1: there is no model.gguf, and no checkpoint can be exported: ",
        "input_norm = false",
    ] {
        assert!(error.contains(part), "{error}");
    }
}
