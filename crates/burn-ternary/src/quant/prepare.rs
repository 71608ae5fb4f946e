//! Makes any Burn model ternary: installs a [`TernaryQuantizer`] on selected parameters.

use super::{
    Estimator, Granularity, QuantConfig, ScheduleHandle, Sparsity, TernaryQuantizer, TernaryQuantizerConfig,
};
use crate::invalid_value::{InvalidValue, require};
use burn::module::{Module, ModuleVisitor, Param, Reparameterization, Reparameterizer};
use burn::tensor::Tensor;
use std::{collections::BTreeSet, fmt};

/// A quantizer that Burn applies whenever the parameter's value is read.
#[derive(Module, Debug)]
pub struct TernaryReparameterization {
    /// Quantizes the latent weight.
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

/// What [`prepare`] made ternary; prints as a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrepareReport {
    /// The ternary matrices, in the order of the module.
    pub matrices: Vec<PreparedMatrix>,
    /// Number of float parameters of the whole module, including the ternary weights.
    pub parameters: usize,
}

/// A matrix that [`prepare`] made ternary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreparedMatrix {
    /// Its parameter path, as in `blocks.0.hidden.weight`.
    pub path: String,
    /// `[d_input, d_output]`
    pub shape: [usize; 2],
}

impl PrepareReport {
    /// Number of ternary weights.
    pub fn weights(&self) -> usize {
        self.matrices.iter().map(|matrix| matrix.shape.iter().product::<usize>()).sum()
    }
}

impl fmt::Display for PrepareReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, weights) = (self.matrices.len(), self.weights());
        let matrices = if count == 1 { "matrix" } else { "matrices" };
        write!(f, "{count} ternary {matrices}, {weights} of {} parameters:", self.parameters)?;
        self.matrices.iter().enumerate().try_for_each(|(i, PreparedMatrix { path, shape })| {
            write!(f, "{} {path} {shape:?}", if i == 0 { "" } else { "," })
        })
    }
}

/// Why [`prepare`] refused a model, which is unchanged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PrepareError {
    /// The closure selected no parameter.
    #[error(
        "no parameter was selected: expected the closure to accept at least one of {}",
        if matrices.is_empty() { "the model's matrices, but it has none".into() } else { matrices.join(", ") }
    )]
    NothingSelected {
        /// The parameters that it could select: all matrices.
        matrices: Vec<String>,
    },
    /// The closure selected a parameter that is not a matrix, such as a convolution kernel or a bias.
    #[error(
        "`{path}` has the shape {shape:?}: expected a matrix [d_input, d_output], as only matrices become ternary; let \
         the closure reject it"
    )]
    NotAMatrix {
        /// Its parameter path.
        path: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A selected parameter already has a reparameterization, of an earlier `prepare` or a LoRA adapter.
    #[error(
        "`{path}` is already reparameterized, by an earlier `prepare` or a LoRA adapter: expected a plain parameter; \
         prepare a model once, or materialize it first"
    )]
    Reparameterized {
        /// Its parameter path.
        path: String,
    },
    /// A group size, or the M of N:M sparsity, does not divide the inputs of a selected matrix.
    #[error("`{path}` has {inputs} inputs: expected a multiple of the {size} of quant.{key}")]
    Inputs {
        /// Its parameter path.
        path: String,
        /// Its first dimension, `d_input`.
        inputs: usize,
        /// The key: `granularity` or `sparsity`.
        key: &'static str,
        /// The size that does not divide the inputs.
        size: usize,
    },
    /// A setting out of range, or a setting of layers, which `prepare` cannot apply to a parameter.
    #[error(transparent)]
    Setting(#[from] InvalidValue),
}

/// Collects the float parameters of a module, in its order.
#[derive(Default)]
struct Parameters {
    path: Vec<String>,
    /// Path, shape, and whether it has a reparameterization.
    found: Vec<(String, Vec<usize>, bool)>,
    /// Depth of reparameterizations around the visit: their parameters are not those of the model.
    inside: usize,
}

/// Burn's container type for the parameters of a reparameterization.
pub(crate) const REPARAMETERIZATION: &str = "Reparameterization";

impl ModuleVisitor for Parameters {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        if container_type == REPARAMETERIZATION {
            self.inside += 1;
            // Burn visits the parameter right before its reparameterization.
            self.found.last_mut().into_iter().for_each(|(_, _, reparameterized)| *reparameterized = true);
        }
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, container_type: &str) {
        self.inside -= usize::from(container_type == REPARAMETERIZATION);
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.inside == 0 {
            self.found.push((self.path.join("."), param.lazy_shape().to_vec(), false));
        }
    }
}

struct Prepare {
    config: TernaryQuantizerConfig,
    selected: BTreeSet<String>,
}

impl Reparameterizer for Prepare {
    type Reparam = TernaryReparameterization;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Self::Reparam>) {
        if !self.selected.contains(path) {
            return (param, None);
        }
        let base = param.base().detach();
        let [d_input, d_output] = base.shape().dims();
        let quantizer = self.config.init(&base.reshape([d_input, d_output]));
        (param, Some(TernaryReparameterization { quantizer }))
    }
}

