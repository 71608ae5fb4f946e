//! [`ByteMatrix`]: eight bits a weight.

use crate::{
    matmul::{
        activations::{Input, Quantized, SIX_BITS},
        tile::{
            Finish, Form, Held, ahead, four, group_blocks, integer_by_tiles, parts, tiles, token_codes,
            token_floats, token_offsets, token_sums, unit,
        },
    },
    memory::{Arena, Block},
    simd::{LANES, Line, PANELS, Simd, Unit},
};
use std::ops::Range;

/// Lines of four columns in a block of 16.
const LINES: usize = 4;

/// Int8 codes with a scale for each `group` consecutive columns of a row.
///
/// A line holds four columns of 16 rows.
#[derive(Debug)]
pub struct ByteMatrix {
    rows: usize,
    cols: usize,
    blocks: usize,
    group: usize,
    /// `[tiles, blocks, LINES]`
    codes: Block<Line>,
    /// `[tiles, groups]`
    scales: Block<[f32; LANES]>,
}

impl ByteMatrix {
    /// Most columns that share a scale: `128 * 127` times as many fit into a sum of 32 bits.
    pub const LONGEST_GROUP: usize = 1 << 17;

    /// Bytes that [`pack`](Self::pack) takes from its arena.
    pub fn bytes(rows: usize, cols: usize, group: usize) -> usize {
        tiles(rows) * (cols.div_ceil(LANES) * LINES + cols.div_ceil(group)) * size_of::<Line>()
    }

    /// `read(row, codes, scales)` gives codes `[cols]` and scales `[cols / group, rounded up]` of each row in turn.
    ///
    /// # Panics
    /// When `group` is neither a multiple of 16 nor the whole row, or has more than
    /// [`LONGEST_GROUP`](Self::LONGEST_GROUP) columns.
    pub fn pack(
        arena: &mut Arena,
        rows: usize,
        cols: usize,
        group: usize,
        mut read: impl FnMut(usize, &mut [i8], &mut [f32]),
    ) -> Self {
        assert!(
            group <= Self::LONGEST_GROUP,
            "{group} columns share a scale, more than {}",
            Self::LONGEST_GROUP
        );
        let (blocks, group) = (cols.div_ceil(LANES), group_blocks(cols, group));
        let groups = blocks.div_ceil(group);
        let mut codes = arena.take::<Line>(tiles(rows) * blocks * LINES);
        let mut scales = arena.take::<[f32; LANES]>(tiles(rows) * groups);
        let (mut row_codes, mut row_scales) = (vec![0; cols], vec![0.0; groups]);
        for row in 0..rows {
            read(row, &mut row_codes, &mut row_scales);
            let (tile, lane) = (row / LANES, row % LANES);
            for (line, codes) in codes[tile * blocks * LINES..].iter_mut().zip(row_codes.chunks(4)) {
                for (byte, code) in line.0[lane * 4..].iter_mut().zip(codes) {
                    *byte = *code as u8;
                }
            }
            for (to, scale) in scales[tile * groups..].iter_mut().zip(&row_scales) {
                to[lane] = *scale;
            }
        }
        Self { rows, cols, blocks, group, codes, scales }
    }

    fn groups(&self) -> usize {
        self.blocks.div_ceil(self.group)
    }

    #[inline(always)]
    fn tile(&self, tile: usize) -> (&[[Line; LINES]], &[[f32; LANES]]) {
        let (blocks, _) = self.codes.as_chunks::<LINES>();
        let scales = &self.scales[tile * self.groups()..][..self.groups()];
        (&blocks[tile * self.blocks..][..self.blocks], scales)
    }

    /// `integer` of as many tiles at a time as the unit takes, where it fits; the tiles that are left.
    #[inline(always)]
    fn by_unit<S: Simd, const STEP: usize>(
        &self,
        s: S,
        mut tiles: Range<usize>,
        x: &Quantized,
        tokens: Range<usize>,
        finish: &impl Finish,
    ) -> Range<usize> {
        let Some(mut unit) = unit::<S, STEP>(s, tokens.len(), self.blocks, self.group) else { return tiles };
        let mut held = Held::new(s, tokens.len());
        while tiles.len() >= PANELS {
            self.held::<S, STEP>(s, &mut unit, tiles.start, x, tokens.clone(), &mut held);
            held.finish(s, tiles.start, tokens.clone(), finish);
            tiles.start += PANELS;
        }
        tiles
    }

