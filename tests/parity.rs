//! Promise: a float twin computes what other programs compute with the same weights.

use std::{fs, path::PathBuf};

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{Bool, Device, Int, Tensor, TensorData},
};
use burn_ternary::{
    data::LmBatch,
    export_for_inference,
    nn::{Activation, CausalAttention, DuckConfig, DuckQuantized, Family, Norm, QuantizedLinear, RmsNorm},
    quant::QuantConfig,
    train::{
        QuantizationTrainer,
        optim::{MatrixOptimizer, Moments, OptimConfig},
        schedule::{ScheduleConfig, Shape},
    },
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::SafeTensors;
use serde_json::Value;
use ternary_format::read_model;

fn device() -> Device {
    burn_ternary::device::device("flex").unwrap()
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

fn ids(ids: &[i64], [batch, seq]: [usize; 2]) -> Tensor<2, Int> {
    Tensor::from_data(TensorData::new(ids.to_vec(), [batch, seq]), &device())
}

/// The largest difference in units of the reference's spread.
fn error(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let spread =
        expected.iter().copied().fold(f64::MIN, f64::max) - expected.iter().copied().fold(f64::MAX, f64::min);
    let difference = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    difference.fold(0.0, |worst, d| if d > worst || d.is_nan() { d } else { worst }) / spread
}

/// The files of a reference model, one folder of the shared test data.
struct Reference(PathBuf);

impl Reference {
    /// `None`, with a printed line, if the data is absent.
    fn open(name: &str) -> Option<Self> {
        let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data/models")).join(name);
        if !folder.is_dir() {
            println!("skipped: {}: absent", folder.display());
            return None;
        }
        Some(Self(folder))
    }

    fn bytes(&self, file: &str) -> Vec<u8> {
        let path = self.0.join(file);
        fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    fn json(&self, file: &str) -> Value {
        serde_json::from_slice(&self.bytes(file)).unwrap()
    }
}

/// Tensors by name, in PyTorch's layout.
struct Weights<'a>(SafeTensors<'a>);

impl<'a> Weights<'a> {
    fn read(bytes: &'a [u8]) -> Self {
        Self(SafeTensors::deserialize(bytes).unwrap())
    }

    fn tensor<const D: usize>(&self, name: &str) -> Tensor<D> {
        let view = self.0.tensor(name).unwrap();
        assert_eq!(view.dtype(), safetensors::Dtype::F32, "{name}");
        let numbers: Vec<f32> =
            view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        Tensor::from_data(TensorData::new(numbers, view.shape().to_vec()), &device())
    }

    fn ids(&self, name: &str) -> Vec<i64> {
        let view = self.0.tensor(name).unwrap();
        assert_eq!(view.dtype(), safetensors::Dtype::I64, "{name}");
        view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect()
    }

    /// PyTorch's `[out, in]` into `[in, out]`.
    fn linear(&self, linear: &mut QuantizedLinear, name: &str) {
        set(&mut linear.weight, self.tensor::<2>(&format!("{name}.weight")).transpose());
        if let Some(bias) = &mut linear.bias {
            set(bias, self.tensor(&format!("{name}.bias")));
        }
    }

    fn norm(&self, norm: &mut Norm, name: &str) {
        let weight = self.tensor(&format!("{name}.weight"));
        match norm {
            Norm::Rms(norm) => set(&mut norm.weight, weight),
            Norm::Layer(norm) => {
                set(&mut norm.weight, weight);
                set(&mut norm.bias, self.tensor(&format!("{name}.bias")));
            }
        }
    }
}

fn set<const D: usize>(param: &mut Param<Tensor<D>>, value: Tensor<D>) {
    assert_eq!(param.dims(), value.dims());
    *param = Param::from_tensor(value);
}

fn size(config: &Value, key: &str) -> usize {
    config[key].as_u64().unwrap_or_else(|| panic!("{key}: {}", config[key])) as usize
}

#[test]
fn a_pretrained_llama_gives_its_reference_logits_and_text() {
    let Some(reference) = Reference::open("stories260k") else { return };
    let model = DuckQuantized::load(&reference.0, &device()).unwrap();
    assert_eq!(model.num_params(), 260_032);
    let bytes = reference.bytes("reference_logits.safetensors");
    let logits = Weights::read(&bytes);
    let prompts = reference.json("reference.json")["prompts"].as_array().unwrap().clone();
    assert_eq!(prompts.len(), 4);
    for (index, prompt) in prompts.iter().enumerate() {
        let tokens = |key: &str| -> Vec<i64> { serde_json::from_value(prompt[key].clone()).unwrap() };
        let (prompt, greedy) = (tokens("ids"), tokens("greedy_ids_32"));
        let found = model.forward(ids(&prompt, [1, prompt.len()]));
        let expected = values(logits.tensor::<2>(&format!("logits_{index}")));
        let error = error(&values(found), &expected);
        println!("stories260k, prompt {index}: error {error:.1e} of the spread");
        assert!(error < 1e-5, "prompt {index}: {error:e}");
        let start: Vec<u32> = prompt.iter().map(|id| *id as u32).collect();
        let drawn = model.sample(&start, 32, 0.0, u32::MAX, &mut ChaCha8Rng::seed_from_u64(0));
        assert_eq!(drawn, greedy[prompt.len()..].iter().map(|id| *id as u32).collect::<Vec<_>>());
    }
}

/// A file of 98 MB that is not part of the reference data: CONTRIBUTING names its source.
#[test]
fn a_quantized_gguf_has_its_reference_logits_and_perplexity() {
    let Some(reference) = Reference::open("smollm2_135m") else { return };
    let path = std::env::var_os("SMOLLM2_GGUF").map(PathBuf::from);
    let Some(path) = path else {
        println!("skipped: $SMOLLM2_GGUF: not set");
        return;
    };
    let tokenizer = read_model(&path).unwrap().tokenizer.unwrap();
    let model = DuckQuantized::load(&path, &device()).unwrap();
    assert_eq!(model.num_params(), 134_515_008);
    let json = reference.json("reference.json");
    for prompt in json["prompts"].as_array().unwrap() {
        let expected: Vec<i64> = serde_json::from_value(prompt["ids"].clone()).unwrap();
        let text = prompt["prompt"].as_str().unwrap();
        // Special tokens of the chat template have ids that no text encodes to.
        if !text.contains("<|") {
            let found: Vec<i64> = tokenizer.encode(text).unwrap().into_iter().map(i64::from).collect();
            assert_eq!(found, expected, "{text}");
        }
        let logits = values(model.forward(ids(&expected, [1, expected.len()])));
        let last = &logits[logits.len() - 49152..];
        let top: Vec<usize> = serde_json::from_value(prompt["last_token_top10_ids"].clone()).unwrap();
        let values: Vec<f64> = serde_json::from_value(prompt["last_token_top10_logits"].clone()).unwrap();
        let most_likely = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap();
        assert_eq!(most_likely, top[0], "{text}");
        for (id, expected) in top.iter().zip(values) {
            assert!((last[*id] - expected).abs() < 2e-3, "{text}: {id}: {}, {expected}", last[*id]);
        }
    }
    for case in json["perplexity"].as_array().unwrap() {
        let name = case["text"].as_str().unwrap();
        let text = fs::read_to_string(reference.0.join("../../text").join(name)).unwrap();
        let range: Vec<usize> = serde_json::from_value(case["char_range"].clone()).unwrap();
        let part: String = text.chars().skip(range[0]).take(range[1] - range[0]).collect();
        let tokens: Vec<i64> = tokenizer.encode(&part).unwrap()[..256].iter().map(|id| *id as i64).collect();
        let logits = values(model.forward(ids(&tokens, [1, 256])));
        let rows = logits.chunks(49152).zip(&tokens[1..]);
        let nats: f64 = rows
            .map(|(row, next)| {
                let largest = row.iter().copied().fold(f64::MIN, f64::max);
                let partition = row.iter().map(|x| (x - largest).exp()).sum::<f64>().ln() + largest;
                partition - row[*next as usize]
            })
            .sum();
        let (found, expected) = ((nats / 255.0).exp(), case["perplexity"].as_f64().unwrap());
        println!("SmolLM2-135M, {name}: perplexity {found:.4}, the reference {expected:.4}");
        assert!((found / expected - 1.0).abs() < 1e-4, "{name}: {found}, {expected}");
    }
}

fn gpt_nano_sort(reference: &Reference) -> DuckQuantized {
    let json = reference.json("config.json");
    let d_model = size(&json, "n_embd");
    let config = DuckConfig::duck_tiny()
        .with_family(Family::Gpt2)
        .with_activation(Activation::Gelu)
        .with_vocab_size(size(&json, "vocab_size"))
        .with_context(size(&json, "n_positions"))
        .with_d_model(d_model)
        .with_n_layers(size(&json, "n_layer"))
        .with_n_heads(size(&json, "n_head"))
        .with_n_kv_heads(size(&json, "n_head"))
        .with_d_ff(4 * d_model)
        .with_tied(false)
        .with_norm_eps(json["layer_norm_epsilon"].as_f64().unwrap());
    let mut model = config.init(&QuantConfig::default().float(), 0, &device());
    let bytes = reference.bytes("model.safetensors");
    let weights = Weights::read(&bytes);
    set(&mut model.embedding, weights.tensor("transformer.wte.weight"));
    set(model.positions.as_mut().unwrap(), weights.tensor("transformer.wpe.weight"));
    set(model.head.as_mut().unwrap(), weights.tensor("lm_head.weight"));
    weights.norm(&mut model.transformer.norm, "transformer.ln_f");
    for (index, block) in model.transformer.blocks.iter_mut().enumerate() {
        let name = |part: &str| format!("transformer.h.{index}.{part}");
        weights.norm(&mut block.attention_norm, &name("ln_1"));
        weights.norm(&mut block.feed_forward_norm, &name("ln_2"));
        // One matrix computes queries, keys and values.
        let fused: Tensor<2> = weights.tensor(&name("attn.c_attn.weight"));
        let bias = name("attn.c_attn.bias");
        let bias: Option<Tensor<1>> = weights.0.tensor(&bias).is_ok().then(|| weights.tensor(&bias));
        let attention = &mut block.attention;
        let parts = [&mut attention.query, &mut attention.key, &mut attention.value];
        for (part, linear) in parts.into_iter().enumerate() {
            let part = part * d_model..(part + 1) * d_model;
            set(&mut linear.weight, fused.clone().slice(part.clone()).transpose());
            if let Some(bias) = &bias {
                set(linear.bias.as_mut().unwrap(), bias.clone().slice(part));
            }
        }
        weights.linear(&mut attention.output, &name("attn.c_proj"));
        weights.linear(&mut block.feed_forward.up, &name("mlp.c_fc"));
        weights.linear(&mut block.feed_forward.down, &name("mlp.c_proj"));
    }
    model
}

#[test]
fn a_trained_gpt2_gives_its_reference_logits() {
    let Some(reference) = Reference::open("gpt_nano_sort") else { return };
    let bytes = reference.bytes("model.safetensors");
    if Weights::read(&bytes).0.tensor("transformer.h.0.attn.c_attn.bias").is_err() {
        println!("skipped: {}: c_attn.bias: absent", reference.0.join("model.safetensors").display());
        return;
    }
    let model = gpt_nano_sort(&reference);
    let bytes = reference.bytes("reference_activations.safetensors");
    let activations = Weights::read(&bytes);
    let found = values(model.forward(ids(&activations.ids("idx"), [3, 11])));
    for name in ["expected_logits", "lm_head"] {
        let error = error(&found, &values(activations.tensor::<3>(name)));
        assert!(error < 1e-5, "{name}: {error:e}");
    }
}

/// The reference has every value inside block 0, so each layer is checked with the reference's input to it.
#[test]
fn the_layers_of_a_trained_gpt2_give_their_reference_activations() {
    let Some(reference) = Reference::open("gpt_nano_sort") else { return };
    let mut model = gpt_nano_sort(&reference);
    let bytes = reference.bytes("reference_activations.safetensors");
    let activations = Weights::read(&bytes);
    let at = |name: &str| activations.tensor::<3>(name);
    let block = &mut model.transformer.blocks[0];
    let attention = &mut block.attention;
    for (part, linear) in
        [&mut attention.query, &mut attention.key, &mut attention.value].into_iter().enumerate()
    {
        // If the file lacks a bias, the same vector is missing at every position.
        let missing = at("qkv").narrow(2, 48 * part, 48) - linear.forward(at("ln1"));
        let missing: Tensor<2> = missing.reshape([33, 48]);
        let bias = missing.clone().mean_dim(0);
        let rest = (missing - bias.clone()).abs().max().into_scalar::<f32>();
        assert!(rest < 1e-5, "qkv, part {part}: {rest:e}");
        linear.bias = linear.bias.take().map(|old| old.map(|old| old + bias.squeeze_dim(0)));
    }
    let future = Tensor::<2, Bool>::tril_mask([11, 11], 0, &device()).unsqueeze();
    for (name, found) in [
        ("ln1", block.attention_norm.forward(at("x"))),
        ("yProj", block.attention.attend(block.attention.project(at("ln1")), None, future)),
        ("ln2", block.feed_forward_norm.forward(at("attnResid"))),
        ("fc", block.feed_forward.up.forward(at("ln2"))),
        ("mlp", block.feed_forward.forward(at("ln2"))),
        ("ln_f", model.transformer.norm.forward(at("block2"))),
    ] {
        let error = error(&values(found), &values(at(name)));
        println!("gpt_nano_sort, {name}: error {error:.1e} of the spread");
        assert!(error < 1e-5, "{name}: {error:e}");
    }
}

/// All sequences of six symbols of three kinds.
fn unsorted() -> Vec<Vec<i64>> {
    (0..729).map(|n: i64| (0..6).map(|digit| n / 3i64.pow(digit) % 3).collect()).collect()
}

/// How many of the inputs the model sorts by greedy decoding.
fn sorts(model: &DuckQuantized) -> usize {
    let mut rows = unsorted();
    for seq in 6..12 {
        let logits = values(model.forward(ids(&rows.concat(), [729, seq])));
        for (row, logits) in rows.iter_mut().zip(logits.chunks(3 * seq)) {
            let last = &logits[3 * (seq - 1)..];
            row.push((0..3).max_by(|a, b| last[*a as usize].total_cmp(&last[*b as usize])).unwrap());
        }
    }
    let sorted = rows.iter().filter(|row| {
        let mut input = row[..6].to_vec();
        input.sort();
        input == row[6..]
    });
    sorted.count()
}

#[test]
fn a_trained_gpt2_sorts_every_input() {
    let Some(reference) = Reference::open("gpt_nano_sort") else { return };
    assert_eq!(sorts(&gpt_nano_sort(&reference)), 729);
}

#[test]
fn a_gpt2_made_ternary_still_sorts_nearly_every_input() {
    let Some(reference) = Reference::open("gpt_nano_sort") else { return };
    let float = gpt_nano_sort(&reference);
    let packed = export_for_inference(&float, None, "sort").unwrap();
    let optim = OptimConfig::default()
        .with_matrix_optimizer(MatrixOptimizer::Muon)
        .with_lr(0.001)
        .with_muon_lr(0.01)
        .with_muon_momentum(0.95)
        .with_beta1(0.9)
        .with_beta2(0.95)
        .with_epsilon(1e-8)
        .with_moments(Moments::Float)
        .with_weight_decay(0.0)
        .with_clip_norm(1.0)
        .with_z_loss(0.0);
    let schedule = ScheduleConfig::default()
        .with_shape(Shape::Cosine)
        .with_warmup_steps(20)
        .with_decay_fraction(0.2)
        .with_min_lr_ratio(0.0)
        .with_weight_decay_until(1.0)
        .with_float_until(0.0)
        .with_ramp_until(0.0)
        .with_sparse_until(0.0);
    let device = device().autodiff();
    let inputs = unsorted();
    let (steps, batch) = (300, 64);
    for seed in 1..=3 {
        let model = float.config().init_from(&packed, &QuantConfig::default(), seed, &device).unwrap();
        let rounded = sorts(&model.valid());
        let mut trainer = QuantizationTrainer::new(model, &optim, &schedule, steps, seed);
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        for _ in 0..steps {
            let rows: Vec<Vec<i64>> = (0..batch)
                .map(|_| {
                    let input = &inputs[rng.random_range(0..inputs.len())];
                    let mut sorted = input.clone();
                    sorted.sort();
                    [&input[..], &sorted].concat()
                })
                .collect();
            let cut = |from: usize| -> Tensor<2, Int> {
                let cut: Vec<i64> = rows.iter().flat_map(|row| row[from..from + 11].to_vec()).collect();
                Tensor::from_data(TensorData::new(cut, [batch, 11]), &device)
            };
            // Only the sorted half can be predicted.
            let mask: Vec<f32> = (0..batch * 11).map(|i| f32::from(u8::from(i % 11 >= 5))).collect();
            trainer.train_step(vec![LmBatch {
                starts: vec![0; batch],
                inputs: cut(0),
                targets: cut(1),
                mask: Tensor::from_data(TensorData::new(mask, [batch, 11]), &device),
                tokens: batch * 6,
                weight: 1.0,
            }]);
        }
        let sorted = sorts(&trainer.model().valid());
        println!("gpt_nano_sort, seed {seed}: {rounded} of 729 after rounding, {sorted} after {steps} steps");
        assert!(sorted >= 725, "seed {seed}: {sorted}");
        assert!(rounded < 600, "rounding alone costs nothing: {rounded}");
    }
}

/// `[positions][width]` in float64.
type Rows = Vec<Vec<f64>>;

/// A slow and plain float64 forward pass with the model's weights.
struct Slow<'a> {
    model: &'a DuckQuantized,
}

impl Slow<'_> {
    fn logits(&self, ids: &[i64]) -> Rows {
        let (config, transformer) = (self.model.config(), &self.model.transformer);
        let table = rows(self.model.embedding.val());
        let mut hidden: Rows = ids.iter().map(|id| table[*id as usize].clone()).collect();
        if let Some(positions) = &self.model.positions {
            hidden = add(&hidden, &rows(positions.val()));
        }
        for block in &transformer.blocks {
            let attended = self.attention(&block.attention, &self.norm(&hidden, &block.attention_norm));
            hidden = add(&hidden, &attended);
            let input = self.norm(&hidden, &block.feed_forward_norm);
            let feed_forward = &block.feed_forward;
            let up = self.linear(&feed_forward.up, &input);
            let inner = match &feed_forward.gate {
                Some(gate) => self
                    .linear(gate, &input)
                    .iter()
                    .zip(&up)
                    .map(|(gate, up)| {
                        gate.iter().zip(up).map(|(gate, up)| self.activate(*gate) * up).collect()
                    })
                    .collect(),
                None => up.iter().map(|row| row.iter().map(|x| self.activate(*x)).collect()).collect(),
            };
            let inner = self.sub_norm(inner, &feed_forward.sub_norm);
            hidden = add(&hidden, &self.linear(&feed_forward.down, &inner));
        }
        let hidden = self.norm(&hidden, &transformer.norm);
        let head = self.model.head.as_ref().map_or(table, |head| rows(head.val()));
        assert_eq!(self.model.head.is_none(), config.tied);
        hidden.iter().map(|x| head.iter().map(|entry| dot(x, entry)).collect()).collect()
    }

    fn attention(&self, attention: &CausalAttention, input: &Rows) -> Rows {
        let config = self.model.config();
        let (width, shared) = (config.head_dim(), config.n_heads / config.n_kv_heads);
        let query = self.turn(self.linear(&attention.query, input));
        let key = self.turn(self.linear(&attention.key, input));
        let value = self.linear(&attention.value, input);
        let mut mixed = vec![vec![0.0; config.d_model]; input.len()];
        for (head, position) in (0..config.n_heads).flat_map(|h| (0..input.len()).map(move |p| (h, p))) {
            let (own, theirs) = (head * width, head / shared * width);
            let score = |seen: usize| {
                dot(&query[position][own..own + width], &key[seen][theirs..theirs + width])
                    / (width as f64).sqrt()
            };
            let weights: Vec<f64> = (0..=position).map(|seen| score(seen).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (seen, weight) in weights.iter().enumerate() {
                for i in 0..width {
                    mixed[position][own + i] += weight / total * value[seen][theirs + i];
                }
            }
        }
        self.linear(&attention.output, &self.sub_norm(mixed, &attention.sub_norm))
    }

    /// The pair `(i, i + half)` of a head is a complex number, multiplied by `exp(i * angle)`.
    fn turn(&self, mut projected: Rows) -> Rows {
        let config = self.model.config();
        if config.family == Family::Gpt2 {
            return projected;
        }
        let (width, half) = (config.head_dim(), config.head_dim() / 2);
        for (position, row) in projected.iter_mut().enumerate() {
            for (head, i) in (0..row.len() / width).flat_map(|h| (0..half).map(move |i| (h, i))) {
                let angle = position as f64 / config.rope_theta.powf(i as f64 / half as f64);
                let (a, b) = (head * width + i, head * width + i + half);
                let (x, y) = (row[a], row[b]);
                row[a] = x * angle.cos() - y * angle.sin();
                row[b] = x * angle.sin() + y * angle.cos();
            }
        }
        projected
    }

    fn norm(&self, input: &Rows, norm: &Norm) -> Rows {
        let eps = self.model.config().norm_eps;
        match norm {
            Norm::Rms(norm) => scaled(&rms(input, eps), &values(norm.weight.val())),
            Norm::Layer(norm) => {
                let centered: Rows = input
                    .iter()
                    .map(|row| {
                        let mean = row.iter().sum::<f64>() / row.len() as f64;
                        row.iter().map(|x| x - mean).collect()
                    })
                    .collect();
                let bias = vec![values(norm.bias.val()); input.len()];
                add(&scaled(&rms(&centered, eps), &values(norm.weight.val())), &bias)
            }
        }
    }

    fn sub_norm(&self, input: Rows, norm: &Option<RmsNorm>) -> Rows {
        assert_eq!(norm.is_some(), self.model.config().family == Family::Bitnet);
        match norm {
            Some(norm) => scaled(&rms(&input, self.model.config().norm_eps), &values(norm.weight.val())),
            None => input,
        }
    }

    fn linear(&self, linear: &QuantizedLinear, input: &Rows) -> Rows {
        let input = if self.model.quant().input_norm { rms(input, 1e-6) } else { input.clone() };
        let weight = rows(linear.effective_weight());
        let mut output = vec![vec![0.0; weight[0].len()]; input.len()];
        for (input, output) in input.iter().zip(&mut output) {
            for (x, weights) in input.iter().zip(&weight) {
                output.iter_mut().zip(weights).for_each(|(y, w)| *y += x * w);
            }
        }
        match &linear.bias {
            Some(bias) => add(&output, &vec![values(bias.val()); input.len()]),
            None => output,
        }
    }

    fn activate(&self, x: f64) -> f64 {
        match self.model.config().activation {
            Activation::Gelu => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
            }
            Activation::Swiglu => x / (1.0 + (-x).exp()),
            Activation::SquaredRelu => x.max(0.0).powi(2),
        }
    }
}

