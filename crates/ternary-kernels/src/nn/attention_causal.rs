//! Causal attention over whole sequences, forward and backward, for training.
//!
//! # Shapes
//! ```text
//! query, out   [batch, seq, heads * width]          head h reads key-value head h / (heads / kv_heads)
//! key, value   [batch, seq, kv_heads * width]
//! ```
//!
//! # Algorithm
//! A task is one key-value head of one sequence, with all query heads that share it. Its matrices are copied to padded
//! memory of the thread ([`PaddedMatrix`]), so that the scores of one head, `[seq, seq]`, are all that is ever held:
//!
//! ```text
//! forward, per head:                              backward, per head:
//!   s = q k^T / sqrt(width), columns <= row         p = exp(s - log_partition)            recomputed, not stored
//!   p = softmax(s);  log_partition = log sum exp    dv += p^T grad
//!   out = p v                                       dp = grad v^T
//!                                                   ds = p (dp - sum(grad out)) / sqrt(width)
//!                                                   dq = ds k;  dk += ds^T q
//! ```
//!
//! `sum(grad out)` per row equals `sum(p dp)`, and needs no pass over the scores.
//!
//! # Triangles
//! Entries above the diagonal are zero, and about half of the work is skipped:
//!
//! | product | function | what is skipped |
//! |---|---|---|
//! | `q k^T`, `grad v^T` | [`multiply_visible`] | columns beyond the row, in whole vectors |
//! | `p v`, `ds k` | [`multiply_lower`] | summands beyond the row |
//! | `p^T grad`, `ds^T q` | [`add_upper`] | summands before the row |
//!
//! The micro-kernel ([`multiply_block`]) keeps sums of 4 rows and 2 vectors of columns in registers (1 vector with AVX2 and
//! NEON).
//!
//! # Measured
//! On a Xeon with AMX, a training step of 768 x 12: reading the next head ahead gave 1,301, 1,313 and 1,297 tokens/s before
//! and 1,321, 1,347 and 1,311 after; two vectors of columns at a time, with other changes, 1,157 before and 1,256 after. Eight
//! rows at a time instead of four were 1 % slower.

use crate::{
    Isa, Pool,
    simd::{
        Kernel, LANES, Simd,
        vector_ops::{exp, load, load_padded, store},
    },
    thread_pool::DisjointSlices,
};
use std::ops::Range;

/// Shape of an attention: `[batch, seq, heads * width]` queries over `[batch, seq, kv_heads * width]` keys and values.
///
/// Query head `h` reads the keys and values of head `h / (heads / kv_heads)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Number of sequences.
    pub batch: usize,
    /// Positions per sequence.
    pub seq: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; `heads` is a multiple of it.
    pub kv_heads: usize,
    /// Components per head.
    pub width: usize,
}

impl AttentionShape {
    /// Number of elements of the queries, and of the output.
    pub fn queries(&self) -> usize {
        self.batch * self.seq * self.heads * self.width
    }

    /// Number of elements of the keys, and of the values.
    pub fn keys(&self) -> usize {
        self.batch * self.seq * self.kv_heads * self.width
    }

    /// Number of rows of scores: one per sequence, head and position.
    pub fn rows(&self) -> usize {
        self.batch * self.heads * self.seq
    }

    /// Query heads per key-value head.
    fn share(&self) -> usize {
        assert!(self.heads.is_multiple_of(self.kv_heads), "{} heads of {}", self.heads, self.kv_heads);
        self.heads / self.kv_heads
    }

    /// `1 / sqrt(width)`
    fn scale(&self) -> f32 {
        (self.width as f32).sqrt().recip()
    }

    /// Index of the first number of a head at a position, in a tensor of `heads` heads.
    fn at(&self, sequence: usize, position: usize, head: usize, heads: usize) -> usize {
        ((sequence * self.seq + position) * heads + head) * self.width
    }
}

