//! Files of your own models: what [`prepare`](crate::quant::prepare) made ternary, packed into two bits per weight.
//!
//! | purpose | call | runs in |
//! |---|---|---|
//! | store a prepared model of any architecture | [`save`], [`load`] | Burn, on any backend |
//! | export one with the architecture of gpt2, llama or bitnet | [`export`] | `ternary-infer`, llama.cpp and others |
//! | continue training | Burn's records (`Module::save_file`) | Burn; they contain the latent weights |
//!
//! The engine runs three [families](crate::format::Family) only: a model with convolutions, recurrence, other norms or
//! another attention runs in Burn. There a loaded model computes in float with the ternary values: packing makes the file
//! small, not the forward pass fast.
//!
//! # Example
//! ```
//! use burn::nn::{Linear, LinearConfig};
//! use burn::{prelude::*, tensor::activation::relu};
//! use burn_ternary::{prepared, quant::{QuantConfig, prepare}};
//!
//! #[derive(Module, Debug)]
//! struct Net {
//!     hidden: Linear,
//!     output: Linear,
//! }
//!
//! impl Net {
//!     fn new(device: &Device) -> Self {
//!         let (hidden, output) = (LinearConfig::new(8, 64), LinearConfig::new(64, 2));
//!         Self { hidden: hidden.init(device), output: output.init(device) }
//!     }
//!
//!     fn forward(&self, input: Tensor<2>) -> Tensor<2> {
//!         self.output.forward(relu(self.hidden.forward(input)))
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("net.safetensors");
//! let device = Device::default();
//! let (net, report) = prepare(Net::new(&device), &QuantConfig::default(), |path| path == "hidden.weight")?;
//! println!("{report}"); // 1 ternary matrix, 512 of 706 parameters: hidden.weight [8, 64]
//! // ... train it ...
//! prepared::save(&net, &path)?;
//!
//! let loaded = prepared::load(Net::new(&device), &path)?;
//! let input = Tensor::ones([1, 8], &device);
//! assert_eq!(loaded.forward(input.clone()).into_data(), net.forward(input).into_data());
//! # Ok(())
//! # }
//! ```

use crate::export::host;
use crate::import::{transposed, values};
use crate::quant::{REPARAMETERIZATION, TernaryReparameterization};
use crate::{ExportError, ImportError};
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, Reparameterization};
use burn::tensor::{Bool, DType, FloatDType, Int, Tensor, TensorData};
use half::f16;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use ternary_format::{Encoding, Family, FormatError, ModelSpec, PackedModel, tensors};

/// Which components of a query or key a rotary embedding rotates together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RotaryPairs {
    /// `2i` and `2i + 1`, as Burn's [`RotaryEncoding`](burn::nn::RotaryEncoding).
    Interleaved,
    /// `i` and `i + head_dim / 2`, as Hugging Face's llama and [`nn::Rotary`](crate::nn::Rotary).
    Halves,
}

/// Writes a model to a safetensors file: prepared matrices as 2-bit codes and f16 scales, everything else unchanged. LoRA
/// adapters are merged.
///
/// [`format::tensors`](crate::format::tensors) describes the file.
///
/// # Errors
/// `TwoScales`: matrices prepared with the scale `ttq`. `NotFloat`: a parameter of integers, booleans, f64 or quantized
/// values. `NotTernary`: a prepared matrix whose latent weights are not f32. `Format`: the file cannot be written.
pub fn save<M: Module>(model: &M, path: impl AsRef<Path>) -> Result<(), ExportError> {
    let parameters = collect(model)?;
    let packed = parameters.into_iter().map(|(name, parameter)| {
        let tensor = match (&parameter.shape[..], parameter.ternary) {
            (&[inputs, outputs], true) => pack(&name, inputs, outputs, &parameter.values)?,
            _ => parameter.float(&name)?,
        };
        Ok((name, tensor))
    });
    Ok(tensors::write(&packed.collect::<Result<_, ExportError>>()?, path.as_ref())?)
}

