//! Quantized tables: token embedding and output head.

use super::{
    Granularity, QuantConfig, ScheduleHandle, TablePrecision, TernaryQuantizer, TernaryQuantizerConfig,
};
use crate::ops::{RowScale, absmax_quantize, absmax_scales};
use burn::tensor::Tensor;

const INT8_LEVELS: f32 = 127.0;
const INT4_LEVELS: f32 = 7.0;

impl TablePrecision {
    /// The table in the forward pass: fake-quantized with one f16 scale per row, straight-through gradient.
    ///
    /// # Shapes
    /// `[rows, d]` to the same
    pub fn fake_quantize(self, table: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Float => table,
            Self::Int8 => absmax_quantize(table, INT8_LEVELS, RowScale::F16),
            Self::Int4 => absmax_quantize(table, INT4_LEVELS, RowScale::F16),
            Self::Ternary => {
                let dims = table.dims();
                let (quantizer, flat) = row_quantizer(table);
                quantizer.fake_quantize(flat).reshape(dims)
            }
        }
    }

    /// The scales of the rows, exactly representable in f16; `None` for a float table.
    ///
    /// # Shapes
    /// `[rows, d]` to `[rows]`
    pub fn scales(self, table: Tensor<2>) -> Option<Tensor<1>> {
        Some(match self {
            Self::Float => return None,
            Self::Int8 => absmax_scales(table, INT8_LEVELS),
            Self::Int4 => absmax_scales(table, INT4_LEVELS),
            Self::Ternary => {
                let [rows, _] = table.dims();
                let (quantizer, flat) = row_quantizer(table);
                quantizer.scales(flat).reshape([rows])
            }
        })
    }

    /// Bytes of a packed `[rows, d]` table: codes of 1.6, 4, 8 or 32 bits, and one f16 scale per row.
    pub fn bytes(self, rows: usize, d: usize) -> usize {
        match self {
            Self::Float => rows * d * 4,
            Self::Int8 => rows * (d + 2),
            Self::Int4 => rows * (d.div_ceil(2) + 2),
            Self::Ternary => rows * (d.div_ceil(5) + 2),
        }
    }
}

/// The quantizer of a ternary table, with the flat view of the table in which each row is a group.
fn row_quantizer(table: Tensor<2>) -> (TernaryQuantizer, Tensor<2>) {
    let [rows, d] = table.dims();
    let config = QuantConfig { granularity: Granularity::PerGroup(d), ..QuantConfig::default() };
    let flat = table.reshape([rows * d, 1]);
    (TernaryQuantizerConfig::new(&config, &ScheduleHandle::default()).init(&flat), flat)
}
