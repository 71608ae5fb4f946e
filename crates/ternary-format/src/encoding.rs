//! [`Encoding`]: the storage type of a tensor's values.

use crate::FormatError;
use std::{fmt, str::FromStr};

/// How the values of a tensor are stored.
///
/// All variants but [`Ternary`](Self::Ternary) are GGML types, with the block layouts of GGUF files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16: the upper half of an F32.
    Bf16,
    /// 8-bit codes; one f16 scale per 32 weights.
    Q8_0,
    /// 4-bit codes; one f16 scale per 32 weights.
    Q4_0,
    /// 4-bit codes; one f16 scale and one f16 minimum per 32 weights.
    Q4_1,
    /// 4-bit codes; one 6-bit scale and minimum per 32 weights, one f16 scale and minimum per 256.
    Q4K,
    /// 6-bit codes; one 8-bit scale per 16 weights, one f16 scale per 256.
    Q6K,
    /// Ternary codes in base 3, five per byte; one f16 scale per 256 weights.
    Tq1_0,
    /// Ternary codes of 2 bits; one f16 scale per 256 weights.
    Tq2_0,
    /// Ternary codes of 2 bits; one f16 scale per 64 weights.
    Q2_0,
    /// Ternary codes of 2 bits with any group size. In memory and in archives only.
    ///
    /// ```text
    /// [codes of row 0] [codes of row 1] ... [scales of row 0] [scales of row 1] ...
    ///
    /// byte b of a row = sum over i in 0..4 of (code(4b + i) + 1) << 2i       rows are padded to whole bytes
    /// scales of a row = one f16 per `group` consecutive weights
    /// ```
    Ternary {
        /// Weights per scale; the row length for one scale per row.
        group: usize,
    },
}

/// A GGML type.
struct Ggml {
    encoding: Encoding,
    number: u32,
    name: &'static str,
    block_weights: usize,
    block_bytes: usize,
}

const fn ggml(encoding: Encoding, number: u32, name: &'static str, block: (usize, usize)) -> Ggml {
    Ggml { encoding, number, name, block_weights: block.0, block_bytes: block.1 }
}

const GGML: [Ggml; 11] = [
    ggml(Encoding::F32, 0, "F32", (1, 4)),
    ggml(Encoding::F16, 1, "F16", (1, 2)),
    ggml(Encoding::Q4_0, 2, "Q4_0", (32, 18)),
    ggml(Encoding::Q4_1, 3, "Q4_1", (32, 20)),
    ggml(Encoding::Q8_0, 8, "Q8_0", (32, 34)),
    ggml(Encoding::Q4K, 12, "Q4_K", (256, 144)),
    ggml(Encoding::Q6K, 14, "Q6_K", (256, 210)),
    ggml(Encoding::Bf16, 30, "BF16", (1, 2)),
    ggml(Encoding::Tq1_0, 34, "TQ1_0", (256, 54)),
    ggml(Encoding::Tq2_0, 35, "TQ2_0", (256, 66)),
    ggml(Encoding::Q2_0, 42, "Q2_0", (64, 18)),
];

impl Encoding {
    fn ggml(self) -> Option<&'static Ggml> {
        GGML.iter().find(|known| known.encoding == self)
    }

    /// Number of the type in GGUF files; `None` for [`Ternary`](Self::Ternary).
    pub fn ggml_type(self) -> Option<u32> {
        self.ggml().map(|known| known.number)
    }

    /// The inverse of [`ggml_type`](Self::ggml_type); `None` for types that this crate does not read.
    pub fn from_ggml_type(number: u32) -> Option<Self> {
        GGML.iter().find(|known| known.number == number).map(|known| known.encoding)
    }

    /// Returns whether every value is -1, 0 or +1 times a scale.
    pub fn is_ternary(self) -> bool {
        matches!(self, Self::Tq1_0 | Self::Tq2_0 | Self::Q2_0 | Self::Ternary { .. })
    }

    /// Weights per block. The length of a row is a multiple of it.
    pub fn block_weights(self) -> usize {
        match self {
            Self::Ternary { group } => group,
            _ => self.ggml().map_or(1, |known| known.block_weights),
        }
    }

    /// Bytes per block; 0 for `Ternary`, whose codes and scales are stored separately.
    pub(crate) fn block_bytes(self) -> usize {
        self.ggml().map_or(0, |known| known.block_bytes)
    }

    /// Byte offsets of the f16 scales and minimums in a block; empty where a block has none.
    pub(crate) fn scale_offsets(self) -> &'static [usize] {
        match self {
            Self::Q8_0 | Self::Q4_0 | Self::Q2_0 => &[0],
            Self::Q4_1 | Self::Q4K => &[0, 2],
            Self::Q6K => &[208],
            Self::Tq1_0 => &[52],
            Self::Tq2_0 => &[64],
            Self::F32 | Self::F16 | Self::Bf16 | Self::Ternary { .. } => &[],
        }
    }

    /// Codes that the encoding can store, for error messages.
    pub(crate) fn code_range(self) -> &'static str {
        match self {
            Self::Q8_0 => "-128, -127, ..., 127",
            Self::Q4_0 => "-8, -7, ..., 7",
            _ => "-1, 0, +1",
        }
    }

    /// Size of a tensor of `shape`, in bytes.
    ///
    /// # Errors
    /// `Shape`: no dimension, no weights, or more than memory can address. `RowLength`: a row that is not a whole
    /// number of blocks.
    pub fn bytes(self, shape: &[usize]) -> Result<usize, FormatError> {
        let cols = *shape.last().ok_or(FormatError::Shape { shape: vec![] })?;
        let block = self.block_weights();
        if block == 0 || cols % block != 0 {
            return Err(FormatError::RowLength { encoding: self, cols, block });
        }
        let blocks = cols / block;
        let row = match self {
            Self::Ternary { .. } => {
                blocks.checked_mul(2).and_then(|scales| scales.checked_add(cols.div_ceil(4)))
            }
            _ => blocks.checked_mul(self.block_bytes()),
        };
        // The number of weights must fit in a `usize` as well, although a few bytes may store many weights.
        let weights = shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
        let rows = shape[..shape.len() - 1].iter().try_fold(1usize, |product, &n| product.checked_mul(n));
        weights
            .and(row)
            .zip(rows)
            .and_then(|(row, rows)| row.checked_mul(rows))
            .filter(|&bytes| 0 < bytes && bytes <= isize::MAX as usize)
            .ok_or_else(|| FormatError::Shape { shape: shape.into() })
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.ggml().map_or("ternary", |known| known.name))
    }
}

impl FromStr for Encoding {
    type Err = String;

    /// Parses a GGML name in any case, such as `TQ2_0`.
    fn from_str(name: &str) -> Result<Self, String> {
        let known = GGML.iter().find(|known| known.name.eq_ignore_ascii_case(name));
        known.map(|known| known.encoding).ok_or_else(|| {
            let names: Vec<&str> = GGML.iter().map(|known| known.name).collect();
            format!("`{name}`: expected one of {}", names.join(", "))
        })
    }
}
