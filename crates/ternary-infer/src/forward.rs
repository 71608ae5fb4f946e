//! The forward pass: tokens of one or several sequences through all layers.

use crate::{
    ActivationMode, Sequence,
    cache::Scores,
    model::{Block, Linear, Model, Norm, Pair},
};
use std::sync::Mutex;
use ternary_format::Activation;
use ternary_kernels::{
    Activations, Int8Activations, Pool, Product, multiply, nn::attention_cached::QUERIES_PER_PASS,
};

/// The next tokens of one sequence.
pub(crate) trait Segment: Send + Sync {
    fn ids(&self) -> &[u32];
    fn sequence(&self) -> &Sequence;
    fn sequence_mut(&mut self) -> &mut Sequence;
}

impl Segment for (&mut Sequence, u32) {
    fn ids(&self) -> &[u32] {
        std::slice::from_ref(&self.1)
    }

    fn sequence(&self) -> &Sequence {
        self.0
    }

    fn sequence_mut(&mut self) -> &mut Sequence {
        self.0
    }
}

impl Segment for (&mut Sequence, &[u32]) {
    fn ids(&self) -> &[u32] {
        self.1
    }

    fn sequence(&self) -> &Sequence {
        self.0
    }

    fn sequence_mut(&mut self) -> &mut Sequence {
        self.0
    }
}

/// Sequence and position of a row.
#[derive(Clone, Copy, Debug)]
struct Row {
    segment: usize,
    position: usize,
}

/// Thread pool and scratch buffers of the forward pass, reused by the next one.
#[derive(Debug)]
pub(crate) struct Work {
    pub pool: Pool,
    activations: ActivationMode,
    rows: Vec<Row>,
    /// Cosines and sines of the rotary angles, `[rows, head_dim / 2]` each.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// `[rows, d_model]`
    hidden: Vec<f32>,
    /// Input of matrices, `[rows, d_model or d_ff]`
    input: Vec<f32>,
    quantized: Int8Activations,
    low_rank: LowRank,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    mixed: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// `[segments, vocab]`
    logits: Vec<f32>,
    /// One per thread.
    scratch: Vec<Mutex<Scratch>>,
}

/// Scratch buffers of LoRA adapters.
#[derive(Debug, Default)]
struct LowRank {
    /// Input of the layer, `[rows, in]`
    input: Vec<f32>,
    /// `[rows, rank]`
    inner: Vec<f32>,
}

impl LowRank {
    /// Adds the output of the adapter of `linear` to `out`, if it has one.
    fn add(&mut self, pool: &Pool, x: &Activations, linear: &Linear, out: &mut [f32]) {
        let Some(Pair { a, b }) = &linear.pair else { return };
        let input = x.dequantized(&linear.matrix, &mut self.input);
        self.inner.resize(x.tokens() * a.rows(), 0.0);
        multiply(pool, &Activations::f32(input, a.cols()), &mut [Product::new(a, &mut self.inner)]);
        let product = Product { add: true, ..Product::new(b, out) };
        multiply(pool, &Activations::f32(&self.inner, b.cols()), &mut [product]);
    }
}

/// Scratch buffers of attention in one thread.
#[derive(Debug)]
struct Scratch {
    /// One head of several rows, `[QUERIES_PER_PASS, head_dim]`.
    queries: Vec<f32>,
    mixed: Vec<f32>,
    scores: Scores,
}

impl Work {
    pub fn new(model: &Model, pool: Pool, activations: ActivationMode, context: usize) -> Self {
        let head = vec![0.0; QUERIES_PER_PASS * model.spec.head_dim()];
        let scratch = || Scratch { queries: head.clone(), mixed: head.clone(), scores: Scores::new(context) };
        let scratch = (0..pool.threads()).map(|_| Mutex::new(scratch())).collect();
        Self {
            pool,
            activations,
            rows: Vec::new(),
            cos: Vec::new(),
            sin: Vec::new(),
            hidden: Vec::new(),
            input: Vec::new(),
            quantized: Int8Activations::default(),
            low_rank: LowRank::default(),
            query: Vec::new(),
            key: Vec::new(),
            value: Vec::new(),
            mixed: Vec::new(),
            gate: Vec::new(),
            up: Vec::new(),
            logits: Vec::new(),
            scratch,
        }
    }