/// Loads a file that [`save`] wrote: the outputs of the model are those of the saved one, bit for bit.
///
/// `model` is the plain one, as before `prepare`, on the device where it will run. Its parameters become the values that the
/// forward pass multiplied. The file has no latent weights: to continue training, keep a record of the prepared model. The
/// result is plain: saved or exported again, its matrices are floats with the same values.
///
/// # Errors
/// `Prepared`: the model is reparameterized. `Unused`: a tensor without a parameter. `NotFloat`: a parameter of integers or
/// booleans. `Format`: the file cannot be read, or a tensor is missing or has another shape.
pub fn load<M: Module>(model: M, path: impl AsRef<Path>) -> Result<M, ImportError> {
    let mut fill = Fill { tensors: tensors::read(path.as_ref())?, path: Vec::new(), error: None };
    let mut check = Collect::default();
    model.visit(&mut check);
    if let Some(path) = check.reparameterized.into_iter().next() {
        return Err(ImportError::Prepared { path });
    }
    let model = model.map(&mut fill);
    if let Some(error) = fill.error {
        return Err(error);
    }
    match fill.tensors.into_keys().next() {
        Some(tensor) => Err(ImportError::Unused { tensor }),
        None => Ok(model),
    }
}

/// Converts a model of your own to one that the engine runs: a [`PackedModel`], for
/// [`write_model`](crate::format::write_model) and `Engine::from_model`.
///
/// The model must have the architecture of `spec`: the norms, positions, attention and feed-forward block of the family, in
/// its order. `name` returns the name of a parameter path in model files; [`PackedModel`] lists the names. A
/// `[d_input, d_output]` matrix, as of Burn's `Linear`, is transposed; the tables `token_embd.weight` and
/// `position_embd.weight` are `[rows, d_model]`, as of Burn's `Embedding`. `pairs` is the convention of its rotary
/// embedding (ignored for gpt2). The result has no tokenizer: set its field.
///
/// # Errors
/// `Unnamed`: a parameter without a name, which the engine would ignore. Those of [`save`]. `Format`: sizes that do not fit
/// together, or tensors that are missing, unknown to the family, named twice or of another shape.
///
/// # Example
/// ```no_run
/// # use burn::module::Module;
/// # use burn_ternary::format::{ModelSpec, Tokenizer, WriteOptions, write_model};
/// # use burn_ternary::prepared::{self, RotaryPairs};
/// # fn ship<M: Module>(model: &M, spec: &ModelSpec, tokenizer: Tokenizer) -> Result<(), Box<dyn std::error::Error>> {
/// let names = [
///     ("embedding.", "token_embd."), ("blocks.", "blk."), ("norm.gamma", "output_norm.weight"), ("head.", "output."),
///     // ... and the parts of a block
/// ];
/// let packed = prepared::export(model, spec, RotaryPairs::Interleaved, |path| {
///     Some(names.iter().fold(path.to_string(), |path, (ours, theirs)| path.replace(ours, theirs)))
/// })?;
/// let packed = packed.with_name("mine".into()).with_tokenizer(Some(tokenizer));
/// write_model(&packed, "mine.gguf".as_ref(), &WriteOptions::default())?;
/// # Ok(())
/// # }
/// ```
pub fn export<M: Module>(
    model: &M,
    spec: &ModelSpec,
    pairs: RotaryPairs,
    mut name: impl FnMut(&str) -> Option<String>,
) -> Result<PackedModel, ExportError> {
    spec.validate()?;
    let mut tensors = BTreeMap::new();
    for (path, parameter) in collect(model)? {
        let Some(name) = name(&path) else {
            return Err(ExportError::Unnamed { path });
        };
        let is_table = ["token_embd.weight", "position_embd.weight"].contains(&name.as_str());
        let tensor = match parameter.shape[..] {
            [inputs, outputs] if !is_table && parameter.ternary => {
                pack(&path, inputs, outputs, &parameter.values)?
            }
            [inputs, outputs] if !is_table => {
                let values = transpose(inputs, outputs, &parameter.values);
                ternary_format::Tensor::f32(&[outputs, inputs], &values)?
            }
            ref shape => ternary_format::Tensor::f32(shape, &parameter.values)?,
        };
        if tensors.insert(name.clone(), tensor).is_some() {
            return Err(FormatError::DuplicateTensor { tensor: name }.into());
        }
    }
    let mut packed = PackedModel::new("model", spec.clone(), tensors);
    packed.validate()?;
    if pairs == RotaryPairs::Interleaved && spec.family != Family::Gpt2 {
        let is_rotated = |name: &str| name.ends_with(".attn_q.weight") || name.ends_with(".attn_k.weight");
        for (_, tensor) in packed.tensors.iter_mut().filter(|(name, _)| is_rotated(name)) {
            *tensor = tensor.half_rotation(spec.head_dim());
        }
    }
    Ok(packed)
}

