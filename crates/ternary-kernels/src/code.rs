//! [`CodeMatrix`]: a byte a weight, packed anew at every training step.

use crate::{
    Input, Pool, Quantized,
    elementwise::load_codes,
    matrix::{Finish, Form, TOKENS, by_tokens, four, tiles, token_codes, token_floats, token_sums},
    simd::{Kernel, LANES, Line, Simd},
    ternary::{PANEL, Planes, panel_sums},
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
        let blocks = cols.div_ceil(LANES);
        self.codes.resize(tiles(rows) * blocks, [Line([0; 64]); 4]);
        self.scales.clear();
        self.scales.extend(scales.chunks(LANES).map(|scales| {
            let mut padded = [0.0; LANES];
            padded[..scales.len()].copy_from_slice(scales);
            padded
        }));
        (self.rows, self.cols, self.blocks, self.ternary) = (rows, cols, blocks, ternary);
        pool.chunks(&mut self.codes, blocks, |tile, _, out| {
            pool.isa().run(Pack { codes, order, rows, cols, tile, ternary, out });
        });
    }

    #[inline(always)]
    fn tile(&self, tile: usize) -> &[Planes] {
        &self.codes[tile * self.blocks..][..self.blocks]
    }
}

struct Pack<'a> {
    codes: &'a [i8],
    order: Order,
    rows: usize,
    cols: usize,
    tile: usize,
    ternary: bool,
    out: &'a mut [Planes],
}

impl Kernel for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { codes, order, rows, cols, tile, ternary, out } = self;
        let first = tile * LANES;
        let height = LANES.min(rows - first);
        let shift = s.splat(if ternary { 0x0101_0101 } else { 0 });
        for (block, planes) in out.iter_mut().enumerate() {
            for (p, line) in planes.iter_mut().enumerate() {
                let start = block * LANES + 4 * p;
                let width = cols.saturating_sub(start).min(4);
                let bytes = match order {
                    Order::Columns => {
                        let mut lanes = s.splat(0);
                        for b in (0..width).rev() {
                            let at = (start + b) * rows + first;
                            let column = s.and(load_codes(s, &codes[at..at + height]), s.splat(0xff));
                            lanes = s.add(s.shl::<8>(lanes), column);
                        }
                        lanes
                    }
                    Order::Rows => {
                        let mut bytes = Line([0; 64]);
                        let (lanes, _) = bytes.0.as_chunks_mut::<4>();
                        for (lane, to) in lanes.iter_mut().take(height).enumerate() {
                            let row = &codes[(first + lane) * cols..][..cols];
                            match row.get(start..).and_then(|rest| rest.first_chunk::<4>()) {
                                Some(four) => *to = four.map(|code| code as u8),
                                None => to
                                    .iter_mut()
                                    .zip(row.iter().skip(start))
                                    .for_each(|(to, x)| *to = *x as u8),
                            }
                        }
                        s.load(&bytes)
                    }
                };
                // By bytes: a carry out of -1 + 1 must not reach its neighbour.
                s.store(if ternary { plus_one(s, bytes, shift) } else { bytes }, line);
            }
        }
    }
}

/// 0, 1, 2 for the bytes -1, 0, +1: `((x & 3) + 1) & 3`.
#[inline(always)]
fn plus_one<S: Simd>(s: S, bytes: S::Int, ones: S::Int) -> S::Int {
    let three = s.splat(0x0303_0303);
    s.and(s.add(s.and(bytes, three), ones), three)
}

impl Form for CodeMatrix {
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
        let (codes, sums) = (token_codes::<T>(x, token), token_sums::<T>(x, token));
        let scale = s.load_f32(&self.scales[tile]);
        let [found] = self.sums(s, [self.tile(tile)], codes);
        std::array::from_fn(|t| {
            let offset = s.splat(-sums[t][self.blocks] * self.offset::<S>());
            s.mul_f32(s.to_float(s.add(found[t], offset)), scale)
        })
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
        let offset = if self.ternary {
            1
        } else if s.has_tiles() {
            0
        } else {
            S::OFFSET
        };
        let mut totals = [[s.splat(0); R]; TOKENS];
        for (t, totals) in totals.iter_mut().take(tokens.len()).enumerate() {
            let [sums] = token_sums::<1>(x, tokens.start + t);
            *totals = [s.splat(-sums[self.blocks] * offset); R];
        }
        // Tiles load and store their sums for each panel: longer ones do so less often.
        let length = if s.has_tiles() { PANEL } else { PANEL / R };
        for start in (0..self.blocks).step_by(length) {
            let stop = self.blocks.min(start + length);
            if s.has_tiles() {
                let codes = &x.codes[tokens.start * x.blocks + start..];
                s.tiles(lines.map(|lines| &lines[start..stop]), codes, x.blocks, &mut totals[..tokens.len()]);
                continue;
            }
            by_tokens!(S, 0..tokens.len(), |token, T| {
                let codes = token_codes::<T>(x, tokens.start + token).map(|codes| &codes[start..stop]);
                let sums = self.sums(s, lines.map(|lines| &lines[start..stop]), codes);
                for t in 0..T {
                    for r in 0..R {
                        totals[token + t][r] = s.add(totals[token + t][r], sums[r][t]);
                    }
                }
            });
        }
        for (token, totals) in tokens.zip(&totals) {
            for r in 0..R {
                let scale = s.load_f32(&self.scales[tile + r]);
                finish.finish(s, tile + r, token, s.mul_f32(s.to_float(totals[r]), scale));
            }
        }
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
