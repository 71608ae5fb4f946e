//! Creating tensors from codes, and converting tensors to another encoding.

use super::Tensor;
use crate::{Encoding, FormatError, block, ternary};
use half::f16;

impl Tensor {
    /// Creates a matrix of codes -1, 0, +1 with one scale per `group` weights of a row. `fill(row, codes, scales)`
    /// writes one row.
    ///
    /// # Shapes
    /// codes `[cols]`, scales `[cols / group]`
    ///
    /// # Errors
    /// As [`from_codes`](Self::from_codes).
    pub fn ternary(
        rows: usize,
        cols: usize,
        group: usize,
        fill: impl FnMut(usize, &mut [i8], &mut [f16]),
    ) -> Result<Self, FormatError> {
        Self::from_codes(Encoding::Ternary { group }, rows, cols, fill)
    }

    /// Creates a matrix from integer codes and scales without rounding. The encoding is a ternary one, `Q8_0` (codes
    /// -128 to 127) or `Q4_0` (-8 to 7). `fill(row, codes, scales)` writes one row.
    ///
    /// # Shapes
    /// codes `[cols]`, scales `[cols / block_weights]`
    ///
    /// # Errors
    /// `Shape`, `RowLength`: the sizes do not fit the encoding. `NotACode`: a code out of range. `ReadOnly`: the
    /// encoding has no integer codes, or is read-only.
    pub fn from_codes(
        encoding: Encoding,
        rows: usize,
        cols: usize,
        mut fill: impl FnMut(usize, &mut [i8], &mut [f16]),
    ) -> Result<Self, FormatError> {
        let limits = match encoding {
            Encoding::Q8_0 => -128..=127,
            Encoding::Q4_0 => -8..=7,
            _ if encoding.is_ternary() => -1..=1,
            _ => return Err(FormatError::ReadOnly { encoding }),
        };
        let shape = vec![rows, cols];
        let mut data = vec![0; encoding.bytes(&shape)?];
        let mut codes = vec![0; cols];
        let mut scales = vec![f16::ZERO; cols / encoding.block_weights()];
        for row in 0..rows {
            fill(row, &mut codes, &mut scales);
            if codes.iter().any(|code| !limits.contains(code)) {
                return Err(FormatError::NotACode { encoding, row });
            }
            write_codes(encoding, [rows, cols], row, &codes, &scales, &mut data);
        }
        Ok(Self { shape, encoding, data: data.into() })
    }

    /// Converts to another encoding.
    ///
    /// Ternary weights keep codes and scales exactly in every ternary encoding, in `Q8_0` and in `Q4_0`. Other
    /// weights are rounded to the bit as GGML does. Weights that are not ternary are never rounded to ternary ones.
    ///
    /// # Errors
    /// `RowLength`, `ScalesDiffer`: rows or scales do not fit the blocks. `NotTernary`: float weights for a ternary
    /// encoding. `ReadOnly`: an encoding that is not written. `NotFinite`: a weight that is not finite, or out of
    /// range for the encoding.
    pub fn encode(&self, encoding: Encoding) -> Result<Self, FormatError> {
        if encoding == self.encoding {
            return Ok(self.clone());
        }
        if self.encoding.is_ternary() && !matches!(encoding, Encoding::F32 | Encoding::F16) {
            return self.encode_codes(encoding);
        }
        if encoding.is_ternary() {
            return Err(FormatError::NotTernary { found: self.encoding, expected: encoding });
        }
        let mut data = Vec::with_capacity(encoding.bytes(&self.shape)?);
        let mut values = vec![0.0; self.cols()];
        for row in 0..self.rows() {
            self.read_row(row, &mut values);
            match encoding {
                Encoding::F32 => data.extend(values.iter().flat_map(|value| value.to_le_bytes())),
                Encoding::F16 => data.extend(values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes())),
                Encoding::Q8_0 | Encoding::Q4_0 => {
                    let mut bytes = vec![0; encoding.block_bytes()];
                    for values in values.chunks_exact(32) {
                        block::encode_block(encoding, values, &mut bytes);
                        data.extend_from_slice(&bytes);
                    }
                }
                _ => return Err(FormatError::ReadOnly { encoding }),
            }
        }
        let tensor = Self::new(self.shape.clone(), encoding, data)?;
        tensor.check_finite().map(|()| tensor)
    }

    /// Converts ternary weights to another encoding with integer codes and scales.
    fn encode_codes(&self, encoding: Encoding) -> Result<Self, FormatError> {
        let [rows, cols] = [self.rows(), self.cols()];
        let (group, block) = (self.encoding.block_weights(), encoding.block_weights());
        let mut old = vec![f16::ZERO; cols / group];
        let mut differs = None;
        let mut tensor = Self::from_codes(encoding, rows, cols, |row, codes, scales| {
            self.read_ternary_row(row, codes, &mut old);
            for (i, (scale, codes)) in scales.iter_mut().zip(codes.chunks_exact(block)).enumerate() {
                // If all codes of a block are zero, its scale has no effect: the first one is kept.
                let mut one = None;
                for (place, code) in codes.iter().enumerate() {
                    let found = old[(i * block + place) / group];
                    if *code != 0 && *one.get_or_insert(found) != found {
                        differs.get_or_insert(row);
                    }
                }
                *scale = one.unwrap_or(old[i * block / group]);
            }
        })?;
        if let Some(row) = differs {
            return Err(FormatError::ScalesDiffer { encoding, row, block });
        }
        tensor.shape.clone_from(&self.shape);
        Ok(tensor)
    }
}

/// Writes codes and scales of a row to `data`.
fn write_codes(
    encoding: Encoding,
    [rows, cols]: [usize; 2],
    row: usize,
    codes: &[i8],
    scales: &[f16],
    data: &mut [u8],
) {
    if let Encoding::Ternary { .. } = encoding {
        let bytes = cols.div_ceil(4);
        ternary::pack(codes, &mut data[row * bytes..(row + 1) * bytes]);
        let places = data[rows * bytes..].chunks_exact_mut(2).skip(row * scales.len());
        scales.iter().zip(places).for_each(|(scale, place)| place.copy_from_slice(&scale.to_le_bytes()));
        return;
    }
    let bytes = data.len() / rows;
    let blocks = data[row * bytes..(row + 1) * bytes].chunks_exact_mut(encoding.block_bytes());
    for ((codes, &scale), block) in codes.chunks_exact(encoding.block_weights()).zip(scales).zip(blocks) {
        if encoding.is_ternary() {
            ternary::encode_block(encoding, codes, scale, block);
        } else {
            block::encode_codes(encoding, codes, scale, block);
        }
    }
}
