//! Chunks: consecutive rows of a tensor, coded as one stream.
//!
//! ```text
//! ternary:  [by position?]  row 0: [codes] [scales]  row 1: [codes] [scales]  ...
//! blocks:   block 0: [field] [field] ...  block 1: [field] [field] ...  ...
//! ```
//!
//! Every chunk starts with fresh bit models, so that chunks can be unpacked in parallel and in any order. The tests
//! bound the cost: codes take at most 0.5 % more than their entropy in chunks of 10^5 weights.
//!
//! # Positions
//!
//! By default, all codes of a chunk share one model per decision, so they cost the entropy of their overall zero
//! fraction. If rows or columns differ in their zero fractions, the coder can combine both:
//!
//! ```text
//! row model    p of zero in this row so far       -> class, a step of 1/2 in log-odds
//! column model p of zero in this column so far    -> class
//! cell model   at (row class, column class)       -> p of the decision
//! ```
//!
//! A cell learns how often decisions of such a row and such a column are true. This mode takes up to three times as
//! long to unpack, and is used only if it saves more than 1/256.

use super::coder::{BitModel, Coder, Decoder, Encoder, bit_tree, can_encode, stretch};
use crate::{Encoding, FormatError, Tensor};
use half::f16;
use std::ops::Range;

/// Maximum weights and maximum bytes of a chunk, unless a single row has more.
const CHUNK_LIMIT: usize = 1 << 20;

/// Consecutive rows of a tensor.
pub(super) struct Chunk {
    encoding: Encoding,
    rows: Range<usize>,
    cols: usize,
    bytes: usize,
}

impl Chunk {
    /// Number of chunks of a tensor, and the chunks.
    ///
    /// # Errors
    /// As [`Encoding::bytes`].
    pub fn all(
        encoding: Encoding,
        shape: &[usize],
    ) -> Result<(usize, impl Iterator<Item = Self> + use<>), FormatError> {
        let row = encoding.bytes(&[1, shape.last().copied().unwrap_or_default()])?;
        let rows = encoding.bytes(shape)? / row;
        let cols = shape[shape.len() - 1];
        let step = (CHUNK_LIMIT / cols.max(row)).max(1);
        let chunks = (0..rows).step_by(step).map(move |start| {
            let rows = start..rows.min(start + step);
            Self { encoding, bytes: rows.len() * row, rows, cols }
        });
        Ok((rows.div_ceil(step), chunks))
    }

    /// Returns whether these rows can be packed to `packed` bytes.
    pub fn accepts_length(&self, packed: usize) -> bool {
        // A code takes at least one decision, a byte of a block at least four.
        let decisions = if self.encoding.is_ternary() { self.rows.len() * self.cols } else { 4 * self.bytes };
        packed <= self.bytes && can_encode(packed, decisions)
    }

    /// Codes the rows of `tensor`, or returns their bytes if coding does not shorten them.
    pub fn pack(&self, tensor: &Tensor) -> Vec<u8> {
        let rows = tensor.select_rows(self.rows.clone());
        let packed = if self.encoding.is_ternary() {
            let [plain, by_position] = [false, true].map(|by_position| {
                let mut encoder = Encoder::default();
                let again = self.code_ternary(&mut encoder, by_position, Some(&rows));
                // The copy differs if other writers left garbage in unused bits, or wrote TQ1_0 bytes that this crate
                // writes otherwise. Such rows stay uncompressed.
                again.is_ok_and(|again| again.bytes() == rows.bytes()).then(|| encoder.finish())
            });
            // Positions take up to three times as long to unpack.
            plain.zip(by_position).map(|(plain, by_position)| {
                if by_position.len() < plain.len() - plain.len() / 256 { by_position } else { plain }
            })
        } else {
            let mut encoder = Encoder::default();
            self.code_blocks(&mut encoder, &mut rows.bytes().to_vec());
            Some(encoder.finish())
        };
        packed.filter(|packed| packed.len() < self.bytes).unwrap_or(rows.bytes().into())
    }

    /// The inverse of [`pack`](Self::pack); `None` for bytes that it does not write.
    pub fn unpack(&self, packed: &[u8]) -> Option<Tensor> {
        let new = |bytes| Tensor::new(vec![self.rows.len(), self.cols], self.encoding, bytes);
        if packed.len() == self.bytes {
            return new(packed.to_vec()).ok();
        }
        let mut decoder = Decoder::new(packed)?;
        let tensor = if self.encoding.is_ternary() {
            self.code_ternary(&mut decoder, false, None)
        } else {
            let mut blocks = vec![0; self.bytes];
            self.code_blocks(&mut decoder, &mut blocks);
            new(blocks)
        };
        tensor.ok().filter(|_| decoder.finished())
    }