/// `out = softmax(q k^T / sqrt(width)) v`, where each position attends to itself and those before it.
///
/// `log_partition` receives the logarithm of each row's sum of exponentials, for the backward pass.
///
/// # Shapes
/// query, out `[batch, seq, heads * width]`; key, value `[batch, seq, kv_heads * width]`; log_partition
/// `[batch, heads, seq]`
///
/// # Panics
/// When lengths do not fit the shape, or `heads` is not a multiple of `kv_heads`.
///
/// # Example
/// ```
/// use ternary_kernels::{Pool, nn::{AttentionShape, causal_attention}};
/// let shape = AttentionShape { batch: 1, seq: 2, heads: 1, kv_heads: 1, width: 1 };
/// let (query, key, value) = ([0.0; 2], [0.0; 2], [1.0, 3.0]);
/// let (mut out, mut log_partition) = ([0.0; 2], [0.0; 2]);
/// causal_attention(&Pool::new(1), shape, [&query, &key, &value], &mut out, &mut log_partition);
/// // The second position attends to both with equal weights.
/// assert_eq!(out, [1.0, 2.0]);
/// ```
pub fn causal_attention(
    pool: &Pool,
    shape: AttentionShape,
    [query, key, value]: [&[f32]; 3],
    out: &mut [f32],
    log_partition: &mut [f32],
) {
    check(shape, [query.len(), out.len()], [key.len(), value.len()], log_partition.len());
    let share = shape.share();
    let (out, log_partition) = (DisjointSlices::new(out), DisjointSlices::new(log_partition));
    let mut per_thread: Vec<_> = (0..pool.threads()).map(|_| None).collect();
    let per_thread = DisjointSlices::new(&mut per_thread);
    let isa = pool.isa();
    pool.run(shape.batch * shape.kv_heads, |task, thread| {
        let (sequence, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
        // SAFETY: no two tasks have a thread at a time.
        let slot = unsafe { &mut per_thread.slice(thread, 1)[0] };
        let buffers = slot.get_or_insert_with(|| ForwardBuffers::new(shape));
        buffers.key.read(isa, key, shape, sequence, kv_head, shape.kv_heads);
        buffers.value.read(isa, value, shape, sequence, kv_head, shape.kv_heads);
        buffers.key_t.transpose(isa, &buffers.key);
        for head in kv_head * share..(kv_head + 1) * share {
            buffers.query.read(isa, query, shape, sequence, head, shape.heads);
            let start = (sequence * shape.heads + head) * shape.seq;
            // SAFETY: each head of a sequence is handled once.
            let log_partition = unsafe { log_partition.slice(start, shape.seq) };
            isa.run(Forward { shape, buffers, log_partition });
            // SAFETY: as above.
            unsafe { buffers.out.write(isa, &out, shape, [sequence, head, shape.heads]) };
        }
    });
}

/// Gradients of [`causal_attention`] for query, key and value, given its inputs, its outputs and the gradient of `out`.
///
/// With `p = softmax(..)`, `dv = p^T grad`, `dp = grad v^T`, `ds = p (dp - sum(grad out)) / sqrt(width)`,
/// `dq = ds k`, `dk = ds^T q`.
///
/// # Shapes
/// As of [`causal_attention`]; a gradient has the shape of its tensor.
///
/// # Panics
/// When lengths do not fit the shape.
///
/// # Source
/// Dao et al., "FlashAttention" (2022), algorithm 4.
pub fn causal_attention_backward(
    pool: &Pool,
    shape: AttentionShape,
    [query, key, value]: [&[f32]; 3],
    out: &[f32],
    log_partition: &[f32],
    grad: &[f32],
    [dquery, dkey, dvalue]: [&mut [f32]; 3],
) {
    check(shape, [query.len(), out.len()], [key.len(), value.len()], log_partition.len());
    check(shape, [dquery.len(), grad.len()], [dkey.len(), dvalue.len()], log_partition.len());
    let share = shape.share();
    let [dquery, dkey, dvalue] = [dquery, dkey, dvalue].map(DisjointSlices::new);
    let mut per_thread: Vec<_> = (0..pool.threads()).map(|_| None).collect();
    let per_thread = DisjointSlices::new(&mut per_thread);
    let isa = pool.isa();
    pool.run(shape.batch * shape.kv_heads, |task, thread| {
        let (sequence, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
        // SAFETY: no two tasks have a thread at a time.
        let slot = unsafe { &mut per_thread.slice(thread, 1)[0] };
        let (buffers, back) =
            slot.get_or_insert_with(|| (ForwardBuffers::new(shape), BackwardBuffers::new(shape)));
        // The heads that share a key-value head add to these.
        back.dkey.numbers.fill(0.0);
        back.dvalue.numbers.fill(0.0);
        buffers.key.read(isa, key, shape, sequence, kv_head, shape.kv_heads);
        buffers.value.read(isa, value, shape, sequence, kv_head, shape.kv_heads);
        buffers.key_t.transpose(isa, &buffers.key);
        back.value_t.transpose(isa, &buffers.value);
        for head in kv_head * share..(kv_head + 1) * share {
            buffers.query.read(isa, query, shape, sequence, head, shape.heads);
            buffers.out.read(isa, out, shape, sequence, head, shape.heads);
            back.grad.read(isa, grad, shape, sequence, head, shape.heads);
            let log_partition = &log_partition[(sequence * shape.heads + head) * shape.seq..][..shape.seq];
            isa.run(Backward { shape, buffers, back, log_partition });
            // SAFETY: each head of a sequence is handled once.
            unsafe { back.dquery.write(isa, &dquery, shape, [sequence, head, shape.heads]) };
        }
        for (from, to) in [(&back.dkey, &dkey), (&back.dvalue, &dvalue)] {
            // SAFETY: as above, for the heads of keys and values.
            unsafe { from.write(isa, to, shape, [sequence, kv_head, shape.kv_heads]) };
        }
    });
}

/// Checks all lengths.
fn check(shape: AttentionShape, queries: [usize; 2], keys: [usize; 2], rows: usize) {
    assert_eq!(queries, [shape.queries(); 2], "numbers of queries and results");
    assert_eq!(keys, [shape.keys(); 2], "numbers of keys and values");
    assert_eq!(rows, shape.rows(), "rows of scores");
}

/// A row-major matrix whose rows and columns are padded with zeros to whole vectors.
struct PaddedMatrix {
    /// Numbers per row, a multiple of 16.
    stride: usize,
    /// `[rows, stride]`
    numbers: Vec<f32>,
}

impl PaddedMatrix {
    fn new(rows: usize, cols: usize) -> Self {
        let stride = cols.next_multiple_of(LANES);
        Self { stride, numbers: vec![0.0; rows.next_multiple_of(LANES) * stride] }
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.numbers[row * self.stride..][..self.stride]
    }

    fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.numbers[row * self.stride..][..self.stride]
    }

    /// Copies a head of a sequence from a tensor of `heads` heads.
    fn read(
        &mut self,
        isa: Isa,
        from: &[f32],
        shape: AttentionShape,
        sequence: usize,
        head: usize,
        heads: usize,
    ) {
        let (start, stride) = (shape.at(sequence, 0, head, heads), heads * shape.width);
        isa.run(ReadHead { from: &from[start..], stride, width: shape.width, rows: shape.seq, to: self });
    }

    /// Copies its rows to a head of a sequence.
    ///
    /// # Safety
    /// No other thread writes that head at the same time.
    unsafe fn write(
        &self,
        isa: Isa,
        to: &DisjointSlices<f32>,
        shape: AttentionShape,
        [sequence, head, heads]: [usize; 3],
    ) {
        let start = shape.at(sequence, 0, head, heads);
        let write = WriteHead {
            from: self,
            start,
            stride: heads * shape.width,
            width: shape.width,
            rows: shape.seq,
            to,
        };
        isa.run(write);
    }

    /// Becomes the transpose of `from`.
    fn transpose(&mut self, isa: Isa, from: &Self) {
        isa.run(Transpose { from, to: self });
    }
}

/// Transposes in blocks of 16 x 16.
struct Transpose<'a> {
    from: &'a PaddedMatrix,
    to: &'a mut PaddedMatrix,
}

