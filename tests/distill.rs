//! Promise: a student learns from its teacher, and a teacher that does not fit is named.

use crate::small_experiment;
use burn_ternary::train::{Experiment, TrainError, report, train_duck_quantized};
use std::path::Path;

fn experiment(out: &Path, name: &str, assignments: &[&str]) -> Experiment {
    small_experiment(out, name, &[&["run.steps=60", "run.eval_every=60"], assignments].concat())
}

#[test]
fn a_student_learns_from_the_teacher_alone() {
    let out = tempfile::tempdir().unwrap();
    let teacher = experiment(out.path(), "teacher", &["quant.enabled=false"]);
    train_duck_quantized(&teacher).unwrap();
    let place = format!("distill.teacher={}", teacher.run_dir().display());
    // The texts' own tokens have no share in this loss.
    let student = experiment(out.path(), "student", &[&place, "distill.weight=1.0", "run.seed=2"]);
    let result = train_duck_quantized(&student).unwrap();
    let history = report::read(&student.run_dir().join("metrics.jsonl")).unwrap();
    let divergence: Vec<f64> = history.train.iter().map(|report| report.divergence.unwrap()).collect();
    assert!(divergence[59] < 0.5 * divergence[0], "{divergence:?}");
    // 259 byte tokens: 5.56 nats at the start. Nobody is compared with a teacher in an evaluation.
    assert!(result.valid_loss.unwrap() < 4.0, "{:?}", result.valid_loss);
    assert_eq!(history.valid[0].divergence, None);
}

#[test]
fn a_teacher_that_does_not_fit_is_named() {
    let out = tempfile::tempdir().unwrap();
    let refusal = |assignments: &[&str]| {
        let error = train_duck_quantized(&experiment(out.path(), "student", assignments)).unwrap_err();
        // A refused run leaves nothing that a later one would take for a run.
        assert!(!out.path().join("student-1/experiment.toml").exists());
        error
    };
    let error = refusal(&["distill.teacher=nowhere.gguf"]);
    assert!(matches!(error, TrainError::Model(_)) && error.to_string().contains("nowhere.gguf"), "{error}");

    let teacher =
        experiment(out.path(), "teacher", &["run.steps=1", "run.eval_every=1", "data.tokenizer=char"]);
    train_duck_quantized(&teacher).unwrap();
    let place = format!("distill.teacher={}", teacher.run_dir().display());
    let error = refusal(&[&place]);
    assert_eq!(error.exit_code(), 2, "{error}");
    assert!(error.to_string().contains("tokenizer"), "{error}");

    let error = refusal(&[&place, "data.tokenizer=char", "model.context=64"]);
    assert!(error.to_string().contains("model.context = 64"), "{error}");
}
