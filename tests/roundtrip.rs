//! Promise: a model file contains the codes and scales of training, and reproduces its forward pass.

use crate::shape;
use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{Device, Int, Tensor, TensorData},
};
use burn_ternary::{
    ExportError, ImportError, export_for_inference,
    nn::{DuckConfig, DuckQuantized, Family},
    quant::{ActivationPrecision, Granularity, QuantConfig, ScaleRule, Sparsity, TablePrecision},
    report::RunResult,
    run::{Experiment, SavedRun, TrainCommand, packed_model, train_duck_quantized},
};
use clap::Parser;
use half::f16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use ternary_format::{Encoding, PackedModel, WeightType, WriteOptions, read_model, write_model};
use ternary_infer::{ActivationMode, Engine, EngineOptions};

const FAMILIES: [Family; 3] = [Family::Gpt2, Family::Llama, Family::Bitnet];
const GRANULARITIES: [Granularity; 3] =
    [Granularity::PerTensor, Granularity::PerChannel, Granularity::PerGroup(32)];
const TABLES: [TablePrecision; 4] =
    [TablePrecision::Float, TablePrecision::Int8, TablePrecision::Int4, TablePrecision::Ternary];

fn device() -> Device {
    burn_ternary::device::device("flex").unwrap()
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// Moves every parameter away from its initial value, and keeps learned scales positive.
struct Noise(ChaCha8Rng);

impl ModuleMapper for Noise {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| {
            let shape = tensor.shape();
            let noise: Vec<f32> = (0..shape.num_elements()).map(|_| self.0.random_range(-0.1..0.1)).collect();
            let noise = Tensor::from_data(TensorData::new(noise, shape), &tensor.device());
            if D == 3 { tensor.clone() * (noise + 2.0) } else { tensor + noise }
        })
    }
}

fn trained(config: &DuckConfig, quant: &QuantConfig, seed: u64) -> DuckQuantized {
    config.validate().unwrap();
    config.init(quant, seed, &device()).map(&mut Noise(ChaCha8Rng::seed_from_u64(seed)))
}

fn logits(model: &DuckQuantized) -> Vec<f32> {
    let vocab = model.config().vocab_size as i64;
    let ids: Vec<i64> = (0..2 * 9).map(|i| i * 7 % vocab).collect();
    floats(model.forward(Tensor::<2, Int>::from_data(TensorData::new(ids, [2, 9]), &device())))
}

/// One model, with a name, for every difference that a file must express.
fn models() -> impl Iterator<Item = (String, DuckQuantized)> {
    let rules =
        [ScaleRule::Absmean, ScaleRule::Absmedian, ScaleRule::Twn, ScaleRule::Learned, ScaleRule::Seq];
    let families = FAMILIES.into_iter().flat_map(|f| GRANULARITIES.map(|g| (f, g)));
    let all = families.flat_map(move |(f, g)| TABLES.map(|table| (f, g, table)));
    all.enumerate().map(move |(i, (family, granularity, embedding))| {
        let scale = rules[i % rules.len()];
        let tied = i % 2 == 0;
        let head = TABLES[(i + i / 4) % 4];
        let sparsity = [Sparsity::None, Sparsity::ZeroFraction(0.9), Sparsity::NOfM([2, 8])][i % 7 % 3];
        // Only the gpt2 family has biases.
        let dead_bias = if family == Family::Gpt2 && i % 3 > 0 { 0.1 } else { 0.0 };
        let quant = QuantConfig::default()
            .with_scale(scale)
            .with_granularity(granularity)
            .with_sparsity(sparsity)
            .with_dead_bias(dead_bias)
            .with_embedding(embedding)
            .with_head(head);
        let name =
            format!("{family:?} {scale:?} {granularity:?} {sparsity:?} {embedding:?} tied {tied} {head:?}");
        (name, trained(&shape(family).with_tied(tied), &quant, i as u64))
    })
}

/// The values of a matrix of a container, `[out, in]`.
fn values(packed: &PackedModel, name: &str) -> Vec<f32> {
    let tensor = &packed.tensors[name];
    let mut values = vec![0.0; tensor.rows() * tensor.cols()];
    values.chunks_exact_mut(tensor.cols()).enumerate().for_each(|(row, values)| tensor.read_row(row, values));
    values
}

