//! Int8 or ternary codes that are packed anew at every training step ([`Int8TrainingMatrix`]), and their products with
//! int8 activations of many tokens.
//!
//! # Layout
//! As of [`Int8Matrix`](crate::Int8Matrix): a byte per weight, four cache lines per block of 16 rows and 16 columns. Ternary
//! codes are stored plus 1, so that they are the unsigned bytes that [`Simd::dot`] multiplies. There is one f32 scale per
//! row.
//!
//! A packed matrix is used once, so packing is a large part of the cost. Both ways put four columns of a row into a lane:
//!
//! ```text
//! RowMajor:     16 rows x 64 columns, a vector per row       ColumnMajor:   4 columns x 16 rows, a vector per column
//!               transpose(16 x 16 lanes of 4 bytes)                         c0 | c1 << 8 | c2 << 16 | c3 << 24
//!               -> 16 cache lines                                           -> 1 cache line
//! ```
//!
//! | source of the codes | how they are packed |
//! |---|---|
//! | `[rows, cols]` ([`MemoryOrder::RowMajor`]) | 64 columns of 16 rows are loaded and transposed as 16 x 16 lanes of 4 bytes |
//! | `[cols, rows]` ([`MemoryOrder::ColumnMajor`]), or computed by a [`ColumnSource`] | four columns are interleaved by shifts |
//!
//! # Product
//! | CPU | path | tokens per pass |
//! |---|---|---|
//! | AMX | [`Simd::multiply_panels`] over all columns: sums stay in tile registers from the first column to the last | as many as have 512 KiB of codes |
//! | others | panels of 1,024 columns, which stay in the first-level cache while the tokens pass | 64 |
//!
//! # Tried
//! - AMX with panels that stay in the first-level cache and partial sums in memory: 10 % slower. What is scarce is the way
//!   of the activations from the second-level cache.
//! - On AVX-512 without AMX, pairs of tiles share a pass over 8 tokens: 93 % of the peak of `vpdpbusd` at 512 tokens.
//! - Transposing 16 x 16 lanes in registers instead of in memory (here, in attention and in bfloat16 factors): 1684, 1693 and 1669
//!   tokens/s of a training step of 768 x 12 on AMX before, 1725, 1698 and 1724 after.
//! - Sums in tiles over all columns, tasks of 512 KiB of weights, and two other changes: 894 tokens/s before, 1238 after.

use crate::{
    Pool,
    matmul::{
        activations::{Activations, Int8Activations},
        tile::{
            Epilogue, PANEL_BLOCKS, PackedFormat, TOKENS_PER_PASS, dot_unpacked, for_each_token_group,
            splat_quad, tile_count, token_codes, token_floats,
        },
    },
    simd::{AccumulatorSink, CacheLine, Kernel, LANES, Simd, UnpackedBlock, vector_ops::load_codes},
};
use std::ops::Range;

/// A matrix of int8 codes with one f32 scale per row, `w = scale * code`, for products of many tokens.
///
/// Its memory is reused from one [`pack`](Self::pack) to the next.
#[derive(Debug, Default)]
pub struct Int8TrainingMatrix {
    rows: usize,
    cols: usize,
    /// Blocks of 16 columns per row.
    blocks: usize,
    range: CodeRange,
    /// `[tiles, blocks]`, perhaps followed by blocks that are not in use.
    codes: Vec<UnpackedBlock>,
    /// `[tiles]`
    scales: Vec<[f32; LANES]>,
}

/// Bytes of codes that pass a matrix together where there are tiles: a quarter of the second-level cache of such CPUs.
const PASS_CODE_BYTES: usize = 512 << 10;

/// Memory order of the codes of a matrix `[rows, cols]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryOrder {
    /// `[rows, cols]`
    RowMajor,
    /// `[cols, rows]`
    ColumnMajor,
}

/// Which codes an [`Int8TrainingMatrix`] holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CodeRange {
    /// -1, 0, +1; stored as 0, 1, 2.
    Ternary,
    /// -127 to 127; stored as signed bytes.
    #[default]
    Int8,
}

