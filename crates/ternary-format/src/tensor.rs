//! [`Tensor`]: bytes with a shape and an encoding, read row by row.

use crate::{Encoding, FormatError, block, disk, ternary};
use half::{bf16, f16};
use std::{ops::Range, path::Path, sync::Arc};

/// The bits of an f16 that are all set in NaN and infinity.
const F16_EXPONENT: u16 = 0x7c00;

/// Bytes that are owned, or part of a mapped file.
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
        // SAFETY: the map is read only and of a file, which its pages are read from again when they are needed.
        // Only advice: where it is refused, the pages stay.
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
    /// `Io`: missing, no permission, or not a file that can be mapped.
    pub fn map(path: &Path) -> Result<Self, FormatError> {
        let file = disk::open(path).map_err(FormatError::io(path))?;
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

    /// Gives the memory of a mapped file's pages back to the system, for who has made a copy of the weights; they are
    /// read from the file again when they are needed.
    pub fn release(&self) {
        self.data.owner.release(self.data.range.clone());
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
                let blocks = bytes.chunks_exact(encoding.block_bytes());
                for (values, block) in values.chunks_exact_mut(encoding.block_weights()).zip(blocks) {
                    block::decode_block(encoding, block, values);
                }
            }
        }
    }

    /// Checks that no weight is NaN or infinite; of weights with scales, only the scales are read.
    ///
    /// # Errors
    /// `NotFinite`: the first row that has one.
    pub fn check_finite(&self) -> Result<(), FormatError> {
        let row = (0..self.rows()).find(|&row| !self.is_finite(row));
        row.map_or(Ok(()), |row| Err(FormatError::NotFinite { row }))
    }

    fn is_finite(&self, row: usize) -> bool {
        let bytes = &self.data[self.row_bytes(row)];
        // A value is finite unless all bits of its exponent are set. No early end, so that many are compared at once.
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
        let blocks = bytes.chunks_exact(self.encoding.block_bytes());
        for ((codes, scale), block) in codes.chunks_exact_mut(group).zip(scales).zip(blocks) {
            *scale = ternary::decode_block(self.encoding, block, codes);
        }
    }

    /// The integers of a row of `Q8_0`, `Q4_0` or `Q6_K`: a weight is `scale * factor * code`.
    ///
    /// # Shapes
    /// codes `[cols]`, factors `[cols / 16]` (all 1 but in `Q6_K`), scales `[cols / block_weights]`
    ///
    /// # Panics
    /// When the encoding is another one.
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

    /// The same weights in another encoding.
    ///
    /// Ternary weights keep codes and scales exactly in every ternary encoding and in `Q8_0` and `Q4_0`. Others are
    /// rounded as GGML does. Weights that are not ternary never become ternary.
    ///
    /// # Errors
    /// `RowLength`, `ScalesDiffer`: rows or scales do not fit the blocks. `NotTernary`. `ReadOnly`. `NotFinite`: weights
    /// that are not finite, or not in the range of the encoding.
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
            _ => self.data.len() / self.rows(),
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

    /// A ternary matrix with a scale a row, and its codes and scales.
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
                // Through the form in memory and back: every byte.
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
        fn odd_rows_are_kept_in_memory(rows in 1usize..5, cols in 1usize..300, seed: u64) {
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
    fn integer_codes_go_into_8_and_4_bits_exactly() {
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
    fn nothing_becomes_ternary_that_was_not() {
        let floats = Tensor::f32(&[1, 256], &[0.5; 256]).unwrap();
        for encoding in TERNARY {
            assert!(matches!(floats.encode(encoding), Err(FormatError::NotTernary { .. })));
        }
        let (tensor, ..) = matrix(1, 384, 0);
        let error = tensor.encode(Encoding::Tq2_0).unwrap_err();
        assert_eq!(
            error.to_string(),
            "rows of 384 weights, TQ2_0 needs a multiple of 256: use another type or train with one"
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
    fn bytes_that_are_no_tensor_are_refused() {
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
        // Every byte of TQ1_0 is five codes.
        assert!(values(&new(&[256], Encoding::Tq1_0, 54).unwrap())[..5].iter().all(|v| v.is_nan()));
    }

    /// Bytes of one row of two blocks of every encoding, all finite; each scale made NaN or infinite in turn.
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
    #[cfg_attr(miri, ignore)] // which maps no files
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