/// The path of a linear layer in the container.
fn file_name(path: &str) -> String {
    let parts = path.strip_prefix("transformer.blocks.").unwrap();
    let (block, part) = parts.split_once('.').unwrap();
    let part = match part {
        "attention.query" => "attn_q",
        "attention.key" => "attn_k",
        "attention.value" => "attn_v",
        "attention.output" => "attn_output",
        "feed_forward.gate" => "ffn_gate",
        "feed_forward.up" => "ffn_up",
        "feed_forward.down" => "ffn_down",
        other => panic!("{other}"),
    };
    format!("blk.{block}.{part}.weight")
}

#[test]
fn an_exported_matrix_has_the_codes_and_scales_of_the_forward_pass() {
    for (name, model) in models() {
        let packed = export_for_inference(&model, None, "duck").unwrap();
        packed.validate().unwrap();
        for (path, linear) in model.linears() {
            let at = format!("{name} {path}");
            let [cols, rows] = linear.weight.dims();
            let effective = floats(linear.effective_weight());
            let codes = floats(linear.codes().unwrap());
            let quantizer = linear.quantizer.as_ref().unwrap();
            let scales = floats(quantizer.scales(linear.weight.val()));
            let tensor = &packed.tensors[&file_name(&path)];
            let group = tensor.ternary_group().unwrap();
            assert_eq!(values(&packed, &file_name(&path)).len(), effective.len());
            let (mut row_codes, mut row_scales) = (vec![0i8; cols], vec![f16::ZERO; cols / group]);
            for row in 0..rows {
                tensor.read_ternary_row(row, &mut row_codes, &mut row_scales);
                let found = &values(&packed, &file_name(&path))[row * cols..(row + 1) * cols];
                for col in 0..cols {
                    assert_eq!(f32::from(row_codes[col]), codes[col * rows + row], "{at}");
                    assert_eq!(found[col], effective[col * rows + row], "{at}");
                    let shared = match quantizer.granularity() {
                        Granularity::PerTensor => 0,
                        Granularity::PerChannel => row,
                        Granularity::PerGroup(n) => col / n * rows + row,
                    };
                    assert_eq!(row_scales[col / group].to_f32(), scales[shared], "{at}");
                }
            }
        }
    }
}

#[test]
fn the_bias_of_the_file_includes_the_dead_weights() {
    let quant = QuantConfig::default().with_dead_bias(0.1);
    let model = trained(&shape(Family::Gpt2), &quant, 3);
    let packed = export_for_inference(&model, None, "duck").unwrap();
    for (path, linear) in model.linears() {
        let [cols, rows] = linear.weight.dims();
        let [latent, codes] = [linear.weight.val(), linear.codes().unwrap()].map(floats);
        let bias = floats(linear.bias.as_ref().unwrap().val());
        let name = file_name(&path).replace(".weight", ".bias");
        let mut found = vec![0.0; rows];
        packed.tensors[&name].read_row(0, &mut found);
        for row in 0..rows {
            let dead = (0..cols).map(|col| col * rows + row).filter(|index| codes[*index] == 0.0);
            let sum: f64 = dead.map(|index| f64::from(latent[index])).sum();
            let expected = f64::from(bias[row]) + 0.1 * sum;
            assert!(
                (f64::from(found[row]) - expected).abs() < 1e-6,
                "{name} {row}: {}, {expected}",
                found[row]
            );
            assert!(sum.abs() > 1e-4, "{name} {row}");
        }
    }
}

#[test]
fn an_exported_table_has_the_values_of_the_forward_pass() {
    for (name, model) in models() {
        let packed = export_for_inference(&model, None, "duck").unwrap();
        let quant = model.quant();
        let mut tables = vec![("token_embd.weight", &model.embedding, quant.embedding)];
        tables.extend(model.head.iter().map(|head| ("output.weight", head, quant.head)));
        for (file, table, precision) in tables {
            assert_eq!(values(&packed, file), floats(precision.fake_quantize(table.val())), "{name} {file}");
            let expected = match precision {
                TablePrecision::Float => Encoding::F32,
                TablePrecision::Int8 => Encoding::Q8_0,
                TablePrecision::Int4 => Encoding::Q4_0,
                TablePrecision::Ternary => Encoding::Ternary { group: 64 },
            };
            assert_eq!(packed.tensors[file].encoding(), expected, "{name} {file}");
        }
    }
}