/// A parameter with the values that the forward pass multiplies.
struct Parameter {
    shape: Vec<usize>,
    dtype: DType,
    values: Vec<f32>,
    /// Whether `prepare` made it ternary.
    ternary: bool,
}

impl Parameter {
    /// The parameter as a tensor of its own type.
    fn float(&self, path: &str) -> Result<ternary_format::Tensor, FormatError> {
        let tensor = match self.dtype {
            DType::F16 => {
                let halves: Vec<f16> = self.values.iter().map(|value| f16::from_f32(*value)).collect();
                ternary_format::Tensor::f16(&self.shape, &halves)
            }
            // The upper half of an f32 is a bf16.
            DType::BF16 => {
                let bytes =
                    self.values.iter().flat_map(|value| ((value.to_bits() >> 16) as u16).to_le_bytes());
                ternary_format::Tensor::new(self.shape.clone(), Encoding::Bf16, bytes.collect::<Vec<u8>>())
            }
            _ => ternary_format::Tensor::f32(&self.shape, &self.values),
        };
        tensor.map_err(|error| error.in_tensor(path))
    }
}

/// The parameters of a model by path, with reparameterizations applied.
fn collect<M: Module>(model: &M) -> Result<BTreeMap<String, Parameter>, ExportError> {
    let mut own = Collect::default();
    model.visit(&mut own);
    if own.two_scales {
        return Err(ExportError::TwoScales);
    }
    let mut folded = Collect { values: true, ..Collect::default() };
    model.valid().materialize().visit(&mut folded);
    if let Some((path, found)) = folded.other {
        return Err(ExportError::NotFloat { path, found });
    }
    folded.parameters.iter_mut().for_each(|(path, parameter)| parameter.ternary = own.ternary.contains(path));
    Ok(folded.parameters)
}

/// Visits every parameter of a model.
#[derive(Default)]
struct Collect {
    path: Vec<String>,
    /// Whether to read the values.
    values: bool,
    parameters: BTreeMap<String, Parameter>,
    /// Paths of parameters whose value a reparameterization makes, and of those that are ternary.
    reparameterized: BTreeSet<String>,
    ternary: BTreeSet<String>,
    two_scales: bool,
    /// The first parameter that no file holds, and what it is.
    other: Option<(String, String)>,
}

impl Collect {
    fn note_other(&mut self, found: String) {
        let path = self.path.join(".");
        self.other.get_or_insert((path, found));
    }
}

impl ModuleVisitor for Collect {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        if container_type == REPARAMETERIZATION {
            let path = self.path.join(".");
            if name == TernaryReparameterization::NAME {
                self.ternary.insert(path.clone());
            }
            self.reparameterized.insert(path);
        }
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.join(".");
        if !self.values {
            // Scales of a prepared parameter, `[groups, 2, channels]` where there are two.
            let inside = self.ternary.iter().any(|matrix| path.starts_with(&format!("{matrix}.")));
            self.two_scales |= inside && param.lazy_shape().to_vec().get(1) == Some(&2);
            return;
        }
        let value = param.val();
        let (shape, dtype) = (value.dims().to_vec(), value.dtype());
        if !matches!(dtype, DType::F32 | DType::Flex32 | DType::F16 | DType::BF16) {
            return self.note_other(format!("{dtype:?}").to_lowercase());
        }
        self.parameters.insert(path, Parameter { shape, dtype, values: host(value), ternary: false });
    }

    fn visit_int<const D: usize>(&mut self, _param: &Param<Tensor<D, Int>>) {
        self.note_other("integers".into());
    }

    fn visit_bool<const D: usize>(&mut self, _param: &Param<Tensor<D, Bool>>) {
        self.note_other("booleans".into());
    }
}

