//! Promise: bad input, files and disks cause a clear error and an exit code, no panic, and overwrite nothing.

use burn_ternary::run::{Experiment, RunOptions, TrainCommand, TrainError, run};
use clap::Parser;
use std::fs;
use std::path::Path;

fn command(out: &Path, arguments: &[&str]) -> TrainCommand {
    let out = out.to_str().unwrap();
    let small = ["--set", "model.d_model=32", "--set", "model.d_ff=32", "--set", "model.n_layers=1"];
    let short =
        ["--device", "flex", "--steps", "6", "--set", "run.sample_tokens=4", "--set", "run.eval_windows=2"];
    let all = [&["train", "--quiet", "--out", out][..], &small, &short, arguments].concat();
    TrainCommand::try_parse_from(all).unwrap()
}

/// The error of a command, with its exit code.
fn refusal(out: &Path, arguments: &[&str]) -> (u8, String) {
    let error = command(out, arguments).run().unwrap_err();
    (error.exit_code(), error.to_string())
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> String {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().into()
}

#[test]
fn bad_data_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("runs");
    let missing = dir.path().join("missing.txt").to_str().unwrap().to_owned();
    let empty = write(dir.path(), "empty.txt", b"");
    let binary = write(dir.path(), "binary.txt", b"good text\xff\xfe");
    let short = write(dir.path(), "short.txt", b"too short");
    let broken = write(dir.path(), "broken.jsonl", b"{\"text\": \"fine\"}\n{\"text\": 3}\n");
    let not_a_tokenizer = write(dir.path(), "tokenizer.json", b"{\"model\": 1}");
    let folder = dir.path().join("folder");
    fs::create_dir(&folder).unwrap();
    let folder = folder.to_str().unwrap().to_owned();
    for (arguments, fragment) in [
        (vec!["--data", &missing], "missing.txt"),
        (vec!["--data", &empty], "empty.txt"),
        (vec!["--data", &binary], "binary.txt"),
        (vec!["--data", &short, "--tokenizer", "byte"], "token"),
        (vec!["--data", &broken], "broken.jsonl"),
        (vec!["--data", &folder], "folder"),
        (vec!["--tokenizer", &not_a_tokenizer], "tokenizer.json"),
    ] {
        let (code, message) = refusal(&out, &arguments);
        assert_eq!(code, 3, "{message}");
        assert!(message.contains(fragment), "{arguments:?}: {message}");
    }
}

#[test]
fn what_only_flex_has_is_refused_on_other_devices() {
    if let Err(error) = burn_ternary::device::device("ndarray") {
        println!("skipped: device ndarray: {error}");
        return;
    }
    let out = tempfile::tempdir().unwrap();
    for (key, assignments) in [
        ("quant.matmul_precision", &["quant.activations=int8", "quant.matmul_precision=int8"][..]),
        ("quant.matmul_precision", &["quant.matmul_precision=bf16"]),
        ("optim.moments", &["optim.moments=int8"]),
    ] {
        let mut experiment = Experiment::load("experiments/00-default.toml").unwrap();
        let place = format!("run.out_dir={}", out.path().display());
        for assignment in [place.as_str(), "run.device=ndarray"].iter().chain(assignments) {
            experiment.set(assignment).unwrap();
        }
        let error = run(experiment, &RunOptions::default().with_quiet(true)).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(key) && message.contains("run.device = \"flex\""), "{message}");
        assert_eq!(error.exit_code(), 2);
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "it left something");
    }
}

#[test]
fn a_tokenizer_that_does_not_fit_the_model_is_named_with_both_sizes() {
    let out = tempfile::tempdir().unwrap();
    let (code, message) = refusal(out.path(), &["--tokenizer", "byte", "--set", "model.vocab_size=100"]);
    assert_eq!(code, 2);
    assert!(message.contains("model.vocab_size = 100") && message.contains("259"), "{message}");
}

#[test]
fn an_output_folder_that_cannot_be_made_is_an_error_of_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    // A file in place of a folder stops root too, unlike permissions.
    let file = write(dir.path(), "file", b"mine");
    let (code, message) = refusal(Path::new(&file), &[]);
    assert_eq!(code, 5, "{message}");
    assert!(message.contains(&file), "{message}");
    assert_eq!(fs::read(&file).unwrap(), b"mine");
}

