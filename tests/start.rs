//! Promise: a run may start from any model of its shape, and loses only what rounding loses.

use crate::{shape, small_experiment};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_ternary::{
    ImportError, export_for_inference,
    nn::{Activation, DuckConfig, DuckQuantized, Family},
    quant::{Granularity, QuantConfig, ScaleRule, Sparsity},
    report::RunResult,
    run::{Experiment, RunOptions, TrainError, run, train_duck_quantized},
};
use std::path::Path;
use ternary_format::{PackedModel, WriteOptions, write_model};

const FAMILIES: [Family; 3] = [Family::Gpt2, Family::Llama, Family::Bitnet];

fn device() -> Device {
    burn_ternary::device::device("flex").unwrap()
}

fn float(config: &DuckConfig) -> PackedModel {
    let model = config.init(&QuantConfig::default().float(), 5, &device());
    export_for_inference(&model, None, "duck").unwrap()
}

/// `[18, vocab]`
fn logits(model: &DuckQuantized) -> Vec<Vec<f32>> {
    let ids: Vec<i64> = (0..2 * 9).map(|i| i * 7 % 13).collect();
    let logits = model.forward(Tensor::<2, Int>::from_data(TensorData::new(ids, [2, 9]), &device()));
    let logits: Vec<f32> = logits.into_data().iter::<f32>().collect();
    logits.chunks(model.config().vocab_size).map(<[f32]>::to_vec).collect()
}

#[test]
fn a_model_starts_with_the_weights_of_another() {
    for family in FAMILIES {
        for tied in [true, false] {
            let config = shape(family).with_tied(tied);
            let packed = float(&config);
            let expected = logits(&DuckQuantized::from_packed(&packed, &device()).unwrap());
            for scale in [ScaleRule::Absmean, ScaleRule::Learned, ScaleRule::Seq] {
                let quant =
                    QuantConfig::default().with_scale(scale).with_granularity(Granularity::PerGroup(32));
                // Neither the seed nor the rotary context affects the result.
                let longer = if family == Family::Gpt2 { 10 } else { 20 };
                let config = config.clone().with_context(longer);
                let model = config.init_from(&packed, &quant, 77, &device()).unwrap();
                model.schedule_handle().lambda.set(0.0);
                assert_eq!(logits(&model), expected, "{family:?} {tied}");
                model.schedule_handle().lambda.set(1.0);
                assert_ne!(logits(&model), expected);
                // Quantized, it equals the same rule applied to the same weights.
                let twin = config.init_from(&packed, &quant.clone().float(), 1, &device()).unwrap();
                for ((_, linear), (path, source)) in model.linears().into_iter().zip(twin.linears()) {
                    let quantizer = linear.quantizer.as_ref().unwrap();
                    let mean = source.weight.val().abs().mean().into_scalar::<f32>();
                    let scales = quantizer.scales(linear.weight.val()).mean().into_scalar::<f32>();
                    let factor = if scale == ScaleRule::Absmean { 1.0 } else { 1.534 };
                    assert!((scales / mean - factor).abs() < 2e-3, "{path} {scale:?}: {scales} {mean}");
                }
            }
        }
    }
}

#[test]
fn new_ids_are_the_mean_of_the_others() {
    for tied in [true, false] {
        let config = shape(Family::Llama).with_tied(tied);
        let packed = float(&config);
        let known = logits(&DuckQuantized::from_packed(&packed, &device()).unwrap());
        let config = config.with_vocab_size(16);
        let more = logits(&config.init_from(&packed, &QuantConfig::default().float(), 0, &device()).unwrap());
        for (known, more) in known.iter().zip(&more) {
            assert!(known.iter().zip(more).all(|(a, b)| (a - b).abs() < 1e-6), "{known:?} {more:?}");
            let mean = known.iter().sum::<f32>() / 13.0;
            assert!(more[13..].iter().all(|new| (new - mean).abs() < 1e-5), "{mean} {more:?}");
        }
    }
}

#[test]
fn a_llama_starts_a_bitnet_and_a_tied_head_an_untied_one() {
    let packed = float(&shape(Family::Llama));
    let config = shape(Family::Bitnet).with_tied(false);
    let model = config.init_from(&packed, &QuantConfig::default(), 0, &device()).unwrap();
    let values = |tensor: Tensor<2>| tensor.into_data().iter::<f32>().collect::<Vec<f32>>();
    assert_eq!(values(model.head.as_ref().unwrap().val()), values(model.embedding.val()));
    for block in &model.transformer.blocks {
        let norm = block.attention.sub_norm.as_ref().unwrap();
        assert!(norm.weight.val().into_data().iter::<f32>().all(|weight| weight == 1.0));
    }
}

