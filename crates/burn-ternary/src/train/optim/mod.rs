//! The optimizers of a run, by parameter group.

mod adamw;
mod moment;
mod muon;

use adamw::AdamW;
use burn::{
    lr_scheduler::module_lr_scheduler::ModuleLrScheduler,
    module::ParamGroup,
    optim::{LearningRate, ModuleOptimizer},
};

use super::schedule::{PeakSchedule, Schedule};
use crate::quant::ScheduledValue;
use getset::WithSetters;
use muon::Muon;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Optimizer of the weight matrices of the blocks; AdamW has all other parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MatrixOptimizer {
    /// AdamW for all parameters.
    Adamw,
    /// Muon for the matrices.
    Muon,
}

/// Precision of the two moments of AdamW.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Moments {
    /// 8 bytes per weight.
    Float,
    /// 2 bytes per weight, in blocks with scales of their own, for parameters of at least 4096 numbers; on flex only.
    Int8,
}

/// The `[optim]` section of an experiment: optimizers and loss terms.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema, WithSetters)]
#[serde(default, deny_unknown_fields)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct OptimConfig {
    /// Optimizer of the weight matrices of the blocks; AdamW has all other parameters.
    pub matrix_optimizer: MatrixOptimizer,
    /// Peak learning rate of AdamW.
    pub lr: f64,
    /// Peak learning rate of Muon; ignored if `matrix_optimizer` is `"adamw"`.
    pub muon_lr: f64,
    /// Momentum of Muon; at least 0, below 1.
    pub muon_momentum: f64,
    /// Decay rate of AdamW's first moment; at least 0, below 1.
    pub beta1: f64,
    /// Decay rate of AdamW's second moment; at least 0, below 1.
    pub beta2: f64,
    /// Epsilon of AdamW, added to the square root of the second moment; above 0.
    pub epsilon: f64,
    /// Precision of AdamW's moments. `"int8"` stores 2 bytes per weight instead of 8; it requires the device flex.
    pub moments: Moments,
    /// Decoupled weight decay of the matrices. Norms, biases and scales have none.
    pub weight_decay: f64,
    /// Maximum norm of the whole gradient (gradient clipping); 0: no limit.
    pub clip_norm: f64,
    /// Weight in the loss of the mean squared log partition function (z-loss); 0: off.
    pub z_loss: f64,
}

impl Default for OptimConfig {
    /// Muon for the matrices, AdamW for the rest.
    fn default() -> Self {
        Self {
            matrix_optimizer: MatrixOptimizer::Muon,
            lr: 0.003,
            muon_lr: 0.02,
            muon_momentum: 0.95,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            moments: Moments::Float,
            weight_decay: 0.1,
            clip_norm: 1.0,
            z_loss: 0.0,
        }
    }
}

impl OptimConfig {
    /// AdamW for all parameters, with weight decay for the group `decayed`, and for the group `matrices` the
    /// optimizer of [`OptimConfig::matrix_optimizer`] with weight decay; where both groups match, `matrices` wins.
    ///
    /// A weight loses `lr * weight_decay * decay.get()` of itself at each step, before its update (decoupled); `lr`
    /// is that of its group. Setting the factor changes no optimizer state, so a record fits before and after.
    ///
    /// Groups match by parameter id or path. A path predicate is a substring and also finds what is nested in a
    /// reparameterized parameter (its scales), and `ParamGroup::fuse` forgets exclusions: prefer ids.
    ///
    /// # Panics
    /// At the first step, if Muon has a parameter in `matrices` that is not a matrix, or moments at eight bits are not on
    /// flex (a run refuses them before).
    ///
    /// # Source
    /// Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2 (AdamW).
    pub fn init(
        &self,
        matrices: ParamGroup,
        decayed: ParamGroup,
        handle: &OptimScheduleHandle,
    ) -> ModuleOptimizer {
        let OptimScheduleHandle { decay, clip } = handle.clone();
        let adamw = AdamW {
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            epsilon: self.epsilon as f32,
            moments: self.moments,
            decay: Decay { strength: 0.0, factor: decay.clone() },
            clip: clip.clone(),
        };
        let decay = Decay { strength: self.weight_decay, factor: decay };
        let decayed_adamw = AdamW { decay: decay.clone(), ..adamw.clone() };
        let optimizer = ModuleOptimizer::from(adamw).with_group(decayed, decayed_adamw.clone(), None);
        match self.matrix_optimizer {
            MatrixOptimizer::Adamw => optimizer.with_group(matrices, decayed_adamw, None),
            MatrixOptimizer::Muon => {
                let muon = Muon { momentum: self.muon_momentum as f32, decay, clip };
                optimizer.with_group(matrices, muon, None)
            }
        }
    }

