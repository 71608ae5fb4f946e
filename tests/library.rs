//! Promise: a program needs burn and this crate only, and any prepared Burn model can be saved, loaded and exported.

use burn::data::dataloader::DataLoader;
use burn::module::{Module, Param, ParamId};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{
    BatchNorm, BatchNormConfig, Embedding, EmbeddingConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig,
    RotaryEncoding, RotaryEncodingConfig, SwiGlu, SwiGluConfig,
};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::activation::{relu, softmax};
use burn::tensor::{DType, Device, Distribution, FloatDType, Int, Tensor, TensorData};
use burn_ternary::data::{Dataset, LmLoader};
use burn_ternary::format::{Activation, Encoding, Family, ModelSpec, WriteOptions, tensors, write_model};
use burn_ternary::infer::{ActivationMode, Engine, EngineOptions, GenerateOptions};
use burn_ternary::nn::Rotary;
use burn_ternary::prepared::{self, RotaryPairs};
use burn_ternary::quant::{
    ActivationPrecision, Estimator, Granularity, PrepareError, PrepareReport, QuantConfig, ScaleRule,
    Sparsity, prepare,
};
use burn_ternary::train::QuantizationTrainer;
use burn_ternary::{ExportError, ImportError, export_for_inference};
use std::path::Path;

fn device() -> Device {
    burn_ternary::device::device("flex").unwrap()
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// Moves parameters away from their initial values, so that none is zero or one by chance.
fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.1, 1.0), &device())
}

/// The code blocks of a page that are marked with `language`.
fn code_blocks(page: &str, language: &str) -> Vec<String> {
    let parts = page.split("\n```").collect::<Vec<_>>();
    let blocks = parts.iter().skip(1).step_by(2).filter_map(|block| block.split_once('\n'));
    blocks.filter(|(name, _)| *name == language).map(|(_, code)| format!("{code}\n")).collect()
}

#[test]
fn pages_have_the_crate_that_is_built() {
    let (readme, chapter) = (include_str!("../README.md"), include_str!("../docs/library.md"));
    let program = include_str!("../examples/library.rs");
    assert_eq!(code_blocks(chapter, "rust,no_run"), [program]);
    // README has lines of it, in their order.
    let mut lines = program.lines().map(str::trim);
    for line in code_blocks(readme, "rust").concat().lines() {
        assert!(lines.any(|of_program| of_program == line.trim()), "not in the program, or not here: {line}");
    }

    let manifest = include_str!("../examples/own-crate/Cargo.toml").replace("../..", "../burn-ternary");
    let (_, dependencies) = manifest.split_once("[dependencies]").unwrap();
    for page in [readme, chapter] {
        assert_eq!(code_blocks(page, "toml"), [format!("[dependencies]{dependencies}")]);
    }
}

#[test]
fn the_program_trains_saves_exports_and_generates() {
    let folder = tempfile::tempdir().unwrap();
    let experiment = crate::small_experiment(folder.path(), "library", &["model.d_model=64"]);
    let data = Dataset::prepare(&experiment.data, experiment.model.context, 1, folder.path()).unwrap();
    let mut config = experiment.model.clone();
    config.vocab_size = data.tokenizer.vocab_size();
    let training = device().autodiff();
    let duck = config.init(&experiment.quant, 1, &training);
    let mut trainer = QuantizationTrainer::new(duck, &experiment.optim, &experiment.schedule, 30, 1);
    let batches = LmLoader::training(data.train, 4, 1, 30, &training);
    let losses: Vec<f64> =
        batches.iter().map(|batch| trainer.train_step(vec![batch.unwrap()]).loss).collect();
    assert!(losses[29] < losses[0] - 0.5, "{losses:?}");

    let record = folder.path().join("duck.bpk");
    trainer.model().clone().save_file(&record).unwrap();
    let restored = config.init(&experiment.quant, 2, &training).try_load_file(&record).unwrap();
    let ids = data.tokenizer.encode("One day").unwrap();
    let row = TensorData::new(ids.iter().map(|id| *id as i64).collect(), [1, ids.len()]);
    let logits = |model: &burn_ternary::nn::DuckQuantized| {
        floats(model.valid().forward(Tensor::from_data(row.clone(), &device())))
    };
    let expected = logits(trainer.model());
    assert_eq!(logits(&restored), expected);

    let file = folder.path().join("duck.gguf");
    let packed = export_for_inference(trainer.model(), Some(&data.tokenizer), "duck").unwrap();
    write_model(&packed, &file, &WriteOptions::default()).unwrap();
    let exact = EngineOptions::default().with_activations(ActivationMode::F32);
    let engine = Engine::load(&file, exact).unwrap();
    assert_close(&engine.logits(&ids).unwrap(), &expected);
    let options = GenerateOptions::default().with_max_tokens(5);
    let ids: Vec<u32> = engine.generate(&ids, options).unwrap().collect();
    assert!(!ids.is_empty() && ids.iter().all(|id| (*id as usize) < config.vocab_size));
}

