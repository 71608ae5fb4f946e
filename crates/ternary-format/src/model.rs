//! [`PackedModel`]: the content of a model file.

use crate::{Adapter, Encoding, FormatError, LowRank, ModelSpec, Tensor, Tokenizer};
use getset::WithSetters;
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
};

/// A model in memory, or memory-mapped from a file.
///
/// # Tensors
///
/// All families use the tensor names of GGUF. `blk.N` is transformer block `N`; matrices are `[out, in]`.
///
/// | name | families |
/// |---|---|
/// | `token_embd.weight` | all |
/// | `position_embd.weight` | gpt2 |
/// | `blk.N.attn_norm`, `attn_q`, `attn_k`, `attn_v`, `attn_output` | all |
/// | `blk.N.attn_sub_norm` | bitnet |
/// | `blk.N.ffn_norm`, `ffn_up`, `ffn_down` | all |
/// | `blk.N.ffn_gate` | llama, bitnet |
/// | `blk.N.ffn_sub_norm` | bitnet |
/// | `output_norm` | all |
/// | `output.weight` | untied models |
///
/// Each name of a layer has the suffix `.weight`, and in gpt2 also `.bias`.
///
/// Rows of queries and keys are in half-rotation order (component `i` of a head rotates with `i + head_dim / 2`).
/// Readers and writers convert files with other conventions, such as fused QKV matrices or interleaved rotation.
#[derive(Clone, Debug, WithSetters)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct PackedModel {
    /// Name of the model, such as the name of its run or folder.
    pub name: String,
    /// Architecture and sizes.
    pub spec: ModelSpec,
    /// Tensors by name. [`ModelSpec::tensors`] lists the required names and shapes.
    pub tensors: BTreeMap<String, Tensor>,
    /// Tokenizer; `None` for a model that is used with token ids only.
    pub tokenizer: Option<Tokenizer>,
    /// Chat template in Jinja; see [`chat`](crate::chat).
    pub chat_template: Option<String>,
    /// LoRA adapter. Model files do not store adapters: [`merged`](Self::merged) adds it to float weights, and
    /// [`huggingface::write_adapter`](crate::huggingface::write_adapter) writes it to a folder of its own.
    pub adapter: Option<Adapter>,
    /// Warnings for the user about unknown keys in the file; empty for a model that was not read from a file.
    pub warnings: Vec<String>,
}

impl PackedModel {
    /// Creates a model without a tokenizer, a chat template or an adapter.
    pub fn new(name: impl Into<String>, spec: ModelSpec, tensors: BTreeMap<String, Tensor>) -> Self {
        Self {
            name: name.into(),
            spec,
            tensors,
            tokenizer: None,
            chat_template: None,
            adapter: None,
            warnings: Vec::new(),
        }
    }

    /// Checks that the tensors, and those of the adapter, match the spec: none missing, none unknown, and all of the
    /// right shape.
    ///
    /// # Errors
    /// `Spec`: sizes that contradict each other. `Vocabulary`: more tokens than the embedding has rows.
    /// `MissingTensor`, `UnknownTensor`, `WrongShape`: a tensor that does not match.
    pub fn validate(&self) -> Result<(), FormatError> {
        self.spec.validate()?;
        if let Some(tokens) = self.tokenizer.as_ref().map(Tokenizer::vocab_size)
            && tokens > self.spec.vocab_size
        {
            return Err(FormatError::Vocabulary { tokens, rows: self.spec.vocab_size });
        }
        let mut expected = 0;
        for (name, shape) in self.spec.tensors() {
            let tensor = self.tensors.get(&name);
            let tensor = tensor.ok_or_else(|| FormatError::MissingTensor { tensor: name.clone() })?;
            if tensor.shape() != shape {
                let found = tensor.shape().into();
                return Err(FormatError::WrongShape { expected: shape, found }.in_tensor(&name));
            }
            expected += 1;
        }
        if self.tensors.len() > expected {
            let known: BTreeSet<String> = self.spec.tensors().map(|(name, _)| name).collect();
            let tensor = self.tensors.keys().find(|name| !known.contains(*name)).cloned().unwrap_or_default();
            return Err(FormatError::UnknownTensor { tensor });
        }
        self.adapter.as_ref().map_or(Ok(()), |adapter| adapter.validate(&self.spec))
    }

