//! Promise: gradients are those of the straight-through surrogates, and of the loss in a float model.

use crate::oracle::{cpu, floats, granularities, normal, owners, quantizer, tensor};
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use burn_ternary::nn::{
    Activation, DuckConfig, DuckQuantized, Family, MixedPrecision, QuantizedLinearConfig,
};
use burn_ternary::ops::{
    OutsideGradient, RowScale, StraightThrough, absmax_quantize, round_scale, ternary_quantize,
};
use burn_ternary::quant::{
    Estimator, Granularity, QuantConfig, ScaleRule, ScheduleHandle, Sparsity, TernaryQuantizerConfig,
};
use burn_ternary::train::loss::language_model_loss;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// LSQ's range, and SEQ's: `0.99 a` in units of its scale `2a / 3`.
const CLIPS: [f64; 2] = [1.0, 1.485];

/// One call of `ternary_quantize` with random inputs, and its gradients for the upstream gradient `upstream`.
struct Call {
    shape: [usize; 3],
    weight: Vec<f32>,
    scale: Vec<f32>,
    mask: Option<Vec<f32>>,
    upstream: Vec<f32>,
    /// Of the weight and of the scale.
    grads: [Vec<f32>; 2],
}

impl Call {
    fn new(rng: &mut ChaCha8Rng, shape: [usize; 3], pruned: bool, estimator: StraightThrough) -> Self {
        let [groups, n, channels] = shape;
        let count = groups * n * channels;
        let scale: Vec<f32> = (0..groups * channels).map(|_| rng.random_range(0.2..2.0)).collect();
        let mut call = Self {
            shape,
            weight: vec![0.0; count],
            scale,
            mask: pruned.then(|| (0..count).map(|_| f32::from(rng.random_bool(0.5))).collect()),
            upstream: normal(rng, count, 1.0),
            grads: Default::default(),
        };
        for index in 0..count {
            // Away from the edges of the clipping ranges, where the surrogate has no derivative.
            let ratio = loop {
                let ratio: f64 = rng.random_range(-2.5..2.5);
                if CLIPS.iter().all(|clip| (ratio.abs() - clip).abs() > 0.01) {
                    break ratio;
                }
            };
            call.weight[index] = ratio as f32 * call.scale[call.owner(index)];
        }
        let device = cpu().autodiff();
        let weight = tensor(&call.weight, shape, &device).require_grad();
        let scale = tensor(&call.scale, [groups, 1, channels], &device).require_grad();
        let threshold = scale.clone().detach() * 0.5;
        let mask = call.mask.as_ref().map(|mask| tensor(mask, shape, &device));
        let output = ternary_quantize(weight.clone(), scale.clone(), threshold, mask, estimator);
        let grads = (output * tensor(&call.upstream, shape, &device)).sum().backward();
        call.grads = [floats(weight.grad(&grads).unwrap()), floats(scale.grad(&grads).unwrap())];
        call
    }

    fn owner(&self, index: usize) -> usize {
        let [_, n, channels] = self.shape;
        index / channels / n * channels + index % channels
    }

    fn is_kept(&self, index: usize) -> bool {
        self.mask.as_ref().is_none_or(|mask| mask[index] == 1.0)
    }

    fn ratio(&self, index: usize) -> f64 {
        f64::from(self.weight[index]) / f64::from(self.scale[self.owner(index)])
    }
}