    /// The learning rates that belong to [`OptimConfig::init`], from `step` on: `lr` as the base, and `muon_lr` for
    /// `matrices` where Muon has them; both follow the same schedule.
    pub fn lr_scheduler(&self, matrices: ParamGroup, schedule: &Schedule, step: usize) -> ModuleLrScheduler {
        let with_peak = |peak| PeakSchedule { peak, schedule: schedule.clone(), step };
        let base = ModuleLrScheduler::new(with_peak(self.lr));
        match self.matrix_optimizer {
            MatrixOptimizer::Adamw => base,
            MatrixOptimizer::Muon => base.with_group(matrices, with_peak(self.muon_lr)),
        }
    }
}

/// What the training loop turns in an optimizer; clones share it.
#[derive(Clone, Debug, Default)]
pub struct OptimScheduleHandle {
    /// The strength of weight decay, as a share of the experiment's.
    pub decay: ScheduledValue,
    /// What gradients are multiplied by, which clips them without another pass over memory.
    pub clip: ScheduledValue,
}

/// Decoupled weight decay, times the factor of the schedule.
#[derive(Clone)]
pub(super) struct Decay {
    strength: f64,
    factor: ScheduledValue,
}

impl Decay {
    /// What is left of a weight after a step.
    pub(super) fn keep(&self, lr: LearningRate) -> f64 {
        1.0 - lr * self.strength * f64::from(self.factor.get())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::train::gradients::global_norm;
    use crate::train::schedule::{ScheduleConfig, Shape};
    use burn::{
        Tensor,
        lr_scheduler::module_lr_scheduler::ModuleLearningRate,
        module::{Module, Param, ParamId, Reparameterization, Reparameterizer},
        nn::Linear,
        optim::{GradientsParams, OptimizerRecord},
        tensor::{Device, TensorData},
    };
    use rand::{Rng, SeedableRng, rngs::StdRng};
    use rand_distr::StandardNormal;

    const LR: f64 = 0.02;
    const MUON_LR: f64 = 0.05;

    #[derive(Module, Debug)]
    pub(in crate::train) struct Net {
        embedding: Param<Tensor<2>>,
        wide: Linear,
        tall: Linear,
    }

    impl Net {
        pub(in crate::train) fn new(rng: &mut StdRng) -> Self {
            let device = Device::default().autodiff();
            let linear = |rng: &mut StdRng, d_in, d_out| Linear {
                weight: Param::from_data(random(rng, &[d_in, d_out]), &device),
                bias: Some(Param::from_data(random(rng, &[d_out]), &device)),
            };
            Self {
                embedding: Param::from_data(random(rng, &[7, 4]), &device),
                wide: linear(rng, 4, 10),
                tall: linear(rng, 10, 4),
            }
        }

        fn matrices(&self) -> ParamGroup {
            ParamGroup::from_ids(vec![self.wide.weight.id, self.tall.weight.id])
        }

        fn decayed(&self) -> ParamGroup {
            ParamGroup::from_ids(vec![self.embedding.id])
        }

        /// Embedding, weights and biases, in this order.
        pub(in crate::train) fn values(&self) -> [Vec<f32>; 5] {
            [
                floats(self.embedding.val()),
                floats(self.wide.weight.val()),
                floats(self.tall.weight.val()),
                floats(self.wide.bias.as_ref().unwrap().val()),
                floats(self.tall.bias.as_ref().unwrap().val()),
            ]
        }

        /// Gradients by the given function of the shape, in the order of `values`.
        pub(in crate::train) fn grads(
            &self,
            mut grad: impl FnMut(&[usize]) -> TensorData,
        ) -> GradientsParams {
            let mut grads = GradientsParams::new();
            put(&mut grads, &self.embedding, &mut grad);
            put(&mut grads, &self.wide.weight, &mut grad);
            put(&mut grads, &self.tall.weight, &mut grad);
            put(&mut grads, self.wide.bias.as_ref().unwrap(), &mut grad);
            put(&mut grads, self.tall.bias.as_ref().unwrap(), &mut grad);
            grads
        }

        pub(in crate::train) fn grad_values(&self, grads: &GradientsParams) -> [Vec<f32>; 5] {
            let bias = |linear: &Linear| floats(grads.get::<1>(linear.bias.as_ref().unwrap().id).unwrap());
            [
                floats(grads.get::<2>(self.embedding.id).unwrap()),
                floats(grads.get::<2>(self.wide.weight.id).unwrap()),
                floats(grads.get::<2>(self.tall.weight.id).unwrap()),
                bias(&self.wide),
                bias(&self.tall),
            ]
        }
    }

    fn put<const D: usize>(
        grads: &mut GradientsParams,
        param: &Param<Tensor<D>>,
        grad: &mut impl FnMut(&[usize]) -> TensorData,
    ) {
        let data = grad(&param.val().dims());
        grads.register(param.id, Tensor::<D>::from_data(data, &Device::default()));
    }

    /// A generator with a new seed each run, which a failing test prints.
    pub(in crate::train) fn rng() -> StdRng {
        let seed = rand::random();
        println!("seed {seed}");
        StdRng::seed_from_u64(seed)
    }

    pub(in crate::train) fn random(rng: &mut StdRng, shape: &[usize]) -> TensorData {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.sample(StandardNormal)).collect();
        TensorData::new(values, shape.to_vec())
    }

