//! [`KvCache`]: the KV cache of one sequence, and attention over it.
//!
//! ```text
//! layer 0: [head 0: [keys] [values]] [head 1: [keys] [values]] ...   n_kv_heads heads
//! layer 1: ...
//! ```
//!
//! [`attention_cached`](ternary_kernels::nn::attention_cached) defines the layout of the keys and values of one head in f16
//! and int8; in f32 they are stored position by position.

use crate::{ActivationMode, CacheType, EngineOptions};
use half::slice::HalfBitsSliceExt;
use std::ops::Range;
use ternary_format::ModelSpec;
use ternary_kernels::{
    Isa,
    nn::attention_cached::{self as attention, KvHead, KvHeadMut, KvLine, QUERIES_PER_PASS},
};

/// Keys and values of all layers.
///
/// Its memory is zeroed on demand by the system, so that it becomes resident only as the sequence grows.
#[derive(Clone, Debug)]
pub(crate) struct KvCache {
    storage: Storage,
    n_kv_heads: usize,
    head_dim: usize,
    /// Stored components of the keys of one head in one layer.
    keys: usize,
    /// Stored components of its values.
    values: usize,
    /// Scales of its keys and values.
    scales: usize,
}

#[derive(Clone, Debug)]
enum Storage {
    /// f16 as bits, because a zeroed vector of integers costs nothing.
    F16(Vec<u16>),
    /// Int8 codes and scales.
    Int8(Vec<i8>, Vec<f32>),
    F32(Vec<f32>),
}

/// Keys and values of one head.
enum HeadView<'a> {
    Packed(KvHead<'a>),
    F32 { keys: &'a [f32], values: &'a [f32] },
}

/// Scratch buffers of [`KvCache::attend`].
#[derive(Debug)]
pub(crate) struct Scores(Vec<f32>);

impl Scores {
    pub fn new(context: usize) -> Self {
        Self(vec![0.0; QUERIES_PER_PASS * attention::score_row_len(context)])
    }
}

impl KvCache {
    pub fn new(spec: &ModelSpec, options: &EngineOptions) -> Self {
        let context = options.context;
        let (n_kv_heads, head_dim) = (spec.n_kv_heads, spec.head_dim());
        let heads = n_kv_heads * spec.n_layers;
        let line = size_of::<KvLine<i8>>();
        let keys = attention::key_lines(context, head_dim) * line;
        let values = attention::value_lines(context, head_dim) * line;
        let scales = 2 * attention::score_row_len(context);
        let cache = |storage, keys, values| Self { storage, n_kv_heads, head_dim, keys, values, scales };
        match (options.activations, options.cache) {
            (ActivationMode::F32, _) => {
                let rows = context * head_dim;
                cache(Storage::F32(vec![0.0; 2 * rows * heads]), rows, rows)
            }
            (ActivationMode::Int8, CacheType::F16) => {
                cache(Storage::F16(vec![0; (keys + values) * heads]), keys, values)
            }
            (ActivationMode::Int8, CacheType::Int8) => {
                let codes = vec![0; (keys + values) * heads];
                cache(Storage::Int8(codes, vec![0.0; scales * heads]), keys, values)
            }
        }
    }

    /// Size in bytes when the context is full.
    pub fn bytes(&self) -> usize {
        match &self.storage {
            Storage::F16(bits) => size_of_val(&bits[..]),
            Storage::Int8(codes, scales) => size_of_val(&codes[..]) + size_of_val(&scales[..]),
            Storage::F32(floats) => size_of_val(&floats[..]),
        }
    }

