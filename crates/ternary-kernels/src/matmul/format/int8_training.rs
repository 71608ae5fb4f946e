//! [`CodeMatrix`]: a byte a weight, packed anew at every training step.

use crate::{
    Pool,
    matmul::{
        activations::{Input, Quantized},
        tile::{Finish, Form, PANEL, TOKENS, by_tokens, four, panel_sums, tiles, token_codes, token_floats},
    },
    simd::{Kernel, LANES, Line, Planes, Simd, Sums, vector_ops::load_codes},
};
use std::ops::Range;

/// Codes of a byte with a scale a row, for products of many tokens.
///
/// A line holds four columns of 16 rows; a block of 16 columns is four lines.
#[derive(Debug, Default)]
pub struct CodeMatrix {
    rows: usize,
    cols: usize,
    blocks: usize,
    /// Codes are 0, 1, 2 for -1, 0, +1; else they are signed bytes, -127 or more.
    ternary: bool,
    /// `[tiles, blocks]`
    codes: Vec<Planes>,
    /// `[tiles]`
    scales: Vec<[f32; LANES]>,
}

/// Bytes of codes that pass a matrix together where there are tiles: a quarter of the second-level cache that such CPUs have.
const CODES: usize = 512 << 10;

/// How the codes of a matrix `[rows, cols]` lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// `[rows, cols]`
    Rows,
    /// `[cols, rows]`
    Columns,
}

impl CodeMatrix {
    /// Takes the codes of a matrix of so many rows, -1, 0, +1 if it is `ternary`; memory is used again.
    ///
    /// # Panics
    /// When `codes` is not a whole number of rows, or there is not a scale for each.
    pub fn pack(&mut self, pool: &Pool, codes: &[i8], order: Order, scales: &[f32], ternary: bool) {
        let rows = scales.len();
        assert!(codes.len().is_multiple_of(rows), "{} codes are no {rows} rows", codes.len());
        let cols = codes.len() / rows;
        match order {
            Order::Columns => self.pack_columns(pool, cols, scales, ternary, &Bytes { codes, rows }),
            Order::Rows => {
                self.resize(cols, scales, ternary);
                pool.chunks(&mut self.codes[..tiles(rows) * self.blocks], self.blocks, |tile, _, out| {
                    pool.isa().run(PackRows { codes, rows, cols, tile, ternary, out });
                });
            }
        }
    }

    /// Takes codes a column of the matrix at a time.
    pub(crate) fn pack_columns(
        &mut self,
        pool: &Pool,
        cols: usize,
        scales: &[f32],
        ternary: bool,
        source: &impl Columns,
    ) {
        self.resize(cols, scales, ternary);
        let rows = scales.len();
        let blocks = self.blocks;
        pool.chunks(&mut self.codes[..tiles(rows) * blocks], TILES * blocks, |index, _, out| {
            let rows = index * TILES * LANES..rows.min((index + 1) * TILES * LANES);
            pool.isa().run(PackColumns { source, rows, cols, blocks, ternary, out });
        });
    }

    fn resize(&mut self, cols: usize, scales: &[f32], ternary: bool) {
        (self.rows, self.cols, self.blocks, self.ternary) =
            (scales.len(), cols, cols.div_ceil(LANES), ternary);
        let planes = tiles(self.rows) * self.blocks;
        // Whoever grows again would fill with zeros again.
        if self.codes.len() < planes {
            self.codes.resize(planes, [Line([0; 64]); 4]);
        }
        self.scales.clear();
        self.scales.extend(scales.chunks(LANES).map(|scales| {
            let mut padded = [0.0; LANES];
            padded[..scales.len()].copy_from_slice(scales);
            padded
        }));
    }

    #[inline(always)]
    fn tile(&self, tile: usize) -> &[Planes] {
        &self.codes[tile * self.blocks..][..self.blocks]
    }
}

/// Where codes come from.
pub(crate) trait Columns: Sync {
    /// The codes of at most 16 rows of a column, a lane each.
    fn codes<S: Simd>(&self, s: S, col: usize, rows: Range<usize>) -> S::Int;
}

/// `[cols, rows]`
struct Bytes<'a> {
    codes: &'a [i8],
    rows: usize,
}

impl Columns for Bytes<'_> {
    #[inline(always)]
    fn codes<S: Simd>(&self, s: S, col: usize, rows: Range<usize>) -> S::Int {
        load_codes(s, &self.codes[col * self.rows..][rows])
    }
}

