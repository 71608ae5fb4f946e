//! Training as a supervisor starts it.

#![cfg(unix)]

use crate::home;
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
