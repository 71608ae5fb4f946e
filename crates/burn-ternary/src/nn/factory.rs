//! Creates the layers of a model from its configuration.

use super::{
    DuckConfig, Family,
    init::INIT_STD,
    linear::QuantizedLinearConfig,
    norm::{MixedLayerNorm, Norm, RmsNorm},
};
use crate::quant::{QuantConfig, ScheduleHandle};
use burn::tensor::Device;

/// Settings shared by the layers of a model.
pub(super) struct LayerFactory<'a> {
    pub config: &'a DuckConfig,
    pub quant: &'a QuantConfig,
    pub schedule: &'a ScheduleHandle,
}

impl LayerFactory<'_> {
    /// The configuration of a linear layer.
    pub fn linear(&self, d_input: usize, d_output: usize) -> QuantizedLinearConfig {
        QuantizedLinearConfig {
            d_input,
            d_output,
            bias: self.config.family == Family::Gpt2,
            std: INIT_STD,
            mixed_precision: self.config.mixed_precision,
            quant: self.quant.clone(),
            schedule: self.schedule.clone(),
        }
    }

    /// A linear layer at the end of a residual branch. Its initial weights are divided by `sqrt(2 n_layers)`, as in GPT-2, since that
    /// many branches are added.
    pub fn residual_linear(&self, d_input: usize, d_output: usize) -> QuantizedLinearConfig {
        let std = INIT_STD / (2.0 * self.config.n_layers as f64).sqrt();
        QuantizedLinearConfig { std, ..self.linear(d_input, d_output) }
    }

    /// The norm of the family.
    pub fn norm(&self, device: &Device) -> Norm {
        let (d, eps) = (self.config.d_model, self.config.norm_eps);
        match self.config.family {
            Family::Gpt2 => Norm::Layer(MixedLayerNorm::new(d, eps, device)),
            Family::Llama | Family::Bitnet => Norm::Rms(RmsNorm::new(d, eps, device)),
        }
    }
}
