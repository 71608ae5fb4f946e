//! [`Model`]: the weights of a file, packed for the kernels.
//!
//! | encoding in the file | packed as |
//! |---|---|
//! | ternary | ternary codes; one scale per row if all scales of each row are equal, else one per stored group |
//! | Q6_K | 6-bit codes |
//! | Q8_0, Q4_0 | int8 codes |
//! | Q4_1, Q4_K | int8 codes with one scale per 32 weights, rounded; f32 if activations are f32 |
//! | F32, F16, BF16 | f32 |

use crate::{ActivationMode, EngineError};
use half::f16;
use ternary_format::{Encoding, Family, ModelSpec, PackedModel, Tensor, memory};
use ternary_kernels::{Arena, F32Matrix, Int8Matrix, Isa, Matrix, Q6Matrix, TernaryMatrix};

/// All weights of a model.
#[derive(Debug)]
pub(crate) struct Model {
    pub spec: ModelSpec,
    /// `[vocab, d_model]`; `None` if the head is the embedding.
    embedding: Option<Matrix>,
    /// `[context, d_model]`, for gpt2.
    pub positions: Option<Matrix>,
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
    pub low_rank: Option<LowRank>,
}

/// The LoRA adapter of a linear layer: adds `b (a x)`, with the `x` that the matrix multiplies.
#[derive(Debug)]
pub(crate) struct LowRank {
    /// `[rank, in]`
    pub a: Matrix,
    /// `[out, rank]`, already multiplied by `alpha / rank`.
    pub b: Matrix,
}

/// RMS norm, or layer norm if it has a bias.
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
    /// `Format`: tensors are missing or have wrong shapes, or a weight is not finite. `Memory`, `Weights`: too little memory.
    pub fn pack(model: &PackedModel, activations: ActivationMode) -> Result<Self, EngineError> {
        // From here on every tensor exists and has the shape of the spec.
        model.validate()?;
        let spec = &model.spec;
        model.check_finite()?;
        let matrices = model.tensors.values().filter(|tensor| tensor.shape().len() == 2);
        let measure = |tensor: &Tensor| {
            let bytes = PackedFormat::of(tensor, activations).bytes(tensor);
            tensor.release();
            bytes
        };
        let pairs = model.adapter.iter().flat_map(|adapter| adapter.pairs.values());
        let pair_bytes = |pair: &ternary_format::LowRank| {
            let [out, inputs] = pair.shape();
            F32Matrix::bytes(pair.rank(), inputs) + F32Matrix::bytes(out, pair.rank())
        };
        let bytes = matrices.map(measure).sum::<usize>() + pairs.map(pair_bytes).sum::<usize>();
        memory::check(bytes as u64)?;
        let arena = Arena::try_new(bytes).map_err(|source| EngineError::Weights { bytes, source })?;
        let mut packer = Packer { model, activations, arena };
        let (embedding, head) = if spec.tied {
            (None, "token_embd.weight")
        } else {
            (Some(packer.matrix("token_embd.weight")), "output.weight")
        };
        let positions = (spec.family == Family::Gpt2).then(|| packer.matrix("position_embd.weight"));
        // Packed in the order of use, so that decoding a token reads one stream of memory.
        let blocks = (0..spec.n_layers).map(|layer| packer.block(layer)).collect();
        let head = packer.matrix(head);
        Ok(Self { embedding, positions, blocks, norm: packer.norm("output_norm"), head, spec: spec.clone() })
    }

    /// `[vocab, d_model]`
    pub fn embedding(&self) -> &Matrix {
        self.embedding.as_ref().unwrap_or(&self.head)
    }
}

struct Packer<'a> {
    model: &'a PackedModel,
    activations: ActivationMode,
    arena: Arena,
}

