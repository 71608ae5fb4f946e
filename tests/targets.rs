//! Promise: a step without a learned token changes nothing, and the guard skips no good step.

use crate::small_experiment;
use burn::tensor::{Device, Tensor, TensorData};
use burn_ternary::data::window::Window;
use burn_ternary::data::{LmBatch, LmBatcher};
use burn_ternary::report::{self, RunResult};
use burn_ternary::run::{Experiment, RunOptions, TrainError, run, train_duck_quantized};
use burn_ternary::train::QuantizationTrainer;
use burn_ternary::train::schedule::Shape;
use std::fs;
use std::path::{Path, PathBuf};

/// A `.jsonl` file of 40 dialogues with questions of 150 words.
fn dialogues(folder: &Path, answers: &[&str]) -> PathBuf {
    let words = ["pond", "duck", "reed", "swims", "under", "the", "grey", "sky", "slowly", "home"];
    let lines = (0..40usize).map(|i| {
        let question: Vec<&str> = (0..150).map(|j| words[(i * 7 + j * (i + 3)) % words.len()]).collect();
        let answer = answers[i % answers.len()];
        serde_json::json!({ "question": question.join(" "), "answer": answer }).to_string() + "\n"
    });
    let path = folder.join("dialogues.jsonl");
    fs::write(&path, lines.collect::<String>()).unwrap();
    path
}

fn experiment(out: &Path, name: &str, text: &Path, assignments: &[&str]) -> Experiment {
    let text = format!("data.train=[{:?}]", text.display().to_string());
    let common = [
        text.as_str(),
        "run.steps=240",
        "run.batch_size=2",
        "run.eval_every=120",
        "run.eval_windows=0",
        "model.context=64",
    ];
    small_experiment(out, name, &[&common[..], assignments].concat())
}

#[test]
fn most_steps_without_a_learned_token_end_as_without_a_guard() {
    let home = tempfile::tempdir().unwrap();
    let words = ["feather", "pond", "reed", "bread", "cloud", "nest", "frog", "moss"];
    let texts = [&words[..], &["yes", "no"]].map(|answers| {
        let folder = tempfile::tempdir_in(home.path()).unwrap().keep();
        dialogues(&folder, answers)
    });
    let [text, yes_no] = &texts;
    let teacher = experiment(home.path(), "teacher", text, &["quant.enabled=false"]);
    train_duck_quantized(&teacher).unwrap();
    let teacher = format!("distill.teacher={}", teacher.run_dir().display());
    let variants: [(&str, &Path, &[&str]); 6] = [
        ("word", text, &[]),
        ("yes-no", yes_no, &[]),
        ("tiny", yes_no, &["model.context=16"]),
        ("float", text, &["quant.enabled=false"]),
        (
            "accumulated",
            text,
            &["run.gradient_accumulation=3", "run.steps=120", "run.batch_size=1", "model.context=32"],
        ),
        ("taught", text, &[&teacher, "distill.weight=0.5", "distill.hidden_weight=1.0"]),
    ];
    for (name, text, assignments) in variants {
        let [with, without] = ["3.0", "0.0"].map(|factor| {
            let factor = format!("run.spike_factor={factor}");
            let name = format!("{name}-{}", &factor[17..18]);
            let assignments = [&[factor.as_str()], assignments].concat();
            train_duck_quantized(&experiment(home.path(), &name, text, &assignments)).unwrap()
        });
        assert!(with.empty_steps > with.steps / 8, "{name}: {} of {}", with.empty_steps, with.steps);
        assert_eq!((with.skipped_steps, with.rollbacks, with.finished), (0, 0, true), "{name}");
        assert_eq!(with.valid_loss.unwrap().to_bits(), without.valid_loss.unwrap().to_bits(), "{name}");
        // 5.56 nats at the start.
        assert!(with.valid_loss.unwrap() < 5.45, "{name}: {:?}", with.valid_loss);
    }
}

#[test]
fn a_memorized_text_causes_no_spikes() {
    let home = tempfile::tempdir().unwrap();
    let text = home.path().join("line.txt");
    fs::write(&text, "abcdefgh ".repeat(60)).unwrap();
    let short = ["run.steps=1300", "model.context=16", "run.log_every=100", "run.checkpoint_every=100"];
    let result = train_duck_quantized(&experiment(home.path(), "heart", &text, &short)).unwrap();
    assert_eq!((result.skipped_steps, result.rollbacks, result.finished), (0, 0, true));
    assert!(result.valid_loss.unwrap() < 0.05, "{:?}", result.valid_loss);
}

