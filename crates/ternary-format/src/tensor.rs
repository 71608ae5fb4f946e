//! [`Tensor`]: bytes with a shape and an encoding. Rows are decoded one at a time.

use crate::{Encoding, FormatError, block, disk, gguf::interleaved_row, ternary};
use half::{bf16, f16};
use std::{ops::Range, path::Path, sync::Arc};

/// Exponent bits of an f16. All are set in NaN and infinity only.
const F16_EXPONENT: u16 = 0x7c00;

/// A slice of bytes, owned or memory-mapped. Cloning and slicing share the memory.
#[derive(Clone, Debug)]
pub struct Bytes {
    owner: Arc<dyn AsBytes>,
    range: Range<usize>,
}

trait AsBytes: std::fmt::Debug + Send + Sync {
    fn as_bytes(&self) -> &[u8];

    /// See [`Tensor::release`].
    fn release(&self, _range: Range<usize>) {}
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

    #[cfg(unix)]
    fn release(&self, range: Range<usize>) {
        let advice = memmap2::UncheckedAdvice::DontNeed;
        // SAFETY: the map is read-only and backed by a file, from which its pages are read again on the next access.
        // The call is advice: if the system refuses it, the pages stay in memory.
        #[allow(unsafe_code)]
        let _ = unsafe { self.unchecked_advise_range(advice, range.start, range.len()) };
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
    /// `Io`: the file is missing, may not be read, or cannot be mapped.
    pub fn map(path: &Path) -> Result<Self, FormatError> {
        let file = disk::open(path).map_err(FormatError::io(path))?;
        if file.metadata().map_err(FormatError::io(path))?.len() == 0 {
            return Ok(Vec::new().into()); // an empty file cannot be mapped
        }
        // SAFETY: the map is read-only. Another program that truncates the file while it is mapped would kill this
        // process with SIGBUS. This workspace never does that: it replaces a model file by renaming a new one over
        // it.
        #[allow(unsafe_code)]
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(FormatError::io(path))?;
        let range = 0..map.len();
        Ok(Self { owner: Arc::new(map), range })
    }

    /// Returns a part of the bytes without copying it.
    ///
    /// # Panics
    /// If `range` ends after the bytes.
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
        self.data.owner.release(self.data.range.clone());
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use safetensors::SafeTensors;

    const TERNARY: [Encoding; 4] =
        [Encoding::Tq1_0, Encoding::Tq2_0, Encoding::Q2_0, Encoding::Ternary { group: 64 }];

    /// A ternary matrix with one scale per row, its codes and its scales.
    fn matrix(rows: usize, cols: usize, seed: u64) -> (Tensor, Vec<i8>, Vec<f16>) {
        use rand::{Rng, SeedableRng};
        let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
        let codes: Vec<i8> = (0..rows * cols).map(|_| rng.random_range(-1..=1)).collect();
        let scales: Vec<f16> = (0..rows).map(|_| f16::from_f32(rng.random_range(6e-5..2.0))).collect();
        let tensor = Tensor::ternary(rows, cols, cols, |row, c, s| {
            c.copy_from_slice(&codes[row * cols..(row + 1) * cols]);
            s[0] = scales[row];
        });
        (tensor.unwrap(), codes, scales)
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        let mut values = vec![0.0; tensor.rows() * tensor.cols()];
        for (row, values) in values.chunks_exact_mut(tensor.cols()).enumerate() {
            tensor.read_row(row, values);
        }
        values
    }

    #[test]
    fn ternary_blocks_are_those_of_the_reference() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../../shared/data/gguf_ternary/fixture_expected.safetensors"
        );
        let Ok(bytes) = std::fs::read(path) else {
            println!("skipped: {path}: no reference data");
            return;
        };
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let floats = |name: &str| -> Vec<f32> {
            let data = file.tensor(name).unwrap().data().to_vec();
            data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let mut blocks = 0;
        for encoding in [Encoding::Tq1_0, Encoding::Tq2_0] {
            for name in ["gauss", "wide", "ternary_exact", "zeros", "one_hot"] {
                let stored = file.tensor(&format!("{name}.{encoding}.bytes")).unwrap();
                let expected = floats(&format!("{name}.{encoding}.dequant_f32"));
                let rows = stored.shape()[0];
                let shape = vec![rows, expected.len() / rows];
                let tensor = Tensor::new(shape, encoding, stored.data().to_vec()).unwrap();
                assert_eq!(values(&tensor), expected, "{name} {encoding}");
                // A round trip through the in-memory encoding keeps every byte.
                let codes = tensor.encode(Encoding::Ternary { group: 256 }).unwrap();
                assert_eq!(codes.encode(encoding).unwrap().bytes(), stored.data(), "{name} {encoding}");
                blocks += stored.data().len() / encoding.block_bytes();
            }
        }
        assert_eq!(blocks, 2 * (8 + 8 + 4 + 1 + 2));
    }

