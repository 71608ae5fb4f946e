//! [`PackedModel`]: what a model file holds.

use crate::{FormatError, ModelSpec, Tensor};
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
    /// Jinja; see the `chat` module.
    pub chat_template: Option<String>,
}

impl PackedModel {
    /// Checks that the tensors are those of the spec: no fewer, no others, of their shapes.
    ///
    /// # Errors
    /// `Spec`: no model has such a shape. `MissingTensor`, `UnknownTensor`, `WrongShape`.
    pub fn validate(&self) -> Result<(), FormatError> {
        self.spec.validate()?;
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
        Ok(())
    }
}
