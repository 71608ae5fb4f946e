//! Promise: every backend computes what flex computes, the ternary ops to the bit; flex does so on any number of threads.

use crate::gradients::{collect, ids, loss, tiny};
use crate::oracle::{cpu, floats, granularities, normal, quantizer, tensor};
use burn::optim::GradientsParams;
use burn::tensor::{Bool, Device, Tensor};
use burn_ternary::data::LmBatch;
use burn_ternary::device;
use burn_ternary::nn::{DuckQuantized, Family};
use burn_ternary::ops::{
    AdamWStep, FactorPrecision, Heads, OutsideGradient, RowScale, StraightThrough, WeightGradientPrecision,
    absmax_quantize, adamw, causal_attention, divergences, embed, float_linear, gelu, kth_magnitude,
    latent_linear, layer_norm, lm_head, log_likelihood, mean_abs, rms_norm, round_scale, silu_mul,
    square_sum, ternary_codes, ternary_linear, ternary_quantize,
};
use burn_ternary::quant::{
    ActivationPrecision, Estimator, Granularity, MatmulPrecision, QuantConfig, ScaleRule, ScheduleHandle,
    Sparsity, TernaryQuantizerConfig, compute_optimal_scale,
};
use burn_ternary::train::QuantizationTrainer;
use burn_ternary::train::optim::{MatrixOptimizer, Moments, OptimConfig};
use burn_ternary::train::schedule::{ScheduleConfig, Shape};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The devices of this build, which must agree with [`cpu`]; one that the machine lacks is reported.
fn others() -> Vec<(&'static str, Device)> {
    let open = |name| match device::device(name) {
        Ok(device) => Some((name, device)),
        Err(error) => {
            println!("skipped: device {name}: {error}");
            None
        }
    };
    let others: Vec<_> =
        device::compiled().into_iter().filter_map(open).filter(|(_, device)| *device != cpu()).collect();
    if others.is_empty() {
        println!("skipped: no second device to compare with");
    }
    others
}

#[track_caller]
fn assert_close(case: &str, got: &[f32], expected: &[f32], relative: f32) {
    assert_eq!(got.len(), expected.len(), "{case}");
    let largest = expected.iter().fold(0f32, |max, value| max.max(value.abs()));
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= relative * largest, "{case}, {index}: {got}, expected {expected}");
    }
}

/// Inputs of the ternary ops, with ties, zeros and a mask.
struct Inputs {
    shape: [usize; 3],
    weight: Vec<f32>,
    scale: Vec<f32>,
    threshold: Vec<f32>,
    mask: Vec<f32>,
    upstream: Vec<f32>,
}

impl Inputs {
    fn new(rng: &mut ChaCha8Rng, shape: [usize; 3]) -> Self {
        let [groups, n, channels] = shape;
        let count = groups * n * channels;
        let scale: Vec<f32> = (0..groups * channels).map(|_| rng.random_range(0.01..0.03)).collect();
        let threshold: Vec<f32> = scale.iter().map(|scale| scale * 0.5).collect();
        let mut weight = normal(rng, count, 0.02);
        // At a threshold, one place above and below it, and at the edge of the clipping range.
        for (index, weight) in weight.iter_mut().enumerate() {
            let owner = index / channels / n * channels + index % channels;
            match rng.random_range(0..10) {
                0 => *weight = threshold[owner],
                1 => *weight = -threshold[owner].next_up(),
                2 => *weight = threshold[owner].next_down(),
                3 => *weight = -scale[owner],
                4 => *weight = 0.0,
                5 => *weight = -0.0,
                _ => {}
            }
        }
        let mask = (0..count).map(|_| f32::from(rng.random_bool(0.6))).collect();
        Self { shape, weight, scale, threshold, mask, upstream: normal(rng, count, 1.0) }
    }

