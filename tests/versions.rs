//! Promise: experiments and run folders of older versions still open, export and resume.

use burn_ternary::format::{PackedModel, WriteOptions, read_model, write_model};
use burn_ternary::run::{Experiment, RunOptions, SavedRun, run};
use std::{fs, path::Path};
use tempfile::TempDir;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, name) = (entry.as_ref().unwrap().path(), entry.unwrap().file_name());
        match path.is_dir() {
            true => copy(&path, &to.join(name)),
            false => drop(fs::copy(&path, to.join(name)).unwrap()),
        }
    }
}

/// A copy of the run folder of version 0, and its experiment with the paths of the copy.
fn run_of_version_0() -> (TempDir, Experiment) {
    let home = tempfile::tempdir().unwrap();
    copy(&Path::new(FIXTURES).join("v0"), &home.path().join("v0"));
    let folder = home.path().join("v0");
    let mut experiment = Experiment::load(folder.join("run-1/experiment.toml")).unwrap();
    experiment.data.train =
        ["text.txt", "dialogues.jsonl"].map(|name| folder.join(name).display().to_string()).to_vec();
    experiment.run.out_dir = folder.display().to_string();
    (home, experiment)
}

fn valid_loss(run_dir: &Path) -> f64 {
    let result: serde_json::Value =
        serde_json::from_slice(&fs::read(run_dir.join("result.json")).unwrap()).unwrap();
    result["valid_loss"].as_f64().unwrap()
}

#[test]
fn experiments_of_version_0_have_the_settings_of_their_old_keys() {
    let load = |name: &str| Experiment::load(Path::new(FIXTURES).join("v0").join(name)).unwrap();
    let mut expected = Experiment::default();
    for assignment in [
        "data.train=[\"embedded\"]",
        "model.mixed_precision=bf16",
        "optim.matrix_optimizer=adamw",
        "run.name=few-keys",
        "run.gradient_accumulation=4",
    ] {
        expected.set(assignment).unwrap();
    }
    assert_eq!(load("few-keys.toml"), expected);
    let every_key = load("every-key.toml");
    assert_eq!(Experiment::parse(&every_key.to_toml(), "written").unwrap(), every_key);
    assert_eq!((every_key.run.name.as_str(), every_key.run.steps), ("15-austen", 900));

    let (_home, of_run) = run_of_version_0();
    let mut expected = Experiment::default().with_data(of_run.data.clone()).with_lora(of_run.lora.clone());
    for assignment in [
        "model.vocab_size=50",
        "model.context=16",
        "model.d_model=32",
        "model.n_layers=1",
        "model.n_heads=2",
        "model.n_kv_heads=2",
        "model.d_ff=32",
        "quant.activations=int8",
        "quant.matmul_precision=int8",
        "quant.embedding=int8",
        "optim.matrix_optimizer=adamw",
        "schedule.warmup_steps=2",
        "schedule.float_until=0.25",
        "run.name=run",
        "run.device=flex",
        "run.steps=8",
        "run.batch_size=2",
        "run.gradient_accumulation=2",
        "run.log_every=1",
        "run.eval_every=4",
        "run.eval_windows=4",
        "run.checkpoint_every=4",
        "run.sample_prompts=[\"One day\"]",
        "run.sample_tokens=8",
    ] {
        expected.set(assignment).unwrap();
    }
    expected.run.out_dir = of_run.run.out_dir.clone();
    assert_eq!(of_run, expected);
}

#[test]
fn a_run_folder_of_version_0_opens_and_exports() {
    let (home, experiment) = run_of_version_0();
    let device = burn_ternary::device::device("flex").unwrap();
    let saved = SavedRun::open(&experiment.run_dir(), &device).unwrap();
    assert_eq!(saved.experiment.model, experiment.model);
    let packed = saved.export().unwrap();
    let template = fs::read_to_string(experiment.run_dir().join("chat_template.jinja")).unwrap();
    assert_eq!(packed.chat_template, Some(template));
    let path = home.path().join("model.ternary");
    write_model(&packed, &path, &WriteOptions::default()).unwrap();
    let names = |model: &PackedModel| model.tensors.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&read_model(&path).unwrap()), names(&packed));
}

#[test]
fn a_run_folder_of_version_0_resumes_to_its_loss() {
    let (_home, experiment) = run_of_version_0();
    let run_dir = experiment.run_dir();
    let resume = RunOptions::default().with_quiet(true).with_resume(true);
    let mut other = experiment.clone();
    other.set("run.gradient_accumulation=1").unwrap();
    let refusal = run(other, &resume).unwrap_err().to_string();
    assert!(refusal.contains("run.gradient_accumulation is 1, in the run 2"), "{refusal}");

    let recorded = valid_loss(&run_dir);
    let result = run(experiment.clone(), &resume).unwrap();
    assert!(result.finished && result.steps == 8, "{result:?}");
    let found = result.valid_loss.unwrap();
    // Sums differ between CPUs.
    assert!((found - recorded).abs() < 0.02, "{found}, recorded {recorded}");
    let written = fs::read_to_string(run_dir.join("experiment.toml")).unwrap();
    assert!(written.starts_with("version = 1\n"), "{written}");
    assert_eq!(Experiment::parse(&written, "written").unwrap(), experiment);
}
