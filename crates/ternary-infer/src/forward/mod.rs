//! The forward pass: tokens of one or several sequences through all layers.
//!
//! The rows of a batch are the tokens of all its chunks, one after the other. Matrices multiply all rows together;
//! attention and the KV cache separate them by sequence.

mod activations;
mod attention;

use crate::{
    ActivationMode, Sequence,
    model::{Block, Model},
};
use activations::{LowRankScratch, norm_and_quantize, product, quantize_rows};
use attention::{AttentionScratch, RotaryAngles};
use std::sync::Mutex;
use ternary_format::Activation;
use ternary_kernels::{Int8Activations, Pool, Product, multiply};

/// The next tokens of one sequence.
pub(crate) trait SequenceChunk: Send + Sync {
    fn ids(&self) -> &[u32];
    fn sequence(&self) -> &Sequence;
    fn sequence_mut(&mut self) -> &mut Sequence;
}

impl SequenceChunk for (&mut Sequence, u32) {
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

impl SequenceChunk for (&mut Sequence, &[u32]) {
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

/// A token of the batch: the index of its chunk, and its position in the sequence.
#[derive(Clone, Copy, Debug)]
struct Row {
    chunk: usize,
    position: usize,
}

/// Thread pool and scratch buffers, reused by the next forward pass.
#[derive(Debug)]
pub(crate) struct Workspace {
    pub pool: Pool,
    activations: ActivationMode,
    rows: Vec<Row>,
    angles: RotaryAngles,
    /// The residual stream, `[rows, d_model]`
    hidden: Vec<f32>,
    /// Input of matrices, `[rows, d_model or d_ff]`
    input: Vec<f32>,
    quantized: Int8Activations,
    low_rank: LowRankScratch,
    /// `[rows, d_model]`
    query: Vec<f32>,
    /// `[rows, n_kv_heads * head_dim]`
    key: Vec<f32>,
    value: Vec<f32>,
    /// Output of attention before its projection, `[rows, d_model]`
    mixed: Vec<f32>,
    /// `[rows, d_ff]`
    gate: Vec<f32>,
    up: Vec<f32>,
    /// `[chunks, vocab]`
    logits: Vec<f32>,
    /// One per thread.
    scratch: Vec<Mutex<AttentionScratch>>,
}

impl Workspace {
    pub fn new(model: &Model, pool: Pool, activations: ActivationMode, context: usize) -> Self {
        let scratch =
            (0..pool.threads()).map(|_| Mutex::new(AttentionScratch::new(&model.spec, context))).collect();
        Self {
            pool,
            activations,
            rows: Vec::new(),
            angles: RotaryAngles::default(),
            hidden: Vec::new(),
            input: Vec::new(),
            quantized: Int8Activations::default(),
            low_rank: LowRankScratch::default(),
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

    /// Appends the ids of each chunk to its sequence. `self.hidden` is then the input of the final norm.
    pub fn forward<S: SequenceChunk>(&mut self, model: &Model, chunks: &mut [S]) {
        self.embed(model, chunks);
        for (layer, block) in model.blocks.iter().enumerate() {
            self.attention(model, layer, block, chunks);
            self.feed_forward(model.spec.activation, block);
        }
        for chunk in chunks {
            let length = chunk.ids().len();
            chunk.sequence_mut().length += length;
        }
    }

    /// Computes the logits of the last row of each chunk, and writes them to its sequence.
    pub fn last_logits<S: SequenceChunk>(&mut self, model: &Model, chunks: &mut [S]) {
        let (d, vocab) = (model.spec.d_model, model.spec.vocab_size);
        self.input.resize(chunks.len() * d, 0.0);
        let (isa, hidden) = (self.pool.isa(), &self.hidden);
        let last = |index: usize, input: &mut [f32]| {
            let end: usize = chunks[..=index].iter().map(|chunk| chunk.ids().len()).sum();
            model.norm.forward(isa, &hidden[(end - 1) * d..end * d], input);
        };
        let x = quantize_rows(&self.pool, self.activations, &mut self.input, d, &mut self.quantized, last);
        if let [chunk] = chunks {
            let logits = &mut chunk.sequence_mut().logits;
            multiply(&self.pool, &x, &mut [Product::new(&model.head, logits)]);
            return;
        }
        self.logits.resize(chunks.len() * vocab, 0.0);
        multiply(&self.pool, &x, &mut [Product::new(&model.head, &mut self.logits)]);
        self.pool.chunks(chunks, 1, |index, _, chunk| {
            let logits = &self.logits[index * vocab..(index + 1) * vocab];
            chunk[0].sequence_mut().logits.copy_from_slice(logits);
        });
    }

    /// Computes the logits of every row, `[rows, vocab]`.
    pub fn all_logits(&mut self, model: &Model, logits: &mut [f32]) {
        let Self { pool, activations, hidden, input, quantized, .. } = self;
        let d = model.spec.d_model;
        let x = norm_and_quantize(pool, *activations, &model.norm, hidden, d, input, quantized);
        multiply(pool, &x, &mut [Product::new(&model.head, logits)]);
    }

    fn embed<S: SequenceChunk>(&mut self, model: &Model, chunks: &[S]) {
        let d = model.spec.d_model;
        self.rows.clear();
        for (index, chunk) in chunks.iter().enumerate() {
            let start = chunk.sequence().length;
            let positions = start..start + chunk.ids().len();
            self.rows.extend(positions.map(|position| Row { chunk: index, position }));
        }
        self.hidden.resize(self.rows.len() * d, 0.0);
        let ids = chunks.iter().flat_map(|chunk| chunk.ids());
        for (id, hidden) in ids.zip(self.hidden.chunks_exact_mut(d)) {
            model.embedding().read_row(*id as usize, hidden);
        }
        let Some(positions) = &model.positions else {
            self.angles.update(&model.spec, &self.rows);
            return;
        };
        self.input.resize(d, 0.0);
        for (row, hidden) in self.rows.iter().zip(self.hidden.chunks_exact_mut(d)) {
            positions.read_row(row.position, &mut self.input);
            hidden.iter_mut().zip(&self.input).for_each(|(hidden, x)| *hidden += x);
        }
    }

    /// `hidden += feed_forward(norm(hidden))`
    fn feed_forward(&mut self, activation: Activation, block: &Block) {
        let Self { pool, activations, rows, hidden, input, quantized, low_rank, gate, up, .. } = self;
        let (d, d_ff, isa) = (block.up.matrix.cols(), block.up.matrix.rows(), pool.isa());
        let x = norm_and_quantize(pool, *activations, &block.feed_forward_norm, hidden, d, input, quantized);
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
                norm_and_quantize(pool, *activations, sub_norm, inner, d_ff, input, quantized)
            }
            None => quantize_rows(pool, *activations, inner, d_ff, quantized, activate),
        };
        multiply(pool, &x, &mut [Product { add: true, ..product(&block.down, hidden) }]);
        low_rank.add(pool, &x, &block.down, hidden);
    }
}
