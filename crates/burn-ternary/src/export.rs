//! Converts a trained model to a [`PackedModel`], with exactly the codes and scales of its forward pass.

use crate::nn::{DuckQuantized, QuantizedLinear};
use crate::quant::{TablePrecision, TernaryQuantizer};
use crate::tensor_name::tensor_name;
use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;
use half::f16;
use std::collections::BTreeMap;
use ternary_format::{Encoding, Family, FormatError, PackedModel, Tokenizer};

/// Why a model cannot be exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// A norm without parameters before each linear layer (`input_norm`).
    #[error(
        "the model has a norm without parameters before each linear layer, which no file type can express: \
         train with `input_norm = false` in [quant]"
    )]
    InputNorm,
    /// The float-first schedule has not ended.
    #[error(
        "the weights are not ternary yet (lambda = {lambda}; 0 is float, 1 is ternary): continue training until `float_until` \
         and `ramp_until` of [schedule] have passed"
    )]
    Blend {
        /// The share of the ternary weight.
        lambda: f32,
    },
    /// The scale `ttq`.
    #[error(
        "the matrices have one scale for positive and one for negative weights, which no file type can express: train \
         with a `scale` other than \"ttq\" in [quant]"
    )]
    TwoScales,
    /// `dead_bias` in a family without biases.
    #[error(
        "the weights of code 0 add to a bias, which files have for layers of the gpt2 family only: train with \
         `dead_bias = 0.0` in [quant], or with `family = \"gpt2\"` in [model]"
    )]
    DeadBias,
    /// A parameter of integers, booleans, f64 or quantized numbers.
    #[error("parameter `{path}` has type {found}: expected f32, f16 or bf16, the types of the file")]
    NotFloat {
        /// Its parameter path.
        path: String,
        /// Its type.
        found: String,
    },
    /// A prepared matrix whose latent weights are not in f32.
    #[error(
        "parameter `{path}` was prepared, but its values are not an f16 scale times -1, 0 or +1: expected latent weights in f32"
    )]
    NotTernary {
        /// Its parameter path.
        path: String,
    },
    /// A parameter of a custom model without a name in model files.
    #[error(
        "parameter `{path}` has no name in model files: expected one for each parameter, as an engine would ignore \
         the parameter"
    )]
    Unnamed {
        /// Its parameter path.
        path: String,
    },
    /// The file cannot be written, or cannot store a tensor.
    #[error(transparent)]
    Format(#[from] FormatError),
}

impl ExportError {
    /// Whether the cause is the disk, not the model.
    pub fn is_io(&self) -> bool {
        matches!(self, Self::Format(error) if matches!(error.kind(), FormatError::Io { .. }))
    }
}

/// The model as a [`PackedModel`]: ternary matrices and tables with the codes and scales of the forward pass,
/// everything else in f32, adapters separately. A float twin is f32 throughout.
///
/// The chat template is `None`. For a model that was trained on dialogues, set that of its texts
/// ([`ternary_format::chat::TEMPLATE`]).
///
/// # Errors
/// `InputNorm`, `Blend`, `TwoScales`, `DeadBias`: no file can express the model. `Format`: the rows of a table do not fit the
/// blocks of its precision.
///
/// # Example
/// ```
/// # use burn_ternary::{export_for_inference, nn::{DuckConfig, DuckQuantized}, quant::QuantConfig};
/// # use burn_ternary::format::{WriteOptions, write_model};
/// # use burn::tensor::Device;
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("duck.gguf");
/// let config = DuckConfig::duck_tiny().with_vocab_size(100);
/// let duck = config.init(&QuantConfig::default(), 1, &Device::default());
/// let packed = export_for_inference(&duck, None, "duck")?;
/// write_model(&packed, &path, &WriteOptions::default())?; // GGUF, ONNX, an archive or a folder, by the path
///
/// let again = DuckQuantized::load(&path, &Device::default())?;
/// assert_eq!(again.config().spec(), packed.spec);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn export_for_inference(
    model: &DuckQuantized,
    tokenizer: Option<&Tokenizer>,
    name: &str,
) -> Result<PackedModel, ExportError> {
    if model.quant().input_norm {
        return Err(ExportError::InputNorm);
    }
    export_quantized(model, tokenizer, name)
}

/// The latent weights, in f32.
///
/// # Errors
/// `Format`: a value that is not finite.
pub(crate) fn export_latent(
    model: &DuckQuantized,
    tokenizer: Option<&Tokenizer>,
    name: &str,
) -> Result<PackedModel, ExportError> {
    pack(model, Weights::Latent, tokenizer, name)
}

/// The weights that the forward pass multiplies. A parameterless norm before them (`input_norm`), which no file can express,
/// is ignored.
///
/// # Errors
/// As [`export_for_inference`], except `InputNorm`.
pub(crate) fn export_quantized(
    model: &DuckQuantized,
    tokenizer: Option<&Tokenizer>,
    name: &str,
) -> Result<PackedModel, ExportError> {
    let quant = model.quant();
    let lambda = model.schedule_handle().lambda.get();
    if quant.enabled && lambda < 1.0 {
        return Err(ExportError::Blend { lambda });
    }
    if quant.enabled && quant.scale.rule().scales_per_group() > 1 {
        return Err(ExportError::TwoScales);
    }
    if quant.enabled && quant.dead_bias > 0.0 && model.config().family != Family::Gpt2 {
        return Err(ExportError::DeadBias);
    }
    let weights = if quant.enabled { Weights::Quantized } else { Weights::Latent };
    pack(model, weights, tokenizer, name)
}

