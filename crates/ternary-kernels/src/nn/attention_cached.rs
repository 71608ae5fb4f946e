//! Attention of one head over keys and values in f16 or int8.
//!
//! Lines hold 16 numbers. Keys lie in groups of four positions: a line has four components of each. A position by itself
//! would leave more sums across lanes to the scores; sixteen of them in a line, and a new key is scattered over as many
//! lines as it has components. Values lie position by position. Both are padded to whole lines with zeros. Int8 has one
//! scale for the key of a position and one for its value; they meet the scores and the weights, never the components. Sums
//! run in one order, whatever else is computed beside them: a query gets the same bits alone and among others.

use super::softmax::Softmax;
use crate::{
    Isa,
    matmul::activations::{ABSMAX_MIN, quantize},
    simd::{
        self, Kernel, LANES, Simd,
        vector_ops::{load, store as store_floats},
    },
};
use half::f16;

/// 16 components of a value, or 4 of the keys of 4 positions.
pub type Line<T> = [T; LANES];

/// Positions whose keys share lines, and components that each has in one.
const FOUR: usize = 4;

/// Queries that share a pass over keys and values, and rows of scores that [`attend`] needs.
pub const QUERIES: usize = 4;

/// Lines for the keys of so many positions.
pub fn key_lines(positions: usize, width: usize) -> usize {
    positions.div_ceil(FOUR) * width.div_ceil(FOUR)
}

/// Lines for the values of so many positions.
pub fn value_lines(positions: usize, width: usize) -> usize {
    positions * width.div_ceil(LANES)
}

/// Floats of a row of scores over so many positions.
pub fn score_row(positions: usize) -> usize {
    positions.next_multiple_of(LANES)
}

const CACHE_LINE: usize = size_of::<simd::Line>();

/// Keys and values of one head.
#[derive(Clone, Copy, Debug)]
pub enum Head<'a> {
    F16 { keys: &'a [Line<f16>], values: &'a [Line<f16>] },
    Int8 { keys: &'a [Line<i8>], values: &'a [Line<i8>], scales: &'a [Scales] },
}

/// The same, to be written.
#[derive(Debug)]
pub enum HeadMut<'a> {
    F16 { keys: &'a mut [Line<f16>], values: &'a mut [Line<f16>] },
    Int8 { keys: &'a mut [Line<i8>], values: &'a mut [Line<i8>], scales: &'a mut [Scales] },
}

/// Of the keys and of the values of 16 positions.
pub type Scales = [Line<f32>; 2];

/// Rounds key and value of a position, ties to even, and writes them: to f16, or to int8 as activations are, with
/// `scale = max(absmax, 1e-5) / 127`.
///
/// # Panics
/// When there is no room for the position.
pub fn store(isa: Isa, position: usize, key: &[f32], value: &[f32], head: HeadMut) {
    let group = position / FOUR * FOUR;
    let place = position - group;
    let key_lines = key_lines(group, key.len())..key_lines(group + 1, key.len());
    let value_lines = value_lines(position, value.len())..value_lines(position + 1, value.len());
    match head {
        HeadMut::F16 { keys, values } => {
            let (keys, values) = (&mut keys[key_lines], &mut values[value_lines]);
            isa.run(Halve { key, value, place, keys, values });
        }
        HeadMut::Int8 { keys, values, scales } => {
            let (keys, values) = (&mut keys[key_lines], &mut values[value_lines]);
            let [key_scales, value_scales] = &mut scales[position / LANES];
            let lane = position % LANES;
            let put = |block, codes| put_key(&mut keys[block * FOUR..], place, codes);
            key_scales[lane] = isa.run(Quantize { x: key, put });
            value_scales[lane] = isa.run(Quantize { x: value, put: |block, codes| values[block] = codes });
        }
    }
}

/// Up to 16 components of a key, at its place among four.
#[inline(always)]
fn put_key<T: Copy>(lines: &mut [Line<T>], place: usize, components: Line<T>) {
    for (line, four) in lines.iter_mut().zip(components.as_chunks::<FOUR>().0) {
        line.as_chunks_mut::<FOUR>().0[place] = *four;
    }
}

/// Writes a key into the lines of its group, and lines of a value.
struct Halve<'a> {
    key: &'a [f32],
    value: &'a [f32],
    place: usize,
    keys: &'a mut [Line<f16>],
    values: &'a mut [Line<f16>],
}

impl Kernel for Halve<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (lines, components) in self.keys.chunks_mut(FOUR).zip(self.key.chunks(LANES)) {
            let mut halves = [f16::ZERO; LANES];
            s.store_f16(load(s, components), &mut halves);
            put_key(lines, self.place, halves);
        }
        for (line, components) in self.values.iter_mut().zip(self.value.chunks(LANES)) {
            s.store_f16(load(s, components), line);
        }
    }
}

struct Quantize<'a, F> {
    x: &'a [f32],
    put: F,
}

