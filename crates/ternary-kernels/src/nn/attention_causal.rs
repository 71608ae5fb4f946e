//! Causal attention over whole sequences, forward and backward, without ever holding the scores of more than one head
//! of a sequence.

use crate::{
    Isa, Pool,
    simd::{
        Kernel, LANES, Simd,
        vector_ops::{exp, load, load_padded, store},
    },
    thread_pool::Disjoint,
};
use std::ops::Range;

/// Shape of an attention: `[batch, seq, heads * width]` queries over `[batch, seq, kv_heads * width]` keys and values.
///
/// Head `h` reads the keys and values of head `h / (heads / kv_heads)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attention {
    pub batch: usize,
    pub seq: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub width: usize,
}

impl Attention {
    /// Numbers of queries, and of results.
    pub fn queries(&self) -> usize {
        self.batch * self.seq * self.heads * self.width
    }

    /// Numbers of keys, and of values.
    pub fn keys(&self) -> usize {
        self.batch * self.seq * self.kv_heads * self.width
    }

    /// Rows of scores.
    pub fn rows(&self) -> usize {
        self.batch * self.heads * self.seq
    }

    fn share(&self) -> usize {
        assert!(self.heads.is_multiple_of(self.kv_heads), "{} heads of {}", self.heads, self.kv_heads);
        self.heads / self.kv_heads
    }

    fn scale(&self) -> f32 {
        (self.width as f32).sqrt().recip()
    }

    /// Where the numbers of a head at a position begin among those of `heads` heads.
    fn at(&self, sequence: usize, position: usize, head: usize, heads: usize) -> usize {
        ((sequence * self.seq + position) * heads + head) * self.width
    }
}