impl Int8TrainingMatrix {
    /// Packs the codes of a matrix with as many rows as `scales`.
    ///
    /// # Shapes
    /// codes `[rows, cols]` or `[cols, rows]`, as `order` says; scales `[rows]`
    ///
    /// # Panics
    /// When the number of codes is not a multiple of the number of scales.
    pub fn pack(&mut self, pool: &Pool, codes: &[i8], order: MemoryOrder, scales: &[f32], range: CodeRange) {
        let rows = scales.len();
        assert!(codes.len().is_multiple_of(rows), "{} codes are no {rows} rows", codes.len());
        let cols = codes.len() / rows;
        match order {
            MemoryOrder::ColumnMajor => {
                self.pack_columns(pool, cols, scales, range, &ByteColumns { codes, rows })
            }
            MemoryOrder::RowMajor => {
                self.resize(cols, scales, range);
                pool.chunks(
                    &mut self.codes[..tile_count(rows) * self.blocks],
                    self.blocks,
                    |tile, _, out| {
                        pool.isa().run(PackRows { codes, rows, cols, tile, range, out });
                    },
                );
            }
        }
    }

    /// Packs a matrix `[scales.len(), cols]` whose codes `source` computes column by column.
    pub(crate) fn pack_columns(
        &mut self,
        pool: &Pool,
        cols: usize,
        scales: &[f32],
        range: CodeRange,
        source: &impl ColumnSource,
    ) {
        self.resize(cols, scales, range);
        let rows = scales.len();
        let blocks = self.blocks;
        pool.chunks(&mut self.codes[..tile_count(rows) * blocks], PACK_TILES * blocks, |index, _, out| {
            let rows = index * PACK_TILES * LANES..rows.min((index + 1) * PACK_TILES * LANES);
            pool.isa().run(PackColumns { source, rows, cols, blocks, range, out });
        });
    }

    fn resize(&mut self, cols: usize, scales: &[f32], range: CodeRange) {
        (self.rows, self.cols, self.blocks, self.range) = (scales.len(), cols, cols.div_ceil(LANES), range);
        let planes = tile_count(self.rows) * self.blocks;
        // Never shrinks: growing again would fill with zeros again.
        if self.codes.len() < planes {
            self.codes.resize(planes, [CacheLine([0; 64]); 4]);
        }
        self.scales.clear();
        self.scales.extend(scales.chunks(LANES).map(|scales| {
            let mut padded = [0.0; LANES];
            padded[..scales.len()].copy_from_slice(scales);
            padded
        }));
    }

    /// Codes `[blocks]` of a tile.
    #[inline(always)]
    fn tile(&self, tile: usize) -> &[UnpackedBlock] {
        &self.codes[tile * self.blocks..][..self.blocks]
    }
}

/// A source of codes, one column of the matrix at a time.
pub(crate) trait ColumnSource: Sync {
    /// The codes of at most 16 rows of a column, one per lane.
    fn codes<S: Simd>(&self, s: S, col: usize, rows: Range<usize>) -> S::Int;
}

/// Codes in memory, `[cols, rows]`.
struct ByteColumns<'a> {
    codes: &'a [i8],
    rows: usize,
}

impl ColumnSource for ByteColumns<'_> {
    #[inline(always)]
    fn codes<S: Simd>(&self, s: S, col: usize, rows: Range<usize>) -> S::Int {
        load_codes(s, &self.codes[col * self.rows..][rows])
    }
}

/// Tiles that are packed together, so that each column is read in pieces of 128 codes.
const PACK_TILES: usize = 8;

/// Packs the tiles of `rows`, column by column.
struct PackColumns<'a, C> {
    source: &'a C,
    /// Rows of the matrix, of at most [`PACK_TILES`] tiles.
    rows: Range<usize>,
    cols: usize,
    /// Blocks per tile.
    blocks: usize,
    range: CodeRange,
    /// `[tiles, blocks]`
    out: &'a mut [UnpackedBlock],
}

