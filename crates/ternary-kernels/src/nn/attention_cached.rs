//! Attention of one head over a KV cache in f16 or int8, for inference.
//!
//! # Layout of the KV cache
//! Numbers are stored in lines of 16 ([`KvLine`]). The values of a position are one row. The keys of four positions are
//! interleaved by quads of components:
//!
//! ```text
//! keys    [position / 4][component / 4][4 positions][4 components]
//! values  [position][component / 16][16 components]
//! scales  [position / 16][key, value][16 positions]                f32, int8 only: one for each key and each value
//!
//! one line of keys:    k0.c0 k0.c1 k0.c2 k0.c3 | k1.c0 .. k1.c3 | k2.c0 .. k2.c3 | k3.c0 .. k3.c3
//! ```
//!
//! Components are padded with zeros to whole quads (keys) or lines (values), positions of keys to whole groups of four.
//!
//! # Algorithm
//! ```text
//! for up to 4 queries at a time:
//!     for each 16 positions:
//!         for each group of 4 positions, for each quad of components:
//!             acc[group] += line of keys * (quad of the query, repeated four times)
//!         scores = sums of quarters of acc * (1 / sqrt(width)) * scales of the keys
//!     weights = softmax(scores up to the last visible position) * scales of the values
//!     for each line of components:
//!         out = sum over positions of weight * line of values
//! ```
//!
//! Int8 scales are applied to scores and weights, of which there is one per position, and never to components.
//!
//! | queries | sums in registers (AVX-512) | used for |
//! |---|---|---|
//! | 4 together | 4 queries x 2 groups of keys or lines of values | prompts, several heads that share keys |
//! | 1 | 4 groups | decoding one token |
//!
//! AVX2 and NEON hold one group for 4 queries. The order of additions is the same in all cases, so that a query gets the same
//! bits alone and among others.
//!
//! # Why keys in groups of four
//! A line with one position would leave a sum across 16 lanes to each score. A line with sixteen positions needs no such sum,
//! but a new key is then scattered over as many cache lines as it has components. Groups of four write 8 cache lines per head
//! of 64 components instead of 32. Eight texts of 64 tokens on two threads ran at 2,045 to 2,054 tokens/s with sixteen
//! positions per line, and at 2,145 to 2,150 with four. With AVX2, the sums across lanes cost 2 to 4 % of a long prompt.
//!
//! # Tried
//! - The first 16 KiB of keys ([`prefetch`]) and of values are prefetched before they are needed; the rest is one stream, which
//!   the CPU predicts. Eight texts of 128 tokens: 1,888 tokens/s before, 1,967 with values, 2,025 with keys as well (what keys
//!   contribute is uncertain: 2,268, 2,346 and 2,344 in another session).
//! - Sums of values that stay in registers took a third off attention.
//! - KV caches in huge pages: attention 5 % faster, six times the memory.
//! - Prefetching the lines of a key before it is written: no change.

use super::softmax::Softmax;
use crate::{
    Isa,
    matmul::activations::{ABSMAX_MIN, quantize},
    simd::{
        self, Kernel, LANES, Simd,
        vector_ops::{load, store as store_f32},
    },
};
use half::f16;

/// 16 numbers: 16 components of a value, or 4 components of the keys of 4 positions.
pub type KvLine<T> = [T; LANES];

/// Positions per group of keys, and components of each in one line.
const QUAD: usize = 4;

/// Queries that share a pass over keys and values. [`attend`] needs as many rows of scores.
pub const QUERIES_PER_PASS: usize = 4;

/// Lines for the keys of `positions` positions of `width` components.
pub fn key_lines(positions: usize, width: usize) -> usize {
    positions.div_ceil(QUAD) * width.div_ceil(QUAD)
}

/// Lines for the values of `positions` positions of `width` components.
pub fn value_lines(positions: usize, width: usize) -> usize {
    positions * width.div_ceil(LANES)
}

/// Floats per row of scores over `positions` positions: padded to whole vectors.
pub fn score_row_len(positions: usize) -> usize {
    positions.next_multiple_of(LANES)
}

/// Bytes of a cache line.
const CACHE_LINE_BYTES: usize = size_of::<simd::CacheLine>();

