//! Promise: `--resume` continues the run that was started, or names what differs and changes nothing.

use crate::resume::tensors;
use crate::small_experiment;
use burn_ternary::device;
use burn_ternary::run::{
    Experiment, RunOptions, TrainError, cache_teacher_logits, checkpoint::Checkpoints, run,
    train_duck_quantized,
};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn quiet() -> RunOptions {
    RunOptions::default().with_quiet(true)
}

fn resume() -> RunOptions {
    quiet().with_resume(true)
}

/// A run of eight steps on its own text, with checkpoints after four and eight.
fn experiment(home: &Path, name: &str, assignments: &[&str]) -> Experiment {
    let text = home.join("text.txt");
    if !text.exists() {
        fs::write(&text, "The duck swims on the pond. ".repeat(60)).unwrap();
    }
    let data = format!("data.train=[{:?}]", text.display().to_string());
    let common =
        ["run.steps=8", "run.checkpoint_every=4", "run.eval_every=4", "data.valid_fraction=0.2", &data];
    let mut experiment = small_experiment(home, name, &[&common[..], assignments].concat());
    experiment.run.out_dir = home.display().to_string();
    experiment
}

/// The run, as after a kill between its two checkpoints.
fn killed(experiment: &Experiment) {
    run(experiment.clone(), &quiet()).unwrap();
    let run_dir = experiment.run_dir();
    fs::remove_dir_all(checkpoint(&run_dir, 8)).unwrap();
    fs::remove_file(run_dir.join("result.json")).unwrap();
    // A ternary model of this width has no GGUF file.
    let _ = fs::remove_file(run_dir.join("model.gguf"));
}

fn checkpoint(run_dir: &Path, step: usize) -> PathBuf {
    run_dir.join(format!("checkpoints/step-{step:08}"))
}

fn with(experiment: &Experiment, assignments: &[&str]) -> Experiment {
    let mut changed = experiment.clone();
    assignments.iter().for_each(|assignment| changed.set(assignment).unwrap());
    changed
}

/// SHA-256 of every file below `folder`, and the folders.
fn hashes(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut hashes = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            hashes.extend(hashes_below(&path));
        } else {
            hashes.insert(path.clone(), Sha256::digest(fs::read(&path).unwrap()).to_vec());
        }
    }
    hashes
}

fn hashes_below(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut below = hashes(folder);
    below.insert(folder.into(), vec![]);
    below
}

/// Asserts that a resume is refused with these words and leaves the folder unchanged.
fn refused(experiment: Experiment, words: &[&str]) {
    refused_with(experiment, &resume(), words);
}

fn refused_with(experiment: Experiment, options: &RunOptions, words: &[&str]) {
    let run_dir = experiment.run_dir();
    let before = hashes(&run_dir);
    let error = run(experiment, options).unwrap_err();
    assert!(before == hashes(&run_dir), "the refusal changed the folder: {error}");
    for word in words {
        assert!(error.to_string().contains(word), "{word} is not in: {error}");
    }
}

#[test]
fn a_resume_with_other_settings_names_each_and_changes_nothing() {
    let home = tempfile::tempdir().unwrap();
    let made = experiment(home.path(), "run", &["data.tokenizer=bpe", "data.bpe_vocab_size=300"]);
    killed(&made);
    for (changes, words) in [
        (
            &["optim.lr=0.1", "model.dropout=0.5"][..],
            &["optim.lr is 0.1, in the run 0.003", "model.dropout"][..],
        ),
        (
            &["data.tokenizer=byte"],
            &["data.tokenizer is byte, in the run bpe", "the tokenizer (data.tokenizer)"],
        ),
        (&["data.bpe_vocab_size=280"], &["data.bpe_vocab_size is 280, in the run 300"]),
        (&["data.valid_fraction=0.3"], &["data.valid_fraction", "the training text", "the validation text"]),
        (&["run.batch_size=3"], &["run.batch_size is 3"]),
        (&["model.context=32"], &["model.context is 32"]),
    ] {
        let changed = with(&made, changes);
        refused(changed.clone(), words);
        let error = run(changed, &resume()).unwrap_err();
        assert!(matches!(error, TrainError::OtherRun { .. }) && error.exit_code() == 2, "{error}");
    }
    let loaded = Checkpoints::existing(made.run_dir().join("checkpoints")).latest_good().unwrap().unwrap();
    let flex = device::describe(&device::device("flex").unwrap());
    assert_eq!(loaded.identity.unwrap().device, Some(flex));
    // Epochs of another text are not counted.
    let epochs = resume().with_epochs(Some(2.0));
    refused_with(with(&made, &["data.valid_fraction=0.3"]), &epochs, &["the training text"]);
    run(made, &resume()).unwrap();
}

