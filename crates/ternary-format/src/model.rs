//! [`PackedModel`]: what a model file holds.

use crate::{Adapter, FormatError, ModelSpec, Tensor, Tokenizer};
use std::collections::{BTreeMap, BTreeSet};

/// A model in memory, or mapped from a file.
///
/// Tensors have GGUF's names, for every family the same parts: `token_embd.weight`, `position_embd.weight` (gpt2),
/// `output_norm.{weight,bias}`, `output.weight` (untied), and for block `i` `blk.i.` + `attn_norm`, `attn_q`, `attn_k`,
/// `attn_v`, `attn_sub_norm` (bitnet), `attn_output`, `ffn_norm`, `ffn_gate` (gated), `ffn_up`, `ffn_sub_norm`
/// (bitnet), `ffn_down` + `.weight` or `.bias`. Queries and keys are in half-rotation order (component `i` of a head
/// turns with `i + head_dim / 2`); readers and writers of files with other conventions (fused or interleaved)
/// convert.
#[derive(Clone, Debug)]
pub struct PackedModel {
    pub name: String,
    pub spec: ModelSpec,
    pub tensors: BTreeMap<String, Tensor>,
    /// `None`: the model knows ids only.
    pub tokenizer: Option<Tokenizer>,
    /// Jinja; see the `chat` module.
    pub chat_template: Option<String>,
    /// Beside the matrices. No model file holds one: see [`merged`](Self::merged), and
    /// [`huggingface::write_adapter`](crate::huggingface::write_adapter) for a file of its own.
    pub adapter: Option<Adapter>,
    /// What the reader of its file did not understand, for users; empty for a model that was not read.
    pub warnings: Vec<String>,
}

impl PackedModel {
    /// Checks that the tensors, and those of an adapter, are those of the spec: no fewer, no others, of their shapes.
    ///
    /// # Errors
    /// `Spec`: no model has such a shape. `Vocabulary`: ids without a row of the embedding.
    /// `MissingTensor`, `UnknownTensor`, `WrongShape`.
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

    /// Checks that no weight, and none of an adapter, is NaN or infinite. It reads the whole model, which
    /// [`validate`](Self::validate) does not.
    ///
    /// # Errors
    /// `NotFinite`, in the first such tensor.
    pub fn check_finite(&self) -> Result<(), FormatError> {
        let tensor =
            |(name, tensor): (&String, &Tensor)| tensor.check_finite().map_err(|error| error.in_tensor(name));
        self.tensors.iter().try_for_each(tensor)?;
        self.adapter.as_ref().map_or(Ok(()), Adapter::check_finite)
    }
}

/// A small model of random ternary matrices, with a scale a matrix, or so many a row.
#[cfg(test)]
pub(crate) fn random(family: crate::Family, scales_a_row: Option<usize>) -> PackedModel {
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
            let group = shape[1] / scales_a_row.unwrap_or(1);
            Tensor::ternary(shape[0], shape[1], group, |_, codes, scales| {
                codes.iter_mut().for_each(|code| *code = rng.random_range(-1..=1));
                for scale in scales {
                    let own = f16::from_f32(rng.random_range(0.01..1.0));
                    *scale = if scales_a_row.is_some() { own } else { shared };
                }
            })
        } else {
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
            Tensor::f32(&shape, &values)
        };
        (name, tensor.unwrap())
    });
    PackedModel {
        name: "random".into(),
        tensors: tensors.collect(),
        tokenizer: None,
        chat_template: None,
        adapter: None,
        warnings: Vec::new(),
        spec,
    }
}
