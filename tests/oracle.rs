//! Promise: scales, codes and fake quantized weights equal their formulas in float64.

use burn::module::{Module, Param};
use burn::nn::LinearConfig;
use burn::tensor::{
    Device, FloatDType, Tensor, TensorData,
    quantization::{
        Calibration, QuantMode, QuantScheme, QuantStore, QuantValue, QuantizationParameters, ScaleDtype,
        compute_q_params, compute_range,
    },
};
use burn_ternary::device;
use burn_ternary::ops::{
    RowScale, SCALE_MAX, SCALE_MIN, StraightThrough, absmax_quantize, absmax_scales, mean_abs, round_scale,
    ternary_codes, ternary_quantize,
};
use burn_ternary::quant::{
    Granularity, QuantConfig, ScaleRule, ScheduleHandle, TablePrecision, TernaryQuantizer,
    TernaryQuantizerConfig, compute_optimal_scale, prepare,
};
use half::f16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal, StudentT};

const RULES: [ScaleRule; 5] =
    [ScaleRule::Absmean, ScaleRule::Absmedian, ScaleRule::Twn, ScaleRule::Learned, ScaleRule::Seq];
const DIMS: [[usize; 2]; 6] = [[1, 1], [3, 5], [7, 1], [1, 9], [130, 33], [64, 257]];
/// Relative error that a scale may have in f32, before it is rounded.
const F32_ERROR: f64 = 2e-6;

/// A CPU backend without further requirements: flex, if it is compiled in.
pub fn cpu() -> Device {
    let name = *device::compiled().last().expect("a backend is compiled in");
    device::device(name).unwrap()
}

pub fn tensor<const D: usize>(values: &[f32], dims: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), dims), device)
}

pub fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

pub fn normal(rng: &mut ChaCha8Rng, count: usize, std: f32) -> Vec<f32> {
    (0..count).map(|_| std * rng.sample::<f32, _>(StandardNormal)).collect()
}

/// Which scale each weight of `[d_input, d_output]` has, in storage order.
pub fn owners(granularity: Granularity, [d_input, d_output]: [usize; 2]) -> Vec<usize> {
    let owner = |input, output| match granularity {
        Granularity::PerTensor => 0,
        Granularity::PerChannel => output,
        Granularity::PerGroup(n) => input / n * d_output + output,
    };
    (0..d_input).flat_map(|input| (0..d_output).map(move |output| owner(input, output))).collect()
}

/// Every granularity that a weight can have, with groups of several sizes.
pub fn granularities([d_input, _]: [usize; 2]) -> Vec<Granularity> {
    let groups =
        [1, 13, 16, 65].into_iter().filter(|n| d_input.is_multiple_of(*n)).map(Granularity::PerGroup);
    [Granularity::PerTensor, Granularity::PerChannel].into_iter().chain(groups).collect()
}

pub fn quantizer(config: &QuantConfig, weight: &Tensor<2>) -> TernaryQuantizer {
    TernaryQuantizerConfig::new(config, &ScheduleHandle::default()).init(weight)
}

/// Weights of many kinds: those of training, and those that should never occur.
fn kinds(rng: &mut ChaCha8Rng, count: usize) -> Vec<(&'static str, Vec<f32>)> {
    let heavy = StudentT::new(2.0f32).unwrap();
    let mut sparse = normal(rng, count, 0.1);
    sparse.iter_mut().step_by(3).for_each(|w| *w = -0.0);
    vec![
        ("gaussian", normal(rng, count, 0.02)),
        ("heavy-tailed", (0..count).map(|_| 0.05 * heavy.sample(rng)).collect()),
        ("constant", vec![-0.3; count]),
        ("zero", vec![0.0; count]),
        ("sparse", sparse),
        ("tiny", normal(rng, count, 1e-7)),
        ("huge", normal(rng, count, 1e6)),
    ]
}