impl Packer<'_> {
    fn block(&mut self, layer: usize) -> Block {
        let bitnet = self.model.spec.family == Family::Bitnet;
        let name = |part: &str| format!("blk.{layer}.{part}");
        Block {
            attention_norm: self.norm(&name("attn_norm")),
            query: self.linear(&name("attn_q")),
            key: self.linear(&name("attn_k")),
            value: self.linear(&name("attn_v")),
            attention_sub_norm: bitnet.then(|| self.norm(&name("attn_sub_norm"))),
            output: self.linear(&name("attn_output")),
            feed_forward_norm: self.norm(&name("ffn_norm")),
            gate: self.model.spec.is_gated().then(|| self.linear(&name("ffn_gate"))),
            up: self.linear(&name("ffn_up")),
            feed_forward_sub_norm: bitnet.then(|| self.norm(&name("ffn_sub_norm"))),
            down: self.linear(&name("ffn_down")),
        }
    }

    fn linear(&mut self, name: &str) -> Linear {
        let weight = format!("{name}.weight");
        Linear {
            matrix: self.matrix(&weight),
            bias: self.vector(&format!("{name}.bias")),
            low_rank: self.low_rank(&weight),
        }
    }

    fn low_rank(&mut self, weight: &str) -> Option<LowRank> {
        let pair = self.model.adapter.as_ref()?.pairs.get(weight)?;
        let ([out, inputs], rank, scale) = (pair.shape(), pair.rank(), pair.scale());
        let a = F32Matrix::pack(&mut self.arena, rank, inputs, |row, values| {
            values.copy_from_slice(&pair.a()[row * inputs..(row + 1) * inputs]);
        });
        let b = F32Matrix::pack(&mut self.arena, out, rank, |row, values| {
            let row = &pair.b()[row * rank..(row + 1) * rank];
            values.iter_mut().zip(row).for_each(|(to, value)| *to = value * scale);
        });
        Some(LowRank { a: a.into(), b: b.into() })
    }

    fn norm(&self, name: &str) -> Norm {
        Norm {
            weight: self.vector(&format!("{name}.weight")).expect("a norm has a weight"),
            bias: self.vector(&format!("{name}.bias")),
            eps: self.model.spec.norm_eps,
        }
    }

    fn vector(&self, name: &str) -> Option<Vec<f32>> {
        let tensor = self.model.tensors.get(name)?;
        let mut values = vec![0.0; tensor.cols()];
        tensor.read_row(0, &mut values);
        Some(values)
    }

    fn matrix(&mut self, name: &str) -> Matrix {
        let tensor = &self.model.tensors[name];
        let (rows, cols) = (tensor.rows(), tensor.cols());
        let matrix = match PackedFormat::of(tensor, self.activations) {
            PackedFormat::Ternary { group } => {
                let stored = tensor.ternary_group().expect("a ternary tensor");
                let mut stored_scales = vec![f16::ZERO; cols / stored];
                TernaryMatrix::pack(&mut self.arena, rows, cols, group, |row, codes, scales| {
                    tensor.read_ternary_row(row, codes, &mut stored_scales);
                    let firsts = stored_scales.iter().step_by(group / stored);
                    scales.iter_mut().zip(firsts).for_each(|(to, from)| *to = *from);
                })
                .into()
            }
            PackedFormat::Q6 => Q6Matrix::pack(&mut self.arena, rows, cols, |row, codes, factors, scales| {
                tensor.read_integer_row(row, codes, factors, scales)
            })
            .into(),
            PackedFormat::Int8 { group } => {
                let (mut factors, mut stored) = (vec![0; cols / 16], vec![f16::ZERO; cols / BLOCK]);
                Int8Matrix::pack(&mut self.arena, rows, cols, group, |row, codes, scales| {
                    tensor.read_integer_row(row, codes, &mut factors, &mut stored);
                    let firsts = stored.iter().step_by(group / BLOCK);
                    scales.iter_mut().zip(firsts).for_each(|(to, from)| *to = from.to_f32());
                })
                .into()
            }
            PackedFormat::RoundedInt8 => {
                let mut values = vec![0.0; cols];
                Int8Matrix::pack(&mut self.arena, rows, cols, BLOCK, |row, codes, scales| {
                    tensor.read_row(row, &mut values);
                    let groups = values.chunks(BLOCK).zip(codes.chunks_mut(BLOCK));
                    groups.zip(scales).for_each(|((values, codes), scale)| *scale = quantize(values, codes));
                })
                .into()
            }
            PackedFormat::F32 => {
                F32Matrix::pack(&mut self.arena, rows, cols, |row, values| tensor.read_row(row, values))
                    .into()
            }
        };
        tensor.release();
        matrix
    }
}

