//! What a training step costs: a float model, its ternary twin with fake quantization, and the same in int8, in turn, in
//! one process.
//!
//! `cargo run --release --example step_cost -- --vocab 8192 --seq 128 --batch 8 --rounds 5`

use burn::tensor::{Device, Distribution, Tensor};
use burn_ternary::data::{LmBatch, LmBatcher, window::Window};
use burn_ternary::device::{describe, device, peak_rss_bytes};
use burn_ternary::nn::DuckConfig;
use burn_ternary::quant::{ActivationPrecision, MatmulPrecision, QuantConfig, Sparsity};
use burn_ternary::run::Experiment;
use burn_ternary::train::{
    QuantizationTrainer,
    optim::{MatrixOptimizer, Moments},
};
use clap::{Parser, ValueEnum};
use std::time::Instant;

#[derive(Parser)]
struct Command {
    #[arg(long, default_value_t = 768)]
    width: usize,
    #[arg(long, default_value_t = 12)]
    layers: usize,
    #[arg(long, default_value_t = 12)]
    heads: usize,
    #[arg(long, default_value_t = 3072)]
    ff: usize,
    #[arg(long, default_value_t = 8192)]
    vocab: usize,
    #[arg(long, default_value_t = 128)]
    seq: usize,
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Timed steps of each variant, after one that warms up
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// What to compare with the first of them
    #[arg(long, value_delimiter = ',', default_value = "float,ternary,int8")]
    variants: Vec<Variant>,
    /// Muon for the matrices, in place of AdamW
    #[arg(long)]
    muon: bool,
    /// AdamW's moments at eight bits
    #[arg(long)]
    int8_moments: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Variant {
    /// No quantizer
    Float,
    /// Fake quantized weights, float activations
    Ternary,
    /// The same, of which nine in ten are zero
    Sparse,
    /// The same, two of each eight inputs not zero
    TwoOfEight,
    /// Fake quantized weights and activations
    Bitlinear,
    /// Fake quantized weights, all products of bfloat16 factors
    Bf16,
    /// Ternary weights and int8 activations, integer products forward and for the input's gradient
    Int8Bf16,
    /// The same, all products
    Int8,
}

impl Variant {
    fn quant(self) -> QuantConfig {
        let ternary = QuantConfig::default();
        let bitlinear = ternary.clone().with_activations(ActivationPrecision::Int8);
        match self {
            Self::Float => ternary.float(),
            Self::Ternary => ternary,
            Self::Sparse => ternary.with_sparsity(Sparsity::ZeroFraction(0.9)),
            Self::TwoOfEight => ternary.with_sparsity(Sparsity::NOfM([2, 8])),
            Self::Bitlinear => bitlinear,
            Self::Bf16 => ternary.with_matmul_precision(MatmulPrecision::Bf16),
            Self::Int8Bf16 => bitlinear.with_matmul_precision(MatmulPrecision::Int8Bf16),
            Self::Int8 => bitlinear.with_matmul_precision(MatmulPrecision::Int8),
        }
    }
}

fn main() {
    let command = Command::parse();
    let Command { width, layers, heads, ff, vocab, seq, batch, rounds, .. } = command;
    let device = device("flex").expect("flex is compiled in");
    // GPT-2's layers, in the size of the reference model by default.
    let model = DuckConfig::duck()
        .with_vocab_size(vocab)
        .with_context(seq)
        .with_d_model(width)
        .with_n_layers(layers)
        .with_n_heads(heads)
        .with_n_kv_heads(heads)
        .with_d_ff(ff)
        .with_dropout(0.0);
    let mut experiment = Experiment::load("experiments/10-shakespeare-float.toml").expect("it loads");
    experiment.optim.lr = 1e-4;
    if command.int8_moments {
        experiment.optim.moments = Moments::Int8;
    }
    experiment.optim.matrix_optimizer =
        if command.muon { MatrixOptimizer::Muon } else { MatrixOptimizer::Adamw };
    let autodiff = device.clone().autodiff();
    let trainer = |variant: &Variant| {
        let model = model.init(&variant.quant(), 1, &autodiff);
        QuantizationTrainer::new(model, &experiment.optim, &experiment.schedule, 1000, 1)
    };
    let mut trainers: Vec<_> = command.variants.iter().map(trainer).collect();
    let mut times = vec![Vec::new(); trainers.len()];
    for round in 0..=rounds {
        for (trainer, times) in trainers.iter_mut().zip(&mut times) {
            let batch = random_batch(vocab, seq, batch, round, &autodiff);
            let began = Instant::now();
            trainer.train_step(vec![batch]);
            // The first round warms caches, allocator and threads.
            if round > 0 {
                times.push(began.elapsed().as_secs_f64());
            }
        }
    }
    let tokens = (seq * batch) as f64;
    let memory = peak_rss_bytes().unwrap_or(0);
    let peak = matrix_peak(&device);
    // Six operations a token and weight; learned positions are looked up, not multiplied.
    let flops = 6.0 * (model.num_params() - seq * model.d_model) as f64 * tokens;
    for (variant, seconds) in command.variants.iter().zip(&times) {
        let ratios = seconds.iter().zip(&times[0]).map(|(seconds, first)| first / seconds).collect();
        let seconds = median(seconds.clone());
        println!(
            "{{\"variant\": \"{variant:?}\", \"device\": \"{}\", \"threads\": {}, \
             \"tokens_a_step\": {tokens}, \"tokens_per_s\": {:.1}, \"speed_of_first\": {:.3}, \"gflops\": {:.1}, \
             \"matrix_peak_gflops\": {:.1}, \"peak_rss_bytes\": {}}}",
            describe(&device),
            rayon::current_num_threads(),
            tokens / seconds,
            median(ratios),
            flops / seconds / 1e9,
            peak / 1e9,
            memory,
        );
    }
}

fn random_batch(vocab: usize, seq: usize, batch: usize, pair: usize, device: &Device) -> LmBatch {
    let id = |index: usize| ((index * 7919 + pair * 104_729) % vocab) as u32;
    let window = |row: usize| Window {
        start: 0,
        ids: (0..=seq).map(|i| id(row * seq + i)).collect(),
        mask: vec![true; seq],
    };
    LmBatcher.batch(&(0..batch).map(window).collect::<Vec<_>>(), device)
}

/// Best of ten f32 products 2048 x 2048 x 2048, in floating-point operations a second.
fn matrix_peak(device: &Device) -> f64 {
    let n = 2048;
    let random = || Tensor::<2>::random([n, n], Distribution::Default, device);
    let (a, b) = (random(), random());
    let time = |_| {
        let began = Instant::now();
        let product = a.clone().matmul(b.clone());
        let seconds = began.elapsed().as_secs_f64();
        drop(product);
        seconds
    };
    2.0 * (n as f64).powi(3) / (0..10).map(time).fold(f64::INFINITY, f64::min)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
