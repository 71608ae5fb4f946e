//! [`Cache`]: keys and values of one sequence, and attention over them.

use crate::ActivationMode;
use half::slice::HalfBitsSliceExt;
use ternary_format::ModelSpec;
use ternary_kernels::{
    Isa,
    attention::{self, Line, QUERIES},
};

/// Keys and values of all layers, for each layer those of one key-value head after the other.
///
/// Memory is taken from the system untouched, and becomes resident as the sequence grows.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    numbers: Numbers,
    /// Numbers of the keys, and of keys and values, of one head in one layer.
    keys: usize,
    head: usize,
    n_kv_heads: usize,
    head_dim: usize,
}

#[derive(Clone, Debug)]
enum Numbers {
    /// Bits of f16, for a vector of zero bits costs nothing; in the lines of [`attention`].
    Half(Vec<u16>),
    /// Position by position.
    Float(Vec<f32>),
}

/// Room for [`Cache::attend`].
#[derive(Debug)]
pub(crate) struct Scores(Vec<f32>);

impl Scores {
    pub fn new(context: usize) -> Self {
        Self(vec![0.0; QUERIES * attention::score_row(context)])
    }
}

impl Cache {
    pub fn new(spec: &ModelSpec, context: usize, activations: ActivationMode) -> Self {
        let (n_kv_heads, head_dim) = (spec.n_kv_heads, spec.head_dim());
        let heads = n_kv_heads * spec.n_layers;
        let line = size_of::<Line>() / 2;
        match activations {
            ActivationMode::Int8 => {
                let keys = attention::key_lines(context, head_dim) * line;
                let head = keys + attention::value_lines(context, head_dim) * line;
                Self { numbers: Numbers::Half(vec![0; head * heads]), keys, head, n_kv_heads, head_dim }
            }
            ActivationMode::F32 => {
                let (keys, head) = (context * head_dim, 2 * context * head_dim);
                Self { numbers: Numbers::Float(vec![0.0; head * heads]), keys, head, n_kv_heads, head_dim }
            }
        }
    }

    /// Writes the keys and values of a layer at a position: rows `[n_kv_heads * head_dim]`.
    pub fn store(&mut self, isa: Isa, layer: usize, position: usize, key: &[f32], value: &[f32]) {
        let head_dim = self.head_dim;
        let rows = key.chunks_exact(head_dim).zip(value.chunks_exact(head_dim));
        for (head, (key, value)) in rows.enumerate() {
            let start = (layer * self.n_kv_heads + head) * self.head;
            match &mut self.numbers {
                Numbers::Half(bits) => {
                    let (keys, values) = bits[start..start + self.head].split_at_mut(self.keys);
                    let (keys, values) = (keys.reinterpret_cast_mut(), values.reinterpret_cast_mut());
                    let (keys, values) = (keys.as_chunks_mut().0, values.as_chunks_mut().0);
                    attention::store(isa, position, key, value, keys, values);
                }
                Numbers::Float(floats) => {
                    let (keys, values) = floats[start..start + self.head].split_at_mut(self.keys);
                    let place = position * head_dim..(position + 1) * head_dim;
                    keys[place.clone()].copy_from_slice(key);
                    values[place].copy_from_slice(value);
                }
            }
        }
    }

    /// `out[t] = softmax(q[t] k^T / sqrt(head_dim)) v` over the first `seen[t]` positions.
    ///
    /// # Shapes
    /// queries and out `[seen.len(), head_dim]`
    #[allow(clippy::too_many_arguments)]
    pub fn attend(
        &self,
        isa: Isa,
        layer: usize,
        head: usize,
        queries: &[f32],
        seen: &[usize],
        Scores(scores): &mut Scores,
        out: &mut [f32],
    ) {
        let start = (layer * self.n_kv_heads + head) * self.head;
        match &self.numbers {
            Numbers::Half(bits) => {
                let (keys, values) = bits[start..start + self.head].split_at(self.keys);
                let (keys, values) = (keys.reinterpret_cast(), values.reinterpret_cast());
                attention::attend(isa, queries, seen, keys.as_chunks().0, values.as_chunks().0, scores, out);
            }
            Numbers::Float(floats) => {
                let width = self.head_dim;
                let (keys, values) = floats[start..start + self.head].split_at(self.keys);
                let rows = queries.chunks_exact(width).zip(out.chunks_exact_mut(width)).zip(seen);
                for ((query, out), seen) in rows {
                    let scores = &mut scores[..*seen];
                    for (score, key) in scores.iter_mut().zip(keys.chunks_exact(width)) {
                        let dot: f32 = query.iter().zip(key).map(|(q, k)| q * k).sum();
                        *score = dot / (width as f32).sqrt();
                    }
                    isa.softmax(scores);
                    out.fill(0.0);
                    for (weight, value) in scores.iter().zip(values.chunks_exact(width)) {
                        out.iter_mut().zip(value).for_each(|(out, v)| *out += weight * v);
                    }
                }
            }
        }
    }
}