#[test]
fn another_shape_is_refused_by_its_key() {
    let config = shape(Family::Gpt2);
    let packed = float(&config);
    let quant = QuantConfig::default();
    type Change = fn(&mut DuckConfig);
    let changes: [(&str, Change); 9] = [
        ("family", |config| (config.family, config.activation) = (Family::Llama, Activation::Swiglu)),
        ("vocab_size", |config| config.vocab_size = 12),
        ("context", |config| config.context = 12),
        ("d_model", |config| config.d_model = 128),
        ("n_layers", |config| config.n_layers = 3),
        ("n_heads", |config| (config.n_heads, config.n_kv_heads) = (2, 2)),
        ("d_ff", |config| config.d_ff = 128),
        ("activation", |config| config.activation = Activation::SquaredRelu),
        ("norm_eps", |config| config.norm_eps = 1e-6),
    ];
    for (key, change) in changes {
        let mut other = config.clone();
        change(&mut other);
        let error = other.init_from(&packed, &quant, 0, &device()).unwrap_err();
        assert!(matches!(&error, ImportError::Shape { key: found, .. } if *found == key), "{key}: {error}");
    }
    let untied = float(&config.clone().with_tied(false));
    let error = config.init_from(&untied, &quant, 0, &device()).unwrap_err();
    assert!(error.to_string().starts_with("model.tied: found true, expected the false"), "{error}");
}

#[test]
fn ternary_files_train_further_with_learned_scales_only() {
    let config = shape(Family::Llama);
    let ternary = config.init(&QuantConfig::default(), 3, &device());
    let packed = export_for_inference(&ternary, None, "duck").unwrap();
    let learned = QuantConfig::default().with_scale(ScaleRule::Learned);
    let error = config.init_from(&packed, &QuantConfig::default(), 0, &device()).unwrap_err();
    assert!(matches!(error, ImportError::Requantized { .. }), "{error}");
    assert!(error.to_string().contains("quant.granularity = \"per_channel\""), "{error}");
    let other = learned.clone().with_granularity(Granularity::PerTensor);
    assert!(config.init_from(&packed, &other, 0, &device()).is_err());
    let sparse = learned.clone().with_sparsity(Sparsity::ZeroFraction(0.9));
    let error = config.init_from(&packed, &sparse, 0, &device()).unwrap_err();
    assert!(error.to_string().contains("quant.sparsity = \"none\""), "{error}");
    for quant in [learned.clone(), learned.float()] {
        let model = config.init_from(&packed, &quant, 0, &device()).unwrap();
        assert_eq!(logits(&model), logits(&ternary));
    }
}

fn experiment(out: &Path, name: &str, assignments: &[&str]) -> Experiment {
    let common = ["run.steps=30", "run.eval_every=30", "run.checkpoint_every=10", "quant.embedding=float"];
    small_experiment(out, name, &[&common[..], assignments].concat())
}

#[test]
fn a_run_reports_its_initial_loss_before_and_after_rounding() {
    let out = tempfile::tempdir().unwrap();
    let float = experiment(out.path(), "float", &["quant.enabled=false"]);
    let before = train_duck_quantized(&float).unwrap();
    // From the run, and from its model file.
    for (name, place) in [("run", float.run_dir()), ("file", float.run_dir().join("model.gguf"))] {
        let place = place.display();
        let start = [format!("run.start_from={place}"), format!("data.tokenizer={place}")];
        let experiment = experiment(out.path(), name, &[&start[0], &start[1], "schedule.float_until=0.0"]);
        let result = train_duck_quantized(&experiment).unwrap();
        let [was, float, rounded, after] =
            [before.valid_loss, result.start_float_loss, result.start_rounded_loss, result.valid_loss]
                .map(Option::unwrap);
        assert!((was - float).abs() < 1e-6, "{was} {float}");
        assert!(rounded > float + 0.02 && after < rounded, "{float} {rounded} {after}");
        // A later session of the run still reports the initial losses.
        let path = experiment.run_dir().join("result.json");
        std::fs::remove_dir_all(experiment.run_dir().join("checkpoints/step-00000030")).unwrap();
        let resumed = run(experiment, &RunOptions::default().with_resume(true)).unwrap();
        assert_eq!((resumed.start_float_loss, resumed.valid_loss), (Some(float), Some(after)));
        let read = RunResult::read(&path).unwrap().start_rounded_loss.unwrap();
        assert!((read - rounded).abs() < 1e-12, "{read} {rounded}");
    }
}

#[test]
fn a_start_that_is_none_is_named() {
    let out = tempfile::tempdir().unwrap();
    let refusal = |assignments: &[&str]| {
        train_duck_quantized(&experiment(out.path(), "student", assignments)).unwrap_err()
    };
    let error = refusal(&["run.start_from=nowhere.gguf"]);
    assert!(matches!(error, TrainError::Import(_)) && error.to_string().contains("nowhere.gguf"), "{error}");
    let path = out.path().join("other.gguf");
    write_model(&float(&shape(Family::Llama)), &path, &WriteOptions::default()).unwrap();
    let error = refusal(&[&format!("run.start_from={}", path.display())]);
    assert_eq!(error.exit_code(), 2, "{error}");
    assert!(error.to_string().contains("model.d_model: found 32, expected the 64"), "{error}");
    // A refused run leaves no folder that a later command would take for a run.
    assert!(!out.path().join("student-1/checkpoints/step-00000001").exists());
}
