//! [`Tensor`]: bytes with a shape and an encoding. Rows are decoded one at a time.

mod bytes;
mod encode;

use crate::{Encoding, FormatError, block, rotary::interleaved_row, ternary};
pub use bytes::Bytes;
use half::{bf16, f16};
use std::ops::Range;

/// Exponent bits of an f16. All are set in NaN and infinity only.
const F16_EXPONENT: u16 = 0x7c00;

/// A tensor of a model file. Matrices are `[out, in]`, row-major.
#[derive(Clone, Debug)]
pub struct Tensor {
    shape: Vec<usize>,
    encoding: Encoding,
    data: Bytes,
}

impl Tensor {
    /// Creates a tensor from its stored bytes.
    ///
    /// # Errors
    /// `Shape`, `RowLength`, `TensorBytes`: bytes and shape do not match. `NotACode`: a 2-bit code that is not
    /// ternary.
    pub fn new(shape: Vec<usize>, encoding: Encoding, bytes: impl Into<Bytes>) -> Result<Self, FormatError> {
        let data = bytes.into();
        let expected = encoding.bytes(&shape)?;
        if data.len() != expected {
            return Err(FormatError::TensorBytes { encoding, shape, expected, found: data.len() });
        }
        let tensor = Self { shape, encoding, data };
        if encoding.is_ternary() && encoding != Encoding::Tq1_0 {
            let row = (0..tensor.rows()).find(|&row| !tensor.holds_codes(row));
            row.map_or(Ok(()), |row| Err(FormatError::NotACode { encoding, row }))?;
        }
        Ok(tensor)
    }