    /// Codes, fake quantized weights, the gradient of the weight and that of the scale.
    fn run(&self, device: &Device, outside: OutsideGradient, pruned: bool) -> [Vec<f32>; 4] {
        let device = device.clone().autodiff();
        let scales = [self.shape[0], 1, self.shape[2]];
        let weight = tensor(&self.weight, self.shape, &device).require_grad();
        let scale = tensor(&self.scale, scales, &device).require_grad();
        let threshold = tensor(&self.threshold, scales, &device);
        let mask = pruned.then(|| tensor(&self.mask, self.shape, &device));
        let codes = ternary_codes(weight.clone(), threshold.clone(), mask.clone());
        let estimator = StraightThrough { clip: 1.0, outside };
        let output = ternary_quantize(weight.clone(), scale.clone(), threshold, mask, estimator);
        let grads = (output.clone() * tensor(&self.upstream, self.shape, &device)).sum().backward();
        [
            floats(codes),
            floats(output),
            floats(weight.grad(&grads).unwrap()),
            floats(scale.grad(&grads).unwrap()),
        ]
    }
}

#[test]
fn ternary_ops_and_their_gradients_agree() {
    let rng = &mut ChaCha8Rng::seed_from_u64(1);
    let cases = [[1, 1, 1], [1, 35, 1], [1, 33, 7], [4, 6, 5]].map(|shape| Inputs::new(rng, shape));
    for (name, device) in others() {
        for inputs in &cases {
            for (outside, pruned) in [(OutsideGradient::Pass, false), (OutsideGradient::Zero, true)] {
                let case = format!("{name} {:?} {outside:?} {pruned}", inputs.shape);
                let [codes, quantized, dw, dscale] = inputs.run(&cpu(), outside, pruned);
                let got = inputs.run(&device, outside, pruned);
                // Equal bits except for the sign of zero: the comparison has no division and no sum.
                assert_eq!(got[0], codes, "codes, {case}");
                assert_eq!(got[1], quantized, "fake quantized, {case}");
                assert_eq!(got[2], dw, "dw, {case}");
                assert_close(&case, &got[3], &dscale, 1e-5);
            }
        }
    }
}

#[test]
fn scales_agree() {
    let rng = &mut ChaCha8Rng::seed_from_u64(2);
    for (name, device) in others() {
        for shape in [[1, 35, 1], [1, 33, 7], [4, 6, 5]] {
            let count = shape.iter().product();
            let weight = normal(rng, count, 0.02);
            let means = |device: &Device| floats(mean_abs(tensor(&weight, shape, device)));
            assert_close(&format!("mean_abs {name} {shape:?}"), &means(&device), &means(&cpu()), 1e-5);

            for k in [0, 1, shape[1] / 2, shape[1]] {
                let found = |device: &Device| floats(kth_magnitude(tensor(&weight, shape, device), k));
                assert_eq!(found(&device), found(&cpu()), "kth_magnitude {name} {shape:?} {k}");
            }

            let scales: Vec<f32> = (0..count).map(|_| rng.random_range(-18f32..18.0).exp2()).collect();
            let rounded = |device: &Device| floats(round_scale(tensor(&scales, [count, 1, 1], device)));
            let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            assert_eq!(bits(rounded(&device)), bits(rounded(&cpu())), "{name}");
        }
        let weight = normal(rng, 26 * 7, 0.02);
        let moment: Vec<f32> = (0..26).map(|_| rng.random_range(0.1..2.0)).collect();
        for granularity in granularities([26, 7]) {
            let best = |device: &Device| {
                let moment = tensor(&moment, [26], device);
                floats(compute_optimal_scale(tensor(&weight, [26, 7], device), granularity, Some(moment)))
            };
            assert_close(
                &format!("optimal scale {name} {granularity:?}"),
                &best(&device),
                &best(&cpu()),
                1e-5,
            );
        }
    }
}

const SCALES: [RowScale; 2] = [RowScale::F32, RowScale::F16];

#[test]
fn absmax_quantization_agrees() {
    let rng = &mut ChaCha8Rng::seed_from_u64(3);
    for (name, device) in others() {
        for (levels, scale) in [127.0, 7.0].into_iter().flat_map(|levels| SCALES.map(|scale| (levels, scale)))
        {
            // Between two ties, so that the last bit of a quotient does not matter; the first is the maximum.
            let mut values: Vec<f32> = (0..5 * 33)
                .map(|_| {
                    rng.random_range::<f32, _>(-levels + 1.0..levels).floor() + rng.random_range(-0.4..0.4)
                })
                .collect();
            for (index, row) in values.chunks_mut(33).enumerate() {
                row[0] = levels;
                row.iter_mut().for_each(|value| *value *= [0.01, 1.0, 37.0, 1e-3, 0.0][index]);
            }
            let quantized =
                |device: &Device| floats(absmax_quantize(tensor(&values, [5, 33], device), levels, scale));
            for (got, expected) in quantized(&device).chunks(33).zip(quantized(&cpu()).chunks(33)) {
                assert_close(&format!("{name} {levels} {scale:?}"), got, expected, 1e-5);
            }
        }
    }
}

