//! The forward pass in float64, as slow and plain as it can be written: the oracle of the engine.

use crate::{EngineError, spec};
use ternary_format::{Activation, Family, PackedModel, Tensor};

/// `[positions][width]`
type Rows = Vec<Vec<f64>>;

/// Logits of the next token at every position, `[ids][vocab]`, with float activations.
///
/// # Errors
/// - `Spec`, `MissingTensor`, `Shape`: the model does not fit together.
/// - `EmptyPrompt`, `UnknownToken`, `ContextFull`: the ids do not fit the model.
pub fn logits(model: &PackedModel, ids: &[u32]) -> Result<Rows, EngineError> {
    spec::check(&model.spec)?;
    spec::check_ids(&model.spec, ids, 0)?;
    let slow = Slow { model };
    let spec = &model.spec;
    let (d, vocab) = (spec.d_model, spec.vocab_size);
    let table = slow.tensor("token_embd.weight", &[vocab, d])?;
    let mut hidden: Rows = ids.iter().map(|id| row(table, *id as usize)).collect();
    if spec.family == Family::Gpt2 {
        let positions = slow.tensor("position_embd.weight", &[spec.context, d])?;
        let positions: Rows = (0..ids.len()).map(|position| row(positions, position)).collect();
        hidden = add(&hidden, &positions);
    }
    for layer in 0..spec.n_layers {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let input = slow.norm(&hidden, &name("attn_norm"))?;
        hidden = add(&hidden, &slow.attention(&input, layer)?);
        let input = slow.norm(&hidden, &name("ffn_norm"))?;
        hidden = add(&hidden, &slow.feed_forward(&input, layer)?);
    }
    let hidden = slow.norm(&hidden, "output_norm")?;
    let head = if spec.tied { table } else { slow.tensor("output.weight", &[vocab, d])? };
    Ok(multiply(head, &hidden))
}

struct Slow<'a> {
    model: &'a PackedModel,
}