    /// `integer` of so many tiles.
    #[inline(always)]
    fn held<S: Simd, const STEP: usize>(
        &self,
        s: S,
        unit: &mut S::Unit,
        tile: usize,
        x: &Quantized,
        tokens: Range<usize>,
        held: &mut Held<S>,
    ) {
        let mut steps: [&[[[Line; LINES]; STEP]]; PANELS] = [&[]; PANELS];
        for r in 0..PANELS {
            steps[r] = self.tile(tile + r).0.as_chunks().0;
        }
        let codes = &x.codes[tokens.start * x.blocks..];
        for group in 0..self.groups() {
            unit.clear();
            let start = group * self.group;
            for index in start / STEP..self.blocks.min(start + self.group) / STEP {
                let mut weights: [&[Line]; PANELS] = [&[]; PANELS];
                let ahead = ahead(index * STEP * LINES, self.blocks * LINES, AHEAD);
                for r in 0..PANELS {
                    weights[r] = steps[r][index].as_flattened();
                    for line in weights[r] {
                        s.prefetch(line, ahead);
                    }
                }
                unit.add(weights, &codes[index * STEP..], x.blocks);
            }
            unit.store(&mut held.sums);
            for r in 0..PANELS {
                held.scale(s, r, s.load_f32(&self.tile(tile + r).1[group]), group == 0);
            }
        }
    }
}

/// Lines between what is asked of memory and what is in use: 4 KiB.
const AHEAD: usize = 64;

/// Blocks of a group whose offsets are added up.
const SHORT: usize = 4;

impl Form for ByteMatrix {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn tile_bytes(&self) -> usize {
        self.blocks * LINES * size_of::<Line>()
    }

    fn read_row(&self, row: usize, values: &mut [f32]) {
        let (blocks, scales) = self.tile(row / LANES);
        let lane = row % LANES;
        for (block, values) in values.chunks_mut(LANES).enumerate() {
            let scale = scales[block / self.group][lane];
            for (column, value) in values.iter_mut().enumerate() {
                *value = f32::from(blocks[block][column / 4].0[lane * 4 + column % 4] as i8) * scale;
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
        let (blocks, scales) = self.tile(tile);
        let (codes, sums) = (token_codes::<T>(x, token), token_sums::<T>(x, token));
        let offsets = token_offsets::<T>(x, token);
        let mut result = [s.splat_f32(0.0); T];
        let mut start = 0;
        for scale in scales {
            let end = self.blocks.min(start + self.group);
            let mut totals = [s.splat(0); T];
            if S::OFFSET != 0 && end - start <= SHORT {
                // They go from memory to all lanes at once; a number computed first would take the way of the products.
                const { assert!(S::OFFSET == 0 || S::OFFSET == 4 * SIX_BITS) };
                for t in 0..T {
                    for block in &offsets[t][start..end] {
                        totals[t] = s.add(totals[t], s.splat(*block));
                    }
                    totals[t] = s.shl::<2>(totals[t]);
                }
            } else if S::OFFSET != 0 {
                for t in 0..T {
                    totals[t] = s.splat((sums[t][start] - sums[t][end]) * S::OFFSET);
                }
            }
            let blocks = &blocks[start..end];
            let codes = parts(codes, start..end);
            for i in 0..blocks.len() {
                for p in 0..LINES {
                    s.prefetch(&blocks[i][p], AHEAD);
                    let w = s.load(&blocks[i][p]);
                    for t in 0..T {
                        let x = four(s, &codes[t][i], p);
                        totals[t] = s.dot_signed(totals[t], w, x);
                    }
                }
            }
            let scale = s.load_f32(scale);
            for t in 0..T {
                result[t] = s.fma(s.to_float(totals[t]), scale, result[t]);
            }
            start = end;
        }
        result
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
        let tiles = self.by_unit::<S, 4>(s, tiles, x, tokens.clone(), finish);
        let tiles = self.by_unit::<S, 2>(s, tiles, x, tokens.clone(), finish);
        integer_by_tiles(self, s, tiles, x, tokens, finish);
    }

    #[inline(always)]
    fn exact<S: Simd, const T: usize>(&self, s: S, tile: usize, x: &Input, token: usize) -> [S::Float; T] {
        let (blocks, scales) = self.tile(tile);
        let floats = token_floats::<T>(x, token);
        let mut result = [s.splat_f32(0.0); T];
        for (group, scale) in scales.iter().enumerate() {
            let mut sums = [s.splat_f32(0.0); T];
            for block in group * self.group..self.blocks.min((group + 1) * self.group) {
                for p in 0..LINES {
                    let mut bytes = s.load(&blocks[block][p]);
                    for b in 0..4 {
                        let w = s.to_float(s.sra::<24>(s.shl::<24>(bytes)));
                        bytes = s.shr::<8>(bytes);
                        let column = block * LANES + 4 * p + b;
                        if column < self.cols {
                            for t in 0..T {
                                sums[t] = s.fma(w, s.splat_f32(floats[t][column]), sums[t]);
                            }
                        }
                    }
                }
            }
            let scale = s.load_f32(scale);
            for t in 0..T {
                result[t] = s.fma(sums[t], scale, result[t]);
            }
        }
        result
    }
}