/// Makes the matrices of `model` whose parameter paths `select` accepts ternary, and reports them. Other parameters stay as
/// they are.
///
/// Latent weights, optimizers and records work as before. [`Module::materialize`] returns a plain model with the ternary
/// values, and [`prepared`](crate::prepared) saves, loads and exports it.
///
/// `config` may set `scale`, `granularity`, `threshold`, `sparsity` and `estimator`. Its other settings belong to layers,
/// tables or the loss, which `prepare` does not change: they must have their default values.
///
/// # Errors
/// `NothingSelected`: the closure accepted no parameter. `NotAMatrix`: it accepted one that is not a `[d_input, d_output]`
/// matrix, such as a convolution kernel, a bias or a norm. `Reparameterized`: it accepted one that already has a quantizer or
/// a LoRA adapter. `Inputs`: a group size does not divide the inputs of a matrix. `Setting`: a value out of range, or a
/// setting of layers.
///
/// # Example
/// ```
/// # use burn_ternary::quant::{PrepareError, QuantConfig, prepare};
/// # use burn::nn::LinearConfig;
/// # use burn::tensor::Device;
/// let linear = LinearConfig::new(8, 4).init(&Device::default());
/// let (linear, report) = prepare(linear, &QuantConfig::default(), |path| path.ends_with("weight"))?;
/// assert_eq!(report.to_string(), "1 ternary matrix, 32 of 36 parameters: weight [8, 4]");
/// let weight = linear.weight.val().into_data().try_to_vec::<f32>().unwrap();
/// assert!(weight.iter().any(|w| *w == 0.0));
/// # Ok::<(), PrepareError>(())
/// ```
pub fn prepare<M: Module>(
    model: M,
    config: &QuantConfig,
    mut select: impl FnMut(&str) -> bool,
) -> Result<(M, PrepareReport), PrepareError> {
    check(config)?;
    let mut parameters = Parameters::default();
    model.visit(&mut parameters);
    let count = |shape: &[usize]| shape.iter().product::<usize>();
    let total = parameters.found.iter().map(|(_, shape, _)| count(shape)).sum();
    let mut matrices = Vec::new();
    let mut others = Vec::new();
    for (path, shape, reparameterized) in parameters.found {
        if !select(&path) {
            others.extend((shape.len() == 2).then_some(path));
            continue;
        }
        let Ok(shape) = <[usize; 2]>::try_from(&shape[..]) else {
            return Err(PrepareError::NotAMatrix { path, shape });
        };
        if reparameterized {
            return Err(PrepareError::Reparameterized { path });
        }
        check_inputs(config, &path, shape[0])?;
        matrices.push(PreparedMatrix { path, shape });
    }
    if matrices.is_empty() {
        return Err(PrepareError::NothingSelected { matrices: others });
    }
    let selected = matrices.iter().map(|matrix| matrix.path.clone()).collect();
    let config = TernaryQuantizerConfig::new(config, &ScheduleHandle::default());
    let model = model.apply_reparameterization(Prepare { config, selected });
    Ok((model, PrepareReport { matrices, parameters: total }))
}

/// Settings of layers, tables and the loss, which `prepare` does not change.
const LAYER_SETTINGS: [&str; 9] = [
    "enabled",
    "activations",
    "matmul_precision",
    "dead_bias",
    "input_norm",
    "embedding",
    "head",
    "quantization_penalty",
    "scale_penalty",
];

/// Checks the settings of a quantizer without a layer.
fn check(config: &QuantConfig) -> Result<(), InvalidValue> {
    let QuantConfig { scale, threshold, sparsity, estimator, .. } = *config;
    require(threshold > 0.0 && threshold < 1.0, "quant.threshold", threshold, "above 0 and below 1")?;
    let (holds, expected) = match sparsity {
        Sparsity::None => (true, ""),
        Sparsity::ZeroFraction(share) => (share > 0.0 && share < 1.0, "a zero_fraction above 0 and below 1"),
        Sparsity::NOfM([n, m]) => (0 < n && n < m, "n_of_m = [N, M] with 0 < N < M"),
    };
    require(holds, "quant.sparsity", sparsity, expected)?;
    let clips = scale.rule().clip().is_some() && sparsity == Sparsity::None;
    let (holds, expected) = match estimator {
        Estimator::Identity => (true, ""),
        Estimator::Masked => (clips, "identity, as only the scales learned and seq have a clipping range"),
        Estimator::Annealed => {
            (false, "identity, as annealed weights need a schedule, which `prepare` does not have")
        }
    };
    require(holds, "quant.estimator", estimator, expected)?;
    let table = |config| toml::Table::try_from(config).expect("settings are numbers and names");
    let (found, off) = (table(config), table(&QuantConfig::default()));
    LAYER_SETTINGS.into_iter().try_for_each(|key| {
        let expected = format!("{}, as `prepare` changes parameters only", off[key]);
        require(found[key] == off[key], &format!("quant.{key}"), &found[key], expected)
    })
}

/// Checks that the group sizes divide the inputs of a matrix.
fn check_inputs(config: &QuantConfig, path: &str, inputs: usize) -> Result<(), PrepareError> {
    let group = match config.granularity {
        Granularity::PerGroup(size) => Some(("granularity", size)),
        Granularity::PerTensor | Granularity::PerChannel => None,
    };
    let run = match config.sparsity {
        Sparsity::NOfM([_, size]) => Some(("sparsity", size)),
        Sparsity::None | Sparsity::ZeroFraction(_) => None,
    };
    for (key, size) in [group, run].into_iter().flatten() {
        if size == 0 || !inputs.is_multiple_of(size) {
            return Err(PrepareError::Inputs { path: path.into(), inputs, key, size });
        }
    }
    Ok(())
}