fn rows(matrix: Tensor<2>) -> Rows {
    let [_, columns] = matrix.dims();
    values(matrix).chunks(columns).map(<[f64]>::to_vec).collect()
}

/// The first rows of `b` onto `a`.
fn add(a: &Rows, b: &Rows) -> Rows {
    a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(a, b)| a + b).collect()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn scaled(input: &Rows, weight: &[f64]) -> Rows {
    input.iter().map(|row| row.iter().zip(weight).map(|(x, w)| x * w).collect()).collect()
}

fn rms(input: &Rows, eps: f64) -> Rows {
    input
        .iter()
        .map(|row| {
            let root = (dot(row, row) / row.len() as f64 + eps).sqrt();
            row.iter().map(|x| x / root).collect()
        })
        .collect()
}

/// Moves every parameter, including biases and norms, away from its initial value.
struct Noise(ChaCha8Rng);

impl ModuleMapper for Noise {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| {
            let shape = tensor.shape();
            let noise: Vec<f32> = (0..shape.num_elements()).map(|_| self.0.random_range(-0.5..0.5)).collect();
            let noise = Tensor::from_data(TensorData::new(noise, shape), &tensor.device());
            tensor + noise
        })
    }
}

/// A small model of odd sizes, far from its initial values.
fn random(config: &DuckConfig, quant: &QuantConfig, seed: u64) -> DuckQuantized {
    config.validate().unwrap();
    config.init(quant, seed, &device()).map(&mut Noise(ChaCha8Rng::seed_from_u64(seed)))
}

