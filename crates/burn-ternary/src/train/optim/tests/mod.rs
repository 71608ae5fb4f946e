//! Steps of both optimizers against float64 references, parameter groups, learning rates and records.

mod net;
mod reference;

pub(in crate::train) use net::{Net, assert_close, floats, random, rng};

use super::{MatrixOptimizer, Moments, OptimConfig, OptimScheduleHandle};
use crate::train::gradients::global_norm;
use crate::train::schedule::{Schedule, ScheduleConfig, Shape};
use burn::Tensor;
use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::module::{Module, Param, ParamGroup, ParamId, Reparameterization, Reparameterizer};
use burn::nn::Linear;
use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord};
use burn::tensor::{Device, TensorData};
use reference::{Matrix, ReferenceAdamW, ReferenceMuon};

const LR: f64 = 0.02;
const MUON_LR: f64 = 0.05;

fn config(matrices: MatrixOptimizer) -> OptimConfig {
    OptimConfig {
        matrix_optimizer: matrices,
        lr: LR,
        muon_lr: MUON_LR,
        muon_momentum: 0.95,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        moments: Moments::Float,
        weight_decay: 0.5,
        clip_norm: 1.0,
        z_loss: 0.0,
    }
}

fn schedule(shape: Shape, total_steps: usize) -> Schedule {
    let config = ScheduleConfig {
        shape,
        warmup_steps: 0,
        decay_fraction: 0.0,
        min_lr_ratio: 0.0,
        weight_decay_until: 1.0,
        float_until: 0.0,
        ramp_until: 0.0,
        sparse_until: 0.0,
    };
    Schedule::new(&config, total_steps)
}

/// Optimizer, the learning rates of each step, and its handle.
fn optimizer(
    net: &Net,
    matrices: MatrixOptimizer,
) -> (ModuleOptimizer, ModuleLearningRate, OptimScheduleHandle) {
    let config = config(matrices);
    let constant = schedule(Shape::Constant, 100);
    let handle = OptimScheduleHandle::default();
    let optimizer = config.init(net.matrices(), net.decayed(), &handle);
    (optimizer, config.lr_scheduler(net.matrices(), &constant, 0).step(), handle)
}

#[test]
fn adamw_follows_float64_with_decay_removed_midway() {
    let rng = &mut rng();
    let mut net = Net::new(rng);
    let (mut optimizer, lr, handle) = optimizer(&net, MatrixOptimizer::Adamw);
    // Embedding and weights decay, biases never do.
    let decays = [0.5, 0.5, 0.5, 0.0, 0.0];
    let mut references = net.values().map(|values| ReferenceAdamW::new(&values));
    for step in 0..10 {
        let factor = if step < 5 { 1.0 } else { 0.0 };
        handle.decay.set(factor as f32);
        let grads = net.grads(|shape| random(rng, shape));
        for ((reference, grad), decay) in references.iter_mut().zip(net.grad_values(&grads)).zip(decays) {
            reference.step(&grad, LR, decay * factor);
        }
        net = optimizer.step(lr.clone(), net, grads);
    }
    for (found, reference) in net.values().iter().zip(&references) {
        assert_close("weights", found, &reference.weights, 2e-5);
    }
}

#[test]
fn muon_is_the_original_on_the_transposed_weight() {
    let rng = &mut rng();
    let mut net = Net::new(rng);
    let (mut optimizer, lr, handle) = optimizer(&net, MatrixOptimizer::Muon);
    let [_, wide, tall, ..] = net.values();
    let mut wide = ReferenceMuon::new(Matrix::new(4, 10, &wide).transposed());
    let mut tall = ReferenceMuon::new(Matrix::new(10, 4, &tall).transposed());
    for step in 0..6 {
        let factor = if step < 3 { 1.0 } else { 0.0 };
        handle.decay.set(factor as f32);
        let grads = net.grads(|shape| random(rng, shape));
        let [_, wide_grad, tall_grad, ..] = net.grad_values(&grads);
        let decay = 0.5 * factor;
        wide.step(&Matrix::new(4, 10, &wide_grad).transposed(), MUON_LR, decay);
        tall.step(&Matrix::new(10, 4, &tall_grad).transposed(), MUON_LR, decay);
        net = optimizer.step(lr.clone(), net, grads);
    }
    let [_, found_wide, found_tall, ..] = net.values();
    assert_close("wide", &found_wide, &wide.weight.transposed().values, 2e-5);
    assert_close("tall", &found_tall, &tall.weight.transposed().values, 2e-5);
}