impl Kernel for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { from, to } = self;
        for (block, rows) in from.numbers.chunks_exact(LANES * from.stride).enumerate() {
            for col in (0..from.stride).step_by(LANES) {
                let square = std::array::from_fn(|row| {
                    s.float_to_bits(load(s, &rows[row * from.stride + col..][..LANES]))
                });
                for (i, lanes) in s.transpose(square).into_iter().enumerate() {
                    let at = (col + i) * to.stride + block * LANES;
                    store(s, s.bits_to_float(lanes), &mut to.numbers[at..at + LANES]);
                }
            }
        }
    }
}

/// Copies rows that are `stride` numbers apart, and prefetches those of the next head.
struct ReadHead<'a> {
    from: &'a [f32],
    /// Numbers from one row to the next.
    stride: usize,
    /// Numbers per row.
    width: usize,
    /// Number of rows.
    rows: usize,
    to: &'a mut PaddedMatrix,
}

impl Kernel for ReadHead<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { from, stride, width, rows, to } = self;
        for row in 0..rows {
            let from = &from[row * stride..][..width];
            for (to, from) in to.row_mut(row).chunks_mut(LANES).zip(from.chunks(LANES)) {
                // The next head is read as soon as this one is done: it is the neighbour in memory.
                s.prefetch(&from[0], width.div_ceil(LANES));
                store(s, load(s, from), &mut to[..from.len()]);
            }
        }
    }
}

