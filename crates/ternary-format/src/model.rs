//! [`PackedModel`]: what a model file holds.

use crate::{ModelSpec, Tensor};
use std::collections::BTreeMap;

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
