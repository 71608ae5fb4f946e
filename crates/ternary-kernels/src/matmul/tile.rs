//! Tiles of packed weights, the trait that every packed form implements, and the loops over tiles and tokens.
//!
//! All forms are cut into tiles of 16 rows. A cache line holds four bytes of each row of a tile, so that a line times
//! four broadcast activations adds to 16 results at once, and no sum runs across lanes. A tile is contiguous, column
//! block by column block; a product reads the matrix from its first byte to its last.

use super::activations::{Input, Quantized};
use crate::simd::{LANES, Line, PANELS, Planes, Simd};
use std::ops::{Range, RangeInclusive};

/// A packed form, and its products a tile at a time.
pub(crate) trait Form: Sync {
    const INTEGER: bool = true;
    /// Weights of a task stay in the second-level cache while the tokens pass.
    const TASK_BYTES: usize = 64 << 10;

    fn shape(&self) -> (usize, usize);

    /// Bytes that a tile reads.
    fn tile_bytes(&self) -> usize;

    fn read_row(&self, row: usize, values: &mut [f32]);

    /// Products of the 16 rows of a tile with the int8 codes of tokens `token..token + T`, not yet times their scales.
    fn integer<S: Simd, const T: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Quantized,
        token: usize,
    ) -> [S::Float; T];

    /// The same with the float activations.
    fn exact<S: Simd, const T: usize>(&self, s: S, tile: usize, x: &Input, token: usize) -> [S::Float; T];

    /// Tokens that pass a task's weights together.
    #[inline(always)]
    fn tokens<S: Simd>(&self, _: S) -> usize {
        TOKENS
    }

    /// `integer` of some tiles for at most that many tokens.
    #[inline(always)]
    fn integer_tiles<S: Simd>(
        &self,
        s: S,
        tiles: Range<usize>,
        x: &Quantized,
        tokens: Range<usize>,
        finish: &impl Finish,
    ) {
        integer_by_tiles(self, s, tiles, x, tokens, finish);
    }

    /// The same of the tiles `tile..tile + R`.
    #[inline(always)]
    fn integer_tokens<S: Simd, const R: usize>(
        &self,
        s: S,
        tile: usize,
        x: &Quantized,
        tokens: Range<usize>,
        finish: &impl Finish,
    ) {
        integer_in_registers(self, s, tile..tile + R, x, tokens, finish);
    }
}

/// `integer_tokens` of as many tiles at a time as the registers hold.
#[inline(always)]
pub(crate) fn integer_by_tiles<S: Simd, F: Form + ?Sized>(
    form: &F,
    s: S,
    tiles: Range<usize>,
    x: &Quantized,
    tokens: Range<usize>,
    finish: &impl Finish,
) {
    let Range { start: mut tile, end } = tiles;
    while S::TILES == 2 && end - tile >= 2 {
        form.integer_tokens::<S, 2>(s, tile, x, tokens.clone(), finish);
        tile += 2;
    }
    for tile in tile..end {
        form.integer_tokens::<S, 1>(s, tile, x, tokens.clone(), finish);
    }
}

/// Tokens for which a unit is worth its making, and that it holds.
pub(crate) const UNIT_TOKENS: RangeInclusive<usize> = 4..=LANES;

/// The unit for so many tokens and `STEP` blocks at a time, where there is one and the groups are made of such steps.
#[inline(always)]
pub(crate) fn unit<S: Simd, const STEP: usize>(
    s: S,
    tokens: usize,
    blocks: usize,
    group: usize,
) -> Option<S::Unit> {
    let fits = group.is_multiple_of(STEP) && blocks.is_multiple_of(STEP);
    if fits && UNIT_TOKENS.contains(&tokens) { s.unit(tokens, STEP) } else { None }
}

/// So many lines lie between line `at` of each tile that a unit multiplies and what it multiplies `distance` later, where a
/// tile has `lines`: behind the end of a tile come those of the tiles beside it, which are read already.
#[inline(always)]
pub(crate) fn ahead(at: usize, lines: usize, distance: usize) -> usize {
    if at + distance < lines { distance } else { distance + (PANELS - 1) * lines }
}

/// What becomes of the sums that a unit holds, of some tokens.
pub(crate) struct Held<S: Simd> {
    tokens: usize,
    pub sums: [[Line; LANES]; PANELS],
    results: [[S::Float; LANES]; PANELS],
    /// Added to the sums of each token.
    pub offsets: [i32; LANES],
}

impl<S: Simd> Held<S> {
    #[inline(always)]
    pub fn new(s: S, tokens: usize) -> Self {
        Self {
            tokens,
            sums: [[Line([0; 64]); LANES]; PANELS],
            results: [[s.splat_f32(0.0); LANES]; PANELS],
            offsets: [0; LANES],
        }
    }

    /// Adds the sums of tile `r`, times the scale of their group, to its results, or begins these.
    #[inline(always)]
    pub fn scale(&mut self, s: S, r: usize, scale: S::Float, begin: bool) {
        let offsets = &self.offsets[..self.tokens];
        for ((result, sum), offset) in self.results[r].iter_mut().zip(&self.sums[r]).zip(offsets) {
            let sum = s.to_float(s.add(s.load(sum), s.splat(*offset)));
            let before = if begin { s.splat_f32(0.0) } else { *result };
            *result = s.fma(sum, scale, before);
        }
    }