#[test]
fn quantizers_agree() {
    let values = normal(&mut ChaCha8Rng::seed_from_u64(4), 26 * 7, 0.02);
    for (name, device) in others() {
        for rule in [
            ScaleRule::Absmean,
            ScaleRule::Absmedian,
            ScaleRule::Twn,
            ScaleRule::Learned,
            ScaleRule::Seq,
            ScaleRule::Ttq,
        ] {
            let granularities = [Granularity::PerTensor, Granularity::PerChannel, Granularity::PerGroup(13)];
            let sparsities = [Sparsity::None, Sparsity::ZeroFraction(0.8), Sparsity::NOfM([5, 13])];
            for (granularity, sparsity) in granularities.into_iter().flat_map(|g| sparsities.map(|s| (g, s)))
            {
                let config = QuantConfig::default()
                    .with_scale(rule)
                    .with_granularity(granularity)
                    .with_sparsity(sparsity)
                    .with_estimator(Estimator::Masked);
                let run = |device: &Device| {
                    let weight = tensor(&values, [26, 7], device);
                    let quantizer = quantizer(&config, &weight);
                    [
                        floats(quantizer.scales(weight.clone())),
                        floats(quantizer.codes(weight.clone())),
                        floats(quantizer.fake_quantize(weight)),
                    ]
                };
                assert_eq!(run(&device), run(&cpu()), "{name} {rule:?} {granularity:?} {sparsity:?}");
            }
        }
    }
}

#[test]
fn soft_weights_agree() {
    let values = normal(&mut ChaCha8Rng::seed_from_u64(9), 26 * 7, 0.02);
    for (name, device) in others() {
        for sparsity in [Sparsity::None, Sparsity::NOfM([5, 13])] {
            let config = QuantConfig::default().with_sparsity(sparsity).with_estimator(Estimator::Annealed);
            let schedule = ScheduleHandle::default();
            schedule.lambda.set(0.5);
            let run = |device: &Device| {
                let weight = tensor(&values, [26, 7], &device.clone().autodiff()).require_grad();
                let quantizer = TernaryQuantizerConfig::new(&config, &schedule).init(&weight);
                let output = quantizer.fake_quantize(weight.clone());
                let grads = output.clone().square().sum().backward();
                [floats(output), floats(weight.grad(&grads).unwrap())]
            };
            for (got, expected) in run(&device).iter().zip(&run(&cpu())) {
                assert_close(&format!("{name} {sparsity:?}"), got, expected, 1e-4);
            }
        }
    }
}

/// Outputs and gradients of a model whose layers are ternary.
struct ModelRun {
    codes: Vec<Vec<f32>>,
    logits: Vec<f32>,
    loss: f32,
    /// Of all parameters.
    grads: Vec<Vec<f32>>,
}

impl ModelRun {
    fn new(family: Family, device: &Device) -> Self {
        let device = device.clone().autodiff();
        let quant = QuantConfig::default().with_scale(ScaleRule::Learned).with_input_norm(true);
        let model = tiny(family).init(&quant, 5, &device);
        let loss = loss(&model, &device);
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        Self {
            codes: model.linears().iter().map(|(_, linear)| floats(linear.codes().unwrap())).collect(),
            logits: floats(model.forward(ids(&[3, 1, 4, 1, 5, 9], [2, 3], &device))),
            loss: loss.into_scalar::<f32>(),
            grads: collect(&grads, &model).into_iter().map(|(_, grad)| grad).collect(),
        }
    }
}