/// A batch with `learned` random tokens per window, the others masked.
fn batch(seed: u32, learned: usize, device: &Device) -> LmBatch {
    let windows: Vec<Window> = (0..2u32)
        .map(|i| Window {
            start: 0,
            ids: (0..17u32).map(|j| (seed * 31 + i * 17 + j * j * 7) % 97).collect(),
            mask: (0..16).map(|j| j < learned).collect(),
        })
        .collect();
    LmBatcher.batch(&windows, device)
}

/// The logits and the state after a step for each list of micro-batches.
fn after(enabled: bool, steps: &[&[LmBatch]]) -> (Vec<f32>, QuantizationTrainer) {
    let mut experiment = Experiment::load("experiments/00-default.toml").unwrap();
    experiment.quant.enabled = enabled;
    experiment.schedule.shape = Shape::Constant;
    experiment.schedule.warmup_steps = 0;
    let Experiment { mut model, quant, optim, schedule, .. } = experiment;
    (model.vocab_size, model.context, model.d_model, model.d_ff, model.n_layers) = (97, 16, 32, 64, 1);
    let device = burn_ternary::device::device("flex").unwrap();
    let start = model.init(&quant, 1, &device.clone().autodiff());
    let mut trainer = QuantizationTrainer::new(start, &optim, &schedule, 100, 1);
    for micro_batches in steps {
        trainer.train_step(micro_batches.to_vec());
    }
    let ids = Tensor::from_data(TensorData::new((0..16).collect::<Vec<i32>>(), [1, 16]), &device.autodiff());
    let logits = trainer.model().forward(ids).into_data().iter::<f32>().collect();
    (logits, trainer)
}

#[test]
fn a_step_without_a_learned_token_changes_nothing() {
    let device = burn_ternary::device::device("flex").unwrap().autodiff();
    let [one, two, none] = [(1, 16), (2, 5), (3, 0)].map(|(seed, learned)| batch(seed, learned, &device));
    let batches = |batches: &[&LmBatch]| batches.iter().copied().cloned().collect::<Vec<_>>();
    let (one, two, none) = (batches(&[&one]), batches(&[&two]), batches(&[&none]));
    let twice = [none.clone(), none.clone()].concat();
    for enabled in [true, false] {
        let (logits, trainer) = after(enabled, &[&one, &two, &one]);
        // As separate steps, and as micro-batches of a step.
        let (same, with_empty) = after(enabled, &[&none, &one, &none, &twice, &two, &none, &one, &none]);
        assert_eq!(logits, same, "ternary: {enabled}");
        let mixed = [none.clone(), two.clone(), none.clone()].concat();
        assert_eq!(logits, after(enabled, &[&one, &mixed, &one]).0, "ternary: {enabled}");
        let (state, other) = (trainer.state(), with_empty.state());
        assert_eq!(state.loss_average.map(f64::to_bits), other.loss_average.map(f64::to_bits));
        assert_eq!((state.tokens, state.bad_steps), (other.tokens, other.bad_steps));
        assert_eq!((other.step, other.empty_steps, other.skipped_steps), (8, 5, 0));
        assert_eq!((state.step, state.empty_steps), (3, 0));
    }
}

#[test]
fn an_empty_step_neither_adds_to_nor_ends_bad_steps() {
    let device = burn_ternary::device::device("flex").unwrap().autodiff();
    let [good, none] = [(1, 16), (3, 0)].map(|(seed, learned)| batch(seed, learned, &device));
    let mut bad = good.clone();
    bad.mask = bad.mask.clone().mul_scalar(f32::NAN);
    let (bad, none) = ([bad], [none]);
    let trainer = after(true, &[&[good], &bad, &none, &bad, &none]).1;
    let state = trainer.state();
    assert_eq!((state.bad_steps, state.skipped_steps, state.empty_steps), (2, 2, 2));
    assert!(state.loss_average.unwrap().is_finite());
}

#[test]
fn a_text_without_a_learned_window_is_refused_before_the_first_step() {
    let home = tempfile::tempdir().unwrap();
    let text = home.path().join("long.jsonl");
    let line = serde_json::json!({ "question": "q".repeat(500), "answer": "a" }).to_string();
    fs::write(&text, line).unwrap();
    let valid = ["data.valid=[\"embedded\"]", "model.context=100", "run.steps=4"];
    let experiment = experiment(home.path(), "unlearned", &text, &valid);
    let error = train_duck_quantized(&experiment).unwrap_err();
    assert_eq!(error.exit_code(), 3, "{error}");
    assert!(matches!(error, TrainError::Data(_)) && error.to_string().contains("4 windows"), "{error}");
    assert!(!experiment.run_dir().join("checkpoints").exists());
}