fn tiny(family: Family, activation: Activation) -> DuckConfig {
    DuckConfig::duck_tiny()
        .with_family(family)
        .with_activation(activation)
        .with_vocab_size(13)
        .with_context(11)
        .with_d_model(24)
        .with_n_layers(2)
        .with_n_heads(4)
        .with_n_kv_heads(if family == Family::Gpt2 { 4 } else { 2 })
        .with_d_ff(35)
        .with_tied(activation == Activation::SquaredRelu)
        .with_norm_eps(1e-3)
        .with_rope_theta(100.0)
}

#[test]
fn every_family_agrees_with_a_float64_forward_pass() {
    let plain = QuantConfig::default();
    let quants = [
        plain.clone().float(),
        plain.clone(),
        plain.clone().with_input_norm(true),
        plain.float().with_input_norm(true),
    ];
    let models = [
        (Family::Gpt2, Activation::Gelu),
        (Family::Gpt2, Activation::SquaredRelu),
        (Family::Llama, Activation::Swiglu),
        (Family::Llama, Activation::SquaredRelu),
        (Family::Bitnet, Activation::Swiglu),
        (Family::Bitnet, Activation::SquaredRelu),
    ];
    let tokens = [7, 0, 12, 12, 3, 1, 9];
    for (seed, (family, activation)) in models.into_iter().enumerate() {
        for quant in &quants {
            let model = random(&tiny(family, activation), quant, seed as u64);
            let found = values(model.forward(ids(&tokens, [1, tokens.len()])));
            let error = error(&found, &Slow { model: &model }.logits(&tokens).concat());
            let what = format!(
                "{family:?} {activation:?} ternary {} input norm {}",
                quant.enabled, quant.input_norm
            );
            println!("{what}: error {error:.1e} of the spread");
            assert!(error < 1e-5, "{what}: {error:e}");
        }
    }
}

