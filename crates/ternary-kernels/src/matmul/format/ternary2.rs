//! [`TernaryMatrix`]: two bits a weight.

use crate::{
    matmul::{
        activations::{Input, Quantized},
        tile::{
            Finish, Form, Held, PANEL, TOKENS, ahead, by_tokens, four, group_blocks, integer_by_tiles,
            integer_in_registers, limit, panel_sums, parts, tiles, token_codes, token_floats, token_sums,
            unit,
        },
    },
    memory::{Arena, Block},
    simd::{LANES, Line, PANELS, Planes, Simd, Sums, Unit},
};
use half::f16;
use std::ops::Range;

/// Codes -1, 0, +1 at two bits, with an f16 scale for each `group` consecutive columns of a row.
///
/// A line holds 16 columns of 16 rows as `code + 1`: bits `2p` of byte `b` of row `r` are column `4p + b`. The planes
/// `p` are taken out with a mask, and multiply four activations each.
#[derive(Debug)]
pub struct TernaryMatrix {
    rows: usize,
    cols: usize,
    /// Blocks of 16 columns, and how many share a scale.
    blocks: usize,
    group: usize,
    /// `[tiles, blocks]`
    codes: Block<Line>,
    /// `[tiles, groups]`
    scales: Block<[f16; LANES]>,
}

impl TernaryMatrix {
    /// Bytes that [`pack`](Self::pack) takes from its arena.
    pub fn bytes(rows: usize, cols: usize, group: usize) -> usize {
        let tile = cols.div_ceil(LANES) * size_of::<Line>() + cols.div_ceil(group) * LANES * 2;
        tiles(rows) * tile + size_of::<Line>()
    }

    /// `read(row, codes, scales)` gives codes `[cols]` and scales `[cols / group, rounded up]` of each row in turn.
    ///
    /// # Panics
    /// When `group` is neither a multiple of 16 nor the whole row, or a code is none of -1, 0, +1.
    pub fn pack(
        arena: &mut Arena,
        rows: usize,
        cols: usize,
        group: usize,
        mut read: impl FnMut(usize, &mut [i8], &mut [f16]),
    ) -> Self {
        let (blocks, group) = (cols.div_ceil(LANES), group_blocks(cols, group));
        let groups = blocks.div_ceil(group);
        let mut codes = arena.take::<Line>(tiles(rows) * blocks);
        let mut scales = arena.take::<[f16; LANES]>(tiles(rows) * groups);
        // Padding is code 0.
        codes.fill(Line([0b01_01_01_01; 64]));
        let (mut row_codes, mut row_scales) = (vec![0; cols], vec![f16::ZERO; groups]);
        for row in 0..rows {
            read(row, &mut row_codes, &mut row_scales);
            let (tile, lane) = (row / LANES, row % LANES);
            for (line, codes) in codes[tile * blocks..].iter_mut().zip(row_codes.chunks(LANES)) {
                let mut bytes = [0b01_01_01_01; 4];
                for (column, code) in codes.iter().enumerate() {
                    assert!((-1..=1).contains(code), "code {code} of row {row} is not ternary");
                    bytes[column % 4] ^= (0b01 ^ (code + 1) as u8) << (column / 4 * 2);
                }
                line.0[lane * 4..][..4].copy_from_slice(&bytes);
            }
            for (to, scale) in scales[tile * groups..].iter_mut().zip(&row_scales) {
                to[lane] = *scale;
            }
        }
        Self { rows, cols, blocks, group, codes, scales }
    }

    #[inline(always)]
    fn tile(&self, tile: usize) -> (&[Line], &[[f16; LANES]]) {
        let groups = self.blocks.div_ceil(self.group);
        (&self.codes[tile * self.blocks..][..self.blocks], &self.scales[tile * groups..][..groups])
    }

