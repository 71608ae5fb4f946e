//! Checks of what a model file says about itself.

use crate::EngineError;
use ternary_format::{Activation, Family, ModelSpec, PackedModel, Tensor};

/// The largest width, context, vocabulary or number of layers: far above any model, low enough that no product of
/// three sizes overflows.
const LARGEST_SIZE: usize = 1 << 20;

fn require(
    holds: bool,
    key: &'static str,
    found: impl ToString,
    expected: impl Into<String>,
) -> Result<(), EngineError> {
    if holds {
        return Ok(());
    }
    Err(EngineError::Spec { key, found: found.to_string(), expected: expected.into() })
}

/// `Spec` unless a model of this shape can be run.
pub(crate) fn check(spec: &ModelSpec) -> Result<(), EngineError> {
    let ModelSpec { d_model, n_heads, n_kv_heads, .. } = *spec;
    for (key, size) in [
        ("vocab_size", spec.vocab_size),
        ("context", spec.context),
        ("d_model", d_model),
        ("n_layers", spec.n_layers),
        ("n_heads", n_heads),
        ("n_kv_heads", n_kv_heads),
        ("d_ff", spec.d_ff),
    ] {
        require((1..=LARGEST_SIZE).contains(&size), key, size, format!("1 to {LARGEST_SIZE}"))?;
    }
    require(
        d_model.is_multiple_of(n_heads),
        "n_heads",
        n_heads,
        format!("a divisor of d_model = {d_model}"),
    )?;
    require(
        n_heads.is_multiple_of(n_kv_heads),
        "n_kv_heads",
        n_kv_heads,
        format!("a divisor of n_heads = {n_heads}"),
    )?;
    let gelu = spec.activation == Activation::Gelu;
    let activation = format!("{:?}", spec.activation);
    if spec.family == Family::Gpt2 {
        require(
            spec.activation != Activation::Swiglu,
            "activation",
            activation,
            "Gelu or SquaredRelu in gpt2",
        )?;
    } else {
        require(!gelu, "activation", activation, "Swiglu or SquaredRelu in llama and bitnet")?;
        let head_dim = spec.head_dim();
        require(head_dim.is_multiple_of(2), "head_dim", head_dim, "an even number for rotary positions")?;
        let theta = spec.rope_theta;
        require(theta >= 1.0 && theta.is_finite(), "rope_theta", theta, "a finite number, at least 1")?;
    }
    let eps = spec.norm_eps;
    require(eps > 0.0 && eps < 1.0, "norm_eps", eps, "above 0 and below 1")
}

/// An error unless `ids` can follow `seen` tokens.
pub(crate) fn check_ids(spec: &ModelSpec, ids: &[u32], seen: usize) -> Result<(), EngineError> {
    if ids.is_empty() {
        return Err(EngineError::EmptyPrompt);
    }
    if let Some(&id) = ids.iter().find(|id| **id as usize >= spec.vocab_size) {
        return Err(EngineError::UnknownToken { id, vocab_size: spec.vocab_size });
    }
    let found = seen + ids.len();
    if found > spec.context {
        return Err(EngineError::ContextFull { found, context: spec.context });
    }
    Ok(())
}

/// A tensor of the model, of the shape that the spec gives it.
pub(crate) fn tensor<'a>(
    model: &'a PackedModel,
    name: &str,
    shape: &[usize],
) -> Result<&'a Tensor, EngineError> {
    let missing = || EngineError::MissingTensor { name: name.into() };
    let tensor = model.tensors.get(name).ok_or_else(missing)?;
    if tensor.shape() != shape {
        return Err(EngineError::Shape {
            name: name.into(),
            found: tensor.shape().to_vec(),
            expected: shape.to_vec(),
        });
    }
    Ok(tensor)
}