    proptest! {
        #[test]
        fn ternary_weights_survive_every_encoding(rows in 1usize..5, blocks in 1usize..4, seed: u64) {
            let (tensor, codes, scales) = matrix(rows, 256 * blocks, seed);
            let dense = values(&tensor);
            let mut encodings = TERNARY.to_vec();
            encodings.extend([Encoding::Q8_0, Encoding::Q4_0, Encoding::F32]);
            for from in TERNARY {
                for &to in &encodings {
                    let other = tensor.encode(from).unwrap().encode(to).unwrap();
                    prop_assert_eq!(other.encoding(), to);
                    prop_assert_eq!(values(&other), dense.clone(), "{} to {}", from, to);
                    let Some(group) = other.ternary_group() else { continue };
                    let mut c = vec![0; tensor.cols()];
                    let mut s = vec![f16::ZERO; tensor.cols() / group];
                    for (row, expected) in codes.chunks_exact(tensor.cols()).enumerate() {
                        other.read_ternary_row(row, &mut c, &mut s);
                        prop_assert_eq!(&c, expected);
                        prop_assert!(s.iter().all(|&scale| scale == scales[row]));
                    }
                }
            }
        }

        #[test]
        fn rows_of_any_length_survive_in_memory(rows in 1usize..5, cols in 1usize..300, seed: u64) {
            let (tensor, codes, scales) = matrix(rows, cols, seed);
            let expected: Vec<f32> =
                codes.iter().enumerate().map(|(i, &c)| f32::from(c) * scales[i / cols].to_f32()).collect();
            prop_assert_eq!(values(&tensor), expected.clone());
            let order: Vec<usize> = (0..rows).rev().collect();
            let reversed: Vec<f32> =
                order.iter().flat_map(|&row| expected[row * cols..(row + 1) * cols].to_vec()).collect();
            prop_assert_eq!(values(&tensor.select_rows(order)), reversed);
        }

        #[test]
        fn rounding_to_8_and_4_bits_is_within_half_a_step(x in prop::collection::vec(-3.0f32..3.0, 64)) {
            let tensor = Tensor::f32(&[2, 32], &x).unwrap();
            for (encoding, most) in [(Encoding::Q8_0, 0.51), (Encoding::Q4_0, 1.01)] {
                let rounded = tensor.encode(encoding).unwrap();
                for (row, (x, y)) in x.chunks(32).zip(values(&rounded).chunks(32)).enumerate() {
                    let at = row * encoding.block_bytes();
                    let step = f16::from_le_bytes([rounded.bytes()[at], rounded.bytes()[at + 1]]).to_f32().abs();
                    for (x, y) in x.iter().zip(y) {
                        // The scale itself is rounded to 11 bits: up to 127 steps of 2^-11.
                        prop_assert!((x - y).abs() <= step * (most + 127.0 / 2048.0), "{x} {y} {step}");
                    }
                }
            }
        }
    }

    #[test]
    fn integer_codes_are_stored_exactly_in_8_and_4_bits() {
        for (encoding, limit) in [(Encoding::Q8_0, 127), (Encoding::Q4_0, 7)] {
            let code = |row: usize, i: usize| ((7 * i + row) as i32 % (2 * limit + 1) - limit) as i8;
            let scale = |row: usize| f16::from_f32(0.01 + row as f32);
            let tensor = Tensor::from_codes(encoding, 3, 64, |row, codes, scales| {
                codes.iter_mut().enumerate().for_each(|(i, c)| *c = code(row, i));
                scales.fill(scale(row));
            });
            let found = values(&tensor.unwrap());
            for (i, value) in found.iter().enumerate() {
                assert_eq!(*value, f32::from(code(i / 64, i % 64)) * scale(i / 64).to_f32());
            }
        }
    }

    #[test]
    fn weights_that_are_not_ternary_are_never_rounded_to_ternary() {
        let floats = Tensor::f32(&[1, 256], &[0.5; 256]).unwrap();
        for encoding in TERNARY {
            assert!(matches!(floats.encode(encoding), Err(FormatError::NotTernary { .. })));
        }
        let (tensor, ..) = matrix(1, 384, 0);
        let error = tensor.encode(Encoding::Tq2_0).unwrap_err();
        assert_eq!(
            error.to_string(),
            "rows of 384 weights, TQ2_0 needs a multiple of 256: use another type, or train with a multiple of 256"
        );
        assert!(tensor.encode(Encoding::Q2_0).is_ok());
        let groups = Tensor::ternary(1, 256, 64, |_, codes, scales| {
            codes.fill(1);
            scales.iter_mut().enumerate().for_each(|(i, s)| *s = f16::from_f32(i as f32));
        });
        let groups = groups.unwrap();
        assert!(matches!(groups.encode(Encoding::Tq1_0), Err(FormatError::ScalesDiffer { row: 0, .. })));
        assert!(groups.encode(Encoding::Q2_0).is_ok());
        assert!(matches!(groups.encode(Encoding::Q6K), Err(FormatError::ReadOnly { .. })));
    }