#[test]
fn groups_decide_who_decays_and_who_has_muon() {
    for matrices in [MatrixOptimizer::Adamw, MatrixOptimizer::Muon] {
        let rng = &mut rng();
        let net = Net::new(rng);
        let (mut optimizer, lr, _) = optimizer(&net, matrices);
        let before = net.values();
        // No gradient, no update: what remains is the decay.
        let zeros = net.grads(|shape| TensorData::zeros::<f32, _>(shape.to_vec()));
        let after = optimizer.step(lr, net, zeros).values();
        let matrix_lr = if matrices == MatrixOptimizer::Muon { MUON_LR } else { LR };
        let rates = [0.5 * LR, 0.5 * matrix_lr, 0.5 * matrix_lr, 0.0, 0.0];
        for ((before, after), rate) in before.iter().zip(after).zip(rates) {
            let expected: Vec<f64> = before.iter().map(|&w| f64::from(w) * (1.0 - rate)).collect();
            assert_close("weights", &after, &expected, if rate == 0.0 { 0.0 } else { 1e-6 });
        }
    }
    // AdamW's first update is lr in every weight; Muon's is not.
    let rng = &mut rng();
    let net = Net::new(rng);
    let (mut optimizer, lr, handle) = optimizer(&net, MatrixOptimizer::Muon);
    handle.decay.set(0.0);
    let before = net.values();
    let grads = net.grads(|shape| random(rng, shape));
    let after = optimizer.step(lr, net, grads).values();
    let by_adamw: Vec<bool> = before
        .iter()
        .zip(&after)
        .map(|(before, after)| {
            let moved = |(a, b): (&f32, &f32)| f64::from((a - b).abs());
            before.iter().zip(after).all(|pair| (moved(pair) - LR).abs() < 1e-3)
        })
        .collect();
    assert_eq!(by_adamw, [true, false, false, true, true]);
}

#[test]
fn muon_has_its_own_rate_and_a_scheduler_starts_anywhere() {
    let net = Net::new(&mut rng());
    let schedule = schedule(Shape::Linear, 5);
    let muon = config(MatrixOptimizer::Muon);
    let mut scheduler = muon.lr_scheduler(net.matrices(), &schedule, 0);
    let mut resumed = muon.lr_scheduler(net.matrices(), &schedule, 2);
    scheduler.step();
    scheduler.step();
    let mut loaded = muon.lr_scheduler(net.matrices(), &schedule, 0).load_record(scheduler.to_record());
    for rates in [scheduler.step(), resumed.step(), loaded.step()] {
        assert_eq!(rates.base(), LR * 0.5);
        assert_eq!(rates.lr_from_param(net.embedding.id, Some("embedding")), LR * 0.5);
        let matrix = rates.lr_from_param(net.tall.weight.id, Some("tall.weight"));
        assert_eq!(matrix, MUON_LR * 0.5);
    }
    let adamw = config(MatrixOptimizer::Adamw).lr_scheduler(net.matrices(), &schedule, 0).step();
    assert_eq!(adamw.lr_from_param(net.tall.weight.id, None), LR);
}

