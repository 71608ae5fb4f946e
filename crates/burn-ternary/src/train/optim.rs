use serde::{Deserialize, Serialize};

/// Which optimizer has the matrices of quantized layers; everything else is AdamW's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MatrixOptimizer {
    Adamw,
    Muon,
}

/// The `[optim]` section of an experiment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimConfig {
    pub matrices: MatrixOptimizer,
    /// Peak learning rate of AdamW.
    pub lr: f64,
    /// Peak learning rate of Muon; ignored where `matrices = "adamw"`.
    pub muon_lr: f64,
    pub muon_momentum: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    /// Decoupled; on matrices only (never on norms, biases, scales).
    pub weight_decay: f64,
    /// Global gradient norm above which the gradient is scaled down; 0: never.
    pub clip_norm: f64,
    /// Weight of the mean squared log partition function in the loss (z-loss).
    pub z_loss: f64,
}