#[test]
fn a_loaded_module_computes_what_the_exported_one_does_bit_for_bit() {
    for (name, model) in models() {
        let packed = export_for_inference(&model, None, "duck").unwrap();
        let loaded = DuckQuantized::from_packed(&packed, &device()).unwrap();
        assert_eq!(loaded.config().spec(), model.config().spec());
        assert_eq!(loaded.quant().granularity, model.quant().granularity);
        assert_eq!(logits(&loaded), logits(&model), "{name}");
        // It also exports the same matrices again.
        let again = export_for_inference(&loaded, None, "duck").unwrap();
        for (tensor, first) in &packed.tensors {
            if tensor.starts_with("blk.") {
                assert_eq!(again.tensors[tensor].bytes(), first.bytes(), "{name} {tensor}");
            }
        }
    }
    for family in FAMILIES {
        let float = trained(&shape(family), &QuantConfig::default().float(), 1);
        let packed = export_for_inference(&float, None, "duck").unwrap();
        assert!(packed.tensors.values().all(|tensor| tensor.encoding() == Encoding::F32));
        let loaded = DuckQuantized::from_packed(&packed, &device()).unwrap();
        assert!(!loaded.quant().enabled);
        assert_eq!(logits(&loaded), logits(&float));
    }
}

#[test]
fn an_inexpressible_model_is_an_error_that_names_the_setting() {
    let config = shape(Family::Llama);
    let normed = QuantConfig::default().with_input_norm(true);
    for quant in [normed.clone(), normed.float()] {
        let error = export_for_inference(&trained(&config, &quant, 0), None, "duck").unwrap_err();
        assert!(matches!(error, ExportError::InputNorm), "{error}");
        assert!(error.to_string().contains("`input_norm = false` in [quant]"), "{error}");
    }
    let blended = trained(&config, &QuantConfig::default(), 0);
    blended.schedule_handle().lambda.set(0.5);
    let error = export_for_inference(&blended, None, "duck").unwrap_err();
    assert!(
        error.to_string().contains("lambda = 0.5") && error.to_string().contains("ramp_until"),
        "{error}"
    );
    let two = QuantConfig::default().with_scale(ScaleRule::Ttq);
    let error = export_for_inference(&trained(&config, &two, 0), None, "duck").unwrap_err();
    assert!(
        matches!(error, ExportError::TwoScales) && error.to_string().contains("\"ttq\" in [quant]"),
        "{error}"
    );
    export_for_inference(&trained(&config, &two.float(), 0), None, "duck").unwrap();
    let dead = QuantConfig::default().with_dead_bias(1e-3);
    let error = export_for_inference(&trained(&config, &dead, 0), None, "duck").unwrap_err();
    assert!(
        matches!(error, ExportError::DeadBias) && error.to_string().contains("`dead_bias = 0.0`"),
        "{error}"
    );
    // A row that does not fit the blocks of its precision.
    let narrow = config.with_d_model(24);
    let quant = QuantConfig::default().with_embedding(TablePrecision::Int8);
    let error = export_for_inference(&trained(&narrow, &quant, 0), None, "duck").unwrap_err();
    assert!(error.to_string().contains("token_embd.weight") && error.to_string().contains("32"), "{error}");
}