/// Copies rows to places that are `stride` numbers apart, bypassing the caches.
struct WriteHead<'a> {
    from: &'a PaddedMatrix,
    /// Index of the first number.
    start: usize,
    /// Numbers from one row to the next.
    stride: usize,
    /// Numbers per row.
    width: usize,
    /// Number of rows.
    rows: usize,
    /// The whole tensor.
    to: &'a DisjointSlices<'a, f32>,
}

impl Kernel for WriteHead<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in 0..self.rows {
            // SAFETY: of a head that is its writer's alone, by the promise of `PaddedMatrix::write`.
            let to = unsafe { self.to.slice(self.start + row * self.stride, self.width) };
            for (to, from) in to.chunks_mut(LANES).zip(self.from.row(row).chunks(LANES)) {
                match to.as_mut_array::<LANES>() {
                    Some(to) => s.stream_f32(load(s, from), to),
                    None => store(s, load(s, from), to),
                }
            }
        }
        s.fence();
    }
}

/// Padded matrices of a thread for the forward pass; the backward pass needs them too.
struct ForwardBuffers {
    /// `[seq, width]`
    query: PaddedMatrix,
    /// `[seq, width]`
    key: PaddedMatrix,
    /// The transpose of the keys, `[width, seq]`.
    key_t: PaddedMatrix,
    /// `[seq, width]`
    value: PaddedMatrix,
    /// Scores, then probabilities, `[seq, seq]`.
    scores: PaddedMatrix,
    /// `[seq, width]`
    out: PaddedMatrix,
}

impl ForwardBuffers {
    fn new(shape: AttentionShape) -> Self {
        let rows = || PaddedMatrix::new(shape.seq, shape.width);
        Self {
            query: rows(),
            key: rows(),
            key_t: PaddedMatrix::new(shape.width, shape.seq),
            value: rows(),
            scores: PaddedMatrix::new(shape.seq, shape.seq),
            out: rows(),
        }
    }
}

/// Padded matrices of a thread for the backward pass.
struct BackwardBuffers {
    /// The transpose of the values, `[width, seq]`.
    value_t: PaddedMatrix,
    /// Gradient of the output, `[seq, width]`.
    grad: PaddedMatrix,
    /// `dp`, then `ds`, `[seq, seq]`.
    dscores: PaddedMatrix,
    /// `[seq, width]`
    dquery: PaddedMatrix,
    /// `[seq, width]`, summed over the query heads.
    dkey: PaddedMatrix,
    /// `[seq, width]`, summed over the query heads.
    dvalue: PaddedMatrix,
}

impl BackwardBuffers {
    fn new(shape: AttentionShape) -> Self {
        let rows = || PaddedMatrix::new(shape.seq, shape.width);
        Self {
            value_t: PaddedMatrix::new(shape.width, shape.seq),
            grad: rows(),
            dscores: PaddedMatrix::new(shape.seq, shape.seq),
            dquery: rows(),
            dkey: rows(),
            dvalue: rows(),
        }
    }
}

/// Rows of a product that are computed together.
const ROWS: usize = 4;

/// The left factor of a product.
trait LeftFactor {
    /// Four numbers of a column: rows `row..row + 4` of column `k`.
    fn column(&self, row: usize, k: usize) -> [f32; ROWS];
}

/// A matrix as it is.
struct RowFactor<'a>(&'a PaddedMatrix);
/// The transpose of a matrix.
struct TransposedFactor<'a>(&'a PaddedMatrix);

impl LeftFactor for RowFactor<'_> {
    #[inline(always)]
    fn column(&self, row: usize, k: usize) -> [f32; ROWS] {
        std::array::from_fn(|r| self.0.numbers[(row + r) * self.0.stride + k])
    }
}

