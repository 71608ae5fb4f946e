//! AdamW as one op, with moments in f32 or at 8 bits.

use super::moment::Moment;
use super::schedule_handle::Decay;
use crate::ops::{AdamWStep, adamw, adamw_int8, int8_moments};
use crate::quant::ScheduledValue;
use burn::optim::{LearningRate, Optimizer, RecordState, StateSink, StateSource, join_path};
use burn::tensor::{Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Smallest parameter with 8-bit moments, in elements. Those of smaller ones would save next to nothing, and have scales of few
/// elements.
const MIN_INT8_LEN: usize = 4096;

/// Precision of the two moments of AdamW.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Moments {
    /// 8 bytes per weight.
    Float,
    /// 2 bytes per weight, in blocks with scales of their own, for parameters of at least 4096 numbers; on flex only.
    Int8,
}

/// AdamW as a Burn optimizer: the state and the hyperparameters of a group. A step is the op [`adamw`] or [`adamw_int8`].
#[derive(Clone)]
pub(super) struct AdamW {
    pub beta1: f32,
    pub beta2: f32,
    pub epsilon: f32,
    pub moments: Moments,
    pub decay: Decay,
    pub clip: ScheduledValue,
}

/// Leaves of a record, named as in Burn's AdamW.
const MOMENTUM: &str = "momentum";
const FLOAT_TIME: &str = "time";
const FLOAT_MOMENTS: [&str; 2] = ["moment_1", "moment_2"];
/// Leaves of a record with 8-bit moments, which Burn's AdamW lacks.
const INT8_TIME: &str = "int8_time";
const INT8_MOMENTS: &str = "int8_moments";

/// Steps so far, and the moments of a parameter.
#[derive(Clone)]
pub(super) struct State<const D: usize> {
    time: usize,
    moments: MomentTensors<D>,
}

/// The moments of a parameter. Boxing them would save nothing: there is one value per parameter, and its data is on the heap.
#[derive(Clone)]
#[expect(clippy::large_enum_variant)]
enum MomentTensors<const D: usize> {
    Float([Moment<D>; 2]),
    /// Both in one tensor, in the layout of [`adamw_int8`].
    Int8(Moment<1>),
}

impl Optimizer for AdamW {
    type State<const D: usize> = State<D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<State<D>>,
    ) -> (Tensor<D>, Option<State<D>>) {
        let State { time, moments } = state.unwrap_or_else(|| self.initial_state(&grad));
        let time = time + 1;
        let step = self.step_parameters(lr, time);
        let (tensor, moments) = match moments {
            MomentTensors::Float(moments) => {
                let (tensor, moments) = adamw(tensor, grad, moments.map(Moment::into_tensor), step);
                (tensor, MomentTensors::Float(moments.map(Moment::from)))
            }
            MomentTensors::Int8(moments) => {
                let (tensor, moments) = adamw_int8(tensor, grad, moments.into_tensor(), step);
                (tensor, MomentTensors::Int8(moments.into()))
            }
        };
        (tensor, Some(State { time, moments }))
    }

    fn to_device<const D: usize>(State { time, moments }: State<D>, device: &Device) -> State<D> {
        let moments = match moments {
            MomentTensors::Float(moments) => {
                MomentTensors::Float(moments.map(|moment| moment.placed(device)))
            }
            MomentTensors::Int8(moments) => MomentTensors::Int8(moments.placed(device)),
        };
        State { time, moments }
    }
}

impl AdamW {
    /// The state before the first step: moments of zero.
    fn initial_state<const D: usize>(&self, grad: &Tensor<D>) -> State<D> {
        let moments = match self.moments {
            Moments::Int8 if grad.shape().num_elements() >= MIN_INT8_LEN => {
                MomentTensors::Int8(int8_moments(grad).into())
            }
            _ => MomentTensors::Float([grad.zeros_like(), grad.zeros_like()].map(Moment::from)),
        };
        State { time: 0, moments }
    }

    /// Parameters of step `time`, from 1 on.
    fn step_parameters(&self, lr: LearningRate, time: usize) -> AdamWStep {
        let Self { beta1, beta2, epsilon, .. } = *self;
        AdamWStep {
            lr: lr as f32,
            beta1,
            beta2,
            epsilon,
            keep: self.decay.keep(lr) as f32,
            corrections: [beta1, beta2].map(|beta| (1.0 - f64::from(beta).powi(time as i32)) as f32),
            grad_factor: self.clip.get(),
        }
    }
}

