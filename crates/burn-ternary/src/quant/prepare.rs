//! Makes anybody's Burn model ternary: installs a [`TernaryQuantizer`] on chosen parameters.

use super::{Dials, QuantConfig, TernaryQuantizer, TernaryQuantizerConfig};
use burn::module::{Module, Param, Reparameterization, Reparameterizer};
use burn::tensor::Tensor;

/// A quantizer that Burn applies whenever the parameter's value is read.
#[derive(Module, Debug)]
pub struct TernaryReparameterization {
    pub quantizer: TernaryQuantizer,
}

impl Reparameterization for TernaryReparameterization {
    const NAME: &'static str = "ternary";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let shape = base.shape();
        let [d_input, d_output] = shape.dims();
        self.quantizer.fake_quantize(base.reshape([d_input, d_output])).reshape(shape)
    }
}

struct Prepare<F> {
    config: TernaryQuantizerConfig,
    chosen: F,
}

impl<F: FnMut(&str) -> bool> Reparameterizer for Prepare<F> {
    type Reparam = TernaryReparameterization;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Self::Reparam>) {
        if D != 2 || !(self.chosen)(path) {
            return (param, None);
        }
        let base = param.base().detach();
        let [d_input, d_output] = base.shape().dims();
        let quantizer = self.config.init(&base.reshape([d_input, d_output]));
        (param, Some(TernaryReparameterization { quantizer }))
    }
}

/// Makes the matrices of `model` that `chosen` accepts by parameter path ternary; everything else stays as it is.
///
/// Latent weights, optimizer and records work as before; `Module::materialize` turns the result into a plain model
/// that holds the ternary values. Parameters that are not `[d_input, d_output]` matrices are never chosen.
///
/// # Example
/// ```
/// # use burn_ternary::quant::{QuantConfig, prepare};
/// # use burn::nn::LinearConfig;
/// # use burn::tensor::Device;
/// let linear = LinearConfig::new(8, 4).init(&Device::default());
/// let ternary = prepare(linear, &QuantConfig::default(), |path| path.ends_with("weight"));
/// let weight = ternary.weight.val().into_data().try_to_vec::<f32>().unwrap();
/// assert!(weight.iter().any(|w| *w == 0.0));
/// ```
pub fn prepare<M: Module>(model: M, config: &QuantConfig, chosen: impl FnMut(&str) -> bool) -> M {
    let config = TernaryQuantizerConfig::new(config, &Dials::default());
    model.apply_reparameterization(Prepare { config, chosen })
}
