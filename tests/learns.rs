//! Promise: a short run learns, and its folder contains everything that the documentation lists.

use crate::small_experiment;
use burn_ternary::report;
use burn_ternary::run::{Experiment, SavedRun, train_duck_quantized};
use std::path::Path;

fn experiment(out: &Path) -> Experiment {
    let mut experiment = Experiment::load("experiments/00-default.toml").unwrap();
    let out = out.display();
    for assignment in [
        format!("run.out_dir={out}"),
        "run.device=flex".into(),
        "run.steps=120".into(),
        "run.batch_size=4".into(),
        "run.eval_every=60".into(),
        "run.eval_windows=32".into(),
        "run.log_every=20".into(),
        "run.checkpoint_every=60".into(),
        "run.sample_tokens=8".into(),
        "data.tokenizer=byte".into(),
        "model.context=64".into(),
        "model.d_model=64".into(),
        "model.d_ff=128".into(),
        "model.n_layers=2".into(),
        "schedule.warmup_steps=5".into(),
    ] {
        experiment.set(&assignment).unwrap();
    }
    experiment
}

#[test]
fn a_run_with_soft_weights_ends_with_hard_ones() {
    let out = tempfile::tempdir().unwrap();
    let annealed =
        ["run.steps=60", "run.eval_every=60", "quant.estimator=annealed", "schedule.ramp_until=0.8"];
    let experiment = small_experiment(out.path(), "annealed", &annealed);
    experiment.validate("annealed").unwrap();
    let result = train_duck_quantized(&experiment).unwrap();
    assert!(result.valid_loss.unwrap() < 3.4, "{:?}", result.valid_loss);
    let device = burn_ternary::device::device("flex").unwrap();
    SavedRun::open(&experiment.run_dir(), &device).unwrap().export().unwrap();
}

#[test]
fn a_short_run_learns_and_writes_a_complete_folder() {
    let out = tempfile::tempdir().unwrap();
    let experiment = experiment(out.path());
    let result = train_duck_quantized(&experiment).unwrap();

    // 259 byte tokens: 5.56 nats at the start; letter frequencies alone give 2.9.
    assert!(result.finished && result.steps == 120);
    assert!(result.valid_loss.unwrap() < 2.75, "{:?}", result.valid_loss);
    assert!((0.25..0.40).contains(&result.zero_fraction.unwrap()), "{:?}", result.zero_fraction);

    let run_dir = experiment.run_dir();
    for name in ["experiment.toml", "tokenizer.json", "metrics.jsonl", "samples.txt", "loss.svg", "codes.svg"]
    {
        assert!(run_dir.join(name).metadata().unwrap().len() > 0, "{name}");
    }
    let history = report::History::read(&run_dir.join("metrics.jsonl")).unwrap();
    assert_eq!(
        history.train.iter().map(|report| report.step).collect::<Vec<_>>(),
        [20, 40, 60, 80, 100, 120]
    );
    assert_eq!(history.valid.iter().map(|report| report.step).collect::<Vec<_>>(), [60, 120]);
    assert!(history.valid[1].loss < history.valid[0].loss);
    assert!(history.valid[1].flipped.unwrap() > 0.0);
    let written = report::RunResult::read(&run_dir.join("result.json")).unwrap();
    // JSON readers may be off by one unit in the last place.
    assert!((written.valid_loss.unwrap() - result.valid_loss.unwrap()).abs() < 1e-12);

    let saved = SavedRun::open(&run_dir, &burn_ternary::device::device("flex").unwrap()).unwrap();
    assert_eq!(Some(saved.model.size().parameters as u64), Some(written.parameters));
}

#[test]
fn a_gaussian_start_has_31_percent_zeros() {
    let experiment = Experiment::load("experiments/00-default.toml").unwrap();
    let mut model = experiment.model.clone();
    model.vocab_size = 300;
    let model = model.init(&experiment.quant, 3, &burn_ternary::device::device("flex").unwrap());
    for (name, linear) in model.linears() {
        let zeros = linear.zero_fraction().unwrap();
        assert!((zeros - 0.310).abs() < 0.01, "{name}: {zeros}");
    }
}

#[test]
fn a_float_first_schedule_switches_to_ternary() {
    let out = tempfile::tempdir().unwrap();
    let mut switched = experiment(out.path());
    for assignment in ["schedule.float_until=0.5", "run.name=switched", "run.log_every=1"] {
        switched.set(assignment).unwrap();
    }
    train_duck_quantized(&switched).unwrap();
    let history = report::History::read(&switched.run_dir().join("metrics.jsonl")).unwrap();
    let lambda: Vec<f64> = history.train.iter().map(|report| report.lambda.unwrap()).collect();
    assert!(lambda[..60].iter().all(|lambda| *lambda == 0.0), "{lambda:?}");
    assert!(lambda[60..].iter().all(|lambda| *lambda == 1.0), "{lambda:?}");
    // Most of what was learned in float survives the switch: a fresh ternary model would be above 4 nats.
    assert!(history.train[61].loss < 4.0);

    let mut twin = experiment(out.path());
    for assignment in ["quant.enabled=false", "run.name=twin"] {
        twin.set(assignment).unwrap();
    }
    let result = train_duck_quantized(&twin).unwrap();
    assert_eq!(result.zero_fraction, None);
    // Its file has a header, with the tokenizer.
    assert!(result.compression.is_some_and(|ratio| ratio > 0.9 && ratio < 1.0), "{:?}", result.compression);
}
