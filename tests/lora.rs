//! Promise: adapters learn on a frozen model, and can be applied to its file.

use crate::{resume::tensors, small_experiment};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_ternary::export_for_inference;
use burn_ternary::nn::{DuckConfig, DuckQuantized, Family, LoraConfig};
use burn_ternary::quant::{ActivationPrecision, QuantConfig};
use burn_ternary::report::{self, RunResult};
use burn_ternary::run::{
    Experiment, RunOptions, SavedRun, TrainError, packed_model, run, train_duck_quantized,
};
use std::fs;
use std::path::Path;
use ternary_format::{
    Adapter, Encoding, LowRank, PackedModel, WriteOptions, huggingface::read_adapter, read_model, write_model,
};
use ternary_infer::{ActivationMode, Engine, EngineOptions};

fn device() -> Device {
    burn_ternary::device::device("flex").unwrap()
}

/// Rows that fit Q2_0, so that a ternary run leaves a file.
fn experiment(out: &Path, name: &str, assignments: &[&str]) -> Experiment {
    let common = [
        "run.steps=30",
        "run.eval_every=30",
        "run.checkpoint_every=10",
        "model.d_model=64",
        "model.n_layers=2",
        "run.keep_checkpoints=9",
    ];
    small_experiment(out, name, &[&common[..], assignments].concat())
}

/// The experiment that starts from `base`, with its own text.
fn fine_tuning(out: &Path, name: &str, base: &Path, assignments: &[&str]) -> Experiment {
    let text = out.join("quacks.txt");
    let line = |i: usize| format!("Quack {} quack, says duck number {}.\n", i * i % 17, i % 10);
    fs::write(&text, (0..400).map(line).collect::<String>()).unwrap();
    let [text, base] = [("data.train", &text), ("run.start_from", &base.to_path_buf())]
        .map(|(key, path)| format!("{key}={}", toml::Value::from(path.display().to_string())));
    let text = text.replace("=\"", "=[\"") + "]";
    let common = [&text, &base, "lora.rank=4", "lora.alpha=8.0", "optim.lr=0.01", "quant.scale=learned"];
    experiment(out, name, &[&common[..], assignments].concat())
}

/// `[ids, vocab]`
fn training(model: &DuckQuantized, ids: &[u32]) -> Vec<f32> {
    let ids: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
    let data = TensorData::new(ids.clone(), [1, ids.len()]);
    model.forward(Tensor::<2, Int>::from_data(data, &device())).into_data().iter::<f32>().collect()
}

fn engine(packed: &PackedModel, activations: ActivationMode, ids: &[u32]) -> Vec<f32> {
    let options = EngineOptions::default().with_threads(1).with_activations(activations);
    Engine::from_model(packed.clone(), options).unwrap().logits(ids).unwrap()
}

fn some_ids(vocab: usize) -> Vec<u32> {
    (0..11).map(|i| (i * i + 3) % vocab as u32).collect()
}

/// The largest difference over the largest number.
fn error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let spread = expected.iter().fold(0f32, |max, x| max.max(x.abs()));
    found.iter().zip(expected).fold(0f32, |max, (a, b)| max.max((a - b).abs())) / spread
}

/// Trains a base with the settings of `assignments`; its run folder.
fn base(out: &Path, assignments: &[&str]) -> std::path::PathBuf {
    let experiment = experiment(out, "base", assignments);
    train_duck_quantized(&experiment).unwrap();
    experiment.run_dir()
}