    /// Appends the ids of each segment to its sequence; `self.hidden` is then the input of the final norm.
    pub fn forward<S: Segment>(&mut self, model: &Model, segments: &mut [S]) {
        self.embed(model, segments);
        for (layer, block) in model.blocks.iter().enumerate() {
            self.attention(model, layer, block, segments);
            self.feed_forward(model.spec.activation, block);
        }
        for segment in segments {
            let length = segment.ids().len();
            segment.sequence_mut().length += length;
        }
    }

    /// Computes the logits of each segment's last row, into its sequence.
    pub fn last_logits<S: Segment>(&mut self, model: &Model, segments: &mut [S]) {
        let (d, vocab) = (model.spec.d_model, model.spec.vocab_size);
        self.input.resize(segments.len() * d, 0.0);
        let (isa, hidden) = (self.pool.isa(), &self.hidden);
        let last = |index: usize, input: &mut [f32]| {
            let end: usize = segments[..=index].iter().map(|segment| segment.ids().len()).sum();
            model.norm.forward(isa, &hidden[(end - 1) * d..end * d], input);
        };
        let x = filled(&self.pool, self.activations, &mut self.input, d, &mut self.quantized, last);
        if let [segment] = segments {
            let logits = &mut segment.sequence_mut().logits;
            multiply(&self.pool, &x, &mut [Product::new(&model.head, logits)]);
            return;
        }
        self.logits.resize(segments.len() * vocab, 0.0);
        multiply(&self.pool, &x, &mut [Product::new(&model.head, &mut self.logits)]);
        self.pool.chunks(segments, 1, |index, _, segment| {
            segment[0]
                .sequence_mut()
                .logits
                .copy_from_slice(&self.logits[index * vocab..(index + 1) * vocab]);
        });
    }

    /// Logits of every row, `[rows, vocab]`.
    pub fn all_logits(&mut self, model: &Model, logits: &mut [f32]) {
        let Self { pool, activations, hidden, input, quantized, .. } = self;
        let x = normed(pool, *activations, &model.norm, hidden, model.spec.d_model, input, quantized);
        multiply(pool, &x, &mut [Product::new(&model.head, logits)]);
    }

    fn embed<S: Segment>(&mut self, model: &Model, segments: &[S]) {
        let (d, half) = (model.spec.d_model, model.spec.head_dim() / 2);
        self.rows.clear();
        for (segment, rows) in segments.iter().enumerate() {
            let start = rows.sequence().length;
            let end = start + rows.ids().len();
            self.rows.extend((start..end).map(|position| Row { segment, position }));
        }
        self.hidden.resize(self.rows.len() * d, 0.0);
        let ids = segments.iter().flat_map(|segment| segment.ids());
        for (id, hidden) in ids.zip(self.hidden.chunks_exact_mut(d)) {
            model.embedding().read_row(*id as usize, hidden);
        }
        if let Some(positions) = &model.positions {
            self.input.resize(d, 0.0);
            for (row, hidden) in self.rows.iter().zip(self.hidden.chunks_exact_mut(d)) {
                positions.read_row(row.position, &mut self.input);
                hidden.iter_mut().zip(&self.input).for_each(|(hidden, x)| *hidden += x);
            }
            return;
        }
        self.cos.clear();
        self.sin.clear();
        for row in &self.rows {
            for i in 0..half {
                let frequency = (model.spec.rope_theta as f64).powf(-(i as f64) / half as f64);
                let (sin, cos) = (row.position as f64 * frequency).sin_cos();
                self.cos.push(cos as f32);
                self.sin.push(sin as f32);
            }
        }
    }