#[test]
fn a_ternary_model_agrees_forward_and_backward() {
    for (name, device) in others() {
        for family in [Family::Gpt2, Family::Llama, Family::Bitnet] {
            let expected = ModelRun::new(family, &cpu());
            let got = ModelRun::new(family, &device);
            let case = format!("{name} {family:?}");
            assert_eq!(got.codes, expected.codes, "codes, {case}");
            assert_close(&format!("logits, {case}"), &got.logits, &expected.logits, 1e-5);
            assert_close(&format!("loss, {case}"), &[got.loss], &[expected.loss], 1e-5);
            assert_eq!(got.grads.len(), expected.grads.len());
            let largest = |grad: &[f32]| grad.iter().fold(0f32, |max, g| max.max(g.abs()));
            let noise = 1e-7 * expected.grads.iter().fold(0f32, |max, grad| max.max(largest(grad)));
            for (index, (got, expected)) in got.grads.iter().zip(&expected.grads).enumerate() {
                // A bias of keys shifts all scores equally: its gradient consists of rounding errors.
                if largest(got).max(largest(expected)) > noise {
                    assert_close(&format!("gradient {index}, {case}"), got, expected, 3e-5);
                }
            }
        }
    }
}

/// The losses of the first five steps on batches that all backends see.
fn train(matrices: MatrixOptimizer, device: &Device) -> Vec<f64> {
    let optim = OptimConfig::default()
        .with_matrix_optimizer(matrices)
        .with_lr(3e-3)
        .with_muon_lr(0.02)
        .with_muon_momentum(0.95)
        .with_beta1(0.9)
        .with_beta2(0.95)
        .with_epsilon(1e-8)
        .with_moments(Moments::Float)
        .with_weight_decay(0.1)
        .with_clip_norm(1.0)
        .with_z_loss(1e-4);
    let schedule = ScheduleConfig::default()
        .with_shape(Shape::Cosine)
        .with_warmup_steps(2)
        .with_decay_fraction(0.2)
        .with_min_lr_ratio(0.1)
        .with_weight_decay_until(1.0)
        .with_float_until(0.0)
        .with_ramp_until(0.0)
        .with_sparse_until(0.0);
    let device = device.clone().autodiff();
    let model = tiny(Family::Llama).init(&QuantConfig::default(), 6, &device);
    let mut trainer = QuantizationTrainer::new(model, &optim, &schedule, 5, 6);
    let rng = &mut ChaCha8Rng::seed_from_u64(6);
    let dims = [4, 6];
    (0..5)
        .map(|_| {
            // The next id is the last plus three, from a random start: something to learn.
            let first: Vec<i32> = (0..24).map(|index| index % 6 * 3 + rng.random_range(0..2)).collect();
            let next: Vec<i32> = first.iter().map(|id| (id + 3) % 11).collect();
            let first: Vec<i32> = first.iter().map(|id| id % 11).collect();
            let batch = LmBatch {
                starts: vec![0; dims[0]],
                inputs: ids(&first, dims, &device),
                targets: ids(&next, dims, &device),
                mask: Tensor::ones(dims, &device),
                tokens: 24,
                weight: 1.0,
            };
            trainer.train_step(vec![batch]).loss
        })
        .collect()
}

#[test]
fn the_first_losses_of_a_run_agree() {
    for matrices in [MatrixOptimizer::Muon, MatrixOptimizer::Adamw] {
        let expected = train(matrices, &cpu());
        assert!(expected.iter().all(|loss| loss.is_finite()) && expected[4] < expected[0], "{expected:?}");
        for (name, device) in others() {
            let losses = train(matrices, &device);
            for (loss, expected) in losses.iter().zip(&expected) {
                let close = (loss - expected).abs() <= 1e-3 * expected;
                assert!(close, "{name} {matrices:?}: {losses:?}, expected {expected:?}");
            }
        }
    }
}

/// Our ops save what their backward pass needs; Burn's elementwise ops are recomputed.
#[test]
fn gradient_checkpointing_changes_no_loss() {
    let recomputing = cpu().autodiff().gradient_checkpointing();
    for matrices in [MatrixOptimizer::Muon, MatrixOptimizer::Adamw] {
        assert_eq!(train(matrices, &recomputing), train(matrices, &cpu()), "{matrices:?}");
    }
}

