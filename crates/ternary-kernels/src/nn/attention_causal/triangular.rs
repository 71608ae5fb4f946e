//! Products of matrices of which one triangle is zero or not needed.
//!
//! # Micro-kernel
//! ```text
//!           k                         C vectors of 16 columns
//!         +--------------------+     +------------------------+
//! 4 rows  | left[row + r, k]   |  x  | right[k, col + 0..16 C]|    =    sums[4][C], in registers
//!         +--------------------+     +------------------------+
//!
//! for k in range:
//!     load C vectors of right[k]
//!     for r in 0..4:  broadcast left[row + r, k];  C fused multiply-adds
//! store the 4 x C vectors, or add them to those of `out`
//! ```
//!
//! A vector of 16 floats takes one register of AVX-512, two of AVX2 and four of NEON:
//!
//! | CPU | C | registers for sums, of all |
//! |---|---|---|
//! | AVX-512 | 2 | 8 of 32 |
//! | AVX2 | 1 | 8 of 16 |
//! | NEON | 1 | 16 of 32 |
//!
//! # Triangles
//! Only the ranges differ between the three products (drawn with steps of 2 rows and 2 columns instead of 4 and 16):
//!
//! ```text
//! multiply_visible              multiply_lower                add_upper
//! out[row, cols]                left[row, k]                  left[row, k], the transpose of a lower triangle
//!   # # . . . . .                 # . . . . . .                 # # # # # # #
//!   # # . . . . .                 # # . . . . .                 . # # # # # #
//!   # # # # . . .                 # # # . . . .                 . . # # # # #
//!   # # # # . . .                 # # # # . . .                 . . . # # # #
//!   cols 0..row + 4, in vectors   k in 0..row + 4               k in row..seq
//! ```
//!
//! A range that is rounded up reads zeros (`multiply_lower`, `add_upper`) or writes scores that the caller clears
//! (`multiply_visible`). The transpose of a lower triangle is read in place: a column of it is four neighbours in memory
//! ([`TransposedFactor`]).

use super::padded_matrix::PaddedMatrix;
use crate::simd::{LANES, Simd};
use std::ops::Range;

/// Rows of a product that are computed together.
pub(super) const ROWS: usize = 4;

/// The left factor of a product.
pub(super) trait LeftFactor {
    /// Four numbers of a column: rows `row..row + 4` of column `k`.
    fn column(&self, row: usize, k: usize) -> [f32; ROWS];
}

/// A matrix as it is.
pub(super) struct RowFactor<'a>(pub &'a PaddedMatrix);
/// The transpose of a matrix.
pub(super) struct TransposedFactor<'a>(pub &'a PaddedMatrix);

impl LeftFactor for RowFactor<'_> {
    #[inline(always)]
    fn column(&self, row: usize, k: usize) -> [f32; ROWS] {
        std::array::from_fn(|r| self.0.numbers[(row + r) * self.0.stride + k])
    }
}

impl LeftFactor for TransposedFactor<'_> {
    #[inline(always)]
    fn column(&self, row: usize, k: usize) -> [f32; ROWS] {
        std::array::from_fn(|r| self.0.numbers[k * self.0.stride + row + r])
    }
}

/// Vectors of columns that are computed together, if the registers have room for their sums: each number of the left factor is
/// then broadcast once for all of them.
const COL_VECTORS: usize = 2;

/// `out[row.., cols] = sum over k of left[row.., k] right[k, cols]`, for four rows and whole vectors of columns. With `ADD`, it is
/// added to `out`.
#[inline(always)]
fn multiply_rows<S: Simd, const ADD: bool>(
    s: S,
    left: &impl LeftFactor,
    right: &PaddedMatrix,
    k: Range<usize>,
    row: usize,
    cols: Range<usize>,
    out: &mut PaddedMatrix,
) {
    let Range { start: mut col, end } = cols;
    while S::REGISTER_TOKENS >= 8 && end - col >= COL_VECTORS * LANES {
        multiply_block::<S, COL_VECTORS, ADD>(s, left, right, k.clone(), [row, col], out);
        col += COL_VECTORS * LANES;
    }
    while col < end {
        multiply_block::<S, 1, ADD>(s, left, right, k.clone(), [row, col], out);
        col += LANES;
    }
}

/// The micro-kernel of [`multiply_rows`]: four rows and `C` vectors of columns.
#[inline(always)]
fn multiply_block<S: Simd, const C: usize, const ADD: bool>(
    s: S,
    left: &impl LeftFactor,
    right: &PaddedMatrix,
    k: Range<usize>,
    [row, col]: [usize; 2],
    out: &mut PaddedMatrix,
) {
    let mut sums = [[s.splat_f32(0.0); C]; ROWS];
    for k in k {
        let (vectors, _) = right.numbers[k * right.stride + col..][..C * LANES].as_chunks::<LANES>();
        let left = left.column(row, k);
        for r in 0..ROWS {
            let left = s.splat_f32(left[r]);
            for c in 0..C {
                sums[r][c] = s.fma(left, s.load_f32(&vectors[c]), sums[r][c]);
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        let (vectors, _) = out.numbers[(row + r) * out.stride + col..][..C * LANES].as_chunks_mut::<LANES>();
        for (sum, out) in sums.into_iter().zip(vectors) {
            s.store_f32(if ADD { s.add_f32(s.load_f32(out), sum) } else { sum }, out);
        }
    }
}

/// `out = left right`, where row `i` of `left` is zero from column `i + 1` on.
#[inline(always)]
pub(super) fn multiply_lower<S: Simd>(
    s: S,
    left: &impl LeftFactor,
    right: &PaddedMatrix,
    seq: usize,
    out: &mut PaddedMatrix,
) {
    for row in (0..seq).step_by(ROWS) {
        multiply_rows::<S, false>(s, left, right, 0..(row + ROWS).min(seq), row, 0..out.stride, out);
    }
}

/// `out += left right`, where row `i` of `left` is zero before column `i`.
#[inline(always)]
pub(super) fn add_upper<S: Simd>(
    s: S,
    left: &impl LeftFactor,
    right: &PaddedMatrix,
    seq: usize,
    out: &mut PaddedMatrix,
) {
    for row in (0..seq).step_by(ROWS) {
        multiply_rows::<S, true>(s, left, right, row..seq, row, 0..out.stride, out);
    }
}

/// The columns of `out = left right` that a position may see: those up to its row.
#[inline(always)]
pub(super) fn multiply_visible<S: Simd>(
    s: S,
    left: &PaddedMatrix,
    right: &PaddedMatrix,
    width: usize,
    seq: usize,
    out: &mut PaddedMatrix,
) {
    for row in (0..seq).step_by(ROWS) {
        let seen = (row + ROWS).min(out.stride).next_multiple_of(LANES);
        multiply_rows::<S, false>(s, &RowFactor(left), right, 0..width, row, 0..seen, out);
    }
}
