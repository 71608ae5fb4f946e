//! Promise: exactly the smallest weights are zero, as many as the experiment sets, and the scale fits the others.

use crate::oracle::{cpu, floats, granularities, mean, nearest_f16, normal, owners, quantizer, tensor};
use crate::small_experiment;
use burn::module::Param;
use burn::tensor::Tensor;
use burn_ternary::quant::{
    Granularity, QuantConfig, ScaleRule, ScheduleHandle, Sparsity, TernaryQuantizer, TernaryQuantizerConfig,
};
use burn_ternary::run::{SavedRun, train_duck_quantized};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const RULES: [ScaleRule; 5] =
    [ScaleRule::Absmean, ScaleRule::Absmedian, ScaleRule::Twn, ScaleRule::Learned, ScaleRule::Seq];
const DIMS: [[usize; 2]; 4] = [[8, 1], [16, 5], [104, 33], [64, 130]];

/// Which weights compete for nonzero codes: those that share a scale, or runs of `m` inputs of a channel.
fn rivals(sparsity: Sparsity, granularity: Granularity, dims: [usize; 2]) -> Vec<usize> {
    match sparsity {
        Sparsity::NOfM([_, m]) => owners(Granularity::PerGroup(m), dims),
        _ => owners(granularity, dims),
    }
}

/// The codes by their definition: sort, and leave out the smallest.
fn reference_codes(weight: &[f32], rivals: &[usize], zeros: impl Fn(usize) -> usize) -> Vec<f32> {
    let mut codes: Vec<f32> = weight.iter().map(|w| w.signum()).collect();
    for group in 0..=*rivals.iter().max().unwrap() {
        let mut members: Vec<usize> = (0..weight.len()).filter(|index| rivals[*index] == group).collect();
        members.sort_by(|a, b| weight[*a].abs().total_cmp(&weight[*b].abs()));
        members[..zeros(members.len())].iter().for_each(|index| codes[*index] = 0.0);
    }
    codes
}

/// Number of zeros among competing weights.
type Zeros = fn(usize) -> usize;

fn sparsities() -> Vec<(Sparsity, Zeros)> {
    vec![
        (Sparsity::ZeroFraction(0.5), |n| ((0.5 * n as f64).round() as usize).min(n - 1)),
        (Sparsity::ZeroFraction(0.93), |n| ((0.93 * n as f64).round() as usize).min(n - 1)),
        (Sparsity::ZeroFraction(0.001), |n| (0.001 * n as f64).round() as usize),
        (Sparsity::NOfM([2, 4]), |_| 2),
        (Sparsity::NOfM([3, 4]), |_| 1),
        (Sparsity::NOfM([2, 8]), |_| 6),
    ]
}

#[test]
fn exactly_the_smallest_weights_are_zero() {
    for seed in [1, 2] {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        for dims in DIMS {
            let values = normal(rng, dims[0] * dims[1], 0.05);
            let weight = tensor(&values, dims, &cpu());
            for granularity in granularities(dims) {
                let owners = owners(granularity, dims);
                for (sparsity, zeros) in sparsities() {
                    let expected = reference_codes(&values, &rivals(sparsity, granularity, dims), zeros);
                    for scale in RULES {
                        let case = format!("{dims:?} {granularity:?} {sparsity:?} {scale:?}");
                        let config = QuantConfig::default()
                            .with_scale(scale)
                            .with_granularity(granularity)
                            .with_sparsity(sparsity);
                        let quantizer = quantizer(&config, &weight);
                        let codes = floats(quantizer.codes(weight.clone()));
                        assert_eq!(codes, expected, "{case}");
                        let scales = floats(quantizer.scales(weight.clone()));
                        for (index, value) in
                            floats(quantizer.fake_quantize(weight.clone())).iter().enumerate()
                        {
                            assert_eq!(*value, codes[index] * scales[owners[index]], "{case}");
                        }
                        check_scales(&case, &config, &values, &codes, &owners, &scales);
                    }
                }
            }
        }
    }
}

