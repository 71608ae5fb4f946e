//! [`Model`]: the weights of a file, packed for the kernels.

use crate::{ActivationMode, EngineError, spec};
use half::f16;
use ternary_format::{Encoding, Family, ModelSpec, PackedModel, Tensor};
use ternary_kernels::{Arena, ByteMatrix, FloatMatrix, Isa, Matrix, TernaryMatrix};

/// Integer weights share a scale within so many columns of a table that is neither ternary nor stored as int8.
const TABLE_GROUP: usize = 64;

/// All weights of a model.
#[derive(Debug)]
pub(crate) struct Model {
    pub spec: ModelSpec,
    /// `[vocab, d_model]`, as the file has it.
    pub embedding: Tensor,
    /// `[context, d_model]`, in gpt2.
    pub positions: Option<Tensor>,
    pub blocks: Vec<Block>,
    pub norm: Norm,
    pub head: Matrix,
}

#[derive(Debug)]
pub(crate) struct Block {
    pub attention_norm: Norm,
    pub query: Linear,
    pub key: Linear,
    pub value: Linear,
    pub attention_sub_norm: Option<Norm>,
    pub output: Linear,
    pub feed_forward_norm: Norm,
    pub gate: Option<Linear>,
    pub up: Linear,
    pub feed_forward_sub_norm: Option<Norm>,
    pub down: Linear,
}

#[derive(Debug)]
pub(crate) struct Linear {
    pub matrix: Matrix,
    pub bias: Option<Vec<f32>>,
}

/// RMS norm, or layer norm where there is a bias.
#[derive(Debug)]
pub(crate) struct Norm {
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    eps: f32,
}

impl Norm {
    pub fn forward(&self, isa: Isa, input: &[f32], output: &mut [f32]) {
        match &self.bias {
            Some(bias) => isa.layer_norm(input, &self.weight, bias, self.eps, output),
            None => isa.rms_norm(input, &self.weight, self.eps, output),
        }
    }
}

impl Model {
    /// # Errors
    /// `Spec`, `MissingTensor`, `Shape`: the model does not fit together.
    pub fn pack(model: &PackedModel, activations: ActivationMode) -> Result<Self, EngineError> {
        spec::check(&model.spec)?;
        let spec = model.spec.clone();
        let table = [spec.vocab_size, spec.d_model];
        let embedding = spec::tensor(model, "token_embd.weight", &table)?.clone();
        let positions = match spec.family {
            Family::Gpt2 => {
                Some(spec::tensor(model, "position_embd.weight", &[spec.context, spec.d_model])?.clone())
            }
            _ => None,
        };
        // All shapes are checked before anything is allocated by them.
        let mut arena = Arena::new(Packer::measure(model, activations)?);
        let mut packer = Packer { model, activations, arena: &mut arena };
        let blocks = (0..spec.n_layers).map(|layer| packer.block(layer)).collect::<Result<_, _>>()?;
        let norm = packer.norm("output_norm", spec.d_model)?;
        let head = packer.matrix(head_name(&spec), table)?;
        Ok(Self { spec, embedding, positions, blocks, norm, head })
    }
}

fn head_name(spec: &ModelSpec) -> &'static str {
    if spec.tied { "token_embd.weight" } else { "output.weight" }
}

/// Names of a block's matrices with their shapes `[out, in]`, in the order of use.
fn matrices(spec: &ModelSpec) -> Vec<(&'static str, [usize; 2])> {
    let (d, d_ff) = (spec.d_model, spec.d_ff);
    let kv = spec.n_kv_heads * spec.head_dim();
    let mut matrices =
        vec![("attn_q", [d, d]), ("attn_k", [kv, d]), ("attn_v", [kv, d]), ("attn_output", [d, d])];
    if spec.is_gated() {
        matrices.push(("ffn_gate", [d_ff, d]));
    }
    matrices.extend([("ffn_up", [d_ff, d]), ("ffn_down", [d, d_ff])]);
    matrices
}

struct Packer<'a> {
    model: &'a PackedModel,
    activations: ActivationMode,
    arena: &'a mut Arena,
}

