//! Ternary weights at 2 bits ([`TernaryMatrix`]) and their products with int8 activations.
//!
//! # Layout
//! Rows are grouped in tiles of 16 (one vector lane per row), columns in blocks of 16. One block of a tile is one 64-byte
//! cache line, with four bytes per row:
//!
//! ```text
//! bits 2p..2p+2 of byte 4r + b  =  code(row r, column 4p + b) + 1          p, b in 0..4,  r in 0..16
//!
//! the four bytes of a row:      byte 0            byte 1            byte 2            byte 3
//!                  bits   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0
//!                  column c12  c8  c4  c0   c13  c9  c5  c1   c14 c10  c6  c2   c15 c11  c7  c3
//! ```
//!
//! Bit plane `p` is `(line >> 2p) & 0x03` in every byte: four consecutive columns of all 16 rows, as the unsigned bytes
//! that [`Simd::dot`] multiplies. Codes are stored plus 1, so a product with them is too large by the sum of the
//! activations, which [`Int8Activations`] has computed before.
//!
//! There is one f16 scale per row and group of columns. A group is the whole row, or a multiple of 16 columns.
//!
//! # Product of one token
//! ```text
//! for each scale group:
//!     acc = -sum(x in the group)                              because codes are stored + 1
//!     for each block of the group, for p in 0..4:
//!         acc = dot(acc, plane p of the block, x[4p..4p+4])   vpdpbusd, vpmaddubsw or sdot
//!     y += acc * scale
//! ```
//!
//! Three instructions per plane (shift, mask, dot) would make the unpacking two thirds of the work. A plane that is not
//! shifted down is `4^p` times too large, which a shift of the finished sum corrects. So with `P` sums, plane `p` is only
//! shifted by whole multiples of `2 P` bits, onto plane `p mod P`, and sum `p mod P` is divided by `4^(p mod P)` at the
//! end. More sums save shifts and break dependencies, but occupy registers:
//!
//! | tokens in registers | AVX-512 VNNI, AVX-VNNI | AVX2, NEON |
//! |---|---|---|
//! | 1, 2 | `P` = 4: no shifts | `P` = 2 |
//! | 4, 8 | `P` = 2 | `P` = 1 |
//!
//! With `P` = 4, the 16-bit sums of AVX2 would have to be widened after every block, and `sdot` of NEON takes signed
//! weights, at most 127, where plane 3 has 128. How many blocks fit into a sum is [`max_blocks_per_sum`].
//!
//! # Which path
//! | tokens | CPU | path |
//! |---|---|---|
//! | 1-16 (1-8 with AMX) | any | planes in registers, as above (`dot_planes`) |
//! | 4-16 | AMX, whole steps of 64 columns | four tiles by the matrix unit, unpacked one step ahead (`multiply_unit_tiles`) |
//! | 17 or more (9 or more with AMX) | any | panels of 1,024 unpacked columns (`multiply_unpacked`) |
//!
//! For few tokens, reading the weights is the work: one token runs at the bandwidth of the memory. For many tokens, the
//! dot products are: unpacking is paid once per panel and pass of up to 64 tokens, and the panel stays in the first-level
//! cache while the tokens pass.
//!
//! # Tried
//! Measured as BENCHMARKS.md describes:
//! - six tokens per pass instead of four on AVX2: 7 % slower, registers spill;
//! - prefetching the lines of the result: no change;
//! - prefetching weights for more than one token as well: 2.4 times faster at 8 tokens (32768 x 8192, two threads);
//! - the matrix unit with two tiles per step instead of four: 35.5 instead of 24.6 us (768 x 3072, 8 tokens);
//! - eight tokens by AMX tiles, two steps of two panels at a time: 1.7 times slower than registers;
//! - prefetching 12 KiB ahead instead of 4 KiB: no change.

use crate::{
    matmul::{
        activations::{Activations, Int8Activations},
        tile::{
            Epilogue, PANEL_BLOCKS, PackedFormat, TOKENS_PER_PASS, TileAccumulators, dot_unpacked,
            for_each_token_group, group_blocks, matrix_unit, max_blocks_per_sum, multiply_in_registers,
            multiply_tile_groups, prefetch_offset, slice_each, splat_quad, tile_count, token_codes,
            token_floats, token_sums,
        },
    },
    memory::{Arena, ArenaSlice},
    simd::{AccumulatorSink, CacheLine, LANES, MatrixUnit, Simd, UNIT_TILES, UnpackedBlock},
};
use half::f16;
use std::ops::Range;

