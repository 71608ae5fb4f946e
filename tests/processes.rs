//! Promise: a run is a function of its experiment, not of the number of its processes. Here the processes are threads; over MPI,
//! with dropout, kills and signals, `.ci/processes` tests the same.

use crate::resume::tensors;
use crate::small_experiment;
use burn::data::dataloader::DataLoader;
use burn::tensor::Device;
use burn_ternary::data::{DataConfig, Dataset, LmBatch, LmLoader};
use burn_ternary::nn::Family;
use burn_ternary::quant::QuantConfig;
use burn_ternary::report::RunResult;
use burn_ternary::run::{Experiment, RunOptions, TrainError, run};
use burn_ternary::train::optim::OptimConfig;
use burn_ternary::train::schedule::ScheduleConfig;
use burn_ternary::train::{QuantizationTrainer, TrainState};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use ternary_parallel::{Group, Threads};

const STEPS: usize = 8;

fn experiment(home: &Path, name: &str, assignments: &[&str]) -> Experiment {
    let steps = format!("run.steps={STEPS}");
    let common = [
        "run.batch_size=2",
        "run.gradient_accumulation=4",
        "run.eval_every=4",
        "run.checkpoint_every=4",
        &steps,
    ];
    small_experiment(home, name, &[&common[..], assignments].concat())
}

fn options(rank: Threads, resume: bool) -> RunOptions {
    let group: Arc<dyn Group> = Arc::new(rank);
    RunOptions::default().with_quiet(true).with_resume(resume).with_group(Some(group))
}