impl LeftFactor for TransposedFactor<'_> {
    #[inline(always)]
    fn column(&self, row: usize, k: usize) -> [f32; ROWS] {
        std::array::from_fn(|r| self.0.numbers[k * self.0.stride + row + r])
    }
}

/// Vectors of columns that are computed together, if the registers have room for their sums: each number of the left factor is
/// then broadcast once for all of them.
const COL_VECTORS: usize = 2;

/// `out[row.., cols] = sum over k of left[row.., k] right[k, cols]`, for four rows and whole vectors of columns. With `ADD`, it is
/// added to `out`.
#[inline(always)]
fn multiply_rows<S: Simd, const ADD: bool>(
    s: S,
    left: &impl LeftFactor,
    right: &PaddedMatrix,
    k: Range<usize>,
    row: usize,
    cols: Range<usize>,
    out: &mut PaddedMatrix,
) {
    let Range { start: mut col, end } = cols;
    while S::REGISTER_TOKENS >= 8 && end - col >= COL_VECTORS * LANES {
        multiply_block::<S, COL_VECTORS, ADD>(s, left, right, k.clone(), [row, col], out);
        col += COL_VECTORS * LANES;
    }
    while col < end {
        multiply_block::<S, 1, ADD>(s, left, right, k.clone(), [row, col], out);
        col += LANES;
    }
}

/// The micro-kernel of [`multiply_rows`]: four rows and `C` vectors of columns.
#[inline(always)]
fn multiply_block<S: Simd, const C: usize, const ADD: bool>(
    s: S,
    left: &impl LeftFactor,
    right: &PaddedMatrix,
    k: Range<usize>,
    [row, col]: [usize; 2],
    out: &mut PaddedMatrix,
) {
    let mut sums = [[s.splat_f32(0.0); C]; ROWS];
    for k in k {
        let (vectors, _) = right.numbers[k * right.stride + col..][..C * LANES].as_chunks::<LANES>();
        let left = left.column(row, k);
        for r in 0..ROWS {
            let left = s.splat_f32(left[r]);
            for c in 0..C {
                sums[r][c] = s.fma(left, s.load_f32(&vectors[c]), sums[r][c]);
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        let (vectors, _) = out.numbers[(row + r) * out.stride + col..][..C * LANES].as_chunks_mut::<LANES>();
        for (sum, out) in sums.into_iter().zip(vectors) {
            s.store_f32(if ADD { s.add_f32(s.load_f32(out), sum) } else { sum }, out);
        }
    }
}

/// `out = left right`, where row `i` of `left` is zero from column `i + 1` on.
#[inline(always)]
fn multiply_lower<S: Simd>(
    s: S,
    left: &impl LeftFactor,
    right: &PaddedMatrix,
    seq: usize,
    out: &mut PaddedMatrix,
) {
    for row in (0..seq).step_by(ROWS) {
        multiply_rows::<S, false>(s, left, right, 0..(row + ROWS).min(seq), row, 0..out.stride, out);
    }
}

/// `out += left right`, where row `i` of `left` is zero before column `i`.
#[inline(always)]
fn add_upper<S: Simd>(
    s: S,
    left: &impl LeftFactor,
    right: &PaddedMatrix,
    seq: usize,
    out: &mut PaddedMatrix,
) {
    for row in (0..seq).step_by(ROWS) {
        multiply_rows::<S, true>(s, left, right, row..seq, row, 0..out.stride, out);
    }
}

/// The columns of `out = left right` that a position may see: those up to its row.
#[inline(always)]
fn multiply_visible<S: Simd>(
    s: S,
    left: &PaddedMatrix,
    right: &PaddedMatrix,
    width: usize,
    seq: usize,
    out: &mut PaddedMatrix,
) {
    for row in (0..seq).step_by(ROWS) {
        let seen = (row + ROWS).min(out.stride).next_multiple_of(LANES);
        multiply_rows::<S, false>(s, &RowFactor(left), right, 0..width, row, 0..seen, out);
    }
}

/// The forward pass of one head.
struct Forward<'a> {
    shape: AttentionShape,
    buffers: &'a mut ForwardBuffers,
    log_partition: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { shape: AttentionShape { width, seq, .. }, buffers, log_partition } = self;
        multiply_visible(s, &buffers.query, &buffers.key_t, width, seq, &mut buffers.scores);
        let scale = self.shape.scale();
        for (position, log_partition) in log_partition.iter_mut().enumerate() {
            let row = buffers.scores.row_mut(position);
            let (seen, unseen) = row.split_at_mut(position + 1);
            // Rows are computed in fours and columns in vectors, so some scores beyond the diagonal were written: clear them.
            let computed = unseen.len().min(ROWS + LANES);
            unseen[..computed].fill(0.0);
            let lowest = f32::NEG_INFINITY;
            let max = seen
                .chunks(LANES)
                .fold(s.splat_f32(lowest), |max, x| s.max_f32(max, load_padded(s, x, lowest)));
            // exp(scale * x - scale * max), summed, then divided by the sum.
            let max = s.max_lanes(max) * scale;
            let (scales, maxima) = (s.splat_f32(scale), s.splat_f32(-max));
            let mut sum = 0.0;
            let mut sums = s.splat_f32(0.0);
            for x in seen.chunks_mut(LANES) {
                let value = exp(s, s.fma(load(s, x), scales, maxima));
                store(s, value, x);
                // Loaded again, so that lanes beyond the diagonal are zero.
                sums = s.add_f32(sums, load(s, x));
            }
            sum += s.sum_lanes(sums);
            *log_partition = max + sum.ln();
            let factor = s.splat_f32(1.0 / sum);
            for x in seen.chunks_mut(LANES) {
                store(s, s.mul_f32(load(s, x), factor), x);
            }
        }
        multiply_lower(s, &RowFactor(&buffers.scores), &buffers.value, seq, &mut buffers.out);
    }
}

