//! [`Matrix`]: packed weights in any format.
//!
//! This is the top of `matmul/`: `tile.rs` has the trait that all formats implement, `format/` has the formats, and this file
//! only selects one of them.

use super::{
    format::{F32Matrix, Int8Matrix, Int8TrainingMatrix, Q6Matrix, TernaryMatrix},
    tile::PackedFormat,
};

/// A matrix `[rows, cols]` of packed weights, in any format.
#[derive(Debug)]
#[non_exhaustive]
pub enum Matrix {
    /// 2 bits per weight.
    Ternary(TernaryMatrix),
    /// 6 bits per weight, with a factor per 16.
    Q6(Q6Matrix),
    /// 8 bits per weight.
    Int8(Int8Matrix),
    /// 8 bits per weight, packed anew at every training step.
    Int8Training(Int8TrainingMatrix),
    /// 32 bits per weight.
    F32(F32Matrix),
}

/// Evaluates `$body` with `$m` bound to the matrix of whichever format.
macro_rules! match_format {
    ($matrix:expr, $m:ident => $body:expr) => {
        match $matrix {
            $crate::matmul::Matrix::Ternary($m) => $body,
            $crate::matmul::Matrix::Q6($m) => $body,
            $crate::matmul::Matrix::Int8($m) => $body,
            $crate::matmul::Matrix::Int8Training($m) => $body,
            $crate::matmul::Matrix::F32($m) => $body,
        }
    };
}
pub(crate) use match_format;

impl Matrix {
    /// Rows: outputs of a linear layer.
    pub fn rows(&self) -> usize {
        match_format!(self, m => m.shape().0)
    }

    /// Columns: inputs of a linear layer.
    pub fn cols(&self) -> usize {
        match_format!(self, m => m.shape().1)
    }

    /// Whether the matrix is multiplied with int8 activations, if there are any: all formats except f32.
    pub fn is_integer(&self) -> bool {
        !matches!(self, Self::F32(_))
    }

    /// Dequantizes one row into `values`, as for a token embedding.
    ///
    /// # Shapes
    /// values `[cols]`
    ///
    /// # Panics
    /// When there is no such row, or `values` has another length.
    pub fn read_row(&self, row: usize, values: &mut [f32]) {
        assert!(row < self.rows(), "row {row} of {}", self.rows());
        assert_eq!(values.len(), self.cols(), "columns");
        match_format!(self, m => m.read_row(row, values));
    }
}

impl From<TernaryMatrix> for Matrix {
    fn from(matrix: TernaryMatrix) -> Self {
        Self::Ternary(matrix)
    }
}

impl From<Q6Matrix> for Matrix {
    fn from(matrix: Q6Matrix) -> Self {
        Self::Q6(matrix)
    }
}

impl From<Int8Matrix> for Matrix {
    fn from(matrix: Int8Matrix) -> Self {
        Self::Int8(matrix)
    }
}

impl From<Int8TrainingMatrix> for Matrix {
    fn from(matrix: Int8TrainingMatrix) -> Self {
        Self::Int8Training(matrix)
    }
}

impl From<F32Matrix> for Matrix {
    fn from(matrix: F32Matrix) -> Self {
        Self::F32(matrix)
    }
}