/// Keys and values of one head. The head of the file `nn/attention_cached.rs` has the layout.
#[derive(Clone, Copy, Debug)]
pub enum KvHead<'a> {
    /// Half precision.
    F16 {
        /// `[position / 4, component / 4]`
        keys: &'a [KvLine<f16>],
        /// `[position, component / 16]`
        values: &'a [KvLine<f16>],
    },
    /// Int8 codes, with a scale for each key and each value.
    Int8 {
        /// `[position / 4, component / 4]`
        keys: &'a [KvLine<i8>],
        /// `[position, component / 16]`
        values: &'a [KvLine<i8>],
        /// `[position / 16]`
        scales: &'a [KvScales],
    },
}

/// Keys and values of one head, to be written.
#[derive(Debug)]
pub enum KvHeadMut<'a> {
    /// Half precision.
    F16 {
        /// `[position / 4, component / 4]`
        keys: &'a mut [KvLine<f16>],
        /// `[position, component / 16]`
        values: &'a mut [KvLine<f16>],
    },
    /// Int8 codes, with a scale for each key and each value.
    Int8 {
        /// `[position / 4, component / 4]`
        keys: &'a mut [KvLine<i8>],
        /// `[position, component / 16]`
        values: &'a mut [KvLine<i8>],
        /// `[position / 16]`
        scales: &'a mut [KvScales],
    },
}

/// Scales of the keys and of the values of 16 positions.
pub type KvScales = [KvLine<f32>; 2];

/// Rounds key and value of a position and writes them to the KV cache: to f16, ties to even, or to int8 with
/// `scale = max(absmax, 1e-5) / 127`, as activations are.
///
/// # Shapes
/// key, value `[width]`
///
/// # Panics
/// When the cache has no such position.
pub fn store(isa: Isa, position: usize, key: &[f32], value: &[f32], head: KvHeadMut) {
    let group = position / QUAD * QUAD;
    let place = position - group;
    let key_lines = key_lines(group, key.len())..key_lines(group + 1, key.len());
    let value_lines = value_lines(position, value.len())..value_lines(position + 1, value.len());
    match head {
        KvHeadMut::F16 { keys, values } => {
            let (keys, values) = (&mut keys[key_lines], &mut values[value_lines]);
            isa.run(StoreF16 { key, value, place, keys, values });
        }
        KvHeadMut::Int8 { keys, values, scales } => {
            let (keys, values) = (&mut keys[key_lines], &mut values[value_lines]);
            let [key_scales, value_scales] = &mut scales[position / LANES];
            let lane = position % LANES;
            let put = |block, codes| write_key(&mut keys[block * QUAD..], place, codes);
            key_scales[lane] = isa.run(StoreInt8 { x: key, put });
            value_scales[lane] = isa.run(StoreInt8 { x: value, put: |block, codes| values[block] = codes });
        }
    }
}

/// Writes up to 16 components of a key to the lines of its group, at place `place` of four.
#[inline(always)]
fn write_key<T: Copy>(lines: &mut [KvLine<T>], place: usize, components: KvLine<T>) {
    for (line, quad) in lines.iter_mut().zip(components.as_chunks::<QUAD>().0) {
        line.as_chunks_mut::<QUAD>().0[place] = *quad;
    }
}

/// Rounds key and value of a position to f16 and writes them.
struct StoreF16<'a> {
    /// `[width]`
    key: &'a [f32],
    /// `[width]`
    value: &'a [f32],
    /// Place of the position in its group of four.
    place: usize,
    /// Lines of the group, `[width / 4, rounded up]`.
    keys: &'a mut [KvLine<f16>],
    /// Lines of the position, `[width / 16, rounded up]`.
    values: &'a mut [KvLine<f16>],
}

impl Kernel for StoreF16<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (lines, components) in self.keys.chunks_mut(QUAD).zip(self.key.chunks(LANES)) {
            let mut halves = [f16::ZERO; LANES];
            s.store_f16(load(s, components), &mut halves);
            write_key(lines, self.place, halves);
        }
        for (line, components) in self.values.iter_mut().zip(self.value.chunks(LANES)) {
            s.store_f16(load(s, components), line);
        }
    }
}

/// Quantizes `x` and passes the codes to `put(block, codes)`. Returns the scale.
struct StoreInt8<'a, F> {
    x: &'a [f32],
    put: F,
}

impl<F: FnMut(usize, KvLine<i8>)> Kernel for StoreInt8<'_, F> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        quantize(s, self.x, None, ABSMAX_MIN, self.put)
    }
}

