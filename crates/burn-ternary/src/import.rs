//! A model file back into Burn modules, to run or train it on any of their backends.

use crate::export::tensor_name;
use crate::nn::{DuckConfig, DuckQuantized};
use crate::ops::SCALE_MIN;
use crate::quant::{Granularity, QuantConfig, ScaleRule};
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor, TensorData};
use half::f16;
use std::path::Path;
use ternary_format::{FormatError, PackedModel};

/// Why a model file cannot become a module.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    #[error("tensor `{tensor}`: found {found}, expected all matrices of the blocks to be ternary, or none")]
    Mixed { tensor: String, found: ternary_format::Encoding },
    #[error("tensor `{tensor}`, row {row}: found a scale of {scale}, expected 0 or a normal f16 number")]
    Scale { tensor: String, row: usize, scale: f32 },
    #[error(transparent)]
    Format(#[from] FormatError),
}

impl DuckQuantized {
    /// The model of a file, on `device`; see [`from_packed`](Self::from_packed).
    ///
    /// # Errors
    /// As [`from_packed`](Self::from_packed), and whatever makes the file unreadable.
    pub fn load(path: &Path, device: &Device) -> Result<Self, ImportError> {
        Self::from_packed(&ternary_format::read_model(path)?, device)
    }

    /// The model of a container, on `device`: its forward pass is that of the exported module, bit for bit.
    ///
    /// A ternary matrix has more zeros than its latent weight had, so no rule finds its scales again: they become
    /// the parameters of `scale = "learned"`, from which the forward pass takes codes and scales as the file has
    /// them, and which may be trained on. Tables become the floats that they stand for. A file does not say how
    /// activations were quantized in training; here they are float.
    ///
    /// # Errors
    /// `Format`: tensors that are not those of the spec. `Mixed`: matrices of which only some are ternary. `Scale`: a
    /// scale that the forward pass cannot have.
    pub fn from_packed(model: &PackedModel, device: &Device) -> Result<Self, ImportError> {
        model.validate()?;
        let granularity = granularity(model)?;
        let quant = QuantConfig {
            enabled: granularity.is_some(),
            scale: ScaleRule::Learned,
            granularity: granularity.unwrap_or(Granularity::PerTensor),
            ..QuantConfig::default()
        };
        let mut fill = Fill { model, path: Vec::new() };
        Ok(DuckConfig::from_spec(&model.spec).init(&quant, 0, device).map(&mut fill))
    }
}

/// The coarsest granularity that has all scales of a model; `None` for a float model.
fn granularity(model: &PackedModel) -> Result<Option<Granularity>, ImportError> {
    let is_matrix = |name: &str, shape: &[usize]| name.starts_with("blk.") && shape.len() == 2;
    let matrices = || model.tensors.iter().filter(|(name, tensor)| is_matrix(name, tensor.shape()));
    let (mut a_tensor, mut a_row, mut group) = (true, true, None);
    for (name, tensor) in matrices() {
        let Some(own_group) = tensor.ternary_group() else {
            continue;
        };
        let scales = scales(tensor);
        let a_row_has = tensor.cols() / own_group;
        for (row, scales) in scales.chunks_exact(a_row_has).enumerate() {
            let bad = scales.iter().map(|scale| scale.to_f32()).find(|scale| !is_scale(*scale));
            if let Some(scale) = bad {
                return Err(ImportError::Scale { tensor: name.clone(), row, scale });
            }
        }
        a_tensor &= scales.iter().all(|scale| *scale == scales[0]);
        a_row &= scales.chunks_exact(a_row_has).all(|row| row.iter().all(|scale| *scale == row[0]));
        group = Some(group.map_or(own_group, |group| divisor(group, own_group)));
    }
    let float = matrices().find(|(_, tensor)| tensor.ternary_group().is_none());
    match (group, float) {
        (None, _) => Ok(None),
        (Some(_), Some((name, tensor))) => {
            Err(ImportError::Mixed { tensor: name.clone(), found: tensor.encoding() })
        }
        (Some(_), None) if a_tensor => Ok(Some(Granularity::PerTensor)),
        (Some(_), None) if a_row => Ok(Some(Granularity::PerChannel)),
        (Some(group), None) => Ok(Some(Granularity::PerGroup(group))),
    }
}

/// The greatest number that divides both.
fn divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { divisor(b, a % b) }
}

/// Of a negative scale the codes take the sign.
fn is_scale(scale: f32) -> bool {
    scale == 0.0 || (scale.abs() >= SCALE_MIN && scale.is_finite())
}

/// All scales of a ternary matrix, `[rows, cols / group]`.
fn scales(tensor: &ternary_format::Tensor) -> Vec<f16> {
    let group = tensor.ternary_group().expect("a ternary tensor");
    let a_row_has = tensor.cols() / group;
    let mut codes = vec![0; tensor.cols()];
    let mut scales = vec![f16::ZERO; tensor.rows() * a_row_has];
    for (row, scales) in scales.chunks_exact_mut(a_row_has).enumerate() {
        tensor.read_ternary_row(row, &mut codes, scales);
    }
    scales
}

/// Puts the values of a model file in the place of every parameter.
struct Fill<'a> {
    model: &'a PackedModel,
    path: Vec<String>,
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
        let tensor = |path: &str| &self.model.tensors[&tensor_name(path)];
        let values = match path.strip_suffix(".quantizer.scale") {
            Some(linear) => {
                let tensor = tensor(&format!("{linear}.weight"));
                scale_parameter(tensor, [shape[0], shape[D - 1]])
            }
            None if path.starts_with("transformer.") && D == 2 => transposed(tensor(&path)),
            None => values(tensor(&path)),
        };
        param.map(|old| Tensor::from_data(TensorData::new(values, shape), &old.device()))
    }
}

/// The scales as a quantizer has them, `[groups, 1, channels]`.
fn scale_parameter(tensor: &ternary_format::Tensor, [groups, channels]: [usize; 2]) -> Vec<f32> {
    let scales = scales(tensor);
    let a_row_has = scales.len() / tensor.rows();
    let scale = |group: usize, channel: usize| scales[channel * a_row_has + group * a_row_has / groups];
    let order = (0..groups).flat_map(|group| (0..channels).map(move |channel| (group, channel)));
    order.map(|(group, channel)| scale(group, channel).to_f32().abs()).collect()
}

/// The values, row by row.
fn values(tensor: &ternary_format::Tensor) -> Vec<f32> {
    let mut values = vec![0.0; tensor.rows() * tensor.cols()];
    for (row, values) in values.chunks_exact_mut(tensor.cols()).enumerate() {
        tensor.read_row(row, values);
    }
    values
}

/// `[out, in]` as Burn's `[d_input, d_output]`.
fn transposed(tensor: &ternary_format::Tensor) -> Vec<f32> {
    let [rows, cols] = [tensor.rows(), tensor.cols()];
    let values = values(tensor);
    (0..rows * cols).map(|i| values[i % rows * cols + i / rows]).collect()
}