impl<F: FnMut(usize, Line<i8>)> Kernel for Quantize<'_, F> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        quantize(s, self.x, None, ABSMAX_MIN, self.put)
    }
}

/// `out[t] = sum_j softmax_j(query[t] · key[j] / sqrt(width)) value[j]` over the first `seen[t]` positions.
///
/// # Shapes
/// queries and out `[seen.len(), width]`, scores `[QUERIES, score_row(positions)]` of any contents
///
/// # Panics
/// When shapes do not fit, or a query sees nothing.
pub fn attend(isa: Isa, queries: &[f32], seen: &[usize], head: Head, scores: &mut [f32], out: &mut [f32]) {
    let width = queries.len() / seen.len().max(1);
    assert!(queries.len() == width * seen.len() && out.len() == queries.len(), "queries and results");
    assert!(seen.iter().all(|seen| *seen > 0), "a query sees a position");
    match head {
        Head::F16 { keys, values } => {
            isa.run(Attend { width, queries, seen, keys, values, scales: None, scores, out });
        }
        Head::Int8 { keys, values, scales } => {
            isa.run(Attend { width, queries, seen, keys, values, scales: Some(scales), scores, out });
        }
    }
}

/// Asks memory for the keys of so many positions, for who is about to attend to them.
///
/// # Panics
/// When there are fewer.
pub fn prefetch(isa: Isa, positions: usize, width: usize, head: Head) {
    let lines = ..key_lines(positions, width);
    match head {
        Head::F16 { keys, .. } => isa.run(Prefetch(&keys[lines])),
        Head::Int8 { keys, .. } => isa.run(Prefetch(&keys[lines])),
    }
}

/// Bytes that are asked for ahead, a part of the nearest cache: what follows is one stream, which the CPU foresees.
const AHEAD: usize = 16 << 10;

struct Prefetch<'a, C>(&'a [Line<C>]);

impl<C> Kernel for Prefetch<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let lines = self.0.iter().take(AHEAD / size_of::<Line<C>>());
        lines.step_by(CACHE_LINE / size_of::<Line<C>>()).for_each(|line| s.prefetch(line, 0));
    }
}

/// What a line is made of.
trait Number: Copy {
    fn load<S: Simd>(s: S, line: &Line<Self>) -> S::Float;
}

impl Number for f16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, line: &Line<Self>) -> S::Float {
        s.load_f16(line)
    }
}

impl Number for i8 {
    #[inline(always)]
    fn load<S: Simd>(s: S, line: &Line<Self>) -> S::Float {
        s.to_float(s.load_i8(line))
    }
}

struct Attend<'a, C> {
    width: usize,
    queries: &'a [f32],
    seen: &'a [usize],
    keys: &'a [Line<C>],
    values: &'a [Line<C>],
    /// `None`: ones.
    scales: Option<&'a [Scales]>,
    scores: &'a mut [f32],
    out: &'a mut [f32],
}

/// Up to four components, zeros after them, in each quarter.
#[inline(always)]
fn load_four<S: Simd>(s: S, components: &[f32]) -> S::Float {
    match components.first_chunk() {
        Some(four) => s.quarters(four),
        None => {
            let mut four = [0.0; FOUR];
            four[..components.len()].copy_from_slice(components);
            s.quarters(&four)
        }
    }
}

impl<C: Number> Kernel for Attend<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let mut first = 0;
        while self.seen.len() - first >= QUERIES {
            // As many sums as the registers hold, so that fewer wait for the one before.
            match S::TILES {
                1 => self.queries::<S, QUERIES, 1>(s, first),
                _ => self.queries::<S, QUERIES, 2>(s, first),
            }
            first += QUERIES;
        }
        while first < self.seen.len() {
            self.queries::<S, 1, FOUR>(s, first);
            first += 1;
        }
    }
}