impl<'a> Slow<'a> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<&'a Tensor, EngineError> {
        spec::tensor(self.model, name, shape)
    }

    fn vector(&self, name: &str, width: usize) -> Result<Vec<f64>, EngineError> {
        Ok(row(self.tensor(name, &[width])?, 0))
    }

    fn norm(&self, input: &Rows, name: &str) -> Result<Rows, EngineError> {
        let eps = self.model.spec.norm_eps as f64;
        let width = input[0].len();
        let weight = self.vector(&format!("{name}.weight"), width)?;
        if self.model.spec.family != Family::Gpt2 {
            return Ok(scaled(&rms(input, eps), &weight));
        }
        let bias = self.vector(&format!("{name}.bias"), width)?;
        let centered: Rows = input
            .iter()
            .map(|row| {
                let mean = row.iter().sum::<f64>() / width as f64;
                row.iter().map(|x| x - mean).collect()
            })
            .collect();
        Ok(add(&scaled(&rms(&centered, eps), &weight), &vec![bias; input.len()]))
    }

    /// `x W^T + b`; the bias is optional but in gpt2.
    fn linear(&self, input: &Rows, name: &str, width: usize) -> Result<Rows, EngineError> {
        let weight = self.tensor(&format!("{name}.weight"), &[width, input[0].len()])?;
        let output = multiply(weight, input);
        let bias = format!("{name}.bias");
        if self.model.spec.family != Family::Gpt2 && !self.model.tensors.contains_key(&bias) {
            return Ok(output);
        }
        Ok(add(&output, &vec![self.vector(&bias, width)?; input.len()]))
    }

    fn attention(&self, input: &Rows, layer: usize) -> Result<Rows, EngineError> {
        let spec = &self.model.spec;
        let name = |part: &str| format!("blk.{layer}.{part}");
        let (width, share) = (spec.head_dim(), spec.n_heads / spec.n_kv_heads);
        let query = self.turn(self.linear(input, &name("attn_q"), spec.n_heads * width)?);
        let key = self.turn(self.linear(input, &name("attn_k"), spec.n_kv_heads * width)?);
        let value = self.linear(input, &name("attn_v"), spec.n_kv_heads * width)?;
        let mut mixed = vec![vec![0.0; spec.n_heads * width]; input.len()];
        for (position, mixed) in mixed.iter_mut().enumerate() {
            for (head, mixed) in mixed.chunks_mut(width).enumerate() {
                let own = head * width..(head + 1) * width;
                let shared = head / share * width..(head / share + 1) * width;
                let scores: Vec<f64> = key[..=position]
                    .iter()
                    .map(|key| {
                        dot(&query[position][own.clone()], &key[shared.clone()]) / (width as f64).sqrt()
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
                let total: f64 = weights.iter().sum();
                for (weight, value) in weights.iter().zip(&value) {
                    for (mixed, value) in mixed.iter_mut().zip(&value[shared.clone()]) {
                        *mixed += weight / total * value;
                    }
                }
            }
        }
        let mixed = self.sub_norm(mixed, &name("attn_sub_norm"))?;
        self.linear(&mixed, &name("attn_output"), spec.d_model)
    }

    /// The pair `(i, i + half)` of a head is a complex number, multiplied by `exp(i * angle)`.
    fn turn(&self, mut projected: Rows) -> Rows {
        let spec = &self.model.spec;
        if spec.family == Family::Gpt2 {
            return projected;
        }
        let (width, half) = (spec.head_dim(), spec.head_dim() / 2);
        for (position, row) in projected.iter_mut().enumerate() {
            for head in row.chunks_mut(width) {
                for i in 0..half {
                    let angle = position as f64 / (spec.rope_theta as f64).powf(i as f64 / half as f64);
                    let (x, y) = (head[i], head[i + half]);
                    head[i] = x * angle.cos() - y * angle.sin();
                    head[i + half] = x * angle.sin() + y * angle.cos();
                }
            }
        }
        projected
    }

    fn feed_forward(&self, input: &Rows, layer: usize) -> Result<Rows, EngineError> {
        let spec = &self.model.spec;
        let name = |part: &str| format!("blk.{layer}.{part}");
        let up = self.linear(input, &name("ffn_up"), spec.d_ff)?;
        let activated = |rows: Rows| -> Rows {
            rows.into_iter()
                .map(|row| row.into_iter().map(|x| activate(spec.activation, x)).collect())
                .collect()
        };
        let inner = if spec.is_gated() {
            let gate = activated(self.linear(input, &name("ffn_gate"), spec.d_ff)?);
            gate.iter().zip(&up).map(|(gate, up)| gate.iter().zip(up).map(|(g, u)| g * u).collect()).collect()
        } else {
            activated(up)
        };
        let inner = self.sub_norm(inner, &name("ffn_sub_norm"))?;
        self.linear(&inner, &name("ffn_down"), spec.d_model)
    }

    fn sub_norm(&self, input: Rows, name: &str) -> Result<Rows, EngineError> {
        if self.model.spec.family == Family::Bitnet { self.norm(&input, name) } else { Ok(input) }
    }
}

fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Gelu => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        Activation::Swiglu => x / (1.0 + (-x).exp()),
        Activation::SquaredRelu => x.max(0.0).powi(2),
    }
}

fn row(tensor: &Tensor, index: usize) -> Vec<f64> {
    let mut values = vec![0.0; tensor.cols()];
    tensor.read_row(index, &mut values);
    values.into_iter().map(f64::from).collect()
}

/// `x W^T`
fn multiply(weight: &Tensor, input: &Rows) -> Rows {
    let mut output = vec![Vec::with_capacity(weight.rows()); input.len()];
    for index in 0..weight.rows() {
        let weight = row(weight, index);
        output.iter_mut().zip(input).for_each(|(output, input)| output.push(dot(&weight, input)));
    }
    output
}

fn add(a: &Rows, b: &Rows) -> Rows {
    a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(a, b)| a + b).collect()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn scaled(input: &Rows, weight: &[f64]) -> Rows {
    input.iter().map(|row| row.iter().zip(weight).map(|(x, w)| x * w).collect()).collect()
}

fn rms(input: &Rows, eps: f64) -> Rows {
    let normalized = |row: &Vec<f64>| {
        let root = (dot(row, row) / row.len() as f64 + eps).sqrt();
        row.iter().map(|x| x / root).collect()
    };
    input.iter().map(normalized).collect()
}