#[test]
fn a_container_that_is_no_module_is_refused_with_the_tensor() {
    let packed =
        export_for_inference(&trained(&shape(Family::Llama), &QuantConfig::default(), 0), None, "duck")
            .unwrap();
    let refusal = |change: &dyn Fn(&mut PackedModel)| {
        let mut packed = packed.clone();
        change(&mut packed);
        DuckQuantized::from_packed(&packed, &device()).unwrap_err()
    };
    let name = "blk.1.attn_v.weight";
    let error = refusal(&|packed| drop(packed.tensors.remove(name)));
    assert!(matches!(error, ImportError::Format(_)) && error.to_string().contains(name), "{error}");
    let error = refusal(&|packed| {
        let float = packed.tensors[name].encode(Encoding::F32).unwrap();
        packed.tensors.insert(name.into(), float);
    });
    assert!(matches!(error, ImportError::Mixed { .. }) && error.to_string().contains(name), "{error}");
    for scale in [1e-5, f32::INFINITY, f32::NAN] {
        let error = refusal(&|packed| {
            let [rows, cols] = [packed.tensors[name].rows(), packed.tensors[name].cols()];
            let tensor = ternary_format::Tensor::ternary(rows, cols, cols, |row, codes, scales| {
                codes.fill(1);
                scales.fill(f16::from_f32(if row == 3 { scale } else { 1.0 }));
            });
            packed.tensors.insert(name.into(), tensor.unwrap());
        });
        assert!(
            matches!(error, ImportError::Scale { row: 3, .. }) && error.to_string().contains(name),
            "{error}"
        );
    }
    // Zero and negative scales are accepted.
    let mut packed = packed;
    let [rows, cols] = [packed.tensors[name].rows(), packed.tensors[name].cols()];
    let tensor = ternary_format::Tensor::ternary(rows, cols, 16, |row, codes, scales| {
        codes.iter_mut().enumerate().for_each(|(i, code)| *code = ((i + row) % 3) as i8 - 1);
        scales.iter_mut().enumerate().for_each(|(i, s)| *s = f16::from_f32((i as f32 - 1.0) * 0.25));
    });
    packed.tensors.insert(name.into(), tensor.unwrap());
    let loaded = DuckQuantized::from_packed(&packed, &device()).unwrap();
    assert_eq!(loaded.quant().granularity, Granularity::PerGroup(16));
    let expected = values(&packed, name);
    for (path, linear) in loaded.linears() {
        if file_name(&path) == name {
            assert_eq!(floats(linear.effective_weight().transpose()), expected);
        }
    }
}

/// A container, written to a GGUF file and read again.
fn through_gguf(packed: &PackedModel, weights: Encoding) -> PackedModel {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let options = WriteOptions::default().with_weights(Some(WeightType::Encoded(weights)));
    write_model(packed, &path, &options).unwrap();
    read_model(&path).unwrap()
}

/// The shape of a model whose rows fit every ternary type.
fn wide(family: Family) -> DuckConfig {
    shape(family).with_d_model(256).with_n_layers(1).with_d_ff(512)
}

#[test]
fn a_gguf_file_keeps_codes_scales_and_tables() {
    for (family, granularity) in FAMILIES.into_iter().flat_map(|f| {
        [
            Granularity::PerTensor,
            Granularity::PerChannel,
            Granularity::PerGroup(64),
            Granularity::PerGroup(256),
        ]
        .map(|g| (f, g))
    }) {
        for (weights, embedding) in [Encoding::Tq1_0, Encoding::Tq2_0, Encoding::Q2_0]
            .into_iter()
            .flat_map(|weights| TABLES.map(|table| (weights, table)))
        {
            if granularity == Granularity::PerGroup(64) && weights != Encoding::Q2_0 {
                continue;
            }
            let name = format!("{family:?} {granularity:?} {weights} {embedding:?}");
            let quant = QuantConfig::default().with_granularity(granularity).with_embedding(embedding);
            let model = trained(&wide(family), &quant, 7);
            let packed = export_for_inference(&model, None, "duck").unwrap();
            let read = through_gguf(&packed, weights);
            assert_eq!(read.spec, packed.spec, "{name}");
            for (tensor, written) in &packed.tensors {
                assert_eq!(values(&read, tensor), values(&packed, tensor), "{name} {tensor}");
                let ternary = written.encoding().is_ternary();
                assert_eq!(read.tensors[tensor].encoding().is_ternary(), ternary, "{name} {tensor}");
                if ternary {
                    // Codes, and scales in the groups that were trained.
                    let again = read.tensors[tensor].encode(written.encoding()).unwrap();
                    assert_eq!(again.bytes(), written.bytes(), "{name} {tensor}");
                }
            }
            let loaded = DuckQuantized::from_packed(&read, &device()).unwrap();
            assert_eq!(logits(&loaded), logits(&model), "{name}");
        }
    }
}

/// Arbitrary ids.
fn some_ids(model: &DuckQuantized) -> Vec<u32> {
    (0..11).map(|i| i * i % model.config().vocab_size as u32).collect()
}