    /// `hidden += output(attention(norm(hidden)))`
    fn attention<S: Segment>(&mut self, model: &Model, layer: usize, block: &Block, segments: &mut [S]) {
        let Self { pool, activations, rows, cos, sin, hidden, input, quantized: buffer, .. } = self;
        let Self { low_rank, query, key, value, mixed, scratch, .. } = self;
        let spec = &model.spec;
        let (d, head_dim, isa) = (spec.d_model, spec.head_dim(), pool.isa());
        let kv_width = spec.n_kv_heads * head_dim;
        let x = normed(pool, *activations, &block.attention_norm, hidden, d, input, buffer);
        query.resize(rows.len() * d, 0.0);
        key.resize(rows.len() * kv_width, 0.0);
        value.resize(rows.len() * kv_width, 0.0);
        let mut products =
            [product(&block.query, query), product(&block.key, key), product(&block.value, value)];
        multiply(pool, &x, &mut products);
        low_rank.add(pool, &x, &block.query, query);
        low_rank.add(pool, &x, &block.key, key);
        low_rank.add(pool, &x, &block.value, value);

        let half = head_dim / 2;
        let rotary = model.positions.is_none();
        let angles = |row: usize| (&cos[row * half..(row + 1) * half], &sin[row * half..(row + 1) * half]);
        if rotary {
            pool.chunks(key, kv_width, |row, _, key| {
                let (cos, sin) = angles(row);
                key.chunks_exact_mut(head_dim).for_each(|head| isa.rope(head, cos, sin));
            });
        }
        pool.chunks(segments, 1, |index, _, segment| {
            let first = rows.partition_point(|row| row.segment < index);
            let count = segment[0].ids().len();
            let cache = &mut segment[0].sequence_mut().cache;
            for (at, row) in (first..).zip(&rows[first..first + count]) {
                let numbers = at * kv_width..(at + 1) * kv_width;
                cache.store(isa, layer, row.position, &key[numbers.clone()], &value[numbers]);
            }
        });

        let share = spec.n_heads / spec.n_kv_heads;
        let segments = &*segments;
        mixed.resize(rows.len() * d, 0.0);
        // Many rows share passes over keys and values. Few rows are split by heads, so that no thread is idle; a task gets several
        // heads, since the next head is prefetched while one is computed.
        let many = rows.len() >= 4 * QUERIES_PER_PASS * pool.threads();
        let fits = |heads: &usize| {
            spec.n_heads.is_multiple_of(*heads) && rows.len() * spec.n_heads >= 8 * pool.threads() * heads
        };
        let unit = if many { QUERIES_PER_PASS * d } else { (1..=4).rev().find(fits).unwrap_or(1) * head_dim };
        pool.chunks(mixed, unit, |task, thread, out| {
            let Scratch { queries, mixed, scores } =
                &mut *scratch[thread].lock().expect("no thread has panicked");
            let width = out.len().min(d);
            let first = task * unit / d;
            let start = task * unit % d / head_dim;
            let heads = start..start + width / head_dim;
            for head in heads.clone() {
                let mut done = 0;
                for run in rows[first..first + out.len() / width].chunk_by(|a, b| a.segment == b.segment) {
                    let mut seen = [0; QUERIES_PER_PASS];
                    for (t, row) in run.iter().enumerate() {
                        let index = first + done + t;
                        let query_head = &query[index * d + head * head_dim..][..head_dim];
                        let query = &mut queries[t * head_dim..(t + 1) * head_dim];
                        query.copy_from_slice(query_head);
                        if rotary {
                            let (cos, sin) = angles(index);
                            isa.rope(query, cos, sin);
                        }
                        seen[t] = row.position + 1;
                    }
                    let cache = &segments[run[0].segment].sequence().cache;
                    let (seen, len) = (&seen[..run.len()], run.len() * head_dim);
                    let next = (head + 1) / share;
                    if heads.contains(&(head + 1)) && next != head / share {
                        cache.prefetch(isa, layer, next, seen[0]);
                    }
                    cache.attend(isa, layer, head / share, &queries[..len], seen, scores, &mut mixed[..len]);
                    for (t, mixed) in mixed[..len].chunks_exact(head_dim).enumerate() {
                        out[(done + t) * width + (head - start) * head_dim..][..head_dim]
                            .copy_from_slice(mixed);
                    }
                    done += run.len();
                }
            }
        });

        let x = match &block.attention_sub_norm {
            Some(sub_norm) => normed(pool, *activations, sub_norm, mixed, d, input, buffer),
            None => filled(pool, *activations, mixed, d, buffer, |_, _| ()),
        };
        multiply(pool, &x, &mut [Product { add: true, ..product(&block.output, hidden) }]);
        low_rank.add(pool, &x, &block.output, hidden);
    }