/// The weights of an export.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Weights {
    /// The trained floats.
    Latent,
    /// Codes and scales.
    Quantized,
}

fn pack(
    model: &DuckQuantized,
    weights: Weights,
    tokenizer: Option<&Tokenizer>,
    name: &str,
) -> Result<PackedModel, ExportError> {
    let quantized = weights == Weights::Quantized;
    let precision = |precision| if quantized { precision } else { TablePrecision::Float };
    let quant = model.quant();
    let mut tensors = BTreeMap::new();
    let mut add = |path: &str, tensor: Result<ternary_format::Tensor, FormatError>| {
        let name = tensor_name(path);
        let tensor = tensor.map_err(|error| error.in_tensor(&name))?;
        tensors.insert(name, tensor);
        Ok::<_, FormatError>(())
    };
    for (path, linear) in model.linears() {
        add(&format!("{path}.weight"), matrix(linear, weights))?;
        if let (true, Some(bias)) = (quantized, linear.effective_bias()) {
            add(&format!("{path}.bias"), ternary_format::Tensor::f32(&bias.dims(), &host(bias)))?;
        }
    }
    add("embedding", table(&model.embedding, precision(quant.embedding)))?;
    if let Some(head) = &model.head {
        add("head", table(head, precision(quant.head)))?;
    }
    let mut rest = Floats { path: Vec::new(), tensors, error: None };
    model.visit(&mut rest);
    rest.error.map_or(Ok(()), Err)?;
    let adapter = model.adapter()?.map(|adapter| adapter.with_base(&rest.tensors));
    Ok(PackedModel::new(name, model.config().spec(), rest.tensors)
        .with_tokenizer(tokenizer.cloned())
        .with_adapter(adapter))
}

/// Collects the parameters without a quantizer: biases, norms and positions.
struct Floats {
    path: Vec<String>,
    tensors: BTreeMap<String, ternary_format::Tensor>,
    error: Option<FormatError>,
}

impl ModuleVisitor for Floats {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let name = tensor_name(&self.path.join("."));
        // Scales belong to their matrix, and adapters are exported separately. A bias that is already in `tensors` includes the
        // dead weights.
        let separate = name.ends_with(".quantizer.scale") || self.path.iter().any(|part| part == "adapter");
        if separate || self.tensors.contains_key(&name) {
            return;
        }
        let value = param.val();
        match ternary_format::Tensor::f32(&value.dims(), &host(value)) {
            Ok(tensor) => drop(self.tensors.insert(name, tensor)),
            Err(error) => self.error = Some(error),
        }
    }
}

/// Burn's `[d_input, d_output]` as the `[out, in]` of model files.
fn matrix(linear: &QuantizedLinear, weights: Weights) -> Result<ternary_format::Tensor, FormatError> {
    let weight = linear.weight.val();
    let [cols, rows] = weight.dims();
    match &linear.quantizer {
        Some(quantizer) if weights == Weights::Quantized => ternary(quantizer, weight),
        _ => ternary_format::Tensor::f32(&[rows, cols], &host(weight.transpose())),
    }
}

fn ternary(quantizer: &TernaryQuantizer, weight: Tensor<2>) -> Result<ternary_format::Tensor, FormatError> {
    let [cols, rows] = weight.dims();
    let codes = host(quantizer.codes(weight.clone()).transpose());
    let scales = quantizer.scales(weight);
    let groups = scales.dims()[0];
    // One scale per tensor is repeated for every row.
    let scales = host(scales.swap_dims(0, 2).expand([rows, 1, groups]));
    ternary_format::Tensor::ternary(rows, cols, cols / groups, |row, row_codes, row_scales| {
        row_codes.iter_mut().zip(&codes[row * cols..]).for_each(|(to, code)| *to = *code as i8);
        row_scales
            .iter_mut()
            .zip(&scales[row * groups..])
            .for_each(|(to, scale)| *to = f16::from_f32(*scale));
    })
}

fn table(table: &Param<Tensor<2>>, precision: TablePrecision) -> Result<ternary_format::Tensor, FormatError> {
    let table = table.val();
    let [rows, cols] = table.dims();
    let values = host(precision.fake_quantize(table.clone()));
    let encoding = match precision {
        TablePrecision::Float => return ternary_format::Tensor::f32(&[rows, cols], &values),
        TablePrecision::Int8 => Encoding::Q8_0,
        TablePrecision::Int4 => Encoding::Q4_0,
        TablePrecision::Ternary => Encoding::Ternary { group: cols },
    };
    let scales = host(precision.scales(table).expect("a table that is not float has scales"));
    ternary_format::Tensor::from_codes(encoding, rows, cols, |row, row_codes, row_scales| {
        let values = &values[row * cols..(row + 1) * cols];
        // Each value is the product of a code and a scale of few bits, so the quotient is exact.
        row_codes.iter_mut().zip(values).for_each(|(to, value)| *to = (value / scales[row]).round() as i8);
        row_scales.fill(f16::from_f32(scales[row]));
    })
}

/// The values of a tensor, copied to the host.
pub(crate) fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}
