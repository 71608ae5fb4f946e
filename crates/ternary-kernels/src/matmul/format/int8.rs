//! Int8 weights ([`Int8Matrix`]) and their products with int8 activations.
//!
//! # Layout
//! A block of 16 rows and 16 columns is four cache lines. Line `p` has columns `4p..4p + 4` of each row:
//!
//! ```text
//! byte 4r + b of line p  =  code(row r, column 4p + b)                     p, b in 0..4,  r in 0..16
//! ```
//!
//! There is one f32 scale per row and group of columns. A group is the whole row, or a multiple of 16 columns.
//!
//! # Product
//! ```text
//! for each scale group:
//!     acc = -offset * sum(x in the group)                     offset: what dot_signed adds to each weight, 0 or 128
//!     for each line of the group:
//!         acc = dot_signed(acc, line, quad of x)
//!     y += acc * scale
//! ```
//!
//! | tokens | CPU | path |
//! |---|---|---|
//! | 4-16 | AMX; groups and rows of whole steps of 64 or 32 columns | four tiles by the matrix unit, straight from memory |
//! | others | any | `dot_int8`, for up to 8 tokens (AVX-512) or 4 at a time |
//!
//! Nothing is unpacked, so that there is no path with panels. The format serves tables of token embeddings in Q8_0, with
//! a scale per 32 columns, and models in int8.
//!
//! # Tried
//! - 32000 x 768 with 8 tokens on AMX took 1,325 us with two tiles per step of the matrix unit, and 994 us with four.
//! - Without prefetching, a group of 32 columns of an output table of 24.6 MB took some 265 cycles with 8 tokens on AVX-512, where its
//!   instructions need about 70 by count. So weights are prefetched for any number of tokens, and for short groups, the offsets
//!   come from memory, off the port of the dot products. On AVX2, neither changed anything.

use crate::{
    matmul::{
        activations::{Activations, Int8Activations, Q6_OFFSET},
        tile::{
            Epilogue, PackedFormat, TileAccumulators, group_blocks, matrix_unit, multiply_tile_groups,
            prefetch_offset, slice_each, splat_quad, tile_count, token_codes, token_floats, token_offsets,
            token_sums,
        },
    },
    memory::{Arena, ArenaSlice},
    simd::{CacheLine, LANES, MatrixUnit, Simd, UNIT_TILES},
};
use std::ops::Range;

/// Cache lines per block of 16 columns.
const BLOCK_LINES: usize = 4;

/// A matrix of int8 codes with one f32 scale per row and group of columns: `w = scale * code`.
#[derive(Debug)]
pub struct Int8Matrix {
    rows: usize,
    cols: usize,
    /// Blocks of 16 columns per row.
    blocks: usize,
    /// Blocks per scale.
    group: usize,
    /// `[tiles, blocks, BLOCK_LINES]`
    codes: ArenaSlice<CacheLine>,
    /// `[tiles, groups]`
    scales: ArenaSlice<[f32; LANES]>,
}

impl Int8Matrix {
    /// The largest number of columns per scale: `128 * 127` times as many fit into a 32-bit sum.
    pub const LONGEST_GROUP: usize = 1 << 17;

    /// Bytes that [`pack`](Self::pack) takes from its arena.
    pub fn bytes(rows: usize, cols: usize, group: usize) -> usize {
        tile_count(rows)
            * (cols.div_ceil(LANES) * BLOCK_LINES + cols.div_ceil(group))
            * size_of::<CacheLine>()
    }