fn assert_close(found: &[f32], expected: &[f32]) {
    let spread = expected.iter().fold(0f32, |most, logit| most.max(logit.abs()));
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= 1e-4 * spread, "{found} for {expected} of {spread}");
    }
}

/// A model of none of our families: a convolution, a norm with running means, odd widths.
#[derive(Module, Debug)]
struct Picture {
    kernel: Conv2d,
    norm: BatchNorm,
    hidden: Vec<Linear>,
    output: Linear,
}

const SIDE: usize = 5;

impl Picture {
    /// `hidden`: the widths of the hidden layers' outputs.
    fn new(hidden: &[usize], device: &Device) -> Self {
        let mut inputs = 2 * (SIDE - 2) * (SIDE - 2);
        let layers = hidden.iter().map(|outputs| {
            let layer = LinearConfig::new(inputs, *outputs).init(device);
            inputs = *outputs;
            layer
        });
        Self {
            hidden: layers.collect(),
            kernel: Conv2dConfig::new([1, 2], [3, 3]).init(device),
            norm: BatchNormConfig::new(2).init(device),
            output: LinearConfig::new(inputs, 3).with_bias(false).init(device),
        }
    }

    fn forward(&self, pictures: Tensor<4>) -> Tensor<2> {
        let seen: Tensor<2> = self.norm.forward(self.kernel.forward(pictures)).flatten(1, 3);
        let hidden = self.hidden.iter().fold(seen, |input, layer| relu(layer.forward(input)));
        self.output.forward(hidden)
    }
}

fn hidden_weights(path: &str) -> bool {
    path.starts_with("hidden.") && path.ends_with(".weight")
}

#[test]
fn prepare_reports_what_it_made_ternary() {
    let model = Picture::new(&[7, 13], &device());
    let parameters = model.num_params();
    let (model, report) = prepare(model, &QuantConfig::default(), hidden_weights).unwrap();
    let PrepareReport { matrices, .. } = &report;
    let found: Vec<_> = matrices.iter().map(|matrix| (matrix.path.as_str(), matrix.shape)).collect();
    assert_eq!(found, [("hidden.0.weight", [18, 7]), ("hidden.1.weight", [7, 13])]);
    assert_eq!((report.weights(), report.parameters), (18 * 7 + 7 * 13, parameters));
    assert_eq!(
        report.to_string(),
        format!(
            "2 ternary matrices, 217 of {parameters} parameters: hidden.0.weight [18, 7], hidden.1.weight [7, 13]"
        )
    );
    let levels = |weight: Tensor<2>| {
        let [inputs, outputs] = weight.dims();
        let values = floats(weight.transpose());
        (0..outputs).all(|row| {
            let row = &values[row * inputs..(row + 1) * inputs];
            let scale = row.iter().fold(0f32, |most, w| most.max(w.abs()));
            row.iter().all(|w| *w == 0.0 || w.abs() == scale)
        })
    };
    assert!(model.hidden.iter().all(|layer| levels(layer.weight.val())));
    assert!(!levels(model.output.weight.val()));
}