#[test]
fn adapters_learn_on_ternary_weights_that_keep_every_bit() {
    let _alone = crate::alone_with_the_generator();
    let out = tempfile::tempdir().unwrap();
    let integer = ["quant.activations=int8", "quant.matmul_precision=int8"];
    let base = base(out.path(), &integer);
    // From the run and from its model file, with a teacher and dropout; killed and resumed.
    let teacher = format!("distill.teacher={}", base.display());
    let more = [&teacher[..], "distill.weight=0.1", "model.dropout=0.1", integer[0], integer[1]];
    for (name, place) in [("run", base.clone()), ("file", base.join("model.gguf"))] {
        let experiment = fine_tuning(out.path(), name, &place, &more);
        let result = train_duck_quantized(&experiment).unwrap();
        let (before, after) = (result.start_rounded_loss.unwrap(), result.valid_loss.unwrap());
        assert!(after < before - 0.1, "{before} {after}");
        let run_dir = experiment.run_dir();
        let history = report::History::read(&run_dir.join("metrics.jsonl")).unwrap();
        assert!(history.train.iter().all(|report| report.divergence.is_some()));
        assert_eq!(history.valid[0].flipped, Some(0.0));

        let checkpoint = |step: usize| run_dir.join(format!("checkpoints/step-{step:08}"));
        let [first, last] = [10, 30].map(|step| tensors(&checkpoint(step)));
        let is_adapter = |name: &str| name.contains(".adapter.");
        // Two factors for each of seven matrices in two blocks, with two moments each.
        assert_eq!(last.iter().filter(|(name, _)| is_adapter(name)).count(), 2 * 7 * 2 * 3);
        let states = |name: &str| name.contains(' ');
        assert!(
            last.iter().all(|(name, _)| is_adapter(name) || !states(name)),
            "the base has an optimizer's state"
        );
        for ((name, first), (_, last)) in first.iter().zip(&last) {
            assert_eq!(first != last, is_adapter(name), "{name}");
        }

        // The base is that of the file; only the adapter is new.
        let packed = packed_model(&run_dir).unwrap();
        let adapter = packed.adapter.clone().unwrap();
        let file = read_model(&base.join("model.gguf")).unwrap();
        let mut row = vec![0.0; 64];
        let mut own = row.clone();
        for (name, tensor) in &file.tensors {
            for index in 0..tensor.rows() {
                row.resize(tensor.cols(), 0.0);
                own.resize(tensor.cols(), 0.0);
                tensor.read_row(index, &mut row);
                packed.tensors[name].read_row(index, &mut own);
                assert_eq!(row, own, "{name}");
            }
        }
        assert_eq!(adapter.pairs.len(), 14);
        assert!(
            adapter.pairs.values().all(|pair| pair.rank() == 4 && pair.alpha() == 8.0 && !pair.is_zero())
        );
        assert!(!run_dir.join("model.gguf").exists());
        assert!(result.no_file.as_ref().unwrap().contains("--adapter"), "{:?}", result.no_file);
        assert_eq!(result.adapter_bytes, Some(adapter.bytes() as u64));
        assert!(result.summary().contains("adapter"));
        let read = read_adapter(&run_dir.join("adapter"), &file.spec).unwrap();
        assert_eq!(read, adapter);
        // The base in the run folder and the file are one model.
        assert!(read.was_trained_on(&packed.tensors) && read.was_trained_on(&file.tensors));
        assert!(result.summary().contains(&format!("duck generate {} --adapter", place.display())));

        // With the file it computes what the run did, in the engine and in a module.
        let saved = SavedRun::open(&run_dir, &device()).unwrap();
        let adapted = file.with_adapter(Some(read));
        let ids = saved.tokenizer.encode("Quack 16 quack").unwrap();
        let expected = training(&saved.model, &ids);
        let loaded = DuckQuantized::from_packed(&adapted, &device()).unwrap();
        let float = training(&loaded, &ids);
        assert!(error(&engine(&adapted, ActivationMode::F32, &ids), &float) < 1e-4);
        let int8 = error(&engine(&adapted, ActivationMode::Int8, &ids), &expected);
        println!("int8 engine: {int8:.1e} of the largest logit");
        assert!(int8 < 1e-2, "{int8}");
        assert!(error(&training(&SavedRun::open(&base, &device()).unwrap().model, &ids), &expected) > 0.1);

        // Killed after its twentieth step.
        let losses = fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap().lines().count();
        fs::remove_dir_all(checkpoint(30)).unwrap();
        let resumed = run(experiment, &RunOptions::default().with_resume(true).with_quiet(true)).unwrap();
        assert_eq!(resumed.valid_loss, result.valid_loss);
        assert_eq!(tensors(&checkpoint(30)), last);
        assert_eq!(fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap().lines().count(), losses);
        assert_eq!(packed_model(&run_dir).unwrap().adapter, Some(adapter));
    }
}