/// `out[t] = sum_j softmax_j(query[t] · key[j] / sqrt(width)) value[j]` over the first `seen[t]` positions.
///
/// # Shapes
/// queries, out `[seen.len(), width]`; scores `[QUERIES_PER_PASS, score_row_len(positions)]`, of any contents
///
/// # Panics
/// When shapes do not fit, or a query sees no position.
///
/// # Example
/// ```
/// use half::f16;
/// use ternary_kernels::{Isa, nn::attention_cached::*};
/// let (isa, width, positions) = (Isa::get(), 4, 2);
/// let mut keys = vec![[f16::ZERO; 16]; key_lines(positions, width)];
/// let mut values = vec![[f16::ZERO; 16]; value_lines(positions, width)];
/// for position in 0..positions {
///     let head = KvHeadMut::F16 { keys: &mut keys, values: &mut values };
///     store(isa, position, &[0.0; 4], &[position as f32; 4], head);
/// }
/// let mut scores = vec![0.0; QUERIES_PER_PASS * score_row_len(positions)];
/// let mut out = [0.0; 4];
/// // Equal keys have equal weights: the result is the mean of the values.
/// attend(isa, &[1.0; 4], &[2], KvHead::F16 { keys: &keys, values: &values }, &mut scores, &mut out);
/// assert_eq!(out, [0.5; 4]);
/// ```
pub fn attend(isa: Isa, queries: &[f32], seen: &[usize], head: KvHead, scores: &mut [f32], out: &mut [f32]) {
    let width = queries.len() / seen.len().max(1);
    assert!(queries.len() == width * seen.len() && out.len() == queries.len(), "queries and results");
    assert!(seen.iter().all(|seen| *seen > 0), "a query sees a position");
    match head {
        KvHead::F16 { keys, values } => {
            isa.run(Attend { width, queries, seen, keys, values, scales: None, scores, out });
        }
        KvHead::Int8 { keys, values, scales } => {
            isa.run(Attend { width, queries, seen, keys, values, scales: Some(scales), scores, out });
        }
    }
}

/// Prefetches the first keys of `positions` positions, for a thread that is about to attend to them.
///
/// # Panics
/// When the cache has fewer positions.
pub fn prefetch(isa: Isa, positions: usize, width: usize, head: KvHead) {
    let lines = ..key_lines(positions, width);
    match head {
        KvHead::F16 { keys, .. } => isa.run(Prefetch(&keys[lines])),
        KvHead::Int8 { keys, .. } => isa.run(Prefetch(&keys[lines])),
    }
}

/// Bytes of keys, and of values, that are prefetched: a part of the first-level cache. The rest is one stream, which the CPU predicts.
const PREFETCH_BYTES: usize = 16 << 10;

/// Prefetches the first [`PREFETCH_BYTES`] of some lines.
struct Prefetch<'a, C>(&'a [KvLine<C>]);

impl<C> Kernel for Prefetch<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let lines = self.0.iter().take(PREFETCH_BYTES / size_of::<KvLine<C>>());
        lines.step_by(CACHE_LINE_BYTES / size_of::<KvLine<C>>()).for_each(|line| s.prefetch(line, 0));
    }
}

/// A number format of the KV cache.
trait KvNumber: Copy {
    /// Loads a line and converts it to f32.
    fn load<S: Simd>(s: S, line: &KvLine<Self>) -> S::Float;
}

impl KvNumber for f16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, line: &KvLine<Self>) -> S::Float {
        s.load_f16(line)
    }
}

impl KvNumber for i8 {
    #[inline(always)]
    fn load<S: Simd>(s: S, line: &KvLine<Self>) -> S::Float {
        s.to_float(s.load_i8(line))
    }
}

/// The arguments of [`attend`].
struct Attend<'a, C> {
    /// Components per head.
    width: usize,
    /// `[queries, width]`
    queries: &'a [f32],
    /// Visible positions per query.
    seen: &'a [usize],
    /// Lines of keys.
    keys: &'a [KvLine<C>],
    /// Lines of values.
    values: &'a [KvLine<C>],
    /// `None` for f16.
    scales: Option<&'a [KvScales]>,
    /// `[QUERIES_PER_PASS, row]`
    scores: &'a mut [f32],
    /// `[queries, width]`
    out: &'a mut [f32],
}