/// Logits of the training forward, `[ids, vocab]`.
fn training(model: &DuckQuantized, ids: &[u32]) -> Vec<f32> {
    let ids: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
    let shape = [1, ids.len()];
    floats(model.forward(Tensor::<2, Int>::from_data(TensorData::new(ids, shape), &device())))
}

/// Logits of the engine, `[ids, vocab]`.
fn engine(packed: &PackedModel, activations: ActivationMode, ids: &[u32]) -> Vec<f32> {
    let options = EngineOptions::default().with_threads(1).with_activations(activations);
    Engine::from_model(packed.clone(), options).unwrap().logits(ids).unwrap()
}

/// KL divergence in nats per token, and the share of tokens with the same most likely successor.
fn divergence(expected: &[f32], found: &[f32], vocab: usize) -> (f64, f64) {
    let (mut nats, mut equal) = (0.0, 0.0);
    for (p, q) in expected.chunks(vocab).zip(found.chunks(vocab)) {
        let most_likely = [p, q].map(|logits| (0..vocab).max_by(|a, b| logits[*a].total_cmp(&logits[*b])));
        equal += f64::from(u8::from(most_likely[0] == most_likely[1]));
        let [p, q] = [p, q].map(|logits| {
            let max = logits.iter().fold(f64::MIN, |max, x| max.max(f64::from(*x)));
            let sum: f64 = logits.iter().map(|x| (f64::from(*x) - max).exp()).sum();
            logits.iter().map(|x| f64::from(*x) - max - sum.ln()).collect::<Vec<_>>()
        });
        nats += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
    }
    let tokens = (expected.len() / vocab) as f64;
    (nats / tokens, equal / tokens)
}

#[test]
fn the_engine_has_the_logits_of_the_training_forward() {
    for (name, model) in models() {
        let packed = export_for_inference(&model, None, "duck").unwrap();
        let ids = some_ids(&model);
        let (expected, found) = (training(&model, &ids), engine(&packed, ActivationMode::F32, &ids));
        let spread = expected.iter().fold(0f32, |max, logit| max.max(logit.abs()));
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() <= 1e-4 * spread, "{name}: {found} for {expected} of {spread}");
        }
    }
}

#[test]
fn the_int8_engine_is_close_to_a_model_trained_with_int8_activations() {
    for (family, granularity) in FAMILIES.into_iter().flat_map(|f| GRANULARITIES.map(|g| (f, g))) {
        let quant = QuantConfig::default()
            .with_granularity(granularity)
            .with_activations(ActivationPrecision::Int8)
            .with_embedding(TablePrecision::Int8);
        let model = trained(&shape(family), &quant, 5);
        let packed = export_for_inference(&model, None, "duck").unwrap();
        let ids = some_ids(&model);
        let (expected, found) = (training(&model, &ids), engine(&packed, ActivationMode::Int8, &ids));
        let (nats, _) = divergence(&expected, &found, model.config().vocab_size);
        println!("{family:?} {granularity:?}: {nats:.1e} nats per token");
        assert!(nats < 1e-3, "{family:?} {granularity:?}: {nats}");
    }
}

#[test]
fn on_text_the_int8_engine_says_what_a_trained_model_says() {
    let out = tempfile::tempdir().unwrap();
    let mut experiment = Experiment::load("experiments/00-default.toml").unwrap();
    let out = format!("run.out_dir={}", out.path().display());
    for assignment in [
        &*out,
        "run.device=flex",
        "run.steps=120",
        "run.eval_windows=1",
        "run.sample_tokens=0",
        "data.tokenizer=byte",
        "model.d_model=64",
        "model.d_ff=128",
        "quant.activations=int8",
    ] {
        experiment.set(assignment).unwrap();
    }
    train_duck_quantized(&experiment).unwrap();
    let saved = SavedRun::open(&experiment.run_dir(), &device()).unwrap();
    let packed = saved.export().unwrap();
    let text = std::fs::read_to_string("crates/burn-ternary/data/pond_stories.txt").unwrap();
    let ids = saved.tokenizer.encode(&text[..4096]).unwrap();
    let vocab = saved.model.config().vocab_size;
    let logits = |f: &dyn Fn(&[u32]) -> Vec<f32>| ids.chunks(128).flat_map(f).collect::<Vec<_>>();
    let int8 = logits(&|ids| engine(&packed, ActivationMode::Int8, ids));
    let (nats, equal) = divergence(&logits(&|ids| training(&saved.model, ids)), &int8, vocab);
    println!("to the training forward: {nats:.1e} nats per token, top-1 equal {equal:.4}");
    assert!(nats < 1e-3 && equal >= 0.99, "{nats} nats, top-1 equal {equal}");
    let (nats, equal) = divergence(&logits(&|ids| engine(&packed, ActivationMode::F32, ids)), &int8, vocab);
    println!("to f32 activations: {nats:.1e} nats per token, top-1 equal {equal:.4}");
    assert!(nats < 1e-3, "{nats} nats, top-1 equal {equal}");
}