    /// Packs a matrix of `rows` rows and `cols` columns, with a scale for each `group` consecutive columns of a row.
    ///
    /// `read(row, codes, scales)` is called once per row, in order. It writes the codes `[cols]` and the scales
    /// `[cols / group, rounded up]` of the row.
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
        let mut codes = arena.take::<CacheLine>(tile_count(rows) * blocks * BLOCK_LINES);
        let mut scales = arena.take::<[f32; LANES]>(tile_count(rows) * groups);
        let (mut row_codes, mut row_scales) = (vec![0; cols], vec![0.0; groups]);
        for row in 0..rows {
            read(row, &mut row_codes, &mut row_scales);
            let (tile, lane) = (row / LANES, row % LANES);
            for (line, codes) in codes[tile * blocks * BLOCK_LINES..].iter_mut().zip(row_codes.chunks(4)) {
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

    /// Scales per row.
    fn groups(&self) -> usize {
        self.blocks.div_ceil(self.group)
    }

    /// Codes `[blocks]` and scales `[groups]` of a tile.
    #[inline(always)]
    fn tile(&self, tile: usize) -> (&[[CacheLine; BLOCK_LINES]], &[[f32; LANES]]) {
        let (blocks, _) = self.codes.as_chunks::<BLOCK_LINES>();
        let scales = &self.scales[tile * self.groups()..][..self.groups()];
        (&blocks[tile * self.blocks..][..self.blocks], scales)
    }

    /// Multiplies as many tiles as possible by the matrix unit, in steps of `STEP_BLOCKS` blocks. Returns the tiles that
    /// are left: all, if the unit cannot be used.
    #[inline(always)]
    fn multiply_by_unit<S: Simd, const STEP_BLOCKS: usize>(
        &self,
        s: S,
        mut tiles: Range<usize>,
        x: &Int8Activations,
        tokens: Range<usize>,
        epilogue: &impl Epilogue,
    ) -> Range<usize> {
        let Some(mut unit) = matrix_unit::<S, STEP_BLOCKS>(s, tokens.len(), self.blocks, self.group) else {
            return tiles;
        };
        let mut accumulators = TileAccumulators::new(s, tokens.len());
        while tiles.len() >= UNIT_TILES {
            self.multiply_unit_tiles::<S, STEP_BLOCKS>(
                s,
                &mut unit,
                tiles.start,
                x,
                tokens.clone(),
                &mut accumulators,
            );
            accumulators.write(s, tiles.start, tokens.clone(), epilogue);
            tiles.start += UNIT_TILES;
        }
        tiles
    }

    /// The products of [`UNIT_TILES`] tiles with 4 to 16 tokens, by the matrix unit.
    #[inline(always)]
    fn multiply_unit_tiles<S: Simd, const STEP_BLOCKS: usize>(
        &self,
        s: S,
        unit: &mut S::MatrixUnit,
        tile: usize,
        x: &Int8Activations,
        tokens: Range<usize>,
        accumulators: &mut TileAccumulators<S>,
    ) {
        let mut steps: [&[[[CacheLine; BLOCK_LINES]; STEP_BLOCKS]]; UNIT_TILES] = [&[]; UNIT_TILES];
        for r in 0..UNIT_TILES {
            steps[r] = self.tile(tile + r).0.as_chunks().0;
        }
        let codes = &x.codes[tokens.start * x.blocks..];
        for group in 0..self.groups() {
            unit.clear();
            let start = group * self.group;
            for index in start / STEP_BLOCKS..self.blocks.min(start + self.group) / STEP_BLOCKS {
                let mut weights: [&[CacheLine]; UNIT_TILES] = [&[]; UNIT_TILES];
                let offset = prefetch_offset(
                    index * STEP_BLOCKS * BLOCK_LINES,
                    self.blocks * BLOCK_LINES,
                    PREFETCH_LINES,
                );
                for r in 0..UNIT_TILES {
                    weights[r] = steps[r][index].as_flattened();
                    for line in weights[r] {
                        s.prefetch(line, offset);
                    }
                }
                unit.add(weights, &codes[index * STEP_BLOCKS..], x.blocks);
            }
            unit.store(&mut accumulators.sums);
            for r in 0..UNIT_TILES {
                accumulators.scale(s, r, s.load_f32(&self.tile(tile + r).1[group]), group == 0);
            }
        }
    }
}

/// Prefetch distance in cache lines: 4 KiB.
const PREFETCH_LINES: usize = 64;

/// Groups of at most this many blocks add up the offsets of their blocks, instead of subtracting prefix sums.
const SHORT_GROUP_BLOCKS: usize = 4;

impl PackedFormat for Int8Matrix {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn tile_bytes(&self) -> usize {
        self.blocks * BLOCK_LINES * size_of::<CacheLine>()
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
    fn dot_int8<S: Simd, const T: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Int8Activations,
        token: usize,
    ) -> [S::Float; T] {
        let (blocks, scales) = self.tile(tile);
        let (codes, sums) = (token_codes::<T>(x, token), token_sums::<T>(x, token));
        let offsets = token_offsets::<T>(x, token);
        let mut result = [s.splat_f32(0.0); T];
        let mut start = 0;
        for scale in scales {
            let end = self.blocks.min(start + self.group);
            // dot_signed adds WEIGHT_OFFSET to each weight: start with minus that times the sum of the activations.
            let mut totals = [s.splat(0); T];
            if S::WEIGHT_OFFSET != 0 && end - start <= SHORT_GROUP_BLOCKS {
                // A broadcast from memory does not occupy the port of the dot products, as one from a register would.
                const { assert!(S::WEIGHT_OFFSET == 0 || S::WEIGHT_OFFSET == 4 * Q6_OFFSET) };
                for t in 0..T {
                    for block in &offsets[t][start..end] {
                        totals[t] = s.add(totals[t], s.splat(*block));
                    }
                    totals[t] = s.shl::<2>(totals[t]);
                }
            } else if S::WEIGHT_OFFSET != 0 {
                for t in 0..T {
                    totals[t] = s.splat((sums[t][start] - sums[t][end]) * S::WEIGHT_OFFSET);
                }
            }
            // The inner loop: one line of weights, T tokens.
            let blocks = &blocks[start..end];
            let codes = slice_each(codes, start..end);
            for i in 0..blocks.len() {
                for p in 0..BLOCK_LINES {
                    s.prefetch(&blocks[i][p], PREFETCH_LINES);
                    let w = s.load(&blocks[i][p]);
                    for t in 0..T {
                        let x = splat_quad(s, &codes[t][i], p);
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
    fn multiply_tiles<S: Simd>(
        &self,
        s: S,
        tiles: Range<usize>,
        x: &Int8Activations,
        tokens: Range<usize>,
        epilogue: &impl Epilogue,
    ) {
        let tiles = self.multiply_by_unit::<S, 4>(s, tiles, x, tokens.clone(), epilogue);
        let tiles = self.multiply_by_unit::<S, 2>(s, tiles, x, tokens.clone(), epilogue);
        multiply_tile_groups(self, s, tiles, x, tokens, epilogue);
    }

    #[inline(always)]
    fn dot_f32<S: Simd, const T: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Activations,
        token: usize,
    ) -> [S::Float; T] {
        let (blocks, scales) = self.tile(tile);
        let floats = token_floats::<T>(x, token);
        let mut result = [s.splat_f32(0.0); T];
        for (group, scale) in scales.iter().enumerate() {
            let mut sums = [s.splat_f32(0.0); T];
            for block in group * self.group..self.blocks.min((group + 1) * self.group) {
                // Code by code: the lowest byte of each lane is extended with its sign, then the next is shifted down.
                for p in 0..BLOCK_LINES {
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