/// `out = softmax(q k^T / sqrt(width)) v`, each position over itself and those before it.
///
/// `log_partition` gets the logarithm of each row's sum of exponentials, for the backward pass.
///
/// # Shapes
/// query, out `[batch, seq, heads * width]`; key, value `[batch, seq, kv_heads * width]`; log_partition
/// `[batch, heads, seq]`
///
/// # Panics
/// When lengths do not fit.
pub fn attention(
    pool: &Pool,
    shape: Attention,
    [query, key, value]: [&[f32]; 3],
    out: &mut [f32],
    log_partition: &mut [f32],
) {
    check(shape, [query.len(), out.len()], [key.len(), value.len()], log_partition.len());
    let share = shape.share();
    let (out, log_partition) = (Disjoint::new(out), Disjoint::new(log_partition));
    let mut rooms: Vec<_> = (0..pool.threads()).map(|_| None).collect();
    let rooms = Disjoint::new(&mut rooms);
    let isa = pool.isa();
    pool.run(shape.batch * shape.kv_heads, |task, thread| {
        let (sequence, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
        // SAFETY: no two tasks have a thread at a time.
        let room = unsafe { &mut rooms.slice(thread, 1)[0] };
        let tiles = room.get_or_insert_with(|| Tiles::new(shape));
        tiles.key.read(isa, key, shape, sequence, kv_head, shape.kv_heads);
        tiles.value.read(isa, value, shape, sequence, kv_head, shape.kv_heads);
        tiles.key_t.transpose(isa, &tiles.key);
        for head in kv_head * share..(kv_head + 1) * share {
            tiles.query.read(isa, query, shape, sequence, head, shape.heads);
            let start = (sequence * shape.heads + head) * shape.seq;
            // SAFETY: each head of a sequence is handled once.
            let log_partition = unsafe { log_partition.slice(start, shape.seq) };
            isa.run(Forward { shape, tiles, log_partition });
            // SAFETY: as above.
            unsafe { tiles.out.write(isa, &out, shape, [sequence, head, shape.heads]) };
        }
    });
}

/// Gradients of [`attention`] for query, key and value, given its inputs, its results and the gradient of `out`.
///
/// With `p = softmax(..)`, `dv = p^T grad`, `dp = grad v^T`, `ds = p (dp - sum(grad out)) / sqrt(width)`,
/// `dq = ds k`, `dk = ds^T q`.
///
/// # Panics
/// When lengths do not fit.
///
/// # Source
/// Dao et al., FlashAttention, algorithm 4.
pub fn attention_backward(
    pool: &Pool,
    shape: Attention,
    [query, key, value]: [&[f32]; 3],
    out: &[f32],
    log_partition: &[f32],
    grad: &[f32],
    [dquery, dkey, dvalue]: [&mut [f32]; 3],
) {
    check(shape, [query.len(), out.len()], [key.len(), value.len()], log_partition.len());
    check(shape, [dquery.len(), grad.len()], [dkey.len(), dvalue.len()], log_partition.len());
    let share = shape.share();
    let [dquery, dkey, dvalue] = [dquery, dkey, dvalue].map(Disjoint::new);
    let mut rooms: Vec<_> = (0..pool.threads()).map(|_| None).collect();
    let rooms = Disjoint::new(&mut rooms);
    let isa = pool.isa();
    pool.run(shape.batch * shape.kv_heads, |task, thread| {
        let (sequence, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
        // SAFETY: no two tasks have a thread at a time.
        let room = unsafe { &mut rooms.slice(thread, 1)[0] };
        let (tiles, back) = room.get_or_insert_with(|| (Tiles::new(shape), BackTiles::new(shape)));
        // Several heads add to them.
        back.dkey.numbers.fill(0.0);
        back.dvalue.numbers.fill(0.0);
        tiles.key.read(isa, key, shape, sequence, kv_head, shape.kv_heads);
        tiles.value.read(isa, value, shape, sequence, kv_head, shape.kv_heads);
        tiles.key_t.transpose(isa, &tiles.key);
        back.value_t.transpose(isa, &tiles.value);
        for head in kv_head * share..(kv_head + 1) * share {
            tiles.query.read(isa, query, shape, sequence, head, shape.heads);
            tiles.out.read(isa, out, shape, sequence, head, shape.heads);
            back.grad.read(isa, grad, shape, sequence, head, shape.heads);
            let log_partition = &log_partition[(sequence * shape.heads + head) * shape.seq..][..shape.seq];
            isa.run(Backward { shape, tiles, back, log_partition });
            // SAFETY: each head of a sequence is handled once.
            unsafe { back.dquery.write(isa, &dquery, shape, [sequence, head, shape.heads]) };
        }
        for (from, to) in [(&back.dkey, &dkey), (&back.dvalue, &dvalue)] {
            // SAFETY: as above, for the heads of keys and values.
            unsafe { from.write(isa, to, shape, [sequence, kv_head, shape.kv_heads]) };
        }
    });
}

fn check(shape: Attention, queries: [usize; 2], keys: [usize; 2], rows: usize) {
    assert_eq!(queries, [shape.queries(); 2], "numbers of queries and results");
    assert_eq!(keys, [shape.keys(); 2], "numbers of keys and values");
    assert_eq!(rows, shape.rows(), "rows of scores");
}

/// A matrix whose rows and columns are padded with zeros to whole vectors.
struct Tile {
    stride: usize,
    numbers: Vec<f32>,
}

impl Tile {
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

    /// Takes a head of a sequence.
    fn read(&mut self, isa: Isa, from: &[f32], shape: Attention, sequence: usize, head: usize, heads: usize) {
        let (start, stride) = (shape.at(sequence, 0, head, heads), heads * shape.width);
        isa.run(Read { from: &from[start..], stride, width: shape.width, rows: shape.seq, to: self });
    }

    /// Gives its rows to a head of a sequence.
    ///
    /// # Safety
    /// No other thread writes that head.
    unsafe fn write(
        &self,
        isa: Isa,
        to: &Disjoint<f32>,
        shape: Attention,
        [sequence, head, heads]: [usize; 3],
    ) {
        let start = shape.at(sequence, 0, head, heads);
        let write =
            Write { from: self, start, stride: heads * shape.width, width: shape.width, rows: shape.seq, to };
        isa.run(write);
    }

    fn transpose(&mut self, isa: Isa, from: &Self) {
        isa.run(Transpose { from, to: self });
    }
}

struct Transpose<'a> {
    from: &'a Tile,
    to: &'a mut Tile,
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

/// Rows that lie apart.
struct Read<'a> {
    from: &'a [f32],
    stride: usize,
    width: usize,
    rows: usize,
    to: &'a mut Tile,
}

impl Kernel for Read<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { from, stride, width, rows, to } = self;
        for row in 0..rows {
            let from = &from[row * stride..][..width];
            for (to, from) in to.row_mut(row).chunks_mut(LANES).zip(from.chunks(LANES)) {
                // The next head is read as soon as this one is done: it lies beside.
                s.prefetch(&from[0], width.div_ceil(LANES));
                store(s, load(s, from), &mut to[..from.len()]);
            }
        }
    }
}

struct Write<'a> {
    from: &'a Tile,
    start: usize,
    stride: usize,
    width: usize,
    rows: usize,
    to: &'a Disjoint<'a, f32>,
}