#[test]
fn prepare_refuses_what_it_cannot_make_ternary() {
    let model = || Picture::new(&[7, 13], &device());
    let default = QuantConfig::default();
    let error = prepare(model(), &default, |path| path.contains("hiden")).unwrap_err();
    let expected = ["hidden.0.weight", "hidden.1.weight", "output.weight"];
    assert!(matches!(&error, PrepareError::NothingSelected { matrices } if *matrices == expected), "{error}");
    assert!(error.to_string().contains("hidden.0.weight, hidden.1.weight, output.weight"), "{error}");
    // A convolution kernel, a bias, a norm: errors, whatever else is selected.
    for (chosen, at, shape) in [
        ("kernel.weight", "kernel.weight", &[2, 1, 3, 3][..]),
        ("hidden", "hidden.0.bias", &[7]),
        ("norm", "norm.gamma", &[2]),
    ] {
        let error = prepare(model(), &default, |path| path.starts_with(chosen) || path == "output.weight");
        let error = error.unwrap_err();
        let expected = PrepareError::NotAMatrix { path: at.into(), shape: shape.into() };
        assert_eq!(error, expected);
        assert!(error.to_string().contains(&format!("`{at}` has the shape {shape:?}")), "{error}");
    }
    let (once, _) = prepare(model(), &default, hidden_weights).unwrap();
    let error = prepare(once.clone(), &default, hidden_weights).unwrap_err();
    assert_eq!(error, PrepareError::Reparameterized { path: "hidden.0.weight".into() });
    // What is left may still be prepared.
    let (_, report) = prepare(once, &default, |path| path == "output.weight").unwrap();
    assert_eq!(report.matrices.len(), 1);

    for (config, key, size) in [
        (default.clone().with_granularity(Granularity::PerGroup(9)), "granularity", 9),
        (default.clone().with_granularity(Granularity::PerGroup(0)), "granularity", 0),
        (default.clone().with_sparsity(Sparsity::NOfM([1, 6])), "sparsity", 6),
    ] {
        let error = prepare(model(), &config, hidden_weights).unwrap_err();
        // 18 inputs are a multiple of 9 and of 6, 7 are not.
        let (path, inputs) = if size == 0 { ("hidden.0.weight", 18) } else { ("hidden.1.weight", 7) };
        assert_eq!(error, PrepareError::Inputs { path: path.into(), inputs, key, size });
    }
    for (config, key) in [
        (default.clone().float(), "quant.enabled"),
        (default.clone().with_activations(ActivationPrecision::Int8), "quant.activations"),
        (default.clone().with_dead_bias(1e-3), "quant.dead_bias"),
        (default.clone().with_input_norm(true), "quant.input_norm"),
        (default.clone().with_scale_penalty(0.1), "quant.scale_penalty"),
        (default.clone().with_threshold(1.0), "quant.threshold"),
        (default.clone().with_sparsity(Sparsity::ZeroFraction(f64::NAN)), "quant.sparsity"),
        (default.clone().with_sparsity(Sparsity::NOfM([2, 2])), "quant.sparsity"),
        (default.clone().with_estimator(Estimator::Masked), "quant.estimator"),
        (default.clone().with_estimator(Estimator::Annealed), "quant.estimator"),
    ] {
        let error = prepare(model(), &config, hidden_weights).unwrap_err();
        assert!(matches!(&error, PrepareError::Setting(setting) if setting.key == key), "{error}");
        assert!(error.to_string().starts_with(&format!("`{key}` is ")), "{error}");
    }
}

#[test]
fn a_prepared_model_comes_back_from_its_file_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture.safetensors");
    let pictures = random([4, 1, SIDE, SIDE]);
    let rules =
        [ScaleRule::Absmean, ScaleRule::Absmedian, ScaleRule::Twn, ScaleRule::Learned, ScaleRule::Seq];
    let granularities = [Granularity::PerTensor, Granularity::PerChannel, Granularity::PerGroup(3)];
    for (scale, granularity) in rules.into_iter().flat_map(|rule| granularities.map(|g| (rule, g))) {
        let sparsity = if scale == ScaleRule::Twn { Sparsity::ZeroFraction(0.7) } else { Sparsity::None };
        let config =
            QuantConfig::default().with_scale(scale).with_granularity(granularity).with_sparsity(sparsity);
        let widths = [21, 15];
        let (model, report) = prepare(Picture::new(&widths, &device()), &config, hidden_weights).unwrap();
        let model = model.valid();
        prepared::save(&model, &path).unwrap();
        let loaded = prepared::load(Picture::new(&widths, &device()), &path).unwrap().valid();
        let at = format!("{scale:?} {granularity:?}");
        let outputs = |model: &Picture| floats(model.forward(pictures.clone()));
        assert_eq!(outputs(&loaded), outputs(&model), "{at}");
        for (layer, saved) in loaded.hidden.iter().zip(&model.hidden) {
            assert_eq!(floats(layer.weight.val()), floats(saved.weight.val()), "{at}");
        }
        // Only its matrices are packed.
        let file = tensors::read(&path).unwrap();
        let mut packed = Vec::new();
        for (name, tensor) in &file {
            if let Encoding::Ternary { group } = tensor.encoding() {
                packed.push(name.as_str());
                assert!(granularity != Granularity::PerGroup(3) || group == 3, "{at} {name}: {group}");
            }
        }
        assert_eq!(packed, Vec::from_iter(report.matrices.iter().map(|matrix| matrix.path.as_str())), "{at}");
    }
    // A model without ternary weights keeps its float type.
    for dtype in [FloatDType::F32, FloatDType::BF16, FloatDType::F16] {
        let mut layer = LinearConfig::new(5, 3).init(&device());
        layer.weight = layer.weight.map(|weight| weight.cast(dtype));
        prepared::save(&layer, &path).unwrap();
        let loaded = prepared::load(LinearConfig::new(5, 3).init(&device()), &path).unwrap();
        assert_eq!(loaded.weight.val().dtype(), DType::from(dtype));
        assert_eq!(floats(loaded.weight.val()), floats(layer.weight.val()));
    }
}