    /// `hidden += feed_forward(norm(hidden))`
    fn feed_forward(&mut self, activation: Activation, block: &Block) {
        let Self { pool, activations, rows, hidden, input, quantized: buffer, low_rank, gate, up, .. } = self;
        let (d, d_ff, isa) = (block.up.matrix.cols(), block.up.matrix.rows(), pool.isa());
        let x = normed(pool, *activations, &block.feed_forward_norm, hidden, d, input, buffer);
        up.resize(rows.len() * d_ff, 0.0);
        let (inner, factor) = match &block.gate {
            Some(linear) => {
                gate.resize(rows.len() * d_ff, 0.0);
                multiply(pool, &x, &mut [product(linear, gate), product(&block.up, up)]);
                low_rank.add(pool, &x, linear, gate);
                low_rank.add(pool, &x, &block.up, up);
                (gate, Some(&*up))
            }
            None => {
                multiply(pool, &x, &mut [product(&block.up, up)]);
                low_rank.add(pool, &x, &block.up, up);
                (up, None)
            }
        };
        let activate = |row: usize, inner: &mut [f32]| {
            let factor = factor.map(|factor| &factor[row * d_ff..(row + 1) * d_ff]);
            match (factor, activation) {
                (Some(factor), Activation::SquaredRelu) => isa.relu2_mul(inner, factor),
                (Some(factor), _) => isa.silu_mul(inner, factor),
                (None, Activation::SquaredRelu) => isa.relu2(inner),
                (None, _) => isa.gelu(inner),
            }
        };
        let x = match &block.feed_forward_sub_norm {
            Some(sub_norm) => {
                pool.chunks(inner, d_ff, |row, _, inner| activate(row, inner));
                normed(pool, *activations, sub_norm, inner, d_ff, input, buffer)
            }
            None => filled(pool, *activations, inner, d_ff, buffer, activate),
        };
        multiply(pool, &x, &mut [Product { add: true, ..product(&block.down, hidden) }]);
        low_rank.add(pool, &x, &block.down, hidden);
    }
}

fn product<'a>(linear: &'a Linear, out: &'a mut [f32]) -> Product<'a> {
    Product { bias: linear.bias.as_deref(), ..Product::new(&linear.matrix, out) }
}

/// Input of matrices: rows of `cols` values that `fill(row, values)` computes, quantized if activations are int8.
fn filled<'a>(
    pool: &Pool,
    activations: ActivationMode,
    values: &'a mut [f32],
    cols: usize,
    buffer: &'a mut Int8Activations,
    fill: impl Fn(usize, &mut [f32]) + Sync,
) -> Activations<'a> {
    match activations {
        ActivationMode::Int8 => Activations::int8_with(pool, values, cols, buffer, fill),
        ActivationMode::F32 => {
            pool.chunks(values, cols, |row, _, values| fill(row, values));
            Activations::f32(values, cols)
        }
    }
}

/// Norm of each row of `width`, as input of matrices.
fn normed<'a>(
    pool: &Pool,
    activations: ActivationMode,
    norm: &Norm,
    from: &[f32],
    width: usize,
    to: &'a mut Vec<f32>,
    buffer: &'a mut Int8Activations,
) -> Activations<'a> {
    to.resize(from.len(), 0.0);
    let isa = pool.isa();
    let fill = |row: usize, to: &mut [f32]| norm.forward(isa, &from[row * width..(row + 1) * width], to);
    filled(pool, activations, to, width, buffer, fill)
}