impl Packer<'_> {
    /// Bytes that the matrices take.
    fn measure(model: &PackedModel, activations: ActivationMode) -> Result<usize, EngineError> {
        let spec = &model.spec;
        let mut bytes = 0;
        for layer in 0..spec.n_layers {
            for (part, shape) in matrices(spec) {
                let tensor = spec::tensor(model, &format!("blk.{layer}.{part}.weight"), &shape)?;
                bytes += Form::of(tensor, activations).bytes(tensor);
            }
        }
        let head = spec::tensor(model, head_name(spec), &[spec.vocab_size, spec.d_model])?;
        Ok(bytes + Form::of(head, activations).bytes(head))
    }

    fn block(&mut self, layer: usize) -> Result<Block, EngineError> {
        let spec = &self.model.spec;
        let (d, d_ff, eps_norm) = (spec.d_model, spec.d_ff, spec.family == Family::Bitnet);
        let name = |part: &str| format!("blk.{layer}.{part}");
        let attention_norm = self.norm(&name("attn_norm"), d)?;
        let attention_sub_norm = eps_norm.then(|| self.norm(&name("attn_sub_norm"), d)).transpose()?;
        let feed_forward_norm = self.norm(&name("ffn_norm"), d)?;
        let feed_forward_sub_norm = eps_norm.then(|| self.norm(&name("ffn_sub_norm"), d_ff)).transpose()?;
        let mut linears = matrices(spec).into_iter().map(|(part, shape)| self.linear(&name(part), shape));
        let mut next = || linears.next().expect("as many as there are matrices");
        Ok(Block {
            attention_norm,
            query: next()?,
            key: next()?,
            value: next()?,
            attention_sub_norm,
            output: next()?,
            feed_forward_norm,
            gate: spec.is_gated().then(&mut next).transpose()?,
            up: next()?,
            feed_forward_sub_norm,
            down: next()?,
        })
    }

    fn linear(&mut self, name: &str, shape: [usize; 2]) -> Result<Linear, EngineError> {
        let bias = format!("{name}.bias");
        // Trained biases of other families (a Tequila quantizer leaves some) are applied where they are.
        let has_bias = self.model.spec.family == Family::Gpt2 || self.model.tensors.contains_key(&bias);
        Ok(Linear {
            matrix: self.matrix(&format!("{name}.weight"), shape)?,
            bias: has_bias.then(|| self.vector(&bias, shape[0])).transpose()?,
        })
    }

    fn norm(&self, name: &str, width: usize) -> Result<Norm, EngineError> {
        let layer_norm = self.model.spec.family == Family::Gpt2;
        Ok(Norm {
            weight: self.vector(&format!("{name}.weight"), width)?,
            bias: layer_norm.then(|| self.vector(&format!("{name}.bias"), width)).transpose()?,
            eps: self.model.spec.norm_eps,
        })
    }

    fn vector(&self, name: &str, width: usize) -> Result<Vec<f32>, EngineError> {
        let mut values = vec![0.0; width];
        spec::tensor(self.model, name, &[width])?.read_row(0, &mut values);
        Ok(values)
    }

    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<Matrix, EngineError> {
        let tensor = spec::tensor(self.model, name, &shape)?;
        let [rows, cols] = shape;
        Ok(match Form::of(tensor, self.activations) {
            Form::Ternary { group } => {
                let stored = tensor.ternary_group().expect("a ternary tensor");
                let mut stored_scales = vec![f16::ZERO; cols / stored];
                TernaryMatrix::pack(self.arena, rows, cols, group, |row, codes, scales| {
                    tensor.read_ternary_row(row, codes, &mut stored_scales);
                    let step = group / stored;
                    scales
                        .iter_mut()
                        .zip(stored_scales.iter().step_by(step))
                        .for_each(|(to, from)| *to = *from);
                })
                .into()
            }
            Form::Byte { group } => {
                let mut values = vec![0.0; cols];
                ByteMatrix::pack(self.arena, rows, cols, group, |row, codes, scales| {
                    tensor.read_row(row, &mut values);
                    let groups = values.chunks(group).zip(codes.chunks_mut(group));
                    groups.zip(scales).for_each(|((values, codes), scale)| *scale = quantize(values, codes));
                })
                .into()
            }
            Form::Float => {
                FloatMatrix::pack(self.arena, rows, cols, |row, values| tensor.read_row(row, values)).into()
            }
        })
    }
}

/// Rounds to int8 by the absolute maximum; returns the scale.
fn quantize(values: &[f32], codes: &mut [i8]) -> f32 {
    let scale = values.iter().fold(0f32, |max, x| max.max(x.abs())) / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    codes.iter_mut().zip(values).for_each(|(code, x)| *code = (x * inverse).round_ties_even() as i8);
    scale
}

/// What a tensor becomes.
enum Form {
    Ternary { group: usize },
    Byte { group: usize },
    Float,
}

impl Form {
    fn of(tensor: &Tensor, activations: ActivationMode) -> Self {
        let cols = tensor.cols();
        let fits = |group: usize| group == cols || group.is_multiple_of(16);
        if let Some(group) = tensor.ternary_group() {
            let group = if scales_are_by_row(tensor, group) { cols } else { group };
            return if fits(group) { Self::Ternary { group } } else { Self::Float };
        }
        match (tensor.encoding(), activations) {
            (Encoding::F32 | Encoding::F16 | Encoding::Bf16, _) | (_, ActivationMode::F32) => Self::Float,
            (Encoding::Q8_0 | Encoding::Q4_0 | Encoding::Q4_1, _) => Self::Byte { group: 32 },
            _ => Self::Byte { group: TABLE_GROUP },
        }
    }

    fn bytes(&self, tensor: &Tensor) -> usize {
        let (rows, cols) = (tensor.rows(), tensor.cols());
        match self {
            Self::Ternary { group } => TernaryMatrix::bytes(rows, cols, *group),
            Self::Byte { group } => ByteMatrix::bytes(rows, cols, *group),
            Self::Float => FloatMatrix::bytes(rows, cols),
        }
    }
}

/// Whether the blocks of each row have one scale, which then need be applied but once a row.
fn scales_are_by_row(tensor: &Tensor, group: usize) -> bool {
    let mut codes = vec![0; tensor.cols()];
    let mut scales = vec![f16::ZERO; tensor.cols() / group];
    (0..tensor.rows()).all(|row| {
        tensor.read_ternary_row(row, &mut codes, &mut scales);
        scales.iter().all(|scale| scale.to_bits() == scales[0].to_bits())
    })
}
