//! Loads a model file into Burn modules, to run or train it on any backend.

use crate::nn::{DuckConfig, DuckQuantized};
use crate::ops::SCALE_MIN;
use crate::quant::{Granularity, QuantConfig, ScaleRule, ScheduleHandle, Sparsity, TernaryQuantizerConfig};
use crate::tensor_name::tensor_name;
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor, TensorData};
use half::f16;
use std::path::Path;
use ternary_format::{Family, FormatError, ModelSpec, PackedModel};

/// Why a model file cannot be loaded into a module.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// Only some of the matrices are ternary.
    #[error(
        "tensor `{tensor}`: found {found}, expected all matrices of the blocks to be ternary, or none of them"
    )]
    Mixed {
        /// A matrix that is not ternary.
        tensor: String,
        /// Its encoding.
        found: ternary_format::Encoding,
    },
    /// A scale that the forward pass cannot represent.
    #[error("tensor `{tensor}`, row {row}: found a scale of {scale}, expected 0 or a normal f16 number")]
    Scale {
        /// The matrix.
        tensor: String,
        /// Its row.
        row: usize,
        /// The scale.
        scale: f32,
    },
    /// The configured shape is not that of the model to start from.
    #[error("model.{key}: found {found}, expected {expected} of the model to start from")]
    Shape {
        /// The key of `[model]`.
        key: &'static str,
        /// Its value.
        found: String,
        /// The values that fit the model.
        expected: String,
    },
    /// A scale rule that would recompute the scales of ternary weights.
    #[error(
        "the model to start from is ternary, and other scale rules would shrink its scales: expected quant.scale = \
         \"learned\" with quant.granularity = {granularity} and quant.sparsity = \"none\", or quant.enabled = false"
    )]
    Requantized {
        /// That of the file, as TOML.
        granularity: String,
    },
    /// The logits are NaN or infinite.
    #[error(
        "the teacher computes logits that are not finite (NaN or infinite): it is damaged, or its weights are too large"
    )]
    NotFinite,
    /// A prepared model in place of the plain one.
    #[error(
        "parameter `{path}` is reparameterized: expected the plain model, as before `prepare`, since the file stores the \
         ternary values"
    )]
    Prepared {
        /// Its parameter path.
        path: String,
    },
    /// A parameter of integers or booleans.
    #[error("parameter `{path}` has type {found}: expected floats, the type of the file")]
    NotFloat {
        /// Its parameter path.
        path: String,
        /// Its type.
        found: String,
    },
    /// A tensor of the file without a parameter.
    #[error(
        "tensor `{tensor}`: the model has no such parameter; expected the file of a model of the same type and sizes"
    )]
    Unused {
        /// Its name.
        tensor: String,
    },
    /// The file cannot be read, or its tensors do not fit its shape.
    #[error(transparent)]
    Format(#[from] FormatError),
}

impl DuckConfig {
    /// A model of this shape, initialized with the weights of `model`. [`DuckQuantized::from_packed`] takes the shape of the
    /// file.
    ///
    /// The matrices become latent weights. Learned scales are initialized from them, or from the scales of a ternary file.
    /// Parameters that the file lacks (the sub-norms of a bitnet that starts from a llama) are those of a new model. An untied
    /// head starts as the embedding, and new ids as the mean of the known rows. There may be fewer learned positions.
    ///
    /// # Errors
    /// `Shape`: the shape does not fit the file. `Requantized`: a rule that would change ternary weights. `Format`: an adapter
    /// that cannot be merged, or a weight that is not finite. `Format`, `Mixed`, `Scale`: see
    /// [`from_packed`](DuckQuantized::from_packed).
    pub fn init_from(
        &self,
        model: &PackedModel,
        quant: &QuantConfig,
        seed: u64,
        device: &Device,
    ) -> Result<DuckQuantized, ImportError> {
        model.validate()?;
        model.check_finite()?;
        let model = &*model.merged()?;
        self.check_start(&model.spec)?;
        if let Some(own) = granularity(model)?
            && quant.enabled
            && (quant.scale != ScaleRule::Learned
                || quant.granularity != own
                || quant.sparsity != Sparsity::None)
        {
            let granularity =
                toml::Value::try_from(own).map_or_else(|_| format!("{own:?}"), |own| own.to_string());
            return Err(ImportError::Requantized { granularity });
        }
        let mut fill = Fill { model, quant, path: Vec::new(), weight: None };
        Ok(self.init(quant, seed, device).map(&mut fill))
    }