    pub(in crate::train) fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_to_vec().unwrap()
    }

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

    pub(in crate::train) fn assert_close(name: &str, found: &[f32], expected: &[f64], tolerance: f64) {
        assert_eq!(found.len(), expected.len());
        for (i, (&a, b)) in found.iter().zip(expected).enumerate() {
            let error = (f64::from(a) - b).abs();
            assert!(error <= tolerance, "{name}[{i}]: {a} instead of {b}");
        }
    }

    /// AdamW as its paper has it, in float64.
    struct ReferenceAdamW {
        weights: Vec<f64>,
        first: Vec<f64>,
        second: Vec<f64>,
        time: i32,
    }

    impl ReferenceAdamW {
        fn new(weights: &[f32]) -> Self {
            let zeros = vec![0.0; weights.len()];
            let weights = weights.iter().map(|&w| w.into()).collect();
            Self { weights, first: zeros.clone(), second: zeros, time: 0 }
        }

        fn step(&mut self, grads: &[f32], lr: f64, weight_decay: f64) {
            let (beta1, beta2): (f64, f64) = (0.9, 0.95);
            self.time += 1;
            for (i, &grad) in grads.iter().enumerate() {
                let grad = f64::from(grad);
                self.first[i] = beta1 * self.first[i] + (1.0 - beta1) * grad;
                self.second[i] = beta2 * self.second[i] + (1.0 - beta2) * grad * grad;
                let first = self.first[i] / (1.0 - beta1.powi(self.time));
                let second = self.second[i] / (1.0 - beta2.powi(self.time));
                let decay = lr * weight_decay * self.weights[i];
                self.weights[i] -= decay + lr * first / (second.sqrt() + 1e-8);
            }
        }
    }

    /// Row-major float64 matrix.
    #[derive(Clone)]
    struct Matrix {
        rows: usize,
        cols: usize,
        values: Vec<f64>,
    }

    impl Matrix {
        fn from_fn(rows: usize, cols: usize, f: impl Fn(usize, usize) -> f64) -> Self {
            let values = (0..rows * cols).map(|i| f(i / cols, i % cols)).collect();
            Self { rows, cols, values }
        }

        fn new(rows: usize, cols: usize, values: &[f32]) -> Self {
            Self::from_fn(rows, cols, |i, j| values[i * cols + j].into())
        }

        fn at(&self, i: usize, j: usize) -> f64 {
            self.values[i * self.cols + j]
        }

        fn transposed(&self) -> Self {
            Self::from_fn(self.cols, self.rows, |i, j| self.at(j, i))
        }

        fn times(&self, other: &Self) -> Self {
            Self::from_fn(self.rows, other.cols, |i, j| {
                (0..self.cols).map(|k| self.at(i, k) * other.at(k, j)).sum()
            })
        }

        /// `a * self + b * other`.
        fn mixed(&self, a: f64, other: &Self, b: f64) -> Self {
            Self::from_fn(self.rows, self.cols, |i, j| a * self.at(i, j) + b * other.at(i, j))
        }
    }

    /// Keller Jordan's Muon on `weight: [d_out, d_in]`, in float64, as `muon.py` has it.
    struct ReferenceMuon {
        weight: Matrix,
        momentum: Matrix,
    }

    impl ReferenceMuon {
        fn new(weight: Matrix) -> Self {
            let momentum = weight.mixed(0.0, &weight, 0.0);
            Self { weight, momentum }
        }

        fn step(&mut self, grad: &Matrix, lr: f64, weight_decay: f64) {
            self.momentum = self.momentum.mixed(0.95, grad, 0.05);
            let mut x = grad.mixed(0.05, &self.momentum, 0.95);
            let tall = x.rows > x.cols;
            if tall {
                x = x.transposed();
            }
            let norm = x.values.iter().map(|v| v * v).sum::<f64>().sqrt();
            x = x.mixed(1.0 / (norm + 1e-7), &x, 0.0);
            for _ in 0..5 {
                let a = x.times(&x.transposed());
                let b = a.mixed(-4.7750, &a.times(&a), 2.0315);
                x = x.mixed(3.4445, &b.times(&x), 1.0);
            }
            if tall {
                x = x.transposed();
            }
            let aspect = (x.rows as f64 / x.cols as f64).max(1.0).sqrt();
            self.weight = self.weight.mixed(1.0 - lr * weight_decay, &x, -lr * aspect);
        }
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
        let linear =
            Linear { weight: Param::from_data(TensorData::new(weight, [3, 2]), &device), bias: None };
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
        let mut optimizer =
            config.init(matrices, ParamGroup::from_ids(vec![]), &OptimScheduleHandle::default());
        let linear = optimizer.step(LR, linear, grads);
        assert_close("gain", &gain(&linear), &[2.0 - LR], 1e-5);
    }
}