/// The backward pass of one head.
struct Backward<'a> {
    shape: AttentionShape,
    buffers: &'a mut ForwardBuffers,
    back: &'a mut BackwardBuffers,
    log_partition: &'a [f32],
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { shape: AttentionShape { width, seq, .. }, buffers, back, log_partition } = self;
        let scale = self.shape.scale();
        multiply_visible(s, &buffers.query, &buffers.key_t, width, seq, &mut buffers.scores);
        multiply_visible(s, &back.grad, &back.value_t, width, seq, &mut back.dscores);
        for (position, log_partition) in log_partition.iter().enumerate() {
            // sum(grad out) of the row, which equals sum(p dp).
            let mut along = s.splat_f32(0.0);
            for (grad, out) in
                back.grad.row(position).chunks(LANES).zip(buffers.out.row(position).chunks(LANES))
            {
                along = s.fma(load(s, grad), load(s, out), along);
            }
            let along = s.splat_f32(s.sum_lanes(along));
            let (scales, partitions) = (s.splat_f32(scale), s.splat_f32(-log_partition));
            let (scores, dscores) = (buffers.scores.row_mut(position), back.dscores.row_mut(position));
            // p = exp(s - log_partition) and ds = p (dp - along) * scale, in place.
            for (p, ds) in scores[..=position].chunks_mut(LANES).zip(dscores[..=position].chunks_mut(LANES)) {
                let value = exp(s, s.fma(load(s, p), scales, partitions));
                let slope = s.mul_f32(s.mul_f32(value, s.sub_f32(load(s, ds), along)), scales);
                store(s, value, p);
                store(s, slope, ds);
            }
            for row in [scores, dscores] {
                let unseen = &mut row[position + 1..];
                let computed = unseen.len().min(ROWS + LANES);
                unseen[..computed].fill(0.0);
            }
        }
        add_upper(s, &TransposedFactor(&buffers.scores), &back.grad, seq, &mut back.dvalue);
        add_upper(s, &TransposedFactor(&back.dscores), &buffers.query, seq, &mut back.dkey);
        multiply_lower(s, &RowFactor(&back.dscores), &buffers.key, seq, &mut back.dquery);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, numbers, pools};

    /// `softmax(q k^T / sqrt(width)) v` in float64, by its definition.
    fn reference(shape: AttentionShape, [q, k, v]: [&[f64]; 3]) -> Vec<f64> {
        let mut out = vec![0.0; shape.queries()];
        let share = shape.heads / shape.kv_heads;
        for sequence in 0..shape.batch {
            for head in 0..shape.heads {
                for position in 0..shape.seq {
                    let at = shape.at(sequence, position, head, shape.heads);
                    let kv = |j: usize| shape.at(sequence, j, head / share, shape.kv_heads);
                    let weight = |j: usize| {
                        let dot = (0..shape.width).map(|c| q[at + c] * k[kv(j) + c]).sum::<f64>();
                        (dot / (shape.width as f64).sqrt()).exp()
                    };
                    let weights: Vec<f64> = (0..=position).map(weight).collect();
                    let sum: f64 = weights.iter().sum();
                    for c in 0..shape.width {
                        out[at + c] = weights.iter().enumerate().map(|(j, w)| w / sum * v[kv(j) + c]).sum();
                    }
                }
            }
        }
        out
    }

    #[test]
    fn forward_and_gradients_are_right() {
        for (batch, seq, heads, kv_heads, width) in
            [(1, 1, 1, 1, 1), (2, 5, 2, 1, 3), (1, 17, 4, 2, 16), (2, 34, 3, 3, 9)]
        {
            let shape = AttentionShape { batch, seq, heads, kv_heads, width };
            let inputs = [
                numbers(shape.queries(), 2.0, 1),
                numbers(shape.keys(), 2.0, 2),
                numbers(shape.keys(), 2.0, 3),
            ];
            let grad = numbers(shape.queries(), 1.0, 4);
            let mut exact = inputs.clone().map(|x| x.into_iter().map(f64::from).collect::<Vec<_>>());
            let expected = reference(shape, [&exact[0], &exact[1], &exact[2]]);
            let loss = |exact: &[Vec<f64>; 3]| -> f64 {
                let out = reference(shape, [&exact[0], &exact[1], &exact[2]]);
                out.iter().zip(&grad).map(|(out, grad)| out * f64::from(*grad)).sum()
            };
            // Every seventh slope: a difference costs two passes.
            let mut slopes: [Vec<(usize, f64)>; 3] = Default::default();
            for input in 0..3 {
                for i in (0..exact[input].len()).step_by(if seq > 20 { 37 } else { 7 }) {
                    let start = exact[input][i];
                    exact[input][i] = start + 1e-5;
                    let after = loss(&exact);
                    exact[input][i] = start - 1e-5;
                    let before = loss(&exact);
                    exact[input][i] = start;
                    slopes[input].push((i, (after - before) / 2e-5));
                }
            }
            let mut bits = None;
            for pool in pools() {
                let views = [&inputs[0][..], &inputs[1][..], &inputs[2][..]];
                let mut out = vec![f32::NAN; shape.queries()];
                let mut log_partition = vec![f32::NAN; shape.rows()];
                causal_attention(&pool, shape, views, &mut out, &mut log_partition);
                assert_close("out", &out, expected.iter().copied(), 3e-6);
                let mut grads = [
                    vec![f32::NAN; shape.queries()],
                    vec![f32::NAN; shape.keys()],
                    vec![f32::NAN; shape.keys()],
                ];
                let [dq, dk, dv] = &mut grads;
                causal_attention_backward(&pool, shape, views, &out, &log_partition, &grad, [dq, dk, dv]);
                for (found, slopes) in grads.iter().zip(&slopes) {
                    let at: Vec<f32> = slopes.iter().map(|(i, _)| found[*i]).collect();
                    assert!(found.iter().all(|x| x.is_finite()));
                    assert_close("gradient", &at, slopes.iter().map(|(_, slope)| *slope), 2e-5);
                }
                let now: Vec<u32> = out.iter().chain(grads.iter().flatten()).map(|x| x.to_bits()).collect();
                assert_eq!(*bits.get_or_insert_with(|| now.clone()), now, "{shape:?}: other bits");
            }
        }
    }

    #[test]
    fn later_positions_and_large_scores_do_no_harm() {
        let shape = AttentionShape { batch: 1, seq: 20, heads: 1, kv_heads: 1, width: 4 };
        let query = vec![100.0; shape.queries()];
        let mut key = numbers(shape.keys(), 100.0, 5);
        let value = numbers(shape.keys(), 1.0, 6);
        for pool in pools() {
            let run = |key: &[f32]| {
                let mut out = vec![0.0; shape.queries()];
                causal_attention(&pool, shape, [&query, key, &value], &mut out, &mut [0.0; 20]);
                assert!(out.iter().all(|x| x.is_finite()));
                out
            };
            let before = run(&key);
            key[19 * 4..].fill(f32::MAX / 1e6);
            assert_eq!(run(&key)[..19 * 4], before[..19 * 4]);
        }
    }
}