#[test]
fn a_changed_text_or_tokenizer_is_refused() {
    let home = tempfile::tempdir().unwrap();
    for tokenizer in ["bpe", "char", "byte"] {
        let assignments = [format!("data.tokenizer={tokenizer}"), "data.bpe_vocab_size=300".into()];
        let assignments = assignments.each_ref().map(String::as_str);
        let made = experiment(home.path(), tokenizer, &assignments);
        killed(&made);
        let (text, path) = (home.path().join("text.txt"), &made.data.train[0]);
        let original = fs::read(path).unwrap();
        fs::write(&text, "The drake dives into the lake. ".repeat(60)).unwrap();
        refused(made.clone(), &["the training text (data.train)", "the validation text (data.valid)"]);
        fs::remove_file(&text).unwrap();
        refused(made.clone(), &["text.txt"]);
        // The same text elsewhere is the same text.
        let moved = home.path().join("moved.txt");
        fs::write(&moved, &original).unwrap();
        run(with(&made, &[&format!("data.train=[{:?}]", moved.display().to_string())]), &resume()).unwrap();
        fs::write(&text, &original).unwrap();
    }

    let file = home.path().join("tokenizer.json");
    fs::copy(home.path().join("bpe-1/tokenizer.json"), &file).unwrap();
    let made = experiment(home.path(), "file", &[&format!("data.tokenizer={}", file.display())]);
    killed(&made);
    fs::copy(home.path().join("char-1/tokenizer.json"), &file).unwrap();
    refused(made.clone(), &["the tokenizer (data.tokenizer)"]);
    let own = with(&made, &[&format!("data.tokenizer={}", made.run_dir().join("tokenizer.json").display())]);
    run(own, &resume()).unwrap();

    // The tokenizer of a run is not trained again, even on its own text.
    let bpe = experiment(home.path(), "bpe", &["data.tokenizer=bpe", "data.bpe_vocab_size=300"]);
    fs::remove_file(bpe.run_dir().join("tokenizer.json")).unwrap();
    refused(bpe, &["tokenizer.json"]);
}