/// Tiles that are packed together, so that what is read of a column lies in one piece of several lines.
const TILES: usize = 8;

struct PackColumns<'a, C> {
    source: &'a C,
    rows: Range<usize>,
    cols: usize,
    blocks: usize,
    ternary: bool,
    /// `[tiles, blocks]`
    out: &'a mut [Planes],
}

impl<C: Columns> Kernel for PackColumns<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { source, rows, cols, blocks, ternary, out } = self;
        for block in 0..blocks {
            for p in 0..4 {
                let start = block * LANES + 4 * p;
                for (tile, first) in rows.clone().step_by(LANES).enumerate() {
                    let rows = first..rows.end.min(first + LANES);
                    let mut lanes = s.splat(0);
                    for b in (0..cols.saturating_sub(start).min(4)).rev() {
                        let column = s.and(source.codes(s, start + b, rows.clone()), s.splat(0xff));
                        lanes = s.add(s.shl::<8>(lanes), column);
                    }
                    let line = if ternary { plus_one(s, lanes) } else { lanes };
                    s.store(line, &mut out[tile * blocks + block][p]);
                }
            }
        }
    }
}

struct PackRows<'a> {
    codes: &'a [i8],
    rows: usize,
    cols: usize,
    tile: usize,
    ternary: bool,
    out: &'a mut [Planes],
}

impl Kernel for PackRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { codes, rows, cols, tile, ternary, out } = self;
        let first = tile * LANES;
        let height = LANES.min(rows - first);
        // A line of each row gives a line for each four columns.
        for (index, blocks) in out.chunks_mut(size_of::<Line>() / LANES).enumerate() {
            let start = index * size_of::<Line>();
            let lines = std::array::from_fn(|lane| {
                if lane >= height {
                    return s.splat(0);
                }
                let row = &codes[(first + lane) * cols + start..(first + lane + 1) * cols];
                let mut line = Line([0; 64]);
                match row.first_chunk::<64>() {
                    Some(row) => line.0 = row.map(|code| code as u8),
                    None => line.0.iter_mut().zip(row).for_each(|(to, code)| *to = *code as u8),
                }
                s.load(&line)
            });
            for (line, lanes) in blocks.as_flattened_mut().iter_mut().zip(s.transpose(lines)) {
                s.store(if ternary { plus_one(s, lanes) } else { lanes }, line);
            }
        }
    }
}

/// 0, 1, 2 for the bytes -1, 0, +1: `((x & 3) + 1) & 3`, by bytes: a carry out of -1 + 1 must not reach its neighbour.
#[inline(always)]
fn plus_one<S: Simd>(s: S, bytes: S::Int) -> S::Int {
    let three = s.splat(0x0303_0303);
    s.and(s.add(s.and(bytes, three), s.splat(0x0101_0101)), three)
}

impl Form for CodeMatrix {
    /// There are as many tokens as columns or more: they are read anew for each task.
    const TASK_BYTES: usize = 512 << 10;

    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn tile_bytes(&self) -> usize {
        self.blocks * size_of::<Planes>()
    }

    fn read_row(&self, row: usize, values: &mut [f32]) {
        let (tile, lane) = (row / LANES, row % LANES);
        let scale = self.scales[tile][lane];
        for (col, value) in values.iter_mut().enumerate() {
            let byte = self.tile(tile)[col / LANES][col % LANES / 4].0[lane * 4 + col % 4] as i8;
            *value = f32::from(byte - i8::from(self.ternary)) * scale;
        }
    }

