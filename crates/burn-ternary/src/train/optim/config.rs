//! [`OptimConfig`]: the `[optim]` section of an experiment, and the optimizers of its parameter groups.

use super::adamw::{AdamW, Moments};
use super::muon::Muon;
use super::schedule_handle::{Decay, OptimScheduleHandle};
use crate::train::schedule::{PeakSchedule, Schedule};
use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::module::ParamGroup;
use burn::optim::ModuleOptimizer;
use getset::WithSetters;
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