#[test]
fn a_float_base_takes_its_adapter_into_the_file() {
    let out = tempfile::tempdir().unwrap();
    let base = base(out.path(), &["quant.enabled=false"]);
    let more =
        ["quant.enabled=false", "lora.targets=[\"query\", \"value\"]", "run.steps=10", "run.eval_every=10"];
    let experiment = fine_tuning(out.path(), "float", &base, &more);
    let result = train_duck_quantized(&experiment).unwrap();
    assert_eq!(result.no_file, None);
    let run_dir = experiment.run_dir();
    let saved = SavedRun::open(&run_dir, &device()).unwrap();
    let ids = some_ids(259);
    let expected = training(&saved.model, &ids);
    let [merged, before] = [&run_dir, &base].map(|dir| {
        let model = DuckQuantized::load(&dir.join("model.gguf"), &device()).unwrap();
        training(&model, &ids)
    });
    assert!(error(&merged, &expected) < 1e-5 && error(&before, &expected) > 1e-2);
    // The adapter is written as well, for use with the base.
    let file = read_model(&base.join("model.gguf")).unwrap();
    let adapter = read_adapter(&run_dir.join("adapter"), &file.spec).unwrap();
    assert_eq!(adapter.pairs.len(), 4);
    assert!(adapter.base_signs.is_some() && adapter.was_trained_on(&file.tensors));
    let adapted = file.with_adapter(Some(adapter));
    assert!(error(&engine(&adapted, ActivationMode::F32, &ids), &expected) < 1e-4);
    // A run may start from it, including its adapters.
    let start = format!("run.start_from={}", run_dir.display());
    let next =
        ["quant.enabled=false", "run.steps=1", "lora.rank=0", "optim.lr=1e-9", "optim.muon_lr=1e-9", &start];
    let next = fine_tuning(out.path(), "next", &base, &next);
    let start = train_duck_quantized(&next).unwrap().start_float_loss.unwrap();
    assert!((start - result.valid_loss.unwrap()).abs() < 1e-4, "{start} {:?}", result.valid_loss);
}

#[test]
fn a_base_with_input_norms_can_be_adapted() {
    let out = tempfile::tempdir().unwrap();
    let base = base(out.path(), &["quant.input_norm=true", "run.steps=10", "run.eval_every=10"]);
    let short = ["run.steps=10", "run.eval_every=10"];
    let refused = fine_tuning(out.path(), "refused", &base, &short);
    let error = train_duck_quantized(&refused).unwrap_err();
    assert!(error.to_string().contains("quant.input_norm is false, expected true"), "{error}");
    let experiment =
        fine_tuning(out.path(), "normed", &base, &[&short[..], &["quant.input_norm=true"]].concat());
    let result = train_duck_quantized(&experiment).unwrap();
    let before = RunResult::read(&base.join("result.json")).unwrap();
    assert!(before.no_file.is_some());
    assert!(result.valid_loss.unwrap() < result.start_rounded_loss.unwrap());
    assert!(result.no_file.unwrap().contains("input_norm"));
    assert!(experiment.run_dir().join("adapter/adapter_config.json").exists());
}

