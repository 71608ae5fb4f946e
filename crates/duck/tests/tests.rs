//! The interface of the program for scripts and users: outputs, exit codes, and errors of one line.

mod adapter;
mod broken;
mod chat;
#[cfg(feature = "train")]
mod convert;
mod disk;
mod eval;
mod file;
#[cfg(target_os = "linux")]
mod memory;
#[cfg(feature = "train")]
mod new;
mod serve;
#[cfg(all(feature = "train", unix))]
mod signals;
#[cfg(feature = "train")]
mod train;
mod usage;

use assert_cmd::Command;
use serde_json::Value;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use ternary_format::{
    Activation, Encoding, Family, ModelSpec, PackedModel, Tokenizer, WriteOptions, chat::TEMPLATE,
    write_model,
};

/// The program, in a folder of its own.
fn duck(home: &TempDir, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_duck"));
    command.current_dir(home).args(arguments).env_remove("DUCK_API_KEY").env_remove("DUCK_LOG");
    command
}

/// A folder with `model.gguf`: a small random model with a byte tokenizer.
fn home() -> TempDir {
    let home = tempfile::tempdir().unwrap();
    write(&home.path().join("model.gguf"), 1);
    home
}

fn write(path: &Path, seed: u64) {
    write_model(&model(Encoding::Q2_0, Encoding::Q8_0, seed), path, &WriteOptions::default()).unwrap();
}

fn model(matrices: Encoding, table: Encoding, seed: u64) -> PackedModel {
    let tokenizer = Tokenizer::byte();
    let spec = ModelSpec::new(Family::Llama)
        .with_vocab_size(tokenizer.vocab_size())
        .with_context(128)
        .with_d_model(64)
        .with_n_layers(2)
        .with_n_heads(4)
        .with_n_kv_heads(2)
        .with_d_ff(128)
        .with_activation(Activation::Swiglu)
        .with_tied(true)
        .with_norm_eps(1e-5)
        .with_rope_theta(10_000.0);
    let mut model = ternary_infer::random::model(&spec, |_| matrices, table, seed).unwrap();
    model.tokenizer = Some(tokenizer);
    model.chat_template = Some(TEMPLATE.into());
    model
}

/// Standard output of a command that succeeds.
fn output(home: &TempDir, arguments: &[&str]) -> String {
    piped(home, arguments, "")
}

/// The same, with something on standard input.
fn piped(home: &TempDir, arguments: &[&str], input: &str) -> String {
    let assert = duck(home, arguments).write_stdin(input).assert().success();
    String::from_utf8(assert.get_output().stdout.clone()).unwrap()
}

fn json(text: &str) -> Value {
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    serde_json::from_str(text).unwrap()
}

/// Runs a command that fails with `code`, and returns its error: one line, with an empty standard output.
fn failure(home: &TempDir, arguments: &[&str], code: i32) -> String {
    let assert = duck(home, arguments).assert().code(code);
    let output = assert.get_output();
    let error = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(output.stdout.is_empty() && error.starts_with("error: "), "{arguments:?}: {error}");
    error
}

/// A path of the shared test data; prints that it is skipped if it is missing.
fn shared(path: &str) -> Option<PathBuf> {
    let full = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data").join(path);
    if full.exists() {
        return Some(full);
    }
    println!("skipped: ../shared/data/{path}: not there");
    None
}