/// A matrix of ternary codes (-1, 0, +1) at 2 bits per weight, with one f16 scale per row and group of columns:
/// `w = scale * code`.
///
/// A weight takes 2 bits plus 16 bits per group. The head of the file `matmul/format/ternary2.rs` has the layout and the
/// algorithm of the product.
#[derive(Debug)]
pub struct TernaryMatrix {
    rows: usize,
    cols: usize,
    /// Blocks of 16 columns per row.
    blocks: usize,
    /// Blocks per scale.
    group: usize,
    /// Cache lines of codes, `[tiles, blocks]`.
    codes: ArenaSlice<CacheLine>,
    /// `[tiles, groups]`, 16 rows each.
    scales: ArenaSlice<[f16; LANES]>,
}

impl TernaryMatrix {
    /// Bytes that [`pack`](Self::pack) takes from its arena.
    pub fn bytes(rows: usize, cols: usize, group: usize) -> usize {
        let tile = cols.div_ceil(LANES) * size_of::<CacheLine>() + cols.div_ceil(group) * LANES * 2;
        tile_count(rows) * tile + size_of::<CacheLine>()
    }

    /// Packs a matrix of `rows` rows and `cols` columns, with a scale for each `group` consecutive columns of a row.
    ///
    /// `read(row, codes, scales)` is called once per row, in order. It writes the codes `[cols]` and the scales
    /// `[cols / group, rounded up]` of the row.
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
        let mut codes = arena.take::<CacheLine>(tile_count(rows) * blocks);
        let mut scales = arena.take::<[f16; LANES]>(tile_count(rows) * groups);
        // Columns and rows of the padding have code 0.
        codes.fill(CacheLine([0b01_01_01_01; 64]));
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

    /// Codes `[blocks]` and scales `[groups]` of a tile.
    #[inline(always)]
    fn tile(&self, tile: usize) -> (&[CacheLine], &[[f16; LANES]]) {
        let groups = self.blocks.div_ceil(self.group);
        (&self.codes[tile * self.blocks..][..self.blocks], &self.scales[tile * groups..][..groups])
    }