    #[inline(always)]
    fn integer<S: Simd, const T: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Quantized,
        token: usize,
    ) -> [S::Float; T] {
        let codes = token_codes::<T>(x, token);
        let scale = s.load_f32(&self.scales[tile]);
        let [found] = self.sums(s, [self.tile(tile)], codes);
        std::array::from_fn(|t| {
            let offset = s.splat(-x.sum(token + t) * self.offset::<S>());
            s.mul_f32(s.to_float(s.add(found[t], offset)), scale)
        })
    }

    /// Tiles keep their sums from the first column to the last, and want the codes in the second-level cache only.
    #[inline(always)]
    fn tokens<S: Simd>(&self, s: S) -> usize {
        if s.has_tiles() { (CODES / (self.blocks * LANES)).max(1).next_multiple_of(TOKENS) } else { TOKENS }
    }

    /// Panels that stay in the first-level cache while the tokens pass.
    #[inline(always)]
    fn integer_tokens<S: Simd, const R: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Quantized,
        tokens: Range<usize>,
        finish: &impl Finish,
    ) {
        let lines: [_; R] = std::array::from_fn(|r| self.tile(tile + r));
        // Tiles multiply signed bytes as they are.
        let offset = if self.ternary { 1 } else { S::OFFSET * i32::from(!s.has_tiles()) };
        let first = tokens.start;
        let mut finished = Finished { matrix: self, tile, x, offset, first, finish };
        if s.has_tiles() {
            s.tiles(lines, &x.codes[first * x.blocks..], x.blocks, tokens.len(), &mut finished);
            return;
        }
        let mut totals = [[s.splat(0); R]; TOKENS];
        for start in (0..self.blocks).step_by(PANEL / R) {
            let stop = self.blocks.min(start + PANEL / R);
            by_tokens!(S, 0..tokens.len(), |token, T| {
                let codes = token_codes::<T>(x, first + token).map(|codes| &codes[start..stop]);
                let sums = self.sums(s, lines.map(|lines| &lines[start..stop]), codes);
                for t in 0..T {
                    for r in 0..R {
                        totals[token + t][r] = s.add(totals[token + t][r], sums[r][t]);
                    }
                }
            });
        }
        finished.take(s, 0, &totals[..tokens.len()]);
    }

    #[inline(always)]
    fn exact<S: Simd, const T: usize>(&self, s: S, tile: usize, x: &Input, token: usize) -> [S::Float; T] {
        let floats = token_floats::<T>(x, token);
        let shift = i32::from(self.ternary);
        let mut sums = [s.splat_f32(0.0); T];
        for (block, planes) in self.tile(tile).iter().enumerate() {
            for (p, line) in planes.iter().enumerate() {
                let mut bytes = s.load(line);
                for b in 0..4 {
                    let column = block * LANES + 4 * p + b;
                    let w = s.to_float(s.sub(s.sra::<24>(s.shl::<24>(bytes)), s.splat(shift)));
                    bytes = s.shr::<8>(bytes);
                    if column < self.cols {
                        for t in 0..T {
                            sums[t] = s.fma(w, s.splat_f32(floats[t][column]), sums[t]);
                        }
                    }
                }
            }
        }
        let scale = s.load_f32(&self.scales[tile]);
        sums.map(|sum| s.mul_f32(sum, scale))
    }
}

/// Sums of two tiles, or of one, from a token on: finishes them.
struct Finished<'a, F> {
    matrix: &'a CodeMatrix,
    tile: usize,
    x: &'a Quantized,
    /// What the weights' codes have too much.
    offset: i32,
    first: usize,
    finish: &'a F,
}

impl<S: Simd, F: Finish, const R: usize> Sums<S, R> for Finished<'_, F> {
    #[inline(always)]
    fn take(&mut self, s: S, first: usize, sums: &[[S::Int; R]]) {
        let Self { matrix, tile, x, offset, .. } = *self;
        let scales: [_; R] = std::array::from_fn(|r| s.load_f32(&matrix.scales[tile + r]));
        for (t, sums) in sums.iter().enumerate() {
            let token = self.first + first + t;
            let offset = s.splat(-x.sum(token) * offset);
            for r in 0..R {
                let sum = s.to_float(s.add(sums[r], offset));
                self.finish.finish(s, tile + r, token, s.mul_f32(sum, scales[r]));
            }
        }
    }
}

impl CodeMatrix {
    /// What the codes have too much in the products.
    #[inline(always)]
    fn offset<S: Simd>(&self) -> i32 {
        if self.ternary { 1 } else { S::OFFSET }
    }

    #[inline(always)]
    fn sums<S: Simd, const T: usize, const R: usize>(
        &self,
        s: S,
        panels: [&[Planes]; R],
        codes: [&[[i8; LANES]]; T],
    ) -> [[S::Int; T]; R] {
        if self.ternary {
            return panel_sums(s, panels, codes);
        }
        let mut acc = [[s.splat(0); T]; R];
        for i in 0..panels[0].len() {
            for p in 0..4 {
                let mut w = [s.splat(0); R];
                for r in 0..R {
                    w[r] = s.load(&panels[r][i][p]);
                }
                for t in 0..T {
                    let x = four(s, &codes[t][i], p);
                    for r in 0..R {
                        acc[r][t] = s.dot_signed(acc[r][t], w[r], x);
                    }
                }
            }
        }
        acc
    }
}
