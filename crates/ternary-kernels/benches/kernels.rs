//! Products in operations per second, each checked first, next to the limits of the machine.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::f16;
use std::time::Duration;
use ternary_kernels::nn::{LinearWeight, SavedTensors, SavedTensorsMut, TernaryLinear};
use ternary_kernels::*;

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |threads| threads.get())
}

/// Codes in the pattern of a small generator.
fn code(row: usize, col: usize) -> i32 {
    ((row * 7919 + col * 104_729) >> 3) as i32 % 3 - 1
}

fn ternary(rows: usize, cols: usize, group: usize) -> Matrix {
    let arena = &mut Arena::new(TernaryMatrix::bytes(rows, cols, group));
    TernaryMatrix::pack(arena, rows, cols, group, |row, codes, scales| {
        codes.iter_mut().enumerate().for_each(|(col, c)| *c = code(row, col) as i8);
        scales.fill(f16::from_f32(0.5));
    })
    .into()
}

fn byte(rows: usize, cols: usize, group: usize) -> Matrix {
    let arena = &mut Arena::new(Int8Matrix::bytes(rows, cols, group));
    Int8Matrix::pack(arena, rows, cols, group, |row, codes, scales| {
        codes.iter_mut().enumerate().for_each(|(col, c)| *c = code(row, col) as i8);
        scales.fill(0.5);
    })
    .into()
}

fn six_bit(rows: usize, cols: usize) -> Matrix {
    let arena = &mut Arena::new(Q6Matrix::bytes(rows, cols));
    Q6Matrix::pack(arena, rows, cols, |row, codes, factors, scales| {
        codes.iter_mut().enumerate().for_each(|(col, c)| *c = code(row, col) as i8);
        factors.fill(1);
        scales.fill(f16::from_f32(0.5));
    })
    .into()
}

/// Activations whose quantized codes are `(col mod 255) - 127`.
fn activations(tokens: usize, cols: usize) -> Vec<f32> {
    (0..tokens * cols).map(|i| (i % cols % 255) as f32 - 127.0).collect()
}

fn check(matrix: &Matrix, x: &[f32], out: &[f32]) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    for (token, row) in [(0, 0), (x.len() / cols - 1, rows - 1), (x.len() / cols / 2, rows / 3)] {
        let x = &x[token * cols..][..cols];
        let sum: i32 = (0..cols).map(|col| code(row, col) * x[col] as i32).sum();
        assert_eq!(out[token * rows + row], sum as f32 * 0.5);
    }
}

fn products(c: &mut Criterion) {
    let mut shapes = vec![];
    for (rows, cols) in [(768, 3072), (3072, 768), (8192, 2048), (32768, 8192)] {
        shapes.push((format!("ternary {rows}x{cols}"), ternary(rows, cols, cols)));
    }
    shapes.push(("ternary by 256 768x3072".into(), ternary(768, 3072, 256)));
    shapes.push(("six-bit 32000x768".into(), six_bit(32000, 768)));
    shapes.push(("byte 32000x768".into(), byte(32000, 768, 768)));
    for threads in [1, threads()] {
        let pool = Pool::new(threads);
        let bandwidth = roofline::read_bandwidth(&pool) / 1e9;
        let operations = threads as f64 * roofline::int8_ops_per_second(pool.isa()) / 1e9;
        println!("{}, {threads} threads: {operations:.0} GOP/s, {bandwidth:.1} GB/s", pool.isa().name());
        for (name, matrix) in &shapes {
            let (rows, cols) = (matrix.rows(), matrix.cols());
            let mut group = c.benchmark_group(format!("{name}, {threads} threads"));
            group.sample_size(10).warm_up_time(Duration::from_millis(100));
            group.measurement_time(Duration::from_millis(500));
            for tokens in [1, 2, 4, 8, 16, 512] {
                if tokens > 16 && rows * cols > 1 << 24 {
                    continue;
                }
                let x = activations(tokens, cols);
                let (mut buffer, mut out) = (Int8Activations::default(), vec![0.0; tokens * rows]);
                let x8 = Activations::int8(&pool, &x, cols, &mut buffer);
                multiply(&pool, &x8, &mut [Product::new(matrix, &mut out)]);
                check(matrix, &x, &out);
                group.throughput(Throughput::Elements((2 * tokens * rows * cols) as u64));
                group.bench_function(BenchmarkId::from_parameter(tokens), |b| {
                    b.iter(|| multiply(&pool, &x8, &mut [Product::new(matrix, &mut out)]));
                });
            }
        }
    }
}

/// What a layer keeps from forward to backward.
struct Kept {
    input: Vec<i8>,
    input_scales: Vec<f32>,
    weight: Vec<i8>,
    weight_scales: Vec<f32>,
}

impl Kept {
    fn lent(&mut self) -> SavedTensorsMut<'_> {
        let Self { input, input_scales, weight, weight_scales } = self;
        SavedTensorsMut { input, input_scales, weight, weight_scales }
    }

    fn saved(&self) -> SavedTensors<'_> {
        let Self { input, input_scales, weight, weight_scales } = self;
        SavedTensors { input, input_scales, weight, weight_scales }
    }
}