impl<C: ColumnSource> Kernel for PackColumns<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { source, rows, cols, blocks, range, out } = self;
        for block in 0..blocks {
            for p in 0..4 {
                let start = block * LANES + 4 * p;
                for (tile, first) in rows.clone().step_by(LANES).enumerate() {
                    let rows = first..rows.end.min(first + LANES);
                    // Four columns become the four bytes of each lane, the last one first.
                    let mut lanes = s.splat(0);
                    for b in (0..cols.saturating_sub(start).min(4)).rev() {
                        let column = s.and(source.codes(s, start + b, rows.clone()), s.splat(0xff));
                        lanes = s.add(s.shl::<8>(lanes), column);
                    }
                    let line = if range == CodeRange::Ternary { plus_one(s, lanes) } else { lanes };
                    s.store(line, &mut out[tile * blocks + block][p]);
                }
            }
        }
    }
}

/// Packs one tile of a matrix `[rows, cols]`.
struct PackRows<'a> {
    /// Of the whole matrix, `[rows, cols]`.
    codes: &'a [i8],
    rows: usize,
    cols: usize,
    /// The tile to pack.
    tile: usize,
    range: CodeRange,
    /// `[blocks]`
    out: &'a mut [UnpackedBlock],
}

impl Kernel for PackRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { codes, rows, cols, tile, range, out } = self;
        let first = tile * LANES;
        let height = LANES.min(rows - first);
        // 64 columns of each row are transposed to 16 lines, one for each quad of columns.
        for (index, blocks) in out.chunks_mut(size_of::<CacheLine>() / LANES).enumerate() {
            let start = index * size_of::<CacheLine>();
            let lines = std::array::from_fn(|lane| {
                if lane >= height {
                    return s.splat(0);
                }
                let row = &codes[(first + lane) * cols + start..(first + lane + 1) * cols];
                let mut line = CacheLine([0; 64]);
                match row.first_chunk::<64>() {
                    Some(row) => line.0 = row.map(|code| code as u8),
                    None => line.0.iter_mut().zip(row).for_each(|(to, code)| *to = *code as u8),
                }
                s.load(&line)
            });
            for (line, lanes) in blocks.as_flattened_mut().iter_mut().zip(s.transpose(lines)) {
                s.store(if range == CodeRange::Ternary { plus_one(s, lanes) } else { lanes }, line);
            }
        }
    }
}

/// 0, 1, 2 for the bytes -1, 0, +1: `((x & 3) + 1) & 3`. The masks keep the carry of -1 + 1 out of the next byte.
#[inline(always)]
fn plus_one<S: Simd>(s: S, bytes: S::Int) -> S::Int {
    let three = s.splat(0x0303_0303);
    s.and(s.add(s.and(bytes, three), s.splat(0x0101_0101)), three)
}

impl PackedFormat for Int8TrainingMatrix {
    /// Larger than elsewhere: in training, the activations are as large as the matrix, and each task reads all of them.
    const TASK_BYTES: usize = 512 << 10;

    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn tile_bytes(&self) -> usize {
        self.blocks * size_of::<UnpackedBlock>()
    }

    fn read_row(&self, row: usize, values: &mut [f32]) {
        let (tile, lane) = (row / LANES, row % LANES);
        let scale = self.scales[tile][lane];
        for (col, value) in values.iter_mut().enumerate() {
            let byte = self.tile(tile)[col / LANES][col % LANES / 4].0[lane * 4 + col % 4] as i8;
            *value = f32::from(byte - self.stored_offset()) * scale;
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
        let codes = token_codes::<T>(x, token);
        let scale = s.load_f32(&self.scales[tile]);
        let [found] = self.sums(s, [self.tile(tile)], codes);
        std::array::from_fn(|t| {
            let offset = s.splat(-x.sum(token + t) * self.offset::<S>());
            s.mul_f32(s.to_float(s.add(found[t], offset)), scale)
        })
    }

    /// AMX keeps sums in tile registers over all columns, so the activations only need to stay in the second-level cache.
    #[inline(always)]
    fn tokens_per_pass<S: Simd>(&self, s: S) -> usize {
        if s.has_matrix_unit() {
            (PASS_CODE_BYTES / (self.blocks * LANES)).max(1).next_multiple_of(TOKENS_PER_PASS)
        } else {
            TOKENS_PER_PASS
        }
    }

    /// By AMX over all columns, or by panels that stay in the first-level cache while the tokens pass.
    #[inline(always)]
    fn multiply_tile_group<S: Simd, const R: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Int8Activations,
        tokens: Range<usize>,
        epilogue: &impl Epilogue,
    ) {
        let lines: [_; R] = std::array::from_fn(|r| self.tile(tile + r));
        // AMX multiplies signed bytes as they are.
        let offset = if self.range == CodeRange::Ternary {
            1
        } else {
            S::WEIGHT_OFFSET * i32::from(!s.has_matrix_unit())
        };
        let first = tokens.start;
        let mut sink = ScaleSums { matrix: self, tile, x, offset, first, epilogue };
        if s.has_matrix_unit() {
            s.multiply_panels(lines, &x.codes[first * x.blocks..], x.blocks, tokens.len(), &mut sink);
            return;
        }
        // Panel by panel; totals of all tokens of the pass are in memory between panels.
        let mut totals = [[s.splat(0); R]; TOKENS_PER_PASS];
        for start in (0..self.blocks).step_by(PANEL_BLOCKS / R) {
            let stop = self.blocks.min(start + PANEL_BLOCKS / R);
            for_each_token_group!(S, 0..tokens.len(), |token, T| {
                let codes = token_codes::<T>(x, first + token).map(|codes| &codes[start..stop]);
                let sums = self.sums(s, lines.map(|lines| &lines[start..stop]), codes);
                for t in 0..T {
                    for r in 0..R {
                        totals[token + t][r] = s.add(totals[token + t][r], sums[r][t]);
                    }
                }
            });
        }
        sink.take(s, 0, &totals[..tokens.len()]);
    }

