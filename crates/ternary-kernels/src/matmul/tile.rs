//! Tiles of packed weights: the trait [`PackedFormat`] that every format implements, and the loops over tiles and tokens.
//!
//! # Tiles
//! A matrix `[rows, cols]` is cut into tiles of 16 rows and, within a tile, blocks of 16 columns. Tiles are contiguous,
//! and so are the blocks of a tile, so that a product reads the matrix from its first byte to its last:
//!
//! ```text
//!              cols
//!        +----+----+----+-- -+
//!   16   | b0 | b1 | b2 | .. |  tile 0      memory:  tile 0: b0 b1 b2 ..  tile 1: b0 b1 b2 ..
//!   rows +----+----+----+-- -+
//!        | b0 | b1 | b2 | .. |  tile 1      the last tile and the last block are padded
//!        +----+----+----+-- -+
//! ```
//!
//! A cache line holds four bytes of each of the 16 rows. Multiplied with four activations that are broadcast to all
//! lanes, it adds to 16 results at once, and no sum has to be taken across lanes.
//!
//! # The product
//! ```text
//! multiply:   for each task (some tiles of a matrix), in parallel:                          multiply.rs
//!               for each pass of 64 tokens:
//! multiply_tiles        for each group of tiles that fits the registers (or the matrix unit):
//! multiply_tile_group     for each group of tokens that fits the registers (8, 4, 2, 1):
//! dot_int8 / dot_f32        for each block of columns: accumulate
//!                         epilogue: scale of the token, bias, addition to the output, store
//! ```
//!
//! A format must provide `dot_int8` and `dot_f32`. It may override `multiply_tile_group` or `multiply_tiles`, where it is
//! worthwhile to unpack weights once for many tokens, or to use the matrix unit.
//!
//! # Which path
//! | format | tokens | CPU | path |
//! |---|---|---|---|
//! | ternary | 1-3 (1-16 without AMX) | any | `dot_int8`: 2-bit planes, unpacked in registers for each group of tokens |
//! | ternary | 4-16, whole steps of 4 blocks | AMX | [`TileAccumulators`]: four tiles at a time, unpacked one step ahead |
//! | ternary | 4-8, otherwise | AMX | `dot_int8` |
//! | ternary | 17 or more (9 or more with AMX) | any | panels: 1,024 columns unpacked once into the first-level cache |
//! | int8 | 4-16, whole steps of 4 or 2 blocks | AMX | [`TileAccumulators`], of the weights as they are |
//! | int8, 6-bit | all others | any | `dot_int8` |
//! | int8 for training | any | AMX | `multiply_panels` over all columns |
//! | int8 for training | any | others | panels of 1,024 columns |
//! | f32, and all formats with f32 activations | any | any | `dot_f32` |

use super::activations::{Activations, Int8Activations};
use crate::simd::{CacheLine, LANES, Simd, UNIT_TILES, UnpackedBlock};
use std::ops::{Range, RangeInclusive};

/// A packed format of weights, and its products one tile at a time.
pub(crate) trait PackedFormat: Sync {
    /// Whether the weights are integers, so that they can be multiplied with int8 activations.
    const INT8: bool = true;
    /// Bytes of weights per task. They stay in the second-level cache while all tokens pass.
    const TASK_BYTES: usize = 64 << 10;

    /// Rows and columns.
    fn shape(&self) -> (usize, usize);

    /// Bytes of the codes of one tile.
    fn tile_bytes(&self) -> usize;

    /// Dequantizes one row into `values`, `[cols]`.
    fn read_row(&self, row: usize, values: &mut [f32]);

