//! Makes anybody's Burn model ternary: installs a [`TernaryQuantizer`] on chosen parameters.

use super::{Dials, Estimator, Granularity, QuantConfig, Sparsity, TernaryQuantizer, TernaryQuantizerConfig};
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
    /// Float parameters of the whole module, in numbers: ternary weights among them.
    pub parameters: usize,
}

/// A matrix that is ternary now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreparedMatrix {
    /// Its parameter path, as in `blocks.0.hidden.weight`.
    pub path: String,
    /// `[d_input, d_output]`
    pub shape: [usize; 2],
}

impl PrepareReport {
    /// How many weights are ternary.
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

/// Why a model was not made ternary; it is left as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PrepareError {
    /// The closure accepted no parameter.
    #[error(
        "no parameter was chosen: expected the closure to accept at least one of {}",
        if matrices.is_empty() { "the model's matrices, but it has none".into() } else { matrices.join(", ") }
    )]
    NothingChosen {
        /// Parameters that could have been: all matrices.
        matrices: Vec<String>,
    },
    /// The closure accepted a parameter that is no matrix, such as a convolution kernel or a bias.
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
    /// A chosen parameter has a reparameterization already: that of an earlier `prepare`, or a LoRA adapter.
    #[error(
        "`{path}` is reparameterized already, as by an earlier `prepare` or a LoRA adapter: expected a plain parameter; \
         prepare a model once, or materialize it before"
    )]
    Reparameterized {
        /// Its parameter path.
        path: String,
    },
    /// Groups of weights, or runs of N:M sparsity, that do not divide the inputs of a chosen matrix.
    #[error("`{path}` has {inputs} inputs: expected a multiple of the {size} of quant.{key}")]
    Inputs {
        /// Its parameter path.
        path: String,
        /// Its first dimension, `d_input`.
        inputs: usize,
        /// The setting: `granularity` or `sparsity`.
        key: &'static str,
        /// The size that does not divide the inputs.
        size: usize,
    },
    /// A setting out of range, or one of a layer, which a parameter alone cannot have.
    #[error(transparent)]
    Setting(#[from] InvalidValue),
}

/// Every float parameter of a module, in its order.
#[derive(Default)]
struct Parameters {
    path: Vec<String>,
    /// Path, shape, and whether a reparameterization makes its value.
    found: Vec<(String, Vec<usize>, bool)>,
    /// How many reparameterizations the visit is inside of: their parameters are not the model's own.
    inside: usize,
}

/// What Burn calls the container of a reparameterization's own parameters.
pub(crate) const REPARAMETERIZATION: &str = "Reparameterization";

impl ModuleVisitor for Parameters {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        if container_type == REPARAMETERIZATION {
            self.inside += 1;
            // Its parameter was visited right before.
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
    chosen: BTreeSet<String>,
}

impl Reparameterizer for Prepare {
    type Reparam = TernaryReparameterization;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Self::Reparam>) {
        if !self.chosen.contains(path) {
            return (param, None);
        }
        let base = param.base().detach();
        let [d_input, d_output] = base.shape().dims();
        let quantizer = self.config.init(&base.reshape([d_input, d_output]));
        (param, Some(TernaryReparameterization { quantizer }))
    }
}

/// Makes the matrices of `model` that `chosen` accepts by parameter path ternary, and reports them; everything else
/// stays as it is.
///
/// Latent weights, optimizer and records work as before. [`Module::materialize`] turns the result into a plain model
/// that has the ternary values, and [`prepared`](crate::prepared) saves, loads and exports it.
///
/// `config` may set `scale`, `granularity`, `threshold`, `sparsity` and `estimator`. Its other settings belong to layers,
/// tables or the loss, which `prepare` does not change: they must have their default values.
///
/// # Errors
/// `NothingChosen`: the closure accepted no parameter. `NotAMatrix`: it accepted one that is no `[d_input, d_output]`
/// matrix, such as a convolution kernel, a bias or a norm. `Reparameterized`: it accepted one that `prepare` or LoRA has
/// changed before. `Inputs`: a group size that does not divide the inputs of a matrix. `Setting`: a value out of range,
/// or a setting that a parameter alone cannot have.
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
    mut chosen: impl FnMut(&str) -> bool,
) -> Result<(M, PrepareReport), PrepareError> {
    check(config)?;
    let mut parameters = Parameters::default();
    model.visit(&mut parameters);
    let count = |shape: &[usize]| shape.iter().product::<usize>();
    let total = parameters.found.iter().map(|(_, shape, _)| count(shape)).sum();
    let mut matrices = Vec::new();
    let mut others = Vec::new();
    for (path, shape, reparameterized) in parameters.found {
        if !chosen(&path) {
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
        return Err(PrepareError::NothingChosen { matrices: others });
    }
    let chosen = matrices.iter().map(|matrix| matrix.path.clone()).collect();
    let config = TernaryQuantizerConfig::new(config, &Dials::default());
    let model = model.apply_reparameterization(Prepare { config, chosen });
    Ok((model, PrepareReport { matrices, parameters: total }))
}

/// Settings that are not of a weight.
const NOT_OF_A_WEIGHT: [&str; 9] = [
    "enabled",
    "activations",
    "compute",
    "dead_bias",
    "input_norm",
    "embedding",
    "head",
    "quantization_penalty",
    "scale_penalty",
];

/// Whether a quantizer without a layer can have these settings.
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
            (false, "identity, as annealed weights need a schedule, which `prepare` has not")
        }
    };
    require(holds, "quant.estimator", estimator, expected)?;
    let table = |config| toml::Table::try_from(config).expect("settings are numbers and names");
    let (found, off) = (table(config), table(&QuantConfig::default()));
    NOT_OF_A_WEIGHT.into_iter().try_for_each(|key| {
        let expected = format!("{}, as `prepare` changes parameters and no layer", off[key]);
        require(found[key] == off[key], &format!("quant.{key}"), &found[key], expected)
    })
}

/// Whether the sizes in a configuration divide the inputs of a matrix.
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