/// Loads up to four components, padded with zeros, and repeats them in each quarter.
#[inline(always)]
fn load_quad<S: Simd>(s: S, components: &[f32]) -> S::Float {
    match components.first_chunk() {
        Some(quad) => s.splat4_f32(quad),
        None => {
            let mut quad = [0.0; QUAD];
            quad[..components.len()].copy_from_slice(components);
            s.splat4_f32(&quad)
        }
    }
}

impl<C: KvNumber> Kernel for Attend<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let mut first = 0;
        while self.seen.len() - first >= QUERIES_PER_PASS {
            // As many sums as the registers hold, to hide the latency of each.
            match S::REGISTER_TILES {
                1 => self.attend_queries::<S, QUERIES_PER_PASS, 1>(s, first),
                _ => self.attend_queries::<S, QUERIES_PER_PASS, 2>(s, first),
            }
            first += QUERIES_PER_PASS;
        }
        while first < self.seen.len() {
            self.attend_queries::<S, 1, QUAD>(s, first);
            first += 1;
        }
    }
}

impl<C: KvNumber> Attend<'_, C> {
    /// Attention of `T` queries together, with `N` groups of keys or `N` lines of values at a time.
    #[inline(always)]
    fn attend_queries<S: Simd, const T: usize, const N: usize>(&mut self, s: S, first: usize) {
        let width = self.width;
        let seen: [usize; T] = std::array::from_fn(|t| self.seen[first + t]);
        let positions = seen.into_iter().fold(0, usize::max);
        for start in (0..positions).step_by(LANES) {
            self.write_scores::<S, T, N>(s, first, start, positions);
        }
        let row = self.scores.len() / QUERIES_PER_PASS;
        for (t, seen) in seen.iter().enumerate() {
            let weights = &mut self.scores[t * row..][..*seen];
            Softmax { x: &mut *weights }.run(s);
            let scales = self.scales.unwrap_or_default();
            for (weights, [_, scales]) in weights.chunks_mut(LANES).zip(scales) {
                store_f32(s, s.mul_f32(load(s, weights), s.load_f32(scales)), weights);
            }
        }
        let lines = width.div_ceil(LANES);
        let mut line = 0;
        while lines - line >= N {
            self.weighted_values::<S, T, N>(s, first, line);
            line += N;
        }
        while line < lines {
            self.weighted_values::<S, T, 1>(s, first, line);
            line += 1;
        }
    }

    /// Writes the scores of up to 16 positions from `start`.
    #[inline(always)]
    fn write_scores<S: Simd, const T: usize, const N: usize>(
        &mut self,
        s: S,
        first: usize,
        start: usize,
        positions: usize,
    ) {
        if T == 1 {
            // The values of these positions arrive while the keys are multiplied. With several queries
            // at a time, they are in the cache from the queries before.
            let ahead = PREFETCH_BYTES / size_of::<KvLine<C>>();
            let [from, to] =
                [start, start + LANES].map(|position| value_lines(position, self.width).min(ahead));
            Prefetch(&self.values[from..to.min(self.values.len())]).run(s);
        }
        let groups = (positions - start).div_ceil(QUAD).min(QUAD);
        let mut sums = [[s.splat_f32(0.0); QUAD]; T];
        let mut group = 0;
        while groups - group >= N {
            let dots = self.key_products::<S, T, N>(s, first, start / QUAD + group);
            sums.iter_mut().zip(dots).for_each(|(sums, dots)| sums[group..group + N].copy_from_slice(&dots));
            group += N;
        }
        while group < groups {
            let dots = self.key_products::<S, T, 1>(s, first, start / QUAD + group);
            sums.iter_mut().zip(dots).for_each(|(sums, [dots])| sums[group] = dots);
            group += 1;
        }
        let scale = s.splat_f32(1.0 / (self.width as f32).sqrt());
        let scale = match self.scales {
            Some(scales) => s.mul_f32(scale, s.load_f32(&scales[start / LANES][0])),
            None => scale,
        };
        let row = self.scores.len() / QUERIES_PER_PASS;
        for (t, sums) in sums.into_iter().enumerate() {
            let scores = &mut self.scores[t * row + start..][..LANES];
            store_f32(s, s.mul_f32(s.sum_quads(sums), scale), scores);
        }
    }

    /// Products of `T` queries and the keys of `N` groups: each quarter of a vector has those of one position, still to be added up.
    #[inline(always)]
    fn key_products<S: Simd, const T: usize, const N: usize>(
        &self,
        s: S,
        first: usize,
        group: usize,
    ) -> [[S::Float; N]; T] {
        let (width, lines) = (self.width, self.width.div_ceil(QUAD));
        let queries: [&[f32]; T] = std::array::from_fn(|t| &self.queries[(first + t) * width..][..width]);
        let groups: [&[KvLine<C>]; N] = std::array::from_fn(|n| &self.keys[(group + n) * lines..][..lines]);
        let mut sums = [[s.splat_f32(0.0); N]; T];
        for line in 0..lines {
            let keys: [S::Float; N] = std::array::from_fn(|n| C::load(s, &groups[n][line]));
            for t in 0..T {
                let query = load_quad(s, &queries[t][line * QUAD..]);
                for n in 0..N {
                    sums[t][n] = s.fma(query, keys[n], sums[t][n]);
                }
            }
        }
        sums
    }

    /// Sums of values times weights: `N` lines of components, for `T` queries.
    #[inline(always)]
    fn weighted_values<S: Simd, const T: usize, const N: usize>(&mut self, s: S, first: usize, line: usize) {
        let lines = self.width.div_ceil(LANES);
        let row = self.scores.len() / QUERIES_PER_PASS;
        let seen: [usize; T] = std::array::from_fn(|t| self.seen[first + t]);
        let common = seen.into_iter().fold(usize::MAX, usize::min);
        let weights: [&[f32]; T] = std::array::from_fn(|t| &self.scores[t * row..][..seen[t]]);
        let mut sums = [[s.splat_f32(0.0); N]; T];
        let firsts = weights.map(|weights| &weights[..common]);
        for (j, value) in self.values[..common * lines].chunks_exact(lines).enumerate() {
            let value: [S::Float; N] = std::array::from_fn(|n| C::load(s, &value[line + n]));
            for t in 0..T {
                let weight = s.splat_f32(firsts[t][j]);
                for n in 0..N {
                    sums[t][n] = s.fma(weight, value[n], sums[t][n]);
                }
            }
        }
        // Through memory: indexing the sums by a variable would keep them in memory in the loop above, too.
        let sums = sums.map(|sums| sums.map(|sum| s.to_array(sum)));
        for t in 0..T {
            let mut sums: [S::Float; N] = std::array::from_fn(|n| s.load_f32(&sums[t][n]));
            for (j, weight) in weights[t].iter().enumerate().skip(common) {
                let value = &self.values[j * lines + line..][..N];
                for n in 0..N {
                    sums[n] = s.fma(s.splat_f32(*weight), C::load(s, &value[n]), sums[n]);
                }
            }
            let start = line * LANES;
            let out = &mut self.out[(first + t) * self.width..][..self.width][start..];
            for (out, sum) in out.chunks_mut(LANES).zip(sums) {
                let len = out.len();
                out.copy_from_slice(&s.to_array(sum)[..len]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| (((i + 31 * seed) * 2_654_435_761 >> 7) % 2001) as f32 / 500.0 - 2.0).collect()
    }

    /// Lines of one head of either kind, and what its rows of `width` are rounded to.
    enum Lines {
        F16(Vec<KvLine<f16>>, Vec<KvLine<f16>>),
        Int8(Vec<KvLine<i8>>, Vec<KvLine<i8>>, Vec<KvScales>),
    }

    impl Lines {
        fn both(positions: usize, width: usize) -> [Self; 2] {
            let (keys, values) = (key_lines(positions, width), value_lines(positions, width));
            // What a sequence has left behind is of no account, but for the padding.
            let half = |lines| vec![[f16::ZERO; LANES]; lines];
            let byte = |lines| vec![[0; LANES]; lines];
            let scales = vec![[[f32::NAN; LANES]; 2]; positions.div_ceil(LANES)];
            [Self::F16(half(keys), half(values)), Self::Int8(byte(keys), byte(values), scales)]
        }

        fn head_mut(&mut self) -> KvHeadMut<'_> {
            match self {
                Self::F16(keys, values) => KvHeadMut::F16 { keys, values },
                Self::Int8(keys, values, scales) => KvHeadMut::Int8 { keys, values, scales },
            }
        }

        fn head(&self) -> KvHead<'_> {
            match self {
                Self::F16(keys, values) => KvHead::F16 { keys, values },
                Self::Int8(keys, values, scales) => KvHead::Int8 { keys, values, scales },
            }
        }

        fn rounded(&self, row: &[f32]) -> Vec<f64> {
            if let Self::F16(..) = self {
                return row.iter().map(|x| f16::from_f32(*x).to_f64()).collect();
            }
            let scale = row.iter().fold(1e-5f32, |max, x| max.max(x.abs())) / 127.0;
            row.iter().map(|x| f64::from((x / scale).round_ties_even()) * f64::from(scale)).collect()
        }
    }

    #[test]
    fn keys_and_values_are_stored_as_the_nearest_f16() {
        for isa in Isa::available() {
            for width in [1, 16, 37, 64] {
                let row = |step: f32| (0..width).map(|i| (i as f32 * step).sin() * 3.0).collect::<Vec<_>>();
                let (key, value) = (row(0.7), row(1.3));
                let mut keys = vec![[f16::NAN; LANES]; key_lines(20, width)];
                let mut values = vec![[f16::NAN; LANES]; value_lines(20, width)];
                let head = KvHeadMut::F16 { keys: &mut keys, values: &mut values };
                store(isa, 18, &key, &value, head);
                for i in 0..width {
                    let line = key_lines(16, width) + i / QUAD;
                    assert_eq!(keys[line][2 * QUAD + i % QUAD], f16::from_f32(key[i]), "{isa:?}");
                    let line = value_lines(18, width) + i / LANES;
                    assert_eq!(values[line][i % LANES], f16::from_f32(value[i]), "{isa:?}");
                }
                let written = keys.iter().flatten().filter(|x| !x.is_nan()).count();
                assert_eq!(written, width.next_multiple_of(QUAD), "{isa:?}, with padding");
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore)] // nothing here is unsafe, and it takes very long
    fn attention_agrees_with_float64_and_is_the_same_in_a_batch() {
        for width in [2, 14, 16, 64, 72, 100] {
            let positions = 83;
            // Positions of very different size, one of zeros.
            let mut key = numbers(positions * width, 1);
            let mut value = numbers(positions * width, 2);
            key[5 * width..6 * width].fill(0.0);
            value[7 * width..8 * width].fill(0.0);
            value[9 * width..10 * width].iter_mut().for_each(|x| *x *= 100.0);
            value[11 * width..12 * width].iter_mut().for_each(|x| *x *= 1e-3);
            let seen: Vec<usize> = [83, 1, 2, 16, 17, 64, 65, 82, 83, 81, 80].into();
            let queries = numbers(seen.len() * width, 3);
            for mut lines in Lines::both(positions, width) {
                let rounded = |rows: &[f32]| -> Vec<Vec<f64>> {
                    rows.chunks(width).map(|row| lines.rounded(row)).collect()
                };
                let (exact_keys, exact_values) = (rounded(&key), rounded(&value));
                let mut first: Option<Vec<f32>> = None;
                for isa in Isa::available() {
                    for j in 0..positions {
                        let part = j * width..(j + 1) * width;
                        store(isa, j, &key[part.clone()], &value[part], lines.head_mut());
                    }
                    let mut scores = vec![f32::NAN; QUERIES_PER_PASS * score_row_len(positions)];
                    let mut out = vec![f32::NAN; queries.len()];
                    attend(isa, &queries, &seen, lines.head(), &mut scores, &mut out);
                    for (t, seen) in seen.iter().enumerate() {
                        let query = &queries[t * width..(t + 1) * width];
                        let mut alone = vec![f32::NAN; width];
                        attend(isa, query, &[*seen], lines.head(), &mut scores, &mut alone);
                        assert_eq!(
                            alone,
                            out[t * width..(t + 1) * width],
                            "{isa:?}, width {width}, query {t}"
                        );
                        let power = |key: &Vec<f64>| {
                            let products = query.iter().zip(key).map(|(q, k)| f64::from(*q) * k);
                            (products.sum::<f64>() / (width as f64).sqrt()).exp()
                        };
                        let powers: Vec<f64> = exact_keys[..*seen].iter().map(power).collect();
                        let total: f64 = powers.iter().sum();
                        for (i, found) in alone.iter().enumerate() {
                            let terms = powers.iter().zip(&exact_values).map(|(p, value)| p * value[i]);
                            let (sum, size) =
                                terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                            let (expected, size) = (sum / total, size / total);
                            let error = (f64::from(*found) - expected).abs();
                            assert!(error < 1e-5 * size.max(1.0), "{found} for {expected}");
                        }
                    }
                    assert_eq!(first.get_or_insert(out.clone()), &out, "{isa:?}");
                }
            }
        }
    }
}