    /// Products of the 16 rows of a tile with the int8 codes of tokens `token..token + T`, times the scales of the
    /// weights, but not yet times those of the tokens.
    fn dot_int8<S: Simd, const T: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Int8Activations,
        token: usize,
    ) -> [S::Float; T];

    /// Products of the 16 rows of a tile with the float activations of tokens `token..token + T`.
    fn dot_f32<S: Simd, const T: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Activations,
        token: usize,
    ) -> [S::Float; T];

    /// Tokens per pass over the weights of a task.
    #[inline(always)]
    fn tokens_per_pass<S: Simd>(&self, _: S) -> usize {
        TOKENS_PER_PASS
    }

    /// The int8 products of some tiles, for at most [`tokens_per_pass`](Self::tokens_per_pass) tokens.
    #[inline(always)]
    fn multiply_tiles<S: Simd>(
        &self,
        s: S,
        tiles: Range<usize>,
        x: &Int8Activations,
        tokens: Range<usize>,
        epilogue: &impl Epilogue,
    ) {
        multiply_tile_groups(self, s, tiles, x, tokens, epilogue);
    }

    /// The int8 products of the tiles `tile..tile + R`, which have their sums in registers together.
    #[inline(always)]
    fn multiply_tile_group<S: Simd, const R: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Int8Activations,
        tokens: Range<usize>,
        epilogue: &impl Epilogue,
    ) {
        multiply_in_registers(self, s, tile..tile + R, x, tokens, epilogue);
    }
}

/// Calls `multiply_tile_group` for as many tiles at a time as the registers hold.
#[inline(always)]
pub(crate) fn multiply_tile_groups<S: Simd, F: PackedFormat + ?Sized>(
    format: &F,
    s: S,
    tiles: Range<usize>,
    x: &Int8Activations,
    tokens: Range<usize>,
    epilogue: &impl Epilogue,
) {
    let Range { start: mut tile, end } = tiles;
    while S::REGISTER_TILES == 2 && end - tile >= 2 {
        format.multiply_tile_group::<S, 2>(s, tile, x, tokens.clone(), epilogue);
        tile += 2;
    }
    for tile in tile..end {
        format.multiply_tile_group::<S, 1>(s, tile, x, tokens.clone(), epilogue);
    }
}

/// Token counts for which the matrix unit is used step by step: for fewer it is not worth its configuration, and it has
/// no room for more.
pub(crate) const UNIT_TOKENS: RangeInclusive<usize> = 4..=LANES;

/// The matrix unit for `tokens` tokens and steps of `STEP_BLOCKS` blocks. `None` if the CPU has none, if the token count
/// is not in [`UNIT_TOKENS`], or if the row or its scale groups are not whole steps.
#[inline(always)]
pub(crate) fn matrix_unit<S: Simd, const STEP_BLOCKS: usize>(
    s: S,
    tokens: usize,
    blocks: usize,
    group: usize,
) -> Option<S::MatrixUnit> {
    let fits = group.is_multiple_of(STEP_BLOCKS) && blocks.is_multiple_of(STEP_BLOCKS);
    if fits && UNIT_TOKENS.contains(&tokens) { s.matrix_unit(tokens, STEP_BLOCKS) } else { None }
}

/// Prefetch offset, in cache lines, from line `at` of a tile to the line that is used `distance` lines later.
///
/// The matrix unit reads [`UNIT_TILES`] tiles of `lines` lines each side by side. Past the end of a tile, the offset
/// therefore skips the sibling tiles, which are being read already.
#[inline(always)]
pub(crate) fn prefetch_offset(at: usize, lines: usize, distance: usize) -> usize {
    if at + distance < lines { distance } else { distance + (UNIT_TILES - 1) * lines }
}

/// Results of [`UNIT_TILES`] tiles and up to 16 tokens, which collect the sums of the matrix unit group by group.
pub(crate) struct TileAccumulators<S: Simd> {
    tokens: usize,
    /// Sums of the current scale group, as [`MatrixUnit::store`](crate::simd::MatrixUnit::store) writes them:
    /// `[tiles, tokens, rows]`.
    pub sums: [[CacheLine; LANES]; UNIT_TILES],
    /// Sums times scales of the groups so far: `[tiles, tokens]`, 16 rows each.
    results: [[S::Float; LANES]; UNIT_TILES],
    /// Added to the sums of each token: corrects for codes that are stored with an offset.
    pub offsets: [i32; LANES],
}