#[test]
fn grouped_heads_equal_repeated_heads() {
    for quant in [QuantConfig::default().float(), QuantConfig::default()] {
        for n_kv_heads in [1, 2] {
            let config = tiny(Family::Llama, Activation::Swiglu).with_n_kv_heads(n_kv_heads);
            let grouped = random(&config, &quant, 5);
            let mut full = config.clone().with_n_kv_heads(4).init(&quant, 6, &device());
            full.embedding = grouped.embedding.clone();
            full.head = grouped.head.clone();
            full.transformer.norm = grouped.transformer.norm.clone();
            // The columns of a head are adjacent; they are repeated for every query head that shares the head.
            let repeated = |weight: &Param<Tensor<2>>| {
                let (d, width) = (config.d_model, config.head_dim());
                let heads: Tensor<4> = weight.val().reshape([d, n_kv_heads, 1, width]);
                heads.expand([d, n_kv_heads, 4 / n_kv_heads, width]).reshape([d, 4 * width])
            };
            for (full, grouped) in full.transformer.blocks.iter_mut().zip(&grouped.transformer.blocks) {
                full.attention_norm = grouped.attention_norm.clone();
                full.feed_forward_norm = grouped.feed_forward_norm.clone();
                full.feed_forward = grouped.feed_forward.clone();
                full.attention.query = grouped.attention.query.clone();
                full.attention.output = grouped.attention.output.clone();
                set(&mut full.attention.key.weight, repeated(&grouped.attention.key.weight));
                set(&mut full.attention.value.weight, repeated(&grouped.attention.value.weight));
            }
            let tokens = ids(&[1, 2, 3, 4, 5, 6, 12, 0, 8, 8], [2, 5]);
            let error = error(&values(grouped.forward(tokens.clone())), &values(full.forward(tokens)));
            assert!(error < 1e-6, "{n_kv_heads} of 4: {error:e}");
        }
    }
}
