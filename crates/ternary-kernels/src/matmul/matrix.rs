//! [`Matrix`]: weights in any of the packed forms.

use super::{
    format::{ByteMatrix, CodeMatrix, FloatMatrix, SixBitMatrix, TernaryMatrix},
    tile::Form,
};

/// A matrix `[rows, cols]` in any of the packed forms.
#[derive(Debug)]
#[non_exhaustive]
pub enum Matrix {
    Ternary(TernaryMatrix),
    SixBit(SixBitMatrix),
    Byte(ByteMatrix),
    Code(CodeMatrix),
    Float(FloatMatrix),
}

/// What is done with whichever form it is.
macro_rules! each_form {
    ($matrix:expr, $m:ident => $body:expr) => {
        match $matrix {
            $crate::matmul::Matrix::Ternary($m) => $body,
            $crate::matmul::Matrix::SixBit($m) => $body,
            $crate::matmul::Matrix::Byte($m) => $body,
            $crate::matmul::Matrix::Code($m) => $body,
            $crate::matmul::Matrix::Float($m) => $body,
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

impl From<CodeMatrix> for Matrix {
    fn from(matrix: CodeMatrix) -> Self {
        Self::Code(matrix)
    }
}

impl From<FloatMatrix> for Matrix {
    fn from(matrix: FloatMatrix) -> Self {
        Self::Float(matrix)
    }
}