/// The products of a linear layer in training, with the packing and rounding that belongs to them.
fn linear_layer(c: &mut Criterion) {
    let (tokens, d_input, d_output) = (1024, 768, 3072);
    let wave = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<_>>();
    let (x, grad) = (wave(tokens * d_input, 0.37), wave(tokens * d_output, 0.73));
    let weight: Vec<f32> =
        (0..d_input * d_output).map(|i| code(i % d_output, i / d_output) as f32 * 0.5).collect();
    let column =
        |m: &[f32], n: usize, col: usize| m.iter().skip(col).step_by(n).copied().collect::<Vec<f32>>();
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
    let close = |found: f32, expected: f64, scale: f64| {
        assert!((f64::from(found) - expected).abs() < 0.05 * scale, "{found} for {expected}");
    };
    for threads in [1, threads()] {
        let pool = Pool::new(threads);
        let mut layer = TernaryLinear::default();
        let mut out = TensorBuffer::new(tokens * d_output);
        let (mut dx, mut dweight) = (TensorBuffer::new(x.len()), TensorBuffer::new(weight.len()));
        let mut kept = Kept {
            input: vec![0; SavedTensors::input_len(tokens, d_input)],
            input_scales: vec![0.0; tokens],
            weight: vec![0; weight.len()],
            weight_scales: vec![0.0; d_output],
        };
        layer.forward(&pool, &x, LinearWeight::Ternary(&weight), None, &mut out, kept.lent());
        layer.backward(&pool, kept.saved(), &grad, &mut dx, &mut dweight);
        for (t, i, o) in [(0, 0, 0), (700, 700, 3000), (1023, 767, 3071)] {
            let (xs, dys) = (&x[t * d_input..][..d_input], &grad[t * d_output..][..d_output]);
            close(out[t * d_output + o], dot(xs, &column(&weight, d_output, o)), 14.0);
            close(dx[t * d_input + i], dot(dys, &weight[i * d_output..][..d_output]), 28.0);
            close(dweight[i * d_output + o], dot(&column(&x, d_input, i), &column(&grad, d_output, o)), 32.0);
        }
        let mut group =
            c.benchmark_group(format!("linear layer {tokens}x{d_input}x{d_output}, {threads} threads"));
        group.sample_size(10).warm_up_time(Duration::from_millis(200));
        group.measurement_time(Duration::from_secs(1));
        let product = (2 * tokens * d_input * d_output) as u64;
        group.throughput(Throughput::Elements(product));
        group.bench_function("forward", |b| {
            b.iter(|| layer.forward(&pool, &x, LinearWeight::Ternary(&weight), None, &mut out, kept.lent()));
        });
        group.bench_function("input's gradient", |b| {
            b.iter(|| layer.input_backward(&pool, &kept.weight, &kept.weight_scales, &grad, &mut dx));
        });
        group.throughput(Throughput::Elements(2 * product));
        group.bench_function("both gradients", |b| {
            b.iter(|| layer.backward(&pool, kept.saved(), &grad, &mut dx, &mut dweight));
        });
    }
}

/// The products of a head of 8192 ids, forward and backward, with factors in bfloat16 where the CPU multiplies such.
#[cfg(feature = "rayon")]
fn head(c: &mut Criterion) {
    let (tokens, width, vocab) = (1024, 768, 8192);
    let wave = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<_>>();
    let (hidden, table) = (wave(tokens * width, 0.37), wave(vocab * width, 0.73));
    let logit = |t: usize, id: usize| -> f64 {
        let rows = hidden[t * width..][..width].iter().zip(&table[id * width..][..width]);
        rows.map(|(a, b)| f64::from(a * b)).sum()
    };
    let (expected, checked) = (
        [(0, 0), (700, 5000), (1023, 8191)].map(|(t, id)| logit(t, id)),
        [0, 700 * vocab + 5000, 1023 * vocab + 8191],
    );
    let (hidden, table) = (MatrixView::new(&hidden, tokens, width), MatrixView::new(&table, vocab, width));
    let mut workspace = Bf16Workspace::default();
    let mut logits = TensorBuffer::new(tokens * vocab);
    let (mut dhidden, mut dtable) = (TensorBuffer::new(tokens * width), TensorBuffer::new(vocab * width));
    for threads in [1, threads()] {
        let pool = Pool::new(threads);
        let mut group = c.benchmark_group(format!("head {tokens}x{width}x{vocab}, {threads} threads"));
        group.sample_size(10).warm_up_time(Duration::from_millis(200));
        group.measurement_time(Duration::from_secs(1));
        group.throughput(Throughput::Elements((2 * tokens * width * vocab) as u64));
        group.bench_function("forward", |b| {
            b.iter(|| matmul_bf16(&pool, &mut workspace, hidden, table.transposed(), None, &mut logits));
        });
        for (at, expected) in checked.into_iter().zip(expected) {
            assert!((f64::from(logits[at]) - expected).abs() < 1.0, "{} for {expected}", logits[at]);
        }
        let grad = MatrixView::new(&logits, tokens, vocab);
        group.bench_function("input's gradient", |b| {
            b.iter(|| matmul_bf16(&pool, &mut workspace, grad, table, None, &mut dhidden));
        });
        group.bench_function("table's gradient", |b| {
            b.iter(|| matmul_bf16(&pool, &mut workspace, grad.transposed(), hidden, None, &mut dtable));
        });
    }
}

/// Products of floats come with the feature `rayon`.
#[cfg(not(feature = "rayon"))]
fn head(_: &mut Criterion) {}

criterion_group!(benches, products, linear_layer, head);
criterion_main!(benches);
