//! Matrices and embedding tables, in each of the types that a graph can store.
//!
//! | weight type | stored | node |
//! |---|---|---|
//! | `INT2` | `[in, out]` 2-bit integers, scales `[out]` or `[groups, out]` | `DequantizeLinear`, `MatMul` |
//! | `MATMULNBITS2`, `MATMULNBITS4` | `[out, blocks, bytes]` unsigned codes, scales `[out, blocks]` | `MatMulNBits` of onnxruntime |
//! | `F32`, `F16` | `[in, out]` | `Cast` to f32, `MatMul` |

use super::graph::{Element, GraphBuilder, Value, int, ints};
use crate::{Encoding, FormatError, Tensor, WeightType};
use half::f16;

/// Domain of the operators of onnxruntime.
pub(super) const MICROSOFT: &str = "com.microsoft";

/// Weights per scale of an 8-bit table, as in `Q8_0`.
const TABLE_BLOCK: usize = 32;

/// `x W^T` for a matrix `W`.
///
/// # Shapes
/// W `[out, in]`
///
/// # Errors
/// `NotTernary`, `Group`: the matrix does not fit the type. `OnnxSize`: the file would be too large.
pub(super) fn matmul(
    graph: &mut GraphBuilder,
    input: &Value,
    matrix: &Tensor,
    weight_type: WeightType,
) -> Result<Value, FormatError> {
    let name = format!("{}.weight", graph.scope);
    match weight_type {
        WeightType::Int2 => {
            let weight = int2(graph, &name, matrix)?;
            Ok(graph.op("MatMul", &[input, &weight], &[]))
        }
        WeightType::MatMulNBits(bits) => {
            let stored = BlockedMatrix::ternary(graph, &name, matrix, bits.into())?;
            Ok(stored.matmul(graph, input))
        }
        WeightType::Encoded(encoding) => {
            let weight = transposed(graph, &name, matrix, encoding)?;
            let weight = to_float(graph, weight, encoding);
            Ok(graph.op("MatMul", &[input, &weight], &[]))
        }
        WeightType::Bitnet => Err(unsupported(weight_type)),
    }
}

pub(super) fn unsupported(found: WeightType) -> FormatError {
    FormatError::WeightType { found, expected: "INT2, MATMULNBITS2, MATMULNBITS4, F32 or F16" }
}

/// Weights per scale and the scales of a ternary matrix. If all scales of each row are equal, this is one scale per
/// row.
fn scales(matrix: &Tensor) -> Result<(usize, Vec<f16>), FormatError> {
    let cols = matrix.cols();
    let Some(group) = matrix.ternary_group() else {
        let expected = Encoding::Ternary { group: cols };
        return Err(FormatError::NotTernary { found: matrix.encoding(), expected });
    };
    let mut codes = vec![0; cols];
    let mut scales = vec![f16::ZERO; matrix.rows() * cols / group];
    for (row, scales) in scales.chunks_mut(cols / group).enumerate() {
        matrix.read_ternary_row(row, &mut codes, scales);
    }
    let one_per_row = scales.chunks(cols / group).all(|row| row.iter().all(|scale| *scale == row[0]));
    if !one_per_row {
        return Ok((group, scales));
    }
    Ok((cols, scales.into_iter().step_by(cols / group).collect()))
}

/// Codes of a row.
fn codes<'a>(matrix: &Tensor, row: usize, codes: &'a mut [i8]) -> &'a [i8] {
    let mut scales = vec![f16::ZERO; codes.len() / matrix.ternary_group().expect("a ternary matrix")];
    matrix.read_ternary_row(row, codes, &mut scales);
    codes
}

/// A matrix as 2-bit integers `[in, out]` with their scales, dequantized.
///
/// # Source
/// ONNX, `DequantizeLinear` 25. onnxruntime does not fuse the other order, `[out, in]` and a `Transpose`: it then
/// multiplies floats.
fn int2(graph: &mut GraphBuilder, name: &str, matrix: &Tensor) -> Result<Value, FormatError> {
    let [rows, cols] = [matrix.rows(), matrix.cols()];
    let (group, scales) = scales(matrix)?;
    let length = (rows * cols).div_ceil(4);
    let stored = graph.initializer(name, Element::Int2, &[cols, rows], length, || {
        let mut bytes = vec![0; length];
        let mut buffer = vec![0; cols];
        for row in 0..rows {
            for (col, &code) in codes(matrix, row, &mut buffer).iter().enumerate() {
                let index = col * rows + row;
                bytes[index / 4] |= (code as u8 & 3) << (2 * (index % 4));
            }
        }
        bytes
    })?;
    let groups = cols / group;
    let indices = (0..groups).flat_map(|group| (0..rows).map(move |row| row * groups + group));
    let values: Vec<f32> = indices.map(|index| scales[index].to_f32()).collect();
    let scale_name = format!("{}.scale", graph.scope);
    if groups == 1 {
        let scale = floats(graph, &scale_name, &[rows], values)?;
        return Ok(graph.op("DequantizeLinear", &[&stored, &scale], &[int("axis", 1)]));
    }
    let scale = floats(graph, &scale_name, &[groups, rows], values)?;
    let attributes = [int("axis", 0), int("block_size", group)];
    Ok(graph.op("DequantizeLinear", &[&stored, &scale], &attributes))
}

