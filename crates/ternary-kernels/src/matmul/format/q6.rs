//! 6-bit weights ([`Q6Matrix`]), as in GGUF's Q6_K, and their products with int8 activations.
//!
//! # Layout
//! A block of 16 rows and 16 columns is three cache lines of `code + 32`: two with the low four bits, one with the high two
//! bits, which are laid out as ternary codes are (`ternary2.rs`).
//!
//! ```text
//! bits 4n..4n+4 of byte 4r + b of line i  =  low bits of column 8i + 4n + b         n, i in 0..2,  b in 0..4
//! bits 2p..2p+2 of byte 4r + b of line 2  =  high bits of column 4p + b             p, b in 0..4,  r in 0..16
//! ```
//!
//! There is one int8 factor per row and block of 16 columns, and one f16 scale per row and 16 blocks.
//!
//! # Product
//! ```text
//! for each group of 256 columns:
//!     total = 0
//!     for each block of 16 columns:
//!         acc = -32 * sum(x in the block)                     because codes are stored + 32
//!         for p in 0..4:  acc = dot(acc, low bits | high bits of quad p, quad p of x)
//!         total += acc * factor
//!     y += total * scale
//! ```
//!
//! In 16 bits (AVX2), a pair of products is at most `2 * 63 * 127 = 16,002`, so two pairs fit into a sum, and a block of four quads
//! needs two. They are widened at every block, since the next one has another factor.
//!
//! The factor of 16 columns is an integer, so a group of 256 columns is summed exactly; only one float product per group rounds.
//!
//! # Which path
//! Any number of tokens on any CPU takes `dot_int8`, for as many tokens at a time as the registers hold. There is no path with unpacked
//! panels: the format serves output tables, of which generation multiplies one token per text.
//!
//! # Tried
//! Codes used to be multiplied in two parts, low and high bits. Putting them together first halves the dot products: the
//! product of an output table was 1.45 times as fast for 8 tokens, and 1.09 times for one.

use crate::{
    matmul::{
        activations::{Activations, Int8Activations},
        tile::{PackedFormat, splat_quad, tile_count, token_codes, token_floats, token_offsets},
    },
    memory::{Arena, ArenaSlice},
    simd::{CacheLine, LANES, Simd},
};
use half::f16;

/// Cache lines per block: low four bits of columns 0-7, of columns 8-15, high two bits of all.
const BLOCK_LINES: usize = 3;
/// Blocks per f16 scale.
const GROUP_BLOCKS: usize = 16;

/// A matrix of 6-bit codes (-32 to 31), with one int8 factor per 16 columns of a row and one f16 scale per 256:
/// `w = scale * factor * code`.
///
/// # Source
/// The type Q6_K of GGUF, repacked.
#[derive(Debug)]
pub struct Q6Matrix {
    rows: usize,
    cols: usize,
    /// Blocks of 16 columns per row.
    blocks: usize,
    /// `[tiles, blocks, BLOCK_LINES]`
    codes: ArenaSlice<CacheLine>,
    /// `[tiles, blocks]`
    factors: ArenaSlice<[i8; LANES]>,
    /// `[tiles, groups]`
    scales: ArenaSlice<[f16; LANES]>,
}

impl Q6Matrix {
    /// Bytes that [`pack`](Self::pack) takes from its arena.
    pub fn bytes(rows: usize, cols: usize) -> usize {
        let blocks = cols.div_ceil(LANES);
        let tile = blocks * (BLOCK_LINES * size_of::<CacheLine>() + LANES)
            + blocks.div_ceil(GROUP_BLOCKS) * LANES * 2;
        tile_count(rows) * tile + 2 * size_of::<CacheLine>()
    }

    /// Packs a matrix of `rows` rows and `cols` columns.
    ///
    /// `read(row, codes, factors, scales)` is called once per row, in order. It writes the codes `[cols]`, the factors
    /// `[cols / 16, rounded up]` and the scales `[cols / 256, rounded up]` of the row.
    ///
    /// # Panics
    /// When a code is not in -32..=31.
    pub fn pack(
        arena: &mut Arena,
        rows: usize,
        cols: usize,
        mut read: impl FnMut(usize, &mut [i8], &mut [i8], &mut [f16]),
    ) -> Self {
        let blocks = cols.div_ceil(LANES);
        let groups = blocks.div_ceil(GROUP_BLOCKS);
        let mut codes = arena.take::<CacheLine>(tile_count(rows) * blocks * BLOCK_LINES);
        let mut factors = arena.take::<[i8; LANES]>(tile_count(rows) * blocks);
        let mut scales = arena.take::<[f16; LANES]>(tile_count(rows) * groups);
        let (mut row_codes, mut row_factors) = (vec![0; cols], vec![0; blocks]);
        let mut row_scales = vec![f16::ZERO; groups];
        for row in 0..rows {
            read(row, &mut row_codes, &mut row_factors, &mut row_scales);
            let (tile, lane) = (row / LANES, row % LANES);
            let (lines, _) = codes[tile * blocks * BLOCK_LINES..].as_chunks_mut::<BLOCK_LINES>();
            for (lines, codes) in lines.iter_mut().zip(row_codes.chunks(LANES)) {
                for (column, code) in codes.iter().enumerate() {
                    assert!((-32..32).contains(code), "code {code} of row {row} has more than six bits");
                    let (code, byte) = ((code + 32) as u8, lane * 4 + column % 4);
                    lines[column / 8].0[byte] |= (code & 15) << (column / 4 % 2 * 4);
                    lines[2].0[byte] |= (code >> 4) << (column / 4 * 2);
                }
            }
            for (to, factor) in factors[tile * blocks..].iter_mut().zip(&row_factors) {
                to[lane] = *factor;
            }
            for (to, scale) in scales[tile * groups..].iter_mut().zip(&row_scales) {
                to[lane] = *scale;
            }
        }
        Self { rows, cols, blocks, codes, factors, scales }
    }