impl<C: Number> Attend<'_, C> {
    /// `T` queries together, `N` groups of keys or lines of a value at a time, as far as there are so many.
    #[inline(always)]
    fn queries<S: Simd, const T: usize, const N: usize>(&mut self, s: S, first: usize) {
        let width = self.width;
        let seen: [usize; T] = std::array::from_fn(|t| self.seen[first + t]);
        let positions = seen.into_iter().fold(0, usize::max);
        for start in (0..positions).step_by(LANES) {
            self.scores::<S, T, N>(s, first, start, positions);
        }
        let row = self.scores.len() / QUERIES;
        for (t, seen) in seen.iter().enumerate() {
            let weights = &mut self.scores[t * row..][..*seen];
            Softmax { x: &mut *weights }.run(s);
            let scales = self.scales.unwrap_or_default();
            for (weights, [_, scales]) in weights.chunks_mut(LANES).zip(scales) {
                store_floats(s, s.mul_f32(load(s, weights), s.load_f32(scales)), weights);
            }
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

    /// Scores of up to 16 positions from `start`.
    #[inline(always)]
    fn scores<S: Simd, const T: usize, const N: usize>(
        &mut self,
        s: S,
        first: usize,
        start: usize,
        positions: usize,
    ) {
        if T == 1 {
            // The values of these positions arrive while the keys are multiplied. Several queries have them from the last ones.
            let ahead = AHEAD / size_of::<Line<C>>();
            let [from, to] =
                [start, start + LANES].map(|position| value_lines(position, self.width).min(ahead));
            Prefetch(&self.values[from..to.min(self.values.len())]).run(s);
        }
        let groups = (positions - start).div_ceil(FOUR).min(FOUR);
        let mut sums = [[s.splat_f32(0.0); FOUR]; T];
        let mut group = 0;
        while groups - group >= N {
            let dots = self.dots::<S, T, N>(s, first, start / FOUR + group);
            sums.iter_mut().zip(dots).for_each(|(sums, dots)| sums[group..group + N].copy_from_slice(&dots));
            group += N;
        }
        while group < groups {
            let dots = self.dots::<S, T, 1>(s, first, start / FOUR + group);
            sums.iter_mut().zip(dots).for_each(|(sums, [dots])| sums[group] = dots);
            group += 1;
        }
        let scale = s.splat_f32(1.0 / (self.width as f32).sqrt());
        let scale = match self.scales {
            Some(scales) => s.mul_f32(scale, s.load_f32(&scales[start / LANES][0])),
            None => scale,
        };
        let row = self.scores.len() / QUERIES;
        for (t, sums) in sums.into_iter().enumerate() {
            let scores = &mut self.scores[t * row + start..][..LANES];
            store_floats(s, s.mul_f32(s.sum_fours(sums), scale), scores);
        }
    }

    /// Products of queries and the keys of `N` groups: in each quarter of a vector those of one position, which remain to be
    /// summed up.
    #[inline(always)]
    fn dots<S: Simd, const T: usize, const N: usize>(
        &self,
        s: S,
        first: usize,
        group: usize,
    ) -> [[S::Float; N]; T] {
        let (width, lines) = (self.width, self.width.div_ceil(FOUR));
        let queries: [&[f32]; T] = std::array::from_fn(|t| &self.queries[(first + t) * width..][..width]);
        let groups: [&[Line<C>]; N] = std::array::from_fn(|n| &self.keys[(group + n) * lines..][..lines]);
        let mut sums = [[s.splat_f32(0.0); N]; T];
        for line in 0..lines {
            let keys: [S::Float; N] = std::array::from_fn(|n| C::load(s, &groups[n][line]));
            for t in 0..T {
                let query = load_four(s, &queries[t][line * FOUR..]);
                for n in 0..N {
                    sums[t][n] = s.fma(query, keys[n], sums[t][n]);
                }
            }
        }
        sums
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
        // In memory from here on: an index that is not known to the compiler would keep them there in the loop above.
        let sums = sums.map(|sums| sums.map(|sum| s.array(sum)));
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

    /// Lines of one head of either kind, and what its rows of `width` are rounded to.
    enum Lines {
        F16(Vec<Line<f16>>, Vec<Line<f16>>),
        Int8(Vec<Line<i8>>, Vec<Line<i8>>, Vec<Scales>),
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

        fn head_mut(&mut self) -> HeadMut<'_> {
            match self {
                Self::F16(keys, values) => HeadMut::F16 { keys, values },
                Self::Int8(keys, values, scales) => HeadMut::Int8 { keys, values, scales },
            }
        }

        fn head(&self) -> Head<'_> {
            match self {
                Self::F16(keys, values) => Head::F16 { keys, values },
                Self::Int8(keys, values, scales) => Head::Int8 { keys, values, scales },
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
    fn keys_and_values_are_rounded_to_the_nearest_f16_at_their_place() {
        for isa in Isa::available() {
            for width in [1, 16, 37, 64] {
                let row = |step: f32| (0..width).map(|i| (i as f32 * step).sin() * 3.0).collect::<Vec<_>>();
                let (key, value) = (row(0.7), row(1.3));
                let mut keys = vec![[f16::NAN; LANES]; key_lines(20, width)];
                let mut values = vec![[f16::NAN; LANES]; value_lines(20, width)];
                let head = HeadMut::F16 { keys: &mut keys, values: &mut values };
                store(isa, 18, &key, &value, head);
                for i in 0..width {
                    let line = key_lines(16, width) + i / FOUR;
                    assert_eq!(keys[line][2 * FOUR + i % FOUR], f16::from_f32(key[i]), "{isa:?}");
                    let line = value_lines(18, width) + i / LANES;
                    assert_eq!(values[line][i % LANES], f16::from_f32(value[i]), "{isa:?}");
                }
                let written = keys.iter().flatten().filter(|x| !x.is_nan()).count();
                assert_eq!(written, width.next_multiple_of(FOUR), "{isa:?}, with padding");
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore)] // nothing here is unsafe, and it takes very long
    fn attention_is_that_of_float64_and_the_same_bits_alone_or_among_others() {
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
                    let mut scores = vec![f32::NAN; QUERIES * score_row(positions)];
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