#[derive(Module, Debug)]
struct Counted {
    count: Param<Tensor<1, Int>>,
}

#[test]
fn files_and_models_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture.safetensors");
    let model = |widths: &[usize]| Picture::new(widths, &device());
    let config = QuantConfig::default().with_scale(ScaleRule::Ttq);
    let (two_scales, _) = prepare(model(&[7]), &config, hidden_weights).unwrap();
    assert!(matches!(prepared::save(&two_scales, &path), Err(ExportError::TwoScales)));
    let count = Param::initialized(ParamId::new(), Tensor::<1, Int>::from_data([3], &device()));
    let error = prepared::save(&Counted { count }, &path).unwrap_err();
    assert_eq!(
        error.to_string(),
        "parameter `count` has type integers: expected f32, f16 or bf16, the types of the file"
    );
    assert!(!path.exists());

    let (saved, _) = prepare(model(&[7]), &QuantConfig::default(), hidden_weights).unwrap();
    prepared::save(&saved, &path).unwrap();
    let error = prepared::load(saved, &path).unwrap_err();
    assert!(matches!(&error, ImportError::Prepared { path } if path == "hidden.0.weight"), "{error}");
    for (widths, expected) in [
        (&[7, 5][..], "tensor `hidden.1.weight` is missing"),
        (&[], "tensor `output.weight`: expected shape [18, 3], found [7, 3]"),
        (&[8], "tensor `hidden.0.weight`: expected shape [18, 8], found [18, 7]"),
    ] {
        let error = prepared::load(model(widths), &path).unwrap_err();
        assert_eq!(error.to_string(), expected, "{widths:?}");
    }
    let error = prepared::load(LinearConfig::new(7, 3).init(&device()), &path).unwrap_err();
    assert!(error.to_string().contains("tensor `weight` is missing"), "{error}");
    let layer = LinearConfig::new(7, 3).init(&device());
    prepared::save(&layer, &path).unwrap();
    let error = prepared::load(LinearConfig::new(7, 3).with_bias(false).init(&device()), &path).unwrap_err();
    assert!(matches!(&error, ImportError::Unused { tensor } if tensor == "bias"), "{error}");
}

/// A llama of Burn's own layers.
#[derive(Module, Debug)]
struct Llama {
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Linear,
}

#[derive(Module, Debug)]
struct Block {
    before_attention: RmsNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    before_feed_forward: RmsNorm,
    gated: SwiGlu,
    down: Linear,
    turn: Turn,
}

/// How a block rotates queries and keys: by Burn's rotary encoding, or by ours.
#[derive(Module, Debug)]
enum Turn {
    Interleaved(RotaryEncoding),
    Halves(Rotary),
}

fn spec() -> ModelSpec {
    ModelSpec::new(Family::Llama)
        .with_vocab_size(19)
        .with_context(12)
        .with_d_model(64)
        .with_n_layers(2)
        .with_n_heads(4)
        .with_n_kv_heads(2)
        .with_d_ff(128)
        .with_activation(Activation::Swiglu)
        .with_tied(false)
        .with_norm_eps(1e-5)
        .with_rope_theta(10_000.0)
}