    /// Copies the first positions of a cache of the same shape. Memory beyond them is not accessed.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn copy_from(&mut self, other: &Self, positions: usize) {
        let head_dim = self.head_dim;
        let line = size_of::<KvLine<i8>>();
        let keys = (self.keys, attention::key_lines(positions, head_dim) * line);
        let values = (self.values, attention::value_lines(positions, head_dim) * line);
        let scales = (self.scales, 2 * attention::score_row_len(positions));
        match (&mut self.storage, &other.storage) {
            (Storage::F16(to), Storage::F16(from)) => copy(to, from, &[keys, values]),
            (Storage::Int8(to, to_scales), Storage::Int8(from, from_scales)) => {
                copy(to, from, &[keys, values]);
                copy(to_scales, from_scales, &[scales]);
            }
            (Storage::F32(to), Storage::F32(from)) => {
                let rows = positions * head_dim;
                copy(to, from, &[(self.keys, rows), (self.values, rows)]);
            }
            _ => panic!("KV caches of two types"),
        }
    }

    /// Ranges of the components and of the scales of one head.
    fn head_ranges(&self, layer: usize, head: usize) -> (Range<usize>, Range<usize>) {
        let index = layer * self.n_kv_heads + head;
        let part = |len: usize| index * len..(index + 1) * len;
        (part(self.keys + self.values), part(self.scales))
    }

    /// Writes the key and value of one position in a layer.
    ///
    /// # Shapes
    /// key and value `[n_kv_heads * head_dim]`
    pub fn store(&mut self, isa: Isa, layer: usize, position: usize, key: &[f32], value: &[f32]) {
        let head_dim = self.head_dim;
        let rows = key.chunks_exact(head_dim).zip(value.chunks_exact(head_dim));
        for (head, (key, value)) in rows.enumerate() {
            let (components, scales) = self.head_ranges(layer, head);
            let head = match &mut self.storage {
                Storage::F16(bits) => {
                    let (keys, values) = bits[components].split_at_mut(self.keys);
                    let (keys, values) = (keys.reinterpret_cast_mut(), values.reinterpret_cast_mut());
                    KvHeadMut::F16 { keys: keys.as_chunks_mut().0, values: values.as_chunks_mut().0 }
                }
                Storage::Int8(codes, floats) => {
                    let (keys, values) = codes[components].split_at_mut(self.keys);
                    let scales = floats[scales].as_chunks_mut().0.as_chunks_mut().0;
                    KvHeadMut::Int8 { keys: keys.as_chunks_mut().0, values: values.as_chunks_mut().0, scales }
                }
                Storage::F32(floats) => {
                    let (keys, values) = floats[components].split_at_mut(self.keys);
                    let row = position * head_dim..(position + 1) * head_dim;
                    keys[row.clone()].copy_from_slice(key);
                    values[row].copy_from_slice(value);
                    continue;
                }
            };
            attention::store(isa, position, key, value, head);
        }
    }

    fn head(&self, layer: usize, head: usize) -> HeadView<'_> {
        let (components, scales) = self.head_ranges(layer, head);
        match &self.storage {
            Storage::F16(bits) => {
                let (keys, values) = bits[components].split_at(self.keys);
                let (keys, values) = (keys.reinterpret_cast(), values.reinterpret_cast());
                HeadView::Packed(KvHead::F16 { keys: keys.as_chunks().0, values: values.as_chunks().0 })
            }
            Storage::Int8(codes, floats) => {
                let (keys, values) = codes[components].split_at(self.keys);
                let scales = floats[scales].as_chunks().0.as_chunks().0;
                let (keys, values) = (keys.as_chunks().0, values.as_chunks().0);
                HeadView::Packed(KvHead::Int8 { keys, values, scales })
            }
            Storage::F32(floats) => {
                let (keys, values) = floats[components].split_at(self.keys);
                HeadView::F32 { keys, values }
            }
        }
    }

    /// Prefetches the first cache lines that [`attend`](Self::attend) reads.
    pub fn prefetch(&self, isa: Isa, layer: usize, head: usize, positions: usize) {
        if let HeadView::Packed(head) = self.head(layer, head) {
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
            HeadView::Packed(head) => return attention::attend(isa, queries, seen, head, scores, out),
            HeadView::F32 { keys, values } => (keys, values),
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

/// Copies the first elements of each part of every head. A part is `(length, elements to copy)`.
fn copy<T: Copy>(to: &mut [T], from: &[T], parts: &[(usize, usize)]) {
    assert_eq!(to.len(), from.len(), "components of two caches");
    let head = parts.iter().map(|part| part.0).sum();
    for (to, from) in to.chunks_exact_mut(head).zip(from.chunks_exact(head)) {
        let mut start = 0;
        for (length, count) in parts {
            to[start..start + count].copy_from_slice(&from[start..start + count]);
            start += length;
        }
    }
}