#[test]
fn a_validation_text_without_a_learned_window_has_no_loss() {
    let home = tempfile::tempdir().unwrap();
    let valid = home.path().join("valid.jsonl");
    fs::write(&valid, serde_json::json!({ "question": "q".repeat(70), "answer": "a" }).to_string()).unwrap();
    let text = dialogues(home.path(), &["a long answer that fills a window and more of them, or so we hope"]);
    let valid = format!("data.valid=[{:?}]", valid.display().to_string());
    let experiment =
        experiment(home.path(), "unmeasured", &text, &[&valid, "run.steps=8", "run.eval_every=4"]);
    let result = train_duck_quantized(&experiment).unwrap();
    assert!(result.finished && result.train_loss.is_some());
    assert_eq!((result.valid_loss, result.best_valid_loss, result.best_valid_step), (None, None, None));
}

/// The part of a result that describes the run, not the process that ended it.
pub(crate) fn of_the_run(run_dir: &Path) -> RunResult {
    let result = RunResult::read(&run_dir.join("result.json")).unwrap();
    RunResult { wall_s: 0.0, tokens_per_s: 0.0, peak_rss_bytes: None, ..result }
}

#[test]
fn a_run_resumes_after_a_step_without_a_learned_token() {
    let _alone = crate::alone_with_the_generator();
    let home = tempfile::tempdir().unwrap();
    let text = dialogues(home.path(), &["yes", "no"]);
    let every = ["run.steps=40", "run.eval_every=8", "run.checkpoint_every=1", "run.keep_checkpoints=99"];
    let more = ["model.dropout=0.1", "schedule.float_until=0.5", "schedule.ramp_until=0.8"];
    let experiment = experiment(home.path(), "empty", &text, &[&every[..], &more].concat());
    let quiet = RunOptions::default().with_quiet(true);
    run(experiment.clone(), &quiet).unwrap();
    let run_dir = experiment.run_dir();
    let checkpoint = |step: usize| run_dir.join(format!("checkpoints/step-{step:08}"));
    let losses = || {
        let history = report::History::read(&run_dir.join("metrics.jsonl")).unwrap();
        [history.train, history.valid]
            .map(|reports| reports.iter().map(|r| r.loss.to_bits()).collect::<Vec<_>>())
    };
    let whole = (losses(), crate::resume::tensors(&checkpoint(40)), of_the_run(&run_dir));
    let train = report::History::read(&run_dir.join("metrics.jsonl")).unwrap().train;
    let empty: Vec<usize> = train.iter().filter(|report| report.tokens == 0).map(|r| r.step).collect();
    assert!(empty.len() > 8 && whole.2.best_valid_step.is_some(), "{empty:?}");
    for step in [empty[empty.len() - 2], empty[empty.len() / 2], empty[0]] {
        for later in step + 1..=40 {
            fs::remove_dir_all(checkpoint(later)).unwrap();
        }
        run(experiment.clone(), &quiet.clone().with_resume(true)).unwrap();
        let resumed = (losses(), crate::resume::tensors(&checkpoint(40)), of_the_run(&run_dir));
        assert!(whole == resumed, "resumed at step {step}: {:?} {:?}", whole.2, resumed.2);
    }
}

#[test]
fn texts_of_any_alphabet_are_trained_on_by_characters() {
    let home = tempfile::tempdir().unwrap();
    let long = "ACGT".repeat(40);
    let texts = [("cyrillic", "Утка плывёт по пруду.\n"), ("dna", "ACGTTGCA"), ("digits", "3141592653 ")];
    for (name, text) in texts {
        let path = home.path().join(format!("{name}.txt"));
        fs::write(&path, text.repeat(60)).unwrap();
        let prompts =
            format!("run.sample_prompts=[\"One day\", \"<|user|>Who?\", {:?}, {long:?}]", &text[..2]);
        let few = ["data.tokenizer=char", "run.steps=4", "run.eval_every=2", "run.sample_tokens=3"];
        let small = [&few[..], &[&prompts, "model.context=16"]].concat();
        let experiment = experiment(home.path(), name, &path, &small);
        assert!(train_duck_quantized(&experiment).unwrap().finished);
        let samples = fs::read_to_string(experiment.run_dir().join("samples.txt")).unwrap();
        // Two evaluations; a prompt may be longer than the context.
        let expected = if name == "dna" { 4 } else { 2 };
        assert_eq!(samples.lines().count(), expected, "{samples}");
        assert!(samples.contains(&text[..2]) && !samples.contains("One day"), "{samples}");
    }
}
