//! The feed-forward block, plain or gated.

use super::{Activation, Family, QuantizedLinear, factory::LayerFactory, norm::RmsNorm};
use crate::ops::{gelu, silu_mul};
use burn::module::Module;
use burn::tensor::{
    Device, Tensor,
    activation::{relu, silu},
};
use rand::Rng;

/// `down(f(up(x)))`, or `down(f(gate(x)) * up(x))` if gated.
#[derive(Module, Debug)]
pub struct FeedForward {
    /// `[d_model, d_ff]`; `None` in the gpt2 family.
    pub gate: Option<QuantizedLinear>,
    /// `[d_model, d_ff]`
    pub up: QuantizedLinear,
    /// `[d_ff, d_model]`
    pub down: QuantizedLinear,
    /// Norm before the down projection, in the bitnet family.
    pub sub_norm: Option<RmsNorm>,
    #[module(skip)]
    activation: Activation,
}

impl FeedForward {
    pub(super) fn new(factory: &LayerFactory, rng: &mut impl Rng, device: &Device) -> Self {
        let config = factory.config;
        Self {
            gate: config.is_gated().then(|| factory.linear(config.d_model, config.d_ff).init(rng, device)),
            up: factory.linear(config.d_model, config.d_ff).init(rng, device),
            down: factory.residual_linear(config.d_ff, config.d_model).init(rng, device),
            sub_norm: (config.family == Family::Bitnet)
                .then(|| RmsNorm::new(config.d_ff, config.norm_eps, device)),
            activation: config.activation,
        }
    }

    /// `down(f(up(x)))`, or `down(f(gate(x)) * up(x))`.
    ///
    /// # Shapes
    /// `[batch, seq, d_model]` to the same
    pub fn forward(&self, input: Tensor<3>) -> Tensor<3> {
        let up = self.up.forward(input.clone());
        let hidden = match (&self.gate, self.activation) {
            (Some(gate), Activation::Swiglu) => silu_mul(gate.forward(input), up),
            (Some(gate), _) => self.activate(gate.forward(input)) * up,
            (None, _) => self.activate(up),
        };
        self.down.forward(match &self.sub_norm {
            Some(norm) => norm.forward(hidden),
            None => hidden,
        })
    }

    fn activate(&self, input: Tensor<3>) -> Tensor<3> {
        match self.activation {
            Activation::Gelu => gelu(input),
            Activation::Swiglu => silu(input),
            Activation::SquaredRelu => relu(input).square(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{FloatDType, TensorData};

    #[test]
    fn gelu_is_the_tanh_form_up_to_inputs_whose_cube_overflows() {
        let inputs: Vec<f32> =
            (-600..=600).map(|i| i as f32 / 100.0).chain([-3e4, -300.0, 300.0, 3e4]).collect();
        let device = crate::device::device("flex").unwrap();
        let input = Tensor::<3>::from_data(TensorData::new(inputs.clone(), [1, 1, inputs.len()]), &device);
        // Half of the last place of the type, a few times, since the steps between are of that type too.
        for (dtype, bound) in [(FloatDType::F32, 1e-6), (FloatDType::F16, 4e-3), (FloatDType::BF16, 3e-2)] {
            let input = input.clone().cast(dtype);
            let exact: Vec<f64> = input.clone().into_data().iter::<f64>().collect();
            let found: Vec<f64> = gelu(input).into_data().iter::<f64>().collect();
            for (x, found) in exact.iter().zip(found) {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                let expected = 0.5 * x * (1.0 + inner.tanh());
                assert!(
                    (found - expected).abs() <= bound * x.abs().max(1.0),
                    "{found} for {expected}: {dtype:?}"
                );
            }
        }
    }
}