    /// `integer`, with planes `p` and `p + P` shifted onto each other and summed together: `P` sums that weigh
    /// `4^(p mod P)`. More sums need fewer shifts and more registers.
    #[inline(always)]
    fn planes<S: Simd, const T: usize, const P: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Quantized,
        token: usize,
    ) -> [S::Float; T] {
        let (lines, scales) = self.tile(tile);
        let (codes, sums) = (token_codes::<T>(x, token), token_sums::<T>(x, token));
        let limit = limit::<S>(P);
        let mut result = [s.splat_f32(0.0); T];
        let mut start = 0;
        for scale in scales {
            let end = self.blocks.min(start + self.group);
            let mut totals: [S::Int; T] = std::array::from_fn(|t| s.splat(sums[t][start] - sums[t][end]));
            while start < end {
                let stop = end.min(start.saturating_add(limit));
                let lines = &lines[start..stop];
                let codes = parts(codes, start..stop);
                let mut acc = [[s.splat(0); P]; T];
                for i in 0..lines.len() {
                    s.prefetch(&lines[i], AHEAD);
                    let line = s.load(&lines[i]);
                    for p in 0..4 {
                        let w = plane::<S, P>(s, line, p);
                        for t in 0..T {
                            acc[t][p % P] = s.dot(acc[t][p % P], w, four(s, &codes[t][i], p));
                        }
                    }
                }
                for t in 0..T {
                    for p in 0..P {
                        let sum = s.widen(acc[t][p]);
                        let sum = match p {
                            0 => sum,
                            1 => s.sra::<2>(sum),
                            2 => s.sra::<4>(sum),
                            _ => s.sra::<6>(sum),
                        };
                        totals[t] = s.add(totals[t], sum);
                    }
                }
                start = stop;
            }
            let scale = s.load_f16(scale);
            for t in 0..T {
                result[t] = s.fma(s.to_float(totals[t]), scale, result[t]);
            }
        }
        result
    }

    /// `integer` of as many tiles as the unit takes at once. Weights are unpacked a step before they are used, so that it does
    /// not wait for them.
    #[inline(always)]
    fn held<S: Simd>(
        &self,
        s: S,
        unit: &mut S::Unit,
        tile: usize,
        x: &Quantized,
        tokens: Range<usize>,
        (planes, held): (&mut StepRoom, &mut Held<S>),
    ) {
        let mut steps: [&[[Line; STEP]]; PANELS] = [&[]; PANELS];
        for r in 0..PANELS {
            steps[r] = self.tile(tile + r).0.as_chunks().0;
        }
        let last = steps[0].len() - 1;
        let codes = &x.codes[tokens.start * x.blocks..];
        unpack(s, steps, 0, &mut planes[0]);
        for group in 0..self.blocks.div_ceil(self.group) {
            let start = group * self.group;
            let end = self.blocks.min(start + self.group);
            unit.clear();
            for index in start / STEP..end / STEP {
                unpack(s, steps, last.min(index + 1), &mut planes[(index + 1) % 2]);
                let mut weights: [&[Line]; PANELS] = [&[]; PANELS];
                for r in 0..PANELS {
                    weights[r] = planes[index % 2][r].as_flattened();
                }
                unit.add(weights, &codes[index * STEP..], x.blocks);
            }
            for (offset, token) in held.offsets.iter_mut().zip(tokens.clone()) {
                let [sums] = token_sums(x, token);
                *offset = sums[start] - sums[end];
            }
            unit.store(&mut held.sums);
            for r in 0..PANELS {
                held.scale(s, r, s.load_f16(&self.tile(tile + r).1[group]), group == 0);
            }
        }
    }

    /// `integer_tokens`, a panel of unpacked weights at a time.
    #[inline(always)]
    fn panels<S: Simd, const R: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Quantized,
        tokens: Range<usize>,
        finish: &impl Finish,
    ) {
        let tiles: [_; R] = std::array::from_fn(|r| self.tile(tile + r));
        let mut room = [[Line([0; 64]); 4]; PANEL];
        let mut totals = [[s.splat(0); R]; TOKENS];
        let mut results = [[s.splat_f32(0.0); R]; TOKENS];
        let (totals, results) = (&mut totals[..tokens.len()], &mut results[..tokens.len()]);
        let mut start = 0;
        for group in 0..self.blocks.div_ceil(self.group) {
            let end = self.blocks.min(start + self.group);
            for (t, totals) in totals.iter_mut().enumerate() {
                let [sums] = token_sums(x, tokens.start + t);
                *totals = [s.splat(sums[start] - sums[end]); R];
            }
            while start < end {
                let stop = end.min(start + PANEL / R);
                for (panel, (lines, _)) in room.chunks_mut(PANEL / R).zip(tiles) {
                    for (planes, line) in panel.iter_mut().zip(&lines[start..stop]) {
                        s.prefetch(line, AHEAD);
                        let line = s.load(line);
                        for (p, to) in planes.iter_mut().enumerate() {
                            s.store(plane::<S, 1>(s, line, p), to);
                        }
                    }
                }
                let panels: [_; R] = std::array::from_fn(|r| &room[r * PANEL / R..][..stop - start]);
                if s.has_tiles() {
                    let codes = &x.codes[tokens.start * x.blocks + start..];
                    s.tiles(panels, codes, x.blocks, tokens.len(), &mut Totals::<S, R>(totals));
                    start = stop;
                    continue;
                }
                by_tokens!(S, 0..tokens.len(), |token, T| {
                    let codes = parts(token_codes::<T>(x, tokens.start + token), start..stop);
                    let sums = panel_sums::<S, T, R>(s, panels, codes);
                    for t in 0..T {
                        for r in 0..R {
                            totals[token + t][r] = s.add(totals[token + t][r], sums[r][t]);
                        }
                    }
                });
                start = stop;
            }
            for r in 0..R {
                let scale = s.load_f16(&tiles[r].1[group]);
                for (results, totals) in results.iter_mut().zip(&*totals) {
                    results[r] = s.fma(s.to_float(totals[r]), scale, results[r]);
                }
            }
        }
        for (token, results) in tokens.zip(&*results) {
            for r in 0..R {
                finish.finish(s, tile + r, token, results[r]);
            }
        }
    }
}

