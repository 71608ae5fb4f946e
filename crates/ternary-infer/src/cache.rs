//! [`Cache`]: keys and values of one sequence, and attention over them.

use crate::ActivationMode;
use half::{f16, slice::HalfBitsSliceExt};
use ternary_format::ModelSpec;
use ternary_kernels::Isa;

/// Keys and values of all layers: for each layer and key-value head `[context, head_dim]` keys, then as many values.
///
/// Memory is taken from the system untouched, and becomes resident as the sequence grows.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    values: Values,
    /// Keys or values of one head in one layer.
    len: usize,
    n_kv_heads: usize,
    head_dim: usize,
}

#[derive(Clone, Debug)]
enum Values {
    /// Bits of f16, for a vector of zero bits costs nothing.
    Half(Vec<u16>),
    Float(Vec<f32>),
}

/// Keys and values of one head in one layer.
pub(crate) enum Head<'a> {
    Half { keys: &'a [f16], values: &'a [f16] },
    Float { keys: &'a [f32], values: &'a [f32] },
}

/// A head that keys and values are written to.
pub(crate) enum HeadMut<'a> {
    Half { keys: &'a mut [f16], values: &'a mut [f16] },
    Float { keys: &'a mut [f32], values: &'a mut [f32] },
}

impl Cache {
    pub fn new(spec: &ModelSpec, context: usize, activations: ActivationMode) -> Self {
        let len = context * spec.head_dim();
        let total = 2 * len * spec.n_kv_heads * spec.n_layers;
        let values = match activations {
            ActivationMode::Int8 => Values::Half(vec![0; total]),
            ActivationMode::F32 => Values::Float(vec![0.0; total]),
        };
        Self { values, len, n_kv_heads: spec.n_kv_heads, head_dim: spec.head_dim() }
    }

    pub fn head(&self, layer: usize, head: usize) -> Head<'_> {
        let start = 2 * self.len * (layer * self.n_kv_heads + head);
        let (keys, values) = (start..start + self.len, start + self.len..start + 2 * self.len);
        match &self.values {
            Values::Half(bits) => {
                Head::Half { keys: bits[keys].reinterpret_cast(), values: bits[values].reinterpret_cast() }
            }
            Values::Float(floats) => Head::Float { keys: &floats[keys], values: &floats[values] },
        }
    }

    pub fn head_mut(&mut self, layer: usize, head: usize) -> HeadMut<'_> {
        let start = 2 * self.len * (layer * self.n_kv_heads + head);
        let range = start..start + 2 * self.len;
        match &mut self.values {
            Values::Half(bits) => {
                let (keys, values) = bits[range].reinterpret_cast_mut().split_at_mut(self.len);
                HeadMut::Half { keys, values }
            }
            Values::Float(floats) => {
                let (keys, values) = floats[range].split_at_mut(self.len);
                HeadMut::Float { keys, values }
            }
        }
    }

    /// Writes the keys and values of a layer at a position: rows `[n_kv_heads * head_dim]`.
    pub fn store(&mut self, isa: Isa, layer: usize, position: usize, key: &[f32], value: &[f32]) {
        let head_dim = self.head_dim;
        let rows = key.chunks_exact(head_dim).zip(value.chunks_exact(head_dim));
        for (head, (key, value)) in rows.enumerate() {
            let place = position * head_dim..(position + 1) * head_dim;
            match self.head_mut(layer, head) {
                HeadMut::Half { keys, values } => {
                    isa.to_f16(key, &mut keys[place.clone()]);
                    isa.to_f16(value, &mut values[place]);
                }
                HeadMut::Float { keys, values } => {
                    keys[place.clone()].copy_from_slice(key);
                    values[place].copy_from_slice(value);
                }
            }
        }
    }
}

impl Head<'_> {
    /// `out = softmax(q k^T / sqrt(head_dim)) v` over as many positions as there are `scores`.
    pub fn attend(&self, isa: Isa, query: &[f32], scores: &mut [f32], out: &mut [f32]) {
        let width = query.len();
        let scale = 1.0 / (width as f32).sqrt();
        match self {
            Self::Half { keys, values } => {
                isa.scores(query, keys, width, scale, scores);
                isa.softmax(scores);
                isa.weighted_sum(scores, values, width, out);
            }
            Self::Float { keys, values } => {
                for (score, key) in scores.iter_mut().zip(keys.chunks_exact(width)) {
                    *score = scale * query.iter().zip(key).map(|(q, k)| q * k).sum::<f32>();
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