/// A matrix `[out, in]` in blocks of unsigned integers, for onnxruntime's `MatMulNBits`.
///
/// # Source
/// onnxruntime, `docs/ContribOperators.md`, `com.microsoft.MatMulNBits`: `B` is `[out, blocks, bytes]`, low bits
/// first, and a code represents `code - 2^(bits - 1)`.
pub(super) struct BlockedMatrix {
    codes: Value,
    scales: Value,
    shape: [usize; 2],
    bits: usize,
    block: usize,
}

impl BlockedMatrix {
    /// Creates the initializers. `fill(row, codes, scales)` writes a row.
    fn new(
        graph: &mut GraphBuilder,
        name: &str,
        [rows, cols]: [usize; 2],
        [bits, block]: [usize; 2],
        mut fill: impl FnMut(usize, &mut [i8], &mut [f32]),
    ) -> Result<Self, FormatError> {
        let blocks = cols.div_ceil(block);
        let bytes = blocks * block * bits / 8;
        let mut scales = vec![0.0; rows * blocks];
        let dims = [rows, blocks, block * bits / 8];
        let stored = graph.initializer(name, Element::Uint8, &dims, rows * bytes, || {
            let mut data = vec![0; rows * bytes];
            let mut codes = vec![0i8; blocks * block];
            let rows = data.chunks_mut(bytes).zip(scales.chunks_mut(blocks));
            for (row, (data, scales)) in rows.enumerate() {
                fill(row, &mut codes[..cols], scales);
                for (index, &code) in codes.iter().enumerate() {
                    let unsigned = (i16::from(code) + (1 << (bits - 1))) as u8;
                    data[index * bits / 8] |= unsigned << (index * bits % 8);
                }
            }
            data
        })?;
        let scales = floats(graph, &format!("{}.scale", graph.scope), &[rows, blocks], scales)?;
        Ok(Self { codes: stored, scales, shape: [rows, cols], bits, block })
    }

    /// A ternary matrix in 2 or 4 bits.
    fn ternary(
        graph: &mut GraphBuilder,
        name: &str,
        matrix: &Tensor,
        bits: usize,
    ) -> Result<Self, FormatError> {
        let shape = [matrix.rows(), matrix.cols()];
        let (group, scales) = scales(matrix)?;
        // The largest block that divides a group. If the whole row is one group, the last block of a row may extend
        // past its end.
        let block = [128, 64, 32, 16].into_iter().find(|block| group % block == 0);
        let block = block.or((group == shape[1]).then_some(32)).ok_or(FormatError::Group { group })?;
        let groups = shape[1] / group;
        Self::new(graph, name, shape, [bits, block], |row, buffer, block_scales| {
            codes(matrix, row, buffer);
            for (index, scale) in block_scales.iter_mut().enumerate() {
                *scale = scales[row * groups + index * block / group].to_f32();
            }
        })
    }

    /// An embedding table in 8 bits, with the codes and scales of `Q8_0`.
    fn table(graph: &mut GraphBuilder, name: &str, table: &Tensor) -> Result<Self, FormatError> {
        let table = table.encode(Encoding::Q8_0)?;
        let shape = [table.rows(), table.cols()];
        let row_bytes = table.bytes().len() / shape[0];
        Self::new(graph, name, shape, [8, TABLE_BLOCK], |row, codes, scales| {
            let blocks = table.bytes()[row * row_bytes..][..row_bytes].chunks(2 + TABLE_BLOCK);
            for ((block, codes), scale) in blocks.zip(codes.chunks_mut(TABLE_BLOCK)).zip(scales) {
                *scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
                codes.iter_mut().zip(&block[2..]).for_each(|(code, &byte)| *code = byte as i8);
            }
        })
    }

    fn matmul(&self, graph: &mut GraphBuilder, input: &Value) -> Value {
        let [out, inputs] = self.shape;
        let attributes = [
            int("K", inputs),
            int("N", out),
            int("bits", self.bits),
            int("block_size", self.block),
            int("accuracy_level", 4), // int8 activations
        ];
        graph.node(MICROSOFT, "MatMulNBits", &[input, &self.codes, &self.scales], &attributes, 1).remove(0)
    }
}