    /// [`dot_int8`](PackedFormat::dot_int8) with `P` sums per token: planes `p` and `p + P` share a sum, which is
    /// `4^(p mod P)` times too large until the end.
    #[inline(always)]
    fn dot_planes<S: Simd, const T: usize, const P: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Int8Activations,
        token: usize,
    ) -> [S::Float; T] {
        let (lines, scales) = self.tile(tile);
        let (codes, sums) = (token_codes::<T>(x, token), token_sums::<T>(x, token));
        // Blocks after which sums must be widened.
        let limit = max_blocks_per_sum::<S>(P);
        let mut result = [s.splat_f32(0.0); T];
        let mut start = 0;
        for scale in scales {
            let end = self.blocks.min(start + self.group);
            // Codes are stored + 1: subtract the sum of the activations of the group.
            let mut totals: [S::Int; T] = std::array::from_fn(|t| s.splat(sums[t][start] - sums[t][end]));
            while start < end {
                let stop = end.min(start.saturating_add(limit));
                let lines = &lines[start..stop];
                let codes = slice_each(codes, start..stop);
                // The inner loop: one line of weights, four planes, T tokens. All sums are in registers.
                let mut acc = [[s.splat(0); P]; T];
                for i in 0..lines.len() {
                    s.prefetch(&lines[i], PREFETCH_LINES);
                    let line = s.load(&lines[i]);
                    for p in 0..4 {
                        let w = unpack_plane::<S, P>(s, line, p);
                        for t in 0..T {
                            acc[t][p % P] = s.dot(acc[t][p % P], w, splat_quad(s, &codes[t][i], p));
                        }
                    }
                }
                // Sum p is 4^p times too large: plane p was not shifted down.
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

    /// The products of [`UNIT_TILES`] tiles with 4 to 16 tokens, by the matrix unit.
    ///
    /// Each step unpacks the weights of the next one into the other of two buffers, so that the unit does not wait for
    /// them.
    #[inline(always)]
    fn multiply_unit_tiles<S: Simd>(
        &self,
        s: S,
        unit: &mut S::MatrixUnit,
        tile: usize,
        x: &Int8Activations,
        tokens: Range<usize>,
        (planes, accumulators): (&mut UnpackedSteps, &mut TileAccumulators<S>),
    ) {
        let mut steps: [&[[CacheLine; STEP_BLOCKS]]; UNIT_TILES] = [&[]; UNIT_TILES];
        for r in 0..UNIT_TILES {
            steps[r] = self.tile(tile + r).0.as_chunks().0;
        }
        // Weights of step i are unpacked to buffer i % 2 while step i - 1 is multiplied from the other.
        let last = steps[0].len() - 1;
        let codes = &x.codes[tokens.start * x.blocks..];
        unpack(s, steps, 0, &mut planes[0]);
        for group in 0..self.blocks.div_ceil(self.group) {
            let start = group * self.group;
            let end = self.blocks.min(start + self.group);
            unit.clear();
            for index in start / STEP_BLOCKS..end / STEP_BLOCKS {
                unpack(s, steps, last.min(index + 1), &mut planes[(index + 1) % 2]);
                let mut weights: [&[CacheLine]; UNIT_TILES] = [&[]; UNIT_TILES];
                for r in 0..UNIT_TILES {
                    weights[r] = planes[index % 2][r].as_flattened();
                }
                unit.add(weights, &codes[index * STEP_BLOCKS..], x.blocks);
            }
            // Codes are stored + 1, as in `dot_planes`.
            for (offset, token) in accumulators.offsets.iter_mut().zip(tokens.clone()) {
                let [sums] = token_sums(x, token);
                *offset = sums[start] - sums[end];
            }
            unit.store(&mut accumulators.sums);
            for r in 0..UNIT_TILES {
                accumulators.scale(s, r, s.load_f16(&self.tile(tile + r).1[group]), group == 0);
            }
        }
    }

    /// The products of `R` tiles with many tokens: unpacks a panel of [`PANEL_BLOCKS`]` / R` blocks of each tile, then
    /// multiplies all tokens with it.
    #[inline(always)]
    fn multiply_unpacked<S: Simd, const R: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Int8Activations,
        tokens: Range<usize>,
        epilogue: &impl Epilogue,
    ) {
        let tiles: [_; R] = std::array::from_fn(|r| self.tile(tile + r));
        let mut unpacked = [[CacheLine([0; 64]); 4]; PANEL_BLOCKS];
        let mut totals = [[s.splat(0); R]; TOKENS_PER_PASS];
        let mut results = [[s.splat_f32(0.0); R]; TOKENS_PER_PASS];
        let (totals, results) = (&mut totals[..tokens.len()], &mut results[..tokens.len()]);
        let mut start = 0;
        for group in 0..self.blocks.div_ceil(self.group) {
            let end = self.blocks.min(start + self.group);
            // Totals of the group start at minus the sum of the activations, since codes are stored + 1.
            for (t, totals) in totals.iter_mut().enumerate() {
                let [sums] = token_sums(x, tokens.start + t);
                *totals = [s.splat(sums[start] - sums[end]); R];
            }
            while start < end {
                // Unpack a panel of each tile: a byte per code.
                let stop = end.min(start + PANEL_BLOCKS / R);
                for (panel, (lines, _)) in unpacked.chunks_mut(PANEL_BLOCKS / R).zip(tiles) {
                    for (planes, line) in panel.iter_mut().zip(&lines[start..stop]) {
                        s.prefetch(line, PREFETCH_LINES);
                        let line = s.load(line);
                        for (p, to) in planes.iter_mut().enumerate() {
                            s.store(unpack_plane::<S, 1>(s, line, p), to);
                        }
                    }
                }
                let panels: [_; R] =
                    std::array::from_fn(|r| &unpacked[r * PANEL_BLOCKS / R..][..stop - start]);
                if s.has_matrix_unit() {
                    let codes = &x.codes[tokens.start * x.blocks + start..];
                    s.multiply_panels(panels, codes, x.blocks, tokens.len(), &mut AddSums::<S, R>(totals));
                    start = stop;
                    continue;
                }
                // All tokens of the pass with the panel, which is now in the first-level cache.
                for_each_token_group!(S, 0..tokens.len(), |token, T| {
                    let codes = slice_each(token_codes::<T>(x, tokens.start + token), start..stop);
                    let sums = dot_unpacked::<S, T, R>(s, panels, codes);
                    for t in 0..T {
                        for r in 0..R {
                            totals[token + t][r] = s.add(totals[token + t][r], sums[r][t]);
                        }
                    }
                });
                start = stop;
            }
            // The end of a group: its totals, times its scale, are added to the results.
            for r in 0..R {
                let scale = s.load_f16(&tiles[r].1[group]);
                for (results, totals) in results.iter_mut().zip(&*totals) {
                    results[r] = s.fma(s.to_float(totals[r]), scale, results[r]);
                }
            }
        }
        for (token, results) in tokens.zip(&*results) {
            for r in 0..R {
                epilogue.apply(s, tile + r, token, results[r]);
            }
        }
    }
}

/// Unpacks the bit planes of step `index` of four tiles.
#[inline(always)]
fn unpack<S: Simd>(
    s: S,
    steps: [&[[CacheLine; STEP_BLOCKS]]; UNIT_TILES],
    index: usize,
    unpacked: &mut [[UnpackedBlock; STEP_BLOCKS]; UNIT_TILES],
) {
    let offset = prefetch_offset(index * STEP_BLOCKS, steps[0].len() * STEP_BLOCKS, PREFETCH_LINES);
    for r in 0..UNIT_TILES {
        for i in 0..STEP_BLOCKS {
            let line = &steps[r][index][i];
            s.prefetch(line, offset);
            let line = s.load(line);
            for p in 0..4 {
                s.store(unpack_plane::<S, 1>(s, line, p), &mut unpacked[r][i][p]);
            }
        }
    }
}

/// Blocks per step of the matrix unit: 64 columns fill a row of an AMX tile.
const STEP_BLOCKS: usize = 4;

/// Unpacked weights of two steps of four tiles, 8 KiB.
type UnpackedSteps = [[[UnpackedBlock; STEP_BLOCKS]; UNIT_TILES]; 2];

/// A sink that adds the sums of a panel to the totals of a group.
struct AddSums<'a, S: Simd, const R: usize>(&'a mut [[S::Int; R]]);

