//! [`Cache`]: the KV cache of one sequence, and attention over it.

use crate::{ActivationMode, CacheType, EngineOptions};
use half::slice::HalfBitsSliceExt;
use std::ops::Range;
use ternary_format::ModelSpec;
use ternary_kernels::{
    Isa,
    nn::attention_cached::{self as attention, KvHead, KvHeadMut, KvLine, QUERIES_PER_PASS},
};

/// Keys and values of all layers: layer by layer, and within a layer one key-value head after the other.
///
/// The memory is mapped untouched, and becomes resident as the sequence grows.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    numbers: Numbers,
    n_kv_heads: usize,
    head_dim: usize,
    /// Length of the keys of one head in one layer, and of its values.
    keys: usize,
    values: usize,
    /// Number of scales of each.
    scales: usize,
}

#[derive(Clone, Debug)]
enum Numbers {
    /// f16 as bits, because a zeroed vector of integers costs nothing; layout of [`attention`].
    F16(Vec<u16>),
    /// int8 codes and scales, in the same layout.
    Int8(Vec<i8>, Vec<f32>),
    /// f32, position by position.
    Float(Vec<f32>),
}

/// Keys and values of one head.
enum View<'a> {
    Lines(KvHead<'a>),
    Floats { keys: &'a [f32], values: &'a [f32] },
}

/// Scratch buffers of [`Cache::attend`].
#[derive(Debug)]
pub(crate) struct Scores(Vec<f32>);

impl Scores {
    pub fn new(context: usize) -> Self {
        Self(vec![0.0; QUERIES_PER_PASS * attention::score_row_len(context)])
    }
}

impl Cache {
    pub fn new(spec: &ModelSpec, options: &EngineOptions) -> Self {
        let context = options.context;
        let (n_kv_heads, head_dim) = (spec.n_kv_heads, spec.head_dim());
        let heads = n_kv_heads * spec.n_layers;
        let line = size_of::<KvLine<i8>>();
        let keys = attention::key_lines(context, head_dim) * line;
        let values = attention::value_lines(context, head_dim) * line;
        let scales = 2 * attention::score_row_len(context);
        let cache = |numbers, keys, values| Self { numbers, n_kv_heads, head_dim, keys, values, scales };
        match (options.activations, options.cache) {
            (ActivationMode::F32, _) => {
                let rows = context * head_dim;
                cache(Numbers::Float(vec![0.0; 2 * rows * heads]), rows, rows)
            }
            (ActivationMode::Int8, CacheType::F16) => {
                cache(Numbers::F16(vec![0; (keys + values) * heads]), keys, values)
            }
            (ActivationMode::Int8, CacheType::Int8) => {
                let codes = vec![0; (keys + values) * heads];
                cache(Numbers::Int8(codes, vec![0.0; scales * heads]), keys, values)
            }
        }
    }

    /// When the context is full.
    pub fn bytes(&self) -> usize {
        match &self.numbers {
            Numbers::F16(bits) => size_of_val(&bits[..]),
            Numbers::Int8(codes, scales) => size_of_val(&codes[..]) + size_of_val(&scales[..]),
            Numbers::Float(floats) => size_of_val(&floats[..]),
        }
    }

    /// Copies the first positions of a cache of the same shape, and touches no memory beyond them.
    ///
    /// # Panics
    /// When the shapes differ.
    pub fn copy_from(&mut self, other: &Self, positions: usize) {
        let head_dim = self.head_dim;
        let line = size_of::<KvLine<i8>>();
        let keys = (self.keys, attention::key_lines(positions, head_dim) * line);
        let values = (self.values, attention::value_lines(positions, head_dim) * line);
        let scales = (self.scales, 2 * attention::score_row_len(positions));
        match (&mut self.numbers, &other.numbers) {
            (Numbers::F16(to), Numbers::F16(from)) => copy(to, from, &[keys, values]),
            (Numbers::Int8(to, to_scales), Numbers::Int8(from, from_scales)) => {
                copy(to, from, &[keys, values]);
                copy(to_scales, from_scales, &[scales]);
            }
            (Numbers::Float(to), Numbers::Float(from)) => {
                let rows = positions * head_dim;
                copy(to, from, &[(self.keys, rows), (self.values, rows)]);
            }
            _ => panic!("caches of two kinds"),
        }
    }