    /// Checks that a model of this shape can start from one of `spec`.
    fn check_start(&self, spec: &ModelSpec) -> Result<(), ImportError> {
        let own = self.spec();
        let grows = own.family == Family::Bitnet && spec.family == Family::Llama;
        let gpt2 = own.family == Family::Gpt2;
        let number = |n: usize| n.to_string();
        for (holds, key, found, expected) in [
            (
                own.family == spec.family || grows,
                "family",
                format!("{:?}", own.family),
                format!("{:?}", spec.family),
            ),
            (
                own.vocab_size >= spec.vocab_size,
                "vocab_size",
                number(own.vocab_size),
                format!("at least the {}", spec.vocab_size),
            ),
            (
                !gpt2 || own.context <= spec.context,
                "context",
                number(own.context),
                format!("at most the {}", spec.context),
            ),
            (own.d_model == spec.d_model, "d_model", number(own.d_model), number(spec.d_model)),
            (own.n_layers == spec.n_layers, "n_layers", number(own.n_layers), number(spec.n_layers)),
            (own.n_heads == spec.n_heads, "n_heads", number(own.n_heads), number(spec.n_heads)),
            (
                own.n_kv_heads == spec.n_kv_heads,
                "n_kv_heads",
                number(own.n_kv_heads),
                number(spec.n_kv_heads),
            ),
            (own.d_ff == spec.d_ff, "d_ff", number(own.d_ff), number(spec.d_ff)),
            (
                own.activation == spec.activation,
                "activation",
                format!("{:?}", own.activation),
                format!("{:?}", spec.activation),
            ),
            (spec.tied || !own.tied, "tied", "true".into(), "false".into()),
            (own.norm_eps == spec.norm_eps, "norm_eps", own.norm_eps.to_string(), spec.norm_eps.to_string()),
            (
                gpt2 || own.rope_theta == spec.rope_theta,
                "rope_theta",
                own.rope_theta.to_string(),
                spec.rope_theta.to_string(),
            ),
        ] {
            if !holds {
                return Err(ImportError::Shape {
                    key,
                    found: found.to_lowercase(),
                    expected: format!("the {}", expected.to_lowercase().trim_start_matches("the ")),
                });
            }
        }
        Ok(())
    }
}

impl DuckQuantized {
    /// The model of a file, on `device`; see [`from_packed`](Self::from_packed).
    ///
    /// # Errors
    /// `Format`: the file cannot be read. Those of [`from_packed`](Self::from_packed).
    pub fn load(path: &Path, device: &Device) -> Result<Self, ImportError> {
        Self::from_packed(&ternary_format::read_model(path)?, device)
    }

    /// The model of a file in memory, on `device`: its forward pass is that of the exported module, bit for bit.
    ///
    /// A ternary matrix has more zeros than its latent weight had, so no rule can recompute its scales. They become the
    /// parameters of `scale = "learned"`, with which the forward pass computes the codes and scales of the file, and which can
    /// be trained. Tables become floats. A file does not store how activations were quantized in training; here they are
    /// float.
    ///
    /// # Errors
    /// `Format`: the tensors are not those of the spec. `Mixed`: only some of the matrices are ternary. `Scale`: a scale that
    /// the forward pass cannot represent.
    pub fn from_packed(model: &PackedModel, device: &Device) -> Result<Self, ImportError> {
        Self::from_packed_with(model, model.spec.vocab_size, device)
    }

    /// [`Self::from_packed`] with a larger vocabulary.
    pub(crate) fn from_packed_with(
        model: &PackedModel,
        vocab_size: usize,
        device: &Device,
    ) -> Result<Self, ImportError> {
        model.validate()?;
        let granularity = granularity(model)?;
        let quant = QuantConfig {
            enabled: granularity.is_some(),
            scale: ScaleRule::Learned,
            granularity: granularity.unwrap_or(Granularity::PerTensor),
            ..QuantConfig::default()
        };
        let config = DuckConfig { vocab_size, ..DuckConfig::from_spec(&model.spec) };
        let (base, adapter) = (model.clone().with_adapter(None), &model.adapter);
        let model = config.init_from(&base, &quant, 0, device)?;
        Ok(adapter.iter().fold(model, DuckQuantized::with_adapter))
    }
}

