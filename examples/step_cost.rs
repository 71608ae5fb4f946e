//! What a ternary training step costs against a float one: pairs of steps of the two, in turn, in one process.
//!
//! `cargo run --release --example step_cost -- --preset duck --vocab 8192 --seq 128 --batch 8 --pairs 7`

use burn::tensor::{Device, Distribution, Tensor};
use burn_ternary::data::{LmBatch, LmBatcher, window::Window};
use burn_ternary::device::{describe, device};
use burn_ternary::nn::DuckConfig;
use burn_ternary::quant::QuantConfig;
use burn_ternary::train::{Experiment, QuantizationTrainer};
use clap::Parser;
use std::time::Instant;

#[derive(Parser)]
struct Command {
    #[arg(long, default_value = "duck")]
    preset: String,
    #[arg(long, default_value_t = 8192)]
    vocab: usize,
    #[arg(long, default_value_t = 128)]
    seq: usize,
    #[arg(long, default_value_t = 8)]
    batch: usize,
    #[arg(long, default_value_t = 7)]
    pairs: usize,
}

fn main() {
    let command = Command::parse();
    let Command { vocab, seq, batch, pairs, .. } = command;
    let device = device("flex").expect("flex is compiled in");
    let model = DuckConfig::preset(&command.preset).expect("a preset");
    let model = DuckConfig { vocab_size: vocab, context: seq, dropout: 0.0, ..model };
    let mut optim = Experiment::load("experiments/10-shakespeare-float.toml").expect("the experiment loads");
    optim.optim.lr = 1e-4;
    let autodiff = device.clone().autodiff();
    let trainer = |quant: QuantConfig| {
        QuantizationTrainer::new(model.init(&quant, 1, &autodiff), &optim.optim, &optim.schedule, 1000, 1)
    };
    let mut twins = [trainer(QuantConfig::default().float()), trainer(QuantConfig::default())];
    let (mut times, mut ratios) = ([Vec::new(), Vec::new()], Vec::new());
    for pair in 0..=pairs {
        let seconds = [0, 1].map(|twin| {
            let batch = random_batch(vocab, seq, batch, pair, &autodiff);
            let began = Instant::now();
            twins[twin].train_step(vec![batch]);
            began.elapsed().as_secs_f64()
        });
        // The first pair warms caches, allocator and threads.
        if pair > 0 {
            for (times, seconds) in times.iter_mut().zip(seconds) {
                times.push(seconds);
            }
            ratios.push(seconds[1] / seconds[0]);
        }
    }
    let tokens = (seq * batch) as f64;
    let [float, ternary] = times.map(median);
    let peak = matrix_peak(&device);
    let flops = 6.0 * model.num_params() as f64 * tokens;
    println!(
        "{{\"preset\": \"{}\", \"device\": \"{}\", \"threads\": {}, \"tokens_a_step\": {tokens}, \
         \"float_tokens_per_s\": {:.1}, \"ternary_tokens_per_s\": {:.1}, \"median_ratio\": {:.3}, \
         \"ratios\": {ratios:.3?}, \"float_gflops\": {:.1}, \"matrix_peak_gflops\": {:.1}}}",
        command.preset,
        describe(&device),
        rayon::current_num_threads(),
        tokens / float,
        tokens / ternary,
        median(ratios.clone()),
        flops / float / 1e9,
        peak / 1e9,
    );
}

fn random_batch(vocab: usize, seq: usize, batch: usize, pair: usize, device: &Device) -> LmBatch {
    let id = |index: usize| ((index * 7919 + pair * 104_729) % vocab) as u32;
    let window =
        |row: usize| Window { ids: (0..=seq).map(|i| id(row * seq + i)).collect(), mask: vec![true; seq] };
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