impl Llama {
    fn new(spec: &ModelSpec, pairs: RotaryPairs, device: &Device) -> Self {
        let linear = |inputs, outputs| LinearConfig::new(inputs, outputs).with_bias(false).init(device);
        let (d, keys) = (spec.d_model, spec.n_kv_heads * spec.head_dim());
        let norm = || {
            let mut norm = RmsNormConfig::new(d).with_epsilon(spec.norm_eps.into()).init(device);
            norm.gamma = Param::from_tensor(Tensor::random([d], Distribution::Normal(1.0, 0.2), device));
            norm
        };
        let block = |_| Block {
            before_attention: norm(),
            query: linear(d, d),
            key: linear(d, keys),
            value: linear(d, keys),
            output: linear(d, d),
            before_feed_forward: norm(),
            gated: SwiGluConfig::new(d, spec.d_ff).init(device),
            down: linear(spec.d_ff, d),
            turn: match (pairs, spec.head_dim()) {
                (RotaryPairs::Interleaved, width) => {
                    Turn::Interleaved(RotaryEncodingConfig::new(spec.context, width).init(device))
                }
                (RotaryPairs::Halves, width) => {
                    Turn::Halves(Rotary::new(spec.context, width, spec.rope_theta.into(), device))
                }
            },
        };
        Self {
            embedding: EmbeddingConfig::new(spec.vocab_size, d).init(device),
            blocks: (0..spec.n_layers).map(block).collect(),
            norm: norm(),
            head: linear(d, spec.vocab_size),
        }
    }

    fn forward(&self, ids: Tensor<2, Int>, spec: &ModelSpec) -> Tensor<3> {
        let hidden = self.embedding.forward(ids);
        let hidden = self.blocks.iter().fold(hidden, |hidden, block| block.forward(hidden, spec));
        self.head.forward(self.norm.forward(hidden))
    }
}

impl Block {
    fn forward(&self, hidden: Tensor<3>, spec: &ModelSpec) -> Tensor<3> {
        let [batch, seq, width] = hidden.dims();
        let input = self.before_attention.forward(hidden.clone());
        let heads = |layer: &Linear, count: usize| {
            layer.forward(input.clone()).reshape([batch, seq, count, spec.head_dim()]).swap_dims(1, 2)
        };
        let turned = |heads: Tensor<4>| match &self.turn {
            Turn::Interleaved(rotary) => rotary.forward(heads),
            Turn::Halves(rotary) => rotary.forward(heads.swap_dims(1, 2)).swap_dims(1, 2),
        };
        // Each key-value head is repeated for the query heads that share it.
        let shared = |heads: Tensor<4>| {
            let repeated = heads.unsqueeze_dim::<5>(2).repeat_dim(2, spec.n_heads / spec.n_kv_heads);
            repeated.reshape([batch, spec.n_heads, seq, spec.head_dim()])
        };
        let query = turned(heads(&self.query, spec.n_heads));
        let key = shared(turned(heads(&self.key, spec.n_kv_heads)));
        let value = shared(heads(&self.value, spec.n_kv_heads));
        let later = Tensor::<2>::ones([seq, seq], &hidden.device()).triu(1).mul_scalar(-1e9);
        let scores = query.matmul(key.transpose()).div_scalar((spec.head_dim() as f64).sqrt());
        let seen = softmax(scores + later.unsqueeze(), 3).matmul(value);
        let hidden = hidden + self.output.forward(seen.swap_dims(1, 2).reshape([batch, seq, width]));
        let input = self.before_feed_forward.forward(hidden.clone());
        hidden + self.down.forward(self.gated.forward(input))
    }
}

/// The names in model files.
fn file_name(path: &str) -> Option<String> {
    let names = [
        ("embedding.weight", "token_embd.weight"),
        ("blocks.", "blk."),
        ("before_attention.gamma", "attn_norm.weight"),
        ("query", "attn_q"),
        ("key", "attn_k"),
        ("value", "attn_v"),
        ("output", "attn_output"),
        ("before_feed_forward.gamma", "ffn_norm.weight"),
        ("gated.linear_inner", "ffn_gate"),
        ("gated.linear_outer", "ffn_up"),
        ("down", "ffn_down"),
    ];
    match path {
        "norm.gamma" => Some("output_norm.weight".into()),
        "head.weight" => Some("output.weight".into()),
        _ => Some(names.iter().fold(path.into(), |path, (ours, theirs)| path.replace(ours, theirs))),
    }
}

fn in_blocks(path: &str) -> bool {
    path.starts_with("blocks.") && path.ends_with(".weight")
}

/// The engine's logits for one text.
fn engine(file: &Path, ids: &[u32]) -> Vec<f32> {
    let exact = EngineOptions::default().with_activations(ActivationMode::F32);
    Engine::load(file, exact).unwrap().logits(ids).unwrap()
}