/// Takes the planes of a step of some tiles apart.
#[inline(always)]
fn unpack<S: Simd>(
    s: S,
    steps: [&[[Line; STEP]]; PANELS],
    index: usize,
    room: &mut [[Planes; STEP]; PANELS],
) {
    let ahead = ahead(index * STEP, steps[0].len() * STEP, AHEAD);
    for r in 0..PANELS {
        for i in 0..STEP {
            let line = &steps[r][index][i];
            s.prefetch(line, ahead);
            let line = s.load(line);
            for p in 0..4 {
                s.store(plane::<S, 1>(s, line, p), &mut room[r][i][p]);
            }
        }
    }
}

/// Blocks that the unit takes at a time.
const STEP: usize = 4;

/// Planes of two steps.
type StepRoom = [[[Planes; STEP]; PANELS]; 2];

/// Adds sums up.
struct Totals<'a, S: Simd, const R: usize>(&'a mut [[S::Int; R]]);

impl<S: Simd, const R: usize> Sums<S, R> for Totals<'_, S, R> {
    #[inline(always)]
    fn take(&mut self, s: S, first: usize, sums: &[[S::Int; R]]) {
        for (totals, sums) in self.0[first..].iter_mut().zip(sums) {
            for r in 0..R {
                totals[r] = s.add(totals[r], sums[r]);
            }
        }
    }
}

/// Tokens for which a panel is not worth its making.
const FEW: usize = 16;
/// The same where there are tiles.
const FEW_TILES: usize = 8;

/// Lines between what is asked of memory and what is in use: 4 KiB.
const AHEAD: usize = 64;