    /// Codes `[blocks]`, factors `[blocks]` and scales `[groups]` of a tile.
    #[inline(always)]
    fn tile(&self, tile: usize) -> (&[[CacheLine; BLOCK_LINES]], &[[i8; LANES]], &[[f16; LANES]]) {
        let groups = self.blocks.div_ceil(GROUP_BLOCKS);
        let (blocks, _) = self.codes.as_chunks::<BLOCK_LINES>();
        (
            &blocks[tile * self.blocks..][..self.blocks],
            &self.factors[tile * self.blocks..][..self.blocks],
            &self.scales[tile * groups..][..groups],
        )
    }
}

/// Codes + 32 of columns `4p..4p + 4` of each row: four bits from one of the low lines, two from the high line.
#[inline(always)]
fn unpack_plane<S: Simd>(s: S, lines: [S::Int; BLOCK_LINES], p: usize) -> S::Int {
    let low = if p.is_multiple_of(2) { lines[p / 2] } else { s.shr::<4>(lines[p / 2]) };
    let high = match p {
        0 => s.shl::<4>(lines[2]),
        1 => s.shl::<2>(lines[2]),
        2 => lines[2],
        _ => s.shr::<2>(lines[2]),
    };
    s.add(s.and(low, s.splat(0x0f0f_0f0f)), s.and(high, s.splat(0x3030_3030)))
}

impl PackedFormat for Q6Matrix {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn tile_bytes(&self) -> usize {
        self.blocks * (BLOCK_LINES * size_of::<CacheLine>() + LANES)
    }

    fn read_row(&self, row: usize, values: &mut [f32]) {
        let (blocks, factors, scales) = self.tile(row / LANES);
        let lane = row % LANES;
        for (block, values) in values.chunks_mut(LANES).enumerate() {
            let scale = scales[block / GROUP_BLOCKS][lane].to_f32() * f32::from(factors[block][lane]);
            for (column, value) in values.iter_mut().enumerate() {
                let byte = lane * 4 + column % 4;
                let low = blocks[block][column / 8].0[byte] >> (column / 4 % 2 * 4) & 15;
                let high = blocks[block][2].0[byte] >> (column / 4 * 2) & 3;
                *value = f32::from((low | high << 4) as i8 - 32) * scale;
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
        let (blocks, factors, scales) = self.tile(tile);
        let (codes, offsets) = (token_codes::<T>(x, token), token_offsets::<T>(x, token));
        let mut result = [s.splat_f32(0.0); T];
        for (group, scale) in scales.iter().enumerate() {
            // Totals of the group: sums of blocks times their int8 factors.
            let mut totals = [s.splat(0); T];
            for i in group * GROUP_BLOCKS..self.blocks.min((group + 1) * GROUP_BLOCKS) {
                for line in &blocks[i] {
                    s.prefetch(line, 64);
                }
                let factor = s.load_i8(&factors[i]);
                let lines = std::array::from_fn(|line| s.load(&blocks[i][line]));
                // Codes are stored + 32.
                let mut offset = [s.splat(0); T];
                for t in 0..T {
                    offset[t] = s.splat(offsets[t][i]);
                }
                // A 16-bit sum holds two pairs of products, each at most 63 * 127, so two sums serve the four quads. A
                // 32-bit sum starts with the offset instead.
                let mut acc = [[s.splat(0); 2]; T];
                if !S::I16_SUMS {
                    for t in 0..T {
                        acc[t][0] = offset[t];
                    }
                }
                for p in 0..4 {
                    let w = unpack_plane(s, lines, p);
                    for t in 0..T {
                        let half = if S::I16_SUMS { p / 2 } else { 0 };
                        acc[t][half] = s.dot(acc[t][half], w, splat_quad(s, &codes[t][i], p));
                    }
                }
                for t in 0..T {
                    let mut sum = acc[t][0];
                    if S::I16_SUMS {
                        sum = s.add(s.add(s.widen(sum), s.widen(acc[t][1])), offset[t]);
                    }
                    totals[t] = s.add(totals[t], s.mul(sum, factor));
                }
            }
            let scale = s.load_f16(scale);
            for t in 0..T {
                result[t] = s.fma(s.to_float(totals[t]), scale, result[t]);
            }
        }
        result
    }

    #[inline(always)]
    fn dot_f32<S: Simd, const T: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Activations,
        token: usize,
    ) -> [S::Float; T] {
        let (blocks, factors, scales) = self.tile(tile);
        let floats = token_floats::<T>(x, token);
        let mut result = [s.splat_f32(0.0); T];
        for (i, (lines, factors)) in blocks.iter().zip(factors).enumerate() {
            let scale = s.mul_f32(s.load_f16(&scales[i / GROUP_BLOCKS]), s.to_float(s.load_i8(factors)));
            let lines = std::array::from_fn(|line| s.load(&lines[line]));
            let mut sums = [s.splat_f32(0.0); T];
            for p in 0..4 {
                let mut bytes = unpack_plane(s, lines, p);
                for b in 0..4 {
                    let w = s.to_float(s.sub(s.and(bytes, s.splat(63)), s.splat(32)));
                    bytes = s.shr::<8>(bytes);
                    let column = i * LANES + 4 * p + b;
                    if column < self.cols {
                        for t in 0..T {
                            sums[t] = s.fma(w, s.splat_f32(floats[t][column]), sums[t]);
                        }
                    }
                }
            }
            for t in 0..T {
                result[t] = s.fma(sums[t], scale, result[t]);
            }
        }
        result
    }
}