    #[inline(always)]
    fn dot_f32<S: Simd, const T: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Activations,
        token: usize,
    ) -> [S::Float; T] {
        let floats = token_floats::<T>(x, token);
        let shift = i32::from(self.stored_offset());
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

/// A sink that corrects the sums of one or two tiles for the offset of the codes, scales them, and passes them to the
/// epilogue.
struct ScaleSums<'a, F> {
    matrix: &'a Int8TrainingMatrix,
    tile: usize,
    x: &'a Int8Activations,
    /// What is added to each code of the weights.
    offset: i32,
    /// The first token.
    first: usize,
    epilogue: &'a F,
}

impl<S: Simd, F: Epilogue, const R: usize> AccumulatorSink<S, R> for ScaleSums<'_, F> {
    #[inline(always)]
    fn take(&mut self, s: S, first: usize, sums: &[[S::Int; R]]) {
        let Self { matrix, tile, x, offset, .. } = *self;
        let scales: [_; R] = std::array::from_fn(|r| s.load_f32(&matrix.scales[tile + r]));
        for (t, sums) in sums.iter().enumerate() {
            let token = self.first + first + t;
            let offset = s.splat(-x.sum(token) * offset);
            for r in 0..R {
                let sum = s.to_float(s.add(sums[r], offset));
                self.epilogue.apply(s, tile + r, token, s.mul_f32(sum, scales[r]));
            }
        }
    }
}

impl Int8TrainingMatrix {
    /// What is added to a code to store it.
    #[inline(always)]
    fn stored_offset(&self) -> i8 {
        i8::from(self.range == CodeRange::Ternary)
    }

    /// What is added to each code in products by [`sums`](Self::sums).
    #[inline(always)]
    fn offset<S: Simd>(&self) -> i32 {
        if self.range == CodeRange::Ternary { 1 } else { S::WEIGHT_OFFSET }
    }

    /// Sums of the products of some blocks of `R` tiles with the codes of `T` tokens.
    #[inline(always)]
    fn sums<S: Simd, const T: usize, const R: usize>(
        &self,
        s: S,
        panels: [&[UnpackedBlock]; R],
        codes: [&[[i8; LANES]]; T],
    ) -> [[S::Int; T]; R] {
        if self.range == CodeRange::Ternary {
            return dot_unpacked(s, panels, codes);
        }
        let mut acc = [[s.splat(0); T]; R];
        for i in 0..panels[0].len() {
            for p in 0..4 {
                let mut w = [s.splat(0); R];
                for r in 0..R {
                    w[r] = s.load(&panels[r][i][p]);
                }
                for t in 0..T {
                    let x = splat_quad(s, &codes[t][i], p);
                    for r in 0..R {
                        acc[r][t] = s.dot_signed(acc[r][t], w[r], x);
                    }
                }
            }
        }
        acc
    }
}