    /// Creates an F32 tensor.
    ///
    /// # Errors
    /// `Shape`, `TensorBytes`: the number of values does not match the shape.
    pub fn f32(shape: &[usize], values: &[f32]) -> Result<Self, FormatError> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::new(shape.into(), Encoding::F32, bytes)
    }

    /// Creates an F16 tensor.
    ///
    /// # Errors
    /// As [`f32`](Self::f32).
    pub fn f16(shape: &[usize], values: &[f16]) -> Result<Self, FormatError> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::new(shape.into(), Encoding::F16, bytes)
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Storage type of the values.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// The stored bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.data
    }

    /// Lets the system drop the pages of a memory-mapped tensor, for example after its weights were copied. They are
    /// read from the file again on the next access. Owned tensors are unaffected.
    pub fn release(&self) {
        self.data.release();
    }

    /// Number of rows: the product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        self.shape[..self.shape.len() - 1].iter().product()
    }

    /// Length of a row: the last dimension.
    pub fn cols(&self) -> usize {
        *self.shape.last().expect("a tensor has a dimension")
    }

    /// Decodes a row.
    ///
    /// # Shapes
    /// values `[cols]`
    ///
    /// # Panics
    /// If `row` is out of range, or `values` has another length.
    pub fn read_row(&self, row: usize, values: &mut [f32]) {
        assert_eq!(values.len(), self.cols());
        let bytes = &self.data[self.row_bytes(row)];
        let pairs = bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
        match self.encoding {
            Encoding::F32 => {
                for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(4)) {
                    *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                }
            }
            Encoding::F16 => {
                values.iter_mut().zip(pairs).for_each(|(v, b)| *v = f16::from_le_bytes(b).to_f32())
            }
            Encoding::Bf16 => {
                values.iter_mut().zip(pairs).for_each(|(v, b)| *v = bf16::from_le_bytes(b).to_f32());
            }
            encoding if encoding.is_ternary() => {
                let group = encoding.block_weights();
                let mut codes = vec![0; values.len()];
                let mut scales = vec![f16::ZERO; values.len() / group];
                self.read_ternary_row(row, &mut codes, &mut scales);
                let groups = values.chunks_exact_mut(group).zip(codes.chunks_exact(group));
                for ((values, codes), scale) in groups.zip(scales) {
                    let scale = scale.to_f32();
                    values.iter_mut().zip(codes).for_each(|(value, &code)| *value = f32::from(code) * scale);
                }
            }
            encoding => {
                let blocks = bytes.chunks_exact(encoding.block_bytes());
                for (values, block) in values.chunks_exact_mut(encoding.block_weights()).zip(blocks) {
                    block::decode_block(encoding, block, values);
                }
            }
        }
    }

    /// Checks that no weight is NaN or infinite. In encodings with scales, this reads the scales only.
    ///
    /// # Errors
    /// `NotFinite`: the first row with such a weight.
    pub fn check_finite(&self) -> Result<(), FormatError> {
        let row = (0..self.rows()).find(|&row| !self.is_finite(row));
        row.map_or(Ok(()), |row| Err(FormatError::NotFinite { row }))
    }

    fn is_finite(&self, row: usize) -> bool {
        let bytes = &self.data[self.row_bytes(row)];
        // A value is finite unless all bits of its exponent are set. The loop has no early exit, so that it is
        // vectorized.
        let halves = |bytes: &[u8], exponent: u16| {
            let finite = |pair: &[u8]| u16::from_le_bytes([pair[0], pair[1]]) & exponent != exponent;
            bytes.chunks_exact(2).fold(true, |all, pair| all & finite(pair))
        };
        match self.encoding {
            Encoding::F32 => bytes.chunks_exact(4).fold(true, |all, b| {
                const EXPONENT: u32 = 0x7f80_0000;
                all & (u32::from_le_bytes([b[0], b[1], b[2], b[3]]) & EXPONENT != EXPONENT)
            }),
            Encoding::F16 => halves(bytes, F16_EXPONENT),
            Encoding::Bf16 => halves(bytes, 0x7f80),
            Encoding::Ternary { group } => {
                let scales = 2 * (self.cols() / group);
                let start = self.rows() * bytes.len() + row * scales;
                halves(&self.data[start..start + scales], F16_EXPONENT)
            }
            encoding => bytes.chunks_exact(encoding.block_bytes()).all(|block| {
                encoding.scale_offsets().iter().all(|&at| halves(&block[at..at + 2], F16_EXPONENT))
            }),
        }
    }

    /// Consecutive weights of a row per stored scale; `None` if the encoding is not ternary.
    pub fn ternary_group(&self) -> Option<usize> {
        self.encoding.is_ternary().then(|| self.encoding.block_weights())
    }

    /// Reads codes -1, 0, +1 and scales of a row of a ternary tensor.
    ///
    /// # Shapes
    /// codes `[cols]`, scales `[cols / group]`
    ///
    /// # Panics
    /// If the encoding is not ternary, `row` is out of range, or a length differs.
    pub fn read_ternary_row(&self, row: usize, codes: &mut [i8], scales: &mut [f16]) {
        let group = self.ternary_group().expect("a ternary tensor");
        assert_eq!((codes.len(), scales.len()), (self.cols(), self.cols() / group));
        let bytes = &self.data[self.row_bytes(row)];
        if let Encoding::Ternary { .. } = self.encoding {
            ternary::unpack(bytes, codes);
            let start = self.rows() * bytes.len() + row * 2 * scales.len();
            let pairs = self.data[start..start + 2 * scales.len()].chunks_exact(2);
            scales.iter_mut().zip(pairs).for_each(|(scale, b)| *scale = f16::from_le_bytes([b[0], b[1]]));
            return;
        }
        let blocks = bytes.chunks_exact(self.encoding.block_bytes());
        for ((codes, scale), block) in codes.chunks_exact_mut(group).zip(scales).zip(blocks) {
            *scale = ternary::decode_block(self.encoding, block, codes);
        }
    }

    /// Reads integer codes of a row of `Q8_0`, `Q4_0` or `Q6_K`. A weight is `scale * factor * code`.
    ///
    /// # Shapes
    /// codes `[cols]`, factors `[cols / 16]` (all 1 except in `Q6_K`), scales `[cols / block_weights]`
    ///
    /// # Panics
    /// If the encoding is another one, `row` is out of range, or a length differs.
    pub fn read_integer_row(&self, row: usize, codes: &mut [i8], factors: &mut [i8], scales: &mut [f16]) {
        let weights = self.encoding.block_weights();
        assert_eq!((codes.len(), factors.len()), (self.cols(), self.cols() / 16));
        assert_eq!(scales.len(), self.cols() / weights);
        let bytes = &self.data[self.row_bytes(row)];
        let blocks = bytes.chunks_exact((bytes.len() / scales.len().max(1)).max(1));
        let parts = codes.chunks_exact_mut(weights).zip(factors.chunks_exact_mut(weights / 16));
        for (((codes, factors), scale), block) in parts.zip(scales).zip(blocks) {
            *scale = block::decode_codes(self.encoding, block, codes, factors);
        }
    }

    /// Copies rows, in the order of `rows`, to a matrix.
    ///
    /// # Panics
    /// If a row is out of range.
    pub fn select_rows(&self, rows: impl IntoIterator<Item = usize>) -> Self {
        let rows: Vec<usize> = rows.into_iter().collect();
        let mut data = Vec::new();
        for &row in &rows {
            data.extend_from_slice(&self.data[self.row_bytes(row)]);
        }
        if let Encoding::Ternary { group } = self.encoding {
            let (start, scales) = (self.rows() * self.cols().div_ceil(4), 2 * self.cols() / group);
            for &row in &rows {
                data.extend_from_slice(&self.data[start + row * scales..start + (row + 1) * scales]);
            }
        }
        Self { shape: vec![rows.len(), self.cols()], encoding: self.encoding, data: data.into() }
    }

    /// Permutes the rows of a query or key matrix from interleaved RoPE (component `2i` of a head rotates with `2i +
    /// 1`) to half-rotation order (component `i` rotates with `i + head_dim / 2`). Attention scores do not change.
    ///
    /// # Panics
    /// If the rows are not a whole number of heads, or `head_dim` is odd.
    pub fn half_rotation(&self, head_dim: usize) -> Self {
        let rows = self.rows();
        assert!(
            head_dim.is_multiple_of(2) && rows.is_multiple_of(head_dim),
            "{rows} rows, heads of {head_dim}"
        );
        self.select_rows((0..rows).map(|row| interleaved_row(row, head_dim)))
    }

    /// Byte range of a row; for `Ternary`, of its codes.
    fn row_bytes(&self, row: usize) -> Range<usize> {
        let bytes = match self.encoding {
            Encoding::Ternary { .. } => self.cols().div_ceil(4),
            _ => self.data.len() / self.rows(),
        };
        assert!(row < self.rows(), "row {row} of {}", self.rows());
        row * bytes..(row + 1) * bytes
    }

    /// Returns whether all 2-bit fields of a row are ternary codes.
    fn holds_codes(&self, row: usize) -> bool {
        let bytes = &self.data[self.row_bytes(row)];
        match self.encoding {
            Encoding::Tq2_0 => bytes.chunks_exact(66).all(|block| ternary::holds_codes(&block[..64])),
            Encoding::Q2_0 => bytes.chunks_exact(18).all(|block| ternary::holds_codes(&block[2..])),
            _ => ternary::holds_codes(bytes),
        }
    }
}

#[cfg(test)]
mod tests;
