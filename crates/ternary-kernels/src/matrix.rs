//! [`Matrix`]: weights packed for the CPU.

use crate::Arena;
use half::f16;

/// A matrix `[rows, cols]` in any of the packed forms.
#[derive(Debug)]
#[non_exhaustive]
pub enum Matrix {
    Ternary(TernaryMatrix),
    Byte(ByteMatrix),
    Float(FloatMatrix),
}

impl Matrix {
    pub fn rows(&self) -> usize {
        match self {
            Self::Ternary(m) => m.rows,
            Self::Byte(m) => m.rows,
            Self::Float(m) => m.rows,
        }
    }

    pub fn cols(&self) -> usize {
        match self {
            Self::Ternary(m) => m.cols,
            Self::Byte(m) => m.cols,
            Self::Float(m) => m.cols,
        }
    }

    /// Whether products want int8 activations: see [`crate::Input`].
    pub fn is_integer(&self) -> bool {
        !matches!(self, Self::Float(_))
    }

    /// The values of a row, as for an embedding.
    pub fn read_row(&self, row: usize, values: &mut [f32]) {
        assert_eq!(values.len(), self.cols());
        match self {
            Self::Ternary(m) => {
                let groups = m.cols.div_ceil(m.group);
                for (col, value) in values.iter_mut().enumerate() {
                    *value = f32::from(m.codes[row * m.cols + col])
                        * m.scales[row * groups + col / m.group].to_f32();
                }
            }
            Self::Byte(m) => {
                let groups = m.cols.div_ceil(m.group);
                for (col, value) in values.iter_mut().enumerate() {
                    *value = f32::from(m.codes[row * m.cols + col]) * m.scales[row * groups + col / m.group];
                }
            }
            Self::Float(m) => values.copy_from_slice(&m.values[row * m.cols..][..m.cols]),
        }
    }
}

impl From<TernaryMatrix> for Matrix {
    fn from(matrix: TernaryMatrix) -> Self {
        Self::Ternary(matrix)
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

/// Codes -1, 0, +1 at two bits, with an f16 scale for each `group` consecutive columns of a row.
#[derive(Debug)]
pub struct TernaryMatrix {
    rows: usize,
    cols: usize,
    group: usize,
    codes: Vec<i8>,
    scales: Vec<f16>,
}

impl TernaryMatrix {
    /// Bytes that [`pack`](Self::pack) takes from its arena.
    pub fn bytes(rows: usize, cols: usize, group: usize) -> usize {
        rows.next_multiple_of(16) * (cols.next_multiple_of(16) / 4 + cols.div_ceil(group) * 2)
    }

    /// `read(row, codes, scales)` gives codes `[cols]` and scales `[cols / group, rounded up]` of each row in turn.
    ///
    /// # Panics
    /// When `group` is neither a multiple of 16 nor the whole row.
    pub fn pack(
        _arena: &mut Arena,
        rows: usize,
        cols: usize,
        group: usize,
        mut read: impl FnMut(usize, &mut [i8], &mut [f16]),
    ) -> Self {
        assert!(
            group == cols || group.is_multiple_of(16),
            "groups of {group} columns are not a multiple of 16"
        );
        let groups = cols.div_ceil(group);
        let (mut codes, mut scales) = (vec![0; rows * cols], vec![f16::ZERO; rows * groups]);
        for row in 0..rows {
            read(row, &mut codes[row * cols..][..cols], &mut scales[row * groups..][..groups]);
        }
        Self { rows, cols, group, codes, scales }
    }
}

/// Int8 codes with a scale for each `group` consecutive columns of a row.
#[derive(Debug)]
pub struct ByteMatrix {
    rows: usize,
    cols: usize,
    group: usize,
    codes: Vec<i8>,
    scales: Vec<f32>,
}

impl ByteMatrix {
    /// Bytes that [`pack`](Self::pack) takes from its arena.
    pub fn bytes(rows: usize, cols: usize, group: usize) -> usize {
        rows.next_multiple_of(16) * (cols.next_multiple_of(16) + cols.div_ceil(group) * 4)
    }

    /// `read(row, codes, scales)` gives codes `[cols]` and scales `[cols / group, rounded up]` of each row in turn.
    ///
    /// # Panics
    /// When `group` is neither a multiple of 16 nor the whole row.
    pub fn pack(
        _arena: &mut Arena,
        rows: usize,
        cols: usize,
        group: usize,
        mut read: impl FnMut(usize, &mut [i8], &mut [f32]),
    ) -> Self {
        assert!(
            group == cols || group.is_multiple_of(16),
            "groups of {group} columns are not a multiple of 16"
        );
        let groups = cols.div_ceil(group);
        let (mut codes, mut scales) = (vec![0; rows * cols], vec![0.0; rows * groups]);
        for row in 0..rows {
            read(row, &mut codes[row * cols..][..cols], &mut scales[row * groups..][..groups]);
        }
        Self { rows, cols, group, codes, scales }
    }
}

/// Float weights.
#[derive(Debug)]
pub struct FloatMatrix {
    rows: usize,
    cols: usize,
    values: Vec<f32>,
}

impl FloatMatrix {
    /// Bytes that [`pack`](Self::pack) takes from its arena.
    pub fn bytes(rows: usize, cols: usize) -> usize {
        rows.next_multiple_of(16) * cols.next_multiple_of(16) * 4
    }

    /// `read(row, values)` gives the values `[cols]` of each row in turn.
    pub fn pack(
        _arena: &mut Arena,
        rows: usize,
        cols: usize,
        mut read: impl FnMut(usize, &mut [f32]),
    ) -> Self {
        let mut values = vec![0.0; rows * cols];
        for (row, values) in values.chunks_exact_mut(cols).enumerate() {
            read(row, values);
        }
        Self { rows, cols, values }
    }
}