/// A short run in `out` with rows of `width`.
fn run(out: &std::path::Path, width: usize, more: &[&str]) -> (std::path::PathBuf, RunResult) {
    let widths = ["d_model", "d_ff"].map(|key| format!("model.{key}={width}"));
    let fixed = ["train", "--quiet", "--device", "flex", "--steps", "4", "--set", "run.eval_windows=1"];
    let sized = ["--out", out.to_str().unwrap(), "--set", &widths[0], "--set", &widths[1]];
    let command = TrainCommand::try_parse_from([&fixed[..], &sized, more].concat()).unwrap();
    (command.experiment().unwrap().run_dir(), command.run().unwrap())
}

#[test]
fn a_run_writes_the_model_of_its_last_step() {
    let out = tempfile::tempdir().unwrap();
    for (tokenizer, rule) in [("byte", "absmean"), ("char", "learned"), ("bpe", "twn")] {
        let rule = format!("quant.scale={rule}");
        let name = format!("run.name={tokenizer}");
        let more = ["--tokenizer", tokenizer, "--set", &rule, "--set", &name];
        let (run_dir, result) = run(out.path(), 64, &more);
        let file = run_dir.join("model.gguf");
        let bytes = std::fs::metadata(&file).unwrap().len();
        assert_eq!((result.file_bytes, &result.no_file), (Some(bytes), &None));
        assert_eq!(result.compression, Some(result.fp32_bytes as f64 / bytes as f64));

        let saved = SavedRun::open(&run_dir, &device()).unwrap();
        let loaded = DuckQuantized::load(&file, &device()).unwrap();
        assert_eq!(logits(&loaded), logits(&saved.model), "{tokenizer}");
        let [read, exported] = [packed_model(&file), packed_model(&run_dir)].map(Result::unwrap);
        assert_eq!((&read.name, &read.spec), (&exported.name, &exported.spec));
        // The embedded texts have dialogues.
        assert_eq!(read.chat_template.as_deref(), Some(ternary_format::chat::TEMPLATE));
        assert_eq!(read.chat_template, exported.chat_template);
        for tensor in exported.tensors.keys() {
            assert_eq!(values(&read, tensor), values(&exported, tensor), "{tokenizer} {tensor}");
        }
        let text = "Where is the duck? It is on the pond.";
        let [ids, expected] =
            [&read, &exported].map(|model| model.tokenizer.as_ref().unwrap().encode(text).unwrap());
        assert_eq!(ids, expected, "{tokenizer}");
        assert_eq!(read.tokenizer.unwrap().decode(&ids), text);
    }
}

#[test]
fn a_model_that_fits_no_file_is_no_error_of_its_run() {
    let out = tempfile::tempdir().unwrap();
    let (run_dir, result) = run(out.path(), 24, &["--set", "quant.embedding=float"]);
    assert!(result.finished && result.file_bytes.is_none());
    let why = result.no_file.unwrap();
    assert!(why.contains("d_model") && why.contains("64"), "{why}");
    assert!(!run_dir.join("model.gguf").exists());
    let (_, result) = run(out.path(), 64, &["--set", "quant.scale=ttq", "--seed", "3"]);
    assert!(result.finished && result.no_file.is_some_and(|why| why.contains("ttq")));
    // A float twin fits always.
    let (_, result) = run(out.path(), 24, &["--set", "quant.enabled=false", "--seed", "2"]);
    assert!(result.file_bytes.unwrap() > result.fp32_bytes);
}
