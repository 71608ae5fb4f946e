//! Attention of one head over keys and values in f16.
//!
//! Lines hold 16 halves. Keys lie in tiles of 16 positions: line `d` of a tile is component `d` of each, so that scores
//! need no sum across lanes. Values lie position by position, padded to whole lines. Sums run over components and
//! positions in order, whatever else is computed beside them: a query gets the same bits alone and among others.

use crate::{
    Isa,
    elementwise::Softmax,
    simd::{Kernel, LANES, Simd},
};
use half::f16;

/// 16 components or positions.
pub type Line = [f16; LANES];

/// Queries that share a pass over keys and values, and rows of scores that [`attend`] needs.
pub const QUERIES: usize = 4;

/// Lines for the keys of so many positions.
pub fn key_lines(positions: usize, width: usize) -> usize {
    positions.div_ceil(LANES) * width
}

/// Lines for the values of so many positions.
pub fn value_lines(positions: usize, width: usize) -> usize {
    positions * width.div_ceil(LANES)
}

/// Floats of a row of scores over so many positions.
pub fn score_row(positions: usize) -> usize {
    positions.next_multiple_of(LANES)
}

/// Rounds key and value of a position to f16, ties to even, and writes them.
///
/// # Panics
/// When there is no room for the position.
pub fn store(isa: Isa, position: usize, key: &[f32], value: &[f32], keys: &mut [Line], values: &mut [Line]) {
    let lines = &mut keys[key_lines(position / LANES * LANES, key.len())..][..key.len()];
    for (line, component) in lines.iter_mut().zip(key) {
        line[position % LANES] = f16::from_f32(*component);
    }
    let lines = &mut values[value_lines(position, value.len())..][..value.len().div_ceil(LANES)];
    for (line, components) in lines.iter_mut().zip(value.chunks(LANES)) {
        isa.to_f16(components, &mut line[..components.len()]);
    }
}

/// `out[t] = sum_j softmax_j(query[t] · key[j] / sqrt(width)) value[j]` over the first `seen[t]` positions.
///
/// # Shapes
/// queries and out `[seen.len(), width]`, scores `[QUERIES, score_row(positions)]` of any contents
///
/// # Panics
/// When shapes do not fit, or a query sees nothing.
pub fn attend(
    isa: Isa,
    queries: &[f32],
    seen: &[usize],
    keys: &[Line],
    values: &[Line],
    scores: &mut [f32],
    out: &mut [f32],
) {
    let width = queries.len() / seen.len().max(1);
    assert!(queries.len() == width * seen.len() && out.len() == queries.len(), "queries and results");
    assert!(seen.iter().all(|seen| *seen > 0), "a query sees a position");
    isa.run(Attend { width, queries, seen, keys, values, scores, out });
}

struct Attend<'a> {
    width: usize,
    queries: &'a [f32],
    seen: &'a [usize],
    keys: &'a [Line],
    values: &'a [Line],
    scores: &'a mut [f32],
    out: &'a mut [f32],
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let mut first = 0;
        while self.seen.len() - first >= QUERIES {
            self.queries::<S, QUERIES, 1>(s, first);
            first += QUERIES;
        }
        while first < self.seen.len() {
            self.queries::<S, 1, 4>(s, first);
            first += 1;
        }
    }
}