/// `[inputs, outputs]` as `[outputs, inputs]`.
fn transpose(inputs: usize, outputs: usize, values: &[f32]) -> Vec<f32> {
    (0..inputs * outputs).map(|i| values[i % inputs * outputs + i / inputs]).collect()
}

/// Codes and scales of a prepared matrix `[inputs, outputs]`, as `[outputs, inputs]`.
///
/// The values are a scale times -1, 0 or +1, so the scale is the common magnitude of the weights of a group. The file gets the
/// coarsest groups that share one, which are at least as wide as those of the quantizer.
fn pack(
    path: &str,
    inputs: usize,
    outputs: usize,
    values: &[f32],
) -> Result<ternary_format::Tensor, ExportError> {
    let values = transpose(inputs, outputs, values);
    let scale = |weights: &[f32]| weights.iter().fold(0f32, |most, weight| most.max(weight.abs()));
    let is_ternary = |weights: &[f32]| {
        let scale = scale(weights);
        scale.is_finite()
            && f16::from_f32(scale).to_f32() == scale
            && weights.iter().all(|w| *w == 0.0 || w.abs() == scale)
    };
    let group = (1..=inputs).find_map(|parts| {
        let group = inputs.is_multiple_of(parts).then_some(inputs / parts)?;
        values.chunks_exact(group).all(is_ternary).then_some(group)
    });
    let group = group.ok_or_else(|| ExportError::NotTernary { path: path.into() })?;
    let tensor = ternary_format::Tensor::ternary(outputs, inputs, group, |row, codes, scales| {
        let row = &values[row * inputs..(row + 1) * inputs];
        // Comparisons, because `signum` of zero is not zero.
        codes.iter_mut().zip(row).for_each(|(code, w)| *code = i8::from(*w > 0.0) - i8::from(*w < 0.0));
        scales.iter_mut().zip(row.chunks_exact(group)).for_each(|(to, w)| *to = f16::from_f32(scale(w)));
    });
    Ok(tensor.map_err(|error| error.in_tensor(path))?)
}

/// Replaces parameters with the tensors of their paths, and removes the used tensors.
struct Fill {
    tensors: BTreeMap<String, ternary_format::Tensor>,
    path: Vec<String>,
    error: Option<ImportError>,
}

impl ModuleMapper for Fill {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let path = self.path.join(".");
        let Some(tensor) = self.tensors.remove(&path) else {
            self.error.get_or_insert(FormatError::MissingTensor { tensor: path }.into());
            return param;
        };
        let expected = param.lazy_shape().to_vec();
        let is_ternary = tensor.encoding().is_ternary();
        let mut found = tensor.shape().to_vec();
        if is_ternary {
            found.reverse();
        }
        if found != expected {
            let error = FormatError::WrongShape { expected, found }.in_tensor(&path);
            self.error.get_or_insert(error.into());
            return param;
        }
        let dtype = match tensor.encoding() {
            Encoding::F16 => FloatDType::F16,
            Encoding::Bf16 => FloatDType::BF16,
            _ => FloatDType::F32,
        };
        let values = if is_ternary { transposed(&tensor) } else { values(&tensor) };
        param.map(|old| {
            let value =
                Tensor::from_data(TensorData::new(values, expected), (&old.device(), DType::from(dtype)));
            value.set_require_grad(old.is_require_grad())
        })
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        let (path, found) = (self.path.join("."), "integers".into());
        self.error.get_or_insert(ImportError::NotFloat { path, found });
        param
    }

    fn map_bool<const D: usize>(&mut self, param: Param<Tensor<D, Bool>>) -> Param<Tensor<D, Bool>> {
        let (path, found) = (self.path.join("."), "booleans".into());
        self.error.get_or_insert(ImportError::NotFloat { path, found });
        param
    }
}