/// The central difference in `s`, divided by sqrt(n), of the sum over `(w, G)` of `G s (r + clamp(w / s, +-clip))`
/// with the rounding `r = code - clamp` held constant, as the straight-through estimator takes it; and a bound of the
/// error of a sum in f32.
fn scale_gradient(terms: &[(f64, f64)], n: usize, scale: f64, clip: f64) -> (f64, f64) {
    let clamp = |ratio: f64| ratio.clamp(-clip, clip);
    let code = |w: f64| (w / scale).clamp(-1.0, 1.0).round_ties_even();
    let surrogate = |s: f64| -> f64 {
        terms.iter().map(|(w, upstream)| upstream * s * (code(*w) - clamp(w / scale) + clamp(w / s))).sum()
    };
    let step = 1e-5 * scale;
    let root = (n as f64).sqrt();
    let magnitude: f64 = terms.iter().map(|(_, upstream)| upstream.abs()).sum();
    (
        (surrogate(scale + step) - surrogate(scale - step)) / (2.0 * step * root),
        1e-5 * (magnitude + 1.0) / root,
    )
}

#[test]
fn ternary_quantize_has_the_gradient_of_its_surrogate() {
    for seed in 0..5 {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        for shape in [[1, 1, 1], [1, 35, 1], [1, 13, 9], [4, 6, 5], [7, 1, 3]] {
            use OutsideGradient::{Pass, Zero};
            for (clip, outside, pruned) in
                [(0, Pass, false), (0, Zero, false), (1, Zero, false), (1, Pass, true), (0, Zero, true)]
            {
                let clip = CLIPS[clip];
                let call = Call::new(rng, shape, pruned, StraightThrough { clip: clip as f32, outside });
                let [weight_grad, scale_grad] = &call.grads;
                for (index, got) in weight_grad.iter().enumerate() {
                    let passes = outside == Pass || call.ratio(index).abs() <= clip;
                    let expected = if passes { call.upstream[index] } else { 0.0 };
                    assert_eq!(
                        *got,
                        expected,
                        "{shape:?} {clip} {outside:?} {pruned}: {}",
                        call.ratio(index)
                    );
                }
                for (owner, got) in scale_grad.iter().enumerate() {
                    let terms: Vec<(f64, f64)> = (0..call.weight.len())
                        .filter(|index| call.owner(*index) == owner && call.is_kept(*index))
                        .map(|index| (f64::from(call.weight[index]), f64::from(call.upstream[index])))
                        .collect();
                    let scale = f64::from(call.scale[owner]);
                    let (expected, error) = scale_gradient(&terms, shape[1], scale, clip);
                    assert!(
                        (f64::from(*got) - expected).abs() <= error,
                        "{shape:?} {clip}: {got}, {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_edge_of_the_clipping_range_is_inside() {
    let device = cpu().autodiff();
    let shape = [1, 6, 1];
    let clip = 1.485f32;
    let values = [clip, -clip, clip.next_down(), -clip.next_up(), clip.next_up(), 0.0];
    let weight = tensor(&values, shape, &device).require_grad();
    let scale = tensor(&[1.0], [1, 1, 1], &device);
    let estimator = StraightThrough { clip, outside: OutsideGradient::Zero };
    let output = ternary_quantize(weight.clone(), scale.clone(), scale * 0.5, None, estimator);
    let grads = output.sum().backward();
    assert_eq!(floats(weight.grad(&grads).unwrap()), [1.0, 1.0, 1.0, 0.0, 0.0, 1.0]);
}

#[test]
fn a_pruned_weight_gives_its_scale_nothing_and_keeps_its_gradient() {
    let device = cpu().autodiff();
    let shape = [1, 8, 1];
    // Beyond the largest number of the type, a mask would become infinite and its gradient NaN.
    for dtype in [FloatDType::F32, FloatDType::F16, FloatDType::BF16] {
        let leaf = |values: &[f32], shape| tensor(values, shape, &device).cast(dtype).require_grad();
        let weight = leaf(&[0.9, -0.4, 5.0, -7.0, 0.3, 0.1, -1.7, 0.6], shape);
        let scale = leaf(&[1.0], [1, 1, 1]);
        let upstream = tensor(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], shape, &device).cast(dtype);
        let threshold = scale.clone().detach() * 0.5;
        let none = Tensor::<3>::zeros(shape, &device).cast(dtype);
        let estimator = StraightThrough::IDENTITY;
        let output = ternary_quantize(weight.clone(), scale.clone(), threshold, Some(none), estimator);
        let floats = |tensor: Tensor<3>| floats(tensor.cast(FloatDType::F32));
        assert_eq!(floats(output.clone()), [0.0; 8], "{dtype:?}");
        let grads = (output * upstream.clone()).sum().backward();
        assert_eq!(floats(weight.grad(&grads).unwrap()), floats(upstream), "{dtype:?}");
        assert_eq!(floats(scale.grad(&grads).unwrap()), [0.0], "{dtype:?}");
    }
}

/// The gradients of a quantizer's weight and of its learned scale.
fn quantizer_grads(
    config: &QuantConfig,
    weight: &[f32],
    dims: [usize; 2],
    parameter: Option<Vec<f32>>,
    upstream: &[f32],
    lambda: f32,
) -> (Vec<f32>, Option<Vec<f32>>) {
    let device = cpu().autodiff();
    let weight = tensor(weight, dims, &device).require_grad();
    let schedule = ScheduleHandle::default();
    schedule.lambda.set(lambda);
    let mut quantizer = TernaryQuantizerConfig::new(config, &schedule).init(&weight);
    if let Some(parameter) = parameter {
        let dims = quantizer.scale.as_ref().unwrap().dims();
        quantizer.scale = Some(Param::from_tensor(tensor(&parameter, dims, &device)));
    }
    let output = quantizer.fake_quantize(weight.clone());
    let grads = (output * tensor(upstream, dims, &device)).sum().backward();
    let scale = quantizer.scale.as_ref().map(|scale| {
        floats(scale.val().grad(&grads).expect("a learned scale has a gradient when it is used"))
    });
    (floats(weight.grad(&grads).unwrap()), scale)
}

#[test]
fn learned_scales_are_trained_through_the_quantizer() {
    let rng = &mut ChaCha8Rng::seed_from_u64(20);
    for dims in [[13, 1], [26, 7], [16, 5]] {
        for granularity in granularities(dims) {
            for rule in [ScaleRule::Learned, ScaleRule::Seq] {
                for (estimator, lambda) in
                    [(Estimator::Identity, 1.0), (Estimator::Masked, 1.0), (Estimator::Masked, 0.25)]
                {
                    check_learned(rng, dims, granularity, rule, estimator, lambda);
                }
            }
        }
    }
}

/// Against the formulas of LSQ and of SEQ in terms of its own parameter `a`.
fn check_learned(
    rng: &mut ChaCha8Rng,
    dims: [usize; 2],
    granularity: Granularity,
    rule: ScaleRule,
    estimator: Estimator,
    lambda: f64,
) {
    let case = format!("{dims:?} {granularity:?} {rule:?} {estimator:?} {lambda}");
    let owners = owners(granularity, dims);
    let count = owners.iter().max().unwrap() + 1;
    // Scales are f16 values, so that rounding changes nothing; `a` of seq is 1.5 times as large.
    let scales: Vec<f64> = (0..count).map(|_| f64::from(rng.random_range(200..1024)) / 1024.0).collect();
    let factor = if rule == ScaleRule::Seq { 1.5 } else { 1.0 };
    let clip = if rule == ScaleRule::Seq { 0.99 * 1.5 } else { 1.0 };
    let ratios: Vec<f64> = owners
        .iter()
        .map(|_| {
            loop {
                let ratio: f64 = rng.random_range(-2.5..2.5);
                if (ratio.abs() - clip).abs() > 0.01 && (ratio.abs() - 0.5).abs() > 0.01 {
                    break ratio;
                }
            }
        })
        .collect();
    let weight: Vec<f32> =
        ratios.iter().zip(&owners).map(|(ratio, owner)| (ratio * scales[*owner]) as f32).collect();
    let upstream = normal(rng, weight.len(), 1.0);
    let config =
        QuantConfig::default().with_scale(rule).with_granularity(granularity).with_estimator(estimator);
    let parameter = scales.iter().map(|scale| (scale * factor) as f32).collect();
    let (dw, da) = quantizer_grads(&config, &weight, dims, Some(parameter), &upstream, lambda as f32);
    let (dw, da) = (dw, da.unwrap());

    let n = weight.len() / count;
    let (mut expected, mut error) = (vec![0.0; count], 1e-5);
    for (index, owner) in owners.iter().enumerate() {
        let (w, g) = (f64::from(weight[index]), f64::from(upstream[index]));
        let inside = ratios[index].abs() <= clip;
        let a = scales[*owner] * factor;
        // The outer level over a: 1, or 2/3 for seq.
        let level = 1.0 / factor;
        let code = if ratios[index].abs() > 0.5 { ratios[index].signum() } else { 0.0 };
        let slope = if inside { level * code - w / a } else { level * ratios[index].signum() };
        expected[*owner] += lambda * g * slope / (n as f64).sqrt();
        error += 1e-5 * g.abs();

        let passes = estimator == Estimator::Identity || inside;
        let through = if passes { g } else { (1.0 - lambda) * g };
        assert!((f64::from(dw[index]) - through).abs() <= 1e-6 * g.abs(), "{case}: dw {} of {g}", dw[index]);
    }
    for (got, expected) in da.iter().zip(expected) {
        assert!((f64::from(*got) - expected).abs() <= error, "{case}: {got}, {expected}");
    }
}

#[test]
fn computed_scales_pass_the_gradient_straight_through() {
    let rng = &mut ChaCha8Rng::seed_from_u64(21);
    let dims = [26, 7];
    for rule in [ScaleRule::Absmean, ScaleRule::Absmedian, ScaleRule::Twn] {
        for granularity in granularities(dims) {
            let (weight, upstream) = (normal(rng, 182, 0.02), normal(rng, 182, 1.0));
            let config = QuantConfig::default().with_scale(rule).with_granularity(granularity);
            for lambda in [0.0, 0.25, 1.0] {
                let (dw, scale) = quantizer_grads(&config, &weight, dims, None, &upstream, lambda);
                assert!(scale.is_none());
                for (got, expected) in dw.iter().zip(&upstream) {
                    let error = if lambda == 0.25 { 1e-6 * expected.abs() } else { 0.0 };
                    assert!(
                        (got - expected).abs() <= error,
                        "{rule:?} {granularity:?} {lambda}: {got}, {expected}"
                    );
                }
            }
        }
    }
}

/// The codes do not depend on the scales, so their gradients are the exact ones of the forward pass, not of a surrogate.
#[test]
fn two_scales_have_the_gradients_of_the_forward_pass() {
    let rng = &mut ChaCha8Rng::seed_from_u64(24);
    let dims = [26, 7];
    for granularity in granularities(dims) {
        for sparsity in [Sparsity::None, Sparsity::ZeroFraction(0.8)] {
            let case = format!("{granularity:?} {sparsity:?}");
            let (values, upstream) = (normal(rng, 182, 1.0), normal(rng, 182, 1.0));
            let config = QuantConfig::default()
                .with_scale(ScaleRule::Ttq)
                .with_granularity(granularity)
                .with_sparsity(sparsity);
            let count = owners(granularity, dims).iter().max().unwrap() + 1;
            // These scales, and those one step away, are f16 values.
            let step = 1.0 / 64.0;
            let scales: Vec<f32> = (0..2 * count).map(|_| step * rng.random_range(16..200) as f32).collect();
            let with_scales = |device: &Device, scales: &[f32]| {
                let weight = tensor(&values, dims, device);
                let mut quantizer = quantizer(&config, &weight);
                let dims = quantizer.scale.as_ref().unwrap().dims();
                assert_eq!(dims[1], 2);
                quantizer.scale = Some(Param::from_tensor(tensor(scales, dims, device)));
                quantizer
            };
            let loss = |moved: usize, by: f32| -> f64 {
                let mut scales = scales.clone();
                scales[moved] += by;
                let output = with_scales(&cpu(), &scales).fake_quantize(tensor(&values, dims, &cpu()));
                floats(output).iter().zip(&upstream).map(|(y, g)| f64::from(*y) * f64::from(*g)).sum()
            };
            let device = cpu().autodiff();
            let weight = tensor(&values, dims, &device).require_grad();
            let quantizer = with_scales(&device, &scales);
            let output = quantizer.fake_quantize(weight.clone());
            let grads = (output * tensor(&upstream, dims, &device)).sum().backward();
            assert_eq!(floats(weight.grad(&grads).unwrap()), upstream, "{case}");
            let n = (values.len() / count) as f64;
            let found = floats(quantizer.scale.as_ref().unwrap().val().grad(&grads).unwrap());
            for (index, found) in found.iter().enumerate() {
                let slope = (loss(index, step) - loss(index, -step)) / f64::from(2.0 * step);
                let expected = slope / n.sqrt();
                assert!((f64::from(*found) - expected).abs() < 1e-4, "{case}: {found}, {expected}");
            }
        }
    }
}

#[test]
fn two_scales_are_initialized_to_the_means_of_their_weights() {
    let weight = tensor(&[0.8, -0.05, 1.0, -3.0, 0.1, -1.0], [6, 1], &cpu());
    let config = QuantConfig::default().with_scale(ScaleRule::Ttq);
    let quantizer = quantizer(&config, &weight);
    assert_eq!(floats(quantizer.codes(weight.clone())), [1.0, 0.0, 1.0, -1.0, 0.0, -1.0]);
    let [positive, negative] = [half::f16::from_f32(0.9).to_f32(), 2.0];
    assert_eq!(floats(quantizer.scales(weight.clone())), [positive, negative]);
    let expected = [positive, 0.0, positive, -negative, 0.0, -negative];
    assert_eq!(floats(quantizer.fake_quantize(weight)), expected);
}

#[test]
fn soft_weights_have_their_own_gradient_and_end_hard() {
    let rng = &mut ChaCha8Rng::seed_from_u64(25);
    let dims = [26, 7];
    for (granularity, threshold) in granularities(dims).into_iter().flat_map(|g| [(g, 0.5), (g, 0.3)]) {
        let (values, upstream) = (normal(rng, 182, 0.1), normal(rng, 182, 1.0));
        let config = QuantConfig::default()
            .with_granularity(granularity)
            .with_threshold(threshold)
            .with_estimator(Estimator::Annealed);
        let schedule = ScheduleHandle::default();
        let quantizer = TernaryQuantizerConfig::new(&config, &schedule).init(&tensor(&values, dims, &cpu()));
        let scales = floats(quantizer.scales(tensor(&values, dims, &cpu())));
        let hard: Vec<f32> = floats(quantizer.codes(tensor(&values, dims, &cpu())))
            .iter()
            .zip(owners(granularity, dims))
            .map(|(code, owner)| code * scales[owner])
            .collect();
        for lambda in [0.05f32, 0.5, 0.95, 1.0] {
            schedule.lambda.set(lambda);
            // Outside of training, codes are always hard.
            assert_eq!(floats(quantizer.fake_quantize(tensor(&values, dims, &cpu()))), hard, "{lambda}");
            let device = cpu().autodiff();
            let weight = tensor(&values, dims, &device).require_grad();
            let output = quantizer.fake_quantize(weight.clone());
            let found = floats(output.clone());
            let grads = (output * tensor(&upstream, dims, &device)).sum().backward();
            let grad = floats(weight.grad(&grads).unwrap());
            if lambda == 1.0 {
                assert_eq!((found, grad), (hard.clone(), upstream.clone()));
                continue;
            }
            let temperature = 0.5 * 0.1f64.powf(f64::from(lambda));
            for (index, owner) in owners(granularity, dims).into_iter().enumerate() {
                let scale = f64::from(scales[owner]);
                // A logistic step at each threshold, to be independent of the tanh in the implementation.
                let step = |x: f64| 1.0 / (1.0 + (-x / (temperature * scale)).exp());
                let edge = threshold * scale;
                let soft = |w: f64| scale * (step(w - edge) - step(-w - edge));
                let w = f64::from(values[index]);
                let h = 1e-4 * temperature * scale;
                let slope = (soft(w + h) - soft(w - h)) / (2.0 * h);
                assert!((f64::from(found[index]) - soft(w)).abs() < 1e-6 * scale, "{lambda} {w}");
                let expected = slope * f64::from(upstream[index]);
                let error = 1e-4 * (f64::from(upstream[index]).abs() / temperature);
                assert!(
                    (f64::from(grad[index]) - expected).abs() < error,
                    "{lambda}: {}, {expected}",
                    grad[index]
                );
            }
        }
    }
}

#[test]
fn dead_weights_have_the_gradient_of_the_bias_that_they_feed() {
    let rng = &mut ChaCha8Rng::seed_from_u64(26);
    let (tokens, [d_input, d_output]) = (5, [26, 7]);
    for (scale, lambda) in [(ScaleRule::Absmean, 1.0), (ScaleRule::Twn, 1.0), (ScaleRule::Absmean, 0.25)] {
        let schedule = ScheduleHandle::default();
        schedule.lambda.set(lambda);
        let config = QuantizedLinearConfig {
            d_input,
            d_output,
            bias: true,
            std: 0.3,
            mixed_precision: MixedPrecision::F32,
            quant: QuantConfig::default().with_scale(scale).with_dead_bias(0.125),
            schedule,
        };
        let device = cpu().autodiff();
        let layer = config.init(rng, &device);
        let (input, upstream) = (normal(rng, tokens * d_input, 1.0), normal(rng, tokens * d_output, 1.0));
        let output = layer.forward(tensor(&input, [tokens, d_input], &device));
        let found = floats(output.clone());
        let grads = (output * tensor(&upstream, [tokens, d_output], &device)).sum().backward();
        let grad = floats(layer.weight.val().grad(&grads).unwrap());
        let [latent, effective, codes] =
            [layer.weight.val(), layer.effective_weight(), layer.codes().unwrap()].map(floats);
        let strength = 0.125 * f64::from(lambda);
        for channel in 0..d_output {
            let of_channel = |index: &usize| index % d_output == channel;
            let dead = |index: usize| if codes[index] == 0.0 { strength } else { 0.0 };
            let bias: f64 = (0..latent.len())
                .filter(of_channel)
                .map(|index| dead(index) * f64::from(latent[index]))
                .sum();
            let gradients = (0..tokens).map(|token| f64::from(upstream[token * d_output + channel]));
            let sum: f64 = gradients.clone().sum();
            for index in (0..latent.len()).filter(of_channel) {
                let row = index / d_output;
                let product: f64 = gradients
                    .clone()
                    .enumerate()
                    .map(|(token, g)| g * f64::from(input[token * d_input + row]))
                    .sum();
                let expected = product + dead(index) * sum;
                assert!((f64::from(grad[index]) - expected).abs() < 1e-4, "{scale:?}: {}", grad[index]);
            }
            for token in 0..tokens {
                let products = (0..d_input).map(|i| {
                    f64::from(input[token * d_input + i]) * f64::from(effective[i * d_output + channel])
                });
                let expected = products.sum::<f64>() + bias;
                let found = found[token * d_output + channel];
                assert!((f64::from(found) - expected).abs() < 1e-4, "{scale:?}: {found}, {expected}");
            }
        }
    }
}

#[test]
fn rounding_lets_the_gradient_straight_through() {
    let device = cpu().autodiff();
    let rng = &mut ChaCha8Rng::seed_from_u64(22);
    let upstream = normal(rng, 24, 1.0);
    let mut values = normal(rng, 24, 0.5);
    values[..3].copy_from_slice(&[0.0, 1e-9, 1e9]);

    let scale = tensor(&values, [4, 1, 6], &device).require_grad();
    let grads = (round_scale(scale.clone()) * tensor(&upstream, [4, 1, 6], &device)).sum().backward();
    assert_eq!(floats(scale.grad(&grads).unwrap()), upstream);
    for (levels, scale) in [(127.0, RowScale::F32), (127.0, RowScale::F16), (7.0, RowScale::F16)] {
        let input = tensor(&values, [4, 6], &device).require_grad();
        let output = absmax_quantize(input.clone(), levels, scale);
        let grads = (output * tensor(&upstream, [4, 6], &device)).sum().backward();
        assert_eq!(floats(input.grad(&grads).unwrap()), upstream);
    }
}

#[test]
fn a_quantizer_has_the_same_values_with_and_without_autodiff() {
    let values = normal(&mut ChaCha8Rng::seed_from_u64(23), 130, 0.02);
    for rule in [
        ScaleRule::Absmean,
        ScaleRule::Absmedian,
        ScaleRule::Twn,
        ScaleRule::Learned,
        ScaleRule::Seq,
        ScaleRule::Ttq,
    ] {
        let config = QuantConfig::default().with_scale(rule);
        let [plain, tracked] = [cpu(), cpu().autodiff()].map(|device| {
            let weight = tensor(&values, [26, 5], &device);
            let weight = if device.is_autodiff() { weight.require_grad() } else { weight };
            floats(quantizer(&config, &weight).fake_quantize(weight))
        });
        assert_eq!(plain, tracked, "{rule:?}");
    }
}

/// A model small enough for finite differences.
pub fn tiny(family: Family) -> DuckConfig {
    let gpt2 = family == Family::Gpt2;
    DuckConfig::default()
        .with_family(family)
        .with_vocab_size(11)
        .with_context(6)
        .with_d_model(8)
        .with_n_layers(2)
        .with_n_heads(2)
        .with_n_kv_heads(if gpt2 { 2 } else { 1 })
        .with_d_ff(12)
        .with_activation(match family {
            Family::Gpt2 => Activation::Gelu,
            Family::Llama => Activation::Swiglu,
            Family::Bitnet => Activation::SquaredRelu,
        })
        .with_dropout(0.0)
        .with_tied(family != Family::Llama)
        .with_norm_eps(1e-5)
        .with_rope_theta(10_000.0)
        .with_mixed_precision(MixedPrecision::F32)
}

/// Draws every parameter again, large enough that each affects the loss.
struct Randomize(ChaCha8Rng);

impl ModuleMapper for Randomize {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let dims = param.dims();
        let noise = normal(&mut self.0, dims.iter().product(), 0.4);
        let device = param.val().device();
        let id = param.id;
        let values: Vec<f32> =
            floats(param.val()).iter().zip(noise).map(|(value, noise)| value + noise).collect();
        Param::initialized(id, tensor(&values, dims, &device).require_grad())
    }
}

/// Moves the parameter `id` by `step`.
struct Move<'a> {
    id: ParamId,
    step: &'a [f32],
}

impl ModuleMapper for Move<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if param.id != self.id {
            return param;
        }
        param.map(|value| value.clone() + tensor(self.step, value.dims(), &value.device()))
    }
}

