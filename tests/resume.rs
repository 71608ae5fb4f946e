//! Promise: a killed and resumed run ends bit for bit where the uninterrupted one does.

use crate::targets::of_the_run;
use burn_ternary::run::{Experiment, RunOptions, run};
use rand::{Rng, SeedableRng};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Set in a child process: the folder in which it runs the experiment.
const CHILD: &str = "BURN_TERNARY_RESUME_CHILD";
const STEPS: usize = 48;

/// Dropout, accumulation, Muon and integer products are on, so that everything with a state takes part.
fn experiment(out: &Path) -> Experiment {
    let mut experiment = Experiment::load("experiments/00-default.toml").unwrap();
    let out = out.display();
    for assignment in [
        format!("run.out_dir={out}"),
        format!("run.steps={STEPS}"),
        "run.device=flex".into(),
        "run.batch_size=2".into(),
        "run.gradient_accumulation=2".into(),
        "run.log_every=1".into(),
        "run.eval_every=12".into(),
        "run.eval_windows=4".into(),
        "run.checkpoint_every=4".into(),
        "run.sample_tokens=2".into(),
        "data.tokenizer=byte".into(),
        "model.context=32".into(),
        "model.d_model=64".into(),
        "model.d_ff=96".into(),
        "model.n_layers=2".into(),
        "model.dropout=0.1".into(),
        "quant.scale=learned".into(),
        "quant.activations=int8".into(),
        "quant.matmul_precision=int8".into(),
        "optim.matrix_optimizer=muon".into(),
        // Of the embedding.
        "optim.moments=int8".into(),
        "schedule.weight_decay_until=0.5".into(),
        // A switch, between two checkpoints.
        "schedule.float_until=0.3".into(),
        "schedule.ramp_until=0.0".into(),
    ] {
        experiment.set(&assignment).unwrap();
    }
    experiment
}

fn last_checkpoint(run_dir: &Path) -> PathBuf {
    run_dir.join(format!("checkpoints/step-{STEPS:08}"))
}

/// Step and loss of every line as text, to compare bits.
pub(crate) fn losses(run_dir: &Path) -> Vec<(String, u64, String)> {
    let text = fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            (value["split"].to_string(), value["step"].as_u64().unwrap(), value["loss"].to_string())
        })
        .collect()
}

/// Parameter values by path and optimizer state by name, without the random ids in the files.
pub(crate) fn tensors(checkpoint: &Path) -> Vec<(String, Vec<u8>)> {
    let mut tensors = Vec::new();
    let mut names = std::collections::HashMap::new();
    for file in ["model.bpk", "optimizer.bpk"] {
        let reader = burn_pack::Reader::from_file(checkpoint.join(file)).unwrap();
        for tensor in reader.into_tensors().unwrap() {
            let (name, _, _, id, bytes) = tensor.into_parts().unwrap();
            let id = id.unwrap().to_string();
            let name = match names.get(&id) {
                Some(path) => format!("{path} {}", name.trim_start_matches(&id)),
                None => names.entry(id).or_insert(name).clone(),
            };
            tensors.push((name, bytes.to_vec()));
        }
    }
    tensors.sort();
    tensors
}

#[test]
fn child_process_of_the_kill_test() {
    let Ok(out) = std::env::var(CHILD) else { return };
    run(experiment(Path::new(&out)), &RunOptions::default().with_resume(true).with_quiet(true)).unwrap();
}

#[test]
fn a_run_killed_twenty_times_ends_like_an_uninterrupted_one() {
    let out = tempfile::tempdir().unwrap();
    let (whole, killed) = (out.path().join("whole"), out.path().join("killed"));
    let experiment_of = |out: &Path| experiment(out).run_dir();
    let spawn = |out: &Path| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "resume::child_process_of_the_kill_test"])
            .env(CHILD, out)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let started = std::time::Instant::now();
    assert!(spawn(&whole).wait().unwrap().success());
    let whole_time = started.elapsed();

    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(rand::rng().random());
    let mut kills = 0;
    while kills < 20 {
        let mut child = spawn(&killed);
        // Anywhere from before the first step to about a third of the run, so that it is killed often before its end.
        std::thread::sleep(whole_time.mul_f64(rng.random_range(0.05..0.4)).max(Duration::from_millis(20)));
        let ended = child.try_wait().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        if ended.is_some() {
            // It finished between two kills: start another interrupted run, and count the kills so far.
            compare(&experiment_of(&whole), &experiment_of(&killed));
            fs::remove_dir_all(&killed).unwrap();
        } else {
            kills += 1;
        }
    }
    assert!(spawn(&killed).wait().unwrap().success());
    compare(&experiment_of(&whole), &experiment_of(&killed));
}

fn compare(whole: &Path, killed: &Path) {
    assert_eq!(losses(whole), losses(killed));
    let samples = |run_dir: &Path| fs::read_to_string(run_dir.join("samples.txt")).unwrap();
    assert_eq!(samples(whole), samples(killed));
    assert_eq!(of_the_run(whole), of_the_run(killed));
    let (whole, killed) = (tensors(&last_checkpoint(whole)), tensors(&last_checkpoint(killed)));
    let names =
        |tensors: &[(String, Vec<u8>)]| tensors.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&whole), names(&killed));
    assert!(whole.len() > 60, "{} tensors", whole.len());
    for ((name, whole), (_, killed)) in whole.iter().zip(&killed) {
        assert!(whole == killed, "{name} differs");
    }
}

#[test]
fn resuming_skips_damaged_checkpoints() {
    let _alone = crate::alone_with_the_generator();
    let out = tempfile::tempdir().unwrap();
    let mut short = experiment(out.path());
    // Moments of matrices at eight bits, and a ramp.
    for assignment in ["optim.matrix_optimizer=adamw", "schedule.ramp_until=0.5"] {
        short.set(assignment).unwrap();
    }
    comes_back(short.clone());
    // Two scales and growing sparsity, whose state consists of the parameters and the step.
    let mut other = short;
    for assignment in [
        "run.name=two-scales",
        "quant.matmul_precision=float",
        "optim.matrix_optimizer=muon",
        "optim.moments=float",
        "quant.scale=ttq",
        "quant.sparsity={zero_fraction=0.8}",
        "schedule.sparse_until=0.99",
    ] {
        other.set(assignment).unwrap();
    }
    comes_back(other);
}

/// Trains, damages the last checkpoint, and resumes from the one before.
fn comes_back(short: Experiment) {
    short.validate("").unwrap();
    run(short.clone(), &RunOptions::default().with_quiet(true)).unwrap();
    let run_dir = short.run_dir();
    let results = || (losses(&run_dir), tensors(&last_checkpoint(&run_dir)), of_the_run(&run_dir));
    let before = results();
    let model = last_checkpoint(&run_dir).join("model.bpk");
    let mut bytes = fs::read(&model).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&model, bytes).unwrap();
    run(short, &RunOptions::default().with_resume(true).with_quiet(true)).unwrap();
    assert!(before == results(), "the run was not repeated exactly");
}