impl Kernel for Write<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in 0..self.rows {
            // SAFETY: of a head that is its writer's alone, by the promise of `Tile::write`.
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

struct Tiles {
    query: Tile,
    key: Tile,
    key_t: Tile,
    value: Tile,
    /// Scores, then probabilities, `[seq, seq]`.
    scores: Tile,
    out: Tile,
}

impl Tiles {
    fn new(shape: Attention) -> Self {
        let rows = || Tile::new(shape.seq, shape.width);
        Self {
            query: rows(),
            key: rows(),
            key_t: Tile::new(shape.width, shape.seq),
            value: rows(),
            scores: Tile::new(shape.seq, shape.seq),
            out: rows(),
        }
    }
}

struct BackTiles {
    value_t: Tile,
    grad: Tile,
    /// `dp`, then `ds`.
    dscores: Tile,
    dquery: Tile,
    dkey: Tile,
    dvalue: Tile,
}

impl BackTiles {
    fn new(shape: Attention) -> Self {
        let rows = || Tile::new(shape.seq, shape.width);
        Self {
            value_t: Tile::new(shape.width, shape.seq),
            grad: rows(),
            dscores: Tile::new(shape.seq, shape.seq),
            dquery: rows(),
            dkey: rows(),
            dvalue: rows(),
        }
    }
}

/// Rows of a product that are computed together.
const ROWS: usize = 4;

/// The left factor of a product: four rows of it at a column.
trait Left {
    fn four(&self, row: usize, k: usize) -> [f32; ROWS];
}

struct Plain<'a>(&'a Tile);
struct Transposed<'a>(&'a Tile);

impl Left for Plain<'_> {
    #[inline(always)]
    fn four(&self, row: usize, k: usize) -> [f32; ROWS] {
        std::array::from_fn(|r| self.0.numbers[(row + r) * self.0.stride + k])
    }
}

impl Left for Transposed<'_> {
    #[inline(always)]
    fn four(&self, row: usize, k: usize) -> [f32; ROWS] {
        std::array::from_fn(|r| self.0.numbers[k * self.0.stride + row + r])
    }
}

/// Vectors of columns that are computed together, where the registers hold so many sums: each number of the left factor is
/// fetched once for all of them.
const COLS: usize = 2;

/// `out[row.., cols] = sum over k of left[row.., k] right[k, cols]` for four rows, and columns in whole vectors; added to what is
/// there if `ADD`.
#[inline(always)]
fn rows<S: Simd, const ADD: bool>(
    s: S,
    left: &impl Left,
    right: &Tile,
    k: Range<usize>,
    row: usize,
    cols: Range<usize>,
    out: &mut Tile,
) {
    let Range { start: mut col, end } = cols;
    while S::TOKENS >= 8 && end - col >= COLS * LANES {
        block::<S, COLS, ADD>(s, left, right, k.clone(), [row, col], out);
        col += COLS * LANES;
    }
    while col < end {
        block::<S, 1, ADD>(s, left, right, k.clone(), [row, col], out);
        col += LANES;
    }
}