#[test]
fn a_changed_teacher_or_initial_model_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let teacher = experiment(home.path(), "teacher", &["quant.enabled=false"]);
    train_duck_quantized(&teacher).unwrap();
    let file = home.path().join("teacher.gguf");
    fs::copy(teacher.run_dir().join("model.gguf"), &file).unwrap();
    let recording = home.path().join("teacher.logits");
    let other = |seed: u64| {
        let mut other = teacher.clone();
        (other.run.name, other.optim.lr) = (format!("other-{seed}"), 0.01);
        train_duck_quantized(&other).unwrap();
        other.run_dir()
    };
    let other = other(1);
    let names = |path: &Path| format!("distill.teacher={}", path.display());
    let student = |name: &str, assignments: &[&str]| experiment(home.path(), name, assignments);

    let of_run = student("of-run", &[&names(&teacher.run_dir())]);
    let of_file = student("of-file", &[&names(&file)]);
    cache_teacher_logits(of_file.clone(), 4, &recording, |_, _| ()).unwrap();
    let of_recording = student("of-recording", &[&names(&recording)]);
    let start = format!("run.start_from={}", file.display());
    let started = student("started", &[&start, "quant.enabled=false"]);
    let all = [&of_run, &of_file, &of_recording, &started];
    all.into_iter().for_each(killed);

    // Trained again under the same path; another file; other cached logits.
    fs::rename(teacher.run_dir(), home.path().join("aside")).unwrap();
    fs::rename(&other, teacher.run_dir()).unwrap();
    let kept = fs::read(&file).unwrap();
    fs::copy(teacher.run_dir().join("model.gguf"), &file).unwrap();
    let kept_recording = fs::read(&recording).unwrap();
    cache_teacher_logits(with(&of_file, &["run.name=scratch"]), 4, &recording, |_, _| ()).unwrap();
    for student in [&of_run, &of_file, &of_recording] {
        refused(student.clone(), &["the teacher (distill.teacher) is not that of the run"]);
    }
    refused(started.clone(), &["the model to start from (run.start_from) is not that of the run"]);
    refused(with(&started, &["run.start_from="]), &["the model to start from"]);

    // The same file under another path.
    let [moved, moved_recording] = ["moved.gguf", "moved.logits"].map(|name| home.path().join(name));
    fs::write(&moved, kept).unwrap();
    fs::write(&moved_recording, kept_recording).unwrap();
    run(with(&of_run, &[&names(&home.path().join("aside"))]), &resume()).unwrap();
    run(with(&of_file, &[&names(&moved)]), &resume()).unwrap();
    run(with(&of_recording, &[&names(&moved_recording)]), &resume()).unwrap();
    // The checkpoint has all weights.
    fs::remove_file(&file).unwrap();
    run(started, &resume()).unwrap();
}

#[test]
fn a_run_with_a_new_path_or_reporting_interval_is_resumed() {
    let home = tempfile::tempdir().unwrap();
    let made = experiment(home.path(), "run", &[]);
    run(made.clone(), &quiet()).unwrap();
    let expected = tensors(&checkpoint(&made.run_dir(), 8));
    let elsewhere = tempfile::tempdir().unwrap();
    let mut dir = made.run_dir();
    let mut go = |place: &Path, changes: &[&str]| {
        fs::create_dir_all(place).unwrap();
        let mut changed = with(&made, changes);
        changed.run.out_dir = place.display().to_string();
        if dir != changed.run_dir() {
            fs::rename(&dir, changed.run_dir()).unwrap();
        }
        dir = changed.run_dir();
        fs::remove_dir_all(checkpoint(&dir, 8)).unwrap();
        run(changed, &resume()).unwrap();
        assert!(tensors(&checkpoint(&dir, 8)) == expected, "{changes:?}");
    };
    let respelled = home.path().join("x/..");
    fs::create_dir(home.path().join("x")).unwrap();
    go(&respelled, &[]);
    go(home.path(), &["run.log_every=3", "run.keep_checkpoints=5", "run.checkpoint_every=2"]);
    go(home.path(), &["run.eval_every=3", "run.sample_tokens=2", "run.sample_prompts=[\"The\"]"]);
    go(&elsewhere.path().join("disk"), &["run.name=renamed", "run.device=auto", "run.device=flex"]);
}