#[test]
fn a_prepared_llama_has_the_same_logits_in_the_engine() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("mine.gguf");
    let spec = spec();
    let ids: Vec<u32> = (0..11).map(|i| i * 7 % 19).collect();
    let row: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
    let text = |device: &Device| Tensor::<2, Int>::from_data(TensorData::new(row.clone(), [1, 11]), device);
    let granularities = [Granularity::PerTensor, Granularity::PerChannel, Granularity::PerGroup(64)];
    for (pairs, granularity) in [RotaryPairs::Interleaved, RotaryPairs::Halves]
        .into_iter()
        .flat_map(|pairs| granularities.map(|granularity| (pairs, granularity)))
    {
        let training = device().autodiff();
        let config = QuantConfig::default().with_granularity(granularity);
        let (mut model, report) = prepare(Llama::new(&spec, pairs, &training), &config, in_blocks).unwrap();
        assert!(report.to_string().starts_with(
            "14 ternary matrices, 73728 of 76480 parameters: blocks.0.query.weight [64, 64], blocks.0.key"
        ));
        // A few steps, so that latent weights and their codes are those of training.
        let (mut optimizer, loss) =
            (AdamWConfig::new().init(), CrossEntropyLossConfig::new().init(&training));
        let mut losses = Vec::new();
        for _ in 0..4 {
            let logits: Tensor<2> = model.forward(text(&training), &spec).squeeze_dim(0);
            let next: Tensor<1, Int> = text(&training).squeeze_dim(0);
            let loss = loss.forward(logits, next);
            losses.push(loss.clone().into_scalar::<f32>());
            let gradients = GradientsParams::from_grads(loss.backward(), &model);
            model = optimizer.step(1e-2, model, gradients);
        }
        assert!(losses[3] < losses[0], "{losses:?}");

        let expected = floats(model.valid().forward(text(&device()), &spec));
        let packed = prepared::export(&model, &spec, pairs, file_name).unwrap();
        let matrices = packed.tensors.iter().filter(|(_, tensor)| tensor.encoding().is_ternary());
        assert_eq!(matrices.count(), 2 * 7);
        let packed = packed.with_name("mine".into());
        write_model(&packed, &file, &WriteOptions::default()).unwrap();
        assert_close(&engine(&file, &ids), &expected);

        // With the other order of rotary pairs it is another model.
        let wrong = match pairs {
            RotaryPairs::Interleaved => RotaryPairs::Halves,
            RotaryPairs::Halves => RotaryPairs::Interleaved,
        };
        let packed = prepared::export(&model, &spec, wrong, file_name).unwrap();
        write_model(&packed, &file, &WriteOptions::default()).unwrap();
        let found = engine(&file, &ids);
        let far = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(far > 1e-2, "{pairs:?}: {far}");
    }
}

#[test]
fn a_model_that_is_not_of_the_family_is_not_exported() {
    let spec = spec();
    let (model, _) =
        prepare(Llama::new(&spec, RotaryPairs::Interleaved, &device()), &QuantConfig::default(), in_blocks)
            .unwrap();
    let refusal = |spec: &ModelSpec, name: &dyn Fn(&str) -> Option<String>| {
        prepared::export(&model, spec, RotaryPairs::Interleaved, name).unwrap_err().to_string()
    };
    let error = refusal(&spec, &|path| (path != "norm.gamma").then(|| file_name(path)).flatten());
    assert!(error.contains("parameter `norm.gamma` has no name in model files"), "{error}");
    let error = refusal(&spec, &|path| Some(path.into()));
    assert!(error.contains("tensor `token_embd.weight` is missing"), "{error}");
    let error = refusal(&spec, &|_| Some("output.weight".into()));
    assert!(error.contains("tensor `output.weight` occurs twice"), "{error}");
    let error = refusal(&spec.clone().with_d_ff(96), &file_name);
    assert!(
        error.contains("tensor `blk.0.ffn_gate.weight`: expected shape [96, 64], found [128, 64]"),
        "{error}"
    );
    let error = refusal(&spec.clone().with_tied(true), &file_name);
    assert!(error.contains("unexpected tensor `output.weight`"), "{error}");
    let error = refusal(&spec.with_n_heads(5), &file_name);
    assert!(error.contains("`n_heads` is 5"), "{error}");
}