/// Every parameter with its gradient.
struct Collect<'a> {
    from: &'a GradientsParams,
    found: Vec<(ParamId, Vec<f32>)>,
}

impl ModuleVisitor for Collect<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let grad = self.from.get::<D>(param.id).expect("every parameter has a gradient");
        assert_eq!(grad.dims(), param.dims());
        self.found.push((param.id, floats(grad)));
    }
}

/// The gradient of each parameter, in the order of the model.
pub fn collect(grads: &GradientsParams, model: &DuckQuantized) -> Vec<(ParamId, Vec<f32>)> {
    let mut collect = Collect { from: grads, found: Vec::new() };
    model.visit(&mut collect);
    collect.found
}

pub fn ids(values: &[i32], dims: [usize; 2], device: &Device) -> Tensor<2, Int> {
    Tensor::from_data(TensorData::new(values.to_vec(), dims), device)
}

/// Cross entropy and a share of the z-loss on a fixed batch, in which one target is masked.
pub fn loss(model: &DuckQuantized, device: &Device) -> Tensor<1> {
    let dims = [2, 5];
    let inputs = ids(&[3, 1, 4, 1, 5, 9, 2, 6, 10, 0], dims, device);
    let targets = ids(&[1, 4, 1, 5, 8, 2, 6, 10, 0, 7], dims, device);
    let mut mask = vec![1.0; 10];
    mask[6] = 0.0;
    let loss = language_model_loss(model.forward(inputs), targets, tensor(&mask, dims, device), 9);
    loss.cross_entropy + loss.z.mul_scalar(0.05)
}