impl Attend<'_> {
    /// `T` queries together, `N` lines at a time, as far as there are so many.
    #[inline(always)]
    fn queries<S: Simd, const T: usize, const N: usize>(&mut self, s: S, first: usize) {
        let width = self.width;
        let seen: [usize; T] = std::array::from_fn(|t| self.seen[first + t]);
        let tiles = seen.into_iter().fold(0, usize::max).div_ceil(LANES);
        let row = self.scores.len() / QUERIES;
        let mut tile = 0;
        while tiles - tile >= N {
            self.scores::<S, T, N>(s, first, tile);
            tile += N;
        }
        while tile < tiles {
            self.scores::<S, T, 1>(s, first, tile);
            tile += 1;
        }
        for (t, seen) in seen.iter().enumerate() {
            Softmax { x: &mut self.scores[t * row..][..*seen] }.run(s);
        }
        let lines = width.div_ceil(LANES);
        let mut line = 0;
        while lines - line >= N {
            self.mix::<S, T, N>(s, first, line);
            line += N;
        }
        while line < lines {
            self.mix::<S, T, 1>(s, first, line);
            line += 1;
        }
    }

    /// Scores over `N` tiles of positions.
    #[inline(always)]
    fn scores<S: Simd, const T: usize, const N: usize>(&mut self, s: S, first: usize, tile: usize) {
        let width = self.width;
        let queries: [&[f32]; T] = std::array::from_fn(|t| &self.queries[(first + t) * width..][..width]);
        let tiles: [&[Line]; N] = std::array::from_fn(|n| &self.keys[(tile + n) * width..][..width]);
        let mut sums = [[s.splat_f32(0.0); N]; T];
        for d in 0..width {
            let keys: [S::Float; N] = std::array::from_fn(|n| s.load_f16(&tiles[n][d]));
            for t in 0..T {
                let query = s.splat_f32(queries[t][d]);
                for n in 0..N {
                    sums[t][n] = s.fma(query, keys[n], sums[t][n]);
                }
            }
        }
        let scale = s.splat_f32(1.0 / (width as f32).sqrt());
        let row = self.scores.len() / QUERIES;
        for (t, sums) in sums.into_iter().enumerate() {
            let scores = &mut self.scores[t * row + tile * LANES..][..N * LANES];
            for (scores, sum) in scores.as_chunks_mut::<LANES>().0.iter_mut().zip(sums) {
                s.store_f32(s.mul_f32(sum, scale), scores);
            }
        }
    }

    /// Sums of values by their weights, `N` lines of each.
    #[inline(always)]
    fn mix<S: Simd, const T: usize, const N: usize>(&mut self, s: S, first: usize, line: usize) {
        let lines = self.width.div_ceil(LANES);
        let row = self.scores.len() / QUERIES;
        let seen: [usize; T] = std::array::from_fn(|t| self.seen[first + t]);
        let common = seen.into_iter().fold(usize::MAX, usize::min);
        let weights: [&[f32]; T] = std::array::from_fn(|t| &self.scores[t * row..][..seen[t]]);
        let mut sums = [[s.splat_f32(0.0); N]; T];
        let mut values = self.values.chunks_exact(lines).map(|value| &value[line..line + N]);
        for j in 0..common {
            let Some(value) = values.next() else { break };
            let value: [S::Float; N] = std::array::from_fn(|n| s.load_f16(&value[n]));
            for t in 0..T {
                let weight = s.splat_f32(weights[t][j]);
                for n in 0..N {
                    sums[t][n] = s.fma(weight, value[n], sums[t][n]);
                }
            }
        }
        for t in 0..T {
            for (j, weight) in weights[t].iter().enumerate().skip(common) {
                let value = &self.values[j * lines + line..][..N];
                for n in 0..N {
                    sums[t][n] = s.fma(s.splat_f32(*weight), s.load_f16(&value[n]), sums[t][n]);
                }
            }
            let start = line * LANES;
            let out = &mut self.out[(first + t) * self.width..][..self.width][start..];
            for (out, sum) in out.chunks_mut(LANES).zip(sums[t]) {
                let len = out.len();
                out.copy_from_slice(&s.array(sum)[..len]);
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

    #[test]
    fn attention_is_that_of_float64_and_the_same_bits_alone_or_among_others() {
        for width in [2, 14, 16, 64, 72, 100] {
            let positions = 83;
            let (key, value) = (numbers(positions * width, 1), numbers(positions * width, 2));
            let mut keys = vec![[f16::ZERO; LANES]; key_lines(positions, width)];
            let mut values = vec![[f16::ZERO; LANES]; value_lines(positions, width)];
            let seen: Vec<usize> = [83, 1, 2, 16, 17, 64, 65, 82, 83, 81, 80].into();
            let queries = numbers(seen.len() * width, 3);
            let mut first: Option<Vec<f32>> = None;
            for isa in Isa::available() {
                for j in 0..positions {
                    let part = j * width..(j + 1) * width;
                    store(isa, j, &key[part.clone()], &value[part], &mut keys, &mut values);
                }
                let mut scores = vec![f32::NAN; QUERIES * score_row(positions)];
                let mut out = vec![f32::NAN; queries.len()];
                attend(isa, &queries, &seen, &keys, &values, &mut scores, &mut out);
                for (t, seen) in seen.iter().enumerate() {
                    let query = &queries[t * width..(t + 1) * width];
                    let mut alone = vec![f32::NAN; width];
                    attend(isa, query, &[*seen], &keys, &values, &mut scores, &mut alone);
                    assert_eq!(alone, out[t * width..(t + 1) * width], "{isa:?}, width {width}, query {t}");
                    let half = |x: &f32| f16::from_f32(*x).to_f64();
                    let dot = |key: &[f32]| {
                        let products = query.iter().zip(key).map(|(q, k)| f64::from(*q) * half(k));
                        products.sum::<f64>() / (width as f64).sqrt()
                    };
                    let powers: Vec<f64> = key.chunks(width).take(*seen).map(|key| dot(key).exp()).collect();
                    let total: f64 = powers.iter().sum();
                    for (i, found) in alone.iter().enumerate() {
                        let terms =
                            powers.iter().zip(value.chunks(width)).map(|(p, value)| p * half(&value[i]));
                        let expected = terms.sum::<f64>() / total;
                        assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} for {expected}");
                    }
                }
                assert_eq!(first.get_or_insert(out.clone()), &out, "{isa:?}");
            }
        }
    }
}