/// Float and 8-bit moments have leaves of different names.
impl<const D: usize> RecordState for State<D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        match &self.moments {
            MomentTensors::Float(moments) => {
                let prefix = join_path(prefix, MOMENTUM);
                out.push_scalar(&prefix, FLOAT_TIME, self.time.into());
                for (moment, leaf) in moments.iter().zip(FLOAT_MOMENTS) {
                    moment.flatten(&prefix, leaf, out);
                }
            }
            MomentTensors::Int8(moments) => {
                out.push_scalar(prefix, INT8_TIME, self.time.into());
                moments.flatten(prefix, INT8_MOMENTS, out);
            }
        }
    }

    fn state_unflatten(prefix: &str, src: &mut StateSource, _default: &Device) -> Option<Self> {
        if let Some(moments) = Moment::unflatten(prefix, INT8_MOMENTS, src) {
            let time = src.take_scalar(prefix, INT8_TIME)?.try_into().ok()?;
            return Some(Self { time, moments: MomentTensors::Int8(moments) });
        }
        let prefix = join_path(prefix, MOMENTUM);
        let time = src.take_scalar(&prefix, FLOAT_TIME)?.try_into().ok()?;
        let [first, second] = FLOAT_MOMENTS.map(|leaf| Moment::unflatten(&prefix, leaf, src));
        Some(Self { time, moments: MomentTensors::Float([first?, second?]) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::optim::{MatrixOptimizer, OptimConfig, OptimScheduleHandle};
    use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
    use burn::module::ParamGroup;
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord};
    use burn::tensor::Distribution;

    fn device() -> Device {
        crate::device::device("flex").expect("these moments are flex's")
    }

    fn optimizer(moments: Moments) -> ModuleOptimizer {
        let config = OptimConfig {
            matrix_optimizer: MatrixOptimizer::Adamw,
            lr: 0.01,
            muon_lr: 0.0,
            muon_momentum: 0.0,
            beta1: 0.9,
            beta2: 0.99,
            epsilon: 1e-8,
            moments,
            weight_decay: 0.1,
            clip_norm: 0.0,
            z_loss: 0.0,
        };
        config.init(
            ParamGroup::from_ids(vec![]),
            ParamGroup::from_ids(vec![]),
            &OptimScheduleHandle::default(),
        )
    }

    /// Its weight has 5270 numbers, its bias 85.
    fn layer() -> Linear {
        LinearConfig::new(62, 85).init(&device().autodiff())
    }

    fn step(optimizer: &mut ModuleOptimizer, layer: Linear, grads: &[Tensor<2>; 2]) -> Linear {
        let [weight, bias] = grads.clone();
        let mut grads = GradientsParams::new();
        grads.register(layer.weight.id, weight);
        grads.register(layer.bias.as_ref().expect("it has one").id, bias.reshape([85]));
        optimizer.step(ModuleLearningRate::from(0.01), layer, grads)
    }

    fn random_grads() -> [Tensor<2>; 2] {
        [[62, 85], [1, 85]].map(|shape| Tensor::random(shape, Distribution::Normal(0.0, 1.0), &device()))
    }

    fn bits(layer: &Linear) -> Vec<u32> {
        let bias = layer.bias.as_ref().expect("it has one").val().into_data();
        let weight = layer.weight.val().into_data();
        weight.iter::<f32>().chain(bias.iter::<f32>()).map(f32::to_bits).collect()
    }

    #[test]
    fn bytes_step_as_floats_do_but_for_the_rounding_of_moments() {
        let start = layer();
        let grads: Vec<_> = (0..20).map(|_| random_grads()).collect();
        let [bytes, floats] = [Moments::Int8, Moments::Float].map(|moments| {
            let mut optimizer = optimizer(moments);
            let mut layer = start.clone();
            let mut way = vec![];
            for grads in &grads {
                layer = step(&mut optimizer, layer, grads);
                way.push(bits(&layer));
            }
            way
        });
        // The first step has no moments to round, and a bias never has.
        assert_eq!(bytes[0], floats[0]);
        assert_eq!(bytes[19][5270..], floats[19][5270..]);
        assert_ne!(bytes[19][..5270], floats[19][..5270]);
        let start = bits(&start);
        let moved = |way: &[u32], i: usize| f32::from_bits(way[i]) - f32::from_bits(start[i]);
        let errors = (0..5270).map(|i| (moved(&bytes[19], i) - moved(&floats[19], i)).powi(2)).sum::<f32>();
        let whole = (0..5270).map(|i| moved(&floats[19], i).powi(2)).sum::<f32>();
        assert!(errors < 0.05f32.powi(2) * whole, "off by {} of the way", (errors / whole).sqrt());
    }

    #[test]
    fn an_int8_record_is_small_and_continues_bit_for_bit() {
        let mut whole = optimizer(Moments::Int8);
        let mut at = layer();
        for _ in 0..3 {
            at = step(&mut whole, at, &random_grads());
        }
        let record = whole.to_record().into_bytes().expect("it is written");
        // Two bytes per weight and eight per block; eight bytes per bias; names, numbers, padding.
        let size = 21 * (512 + 8) + 85 * 8;
        assert!((size..size + 4096).contains(&record.len()), "{} bytes", record.len());
        let record = OptimizerRecord::from_bytes(record).expect("it is read");
        let mut loaded = optimizer(Moments::Int8).load_record(record);
        let mut fresh = optimizer(Moments::Int8);
        let grads = random_grads();
        let [whole, loaded, fresh] =
            [&mut whole, &mut loaded, &mut fresh].map(|optimizer| bits(&step(optimizer, at.clone(), &grads)));
        assert_eq!(loaded, whole);
        assert_ne!(fresh, whole, "the state makes no difference");
    }
}