/// The coarsest granularity that represents all scales of a model; `None` for a float model.
fn granularity(model: &PackedModel) -> Result<Option<Granularity>, ImportError> {
    let is_matrix = |name: &str, shape: &[usize]| name.starts_with("blk.") && shape.len() == 2;
    let matrices = || model.tensors.iter().filter(|(name, tensor)| is_matrix(name, tensor.shape()));
    let (mut per_tensor, mut per_row, mut group) = (true, true, None);
    for (name, tensor) in matrices() {
        let Some(own_group) = tensor.ternary_group() else {
            continue;
        };
        let scales = scales(tensor);
        let groups_per_row = tensor.cols() / own_group;
        for (row, scales) in scales.chunks_exact(groups_per_row).enumerate() {
            let bad = scales.iter().map(|scale| scale.to_f32()).find(|scale| !is_scale(*scale));
            if let Some(scale) = bad {
                return Err(ImportError::Scale { tensor: name.clone(), row, scale });
            }
        }
        per_tensor &= scales.iter().all(|scale| *scale == scales[0]);
        per_row &= scales.chunks_exact(groups_per_row).all(|row| row.iter().all(|scale| *scale == row[0]));
        group = Some(group.map_or(own_group, |group| greatest_common_divisor(group, own_group)));
    }
    let float = matrices().find(|(_, tensor)| tensor.ternary_group().is_none());
    match (group, float) {
        (None, _) => Ok(None),
        (Some(_), Some((name, tensor))) => {
            Err(ImportError::Mixed { tensor: name.clone(), found: tensor.encoding() })
        }
        (Some(_), None) if per_tensor => Ok(Some(Granularity::PerTensor)),
        (Some(_), None) if per_row => Ok(Some(Granularity::PerChannel)),
        (Some(group), None) => Ok(Some(Granularity::PerGroup(group))),
    }
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// Whether the forward pass can represent a scale; of a negative one, the codes take the sign.
fn is_scale(scale: f32) -> bool {
    scale == 0.0 || (scale.abs() >= SCALE_MIN && scale.is_finite())
}

/// All scales of a ternary matrix, `[rows, cols / group]`.
fn scales(tensor: &ternary_format::Tensor) -> Vec<f16> {
    let group = tensor.ternary_group().expect("a ternary tensor");
    let groups_per_row = tensor.cols() / group;
    let mut codes = vec![0; tensor.cols()];
    let mut scales = vec![f16::ZERO; tensor.rows() * groups_per_row];
    for (row, scales) in scales.chunks_exact_mut(groups_per_row).enumerate() {
        tensor.read_ternary_row(row, &mut codes, scales);
    }
    scales
}

/// Replaces the values of all parameters with those of a model file.
struct Fill<'a> {
    model: &'a PackedModel,
    quant: &'a QuantConfig,
    path: Vec<String>,
    /// The matrix that was filled last, whose quantizer is visited next.
    weight: Option<Tensor<2>>,
}

impl ModuleMapper for Fill<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let path = self.path.join(".");
        let shape = param.dims();
        let tensor = |path: &str| self.model.tensors.get(&tensor_name(path));
        let values = if let Some(linear) = path.strip_suffix(".quantizer.scale") {
            let matrix = tensor(&format!("{linear}.weight")).expect("the matrix was filled");
            match (matrix.ternary_group(), self.weight.take()) {
                (None, Some(weight)) => {
                    let quantizer =
                        TernaryQuantizerConfig::new(self.quant, &ScheduleHandle::default()).init(&weight);
                    let scale = quantizer.scale.expect("the rule has a scale").val();
                    scale.into_data().iter::<f32>().collect()
                }
                _ => scale_parameter(matrix, [shape[0], shape[D - 1]]),
            }
        } else if path == "head" && self.model.spec.tied {
            rows(tensor("embedding").expect("models have an embedding"), shape[0])
        } else {
            match tensor(&path) {
                Some(tensor) if path.starts_with("transformer.") && D == 2 => transposed(tensor),
                Some(tensor) if D == 2 => rows(tensor, shape[0]),
                Some(tensor) => values(tensor),
                // A norm of this model that the file lacks.
                None => return param,
            }
        };
        let param = param.map(|old| {
            let trained = old.is_require_grad();
            Tensor::from_data(TensorData::new(values, shape), &old.device()).set_require_grad(trained)
        });
        if path.ends_with(".weight") && D == 2 {
            self.weight = Some(param.val().detach().reshape([shape[0], shape[D - 1]]));
        }
        param
    }
}

/// The first `count` rows of a table. Rows past its end are the mean of the known ones.
fn rows(tensor: &ternary_format::Tensor, count: usize) -> Vec<f32> {
    let (known, width) = (tensor.rows(), tensor.cols());
    let mut all = values(tensor);
    if count > known {
        let sum = |column: usize| all.iter().skip(column).step_by(width).map(|x| f64::from(*x)).sum::<f64>();
        let mean: Vec<f32> = (0..width).map(|column| (sum(column) / known as f64) as f32).collect();
        all.extend(mean.iter().cycle().take((count - known) * width));
    }
    all.truncate(count * width);
    all
}

/// The scales in the layout of a quantizer, `[groups, 1, channels]`.
fn scale_parameter(tensor: &ternary_format::Tensor, [groups, channels]: [usize; 2]) -> Vec<f32> {
    let scales = scales(tensor);
    let groups_per_row = scales.len() / tensor.rows();
    let scale =
        |group: usize, channel: usize| scales[channel * groups_per_row + group * groups_per_row / groups];
    let order = (0..groups).flat_map(|group| (0..channels).map(move |channel| (group, channel)));
    order.map(|(group, channel)| scale(group, channel).to_f32().abs()).collect()
}

/// The values, row by row.
pub(crate) fn values(tensor: &ternary_format::Tensor) -> Vec<f32> {
    let mut values = vec![0.0; tensor.rows() * tensor.cols()];
    for (row, values) in values.chunks_exact_mut(tensor.cols()).enumerate() {
        tensor.read_row(row, values);
    }
    values
}

/// `[out, in]` as Burn's `[d_input, d_output]`.
pub(crate) fn transposed(tensor: &ternary_format::Tensor) -> Vec<f32> {
    let [rows, cols] = [tensor.rows(), tensor.cols()];
    let values = values(tensor);
    (0..rows * cols).map(|i| values[i % rows * cols + i / rows]).collect()
}