impl<S: Simd> TileAccumulators<S> {
    /// Accumulators for `tokens` tokens, all zero.
    #[inline(always)]
    pub fn new(s: S, tokens: usize) -> Self {
        Self {
            tokens,
            sums: [[CacheLine([0; 64]); LANES]; UNIT_TILES],
            results: [[s.splat_f32(0.0); LANES]; UNIT_TILES],
            offsets: [0; LANES],
        }
    }

    /// Adds the sums of tile `r`, times the scale of their group, to its results; `begin` starts from zero.
    #[inline(always)]
    pub fn scale(&mut self, s: S, r: usize, scale: S::Float, begin: bool) {
        let offsets = &self.offsets[..self.tokens];
        for ((result, sum), offset) in self.results[r].iter_mut().zip(&self.sums[r]).zip(offsets) {
            let sum = s.to_float(s.add(s.load(sum), s.splat(*offset)));
            let before = if begin { s.splat_f32(0.0) } else { *result };
            *result = s.fma(sum, scale, before);
        }
    }

    /// Passes the results to the epilogue, as those of the tiles from `tile` on.
    #[inline(always)]
    pub fn write(&self, s: S, tile: usize, tokens: Range<usize>, epilogue: &impl Epilogue) {
        // Token by token: the four lines of a token are neighbours in the output.
        for (t, token) in tokens.enumerate() {
            for r in 0..UNIT_TILES {
                epilogue.apply(s, tile + r, token, self.results[r][t]);
            }
        }
    }
}

/// Calls `dot_int8` for as many tokens at a time as the registers hold.
#[inline(always)]
pub(crate) fn multiply_in_registers<S: Simd, F: PackedFormat + ?Sized>(
    format: &F,
    s: S,
    tiles: Range<usize>,
    x: &Int8Activations,
    tokens: Range<usize>,
    epilogue: &impl Epilogue,
) {
    for tile in tiles {
        for_each_token_group!(S, tokens.clone(), |token, T| {
            let sums = format.dot_int8::<S, T>(s, tile, x, token);
            for t in 0..T {
                epilogue.apply(s, tile, token + t, sums[t]);
            }
        });
    }
}

/// What is done with the sums of a tile before they are stored. (A trait and not a closure, so that it is inlined for
/// certain.)
pub(crate) trait Epilogue {
    /// Takes the sums of the 16 rows of `tile` for `token`.
    fn apply<S: Simd>(&self, s: S, tile: usize, token: usize, sums: S::Float);
}

/// Tokens per pass over the weights, unless a format overrides it: their codes stay in the second-level cache.
pub(crate) const TOKENS_PER_PASS: usize = 64;

/// Runs `body` for groups of tokens, as many at a time as the registers hold: `T` tokens from `token` on, where `T` is a
/// constant of 8, 4, 2 or 1.
macro_rules! for_each_token_group {
    ($S:ident, $tokens:expr, |$token:ident, $T:ident| $body:expr) => {{
        let std::ops::Range { start: mut $token, end } = $tokens;
        while $S::REGISTER_TOKENS >= 8 && end - $token >= 8 {
            const $T: usize = 8;
            $body;
            $token += $T;
        }
        while end - $token >= 4 {
            const $T: usize = 4;
            $body;
            $token += $T;
        }
        if end - $token >= 2 {
            const $T: usize = 2;
            $body;
            $token += $T;
        }
        if $token < end {
            const $T: usize = 1;
            $body;
        }
    }};
}
pub(crate) use for_each_token_group;

/// Tiles of a matrix of `rows` rows.
pub(crate) fn tile_count(rows: usize) -> usize {
    rows.div_ceil(LANES)
}

/// Blocks of columns per scale group.
///
/// # Panics
/// When a group is neither a whole number of blocks nor the whole row.
pub(crate) fn group_blocks(cols: usize, group: usize) -> usize {
    assert!(
        group == cols || group > 0 && group.is_multiple_of(LANES),
        "groups of {group} columns are neither a multiple of {LANES} nor the whole row of {cols}"
    );
    group.div_ceil(LANES)
}

