//! The forward pass in float64, written as plainly as possible. Tests compare the engine with it.

use crate::{EngineError, engine::check_ids};
use ternary_format::{Activation, Family, PackedModel, Tensor};

/// `[positions][width]`
type Rows = Vec<Vec<f64>>;

/// Logits of the next token at every position, `[ids][vocab]`, with float activations.
///
/// # Errors
/// `Format`: the tensors are not those of the spec. `EmptyPrompt`, `UnknownToken`, `ContextFull`: the ids do not fit.
pub fn logits(model: &PackedModel, ids: &[u32]) -> Result<Rows, EngineError> {
    model.validate()?;
    check_ids(ids, model.spec.vocab_size)?;
    if ids.len() > model.spec.context {
        return Err(EngineError::ContextFull { found: ids.len(), context: model.spec.context });
    }
    let reference = Reference { model };
    let spec = &model.spec;
    let table = &model.tensors["token_embd.weight"];
    let mut hidden: Rows = ids.iter().map(|id| row(table, *id as usize)).collect();
    if spec.family == Family::Gpt2 {
        let positions = &model.tensors["position_embd.weight"];
        let positions: Rows = (0..ids.len()).map(|position| row(positions, position)).collect();
        hidden = add(&hidden, &positions);
    }
    for layer in 0..spec.n_layers {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let input = reference.norm(&hidden, &name("attn_norm"));
        hidden = add(&hidden, &reference.attention(&input, layer));
        let input = reference.norm(&hidden, &name("ffn_norm"));
        hidden = add(&hidden, &reference.feed_forward(&input, layer));
    }
    let hidden = reference.norm(&hidden, "output_norm");
    let head = if spec.tied { table } else { &model.tensors["output.weight"] };
    Ok(multiply(head, &hidden))
}

struct Reference<'a> {
    model: &'a PackedModel,
}

impl Reference<'_> {
    fn vector(&self, name: &str) -> Option<Vec<f64>> {
        self.model.tensors.get(name).map(|tensor| row(tensor, 0))
    }

    fn norm(&self, input: &Rows, name: &str) -> Rows {
        let eps = self.model.spec.norm_eps as f64;
        let weight = self.vector(&format!("{name}.weight")).expect("a norm has a weight");
        let Some(bias) = self.vector(&format!("{name}.bias")) else {
            return scaled(&rms(input, eps), &weight);
        };
        let centered: Rows = input
            .iter()
            .map(|row| {
                let mean = row.iter().sum::<f64>() / row.len() as f64;
                row.iter().map(|x| x - mean).collect()
            })
            .collect();
        add(&scaled(&rms(&centered, eps), &weight), &vec![bias; input.len()])
    }

    /// `x W^T + b`
    fn linear(&self, input: &Rows, name: &str) -> Rows {
        let weight = format!("{name}.weight");
        let output = self.adapted(multiply(&self.model.tensors[&weight], input), input, &weight);
        match self.vector(&format!("{name}.bias")) {
            Some(bias) => add(&output, &vec![bias; input.len()]),
            None => output,
        }
    }

    /// `y + scale B (A x)`
    fn adapted(&self, output: Rows, input: &Rows, weight: &str) -> Rows {
        let Some(pair) = self.model.adapter.as_ref().and_then(|adapter| adapter.pairs.get(weight)) else {
            return output;
        };
        let rows = |factor: &[f32], width: usize| -> Rows {
            factor.chunks(width).map(|row| row.iter().map(|value| f64::from(*value)).collect()).collect()
        };
        let [_, inputs] = pair.shape();
        let (a, b) = (rows(pair.a(), inputs), rows(pair.b(), pair.rank()));
        let product = |input: &Vec<f64>| -> Vec<f64> {
            let inner: Vec<f64> = a.iter().map(|row| dot(row, input)).collect();
            b.iter().map(|row| pair.alpha() / pair.rank() as f64 * dot(row, &inner)).collect()
        };
        add(&output, &input.iter().map(product).collect())
    }

    fn attention(&self, input: &Rows, layer: usize) -> Rows {
        let spec = &self.model.spec;
        let name = |part: &str| format!("blk.{layer}.{part}");
        let (width, share) = (spec.head_dim(), spec.n_heads / spec.n_kv_heads);
        let query = self.rotate(self.linear(input, &name("attn_q")));
        let key = self.rotate(self.linear(input, &name("attn_k")));
        let value = self.linear(input, &name("attn_v"));
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
        let mixed = self.sub_norm(mixed, &name("attn_sub_norm"));
        self.linear(&mixed, &name("attn_output"))
    }

    /// The pair `(i, i + half)` of a head is a complex number, multiplied by `exp(i * angle)`.
    fn rotate(&self, mut projected: Rows) -> Rows {
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

    fn feed_forward(&self, input: &Rows, layer: usize) -> Rows {
        let spec = &self.model.spec;
        let name = |part: &str| format!("blk.{layer}.{part}");
        let up = self.linear(input, &name("ffn_up"));
        let activated = |rows: Rows| -> Rows {
            rows.into_iter()
                .map(|row| row.into_iter().map(|x| activate(spec.activation, x)).collect())
                .collect()
        };
        let inner = if spec.is_gated() {
            let gate = activated(self.linear(input, &name("ffn_gate")));
            gate.iter().zip(&up).map(|(gate, up)| gate.iter().zip(up).map(|(g, u)| g * u).collect()).collect()
        } else {
            activated(up)
        };
        let inner = self.sub_norm(inner, &name("ffn_sub_norm"));
        self.linear(&inner, &name("ffn_down"))
    }

    fn sub_norm(&self, input: Rows, name: &str) -> Rows {
        if self.model.spec.family == Family::Bitnet { self.norm(&input, name) } else { input }
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