    /// Gives the results of the tiles from `tile` on away.
    #[inline(always)]
    pub fn finish(&self, s: S, tile: usize, tokens: Range<usize>, finish: &impl Finish) {
        // The lines of a token lie side by side.
        for (t, token) in tokens.enumerate() {
            for r in 0..PANELS {
                finish.finish(s, tile + r, token, self.results[r][t]);
            }
        }
    }
}

/// `integer` for as many tokens at a time as the registers hold.
#[inline(always)]
pub(crate) fn integer_in_registers<S: Simd, F: Form + ?Sized>(
    form: &F,
    s: S,
    tiles: Range<usize>,
    x: &Quantized,
    tokens: Range<usize>,
    finish: &impl Finish,
) {
    for tile in tiles {
        by_tokens!(S, tokens.clone(), |token, T| {
            let sums = form.integer::<S, T>(s, tile, x, token);
            for t in 0..T {
                finish.finish(s, tile, token + t, sums[t]);
            }
        });
    }
}

/// Where products go. (Not a closure: those cannot be made to be inlined, and would lose the instructions.)
pub(crate) trait Finish {
    fn finish<S: Simd>(&self, s: S, tile: usize, token: usize, sums: S::Float);
}

/// Tokens that pass weights together, where nothing else is said: their codes stay in the second-level cache.
pub(crate) const TOKENS: usize = 64;

/// `body` for the tokens of a range, as many at a time as the registers hold: `T` from `token` on.
macro_rules! by_tokens {
    ($S:ident, $tokens:expr, |$token:ident, $T:ident| $body:expr) => {{
        let std::ops::Range { start: mut $token, end } = $tokens;
        while $S::TOKENS >= 8 && end - $token >= 8 {
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
pub(crate) use by_tokens;

pub(crate) fn tiles(rows: usize) -> usize {
    rows.div_ceil(LANES)
}

/// Blocks of columns that share a scale.
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

/// `range` of each. (Not `map`: that is not always inlined, and would lose the instructions.)
#[inline(always)]
pub(crate) fn parts<T, const N: usize>(mut slices: [&[T]; N], range: Range<usize>) -> [&[T]; N] {
    for slice in &mut slices {
        *slice = &slice[range.clone()];
    }
    slices
}

/// The codes of `T` tokens.
#[inline(always)]
pub(crate) fn token_codes<const T: usize>(x: &Quantized, token: usize) -> [&[[i8; LANES]]; T] {
    std::array::from_fn(|t| &x.codes[(token + t) * x.blocks..][..x.blocks])
}

/// The running sums of the codes of `T` tokens.
#[inline(always)]
pub(crate) fn token_sums<const T: usize>(x: &Quantized, token: usize) -> [&[i32]; T] {
    std::array::from_fn(|t| x.sums(token + t))
}

/// What six-bit codes have too much in each block of `T` tokens.
#[inline(always)]
pub(crate) fn token_offsets<const T: usize>(x: &Quantized, token: usize) -> [&[i32]; T] {
    std::array::from_fn(|t| x.offsets(token + t))
}

/// The floats of `T` tokens.
#[inline(always)]
pub(crate) fn token_floats<'a, const T: usize>(x: &Input<'a>, token: usize) -> [&'a [f32]; T] {
    std::array::from_fn(|t| &x.floats[(token + t) * x.cols..][..x.cols])
}

/// Activations of columns `4p..4p + 4` of a block.
#[inline(always)]
pub(crate) fn four<S: Simd>(s: S, block: &[i8; LANES], p: usize) -> S::Int {
    s.splat4(block.as_chunks::<4>().0[p])
}

/// Blocks of a panel: 1,024 columns, 16 KiB, half of the first-level cache.
pub(crate) const PANEL: usize = 64;

/// Blocks that a sum of `planes` holds. For each of the `4 / planes` planes that share it, a block adds products of at most
/// `2 * 4^(planes - 1) * 127`: a pair of them to a sum of 16 bits, four to one of 32.
pub(crate) const fn limit<S: Simd>(planes: usize) -> usize {
    let (largest, terms) = if S::NARROW { (i16::MAX as usize, 2) } else { (i32::MAX as usize, 4) };
    largest / (terms * 254 * (1 << (2 * (planes - 1))) * (4 / planes))
}

/// Sums of the products of each of `R` panels, of equal length, with the codes of `T` tokens.
#[inline(always)]
pub(crate) fn panel_sums<S: Simd, const T: usize, const R: usize>(
    s: S,
    panels: [&[Planes]; R],
    codes: [&[[i8; LANES]]; T],
) -> [[S::Int; T]; R] {
    let mut totals = [[s.splat(0); T]; R];
    let (mut start, blocks) = (0, panels[0].len());
    while start < blocks {
        let stop = blocks.min(start.saturating_add(limit::<S>(1)));
        let panels = parts(panels, start..stop);
        let codes = parts(codes, start..stop);
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
