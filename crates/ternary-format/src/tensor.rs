//! [`Tensor`]: bytes with a shape and an encoding, read row by row.

use half::f16;
use std::{ops::Range, sync::Arc};

/// Bytes that are owned, or part of a mapped file.
#[derive(Clone, Debug)]
pub struct Bytes {
    owner: Arc<dyn AsBytes>,
    range: Range<usize>,
}

trait AsBytes: std::fmt::Debug + Send + Sync {
    fn as_bytes(&self) -> &[u8];
}

impl AsBytes for Vec<u8> {
    fn as_bytes(&self) -> &[u8] {
        self
    }
}

impl AsBytes for memmap2::Mmap {
    fn as_bytes(&self) -> &[u8] {
        self
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { owner: Arc::new(bytes), range }
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.owner.as_bytes()[self.range.clone()]
    }
}

/// How the values of a tensor are stored; the GGML names are those of GGUF files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q4K,
    Q6K,
    /// Ternary: base 3, five codes a byte, 256 weights a scale.
    Tq1_0,
    /// Ternary: 2 bits a code, 256 weights a scale.
    Tq2_0,
    /// 2 bits a code, 64 weights a scale.
    Q2_0,
    /// Ternary, in memory only: all codes at 2 bits (code + 1, low bits first, each row padded to a byte), then all
    /// f16 scales, row by row, one for each `group` consecutive weights of a row (the whole row: `group == cols`).
    Ternary { group: usize },
}

/// A tensor of a model file. Matrices are `[out, in]`, row-major.
#[derive(Clone, Debug)]
pub struct Tensor {
    shape: Vec<usize>,
    encoding: Encoding,
    data: Bytes,
}

impl Tensor {
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// The stored bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.data
    }

    /// All dimensions but the last, multiplied.
    pub fn rows(&self) -> usize {
        self.shape[..self.shape.len() - 1].iter().product()
    }

    /// The last dimension: what is contiguous.
    pub fn cols(&self) -> usize {
        *self.shape.last().expect("a tensor has a dimension")
    }

    /// The values of a row.
    ///
    /// # Panics
    /// When `values` does not have one place a column.
    pub fn read_row(&self, _row: usize, _values: &mut [f32]) {
        todo!()
    }

    /// How many consecutive weights of a row share a stored scale; `None` where the encoding is not ternary.
    pub fn ternary_group(&self) -> Option<usize> {
        todo!()
    }

    /// Codes -1, 0, +1 and scales of a row of a ternary tensor.
    ///
    /// # Shapes
    /// codes `[cols]`, scales `[cols / group]`
    ///
    /// # Panics
    /// When the encoding is not ternary.
    pub fn read_ternary_row(&self, _row: usize, _codes: &mut [i8], _scales: &mut [f16]) {
        todo!()
    }
}