#[test]
fn a_loaded_record_goes_on_bit_for_bit() {
    for matrices in [MatrixOptimizer::Adamw, MatrixOptimizer::Muon] {
        let rng = &mut rng();
        let mut net = Net::new(rng);
        let (mut whole, lr, _) = optimizer(&net, matrices);
        for _ in 0..3 {
            let grads = net.grads(|shape| random(rng, shape));
            net = whole.step(lr.clone(), net, grads);
        }
        let bytes = whole.to_record().into_bytes().unwrap();
        let (fresh, ..) = optimizer(&net, matrices);
        let loaded = fresh.clone().load_record(OptimizerRecord::from_bytes(bytes).unwrap());
        let future: Vec<_> =
            (0..3).map(|_| net.grad_values(&net.grads(|shape| random(rng, shape)))).collect();
        let end = |mut optimizer: ModuleOptimizer| {
            let mut net = net.clone();
            for values in &future {
                let mut values = values.iter();
                let grads =
                    net.grads(|shape| TensorData::new(values.next().unwrap().clone(), shape.to_vec()));
                net = optimizer.step(lr.clone(), net, grads);
            }
            net.values().map(|values| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
        };
        let expected = end(whole);
        let without = end(fresh);
        for (i, found) in end(loaded).iter().enumerate() {
            assert_eq!(found, &expected[i]);
            assert_ne!(without[i], expected[i], "the state makes no difference");
        }
    }
}

#[derive(Module, Debug)]
struct Gain {
    gain: Param<Tensor<1>>,
}

impl Reparameterization for Gain {
    const NAME: &'static str = "gain";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        base * self.gain.val().reshape([1; D])
    }
}

struct AddGain(ParamId);

impl Reparameterizer for AddGain {
    type Reparam = Gain;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Gain>) {
        let gain = Param::from_data([2.0f32], &param.lazy_device());
        let gain = Gain { gain: Param::initialized(self.0, gain.val()) };
        (param, Some(gain))
    }
}

#[test]
fn a_clip_is_what_gradients_are_multiplied_by() {
    let rng = &mut rng();
    let net = Net::new(rng);
    let draws: [Vec<TensorData>; 2] = std::array::from_fn(|_| {
        [&[7, 4][..], &[4, 10], &[10, 4], &[10], &[4]].map(|shape| random(rng, shape)).to_vec()
    });
    for matrices in [MatrixOptimizer::Adamw, MatrixOptimizer::Muon] {
        // The second of two steps, since the first is the same for all factors but for epsilon.
        let stepped = |clip: f32, factor: f32| {
            let (mut optimizer, lr, handle) = optimizer(&net, matrices);
            let mut net = net.clone();
            for (draws, second) in draws.iter().zip([false, true]) {
                let factor = if second { factor } else { 1.0 };
                handle.clip.set(if second { clip } else { 1.0 });
                let mut draws = draws.iter();
                let grads = net.grads(|shape| {
                    let values = draws.next().unwrap().iter::<f32>().map(|g| g * factor).collect();
                    TensorData::new::<f32, _>(values, shape.to_vec())
                });
                net = optimizer.step(lr.clone(), net, grads);
            }
            net.values()
        };
        assert_eq!(stepped(0.3, 1.0), stepped(1.0, 0.3));
        assert_ne!(stepped(0.3, 1.0), stepped(1.0, 1.0));
    }
}

#[test]
fn nested_parameters_count_and_are_optimized_too() {
    let device = Device::default().autodiff();
    let id = ParamId::new();
    // Positive, so that the gain's gradient is far from 0 and from AdamW's epsilon.
    let weight: Vec<f32> = random(&mut rng(), &[3, 2]).iter::<f32>().map(|w| 0.1 + w.abs()).collect();
    let linear = Linear { weight: Param::from_data(TensorData::new(weight, [3, 2]), &device), bias: None };
    let linear = linear.apply_reparameterization(AddGain(id));
    let gain = |linear: &Linear| floats(linear.weight.reparameterization::<Gain>().unwrap().gain.val());
    let grads = linear.weight.val().sum().backward();
    let grads = GradientsParams::from_grads(grads, &linear);
    let base = floats(linear.weight.base());
    // d/dw sum(2 w) = 2, d/dgain = sum(w).
    let sum: f64 = base.iter().map(|&w| f64::from(w)).sum();
    let exact = (6.0 * 4.0 + sum * sum).sqrt();
    let (grads, norm) = global_norm(grads, &linear);
    assert!((norm / exact - 1.0).abs() < 1e-6, "{norm} instead of {exact}");

    // The weight is Muon's and decays, its gain is AdamW's and does not.
    let config = config(MatrixOptimizer::Muon);
    let matrices = ParamGroup::from_ids(vec![linear.weight.id]);
    let mut optimizer = config.init(matrices, ParamGroup::from_ids(vec![]), &OptimScheduleHandle::default());
    let linear = optimizer.step(LR, linear, grads);
    assert_close("gain", &gain(&linear), &[2.0 - LR], 1e-5);
}