    /// Codes the rows of a ternary tensor: those of `given`, or those in the stream.
    fn code_ternary(
        &self,
        coder: &mut impl Coder,
        by_position: bool,
        given: Option<&Tensor>,
    ) -> Result<Tensor, FormatError> {
        let by_position = coder.decide(by_position, 1 << 15);
        let mut shared = [BitModel::EVEN; 2];
        let mut positions = PositionModel::new(if by_position { self.cols } else { 0 });
        let mut scale_model = ScaleModel::new();
        Tensor::from_codes(self.encoding, self.rows.len(), self.cols, |row, codes, scales| {
            if let Some(given) = given {
                given.read_ternary_row(row, codes, scales);
            }
            if by_position {
                positions.code(coder, &mut shared, codes);
            } else {
                codes.iter_mut().for_each(|code| {
                    *code = code_from(*code, |what, decision| shared[what].decide(coder, decision));
                });
            }
            for scale in scales {
                *scale = f16::from_bits(scale_model.code(coder, scale.to_bits()));
            }
        })
    }

    /// Codes blocks in place.
    fn code_blocks(&self, coder: &mut impl Coder, blocks: &mut [u8]) {
        let mut fields = fields(self.encoding);
        for block in blocks.chunks_exact_mut(self.encoding.block_bytes()) {
            let mut rest = block;
            for field in &mut fields {
                let (bytes, others) = rest.split_at_mut(field.bytes());
                field.code(coder, bytes);
                rest = others;
            }
        }
    }
}

/// The decision whether a code is zero.
const ZERO: usize = 0;
/// The decision whether a code that is not zero is +1.
const PLUS: usize = 1;

/// Codes one ternary code by its one or two decisions.
#[inline(always)]
fn code_from(code: i8, mut decide: impl FnMut(usize, bool) -> bool) -> i8 {
    if decide(ZERO, code == 0) {
        0
    } else if decide(PLUS, code == 1) {
        1
    } else {
        -1
    }
}

/// Models codes by the zero and sign fractions of their row and column so far.
struct PositionModel {
    /// Models of each column.
    columns: Vec<[BitModel; 2]>,
    /// Models of each pair of classes, of row and column.
    cells: [[Option<BitModel>; CLASSES * CLASSES]; 2],
}

/// Classes of probabilities: intervals of 1/2 in log-odds.
const CLASSES: usize = 32;
/// Count of a new cell, whose probability is that of the shared model.
const NEW_CELL_COUNT: u32 = 12;

impl PositionModel {
    fn new(cols: usize) -> Self {
        Self { columns: vec![[BitModel::EVEN; 2]; cols], cells: [[None; CLASSES * CLASSES]; 2] }
    }

    /// Codes a row. `shared` learns from all rows of the chunk.
    fn code(&mut self, coder: &mut impl Coder, shared: &mut [BitModel; 2], codes: &mut [i8]) {
        let class = |model: BitModel| ((stretch(model.p()) + 2048) >> 7) as usize;
        let mut row = [BitModel::EVEN; 2];
        for (code, column) in codes.iter_mut().zip(&mut self.columns) {
            *code = code_from(*code, |what, decision| {
                let cell = &mut self.cells[what][class(row[what]) * CLASSES + class(column[what])];
                let cell = cell.get_or_insert(BitModel::new(shared[what].p(), NEW_CELL_COUNT));
                let decision = cell.decide(coder, decision);
                row[what].learn(decision);
                column[what].learn(decision);
                shared[what].learn(decision);
                decision
            });
        }
    }
}

/// Models numbers of 16 or 32 bits: the upper 10 bits by a bit tree, each other bit by its position.
struct NumberModel {
    upper: Vec<BitModel>,
    lower: [BitModel; 32],
}

impl NumberModel {
    const UPPER: u32 = 10;

    fn new() -> Self {
        Self { upper: vec![BitModel::EVEN; 1 << Self::UPPER], lower: [BitModel::EVEN; 32] }
    }

    fn code(&mut self, coder: &mut impl Coder, bits: u32, value: u32) -> u32 {
        let rest = bits - Self::UPPER;
        let mut found = bit_tree(coder, &mut self.upper, Self::UPPER, value >> rest);
        for bit in (0..rest).rev() {
            found = found << 1 | u32::from(self.lower[bit as usize].decide(coder, value >> bit & 1 == 1));
        }
        found
    }
}

