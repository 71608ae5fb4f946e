//! Muon as one op.

use super::moment::Moment;
use super::schedule_handle::Decay;
use crate::ops::{MuonStep, muon};
use crate::quant::ScheduledValue;
use burn::optim::{LearningRate, Optimizer, RecordState, StateSink, StateSource, join_path};
use burn::tensor::{Device, Tensor};

/// Muon for weights of shape `[d_in, d_out]`, as Burn's layers hold them: its rate is multiplied by
/// `sqrt(max(1, d_out / d_in))`. Orthogonalization commutes with the transpose, so that the update is that of the
/// original, whose weights are `[d_out, d_in]`.
///
/// # Source
/// Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
#[derive(Clone)]
pub(super) struct Muon {
    pub momentum: f32,
    pub decay: Decay,
    pub clip: ScheduledValue,
}

#[derive(Clone)]
pub(super) struct State<const D: usize> {
    velocity: Moment<D>,
}

impl Optimizer for Muon {
    type State<const D: usize> = State<D>;

    /// # Panics
    /// If `tensor` is no matrix.
    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<State<D>>,
    ) -> (Tensor<D>, Option<State<D>>) {
        assert_eq!(D, 2, "Muon is for matrices");
        let dims = tensor.dims();
        let aspect = dims[1] as f64 / dims[0] as f64;
        let step = MuonStep {
            rate: (lr * aspect.max(1.0).sqrt()) as f32,
            keep: self.decay.keep(lr) as f32,
            momentum: self.momentum,
            grad_factor: self.clip.get(),
        };
        let velocity = state.map_or_else(|| grad.zeros_like(), |state| state.velocity.into_tensor());
        let (tensor, velocity) = muon(tensor, grad, velocity, step);
        (tensor, Some(State { velocity: velocity.into() }))
    }

    fn to_device<const D: usize>(state: State<D>, device: &Device) -> State<D> {
        State { velocity: state.velocity.placed(device) }
    }
}

/// Leaves of a record, named as in Burn's Muon.
const MOMENTUM: &str = "momentum";
const VELOCITY: &str = "velocity";

impl<const D: usize> RecordState for State<D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        self.velocity.flatten(&join_path(prefix, MOMENTUM), VELOCITY, out);
    }

    fn state_unflatten(prefix: &str, src: &mut StateSource, _default: &Device) -> Option<Self> {
        Some(Self { velocity: Moment::unflatten(&join_path(prefix, MOMENTUM), VELOCITY, src)? })
    }
}