/// The token embedding or the output head.
pub(super) enum Table {
    /// `[d, vocab]`, so that it multiplies without a transpose.
    Float(Value, Encoding),
    /// `[vocab, blocks, block]`
    Blocked(BlockedMatrix),
}

impl Table {
    /// Stores a table.
    ///
    /// # Errors
    /// `WeightType`: not F32, F16 or Q8_0. `RowLength`: rows that are not whole blocks. `OnnxSize`.
    pub fn new(graph: &mut GraphBuilder, table: &Tensor, encoding: Encoding) -> Result<Self, FormatError> {
        let name = format!("{}.weight", graph.scope);
        match encoding {
            Encoding::F32 | Encoding::F16 => {
                Ok(Self::Float(transposed(graph, &name, table, encoding)?, encoding))
            }
            Encoding::Q8_0 => Ok(Self::Blocked(BlockedMatrix::table(graph, &name, table)?)),
            other => {
                let found = WeightType::Encoded(other);
                Err(FormatError::WeightType { found, expected: "F32, F16 or Q8_0" })
            }
        }
    }

    /// Looks up the rows of `ids`.
    ///
    /// # Shapes
    /// `[batch, seq]` to `[batch, seq, d]`
    pub fn rows(&self, graph: &mut GraphBuilder, ids: &Value) -> Value {
        match self {
            Self::Float(table, encoding) => {
                let columns = graph.op("Gather", &[table, ids], &[int("axis", 1)]);
                let columns = to_float(graph, columns, *encoding);
                graph.op("Transpose", &[&columns], &[ints("perm", &[1, 2, 0])])
            }
            Self::Blocked(table) => {
                let codes = graph.op("Gather", &[&table.codes, ids], &[int("axis", 0)]);
                let codes = graph.op("Cast", &[&codes], &[int("to", Element::Float as usize)]);
                let zero = graph.float(128.0);
                let codes = graph.op("Sub", &[&codes, &zero], &[]);
                let scales = graph.op("Gather", &[&table.scales, ids], &[int("axis", 0)]);
                let last = graph.ints(&[-1]);
                let scales = graph.op("Unsqueeze", &[&scales, &last], &[]);
                let values = graph.op("Mul", &[&codes, &scales], &[]);
                let shape = graph.ints(&[0, 0, table.shape[1] as i64]);
                graph.op("Reshape", &[&values, &shape], &[])
            }
        }
    }

    /// The product with every row.
    ///
    /// # Shapes
    /// `[batch, seq, d]` to `[batch, seq, vocab]`
    pub fn matmul(&self, graph: &mut GraphBuilder, input: &Value) -> Value {
        match self {
            Self::Float(table, encoding) => {
                let table = to_float(graph, table.clone(), *encoding);
                graph.op("MatMul", &[input, &table], &[])
            }
            Self::Blocked(table) => table.matmul(graph, input),
        }
    }
}

/// A constant tensor of f32.
pub(super) fn floats(
    graph: &mut GraphBuilder,
    name: &str,
    dims: &[usize],
    values: Vec<f32>,
) -> Result<Value, FormatError> {
    graph.initializer(name, Element::Float, dims, 4 * values.len(), || {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    })
}

/// A constant tensor `[in, out]` in F32 or F16, from a matrix `[out, in]`.
fn transposed(
    graph: &mut GraphBuilder,
    name: &str,
    matrix: &Tensor,
    encoding: Encoding,
) -> Result<Value, FormatError> {
    let [rows, cols] = [matrix.rows(), matrix.cols()];
    let (element, size) = match encoding {
        Encoding::F32 => (Element::Float, 4),
        Encoding::F16 => (Element::Float16, 2),
        other => return Err(unsupported(WeightType::Encoded(other))),
    };
    let matrix = matrix.encode(encoding)?;
    graph.initializer(name, element, &[cols, rows], size * rows * cols, || {
        let mut bytes = vec![0; size * rows * cols];
        let mut values = vec![0.0; cols];
        for row in 0..rows {
            matrix.read_row(row, &mut values);
            for (col, &value) in values.iter().enumerate() {
                let target = &mut bytes[size * (col * rows + row)..][..size];
                match element {
                    Element::Float16 => target.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
                    _ => target.copy_from_slice(&value.to_le_bytes()),
                }
            }
        }
        bytes
    })
}

/// Casts to f32 if needed.
fn to_float(graph: &mut GraphBuilder, value: Value, encoding: Encoding) -> Value {
    match encoding {
        Encoding::F16 => graph.op("Cast", &[&value], &[int("to", Element::Float as usize)]),
        _ => value,
    }
}