impl<S: Simd, const R: usize> AccumulatorSink<S, R> for AddSums<'_, S, R> {
    #[inline(always)]
    fn take(&mut self, s: S, first: usize, sums: &[[S::Int; R]]) {
        for (totals, sums) in self.0[first..].iter_mut().zip(sums) {
            for r in 0..R {
                totals[r] = s.add(totals[r], sums[r]);
            }
        }
    }
}

/// Token count up to which planes are unpacked in registers: a panel is not worthwhile for fewer.
const PLANES_MAX_TOKENS: usize = 16;
/// The same on a CPU with AMX, whose products of panels are cheaper.
const PLANES_MAX_TOKENS_AMX: usize = 8;

/// Prefetch distance in cache lines: 4 KiB.
const PREFETCH_LINES: usize = 64;

/// Bit plane `p`: codes + 1 of four columns of each row, times `4^(p mod P)`.
#[inline(always)]
fn unpack_plane<S: Simd, const P: usize>(s: S, line: S::Int, p: usize) -> S::Int {
    let shifted = match p / P * P {
        0 => line,
        1 => s.shr::<2>(line),
        2 => s.shr::<4>(line),
        _ => s.shr::<6>(line),
    };
    s.and(shifted, s.splat(0x0303_0303 << (2 * (p % P))))
}

impl PackedFormat for TernaryMatrix {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn tile_bytes(&self) -> usize {
        self.blocks * size_of::<CacheLine>()
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
    fn dot_int8<S: Simd, const T: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Int8Activations,
        token: usize,
    ) -> [S::Float; T] {
        match T {
            // Enough independent sums to hide the latency of the dot product.
            1 | 2 if S::UNSHIFTED_PLANES == 4 => self.dot_planes::<S, T, 4>(s, tile, x, token),
            1 | 2 => self.dot_planes::<S, T, 2>(s, tile, x, token),
            _ if S::UNSHIFTED_PLANES == 4 => self.dot_planes::<S, T, 2>(s, tile, x, token),
            _ => self.dot_planes::<S, T, 1>(s, tile, x, token),
        }
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
        let Range { start: mut tile, end } = tiles;
        if let Some(mut unit) = matrix_unit::<S, STEP_BLOCKS>(s, tokens.len(), self.blocks, self.group) {
            let mut planes = [[[[CacheLine([0; 64]); 4]; STEP_BLOCKS]; UNIT_TILES]; 2];
            let mut accumulators = TileAccumulators::new(s, tokens.len());
            while end - tile >= UNIT_TILES {
                let buffers = (&mut planes, &mut accumulators);
                self.multiply_unit_tiles(s, &mut unit, tile, x, tokens.clone(), buffers);
                accumulators.write(s, tile, tokens.clone(), epilogue);
                tile += UNIT_TILES;
            }
        }
        multiply_tile_groups(self, s, tile..end, x, tokens, epilogue);
    }

    /// For many tokens it pays to unpack the planes once.
    #[inline(always)]
    fn multiply_tile_group<S: Simd, const R: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Int8Activations,
        tokens: Range<usize>,
        epilogue: &impl Epilogue,
    ) {
        if tokens.len() > if s.has_matrix_unit() { PLANES_MAX_TOKENS_AMX } else { PLANES_MAX_TOKENS } {
            return self.multiply_unpacked::<S, R>(s, tile, x, tokens, epilogue);
        }
        multiply_in_registers(self, s, tile..tile + R, x, tokens, epilogue);
    }

    #[inline(always)]
    fn dot_f32<S: Simd, const T: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Activations,
        token: usize,
    ) -> [S::Float; T] {
        let (lines, scales) = self.tile(tile);
        let floats = token_floats::<T>(x, token);
        let mut result = [s.splat_f32(0.0); T];
        for (group, scale) in scales.iter().enumerate() {
            let mut sums = [s.splat_f32(0.0); T];
            for block in group * self.group..self.blocks.min((group + 1) * self.group) {
                // Code by code: byte b of plane p is column 4p + b.
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