/// The range of each slice. (Not by `map`, which is not always inlined.)
#[inline(always)]
pub(crate) fn slice_each<T, const N: usize>(mut slices: [&[T]; N], range: Range<usize>) -> [&[T]; N] {
    for slice in &mut slices {
        *slice = &slice[range.clone()];
    }
    slices
}

/// The int8 codes of `T` tokens, `[blocks]` each.
#[inline(always)]
pub(crate) fn token_codes<const T: usize>(x: &Int8Activations, token: usize) -> [&[[i8; LANES]]; T] {
    std::array::from_fn(|t| &x.codes[(token + t) * x.blocks..][..x.blocks])
}

/// Prefix sums of the codes of `T` tokens: see [`Int8Activations::sums`].
#[inline(always)]
pub(crate) fn token_sums<const T: usize>(x: &Int8Activations, token: usize) -> [&[i32]; T] {
    std::array::from_fn(|t| x.sums(token + t))
}

/// Corrections for 6-bit codes, for each block of `T` tokens: see [`Int8Activations::offsets`].
#[inline(always)]
pub(crate) fn token_offsets<const T: usize>(x: &Int8Activations, token: usize) -> [&[i32]; T] {
    std::array::from_fn(|t| x.offsets(token + t))
}

/// The float activations of `T` tokens, `[cols]` each.
#[inline(always)]
pub(crate) fn token_floats<'a, const T: usize>(x: &Activations<'a>, token: usize) -> [&'a [f32]; T] {
    std::array::from_fn(|t| &x.floats[(token + t) * x.cols..][..x.cols])
}

/// The activations of columns `4p..4p + 4` of a block, in every lane.
#[inline(always)]
pub(crate) fn splat_quad<S: Simd>(s: S, block: &[i8; LANES], p: usize) -> S::Int {
    s.splat4(block.as_chunks::<4>().0[p])
}

/// Blocks of a panel of unpacked weights: 1,024 columns of one tile are 16 KiB, half of a first-level cache of 32 KiB.
pub(crate) const PANEL_BLOCKS: usize = 64;

/// Blocks that can be added to a sum of ternary products before it must be widened.
///
/// With `planes` sums, a block adds the products of `4 / planes` bit planes to each. A plane's products are at most
/// `2 * 4^(planes - 1) * 127`; two of them are added to a 16-bit sum, four to a 32-bit sum.
pub(crate) const fn max_blocks_per_sum<S: Simd>(planes: usize) -> usize {
    let (largest, terms) = if S::I16_SUMS { (i16::MAX as usize, 2) } else { (i32::MAX as usize, 4) };
    largest / (terms * 254 * (1 << (2 * (planes - 1))) * (4 / planes))
}

/// Sums of the products of `R` panels of unpacked ternary weights with the codes of `T` tokens. Panels have one length.
#[inline(always)]
pub(crate) fn dot_unpacked<S: Simd, const T: usize, const R: usize>(
    s: S,
    panels: [&[UnpackedBlock]; R],
    codes: [&[[i8; LANES]]; T],
) -> [[S::Int; T]; R] {
    let mut totals = [[s.splat(0); T]; R];
    let (mut start, blocks) = (0, panels[0].len());
    while start < blocks {
        let stop = blocks.min(start.saturating_add(max_blocks_per_sum::<S>(1)));
        let panels = slice_each(panels, start..stop);
        let codes = slice_each(codes, start..stop);
        // The inner loop: R lines of weights and T broadcast quads serve R x T dot products.
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
                        acc[r][t] = s.dot(acc[r][t], w[r], x);
                    }
                }
            }
        }
        for r in 0..R {
            for t in 0..T {
                totals[r][t] = s.add(totals[r][t], s.widen(acc[r][t]));
            }
        }
        start = stop;
    }
    totals
}