/// ndarray runs the default bodies, flex fused ones. Shapes exceed the block size, alone and in groups.
#[test]
fn fused_ops_give_what_the_default_bodies_give() {
    let (Ok(flex), Ok(plain)) = (device::device("flex"), device::device("ndarray")) else {
        println!("skipped: device ndarray: it and flex must be compiled in");
        return;
    };
    let rng = &mut ChaCha8Rng::seed_from_u64(7);
    let shapes =
        [[1, 1, 1], [1, 40_000, 1], [1, 700, 50], [37, 8, 129], [2, 20_000, 1], [900, 40, 1], [3, 2, 20_000]];
    for shape in shapes {
        let inputs = Inputs::new(rng, shape);
        for pruned in [false, true] {
            let [fused, default] =
                [&flex, &plain].map(|device| inputs.run(device, OutsideGradient::Zero, pruned));
            for (what, (fused, default)) in
                ["codes", "quantized", "dw"].iter().zip(fused.iter().zip(&default))
            {
                assert_eq!(fused, default, "{what} {shape:?}");
            }
            assert_close("dscale", &fused[3], &default[3], 1e-5);
        }
        // Views: the middle of a tensor, and a transposed one.
        let [groups, n, channels] = shape;
        let views = |values: &[f32], device: &Device| {
            let base = tensor(values, shape, device);
            let middle = base.clone().narrow(1, n / 4, n.div_ceil(2));
            [base.clone(), middle, base.reshape([groups, channels, n]).swap_dims(1, 2)]
        };
        for (fused, default) in views(&inputs.weight, &flex).into_iter().zip(views(&inputs.weight, &plain)) {
            let quantized = |weight: Tensor<3>| {
                let scales = tensor(&inputs.scale, [groups, 1, channels], &weight.device());
                let threshold = scales.clone() * 0.5;
                floats(ternary_quantize(weight, scales, threshold, None, StraightThrough::IDENTITY))
            };
            assert_eq!(quantized(fused.clone()), quantized(default.clone()), "{shape:?}");
            let rounded =
                |weight: Tensor<3>| floats(round_scale(weight.slice([0..groups, 0..1, 0..channels])));
            assert_eq!(rounded(fused.clone()), rounded(default.clone()), "{shape:?}");
            let n = fused.dims()[1];
            for k in [1, n.div_ceil(3), n] {
                let [fused, default] =
                    [&fused, &default].map(|weight| floats(kth_magnitude(weight.clone(), k)));
                assert_eq!(fused, default, "{shape:?} {k}");
            }

            for (levels, scale) in [127.0, 7.0].into_iter().flat_map(|levels| SCALES.map(|s| (levels, s))) {
                let [fused, default] =
                    [&fused, &default].map(|tensor| floats(absmax_quantize(tensor.clone(), levels, scale)));
                assert_eq!(fused, default, "{shape:?} {levels} {scale:?}");
            }
        }
        // ndarray adds sequentially, so both sums are compared with float64.
        let weight = normal(rng, groups * n * channels, 0.02);
        for (fused, default) in views(&weight, &flex).into_iter().zip(views(&weight, &plain)) {
            let n = default.dims()[1];
            let mut means = vec![0f64; groups * channels];
            for (index, value) in floats(default.clone()).iter().enumerate() {
                let owner = index / channels / n * channels + index % channels;
                means[owner] += f64::from(value.abs()) / n as f64;
            }
            for (tensor, error) in [(fused, 1e-6), (default, 1e-4)] {
                for (got, mean) in floats(mean_abs(tensor)).iter().zip(&means) {
                    assert!((f64::from(*got) - mean).abs() <= error * mean, "{shape:?}: {got}, {mean}");
                }
            }
        }
    }
}

/// An op's output and the gradients of its inputs, for a random gradient of the output.
fn with_gradients<const N: usize, const D: usize>(
    rng: &mut ChaCha8Rng,
    inputs: [(Vec<f32>, Vec<usize>); N],
    device: &Device,
    op: impl FnOnce([Tensor<1>; N]) -> Tensor<D>,
) -> Vec<Vec<f32>> {
    let device = device.clone().autodiff();
    let inputs = inputs.map(|(values, _)| {
        let count = values.len();
        tensor(&values, [count], &device).require_grad()
    });
    let output = op(inputs.clone());
    let upstream = normal(rng, output.shape().num_elements(), 1.0);
    let grads = (output.clone() * tensor(&upstream, output.dims(), &device)).sum().backward();
    let mut results = vec![floats(output)];
    results.extend(inputs.iter().map(|input| floats(input.grad(&grads).unwrap())));
    results
}

