//! [`Tensor`]: bytes with a shape and an encoding, read row by row.

use crate::{Encoding, FormatError, block, ternary};
use half::{bf16, f16};
use std::{fs::File, ops::Range, path::Path, sync::Arc};

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

impl Bytes {
    /// Maps a file into memory.
    ///
    /// # Errors
    /// `Io`: missing, no permission, or not a file that can be mapped.
    pub fn map(path: &Path) -> Result<Self, FormatError> {
        let file = File::open(path).map_err(FormatError::io(path))?;
        if file.metadata().map_err(FormatError::io(path))?.len() == 0 {
            return Ok(Vec::new().into()); // nothing can be mapped
        }
        // SAFETY: the map is read only. Whoever cuts the file while it is mapped ends this process; model files are
        // replaced under a new inode by everything that writes them here.
        #[allow(unsafe_code)]
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(FormatError::io(path))?;
        let range = 0..map.len();
        Ok(Self { owner: Arc::new(map), range })
    }

    /// A part of the same bytes, not copied.
    ///
    /// # Panics
    /// When `range` goes past the end.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.range.len());
        let start = self.range.start;
        Self { owner: self.owner.clone(), range: start + range.start..start + range.end }
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.owner.as_bytes()[self.range.clone()]
    }
}

/// A tensor of a model file. Matrices are `[out, in]`, row-major.
#[derive(Clone, Debug)]
pub struct Tensor {
    shape: Vec<usize>,
    encoding: Encoding,
    data: Bytes,
}

impl Tensor {
    /// A tensor of stored bytes.
    ///
    /// # Errors
    /// `Shape`, `RowLength`, `TensorBytes`: bytes and shape do not fit. `NotACode`: a 2-bit code that is not ternary.
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

    /// A tensor of float values.
    ///
    /// # Errors
    /// `Shape`, `TensorBytes`: not as many values as the shape has.
    pub fn f32(shape: &[usize], values: &[f32]) -> Result<Self, FormatError> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::new(shape.into(), Encoding::F32, bytes)
    }

    /// A tensor of half precision values.
    ///
    /// # Errors
    /// As [`f32`](Self::f32).
    pub fn f16(shape: &[usize], values: &[f16]) -> Result<Self, FormatError> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::new(shape.into(), Encoding::F16, bytes)
    }

    /// A matrix of codes -1, 0, +1 with a scale for each `group` weights of a row. `fill` writes row by row:
    /// `fill(row, codes [cols], scales [cols / group])`.
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

    /// A matrix of integer codes and their scales, exactly: of a ternary encoding, or `Q8_0` (codes -128 to 127) or
    /// `Q4_0` (-8 to 7). `fill` writes row by row: `fill(row, codes [cols], scales [cols / block_weights])`.
    ///
    /// # Errors
    /// `Shape`, `RowLength`. `NotACode`: a code outside of the range. `ReadOnly`: an encoding without codes.
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
                let weights = encoding.block_weights();
                let blocks = bytes.chunks_exact((bytes.len() * weights / values.len().max(1)).max(1));
                for (values, bytes) in values.chunks_exact_mut(weights).zip(blocks) {
                    block::decode_block(encoding, bytes, values);
                }
            }
        }
    }

    /// How many consecutive weights of a row share a stored scale; `None` where the encoding is not ternary.
    pub fn ternary_group(&self) -> Option<usize> {
        self.encoding.is_ternary().then(|| self.encoding.block_weights())
    }

    /// Codes -1, 0, +1 and scales of a row of a ternary tensor.
    ///
    /// # Shapes
    /// codes `[cols]`, scales `[cols / group]`
    ///
    /// # Panics
    /// When the encoding is not ternary.
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
        let blocks = bytes.chunks_exact((bytes.len() / scales.len().max(1)).max(1));
        for ((codes, scale), block) in codes.chunks_exact_mut(group).zip(scales).zip(blocks) {
            *scale = ternary::decode_block(self.encoding, block, codes);
        }
    }

    /// The same weights in another encoding.
    ///
    /// Ternary weights keep codes and scales exactly in every ternary encoding and in `Q8_0` and `Q4_0`. Others are
    /// rounded as GGML does. Weights that are not ternary never become ternary.
    ///
    /// # Errors
    /// `RowLength`, `ScalesDiffer`: rows or scales do not fit the blocks. `NotTernary`. `ReadOnly`.
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
                    let mut bytes = vec![0; encoding.bytes(&[32])?];
                    for values in values.chunks_exact(32) {
                        block::encode_block(encoding, values, &mut bytes);
                        data.extend_from_slice(&bytes);
                    }
                }
                _ => return Err(FormatError::ReadOnly { encoding }),
            }
        }
        Self::new(self.shape.clone(), encoding, data)
    }

    /// [`encode`](Self::encode) from ternary to whatever has codes and scales.
    fn encode_codes(&self, encoding: Encoding) -> Result<Self, FormatError> {
        let [rows, cols] = [self.rows(), self.cols()];
        let (group, block) = (self.encoding.block_weights(), encoding.block_weights());
        let mut old = vec![f16::ZERO; cols / group];
        let mut differs = None;
        let mut tensor = Self::from_codes(encoding, rows, cols, |row, codes, scales| {
            self.read_ternary_row(row, codes, &mut old);
            for (i, (scale, codes)) in scales.iter_mut().zip(codes.chunks_exact(block)).enumerate() {
                // Where all codes are zero, any scale says the same; the first is kept if there is no other.
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

    /// Some rows, in the order of `rows`, as a matrix.
    ///
    /// # Panics
    /// When there is no such row.
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

    /// Where the bytes of a row are; of its codes only for `Ternary`.
    fn row_bytes(&self, row: usize) -> Range<usize> {
        let bytes = match self.encoding {
            Encoding::Ternary { .. } => self.cols().div_ceil(4),
            _ => self.data.len() / self.rows().max(1),
        };
        assert!(row < self.rows(), "row {row} of {}", self.rows());
        row * bytes..(row + 1) * bytes
    }

    /// Whether the 2-bit fields of a row are codes.
    fn holds_codes(&self, row: usize) -> bool {
        let bytes = &self.data[self.row_bytes(row)];
        match self.encoding {
            Encoding::Tq2_0 => bytes.chunks_exact(66).all(|block| ternary::holds_codes(&block[..64])),
            Encoding::Q2_0 => bytes.chunks_exact(18).all(|block| ternary::holds_codes(&block[2..])),
            _ => ternary::holds_codes(bytes),
        }
    }
}

/// Writes codes and scales of a row to their places in `data`.
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
    let blocks = data[row * bytes..(row + 1) * bytes].chunks_exact_mut((bytes / scales.len().max(1)).max(1));
    for ((codes, &scale), block) in codes.chunks_exact(encoding.block_weights()).zip(scales).zip(blocks) {
        if encoding.is_ternary() {
            ternary::encode_block(encoding, codes, scale, block);
        } else {
            block::encode_codes(encoding, codes, scale, block);
        }
    }
}