#[test]
fn a_base_that_would_not_stand_still_is_refused() {
    let out = tempfile::tempdir().unwrap();
    let base = base(out.path(), &["run.steps=1"]);
    let refusal = |name: &str, base: &Path, assignments: &[&str]| {
        let error = train_duck_quantized(&fine_tuning(out.path(), name, base, assignments)).unwrap_err();
        assert!(matches!(error, TrainError::Experiment { .. }) && error.exit_code() == 2, "{error}");
        error.to_string()
    };
    let error = refusal("rule", &base, &["quant.scale=absmean"]);
    assert!(error.contains("quant.scale = \"learned\""), "{error}");
    let error = refusal("table", &base, &["quant.embedding=int4"]);
    assert!(error.contains("token_embd.weight") && error.contains("tables"), "{error}");
    let error = refusal("ids", &base, &["model.vocab_size=300"]);
    assert!(error.contains("token_embd.weight"), "{error}");
    let twin = experiment(out.path(), "twin", &["quant.enabled=false", "run.steps=1"]);
    train_duck_quantized(&twin).unwrap();
    let error = refusal("float", &twin.run_dir(), &[]);
    assert!(error.contains("quant.enabled = false"), "{error}");
    // A ternary model with adapters cannot be the base of further adapters.
    let first = fine_tuning(out.path(), "first", &base, &["run.steps=1"]);
    train_duck_quantized(&first).unwrap();
    let second = fine_tuning(out.path(), "second", &first.run_dir(), &[]);
    let error = train_duck_quantized(&second).unwrap_err();
    assert!(error.to_string().contains("adapter cannot be merged"), "{error}");
}

#[test]
fn the_engine_with_an_adapter_has_the_logits_of_the_module() {
    for family in [Family::Gpt2, Family::Llama, Family::Bitnet] {
        for (enabled, activations) in [
            (true, ActivationPrecision::Float),
            (true, ActivationPrecision::Int8),
            (false, ActivationPrecision::Float),
        ] {
            let config: DuckConfig = crate::shape(family);
            let quant = QuantConfig::default().with_enabled(enabled).with_activations(activations);
            let lora = LoraConfig::default().with_rank(5).with_alpha(7.0).with_targets(vec!["all".into()]);
            let model = config.init(&quant, 2, &device()).with_lora(&lora, 3);
            // As after some training.
            let fill = |name: &str, pair: &LowRank| {
                let b =
                    (0..pair.b().len()).map(|i| ((i * 37 + name.len()) % 101) as f32 / 500.0 - 0.1).collect();
                LowRank::new(5, 7.0, pair.a().to_vec(), b).unwrap()
            };
            let mut packed = export_for_inference(&model, None, "duck").unwrap();
            let adapter = packed.adapter.take().unwrap();
            let pairs = adapter.pairs.iter().map(|(name, pair)| (name.clone(), fill(name, pair)));
            let plain = packed.clone();
            packed.adapter = Some(Adapter::new(pairs.collect()));
            let module = DuckQuantized::from_packed(&packed, &device()).unwrap();
            assert_eq!(module.adapter().unwrap(), packed.adapter);
            let ids = some_ids(13);
            let expected = training(&module, &ids);
            let without = engine(&plain, ActivationMode::F32, &ids);
            let found = error(&engine(&packed, ActivationMode::F32, &ids), &expected);
            assert!(found <= 1e-4 && error(&without, &expected) > 1e-2, "{family:?} {quant:?}: {found}");
            let int8 = error(&engine(&packed, ActivationMode::Int8, &ids), &expected);
            assert!(int8 < 5e-2, "{family:?} {quant:?}: {int8}");
            if !enabled {
                let merged = packed.merged().unwrap();
                let logits = training(&DuckQuantized::from_packed(&merged, &device()).unwrap(), &ids);
                assert!(error(&logits, &expected) < 1e-5);
                // A Hugging Face folder has the sum, whichever matrices the family fuses.
                let out = tempfile::tempdir().unwrap();
                let weights = Some("F32".parse().unwrap());
                let options =
                    WriteOptions::default().with_weights(weights).with_embedding(Some(Encoding::F32));
                write_model(&packed, &out.path().join("merged"), &options).unwrap();
                let read = read_model(&out.path().join("merged")).unwrap();
                assert!(error(&engine(&read, ActivationMode::F32, &ids), &expected) < 1e-4);
            }
        }
    }
}