/// Each op of a training step at odd sizes: its name, its output and its gradients.
fn training_ops(device: &Device) -> Vec<(String, Vec<Vec<f32>>)> {
    let rng = &mut ChaCha8Rng::seed_from_u64(11);
    let mut results = Vec::new();
    // No fewer columns: the gradient of a norm of two numbers is rounding error, and fusion on wgpu cannot scatter into one.
    for [rows, d] in [[1, 9], [3, 7], [70, 33], [5, 300]] {
        let mut random = |shape: &[usize]| (normal(rng, shape.iter().product(), 1.0), shape.to_vec());
        let (x, y, weight, bias) = (random(&[rows, d]), random(&[rows, d]), random(&[d]), random(&[d]));
        let table = random(&[13, d]);
        let matrix = random(&[d, 9]);
        let small = random(&[9]);
        let rng = &mut ChaCha8Rng::seed_from_u64(12);
        let mut add = |name: &str, result| results.push((format!("{name} {rows} {d}"), result));
        add(
            "layer_norm",
            with_gradients(rng, [x.clone(), weight.clone(), bias], device, |[x, weight, bias]| {
                layer_norm(x.reshape([rows, d]), weight, bias, 1e-5)
            }),
        );
        add(
            "rms_norm",
            with_gradients(rng, [x.clone(), weight], device, |[x, weight]| {
                rms_norm(x.reshape([rows, d]), weight, 1e-5)
            }),
        );
        add("gelu", with_gradients(rng, [x.clone()], device, |[x]| gelu(x.mul_scalar(3.0))));
        add("silu_mul", with_gradients(rng, [x.clone(), y], device, |[x, y]| silu_mul(x, y)));
        add(
            "float_linear",
            with_gradients(rng, [x.clone(), matrix.clone(), small], device, |[x, w, b]| {
                float_linear(x.reshape([rows, d]), w.reshape([d, 9]), Some(b), FactorPrecision::F32)
            }),
        );
        add(
            "float_linear without bias",
            with_gradients(rng, [x.clone(), matrix], device, |[x, w]| {
                float_linear(x.reshape([rows, d]), w.reshape([d, 9]), None, FactorPrecision::F32)
            }),
        );
        let rows_of: Vec<i32> = (0..2 * rows).map(|row| (row * row * 31 % 13) as i32).collect();
        add(
            "embed",
            with_gradients(rng, [table.clone()], device, |[table]| {
                embed(table.reshape([13, d]), ids(&rows_of, [2, rows], device))
            }),
        );
        add(
            "lm_head",
            with_gradients(rng, [x.clone(), table], device, |[x, table]| {
                lm_head(x.reshape([rows, d]), table.reshape([13, d]), FactorPrecision::F32)
            }),
        );
        let targets: Vec<i32> = (0..rows).map(|row| (row * 31 % d) as i32).collect();
        add(
            "divergences",
            with_gradients(rng, [x.clone()], device, |[x]| {
                let student = x.reshape([rows, d]);
                divergences(student.clone().neg().detach(), student, 1.5)
            }),
        );
        add(
            "log_likelihood",
            with_gradients(rng, [x], device, |[x]| {
                log_likelihood(x.reshape([rows, d]), ids(&targets, [rows, 1], device))
            }),
        );
    }
    for [batch, seq, queries, keys, width] in [[2, 5, 2, 1, 3], [1, 33, 4, 2, 16], [2, 18, 3, 3, 9]] {
        let shape = |heads: usize| vec![batch, seq, heads * width];
        let mut random = |heads| {
            let shape = shape(heads);
            (normal(rng, shape.iter().product(), 1.0), shape)
        };
        let inputs = [random(queries), random(keys), random(keys)];
        let result = with_gradients(rng, inputs, device, |[q, k, v]| {
            let future = Tensor::<2, Bool>::tril_mask([seq, seq], 0, &q.device());
            let [q, k, v] = [(q, queries), (k, keys), (v, keys)]
                .map(|(tensor, heads)| tensor.reshape([batch, seq, heads * width]));
            causal_attention(q, k, v, future, Heads { queries, keys })
        });
        results.push((format!("causal_attention {batch} {seq} {queries} {keys} {width}"), result));
    }
    for shape in [[1, 1], [70, 33]] {
        let mut random = || tensor(&normal(rng, shape[0] * shape[1], 1.0), shape, device);
        let (weight, grad, m, v) = (random(), random(), random(), random().square());
        let step = AdamWStep {
            lr: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            keep: 0.99,
            corrections: [0.271, 0.143],
            grad_factor: 0.7,
        };
        let sum = floats(square_sum(weight.clone()));
        let (weight, [m, v]) = adamw(weight, grad, [m, v], step);
        results.push((format!("adamw {shape:?}"), vec![floats(weight), floats(m), floats(v), sum]));
    }
    results
}

