//! [`Encoding`]: how the values of a tensor are stored.

use crate::FormatError;
use std::{fmt, str::FromStr};

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
    Ternary {
        group: usize,
    },
}

/// A type of GGML.
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

    /// The number of the type in GGUF files; `None` for what exists in memory only.
    pub fn ggml_type(self) -> Option<u32> {
        self.ggml().map(|known| known.number)
    }

    /// The inverse of [`ggml_type`](Self::ggml_type); `None` for types that we do not read.
    pub fn from_ggml_type(number: u32) -> Option<Self> {
        GGML.iter().find(|known| known.number == number).map(|known| known.encoding)
    }

    /// Whether all values are -1, 0 or +1 times a scale.
    pub fn is_ternary(self) -> bool {
        matches!(self, Self::Tq1_0 | Self::Tq2_0 | Self::Q2_0 | Self::Ternary { .. })
    }

    /// Weights that are stored together: row lengths are multiples of it.
    pub fn block_weights(self) -> usize {
        match self {
            Self::Ternary { group } => group,
            _ => self.ggml().map_or(1, |known| known.block_weights),
        }
    }

    /// Bytes of [`block_weights`](Self::block_weights) weights; 0 in memory, where codes and scales are apart.
    pub(crate) fn block_bytes(self) -> usize {
        self.ggml().map_or(0, |known| known.block_bytes)
    }

    /// Where the f16 scales and minimums are in a block; none where weights are floats or scales are apart.
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

    /// Bytes of a tensor of `shape`.
    ///
    /// # Errors
    /// `Shape`: no dimension, no weights, or too many. `RowLength`: rows that are no whole number of blocks.
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
        // The number of weights must fit as well, although few bytes may hold many.
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

    /// A GGML name in any case, such as `TQ2_0`.
    fn from_str(name: &str) -> Result<Self, String> {
        let known = GGML.iter().find(|known| known.name.eq_ignore_ascii_case(name));
        known.map(|known| known.encoding).ok_or_else(|| {
            let names: Vec<&str> = GGML.iter().map(|known| known.name).collect();
            format!("`{name}`: expected one of {}", names.join(", "))
        })
    }
}