#[test]
fn a_file_that_cannot_be_written_is_named_before_the_first_step() {
    let out = tempfile::tempdir().unwrap();
    let mut experiment = command(out.path(), &[]).experiment().unwrap();
    experiment.set("run.sample_prompts=[\"a\"]").unwrap();
    let run_dir = experiment.run_dir();
    fs::create_dir_all(&run_dir).unwrap();
    fs::create_dir(run_dir.join("samples.txt")).unwrap();
    let error = run(experiment, &RunOptions::default().with_quiet(true)).unwrap_err();
    assert_eq!(error.exit_code(), 5);
    assert!(error.to_string().contains("samples.txt"), "{error}");
    assert_eq!(fs::read(run_dir.join("metrics.jsonl")).unwrap(), b"");

    let out = tempfile::tempdir().unwrap();
    let run_dir = command(out.path(), &[]).experiment().unwrap().run_dir();
    fs::create_dir_all(run_dir.join("train.tokens")).unwrap();
    let (code, message) = refusal(out.path(), &[]);
    assert_eq!(code, 5, "{message}");
    assert!(message.contains("train.tokens"), "{message}");
}

#[test]
fn a_run_is_never_overwritten() {
    let out = tempfile::tempdir().unwrap();
    let first = command(out.path(), &[]);
    first.run().unwrap();
    let run_dir = first.experiment().unwrap().run_dir();
    let metrics = fs::read(run_dir.join("metrics.jsonl")).unwrap();
    let (code, message) = refusal(out.path(), &[]);
    assert_eq!(code, 2);
    assert!(message.contains("--resume") && message.contains("--overwrite"), "{message}");
    assert_eq!(fs::read(run_dir.join("metrics.jsonl")).unwrap(), metrics);
    command(out.path(), &["--overwrite"]).run().unwrap();
    let aside = run_dir.with_file_name(format!("{}.old-1", run_dir.file_name().unwrap().to_str().unwrap()));
    assert_eq!(fs::read(aside.join("metrics.jsonl")).unwrap(), metrics);
}

#[test]
fn a_model_that_cannot_fit_into_memory_is_refused_before_it_is_made() {
    let out = tempfile::tempdir().unwrap();
    let big = ["--set", "model.d_model=65536", "--set", "model.d_ff=262144", "--set", "model.n_layers=200"];
    let (code, message) = refusal(out.path(), &big);
    assert_eq!(code, 4);
    assert!(message.contains("MiB"), "{message}");
}

#[test]
fn a_diverging_run_skips_steps_rolls_back_and_stops() {
    let out = tempfile::tempdir().unwrap();
    let mut experiment = command(out.path(), &[]).experiment().unwrap();
    for assignment in [
        "run.steps=60",
        "run.checkpoint_every=2",
        "run.log_every=1",
        "run.max_bad_steps=2",
        "run.max_rollbacks=2",
        // Grows without bound: every norm and logit overflows after some steps.
        "optim.matrix_optimizer=adamw",
        "optim.lr=1e18",
        "schedule.warmup_steps=0",
        "optim.clip_norm=0.0",
    ] {
        experiment.set(assignment).unwrap();
    }
    let error = run(experiment.clone(), &RunOptions::default().with_quiet(true)).unwrap_err();
    assert_eq!(error.exit_code(), 6, "{error}");
    let TrainError::Diverged { checkpoint, rollbacks, .. } = error else { panic!("{error}") };
    let result = fs::read_to_string(experiment.run_dir().join("result.json")).unwrap();
    assert!(result.contains("diverged"), "{result}");
    if let Some(checkpoint) = checkpoint {
        assert_eq!(rollbacks, 2);
        assert!(checkpoint.join("manifest.json").exists());
    }
}

#[test]
fn the_default_experiment_can_be_loaded_from_its_file_too() {
    let file = Experiment::load("experiments/00-default.toml").unwrap();
    let embedded = TrainCommand::try_parse_from(["train"]).unwrap().experiment().unwrap();
    assert_eq!(file, embedded);
}