#[test]
fn ops_of_a_training_step_and_their_gradients_agree() {
    let expected = training_ops(&cpu());
    for (name, device) in others() {
        for ((op, got), (_, expected)) in training_ops(&device).iter().zip(&expected) {
            for (part, (got, expected)) in got.iter().zip(expected).enumerate() {
                assert_close(&format!("{name}, {op}, part {part}"), got, expected, 3e-5);
            }
        }
    }
}

/// A ternary linear layer by integer products, and the same by float products of fake quantized factors.
/// The norm of the difference over that of what is expected.
fn relative_error(found: &[f32], expected: &[f32]) -> f32 {
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
    let differences = &mut found.iter().zip(expected).map(|(a, b)| a - b);
    norm(differences) / norm(&mut expected.iter().copied())
}

#[test]
fn integer_products_agree_with_fake_quantization() {
    let device = cpu().autodiff();
    let rng = &mut ChaCha8Rng::seed_from_u64(13);
    let shapes = [[1, 1, 1], [5, 7, 3], [64, 48, 130], [100, 257, 65], [64, 96, 160]];
    for [tokens, d_input, d_output] in shapes {
        let scales: Vec<f32> = normal(rng, d_output, 0.1).iter().map(|s| s.abs() + 0.01).collect();
        let weight: Vec<f32> =
            (0..d_input * d_output).map(|i| scales[i % d_output] * rng.random_range(-1..=1) as f32).collect();
        let values =
            [normal(rng, tokens * d_input, 1.0), weight, normal(rng, d_output, 1.0)].map(|x| (x, vec![]));
        let run = |product: &dyn Fn([Tensor<2>; 2], Tensor<1>) -> Tensor<2>| {
            let rng = &mut ChaCha8Rng::seed_from_u64(14);
            with_gradients(rng, values.clone(), &device, |[x, w, b]| {
                product([x.reshape([tokens, d_input]), w.reshape([d_input, d_output])], b)
            })
        };
        let rounded = |x| absmax_quantize(x, 127.0, RowScale::F32);
        let float = run(&|[x, w], b| float_linear(rounded(x), w, Some(b), FactorPrecision::F32));
        let integer = run(&|[x, w], b| ternary_linear(x, w, Some(b), WeightGradientPrecision::Int8));
        let mixed = run(&|[x, w], b| ternary_linear(x, w, Some(b), WeightGradientPrecision::Bf16));
        let half = run(&|[x, w], b| float_linear(rounded(x), w, Some(b), FactorPrecision::Bf16));
        let case = format!("{tokens} {d_input} {d_output}");
        // A latent weight that quantizes to this one has the same product, to the bit.
        let latent = values[1].0.iter().enumerate();
        let latent: Vec<f32> =
            latent.map(|(i, w)| if *w == 0.0 { 0.4 * scales[i % d_output] } else { 0.7 * w }).collect();
        let of_latent = [values[0].clone(), (latent, vec![]), values[2].clone()];
        for (precision, expected) in
            [(WeightGradientPrecision::Int8, &integer), (WeightGradientPrecision::Bf16, &mixed)]
        {
            let rng = &mut ChaCha8Rng::seed_from_u64(14);
            let found = with_gradients(rng, of_latent.clone(), &device, |[x, w, b]| {
                let (x, w) = (x.reshape([tokens, d_input]), w.reshape([d_input, d_output]));
                let scale = tensor(&scales, [1, 1, d_output], &device);
                latent_linear(x, w, [scale.clone(), scale.mul_scalar(0.5)], Some(b), precision)
            });
            assert_eq!(found, *expected, "{case}");
        }
        assert_close(&format!("output {case}"), &integer[0], &float[0], 3e-6);
        assert_close(&format!("bias {case}"), &integer[3], &float[3], 1e-5);
        for part in [1, 2] {
            let error = relative_error(&integer[part], &float[part]);
            // Rounding to 255 levels of the largest value of a row: an error below a hundredth, but not zero.
            assert!(error < 0.02, "gradient {part} of {case} is off by {error}");
            assert!(d_output * tokens < 100 || error > 1e-5, "gradient {part} of {case} is not rounded");
        }
        assert_eq!([&mixed[0], &mixed[1]], [&integer[0], &integer[1]], "{case}");
        assert_close(&format!("bias {case}"), &mixed[3], &float[3], 1e-5);
        // Rounding to bfloat16 (eight bits of significand), where shapes have whole tiles and the CPU has AMX.
        let tiles = [tokens, d_input, d_output].iter().all(|size| size % 32 == 0);
        let bf16 = tiles && ternary_kernels::Isa::get().multiplies_bf16();
        let parts = [(&mixed, 2), (&half, 0), (&half, 1), (&half, 2)];
        for (index, (found, part)) in parts.into_iter().enumerate() {
            let error = relative_error(&found[part], &float[part]);
            let fits = if bf16 { (1e-4..4e-3).contains(&error) } else { error < 3e-6 };
            assert!(fits, "bfloat16, {index} of {case} is off by {error}");
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let rng = &mut ChaCha8Rng::seed_from_u64(8);
    let values = normal(rng, 1000 * 777, 0.02);
    let run = || {
        let device = cpu();
        let weight = || tensor(&values, [1000, 777], &device);
        let mut results = Vec::new();
        for granularity in [Granularity::PerTensor, Granularity::PerChannel, Granularity::PerGroup(8)] {
            let config = QuantConfig::default().with_granularity(granularity);
            results.push(floats(mean_abs(granularity.view(weight()))));
            results.push(floats(quantizer(&config, &weight()).fake_quantize(weight())));
        }
        results.push(floats(absmax_quantize(weight(), 127.0, RowScale::F32)));
        results.extend(training_ops(&device).into_iter().flat_map(|(_, results)| results));
        let integer = QuantConfig::default()
            .with_activations(ActivationPrecision::Int8)
            .with_matmul_precision(MatmulPrecision::Int8);
        let autodiff = device.clone().autodiff();
        let model = tiny(Family::Gpt2).init(&integer, 5, &autodiff);
        let grads = GradientsParams::from_grads(loss(&model, &autodiff).backward(), &model);
        results.extend(collect(&grads, &model).into_iter().map(|(_, grad)| grad));
        let model = ModelRun::new(Family::Llama, &device);
        results.extend([model.logits, vec![model.loss]]);
        results.extend(model.grads);
        results.push(train(MatrixOptimizer::Muon, &device).iter().map(|loss| *loss as f32).collect());
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        results.into_iter().map(bits).collect::<Vec<_>>()
    };
    let [one, two, five] = [1, 2, 5]
        .map(|threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(run));
    for (index, expected) in one.iter().enumerate() {
        assert!(two[index] == *expected, "result {index} differs on two threads");
        assert!(five[index] == *expected, "result {index} differs on five threads");
    }
}

#[test]
fn every_backend_starts_a_model_from_the_same_bits() {
    let weights = |device: &Device| -> Vec<Vec<f32>> {
        let model: DuckQuantized = tiny(Family::Gpt2).init(&QuantConfig::default(), 9, device);
        let linears = model.linears();
        let linears = linears.iter().map(|(_, linear)| floats(linear.weight.val()));
        linears
            .chain([floats(model.embedding.val()), floats(model.positions.as_ref().unwrap().val())])
            .collect()
    };
    for (name, device) in others() {
        assert_eq!(weights(&device), weights(&cpu()), "{name}");
    }
}