#[test]
fn a_run_can_be_extended_if_its_schedule_allows() {
    let home = tempfile::tempdir().unwrap();
    let cases: [(&str, &[&str], bool); 6] = [
        ("constant", &["schedule.shape=constant"], true),
        ("stable", &["schedule.shape=warmup_stable_decay", "schedule.decay_fraction=0.25"], true),
        ("decayed", &["schedule.shape=warmup_stable_decay", "schedule.decay_fraction=0.75"], false),
        ("cosine", &["schedule.shape=cosine", "schedule.warmup_steps=0"], false),
        ("float", &["schedule.shape=constant", "schedule.float_until=0.75"], true),
        ("ternary", &["schedule.shape=constant", "schedule.float_until=0.25"], false),
    ];
    for (name, schedule, allowed) in cases {
        let made = experiment(home.path(), name, &[schedule, &["schedule.warmup_steps=1"]].concat());
        killed(&made);
        let longer = with(&made, &["run.steps=12"]);
        if !allowed {
            refused(longer, &["run.steps is 12, in the run 8", "schedule.", "run.start_from"]);
            refused(with(&made, &["run.steps=2"]), &["run.steps is 2, but 4 of 8 are done"]);
            continue;
        }
        run(longer.clone(), &resume()).unwrap();
        let whole = with(&longer, &[&format!("run.name={name}-whole")]);
        run(whole.clone(), &quiet()).unwrap();
        let [resumed, whole] = [longer, whole].map(|run| tensors(&checkpoint(&run.run_dir(), 12)));
        assert!(resumed == whole, "{name}: not the longer run");
    }
    // A finished run, and by epochs.
    let made = experiment(home.path(), "finished", &["schedule.shape=constant"]);
    let result = run(made.clone(), &quiet()).unwrap();
    let epochs = resume().with_epochs(Some(2.0));
    assert!(run(made, &epochs).unwrap().steps > result.steps);
}

/// Rewrites the manifests of a run in the format of version 0.1.0.
fn make_old(made: &Experiment) {
    let run_dir = made.run_dir();
    for step in [4, 8] {
        let folder = checkpoint(&run_dir, step);
        let Ok(text) = fs::read(folder.join("manifest.json")) else { continue };
        let mut manifest: serde_json::Value = serde_json::from_slice(&text).unwrap();
        manifest.as_object_mut().unwrap().remove("identity");
        let toml = fs::read(run_dir.join("experiment.toml")).unwrap();
        manifest["experiment_sha256"] = format!("{:x}", Sha256::digest(toml)).into();
        let text = serde_json::to_vec_pretty(&manifest).unwrap();
        let hash = format!("{:x}  manifest.json\n", Sha256::digest(&text));
        fs::write(folder.join("manifest.json"), text).unwrap();
        fs::write(folder.join("manifest.sha256"), hash).unwrap();
    }
}

#[test]
fn checkpoints_of_version_0_1_0_are_resumed() {
    let home = tempfile::tempdir().unwrap();
    let made = experiment(home.path(), "old", &[]);
    killed(&made);
    make_old(&made);
    refused(with(&made, &["optim.lr=0.1"]), &["optim.lr is 0.1, in the run 0.003"]);
    let toml = made.run_dir().join("experiment.toml");
    let text = fs::read(&toml).unwrap();
    fs::write(&toml, "quack").unwrap();
    refused(made.clone(), &["another experiment"]);
    fs::write(&toml, text).unwrap();
    run(with(&made, &["run.log_every=2"]), &resume()).unwrap();
}

#[test]
fn an_unfinished_run_without_a_checkpoint_starts_again() {
    let home = tempfile::tempdir().unwrap();
    let made = experiment(home.path(), "run", &["data.tokenizer=bpe", "data.bpe_vocab_size=300"]);
    run(made.clone(), &quiet()).unwrap();
    let run_dir = made.run_dir();
    let expected = tensors(&checkpoint(&run_dir, 8));
    fs::remove_dir_all(run_dir.join("checkpoints")).unwrap();
    refused(made.clone(), &["a run that has ended, without a checkpoint"]);
    fs::remove_file(run_dir.join("result.json")).unwrap();
    run(made.clone(), &resume()).unwrap();
    assert!(tensors(&checkpoint(&run_dir, 8)) == expected, "not the same run");
    // Caching the logits of a teacher must not replace the tokenizer of a run that has one either.
    fs::write(home.path().join("text.txt"), "The drake dives into the lake. ".repeat(60)).unwrap();
    let before = hashes(&run_dir);
    let teacher = with(&made, &[&format!("distill.teacher={}", run_dir.display())]);
    let error = cache_teacher_logits(teacher, 4, &home.path().join("x.logits"), |_, _| ()).unwrap_err();
    assert!(error.to_string().contains("the training text"), "{error}");
    assert!(before == hashes(&run_dir));
}