/// Rounds to int8 with the scale `max |x| / 127`; returns the scale.
fn quantize(values: &[f32], codes: &mut [i8]) -> f32 {
    let scale = values.iter().fold(0f32, |max, x| max.max(x.abs())) / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    codes.iter_mut().zip(values).for_each(|(code, x)| *code = (x * inverse).round_ties_even() as i8);
    scale
}

/// Weights per scale in GGUF's 8- and 4-bit types.
const BLOCK: usize = 32;

/// How the engine stores a matrix. All formats are exact except `RoundedInt8`, for encodings that also have minimums.
enum PackedFormat {
    Ternary { group: usize },
    Q6,
    Int8 { group: usize },
    RoundedInt8,
    F32,
}

impl PackedFormat {
    fn of(tensor: &Tensor, activations: ActivationMode) -> Self {
        let cols = tensor.cols();
        match tensor.encoding() {
            Encoding::F32 | Encoding::F16 | Encoding::Bf16 => Self::F32,
            Encoding::Q6K => Self::Q6,
            Encoding::Q8_0 | Encoding::Q4_0 => {
                let mut codes = (vec![0; cols], vec![0; cols / 16]);
                let read = |row, scales: &mut [f16]| {
                    tensor.read_integer_row(row, &mut codes.0, &mut codes.1, scales);
                };
                let group = group_size(tensor, BLOCK, read);
                Self::Int8 { group: if group <= Int8Matrix::LONGEST_GROUP { group } else { BLOCK } }
            }
            Encoding::Q4_1 | Encoding::Q4K if activations == ActivationMode::Int8 => Self::RoundedInt8,
            Encoding::Q4_1 | Encoding::Q4K => Self::F32,
            Encoding::Tq1_0 | Encoding::Tq2_0 | Encoding::Q2_0 | Encoding::Ternary { .. } => {
                let stored = tensor.ternary_group().expect("a ternary tensor");
                let mut codes = vec![0; cols];
                let read = |row, scales: &mut [f16]| tensor.read_ternary_row(row, &mut codes, scales);
                let group = group_size(tensor, stored, read);
                // The kernels support no other group sizes.
                let fits = group == cols || group.is_multiple_of(16);
                if fits { Self::Ternary { group } } else { Self::F32 }
            }
        }
    }

    fn bytes(&self, tensor: &Tensor) -> usize {
        let (rows, cols) = (tensor.rows(), tensor.cols());
        match self {
            Self::Ternary { group } => TernaryMatrix::bytes(rows, cols, *group),
            Self::Q6 => Q6Matrix::bytes(rows, cols),
            Self::Int8 { group } => Int8Matrix::bytes(rows, cols, *group),
            Self::RoundedInt8 => Int8Matrix::bytes(rows, cols, BLOCK),
            Self::F32 => F32Matrix::bytes(rows, cols),
        }
    }
}

/// Weights per scale: the whole row if all blocks of each row have the same scale, which then multiplies a sum once; else
/// the block.
fn group_size(tensor: &Tensor, block: usize, mut read: impl FnMut(usize, &mut [f16])) -> usize {
    let mut scales = vec![f16::ZERO; tensor.cols() / block];
    let one_per_row = (0..tensor.rows()).all(|row| {
        read(row, &mut scales);
        scales.iter().all(|scale| scale.to_bits() == scales[0].to_bits())
    });
    if one_per_row { tensor.cols() } else { block }
}