    /// The ranges of one head: of its components, and of its scales.
    fn place(&self, layer: usize, head: usize) -> (Range<usize>, Range<usize>) {
        let index = layer * self.n_kv_heads + head;
        let part = |len: usize| index * len..(index + 1) * len;
        (part(self.keys + self.values), part(self.scales))
    }

    /// Writes the keys and values of a layer at a position: rows `[n_kv_heads * head_dim]`.
    pub fn store(&mut self, isa: Isa, layer: usize, position: usize, key: &[f32], value: &[f32]) {
        let head_dim = self.head_dim;
        let rows = key.chunks_exact(head_dim).zip(value.chunks_exact(head_dim));
        for (head, (key, value)) in rows.enumerate() {
            let (numbers, scales) = self.place(layer, head);
            let head = match &mut self.numbers {
                Numbers::F16(bits) => {
                    let (keys, values) = bits[numbers].split_at_mut(self.keys);
                    let (keys, values) = (keys.reinterpret_cast_mut(), values.reinterpret_cast_mut());
                    KvHeadMut::F16 { keys: keys.as_chunks_mut().0, values: values.as_chunks_mut().0 }
                }
                Numbers::Int8(codes, floats) => {
                    let (keys, values) = codes[numbers].split_at_mut(self.keys);
                    let scales = floats[scales].as_chunks_mut().0.as_chunks_mut().0;
                    KvHeadMut::Int8 { keys: keys.as_chunks_mut().0, values: values.as_chunks_mut().0, scales }
                }
                Numbers::Float(floats) => {
                    let (keys, values) = floats[numbers].split_at_mut(self.keys);
                    let place = position * head_dim..(position + 1) * head_dim;
                    keys[place.clone()].copy_from_slice(key);
                    values[place].copy_from_slice(value);
                    continue;
                }
            };
            attention::store(isa, position, key, value, head);
        }
    }

    fn head(&self, layer: usize, head: usize) -> View<'_> {
        let (numbers, scales) = self.place(layer, head);
        match &self.numbers {
            Numbers::F16(bits) => {
                let (keys, values) = bits[numbers].split_at(self.keys);
                let (keys, values) = (keys.reinterpret_cast(), values.reinterpret_cast());
                View::Lines(KvHead::F16 { keys: keys.as_chunks().0, values: values.as_chunks().0 })
            }
            Numbers::Int8(codes, floats) => {
                let (keys, values) = codes[numbers].split_at(self.keys);
                let scales = floats[scales].as_chunks().0.as_chunks().0;
                let (keys, values) = (keys.as_chunks().0, values.as_chunks().0);
                View::Lines(KvHead::Int8 { keys, values, scales })
            }
            Numbers::Float(floats) => {
                let (keys, values) = floats[numbers].split_at(self.keys);
                View::Floats { keys, values }
            }
        }
    }

    /// Prefetches the first cache lines that [`attend`](Self::attend) reads.
    pub fn prefetch(&self, isa: Isa, layer: usize, head: usize, positions: usize) {
        if let View::Lines(head) = self.head(layer, head) {
            attention::prefetch(isa, positions, self.head_dim, head);
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
        let width = self.head_dim;
        let (keys, values) = match self.head(layer, head) {
            View::Lines(head) => return attention::attend(isa, queries, seen, head, scores, out),
            View::Floats { keys, values } => (keys, values),
        };
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

/// Copies the beginning of each part of every head; parts are given as (length, elements to copy).
fn copy<T: Copy>(to: &mut [T], from: &[T], parts: &[(usize, usize)]) {
    assert_eq!(to.len(), from.len(), "numbers of two caches");
    let head = parts.iter().map(|part| part.0).sum();
    for (to, from) in to.chunks_exact_mut(head).zip(from.chunks_exact(head)) {
        let mut start = 0;
        for (length, count) in parts {
            to[start..start + count].copy_from_slice(&from[start..start + count]);
            start += length;
        }
    }
}