fn check_scales(
    case: &str,
    config: &QuantConfig,
    values: &[f32],
    codes: &[f32],
    owners: &[usize],
    scales: &[f32],
) {
    for (owner, scale) in scales.iter().enumerate() {
        let of_owner = (0..values.len()).filter(|index| owners[*index] == owner);
        let mut kept: Vec<f64> = of_owner
            .filter(|index| codes[*index] != 0.0)
            .map(|index| f64::from(values[index].abs()))
            .collect();
        kept.sort_by(f64::total_cmp);
        // Groups that cut runs of N:M may have any number of codes, also none.
        let whole = match (config.sparsity, config.granularity) {
            (Sparsity::NOfM([_, m]), Granularity::PerGroup(n)) => n.is_multiple_of(m),
            _ => true,
        };
        let expected = match config.scale {
            ScaleRule::Absmedian if !whole => continue,
            ScaleRule::Absmedian => (kept[(kept.len() - 1) / 2] + kept[kept.len() / 2]) / 2.0,
            _ if kept.is_empty() => 0.0,
            _ => mean(&kept),
        };
        let [low, high] = [1.0 - 2e-6, 1.0 + 2e-6].map(|error| nearest_f16(expected * error));
        assert!((low..=high).contains(&f64::from(*scale)), "{case}: {scale} for {expected}");
    }
}

#[test]
fn weights_that_tie_are_zero_together_and_a_zero_has_no_code() {
    let rng = &mut ChaCha8Rng::seed_from_u64(3);
    let dims = [24, 7];
    for (sparsity, most) in
        [(Sparsity::NOfM([2, 4]), 2), (Sparsity::NOfM([3, 8]), 3), (Sparsity::ZeroFraction(0.5), 12)]
    {
        // Few different magnitudes, zero among them.
        let values: Vec<f32> = (0..168).map(|_| 0.25 * rng.random_range(-3i32..=3) as f32).collect();
        let config = QuantConfig::default().with_sparsity(sparsity);
        let weight = tensor(&values, dims, &cpu());
        let codes = floats(quantizer(&config, &weight).codes(weight));
        let rivals = rivals(sparsity, Granularity::PerChannel, dims);
        for group in 0..=*rivals.iter().max().unwrap() {
            let members: Vec<usize> = (0..168).filter(|index| rivals[*index] == group).collect();
            let kept = members.iter().filter(|index| codes[**index] != 0.0);
            let dropped = members.iter().filter(|index| codes[**index] == 0.0);
            assert!(kept.clone().count() <= most);
            let least = kept.map(|index| values[*index].abs()).fold(f32::MAX, f32::min);
            let largest = dropped.map(|index| values[*index].abs()).fold(0.0, f32::max);
            assert!(least > largest, "{sparsity:?}: {least} kept, {largest} dropped");
        }
    }
}

/// A quantizer with learned scales that are f16 values, as are those `step` away.
fn with_scales(config: &QuantConfig, weight: &Tensor<2>, scales: &[f32]) -> TernaryQuantizer {
    let mut quantizer = quantizer(config, weight);
    let dims = quantizer.scale.as_ref().unwrap().dims();
    quantizer.scale = Some(Param::from_tensor(tensor(scales, dims, &weight.device())));
    quantizer
}

