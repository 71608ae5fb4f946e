//! Promise: a student learns from its teacher, and a teacher that does not fit is named.

use crate::small_experiment;
use burn_ternary::report;
use burn_ternary::run::{Experiment, TrainError, cache_teacher_logits, train_duck_quantized};
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
    // The loss is that of the teacher alone; the tokens of the text do not contribute.
    let student = experiment(out.path(), "student", &[&place, "distill.weight=1.0", "run.seed=2"]);
    let result = train_duck_quantized(&student).unwrap();
    let history = report::History::read(&student.run_dir().join("metrics.jsonl")).unwrap();
    let divergence: Vec<f64> = history.train.iter().map(|report| report.divergence.unwrap()).collect();
    assert!(divergence[59] < 0.5 * divergence[0], "{divergence:?}");
    // 259 byte tokens: 5.56 nats at the start. Evaluations do not use the teacher.
    assert!(result.valid_loss.unwrap() < 4.0, "{:?}", result.valid_loss);
    assert_eq!(history.valid[0].divergence, None);
}

#[test]
fn a_student_learns_the_hidden_states_and_relations_of_its_teacher() {
    let out = tempfile::tempdir().unwrap();
    // Twice as deep, with fewer key-value heads and, for relations, wider than its student.
    let wide = ["quant.enabled=false", "model.n_layers=4", "model.n_kv_heads=2", "run.steps=1"];
    let wide = experiment(out.path(), "wide", &[&wide[..], &["model.d_model=48"]].concat());
    train_duck_quantized(&wide).unwrap();
    let equal = experiment(out.path(), "equal", &["quant.enabled=false", "run.steps=1", "run.seed=5"]);
    train_duck_quantized(&equal).unwrap();

    let history = |name: &str, assignments: &[&str]| {
        let student = experiment(out.path(), name, &[&["distill.weight=0.0"], assignments].concat());
        train_duck_quantized(&student).unwrap();
        report::History::read(&student.run_dir().join("metrics.jsonl")).unwrap().train
    };
    let place = format!("distill.teacher={}", wide.run_dir().display());
    let related = ["distill.relation_weight=100.0", "distill.relation_heads=2", "distill.layer=1"];
    let train = history("related", &[&[place.as_str()][..], &related].concat());
    let relation: Vec<f64> = train.iter().map(|report| report.relation.unwrap()).collect();
    assert!(relation[59] < 0.3 * relation[0], "{relation:?}");
    assert!(train.iter().all(|report| report.hidden.is_none()));

    let place = format!("distill.teacher={}", equal.run_dir().display());
    let train = history("hidden", &[&place, "distill.hidden_weight=10.0"]);
    let hidden: Vec<f64> = train.iter().map(|report| report.hidden.unwrap()).collect();
    assert!(hidden[59] < 0.5 * hidden[0], "{hidden:?}");
    // Without a weight a term is not computed, and the terms are not part of the reported loss.
    let train = history("neither", &[&place]);
    assert!(train.iter().all(|report| report.hidden.is_none() && report.relation.is_none()));
    assert!(train.iter().all(|report| report.loss < 6.5));
}

#[test]
fn cached_teacher_logits_train_like_the_live_teacher() {
    let out = tempfile::tempdir().unwrap();
    let teacher = experiment(out.path(), "teacher", &["quant.enabled=false"]);
    train_duck_quantized(&teacher).unwrap();
    let place = format!("distill.teacher={}", teacher.run_dir().display());
    let student = |name: &str, place: &str| {
        let experiment = experiment(out.path(), name, &[place, "distill.weight=1.0", "run.seed=2"]);
        train_duck_quantized(&experiment).map(|result| (result.valid_loss.unwrap(), experiment))
    };
    let (expected, live) = student("live", &place).unwrap();
    let file = out.path().join("teacher.logits");
    let mut positions = 0;
    cache_teacher_logits(live.clone(), 64, &file, |done, total| {
        positions += done;
        assert!(positions < total);
    })
    .unwrap();
    assert!(positions > 10_000);
    let place = format!("distill.teacher={}", file.display());
    let (found, recorded) = student("recorded", &place).unwrap();
    // Logits of other windows, without the 195 least likely bytes.
    assert!((found - expected).abs() < 0.1, "{found}, {expected}");
    let divergences = |experiment: &Experiment| -> Vec<f64> {
        let history = report::History::read(&experiment.run_dir().join("metrics.jsonl")).unwrap();
        history.train.iter().map(|report| report.divergence.unwrap()).collect()
    };
    let (live, recorded) = (divergences(&live), divergences(&recorded));
    assert!((live[0] - recorded[0]).abs() < 0.3, "{}, {}", live[0], recorded[0]);
    assert!(recorded[59] < 0.5 * recorded[0], "{recorded:?}");

    let fails = |assignments: &[&str]| {
        let assignments = [&[place.as_str()], assignments].concat();
        train_duck_quantized(&experiment(out.path(), "misfit", &assignments)).unwrap_err().to_string()
    };
    assert!(fails(&["distill.temperature=2.0"]).contains("expected distill.temperature = 1.0"));
    assert!(fails(&["distill.hidden_weight=1.0"]).contains("hidden_weight = 0.0"));
    assert!(fails(&["data.tokenizer=char"]).contains("another text or tokenizer"));
    let error =
        cache_teacher_logits(experiment(out.path(), "again", &[&place]), 4, &file, |_, _| ()).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("expected a run folder or a model file"), "{error}");
}

#[test]
fn a_teacher_that_does_not_fit_is_named() {
    let out = tempfile::tempdir().unwrap();
    let refusal = |assignments: &[&str]| {
        let error = train_duck_quantized(&experiment(out.path(), "student", assignments)).unwrap_err();
        // A refused run leaves no folder that a later command would take for a run.
        assert!(!out.path().join("student-1/experiment.toml").exists());
        error
    };
    let error = refusal(&["distill.teacher=nowhere.gguf"]);
    assert!(matches!(error, TrainError::Import(_)) && error.to_string().contains("nowhere.gguf"), "{error}");

    let teacher =
        experiment(out.path(), "teacher", &["run.steps=1", "run.eval_every=1", "data.tokenizer=char"]);
    train_duck_quantized(&teacher).unwrap();
    let place = format!("distill.teacher={}", teacher.run_dir().display());
    let error = refusal(&[&place]);
    assert_eq!(error.exit_code(), 2, "{error}");
    assert!(error.to_string().contains("tokenizer"), "{error}");

    let error = refusal(&[&place, "data.tokenizer=char", "model.context=64"]);
    assert!(error.to_string().contains("model.context = 64"), "{error}");

    let fitting = [place.as_str(), "data.tokenizer=char"];
    let refusal = |assignments: &[&str]| refusal(&[&fitting, assignments].concat()).to_string();
    let error = refusal(&["distill.hidden_weight=1.0", "model.d_model=48"]);
    assert!(error.contains("model.d_model = 48"), "{error}");
    let error = refusal(&["distill.relation_weight=1.0", "model.d_model=40", "distill.relation_heads=5"]);
    assert!(error.contains("distill.relation_heads = 5"), "{error}");
}