/// Models scales: whether a scale equals the one before, and its bits if not.
struct ScaleModel {
    last: u16,
    /// Models of the decision, by whether the scale before was equal to its predecessor.
    same: [BitModel; 2],
    was_same: bool,
    numbers: NumberModel,
}

impl ScaleModel {
    fn new() -> Self {
        Self { last: 0, same: [BitModel::EVEN; 2], was_same: false, numbers: NumberModel::new() }
    }

    fn code(&mut self, coder: &mut impl Coder, scale: u16) -> u16 {
        self.was_same = self.same[usize::from(self.was_same)].decide(coder, scale == self.last);
        if !self.was_same {
            self.last = self.numbers.code(coder, 16, scale.into()) as u16;
        }
        self.last
    }
}

/// A field of a block, with its bit models.
enum Field {
    /// An f16 scale or minimum.
    Scale(ScaleModel),
    /// A little-endian number of this many bytes.
    Number(NumberModel, usize),
    /// This many bytes.
    Bytes(Vec<BitModel>, usize),
    /// This many bytes of two 4-bit codes each.
    Nibbles(Vec<BitModel>, usize),
}

/// The fields of a block, in order.
fn fields(encoding: Encoding) -> Vec<Field> {
    let scale = || Field::Scale(ScaleModel::new());
    let number = |bytes| Field::Number(NumberModel::new(), bytes);
    let bytes = |n| Field::Bytes(vec![BitModel::EVEN; 1 << 8], n);
    let nibbles = |n| Field::Nibbles(vec![BitModel::EVEN; 1 << 4], n);
    match encoding {
        Encoding::F32 => vec![number(4)],
        Encoding::F16 | Encoding::Bf16 => vec![number(2)],
        Encoding::Q8_0 => vec![scale(), bytes(32)],
        Encoding::Q4_0 => vec![scale(), nibbles(16)],
        Encoding::Q4_1 => vec![scale(), scale(), nibbles(16)],
        Encoding::Q4K => vec![scale(), scale(), bytes(12), nibbles(128)],
        Encoding::Q6K => vec![nibbles(128), bytes(64), bytes(16), scale()],
        _ => unreachable!("ternary encodings are coded by `code_ternary`"),
    }
}

impl Field {
    fn bytes(&self) -> usize {
        match *self {
            Self::Scale(_) => 2,
            Self::Number(_, bytes) | Self::Bytes(_, bytes) | Self::Nibbles(_, bytes) => bytes,
        }
    }