/// Codes + 1 of four columns, times `4^(p mod P)`.
#[inline(always)]
fn plane<S: Simd, const P: usize>(s: S, line: S::Int, p: usize) -> S::Int {
    let shifted = match p / P * P {
        0 => line,
        1 => s.shr::<2>(line),
        2 => s.shr::<4>(line),
        _ => s.shr::<6>(line),
    };
    s.and(shifted, s.splat(0x0303_0303 << (2 * (p % P))))
}

impl Form for TernaryMatrix {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn tile_bytes(&self) -> usize {
        self.blocks * size_of::<Line>()
    }

    fn read_row(&self, row: usize, values: &mut [f32]) {
        let (lines, scales) = self.tile(row / LANES);
        let lane = row % LANES;
        for (block, values) in values.chunks_mut(LANES).enumerate() {
            let scale = scales[block / self.group][lane].to_f32();
            let bytes = &lines[block].0[lane * 4..];
            for (column, value) in values.iter_mut().enumerate() {
                let code = (bytes[column % 4] >> (column / 4 * 2) & 3) as i8 - 1;
                *value = f32::from(code) * scale;
            }
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
        match T {
            // So many sums that none waits for itself.
            1 | 2 if S::PLANES == 4 => self.planes::<S, T, 4>(s, tile, x, token),
            1 | 2 => self.planes::<S, T, 2>(s, tile, x, token),
            _ if S::PLANES == 4 => self.planes::<S, T, 2>(s, tile, x, token),
            _ => self.planes::<S, T, 1>(s, tile, x, token),
        }
    }

    #[inline(always)]
    fn integer_tiles<S: Simd>(
        &self,
        s: S,
        tiles: Range<usize>,
        x: &Quantized,
        tokens: Range<usize>,
        finish: &impl Finish,
    ) {
        let Range { start: mut tile, end } = tiles;
        if let Some(mut unit) = unit::<S, STEP>(s, tokens.len(), self.blocks, self.group) {
            let mut planes = [[[[Line([0; 64]); 4]; STEP]; PANELS]; 2];
            let mut held = Held::new(s, tokens.len());
            while end - tile >= PANELS {
                let room = (&mut planes, &mut held);
                self.held(s, &mut unit, tile, x, tokens.clone(), room);
                held.finish(s, tile, tokens.clone(), finish);
                tile += PANELS;
            }
        }
        integer_by_tiles(self, s, tile..end, x, tokens, finish);
    }

    /// For many tokens it pays to take the planes apart once.
    #[inline(always)]
    fn integer_tokens<S: Simd, const R: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Quantized,
        tokens: Range<usize>,
        finish: &impl Finish,
    ) {
        if tokens.len() > if s.has_tiles() { FEW_TILES } else { FEW } {
            return self.panels::<S, R>(s, tile, x, tokens, finish);
        }
        integer_in_registers(self, s, tile..tile + R, x, tokens, finish);
    }

    #[inline(always)]
    fn exact<S: Simd, const T: usize>(&self, s: S, tile: usize, x: &Input, token: usize) -> [S::Float; T] {
        let (lines, scales) = self.tile(tile);
        let floats = token_floats::<T>(x, token);
        let mut result = [s.splat_f32(0.0); T];
        for (group, scale) in scales.iter().enumerate() {
            let mut sums = [s.splat_f32(0.0); T];
            for block in group * self.group..self.blocks.min((group + 1) * self.group) {
                let mut bytes = s.load(&lines[block]);
                for b in 0..4 {
                    let mut codes = bytes;
                    bytes = s.shr::<8>(bytes);
                    for p in 0..4 {
                        let w = s.to_float(s.sub(s.and(codes, s.splat(3)), s.splat(1)));
                        codes = s.shr::<2>(codes);
                        let column = block * LANES + 4 * p + b;
                        if column < self.cols {
                            for t in 0..T {
                                sums[t] = s.fma(w, s.splat_f32(floats[t][column]), sums[t]);
                            }
                        }
                    }
                }
            }
            let scale = s.load_f16(scale);
            for t in 0..T {
                result[t] = s.fma(sums[t], scale, result[t]);
            }
        }
        result
    }
}
