use super::{Dial, Granularity, QuantConfig, TablePrecision, TernaryQuantizerConfig};
use crate::ops::absmax_quantize;
use burn::tensor::Tensor;

impl TablePrecision {
    /// The table as the forward pass sees it: fake quantized with one scale a row, straight-through gradient.
    ///
    /// # Shapes
    /// `[rows, d]` to the same
    pub fn fake_quantize(self, table: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Float => table,
            Self::Int8 => absmax_quantize(table, 127.0),
            Self::Int4 => absmax_quantize(table, 7.0),
            Self::Ternary => {
                let [rows, d] = table.dims();
                // A row is a group of the table's flat view.
                let config = QuantConfig { granularity: Granularity::PerGroup(d), ..QuantConfig::default() };
                let flat = table.reshape([rows * d, 1]);
                let quantizer = TernaryQuantizerConfig::new(&config, &Dial::default()).init(&flat);
                quantizer.fake_quantize(flat).reshape([rows, d])
            }
        }
    }

    /// Bytes of `[rows, d]` when packed: codes at 1.6, 4, 8 or 32 bits, and an f16 scale a row.
    pub fn bytes(self, rows: usize, d: usize) -> usize {
        match self {
            Self::Float => rows * d * 4,
            Self::Int8 => rows * (d + 2),
            Self::Int4 => rows * (d.div_ceil(2) + 2),
            Self::Ternary => rows * (d.div_ceil(5) + 2),
        }
    }
}