    /// Checks that no weight, and no weight of the adapter, is NaN or infinite. Unlike [`validate`](Self::validate),
    /// this reads every tensor.
    ///
    /// # Errors
    /// `NotFinite`: the first such tensor.
    pub fn check_finite(&self) -> Result<(), FormatError> {
        let tensor =
            |(name, tensor): (&String, &Tensor)| tensor.check_finite().map_err(|error| error.in_tensor(name));
        self.tensors.iter().try_for_each(tensor)?;
        self.adapter.as_ref().map_or(Ok(()), Adapter::check_finite)
    }

    /// Merges the adapter into the weights: `W + alpha / rank B A`, in F16 for an F16 matrix, else in F32.
    ///
    /// The sum of a ternary matrix and a pair is not ternary, so only a zero pair can be dropped there.
    ///
    /// # Errors
    /// `Unmergeable`: a pair on a matrix that is not float.
    pub fn merged(&self) -> Result<Cow<'_, Self>, FormatError> {
        let Some(adapter) = &self.adapter else {
            return Ok(Cow::Borrowed(self));
        };
        adapter.validate(&self.spec)?;
        let mut model = Self { adapter: None, ..self.clone() };
        for (name, pair) in adapter.pairs.iter().filter(|(_, pair)| !pair.is_zero()) {
            let tensor = model.tensors.get_mut(name);
            let tensor = tensor.ok_or_else(|| FormatError::MissingTensor { tensor: name.clone() })?;
            *tensor = merge(tensor, pair).map_err(|error| error.in_tensor(name))?;
        }
        Ok(Cow::Owned(model))
    }
}

fn merge(tensor: &Tensor, pair: &LowRank) -> Result<Tensor, FormatError> {
    let encoding = tensor.encoding();
    if !matches!(encoding, Encoding::F32 | Encoding::F16 | Encoding::Bf16) {
        return Err(FormatError::Unmergeable { encoding });
    }
    let mut values = vec![0.0; tensor.rows() * tensor.cols()];
    for (row, values) in values.chunks_exact_mut(tensor.cols()).enumerate() {
        tensor.read_row(row, values);
        pair.add_row(row, values);
    }
    let merged = Tensor::f32(tensor.shape(), &values)?;
    if encoding == Encoding::F16 { merged.encode(encoding) } else { Ok(merged) }
}

/// A small model with random ternary matrices: `scales_per_row` scales per row, or one scale per matrix.
#[cfg(test)]
pub(crate) fn random(family: crate::Family, scales_per_row: Option<usize>) -> PackedModel {
    use crate::{Activation, Family};
    use half::f16;
    use rand::{Rng, SeedableRng};
    let mut rng = rand::rngs::StdRng::seed_from_u64(7);
    let gpt2 = family == Family::Gpt2;
    let spec = ModelSpec {
        family,
        vocab_size: 37,
        context: 24,
        d_model: 24,
        n_layers: 2,
        n_heads: 4,
        n_kv_heads: if gpt2 { 4 } else { 2 },
        d_ff: 20,
        activation: if gpt2 { Activation::Gelu } else { Activation::Swiglu },
        tied: family != Family::Bitnet,
        norm_eps: 1e-6,
        rope_theta: if gpt2 { 1e4 } else { 5e5 },
    };
    let tensors = spec.tensors().map(|(name, shape)| {
        let tensor = if name.starts_with("blk.") && shape.len() == 2 {
            let shared = f16::from_f32(rng.random_range(0.01..1.0));
            let group = shape[1] / scales_per_row.unwrap_or(1);
            Tensor::ternary(shape[0], shape[1], group, |_, codes, scales| {
                codes.iter_mut().for_each(|code| *code = rng.random_range(-1..=1));
                for scale in scales {
                    let own = f16::from_f32(rng.random_range(0.01..1.0));
                    *scale = if scales_per_row.is_some() { own } else { shared };
                }
            })
        } else {
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
            Tensor::f32(&shape, &values)
        };
        (name, tensor.unwrap())
    });
    let tensors = tensors.collect();
    PackedModel::new("random", spec, tensors)
}
