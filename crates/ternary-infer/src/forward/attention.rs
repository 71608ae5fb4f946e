//! Attention of the forward pass.
//!
//! ```text
//! q, k, v = norm(hidden) Wq, Wk, Wv                   every row of the batch
//! cache[position] = rotate(k), v                      per chunk
//! mixed = softmax(rotate(q) K^T / sqrt(head_dim)) V   per head and run of rows of one sequence
//! hidden += sub_norm(mixed) Wo
//! ```

use super::{
    Row, SequenceChunk, Workspace,
    activations::{norm_and_quantize, product, quantize_rows},
};
use crate::{
    cache::{KvCache, Scores},
    model::{Block, Model},
};
use std::{ops::Range, sync::Mutex};
use ternary_format::ModelSpec;
use ternary_kernels::{Isa, Product, multiply, nn::attention_cached::QUERIES_PER_PASS};

/// RoPE angles of all rows: cosines and sines, `[rows, head_dim / 2]` each. Empty in models with learned positions.
#[derive(Debug, Default)]
pub(super) struct RotaryAngles {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RotaryAngles {
    /// Computes the angles of the positions of `rows`.
    pub fn update(&mut self, spec: &ModelSpec, rows: &[Row]) {
        let half = spec.head_dim() / 2;
        self.cos.clear();
        self.sin.clear();
        for row in rows {
            for i in 0..half {
                let frequency = (spec.rope_theta as f64).powf(-(i as f64) / half as f64);
                let (sin, cos) = (row.position as f64 * frequency).sin_cos();
                self.cos.push(cos as f32);
                self.sin.push(sin as f32);
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.cos.is_empty()
    }

    /// Rotates a head of row `row` in place.
    fn rotate(&self, isa: Isa, row: usize, head: &mut [f32]) {
        if !self.is_empty() {
            let half = head.len() / 2;
            let angles = row * half..(row + 1) * half;
            isa.rope(head, &self.cos[angles.clone()], &self.sin[angles]);
        }
    }
}

/// Scratch buffers of one thread.
#[derive(Debug)]
pub(super) struct AttentionScratch {
    /// Queries of one head of several rows, rotated, `[QUERIES_PER_PASS, head_dim]`.
    queries: Vec<f32>,
    /// Their results, in the same shape.
    mixed: Vec<f32>,
    scores: Scores,
}

impl AttentionScratch {
    pub fn new(spec: &ModelSpec, context: usize) -> Self {
        let head = vec![0.0; QUERIES_PER_PASS * spec.head_dim()];
        Self { queries: head.clone(), mixed: head, scores: Scores::new(context) }
    }
}

impl Workspace {
    /// `hidden += output(attention(norm(hidden)))`
    pub(super) fn attention<S: SequenceChunk>(
        &mut self,
        model: &Model,
        layer: usize,
        block: &Block,
        chunks: &mut [S],
    ) {
        self.project(model, block);
        self.store(model, layer, chunks);
        self.attend(model, layer, chunks);
        self.add_output(model, block);
    }

    /// Computes queries, keys and values of all rows.
    fn project(&mut self, model: &Model, block: &Block) {
        let Self { pool, activations, rows, hidden, input, quantized, low_rank, query, key, value, .. } =
            self;
        let d = model.spec.d_model;
        let kv_width = model.spec.n_kv_heads * model.spec.head_dim();
        let x = norm_and_quantize(pool, *activations, &block.attention_norm, hidden, d, input, quantized);
        query.resize(rows.len() * d, 0.0);
        key.resize(rows.len() * kv_width, 0.0);
        value.resize(rows.len() * kv_width, 0.0);
        let mut products =
            [product(&block.query, query), product(&block.key, key), product(&block.value, value)];
        multiply(pool, &x, &mut products);
        low_rank.add(pool, &x, &block.query, query);
        low_rank.add(pool, &x, &block.key, key);
        low_rank.add(pool, &x, &block.value, value);
    }

    /// Rotates keys, and writes keys and values to the KV caches of their sequences.
    fn store<S: SequenceChunk>(&mut self, model: &Model, layer: usize, chunks: &mut [S]) {
        let Self { pool, rows, angles, key, value, .. } = self;
        let (head_dim, isa) = (model.spec.head_dim(), pool.isa());
        let kv_width = model.spec.n_kv_heads * head_dim;
        if !angles.is_empty() {
            pool.chunks(key, kv_width, |row, _, key| {
                key.chunks_exact_mut(head_dim).for_each(|head| angles.rotate(isa, row, head));
            });
        }
        pool.chunks(chunks, 1, |index, _, chunk| {
            let first = rows.partition_point(|row| row.chunk < index);
            let count = chunk[0].ids().len();
            let cache = &mut chunk[0].sequence_mut().cache;
            for (at, row) in (first..).zip(&rows[first..first + count]) {
                let values = at * kv_width..(at + 1) * kv_width;
                cache.store(isa, layer, row.position, &key[values.clone()], &value[values]);
            }
        });
    }

    /// Computes `mixed`, the weighted sums of values, of all rows and heads.
    fn attend<S: SequenceChunk>(&mut self, model: &Model, layer: usize, chunks: &[S]) {
        let Self { pool, rows, angles, query, mixed, scratch, .. } = self;
        let (d, head_dim) = (model.spec.d_model, model.spec.head_dim());
        let attention = Attention {
            isa: pool.isa(),
            layer,
            d,
            head_dim,
            heads_per_kv_head: model.spec.n_heads / model.spec.n_kv_heads,
            query,
            angles,
        };
        mixed.resize(rows.len() * d, 0.0);
        let task_len = task_len(&model.spec, rows.len(), pool.threads());
        pool.chunks(mixed, task_len, |task, thread, out| {
            let scratch: &Mutex<AttentionScratch> = &scratch[thread];
            let scratch = &mut *scratch.lock().expect("no thread has panicked");
            let width = out.len().min(d);
            let first_row = task * task_len / d;
            let first_head = task * task_len % d / head_dim;
            let heads = first_head..first_head + width / head_dim;
            let rows = &rows[first_row..first_row + out.len() / width];
            for head in heads.clone() {
                let mut done = 0;
                for run in rows.chunk_by(|a, b| a.chunk == b.chunk) {
                    let cache = &chunks[run[0].chunk].sequence().cache;
                    let mixed = attention.head(cache, first_row + done, run, head, &heads, scratch);
                    for (t, mixed) in mixed.chunks_exact(head_dim).enumerate() {
                        let start = (done + t) * width + (head - first_head) * head_dim;
                        out[start..start + head_dim].copy_from_slice(mixed);
                    }
                    done += run.len();
                }
            }
        });
    }

    /// `hidden += output(sub_norm(mixed))`
    fn add_output(&mut self, model: &Model, block: &Block) {
        let Self { pool, activations, hidden, input, quantized, low_rank, mixed, .. } = self;
        let d = model.spec.d_model;
        let x = match &block.attention_sub_norm {
            Some(norm) => norm_and_quantize(pool, *activations, norm, mixed, d, input, quantized),
            None => quantize_rows(pool, *activations, mixed, d, quantized, |_, _| ()),
        };
        multiply(pool, &x, &mut [Product { add: true, ..product(&block.output, hidden) }]);
        low_rank.add(pool, &x, &block.output, hidden);
    }
}

/// Number of consecutive values of `mixed`, `[rows, n_heads * head_dim]`, that one task computes.
///
/// Many rows are split by rows: those of one sequence share passes over its keys and values. Few rows are split by heads,
/// so that no thread is idle; a task gets several heads, since the next head is prefetched while one is computed.
fn task_len(spec: &ModelSpec, rows: usize, threads: usize) -> usize {
    if rows >= 4 * QUERIES_PER_PASS * threads {
        return QUERIES_PER_PASS * spec.d_model;
    }
    let fits =
        |heads: &usize| spec.n_heads.is_multiple_of(*heads) && rows * spec.n_heads >= 8 * threads * heads;
    (1..=4).rev().find(fits).unwrap_or(1) * spec.head_dim()
}

/// What all tasks of a layer read.
struct Attention<'a> {
    isa: Isa,
    layer: usize,
    d: usize,
    head_dim: usize,
    /// Query heads that share a key-value head (grouped-query attention).
    heads_per_kv_head: usize,
    /// `[rows, d]`
    query: &'a [f32],
    angles: &'a RotaryAngles,
}

impl Attention<'_> {
    /// Attention of one head over the cache of one sequence, for its rows `rows`, the first of which is row `first` of the
    /// batch. Prefetches the key-value head of the next of `heads`.
    ///
    /// # Shapes
    /// `[rows, head_dim]`; at most `QUERIES_PER_PASS` rows
    fn head<'a>(
        &self,
        cache: &KvCache,
        first: usize,
        rows: &[Row],
        head: usize,
        heads: &Range<usize>,
        scratch: &'a mut AttentionScratch,
    ) -> &'a [f32] {
        let AttentionScratch { queries, mixed, scores } = scratch;
        let (head_dim, len) = (self.head_dim, rows.len() * self.head_dim);
        let mut seen = [0; QUERIES_PER_PASS];
        let targets = queries[..len].chunks_exact_mut(head_dim).zip(&mut seen);
        for ((index, row), (query, seen)) in (first..).zip(rows).zip(targets) {
            query.copy_from_slice(&self.query[index * self.d + head * head_dim..][..head_dim]);
            self.angles.rotate(self.isa, index, query);
            *seen = row.position + 1;
        }
        let (kv_head, next) = (head / self.heads_per_kv_head, (head + 1) / self.heads_per_kv_head);
        if heads.contains(&(head + 1)) && next != kv_head {
            cache.prefetch(self.isa, self.layer, next, seen[0]);
        }
        let (queries, seen, mixed) = (&queries[..len], &seen[..rows.len()], &mut mixed[..len]);
        cache.attend(self.isa, self.layer, kv_head, queries, seen, scores, mixed);
        mixed
    }
}
