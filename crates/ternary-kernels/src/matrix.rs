//! [`Matrix`]: weights packed for the CPU.
//!
//! All forms are cut into tiles of 16 rows. A cache line holds four bytes of each row of a tile, so that a line times
//! four broadcast activations adds to 16 results at once, and no sum runs across lanes. A tile is contiguous, column
//! block by column block; a product reads the matrix from its first byte to its last.

use crate::{
    Input, Quantized,
    byte::ByteMatrix,
    float::FloatMatrix,
    simd::{LANES, Simd},
    six_bit::SixBitMatrix,
    ternary::TernaryMatrix,
};

/// A matrix `[rows, cols]` in any of the packed forms.
#[derive(Debug)]
#[non_exhaustive]
pub enum Matrix {
    Ternary(TernaryMatrix),
    SixBit(SixBitMatrix),
    Byte(ByteMatrix),
    Float(FloatMatrix),
}

/// What is done with whichever form it is.
macro_rules! each_form {
    ($matrix:expr, $m:ident => $body:expr) => {
        match $matrix {
            $crate::Matrix::Ternary($m) => $body,
            $crate::Matrix::SixBit($m) => $body,
            $crate::Matrix::Byte($m) => $body,
            $crate::Matrix::Float($m) => $body,
        }
    };
}
pub(crate) use each_form;

impl Matrix {
    pub fn rows(&self) -> usize {
        each_form!(self, m => m.shape().0)
    }

    pub fn cols(&self) -> usize {
        each_form!(self, m => m.shape().1)
    }

    /// Whether products want int8 activations: see [`Input`].
    pub fn is_integer(&self) -> bool {
        !matches!(self, Self::Float(_))
    }

    /// The values of a row, as for an embedding.
    ///
    /// # Panics
    /// When there is no such row, or `values` does not have one place a column.
    pub fn read_row(&self, row: usize, values: &mut [f32]) {
        assert!(row < self.rows(), "row {row} of {}", self.rows());
        assert_eq!(values.len(), self.cols(), "columns");
        each_form!(self, m => m.read_row(row, values));
    }
}

impl From<TernaryMatrix> for Matrix {
    fn from(matrix: TernaryMatrix) -> Self {
        Self::Ternary(matrix)
    }
}

impl From<SixBitMatrix> for Matrix {
    fn from(matrix: SixBitMatrix) -> Self {
        Self::SixBit(matrix)
    }
}

impl From<ByteMatrix> for Matrix {
    fn from(matrix: ByteMatrix) -> Self {
        Self::Byte(matrix)
    }
}

impl From<FloatMatrix> for Matrix {
    fn from(matrix: FloatMatrix) -> Self {
        Self::Float(matrix)
    }
}

/// A packed form, and its products a tile at a time.
pub(crate) trait Form: Sync {
    const INTEGER: bool = true;

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
}

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

/// The codes of `T` tokens.
#[inline(always)]
pub(crate) fn token_codes<const T: usize>(x: &Quantized, token: usize) -> [&[[i8; LANES]]; T] {
    std::array::from_fn(|t| &x.codes[(token + t) * x.blocks..][..x.blocks])
}

/// The running sums of the codes of `T` tokens.
#[inline(always)]
pub(crate) fn token_sums<const T: usize>(x: &Quantized, token: usize) -> [&[i32]; T] {
    std::array::from_fn(|t| &x.sums[(token + t) * (x.blocks + 1)..][..x.blocks + 1])
}

/// The floats of `T` tokens.
#[inline(always)]
pub(crate) fn token_floats<'a, const T: usize>(x: &Input<'a>, token: usize) -> [&'a [f32]; T] {
    std::array::from_fn(|t| &x.floats[(token + t) * x.cols..][..x.cols])
}