    #[test]
    fn bytes_that_do_not_match_the_shape_are_refused() {
        let new =
            |shape: &[usize], encoding, bytes| Tensor::new(shape.to_vec(), encoding, vec![255u8; bytes]);
        for shape in [&[][..], &[0], &[0, 256], &[usize::MAX, 2], &[1 << 31, 1 << 31, 1 << 31]] {
            assert!(matches!(new(shape, Encoding::F32, 4), Err(FormatError::Shape { .. })), "{shape:?}");
        }
        assert!(matches!(
            new(&[2, 2], Encoding::F32, 15),
            Err(FormatError::TensorBytes { expected: 16, .. })
        ));
        assert!(matches!(new(&[33], Encoding::Q8_0, 34), Err(FormatError::RowLength { block: 32, .. })));
        assert!(matches!(new(&[9], Encoding::Ternary { group: 0 }, 3), Err(FormatError::RowLength { .. })));
        for (encoding, bytes) in [(Encoding::Tq2_0, 66), (Encoding::Ternary { group: 256 }, 66)] {
            assert!(matches!(new(&[256], encoding, bytes), Err(FormatError::NotACode { row: 0, .. })));
        }
        // Every byte of TQ1_0 decodes to five codes, so only the scale is NaN.
        assert!(values(&new(&[256], Encoding::Tq1_0, 54).unwrap())[..5].iter().all(|v| v.is_nan()));
    }

    /// Every scale in turn of a row of two blocks is NaN or infinite, in every encoding.
    #[test]
    fn a_value_that_is_not_finite_is_found_in_every_encoding() {
        let check = |encoding, cols: usize, bytes: &[u8]| {
            let bytes = [vec![0; bytes.len()], bytes.to_vec()].concat();
            Tensor::new(vec![2, cols], encoding, bytes).unwrap().check_finite()
        };
        for (encoding, places) in [
            (Encoding::F16, vec![0, 2, 254]),
            (Encoding::Q8_0, vec![0, 34]),
            (Encoding::Q4_0, vec![0, 18]),
            (Encoding::Q4_1, vec![0, 2, 20, 22]),
            (Encoding::Q4K, vec![0, 2, 144, 146]),
            (Encoding::Q6K, vec![208, 418]),
            (Encoding::Tq1_0, vec![52, 106]),
            (Encoding::Tq2_0, vec![64, 130]),
            (Encoding::Q2_0, vec![0, 18]),
        ] {
            let cols = if encoding == Encoding::F16 { 128 } else { 2 * encoding.block_weights() };
            let sound = vec![0; encoding.bytes(&[cols]).unwrap()];
            check(encoding, cols, &sound).unwrap();
            for place in places {
                for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
                    let mut bytes = sound.clone();
                    bytes[place..place + 2].copy_from_slice(&bad.to_le_bytes());
                    let error = check(encoding, cols, &bytes).unwrap_err();
                    assert!(
                        matches!(error, FormatError::NotFinite { row: 1 }),
                        "{encoding} {place}: {error}"
                    );
                    bytes[place..place + 2].copy_from_slice(&f16::MAX.to_le_bytes());
                    check(encoding, cols, &bytes).unwrap();
                }
            }
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let values = [[f32::MAX; 40], [bad; 40]].concat();
            let tensor = Tensor::f32(&[80], &values).unwrap();
            assert!(matches!(tensor.check_finite(), Err(FormatError::NotFinite { row: 0 })));
            let halves: Vec<u8> =
                values.iter().flat_map(|x| bf16::from_f32(x.min(1e38)).to_le_bytes()).collect();
            let tensor = Tensor::new(vec![2, 40], Encoding::Bf16, halves).unwrap();
            assert_eq!(tensor.check_finite().is_ok(), bad == f32::INFINITY || bad.is_nan());
            let ternary =
                Tensor::ternary(2, 8, 4, |row, _, scales| scales[1] = f16::from_f32(bad * row as f32));
            assert!(ternary.unwrap().check_finite().is_err());
        }
    }

    #[test]
    fn weights_beyond_the_range_of_an_encoding_are_refused() {
        let tensor = Tensor::f32(&[2, 32], &[[1.0; 32], [1e9; 32]].concat()).unwrap();
        for encoding in [Encoding::F16, Encoding::Q8_0, Encoding::Q4_0] {
            let error = tensor.encode(encoding).unwrap_err();
            assert!(matches!(error, FormatError::NotFinite { row: 1 }), "{error}");
        }
    }

    #[test]
    #[cfg_attr(miri, ignore)] // miri cannot map files
    fn released_tensors_are_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("values");
        let stored: Vec<u8> = (0..40_000u32).flat_map(|i| (i as f32).to_le_bytes()).collect();
        std::fs::write(&path, &stored).unwrap();
        let file = Bytes::map(&path).unwrap().slice(4..stored.len());
        let tensor = Tensor::new(vec![39_999], Encoding::F32, file).unwrap();
        tensor.release();
        assert_eq!(tensor.bytes(), &stored[4..]);
        let owned = Tensor::f32(&[2], &[1.0, 2.0]).unwrap();
        owned.release();
        assert_eq!(values(&owned), [1.0, 2.0]);
    }
}