/// No code depends on the scale, so its gradient is the exact one of the forward pass, not of a surrogate.
#[test]
fn a_learned_scale_has_the_gradient_of_the_forward_pass() {
    let rng = &mut ChaCha8Rng::seed_from_u64(4);
    let dims = [24, 7];
    for granularity in [Granularity::PerTensor, Granularity::PerChannel, Granularity::PerGroup(12)] {
        for sparsity in [Sparsity::ZeroFraction(0.8), Sparsity::NOfM([1, 4])] {
            for (rule, factor) in [(ScaleRule::Learned, 1.0), (ScaleRule::Seq, 1.5)] {
                let case = format!("{granularity:?} {sparsity:?} {rule:?}");
                let (values, upstream) = (normal(rng, 168, 1.0), normal(rng, 168, 1.0));
                let config = QuantConfig::default()
                    .with_scale(rule)
                    .with_granularity(granularity)
                    .with_sparsity(sparsity);
                let owners = owners(granularity, dims);
                let count = owners.iter().max().unwrap() + 1;
                let step = 1.0 / 64.0;
                let scales: Vec<f32> = (0..count).map(|_| step * rng.random_range(16..200) as f32).collect();
                let loss = |moved: usize, by: f32| -> f64 {
                    let weight = tensor(&values, dims, &cpu());
                    let mut scales = scales.clone();
                    scales[moved] += by;
                    scales.iter_mut().for_each(|scale| *scale *= factor);
                    let output = floats(with_scales(&config, &weight, &scales).fake_quantize(weight));
                    output.iter().zip(&upstream).map(|(y, g)| f64::from(*y) * f64::from(*g)).sum()
                };
                let device = cpu().autodiff();
                let weight = tensor(&values, dims, &device).require_grad();
                let parameters: Vec<f32> = scales.iter().map(|scale| scale * factor).collect();
                let quantizer = with_scales(&config, &weight, &parameters);
                let output = quantizer.fake_quantize(weight.clone());
                let grads = (output * tensor(&upstream, dims, &device)).sum().backward();
                assert_eq!(floats(weight.grad(&grads).unwrap()), upstream, "{case}");
                let n = (values.len() / count) as f64;
                let found = floats(quantizer.scale.as_ref().unwrap().val().grad(&grads).unwrap());
                for (owner, found) in found.iter().enumerate() {
                    let slope = (loss(owner, step) - loss(owner, -step)) / f64::from(2.0 * step * factor);
                    let expected = slope / n.sqrt();
                    assert!((f64::from(*found) - expected).abs() < 1e-4, "{case}: {found}, {expected}");
                }
            }
        }
    }
}

#[test]
fn the_dial_lets_the_zeros_grow_from_those_of_a_dense_model() {
    let values = normal(&mut ChaCha8Rng::seed_from_u64(5), 1000 * 8, 0.02);
    let weight = tensor(&values, [1000, 8], &cpu());
    for (sparsity, ends) in
        [(Sparsity::ZeroFraction(0.9), [0.31, 0.605, 0.9]), (Sparsity::NOfM([2, 8]), [0.25, 0.5, 0.75])]
    {
        let schedule = ScheduleHandle::default();
        let config = QuantConfig::default().with_sparsity(sparsity);
        let quantizer = TernaryQuantizerConfig::new(&config, &schedule).init(&weight);
        for (progress, expected) in [0.0, 0.5, 1.0].into_iter().zip(ends) {
            schedule.sparsity.set(progress);
            let zeros = floats(quantizer.codes(weight.clone())).iter().filter(|code| **code == 0.0).count();
            assert_eq!(zeros as f64 / 8000.0, expected, "{sparsity:?} {progress}");
        }
    }
}

#[test]
fn a_run_ends_with_the_zeros_it_was_told() {
    let out = tempfile::tempdir().unwrap();
    for (name, sparsity, expected) in [
        ("share", "quant.sparsity={zero_fraction=0.875}", 0.875),
        ("runs", "quant.sparsity={n_of_m=[1,4]}", 0.75),
    ] {
        let steps =
            ["run.steps=24", "run.eval_every=24", "schedule.float_until=0.25", "schedule.sparse_until=0.75"];
        let experiment = small_experiment(out.path(), name, &[&[sparsity], &steps[..]].concat());
        experiment.validate(name).unwrap();
        let result = train_duck_quantized(&experiment).unwrap();
        assert_eq!(result.zero_fraction, Some(expected), "{name}");
        let packed = SavedRun::open(&experiment.run_dir(), &cpu()).unwrap().export().unwrap();
        for (tensor, written) in packed.tensors.iter().filter(|(tensor, _)| tensor.starts_with("blk.")) {
            if written.ternary_group().is_some() {
                let mut row = vec![0.0; written.cols()];
                written.read_row(0, &mut row);
                let zeros = row.iter().filter(|value| **value == 0.0).count();
                assert_eq!(zeros as f64 / row.len() as f64, expected, "{name} {tensor}");
            }
        }
    }
}