/// [`rows`] for `C` vectors of columns.
#[inline(always)]
fn block<S: Simd, const C: usize, const ADD: bool>(
    s: S,
    left: &impl Left,
    right: &Tile,
    k: Range<usize>,
    [row, col]: [usize; 2],
    out: &mut Tile,
) {
    let mut sums = [[s.splat_f32(0.0); C]; ROWS];
    for k in k {
        let (vectors, _) = right.numbers[k * right.stride + col..][..C * LANES].as_chunks::<LANES>();
        let left = left.four(row, k);
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
fn lower<S: Simd>(s: S, left: &impl Left, right: &Tile, seq: usize, out: &mut Tile) {
    for row in (0..seq).step_by(ROWS) {
        rows::<S, false>(s, left, right, 0..(row + ROWS).min(seq), row, 0..out.stride, out);
    }
}

/// `out += left right`, where row `i` of `left` is zero before column `i`.
#[inline(always)]
fn upper<S: Simd>(s: S, left: &impl Left, right: &Tile, seq: usize, out: &mut Tile) {
    for row in (0..seq).step_by(ROWS) {
        rows::<S, true>(s, left, right, row..seq, row, 0..out.stride, out);
    }
}

/// The part of `out = left right` that a position may see: columns up to the row.
#[inline(always)]
fn visible<S: Simd>(s: S, left: &Tile, right: &Tile, width: usize, seq: usize, out: &mut Tile) {
    for row in (0..seq).step_by(ROWS) {
        let seen = (row + ROWS).min(out.stride).next_multiple_of(LANES);
        rows::<S, false>(s, &Plain(left), right, 0..width, row, 0..seen, out);
    }
}

struct Forward<'a> {
    shape: Attention,
    tiles: &'a mut Tiles,
    log_partition: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { shape: Attention { width, seq, .. }, tiles, log_partition } = self;
        visible(s, &tiles.query, &tiles.key_t, width, seq, &mut tiles.scores);
        let scale = self.shape.scale();
        for (position, log_partition) in log_partition.iter_mut().enumerate() {
            let row = tiles.scores.row_mut(position);
            let (seen, unseen) = row.split_at_mut(position + 1);
            // Of rows that are computed together, some lanes are beyond what they may see.
            let computed = unseen.len().min(ROWS + LANES);
            unseen[..computed].fill(0.0);
            let lowest = f32::NEG_INFINITY;
            let max = seen
                .chunks(LANES)
                .fold(s.splat_f32(lowest), |max, x| s.max_f32(max, load_padded(s, x, lowest)));
            let max = s.max_lanes(max) * scale;
            let (scales, maxima) = (s.splat_f32(scale), s.splat_f32(-max));
            let mut sum = 0.0;
            let mut sums = s.splat_f32(0.0);
            for x in seen.chunks_mut(LANES) {
                let value = exp(s, s.fma(load(s, x), scales, maxima));
                store(s, value, x);
                // As stored: nothing in the lanes beyond.
                sums = s.add_f32(sums, load(s, x));
            }
            sum += s.sum_lanes(sums);
            *log_partition = max + sum.ln();
            let factor = s.splat_f32(1.0 / sum);
            for x in seen.chunks_mut(LANES) {
                store(s, s.mul_f32(load(s, x), factor), x);
            }
        }
        lower(s, &Plain(&tiles.scores), &tiles.value, seq, &mut tiles.out);
    }
}

struct Backward<'a> {
    shape: Attention,
    tiles: &'a mut Tiles,
    back: &'a mut BackTiles,
    log_partition: &'a [f32],
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { shape: Attention { width, seq, .. }, tiles, back, log_partition } = self;
        let scale = self.shape.scale();
        visible(s, &tiles.query, &tiles.key_t, width, seq, &mut tiles.scores);
        visible(s, &back.grad, &back.value_t, width, seq, &mut back.dscores);
        for (position, log_partition) in log_partition.iter().enumerate() {
            let mut along = s.splat_f32(0.0);
            for (grad, out) in
                back.grad.row(position).chunks(LANES).zip(tiles.out.row(position).chunks(LANES))
            {
                along = s.fma(load(s, grad), load(s, out), along);
            }
            let along = s.splat_f32(s.sum_lanes(along));
            let (scales, partitions) = (s.splat_f32(scale), s.splat_f32(-log_partition));
            let (scores, dscores) = (tiles.scores.row_mut(position), back.dscores.row_mut(position));
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
        upper(s, &Transposed(&tiles.scores), &back.grad, seq, &mut back.dvalue);
        upper(s, &Transposed(&back.dscores), &tiles.query, seq, &mut back.dkey);
        lower(s, &Plain(&back.dscores), &tiles.key, seq, &mut back.dquery);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, numbers, pools};

    /// `softmax(q k^T / sqrt(width)) v` in float64, by its definition.
    fn reference(shape: Attention, [q, k, v]: [&[f64]; 3]) -> Vec<f64> {
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
            let shape = Attention { batch, seq, heads, kv_heads, width };
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
                attention(&pool, shape, views, &mut out, &mut log_partition);
                assert_close("out", &out, expected.iter().copied(), 3e-6);
                let mut grads = [
                    vec![f32::NAN; shape.queries()],
                    vec![f32::NAN; shape.keys()],
                    vec![f32::NAN; shape.keys()],
                ];
                let [dq, dk, dv] = &mut grads;
                attention_backward(&pool, shape, views, &out, &log_partition, &grad, [dq, dk, dv]);
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
        let shape = Attention { batch: 1, seq: 20, heads: 1, kv_heads: 1, width: 4 };
        let query = vec![100.0; shape.queries()];
        let mut key = numbers(shape.keys(), 100.0, 5);
        let value = numbers(shape.keys(), 1.0, 6);
        for pool in pools() {
            let run = |key: &[f32]| {
                let mut out = vec![0.0; shape.queries()];
                attention(&pool, shape, [&query, key, &value], &mut out, &mut [0.0; 20]);
                assert!(out.iter().all(|x| x.is_finite()));
                out
            };
            let before = run(&key);
            key[19 * 4..].fill(f32::MAX / 1e6);
            assert_eq!(run(&key)[..19 * 4], before[..19 * 4]);
        }
    }
}