    fn code(&mut self, coder: &mut impl Coder, bytes: &mut [u8]) {
        match self {
            Self::Scale(scales) => {
                let scale = scales.code(coder, u16::from_le_bytes([bytes[0], bytes[1]]));
                bytes.copy_from_slice(&scale.to_le_bytes());
            }
            Self::Number(numbers, _) => {
                let value = bytes.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte));
                let found = numbers.code(coder, 8 * bytes.len() as u32, value).to_le_bytes();
                bytes.iter_mut().zip(found).for_each(|(byte, found)| *byte = found);
            }
            Self::Bytes(models, _) => {
                for byte in bytes {
                    *byte = bit_tree(coder, models, 8, (*byte).into()) as u8;
                }
            }
            Self::Nibbles(models, _) => {
                for byte in bytes {
                    let low = bit_tree(coder, models, 4, (*byte & 15).into());
                    *byte = (low | bit_tree(coder, models, 4, (*byte >> 4).into()) << 4) as u8;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    /// Entropy of a code in bits, `h2(z) + 1 - z`, with even signs.
    fn entropy(zeros: f64) -> f64 {
        let other = (1.0 - zeros) / 2.0;
        -[zeros, other, other].iter().filter(|p| **p > 0.0).map(|p| p * p.log2()).sum::<f64>()
    }

    /// A ternary matrix with one scale. `zeros(row, col)` is the probability of a zero.
    fn matrix(rows: usize, cols: usize, zeros: impl Fn(usize, usize) -> f64) -> Tensor {
        let mut rng = StdRng::seed_from_u64(3);
        let tensor =
            Tensor::from_codes(Encoding::Ternary { group: cols }, rows, cols, |row, codes, scales| {
                for (col, code) in codes.iter_mut().enumerate() {
                    *code = if rng.random_bool(zeros(row, col)) { 0 } else { 2 * rng.random_range(0..2) - 1 };
                }
                scales.fill(f16::from_f32(0.02));
            });
        tensor.unwrap()
    }

    /// Packs and unpacks a tensor, checks that it is unchanged, and returns its bits per weight.
    fn bits(tensor: &Tensor) -> f64 {
        let (n, chunks) = Chunk::all(tensor.encoding(), tensor.shape()).unwrap();
        let packed = chunks.map(|chunk| {
            let packed = chunk.pack(tensor);
            assert!(chunk.accepts_length(packed.len()));
            let rows = chunk.unpack(&packed).unwrap();
            assert_eq!(rows.bytes(), tensor.select_rows(chunk.rows.clone()).bytes());
            packed.len()
        });
        let packed: Vec<usize> = packed.collect();
        assert_eq!(packed.len(), n);
        8.0 * packed.iter().sum::<usize>() as f64 / (tensor.rows() * tensor.cols()) as f64
    }

    #[test]
    fn codes_cost_their_entropy() {
        for (rows, cols) in [(256, 400), (1000, 1100)] {
            for zeros in [0.31, 1.0 / 3.0, 0.5, 0.7, 0.8, 0.914, 0.95] {
                let tensor = matrix(rows, cols, |_, _| zeros);
                let (mut codes, mut scales) = (vec![0; cols], [f16::ZERO]);
                let (mut zero, mut plus) = (0.0, 0.0);
                for row in 0..rows {
                    tensor.read_ternary_row(row, &mut codes, &mut scales);
                    zero += codes.iter().filter(|code| **code == 0).count() as f64;
                    plus += codes.iter().filter(|code| **code == 1).count() as f64;
                }
                let n = (rows * cols) as f64;
                let ideal: f64 =
                    [zero, plus, n - zero - plus].iter().map(|count| -count / n * (count / n).log2()).sum();
                let found = bits(&tensor);
                assert!(found < 1.005 * ideal, "{rows} x {cols}, {zeros}: {found} of {ideal}");
                assert!((ideal - entropy(zeros)).abs() < 0.02);
            }
        }
    }

    #[test]
    fn rows_and_columns_cost_their_own_entropies() {
        let (rows, cols) = (1024, 1024);
        let spread = |i: usize| 0.3 + 0.69 * (i * 619 % 1024) as f64 / 1023.0;
        let ideal = (0..1024).map(|i| entropy(spread(i))).sum::<f64>() / 1024.0;
        for tensor in [matrix(rows, cols, |row, _| spread(row)), matrix(rows, cols, |_, col| spread(col))] {
            let found = bits(&tensor);
            assert!(found < 1.01 * ideal, "{found} of {ideal}");
        }
        // The cost of one probability for the whole chunk.
        let mean = (0..1024).map(spread).sum::<f64>() / 1024.0;
        assert!(entropy(mean) > 1.09 * ideal);
    }

    #[test]
    fn constants_are_small_and_noise_does_not_grow() {
        let zeros = matrix(1024, 2048, |_, _| 1.0);
        assert!(bits(&zeros) < 0.006);
        let mut rng = StdRng::seed_from_u64(5);
        for encoding in [Encoding::F32, Encoding::F16, Encoding::Q8_0, Encoding::Q6K, Encoding::Tq1_0] {
            let bytes = encoding.bytes(&[64, 256]).unwrap();
            let even = Tensor::new(vec![64, 256], encoding, vec![0; bytes]).unwrap();
            let least = 8.0 * bytes as f64 / (64.0 * 256.0);
            assert!(bits(&even) < least * 0.02, "{encoding}: {}", bits(&even));
            let noise = (0..bytes).map(|_| rng.random()).collect::<Vec<u8>>();
            assert!(bits(&Tensor::new(vec![64, 256], encoding, noise).unwrap()) <= least);
        }
    }

    #[test]
    fn scales_and_floats_shrink() {
        let mut rng = StdRng::seed_from_u64(7);
        let mut normal = || (0..12).map(|_| rng.random_range(0.0..1.0f32)).sum::<f32>() - 6.0;
        let values: Vec<f32> = (0..256 * 256).map(|_| 0.02 * normal()).collect();
        let floats = Tensor::f32(&[256, 256], &values).unwrap();
        assert!(bits(&floats) < 27.5, "{}", bits(&floats)); // a normal distribution in steps of 2^-23
        for (encoding, most) in [(Encoding::F16, 13.9), (Encoding::Q8_0, 8.1), (Encoding::Q4_0, 4.2)] {
            let found = bits(&floats.encode(encoding).unwrap());
            assert!(found < most, "{encoding}: {found}");
        }
        // One scale per row costs the same, whether it is stored once or in every block of the row.
        let tensor = matrix(256, 1024, |_, _| 0.9);
        let blocks = tensor.encode(Encoding::Tq2_0).unwrap();
        assert!(bits(&blocks) < bits(&tensor) + 0.001);
    }
}