/// Runs `experiment_of(rank)` on every process of a group of `size`.
fn on_processes(
    size: usize,
    resume: bool,
    experiment_of: impl Fn(usize) -> Experiment + Sync,
) -> Vec<Result<RunResult, TrainError>> {
    let experiment_of = &experiment_of;
    std::thread::scope(|scope| {
        let ranks = Threads::group(size).into_iter().enumerate();
        let ranks: Vec<_> = ranks
            .map(|(rank, group)| scope.spawn(move || run(experiment_of(rank), &options(group, resume))))
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[derive(PartialEq)]
struct Outcome {
    metrics: Vec<String>,
    tensors: Vec<(String, Vec<u8>)>,
    state: String,
}

/// Every number of the metrics that does not measure time or memory, as text, and every tensor of the last checkpoint.
fn outcome(run_dir: &Path) -> Outcome {
    const MEASURED: [&str; 5] = ["tokens_per_s", "peak_rss_bytes", "elapsed_s", "processes", "wait_s"];
    let line = |line: &str| {
        let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
        let fields = value.as_object_mut().unwrap();
        MEASURED.iter().for_each(|name| drop(fields.remove(*name)));
        value.to_string()
    };
    let checkpoint = run_dir.join(format!("checkpoints/step-{STEPS:08}"));
    let manifest = fs::read_to_string(checkpoint.join("manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    let mut state: TrainState = serde_json::from_value(manifest["state"].clone()).unwrap();
    state.elapsed_s = 0.0;
    let metrics = fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap();
    let metrics = metrics.lines().map(line).collect();
    let state = serde_json::to_string(&state).unwrap();
    Outcome { metrics, tensors: tensors(&checkpoint), state }
}

#[test]
fn the_number_of_processes_changes_no_bit() {
    let home = tempfile::tempdir().unwrap();
    let teacher = experiment(home.path(), "teacher", &["quant.enabled=false"]);
    run(teacher.clone(), &RunOptions::default().with_quiet(true)).unwrap();
    let teacher = teacher.run_dir();
    let ternary = experiment(home.path(), "ternary", &["quant.scale=learned"]);
    run(ternary.clone(), &RunOptions::default().with_quiet(true)).unwrap();
    let (distilled, base) = (
        format!("distill.teacher={}", teacher.display()),
        format!("run.start_from={}", ternary.run_dir().display()),
    );
    let variants: [(&str, &[&str], &[usize]); 6] = [
        ("adamw", &["optim.matrix_optimizer=adamw"], &[2, 4]),
        (
            "int8",
            &[
                "optim.moments=int8",
                "quant.activations=int8",
                "quant.matmul_precision=int8",
                "quant.scale=learned",
            ],
            &[4],
        ),
        // Three does not divide a power of two, and two is no branch of the tree of six.
        ("six", &["run.gradient_accumulation=6", "optim.z_loss=0.0001"], &[2, 3, 6]),
        ("float-first", &["schedule.float_until=0.5", "schedule.ramp_until=0.5", "data.tokenizer=bpe"], &[2]),
        ("distilled", &[&distilled, "distill.weight=0.5", "distill.hidden_weight=0.1"], &[2]),
        ("lora", &[&base, "lora.rank=4", "quant.scale=learned", "schedule.float_until=0.0"], &[4]),
    ];
    for (name, assignments, sizes) in variants {
        let alone = experiment(home.path(), name, assignments);
        run(alone.clone(), &RunOptions::default().with_quiet(true)).unwrap();
        let expected = outcome(&alone.run_dir());
        assert!(expected.tensors.len() > 10, "{} tensors", expected.tensors.len());
        for &size in sizes {
            let shared = experiment(home.path(), &format!("{name}-on-{size}"), assignments);
            for result in on_processes(size, false, |_| shared.clone()) {
                result.unwrap();
            }
            assert!(outcome(&shared.run_dir()) == expected, "{name} on {size} processes differs");
        }
    }
}

#[test]
fn a_checkpoint_resumes_on_any_number_of_processes() {
    let home = tempfile::tempdir().unwrap();
    let assignments = ["optim.matrix_optimizer=muon", "data.tokenizer=bpe", "data.bpe_vocab_size=300"];
    let made = experiment(home.path(), "run", &assignments);
    on_processes(4, false, |_| made.clone()).into_iter().for_each(|result| drop(result.unwrap()));
    let expected = outcome(&made.run_dir());
    for size in [1, 2, 4] {
        fs::remove_dir_all(made.run_dir().join(format!("checkpoints/step-{STEPS:08}"))).unwrap();
        on_processes(size, true, |_| made.clone()).into_iter().for_each(|result| drop(result.unwrap()));
        assert!(outcome(&made.run_dir()) == expected, "resumed on {size}");
    }
}

/// The message of the process that reports an error, and the exit code of all.
fn refusal(size: usize, experiment_of: impl Fn(usize) -> Experiment + Sync) -> (String, u8) {
    let errors: Vec<_> =
        on_processes(size, false, experiment_of).into_iter().map(Result::unwrap_err).collect();
    let code = errors[0].exit_code();
    assert!(errors.iter().all(|error| error.exit_code() == code), "{errors:?}");
    let mut reports = errors.iter().filter(|error| !error.is_reported());
    let report = reports.next().unwrap().to_string();
    assert!(reports.next().is_none(), "one process reports: {errors:?}");
    (report, code)
}

#[test]
fn processes_that_differ_are_refused_before_anything_is_written() {
    let home = tempfile::tempdir().unwrap();
    let other_text = home.path().join("other.txt");
    fs::write(&other_text, "quack ".repeat(400)).unwrap();
    let text = home.path().join("text.txt");
    fs::write(&text, "pond ".repeat(400)).unwrap();
    let (text, other_text) = (
        format!("data.train=[{:?}]", text.to_str().unwrap()),
        format!("data.train=[{:?}]", other_text.to_str().unwrap()),
    );
    for (name, at_first, at_second, fragment) in [
        ("rate", "optim.lr=0.001", "optim.lr=0.002", "rank 1 (host "),
        ("rate", "optim.lr=0.001", "optim.lr=0.002", "optim.lr is 0.002, on rank 0 0.001"),
        ("text", &text, &other_text, "the training text (data.train)"),
        ("split", "run.gradient_accumulation=3", "run.gradient_accumulation=3", "that divides them: 1, 3"),
    ] {
        let experiment_of =
            |rank| experiment(home.path(), name, &[if rank == 0 { at_first } else { at_second }]);
        let (report, code) = refusal(2, experiment_of);
        assert_eq!(code, 2, "{report}");
        assert!(report.contains(fragment), "{report}");
        assert!(!experiment_of(0).run_dir().join("experiment.toml").exists(), "{name}");
    }
}

#[test]
fn an_error_of_the_first_process_ends_all() {
    let home = tempfile::tempdir().unwrap();
    let made = experiment(home.path(), "run", &[]);
    // A file where the folder of checkpoints is to be.
    fs::create_dir_all(made.run_dir()).unwrap();
    fs::write(made.run_dir().join("checkpoints"), "").unwrap();
    let (report, code) = refusal(2, |_| made.clone());
    assert_eq!(code, 5, "{report}");
    assert!(report.starts_with("rank 0 of 2 (host ") && report.contains("checkpoints"), "{report}");
}

#[test]
fn a_run_that_diverges_returns_to_its_checkpoint_on_all_processes() {
    let home = tempfile::tempdir().unwrap();
    let diverges = |name: &str| {
        let assignments = [
            "optim.lr=1e9",
            "optim.muon_lr=1e9",
            "run.checkpoint_every=1",
            "run.max_bad_steps=1",
            "run.max_rollbacks=2",
        ];
        experiment(home.path(), name, &assignments)
    };
    let alone = run(diverges("alone"), &RunOptions::default().with_quiet(true)).unwrap_err();
    let (report, code) = refusal(2, |_| diverges("shared"));
    assert_eq!((code, alone.exit_code()), (6, 6), "{report}; {alone}");
    assert!(report.contains("after 2 rollbacks"), "{report}");
    let losses = |name: &str| crate::resume::losses(&diverges(name).run_dir());
    assert_eq!(losses("alone"), losses("shared"));
}

/// A trainer of each process, and the micro-batches of one step.
fn trainer_of(batches: &[LmBatch], group: Option<Threads>) -> (TrainState, Vec<f32>, f64) {
    let device = Device::default().autodiff();
    let config = crate::shape(Family::Llama).with_vocab_size(257).with_context(24);
    let model = config.init(&QuantConfig::default(), 3, &device);
    let mut trainer =
        QuantizationTrainer::new(model, &OptimConfig::default(), &ScheduleConfig::default(), 10, 3);
    let mut own = batches.to_vec();
    if let Some(group) = group {
        own = own[ternary_parallel::share(own.len(), group.rank(), group.size())].to_vec();
        trainer = trainer.with_group(Arc::new(group));
    }
    let report = trainer.train_step(own);
    let weights = trainer.model().linears()[0].1.weight.val().into_data().iter::<f32>().collect();
    (trainer.state().clone(), weights, report.loss)
}

#[test]
fn a_bad_or_empty_micro_batch_of_one_process_counts_once() {
    let folder = tempfile::tempdir().unwrap();
    let config = DataConfig::default().with_train(vec!["embedded".into()]).with_tokenizer("byte".into());
    let data = Dataset::prepare(&config, 24, 1, folder.path()).unwrap();
    let device = Device::default().autodiff();
    let loader = LmLoader::training(data.train, 1, 4, 4, &device);
    let batches: Vec<LmBatch> = loader.iter().map(Result::unwrap).collect();
    let changed = |from: usize, change: &dyn Fn(&mut LmBatch)| {
        let mut batches = batches.clone();
        batches[from..].iter_mut().for_each(change);
        batches
    };
    let empty = |batch: &mut LmBatch| (batch.tokens, batch.weight) = (0, 0.0);
    for (name, batches, skipped) in [
        ("good", batches.clone(), 0),
        ("NaN", changed(2, &|batch| batch.weight = f32::NAN), 1),
        ("two empty", changed(2, &empty), 0),
        // It completes the tree of the three others.
        ("one empty", changed(3, &empty), 0),
    ] {
        let alone = trainer_of(&batches, None);
        assert_eq!(alone.0.skipped_steps, skipped, "{name}");
        for size in [2, 4] {
            let ranks = Threads::group(size);
            let batches = &batches;
            let outcomes = std::thread::scope(|scope| {
                let ranks: Vec<_> = ranks
                    .into_iter()
                    .map(|rank| scope.spawn(move || trainer_of(batches, Some(rank))))
                    .collect();
                ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
            });
            for (state, weights, loss) in outcomes {
                assert_eq!((&state, &weights), (&alone.0, &alone.1), "{name} on {size}");
                assert_eq!(loss.to_bits(), alone.2.to_bits(), "{name} on {size}");
            }
        }
    }
}