#[test]
fn the_float_twin_has_the_gradient_of_its_loss() {
    for (seed, family) in [(31, Family::Gpt2), (32, Family::Llama), (33, Family::Bitnet)] {
        let device = cpu().autodiff();
        let model = tiny(family).init(&QuantConfig::default().float(), seed, &device);
        let model = model.map(&mut Randomize(ChaCha8Rng::seed_from_u64(seed)));
        let grads = GradientsParams::from_grads(loss(&model, &device).backward(), &model);
        let grads = collect(&grads, &model);

        let plain = model.valid();
        let device = cpu();
        // Five points: the error is of fourth order, which allows a long step, so that the noise of f32 is small.
        let difference = |id: ParamId, direction: &[f32]| -> f64 {
            let h = 0.01;
            let at = |multiple: f32| -> f64 {
                let step: Vec<f32> = direction.iter().map(|u| u * h * multiple).collect();
                let moved = plain.clone().map(&mut Move { id, step: &step });
                f64::from(loss(&moved, &device).into_scalar::<f32>())
            };
            (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * f64::from(h))
        };
        let rng = &mut ChaCha8Rng::seed_from_u64(seed + 100);
        let compare = |name: &str, id: ParamId, grad: &[f32], direction: &[f32]| {
            let expected = difference(id, direction);
            let got: f64 = grad.iter().zip(direction).map(|(g, u)| f64::from(g * u)).sum();
            let error = 1e-4 + 2e-3 * expected.abs();
            assert!((got - expected).abs() <= error, "{family:?}, {name}: {got}, by differences {expected}");
            expected.abs()
        };
        // Every parameter tensor in a random direction of length one.
        let mut sizes = Vec::new();
        for (index, (id, grad)) in grads.iter().enumerate() {
            let mut direction = normal(rng, grad.len(), 1.0);
            let length = direction.iter().map(|u| u * u).sum::<f32>().sqrt();
            direction.iter_mut().for_each(|u| *u /= length);
            sizes.push(compare(&format!("parameter {index}"), *id, grad, &direction));
        }
        // Ten single weights.
        for _ in 0..10 {
            let (id, grad) = &grads[rng.random_range(0..grads.len())];
            let mut direction = vec![0.0; grad.len()];
            direction[rng.random_range(0..grad.len())] = 1.0;
            sizes.push(compare("one weight", *id, grad, &direction));
        }
        sizes.sort_by(f64::total_cmp);
        // Most gradients must be far above the allowed error.
        assert!(sizes[sizes.len() / 4] > 2e-3, "{family:?}: {sizes:?}");
    }
}