/// The nearest f16 in [2^-14, 65504], ties to even, by its definition: eleven bits of significand.
pub fn nearest_f16(value: f64) -> f64 {
    let value = value.clamp(2f64.powi(-14), 65504.0);
    let mut power = 2f64.powi(-14);
    while 2.0 * power <= value {
        power *= 2.0;
    }
    let step = power / 1024.0;
    (value / step).round_ties_even() * step
}

pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The scale of the magnitudes that share it, before rounding; `twn` may have several, where a weight lies within
/// float32 error of the threshold.
fn reference_scales(rule: ScaleRule, magnitudes: &[f64]) -> Vec<f64> {
    match rule {
        ScaleRule::Absmean => vec![mean(magnitudes)],
        ScaleRule::Absmedian => {
            let mut sorted = magnitudes.to_vec();
            sorted.sort_by(f64::total_cmp);
            let n = sorted.len();
            vec![(sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0]
        }
        ScaleRule::Twn => [1.0 - F32_ERROR, 1.0, 1.0 + F32_ERROR]
            .into_iter()
            .map(|error| {
                let threshold = 0.7 * mean(magnitudes) * error;
                let kept: Vec<f64> = magnitudes.iter().copied().filter(|w| *w > threshold).collect();
                if kept.is_empty() { 0.0 } else { mean(&kept) }
            })
            .collect(),
        // The least-squares scale of a Gaussian; a of seq is 1.5 times that, its levels are at 2a / 3.
        ScaleRule::Learned | ScaleRule::Seq => vec![1.534 * mean(magnitudes)],
        ScaleRule::Ttq => unreachable!("it has two; see `gradients`"),
    }
}

fn groups(weight: &[f32], owners: &[usize]) -> Vec<Vec<f64>> {
    let mut groups = vec![Vec::new(); owners.iter().max().unwrap() + 1];
    for (&w, &owner) in weight.iter().zip(owners) {
        groups[owner].push(f64::from(w.abs()));
    }
    groups
}

fn code(weight: f32, threshold: f32) -> f32 {
    if weight.abs() > threshold { weight.signum() } else { 0.0 }
}

#[test]
fn scales_codes_and_weights_agree_with_float64() {
    let device = cpu();
    for seed in [1, 2] {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        for dims in DIMS {
            for (kind, values) in kinds(rng, dims[0] * dims[1]) {
                let weight = tensor(&values, dims, &device);
                for granularity in granularities(dims) {
                    let owners = owners(granularity, dims);
                    let groups = groups(&values, &owners);
                    for rule in RULES {
                        let threshold = if seed == 1 { 0.5 } else { 0.3 };
                        let config = QuantConfig::default()
                            .with_scale(rule)
                            .with_granularity(granularity)
                            .with_threshold(threshold);
                        let case = format!("{kind} {dims:?} {rule:?} {granularity:?} seed {seed}");
                        check(&case, &config, &weight, &values, &owners, &groups);
                    }
                }
            }
        }
    }
}

fn check(
    case: &str,
    config: &QuantConfig,
    weight: &Tensor<2>,
    values: &[f32],
    owners: &[usize],
    groups: &[Vec<f64>],
) {
    let quantizer = quantizer(config, weight);
    let scales = floats(quantizer.scales(weight.clone()));
    assert_eq!(scales.len(), groups.len(), "{case}");
    for (scale, group) in scales.iter().zip(groups) {
        let close = reference_scales(config.scale, group).into_iter().any(|reference| {
            let [low, high] = [1.0 - F32_ERROR, 1.0 + F32_ERROR].map(|error| nearest_f16(reference * error));
            (low..=high).contains(&f64::from(*scale)) && f64::from(*scale) == nearest_f16(f64::from(*scale))
        });
        assert!(close, "{case}: {scale} for {:?}", reference_scales(config.scale, group));
    }

    let thresholds: Vec<f32> = match config.scale {
        ScaleRule::Twn => {
            let means = floats(mean_abs(config.granularity.view(weight.clone())));
            for (got, group) in means.iter().zip(groups) {
                assert!((f64::from(*got) - mean(group)).abs() <= F32_ERROR * mean(group), "{case}: {got}");
            }
            means.iter().map(|mean| mean * 0.7).collect()
        }
        _ => scales.iter().map(|scale| scale * config.threshold as f32).collect(),
    };
    let codes = floats(quantizer.codes(weight.clone()));
    let quantized = floats(quantizer.fake_quantize(weight.clone()));
    for (((&w, &owner), got), quantized) in values.iter().zip(owners).zip(codes).zip(quantized) {
        let scale = scales[owner];
        let expected = code(w, thresholds[owner]);
        assert_eq!(got, expected, "{case}: code of {w} at scale {scale}");
        if config.scale != ScaleRule::Twn && config.threshold == 0.5 {
            let rounded = (f64::from(w) / f64::from(scale)).clamp(-1.0, 1.0).round_ties_even();
            assert_eq!(f64::from(got), rounded, "{case}: code of {w} at scale {scale}");
        }
        assert_eq!(quantized, expected * scale, "{case}: {w} at scale {scale}");
    }
}

#[test]
fn a_weight_at_the_threshold_is_zero() {
    let device = cpu();
    for scale in [1.0f32, 0.3, 2f32.powi(-14), 65504.0] {
        let threshold = scale / 2.0;
        let around = [threshold, threshold.next_up(), threshold.next_down()];
        let weight = tensor(&[around, around.map(|w| -w)].concat(), [1, 6, 1], &device);
        let [scale, threshold] = [scale, threshold].map(|value| tensor(&[value], [1, 1, 1], &device));
        let codes = [0.0, 1.0, 0.0, 0.0, -1.0, 0.0];
        assert_eq!(floats(ternary_codes(weight.clone(), threshold.clone(), None)), codes);
        let quantized = ternary_quantize(weight, scale.clone(), threshold, None, StraightThrough::IDENTITY);
        assert_eq!(floats(quantized / scale), codes);
    }
}

#[test]
fn latent_weights_may_have_any_float_type() {
    let device = cpu();
    let values = normal(&mut ChaCha8Rng::seed_from_u64(13), 26 * 9, 0.1);
    for dtype in [FloatDType::F16, FloatDType::BF16, FloatDType::F64] {
        if !device.supports_dtype(dtype) {
            println!("skipped: {dtype:?} on {}", device::describe(&device));
            continue;
        }
        for rule in RULES {
            let weight = tensor(&values, [26, 9], &device).cast(dtype);
            let quantizer = quantizer(&QuantConfig::default().with_scale(rule), &weight);
            let quantized = quantizer.fake_quantize(weight.clone());
            assert_eq!(quantized.dtype(), dtype.into());
            let quantized = floats(quantized.cast(FloatDType::F32));
            let codes = floats(quantizer.codes(weight.clone()).cast(FloatDType::F32));
            let scales = floats(quantizer.scales(weight.clone()).cast(FloatDType::F32));
            let weight = floats(weight.cast(FloatDType::F32));
            for (channel, scale) in scales.iter().enumerate() {
                let magnitudes: Vec<f64> =
                    (0..26).map(|i| f64::from(weight[i * 9 + channel].abs())).collect();
                let reference =
                    reference_scales(rule, &magnitudes)[1 % reference_scales(rule, &magnitudes).len()];
                assert!(
                    (f64::from(*scale) / reference - 1.0).abs() < 0.05,
                    "{dtype:?} {rule:?}: {scale}, {reference}"
                );
                assert_eq!(f64::from(*scale), nearest_f16(f64::from(*scale)), "{dtype:?} {rule:?}");
                for index in (channel..codes.len()).step_by(9) {
                    assert!([-1.0, 0.0, 1.0].contains(&codes[index]));
                    assert_eq!(quantized[index], codes[index] * scale, "{dtype:?} {rule:?}");
                }
            }
        }
    }
}

#[test]
fn a_learned_scale_does_not_follow_the_weight() {
    let device = cpu();
    let rng = &mut ChaCha8Rng::seed_from_u64(3);
    let [start, later] = [0.02, 0.5].map(|std| tensor(&normal(rng, 15, std), [5, 3], &device));
    for (rule, follows) in [(ScaleRule::Absmean, true), (ScaleRule::Learned, false), (ScaleRule::Seq, false)]
    {
        let quantizer = quantizer(&QuantConfig::default().with_scale(rule), &start);
        let [before, after] = [&start, &later].map(|weight| floats(quantizer.scales(weight.clone())));
        assert_eq!(before != after, follows, "{rule:?}");
    }
}

#[test]
fn a_gaussian_has_31_percent_zeros_and_is_not_binary() {
    let device = cpu();
    for seed in 10..13 {
        let values = normal(&mut ChaCha8Rng::seed_from_u64(seed), 100_000, 0.02);
        let weight = tensor(&values, [250, 400], &device);
        let config = QuantConfig::default().with_granularity(Granularity::PerTensor);
        let quantized = floats(quantizer(&config, &weight).fake_quantize(weight));
        let share = |level: fn(f32) -> bool| quantized.iter().filter(|w| level(**w)).count() as f64 / 1e5;
        let zeros = share(|w| w == 0.0);
        assert!((zeros - 0.31).abs() < 0.01, "{zeros} zeros");
        assert!((share(|w| w > 0.0) - 0.345).abs() < 0.01);
        let mut levels = quantized.clone();
        levels.sort_by(f32::total_cmp);
        levels.dedup();
        levels.retain(|level| *level != 0.0);
        assert!(levels.len() == 2 && levels[0] == -levels[1], "{levels:?}");
    }
}

#[test]
fn scales_are_rounded_as_f16_rounds() {
    let rng = &mut ChaCha8Rng::seed_from_u64(4);
    // All magnitudes are equally likely, far beyond both ends of f16.
    let mut values: Vec<f32> = (0..100_000).map(|_| rng.random_range(-30f32..24.0).exp2()).collect();
    for exponent in -14..16 {
        let power = 2f32.powi(exponent);
        for mantissa in 0..1024 {
            let tie = power * (1.0 + (mantissa as f32 + 0.5) / 1024.0);
            values.extend([tie, tie.next_down(), tie.next_up(), power * (1.0 + mantissa as f32 / 1024.0)]);
        }
    }
    values.extend([
        0.0,
        f32::MIN_POSITIVE,
        1e-40,
        1e-45,
        SCALE_MIN,
        SCALE_MIN.next_down(),
        SCALE_MIN.next_up(),
    ]);
    values.extend([SCALE_MAX, SCALE_MAX.next_down(), SCALE_MAX.next_up(), 65520.0, 1e30, f32::MAX]);
    for name in device::compiled() {
        let Ok(device) = device::device(name) else { continue };
        let rounded = floats(round_scale(tensor(&values, [values.len(), 1, 1], &device)));
        for (value, got) in values.iter().zip(rounded) {
            let expected = f16::from_f32(value.clamp(SCALE_MIN, SCALE_MAX)).to_f32();
            assert_eq!(got.to_bits(), expected.to_bits(), "{name}: {value:e} became {got:e}");
            assert_eq!(f64::from(got), nearest_f16(f64::from(*value)), "{name}: {value:e}");
        }
    }
}

/// Burn's own post-training quantization of BitNet: one scale, `mean |w|`, and two bits per weight.
fn burn_quantize(weight: Tensor<2>, scale: Option<f32>) -> (f32, Vec<f32>) {
    let scheme = QuantScheme::default()
        .with_mode(QuantMode::Symmetric)
        .with_value(QuantValue::Q2S)
        .with_store(QuantStore::Native)
        .per_tensor(ScaleDtype::F32);
    let parameters = match scale {
        None => compute_q_params(&scheme, compute_range(&scheme, &weight, &Calibration::AbsMean)),
        Some(scale) => {
            QuantizationParameters { scales: Tensor::from_floats([scale], &weight.device()), global: None }
        }
    };
    let scale = floats(parameters.scales.clone())[0];
    (scale, floats(weight.quantize(&scheme, parameters).dequantize()))
}

#[test]
fn burn_agrees_bit_for_bit_where_the_mean_is_exact() {
    let device = cpu();
    for seed in 20..24 {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        // Multiples of 2^-10 whose mean magnitude is one: every order of summation gives the same, and it is an f16 value.
        let mut steps: Vec<i32> = (0..4096).map(|_| rng.random_range(-1500..=1500)).collect();
        let missing = (4096 - steps.iter().map(|k| k.abs()).sum::<i32>() % 4096) % 4096;
        steps[..missing as usize].iter_mut().for_each(|k| *k += if *k < 0 { -1 } else { 1 });
        let values: Vec<f32> = steps.iter().map(|k| *k as f32 / 1024.0).collect();
        let weight = tensor(&values, [32, 128], &device);

        let config = QuantConfig::default().with_granularity(Granularity::PerTensor);
        let ours = quantizer(&config, &weight);
        let (scale, theirs) = burn_quantize(weight.clone(), None);
        assert_eq!(floats(ours.scales(weight.clone()))[0].to_bits(), scale.to_bits());
        for ((w, ours), theirs) in values.iter().zip(floats(ours.fake_quantize(weight))).zip(theirs) {
            // We round a tie to even, that is to 0; Burn rounds it away from 0.
            let expected = if w.abs() == scale / 2.0 { 0.0 } else { theirs };
            assert_eq!(ours, expected, "{w} at scale {scale}");
        }
    }
}

#[test]
fn burn_agrees_on_any_weight_at_the_same_scale() {
    let device = cpu();
    for (seed, dims) in [(30, [3, 5]), (31, [130, 33]), (32, [64, 257])] {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        for (kind, values) in kinds(rng, dims[0] * dims[1]).into_iter().take(2) {
            let weight = tensor(&values, dims, &device);
            let config = QuantConfig::default().with_granularity(Granularity::PerTensor);
            let ours = quantizer(&config, &weight);
            let scale = floats(ours.scales(weight.clone()))[0];
            let codes = floats(ours.codes(weight.clone()));

            // Burn adds in another order, so the means may differ in the last bits.
            let (burn_scale, burn_values) = burn_quantize(weight.clone(), None);
            let mean = floats(mean_abs(Granularity::PerTensor.view(weight.clone())))[0];
            assert!((burn_scale - mean).abs() <= 1e-6 * mean, "{kind}: {burn_scale}, {mean}");
            let (low, high) = (scale.min(burn_scale) / 2.0, scale.max(burn_scale) / 2.0);
            for ((w, code), burn) in values.iter().zip(&codes).zip(burn_values) {
                let between = (low * (1.0 - 1e-6)..=high * (1.0 + 1e-6)).contains(&w.abs());
                assert!(*code == burn / burn_scale || between, "{kind}: {w} at {scale}, {burn_scale}");
            }

            let (_, burn_values) = burn_quantize(weight, Some(scale));
            let mut compared = 0;
            for ((w, code), burn) in values.iter().zip(&codes).zip(burn_values) {
                // Burn multiplies by 1 / scale, which may round across the threshold.
                if (w.abs() / scale - 0.5).abs() > 1e-6 {
                    assert_eq!(code * scale, burn, "{kind}: {w} at {scale}");
                    compared += 1;
                }
            }
            assert!(compared + 10 > values.len());
        }
    }
}

#[test]
fn the_optimal_scale_has_the_least_error_of_all() {
    let device = cpu();
    let rng = &mut ChaCha8Rng::seed_from_u64(5);
    for dims in [[1, 1], [3, 5], [7, 1], [26, 9], [130, 33]] {
        for (kind, values) in kinds(rng, dims[0] * dims[1]) {
            let mut moment: Vec<f32> = (0..dims[0]).map(|_| rng.random_range(0.0f32..2.0).powi(3)).collect();
            moment.iter_mut().skip(1).step_by(5).for_each(|h| *h = 0.0);
            for moment in [None, Some(moment)] {
                for granularity in granularities(dims) {
                    let got = floats(compute_optimal_scale(
                        tensor(&values, dims, &device),
                        granularity,
                        moment.as_ref().map(|moment| tensor(moment, [dims[0]], &device)),
                    ));
                    let owners = owners(granularity, dims);
                    for (owner, scale) in got.iter().enumerate() {
                        // Importance and magnitude of the weights that share this scale.
                        let group: Vec<(f64, f64)> = (0..values.len())
                            .filter(|index| owners[*index] == owner)
                            .map(|index| {
                                let importance =
                                    moment.as_ref().map_or(1.0, |moment| moment[index / dims[1]]);
                                (f64::from(importance), f64::from(values[index].abs()))
                            })
                            .collect();
                        let case = format!("{kind} {dims:?} {granularity:?} {}", moment.is_some());
                        check_optimal(&case, f64::from(*scale), &group, rng);
                    }
                }
            }
        }
    }
}

fn check_optimal(case: &str, scale: f64, group: &[(f64, f64)], rng: &mut ChaCha8Rng) {
    assert!(scale.is_finite() && scale >= 0.0, "{case}: {scale}");
    let error = |scale: f64| -> f64 {
        let term = |w: f64| if w > scale / 2.0 { (w - scale).powi(2) } else { w * w };
        group.iter().map(|(h, w)| h * term(*w)).sum()
    };
    let energy = error(f64::INFINITY);
    let allowed = |best: f64| best + 1e-5 * energy;

    // All thresholds: keep every weight at least as large as this one, with the mean of them as the scale.
    let mut least = energy;
    if group.len() < 300 {
        for (_, threshold) in group {
            let kept = group.iter().filter(|(_, w)| w >= threshold);
            let (sum, count) = kept.fold((0.0, 0.0), |(sum, count), (h, w)| (sum + h * w, count + h));
            if count > 0.0 {
                least = least.min(energy - sum * sum / count);
            }
        }
        assert!(error(scale) <= allowed(least), "{case}: {} at {scale}, but {least}", error(scale));
    }
    let largest = group.iter().fold(0.0f64, |max, (_, w)| max.max(*w));
    for _ in 0..(200_000 / group.len()).min(1000) {
        let other = rng.random_range(0.0..=1.5) * largest;
        assert!(error(scale) <= allowed(error(other)), "{case}: {scale} is worse than {other}");
    }
}

#[test]
fn learned_scales_start_at_the_least_error_of_a_gaussian() {
    let values = normal(&mut ChaCha8Rng::seed_from_u64(6), 100_000, 0.02);
    let weight = tensor(&values, [1000, 100], &cpu());
    let best = floats(compute_optimal_scale(weight.clone(), Granularity::PerTensor, None))[0];
    let config =
        QuantConfig::default().with_scale(ScaleRule::Learned).with_granularity(Granularity::PerTensor);
    let start = floats(quantizer(&config, &weight).scales(weight))[0];
    assert!((start / best - 1.0).abs() < 0.01, "{start}, best is {best}");
}

#[test]
fn absmax_rounds_as_float64_does() {
    let device = cpu();
    let rng = &mut ChaCha8Rng::seed_from_u64(7);
    for levels in [127.0, 7.0] {
        for (rows, d) in [(1, 1), (3, 5), (17, 33), (64, 257)] {
            for (kind, mut values) in kinds(rng, rows * d) {
                values[..d].fill(0.0);
                let got =
                    floats(absmax_quantize(tensor(&values, [1, rows, d], &device), levels, RowScale::F32));
                for (row, got) in values.chunks(d).zip(got.chunks(d)) {
                    let max = row.iter().fold(1e-5, |max, x| f64::max(max, f64::from(x.abs())));
                    let scale = max / f64::from(levels);
                    for (x, got) in row.iter().zip(got) {
                        let x = f64::from(*x) / scale;
                        let close = [x - 1e-4, x, x + 1e-4].iter().any(|x| {
                            let expected = x.round_ties_even() * scale;
                            (f64::from(*got) - expected).abs() <= 1e-6 * expected.abs()
                        });
                        assert!(close, "{kind} {levels}: {got} for {x} steps of {scale}");
                    }
                }
            }
        }
    }
    // Scale 1: every tie is exact.
    let ties = tensor(&[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -3.5], [1, 8], &device);
    assert_eq!(
        floats(absmax_quantize(ties, 127.0, RowScale::F32)),
        [127.0, 0.0, 2.0, 2.0, 0.0, -2.0, 126.0, -4.0]
    );
    let ties = tensor(&[0.5, 1.5, 2.5, 3.5, -2.5, 6.5, -7.0, 5.5], [2, 4], &device);
    assert_eq!(floats(absmax_quantize(ties.narrow(0, 1, 1), 7.0, RowScale::F32)), [-2.0, 6.0, -7.0, 6.0]);
}

#[test]
fn rows_are_codes_times_f16_scales() {
    let device = cpu();
    let rng = &mut ChaCha8Rng::seed_from_u64(9);
    for levels in [127.0f32, 7.0] {
        for (rows, d) in [(1, 1), (3, 5), (17, 33)] {
            for (kind, values) in kinds(rng, rows * d) {
                let table = tensor(&values, [rows, d], &device);
                let scales = floats(absmax_scales(table.clone(), levels));
                let got = floats(absmax_quantize(table, levels, RowScale::F16));
                for ((row, got), scale) in values.chunks(d).zip(got.chunks(d)).zip(scales) {
                    let max = row.iter().fold(1e-5, |max, x| f32::max(max, x.abs()));
                    let expected = half::f16::from_f32((max / levels).clamp(SCALE_MIN, SCALE_MAX));
                    assert_eq!(scale, expected.to_f32(), "{kind} {levels}");
                    for (x, got) in row.iter().zip(got) {
                        let code = (x / scale).clamp(-levels, levels).round_ties_even();
                        assert_eq!(*got, code * scale, "{kind} {levels}: {x} at {scale}");
                    }
                }
            }
        }
    }
}

#[test]
fn tables_have_one_scale_a_row() {
    let device = cpu();
    let dims = [9, 31];
    let values = normal(&mut ChaCha8Rng::seed_from_u64(8), dims[0] * dims[1], 0.02);
    let table = |precision: TablePrecision| floats(precision.fake_quantize(tensor(&values, dims, &device)));
    assert_eq!(table(TablePrecision::Float), values);
    for (precision, levels) in [(TablePrecision::Int8, 127.0), (TablePrecision::Int4, 7.0)] {
        for (row, got) in values.chunks(dims[1]).zip(table(precision).chunks(dims[1])) {
            let scale = row.iter().fold(0f32, |max, w| max.max(w.abs())) / levels;
            let scale = nearest_f16(scale.into()) as f32;
            for (w, got) in row.iter().zip(got) {
                assert!((got / scale).abs() <= levels && (w - got).abs() <= 0.57 * scale);
                assert!((got / scale - (got / scale).round()).abs() < 1e-4);
            }
        }
    }
    for (row, got) in values.chunks(dims[1]).zip(table(TablePrecision::Ternary).chunks(dims[1])) {
        let magnitudes: Vec<f64> = row.iter().map(|w| f64::from(w.abs())).collect();
        let scale = nearest_f16(mean(&magnitudes)) as f32;
        let expected: Vec<f32> = row.iter().map(|w| scale * code(*w, scale / 2.0)).collect();
        assert_eq!(got, expected);
    }
}

#[test]
fn a_mask_zeroes_the_pruned_weights_only() {
    let device = cpu();
    let rng = &mut ChaCha8Rng::seed_from_u64(9);
    for shape @ [groups, n, channels] in [[1, 4, 1], [1, 64, 7], [5, 8, 33]] {
        let mut values = normal(rng, groups * n * channels, 1.0);
        values[0] = 1e30;
        // 2:4 sparsity: of each four consecutive inputs the two largest stay.
        let index = |row: usize, channel: usize| row * channels + channel;
        let mut mask = vec![0f32; values.len()];
        for (run, channel) in (0..groups * n / 4).flat_map(|run| (0..channels).map(move |c| (run, c))) {
            let mut rows: Vec<usize> = (4 * run..4 * run + 4).collect();
            rows.sort_by(|a, b| {
                values[index(*b, channel)].abs().total_cmp(&values[index(*a, channel)].abs())
            });
            rows[..2].iter().for_each(|row| mask[index(*row, channel)] = 1.0);
        }
        mask[0] = 0.0;
        let scales: Vec<f32> = (0..groups * channels).map(|_| rng.random_range(0.3..1.2)).collect();
        let scale = tensor(&scales, [groups, 1, channels], &device);
        let threshold = scale.clone() * 0.5;
        let [weight, mask] = [&values, &mask].map(|values| tensor(values, shape, &device));

        let plain = floats(ternary_codes(weight.clone(), threshold.clone(), None) * mask.clone());
        let codes = ternary_codes(weight.clone(), threshold.clone(), Some(mask.clone()));
        assert_eq!(floats(codes.clone()), plain, "{shape:?}");
        let kept = plain.iter().filter(|code| **code != 0.0).count();
        assert!(kept <= plain.len() / 2 && kept > 0);
        let quantized =
            ternary_quantize(weight, scale.clone(), threshold, Some(mask), StraightThrough::IDENTITY);
        assert_eq!(floats(quantized), floats(codes * scale), "{shape:?}");
    }
}

#[test]
fn lambda_blends_latent_and_ternary_weights() {
    let device = cpu();
    let values = normal(&mut ChaCha8Rng::seed_from_u64(11), 33 * 20, 0.02);
    let weight = tensor(&values, [33, 20], &device);
    for rule in RULES {
        let schedule = ScheduleHandle::default();
        let lambda = &schedule.lambda;
        let config = QuantConfig::default().with_scale(rule);
        let quantizer = TernaryQuantizerConfig::new(&config, &schedule).init(&weight);
        let scale = quantizer.scales(weight.clone()).reshape([1, 20]);
        let ternary = floats(quantizer.codes(weight.clone()) * scale);
        for share in [0.0, 0.25, 1.0] {
            lambda.set(share as f32);
            let blended = floats(quantizer.fake_quantize(weight.clone()));
            for ((w, ternary), got) in values.iter().zip(&ternary).zip(blended) {
                let expected = (1.0 - share) * f64::from(*w) + share * f64::from(*ternary);
                let error = if share == 0.25 { 1e-8 } else { 0.0 };
                assert!((f64::from(got) - expected).abs() <= error, "{rule:?} {share}: {got}, {expected}");
            }
        }
        lambda.set(0.25);
        assert_eq!(floats(quantizer.codes(weight.clone())), {
            lambda.set(1.0);
            floats(quantizer.codes(weight.clone()))
        });
    }
}

#[test]
fn a_materialized_linear_layer_has_exactly_the_ternary_values() {
    let device = cpu();
    let values = normal(&mut ChaCha8Rng::seed_from_u64(12), 26 * 9, 0.1);
    for rule in RULES {
        for granularity in granularities([26, 9]) {
            let config = QuantConfig::default().with_scale(rule).with_granularity(granularity);
            let mut linear = LinearConfig::new(26, 9).init(&device);
            linear.weight = Param::from_tensor(tensor(&values, [26, 9], &device));
            let weight = linear.weight.val();
            let bias = floats(linear.bias.as_ref().unwrap().val());
            let (prepared, _) = prepare(linear, &config, |path| path.ends_with("weight")).unwrap();
            let input = tensor(&values[..52], [2, 26], &device);
            let output = floats(prepared.forward(input.clone()));

            let plain = prepared.materialize();
            let expected = floats(quantizer(&config, &weight).fake_quantize(weight));
            assert_eq!(floats(plain.weight.base()), expected, "{rule:?} {granularity:?}");
            assert_eq!(floats(plain.weight.val()), expected, "{rule:?} {granularity:?}");
            assert_eq!(floats(plain.bias.as_ref().unwrap().val()), bias);
            assert_eq!(floats(plain.forward(input)), output);
        }
    }
}
