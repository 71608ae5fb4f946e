//! [`SixBitMatrix`]: six bits a weight, as in GGUF's Q6_K.

use crate::{
    matmul::{
        activations::{Input, Quantized},
        tile::{Form, four, tiles, token_codes, token_floats, token_offsets},
    },
    memory::{Arena, Block},
    simd::{LANES, Line, Simd},
};
use half::f16;

/// Lines of a block of 16 columns: low four bits of columns 0-7, of columns 8-15, high two bits.
const LINES: usize = 3;
/// Blocks that share a scale.
const GROUP: usize = 16;

/// Codes -32 to 31, with an int8 factor for each 16 consecutive columns of a row and an f16 scale for each 256:
/// `w = scale * factor * code`.
///
/// The low bits `4n` of byte `b` of row `r` in line `i` are column `8i + 4n + b`; the high bits are laid out as in
/// [`TernaryMatrix`](crate::TernaryMatrix). Stored is `code + 32`.
#[derive(Debug)]
pub struct SixBitMatrix {
    rows: usize,
    cols: usize,
    blocks: usize,
    /// `[tiles, blocks, LINES]`
    codes: Block<Line>,
    /// `[tiles, blocks]`
    factors: Block<[i8; LANES]>,
    /// `[tiles, groups]`
    scales: Block<[f16; LANES]>,
}

impl SixBitMatrix {
    /// Bytes that [`pack`](Self::pack) takes from its arena.
    pub fn bytes(rows: usize, cols: usize) -> usize {
        let blocks = cols.div_ceil(LANES);
        let tile = blocks * (LINES * size_of::<Line>() + LANES) + blocks.div_ceil(GROUP) * LANES * 2;
        tiles(rows) * tile + 2 * size_of::<Line>()
    }

    /// `read(row, codes, factors, scales)` gives codes `[cols]`, factors `[cols / 16]` and scales `[cols / 256]`,
    /// rounded up, of each row in turn.
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
        let groups = blocks.div_ceil(GROUP);
        let mut codes = arena.take::<Line>(tiles(rows) * blocks * LINES);
        let mut factors = arena.take::<[i8; LANES]>(tiles(rows) * blocks);
        let mut scales = arena.take::<[f16; LANES]>(tiles(rows) * groups);
        let (mut row_codes, mut row_factors) = (vec![0; cols], vec![0; blocks]);
        let mut row_scales = vec![f16::ZERO; groups];
        for row in 0..rows {
            read(row, &mut row_codes, &mut row_factors, &mut row_scales);
            let (tile, lane) = (row / LANES, row % LANES);
            let (lines, _) = codes[tile * blocks * LINES..].as_chunks_mut::<LINES>();
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

    #[inline(always)]
    fn tile(&self, tile: usize) -> (&[[Line; LINES]], &[[i8; LANES]], &[[f16; LANES]]) {
        let groups = self.blocks.div_ceil(GROUP);
        let (blocks, _) = self.codes.as_chunks::<LINES>();
        (
            &blocks[tile * self.blocks..][..self.blocks],
            &self.factors[tile * self.blocks..][..self.blocks],
            &self.scales[tile * groups..][..groups],
        )
    }
}

/// Codes + 32 of four columns: four bits of plane `p` of the two low lines, two bits of plane `p` of the high line.
#[inline(always)]
fn plane<S: Simd>(s: S, lines: [S::Int; LINES], p: usize) -> S::Int {
    let low = if p.is_multiple_of(2) { lines[p / 2] } else { s.shr::<4>(lines[p / 2]) };
    let high = match p {
        0 => s.shl::<4>(lines[2]),
        1 => s.shl::<2>(lines[2]),
        2 => lines[2],
        _ => s.shr::<2>(lines[2]),
    };
    s.add(s.and(low, s.splat(0x0f0f_0f0f)), s.and(high, s.splat(0x3030_3030)))
}

impl Form for SixBitMatrix {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn tile_bytes(&self) -> usize {
        self.blocks * (LINES * size_of::<Line>() + LANES)
    }

    fn read_row(&self, row: usize, values: &mut [f32]) {
        let (blocks, factors, scales) = self.tile(row / LANES);
        let lane = row % LANES;
        for (block, values) in values.chunks_mut(LANES).enumerate() {
            let scale = scales[block / GROUP][lane].to_f32() * f32::from(factors[block][lane]);
            for (column, value) in values.iter_mut().enumerate() {
                let byte = lane * 4 + column % 4;
                let low = blocks[block][column / 8].0[byte] >> (column / 4 % 2 * 4) & 15;
                let high = blocks[block][2].0[byte] >> (column / 4 * 2) & 3;
                *value = f32::from((low | high << 4) as i8 - 32) * scale;
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
        let (blocks, factors, scales) = self.tile(tile);
        let (codes, offsets) = (token_codes::<T>(x, token), token_offsets::<T>(x, token));
        let mut result = [s.splat_f32(0.0); T];
        for (group, scale) in scales.iter().enumerate() {
            let mut totals = [s.splat(0); T];
            for i in group * GROUP..self.blocks.min((group + 1) * GROUP) {
                for line in &blocks[i] {
                    s.prefetch(line, 64);
                }
                let factor = s.load_i8(&factors[i]);
                let lines = std::array::from_fn(|line| s.load(&blocks[i][line]));
                let mut offset = [s.splat(0); T];
                for t in 0..T {
                    offset[t] = s.splat(offsets[t][i]);
                }
                // Two pairs of at most 63 * 127 fit 16 bits; sums of 32 bits begin with the offset.
                let mut acc = [[s.splat(0); 2]; T];
                if !S::NARROW {
                    for t in 0..T {
                        acc[t][0] = offset[t];
                    }
                }
                for p in 0..4 {
                    let w = plane(s, lines, p);
                    for t in 0..T {
                        let half = if S::NARROW { p / 2 } else { 0 };
                        acc[t][half] = s.dot(acc[t][half], w, four(s, &codes[t][i], p));
                    }
                }
                for t in 0..T {
                    let mut sum = acc[t][0];
                    if S::NARROW {
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
    fn exact<S: Simd, const T: usize>(&self, s: S, tile: usize, x: &Input, token: usize) -> [S::Float; T] {
        let (blocks, factors, scales) = self.tile(tile);
        let floats = token_floats::<T>(x, token);
        let mut result = [s.splat_f32(0.0); T];
        for (i, (lines, factors)) in blocks.iter().zip(factors).enumerate() {
            let scale = s.mul_f32(s.load_f16(&scales[i / GROUP]), s.to_float(s.load_i8(factors)));
            let lines = std::array::from_fn(|line| s.load(&lines[line]));
            let mut sums = [s.splat_f32(0.0); T];
            for p in 0..4 {
                let mut bytes = plane(s, lines, p);
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
