//! Matrices and tables, in each of the forms that a graph can hold them in.

use super::graph::{Builder, Element, Value, int, ints};
use crate::{Encoding, FormatError, Tensor, WeightType};
use half::f16;

/// The domain of onnxruntime's own operators.
pub(super) const MICROSOFT: &str = "com.microsoft";

/// Weights that share a scale in the 8-bit form, that of `Q8_0`.
const TABLE_BLOCK: usize = 32;

/// `input W^T` for a matrix `W` of `[out, in]`.
///
/// # Errors
/// `NotTernary`, `Group`: the matrix does not fit the form. `OnnxSize`.
pub(super) fn matmul(
    graph: &mut Builder,
    input: &Value,
    matrix: &Tensor,
    form: WeightType,
) -> Result<Value, FormatError> {
    let name = format!("{}.weight", graph.scope);
    match form {
        WeightType::Int2 => {
            let weight = int2(graph, &name, matrix)?;
            Ok(graph.op("MatMul", &[input, &weight], &[]))
        }
        WeightType::MatMulNBits(bits) => {
            let stored = Blocks::ternary(graph, &name, matrix, bits.into())?;
            Ok(stored.matmul(graph, input))
        }
        WeightType::Encoded(encoding) => {
            let weight = transposed(graph, &name, matrix, encoding)?;
            let weight = to_float(graph, weight, encoding);
            Ok(graph.op("MatMul", &[input, &weight], &[]))
        }
        WeightType::Bitnet => Err(unfit(form)),
    }
}

pub(super) fn unfit(found: WeightType) -> FormatError {
    FormatError::WeightType { found, expected: "INT2, MATMULNBITS2, MATMULNBITS4, F32 or F16" }
}

/// The scales of a ternary matrix, and how many weights of a row share one: a whole row wherever that says the same.
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
    let one_a_row = scales.chunks(cols / group).all(|row| row.iter().all(|scale| *scale == row[0]));
    if !one_a_row {
        return Ok((group, scales));
    }
    Ok((cols, scales.into_iter().step_by(cols / group).collect()))
}

/// The codes of a row.
fn codes<'a>(matrix: &Tensor, row: usize, codes: &'a mut [i8]) -> &'a [i8] {
    let mut scales = vec![f16::ZERO; codes.len() / matrix.ternary_group().expect("a ternary matrix")];
    matrix.read_ternary_row(row, codes, &mut scales);
    codes
}

/// A matrix as two-bit integers `[in, out]` and their scales, dequantized.
///
/// # Source
/// ONNX, `DequantizeLinear` 25. The other order, `[out, in]` and a `Transpose`, is not recognized by onnxruntime,
/// which then multiplies floats.
fn int2(graph: &mut Builder, name: &str, matrix: &Tensor) -> Result<Value, FormatError> {
    let [rows, cols] = [matrix.rows(), matrix.cols()];
    let (group, scales) = scales(matrix)?;
    let length = (rows * cols).div_ceil(4);
    let stored = graph.initializer(name, Element::Int2, &[cols, rows], length, || {
        let mut bytes = vec![0; length];
        let mut buffer = vec![0; cols];
        for row in 0..rows {
            for (col, &code) in codes(matrix, row, &mut buffer).iter().enumerate() {
                let place = col * rows + row;
                bytes[place / 4] |= (code as u8 & 3) << (2 * (place % 4));
            }
        }
        bytes
    })?;
    let groups = cols / group;
    let places = (0..groups).flat_map(|group| (0..rows).map(move |row| row * groups + group));
    let values: Vec<f32> = places.map(|place| scales[place].to_f32()).collect();
    let scale_name = format!("{}.scale", graph.scope);
    if groups == 1 {
        let scale = floats(graph, &scale_name, &[rows], values)?;
        return Ok(graph.op("DequantizeLinear", &[&stored, &scale], &[int("axis", 1)]));
    }
    let scale = floats(graph, &scale_name, &[groups, rows], values)?;
    let attributes = [int("axis", 0), int("block_size", group)];
    Ok(graph.op("DequantizeLinear", &[&stored, &scale], &attributes))
}

/// A matrix `[out, in]` in blocks of unsigned integers, as onnxruntime's `MatMulNBits` has them.
///
/// # Source
/// onnxruntime, `docs/ContribOperators.md`, `com.microsoft.MatMulNBits`: `B` is `[out, blocks, bytes]`, low bits first,
/// and a code stands for `code - 2^(bits - 1)`.
pub(super) struct Blocks {
    codes: Value,
    scales: Value,
    shape: [usize; 2],
    bits: usize,
    block: usize,
}

impl Blocks {
    /// `fill(row, codes, scales)` writes a row, whose codes are all zero before.
    fn new(
        graph: &mut Builder,
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
                for (place, &code) in codes.iter().enumerate() {
                    let unsigned = (i16::from(code) + (1 << (bits - 1))) as u8;
                    data[place * bits / 8] |= unsigned << (place * bits % 8);
                }
            }
            data
        })?;
        let scales = floats(graph, &format!("{}.scale", graph.scope), &[rows, blocks], scales)?;
        Ok(Self { codes: stored, scales, shape: [rows, cols], bits, block })
    }

    /// A ternary matrix in 2 or 4 bits.
    fn ternary(graph: &mut Builder, name: &str, matrix: &Tensor, bits: usize) -> Result<Self, FormatError> {
        let shape = [matrix.rows(), matrix.cols()];
        let (group, scales) = scales(matrix)?;
        // The largest block that no boundary of a group cuts; the last one of a row may be longer than what is left.
        let block = [128, 64, 32, 16].into_iter().find(|block| group % block == 0);
        let block = block.or((group == shape[1]).then_some(32)).ok_or(FormatError::Group { group })?;
        let groups = shape[1] / group;
        Self::new(graph, name, shape, [bits, block], |row, buffer, of_blocks| {
            codes(matrix, row, buffer);
            for (place, scale) in of_blocks.iter_mut().enumerate() {
                *scale = scales[row * groups + place * block / group].to_f32();
            }
        })
    }

    /// A table in 8 bits, with the codes and scales of `Q8_0`.
    fn table(graph: &mut Builder, name: &str, table: &Tensor) -> Result<Self, FormatError> {
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

    fn matmul(&self, graph: &mut Builder, input: &Value) -> Value {
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

/// The token embedding or the head.
pub(super) enum Table {
    /// `[d, vocab]`, so that it multiplies as it is.
    Float(Value, Encoding),
    /// `[vocab, blocks, block]`
    Blocks(Blocks),
}

impl Table {
    /// # Errors
    /// `WeightType`: not F32, F16 or Q8_0. `RowLength`: no whole blocks. `OnnxSize`.
    pub fn new(graph: &mut Builder, table: &Tensor, encoding: Encoding) -> Result<Self, FormatError> {
        let name = format!("{}.weight", graph.scope);
        match encoding {
            Encoding::F32 | Encoding::F16 => {
                Ok(Self::Float(transposed(graph, &name, table, encoding)?, encoding))
            }
            Encoding::Q8_0 => Ok(Self::Blocks(Blocks::table(graph, &name, table)?)),
            other => {
                let found = WeightType::Encoded(other);
                Err(FormatError::WeightType { found, expected: "F32, F16 or Q8_0" })
            }
        }
    }

    /// The rows of `ids`: `[batch, seq]` to `[batch, seq, d]`.
    pub fn rows(&self, graph: &mut Builder, ids: &Value) -> Value {
        match self {
            Self::Float(table, encoding) => {
                let columns = graph.op("Gather", &[table, ids], &[int("axis", 1)]);
                let columns = to_float(graph, columns, *encoding);
                graph.op("Transpose", &[&columns], &[ints("perm", &[1, 2, 0])])
            }
            Self::Blocks(table) => {
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

    /// The product with every row: `[batch, seq, d]` to `[batch, seq, vocab]`.
    pub fn matmul(&self, graph: &mut Builder, input: &Value) -> Value {
        match self {
            Self::Float(table, encoding) => {
                let table = to_float(graph, table.clone(), *encoding);
                graph.op("MatMul", &[input, &table], &[])
            }
            Self::Blocks(table) => table.matmul(graph, input),
        }
    }
}

/// An initializer of f32.
pub(super) fn floats(
    graph: &mut Builder,
    name: &str,
    dims: &[usize],
    values: Vec<f32>,
) -> Result<Value, FormatError> {
    graph.initializer(name, Element::Float, dims, 4 * values.len(), || {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    })
}

/// An initializer `[in, out]` of a matrix `[out, in]`, in F32 or F16.
fn transposed(
    graph: &mut Builder,
    name: &str,
    matrix: &Tensor,
    encoding: Encoding,
) -> Result<Value, FormatError> {
    let [rows, cols] = [matrix.rows(), matrix.cols()];
    let (element, size) = match encoding {
        Encoding::F32 => (Element::Float, 4),
        Encoding::F16 => (Element::Float16, 2),
        other => return Err(unfit(WeightType::Encoded(other))),
    };
    let matrix = matrix.encode(encoding)?;
    graph.initializer(name, element, &[cols, rows], size * rows * cols, || {
        let mut bytes = vec![0; size * rows * cols];
        let mut values = vec![0.0; cols];
        for row in 0..rows {
            matrix.read_row(row, &mut values);
            for (col, &value) in values.iter().enumerate() {
                let place = &mut bytes[size * (col * rows + row)..][..size];
                match element {
                    Element::Float16 => place.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
                    _ => place.copy_from_slice(&value.to_le_bytes()),
                }
            }
        }
        bytes
    })
}

/// The value in f32, if it is not yet.
fn to_float(graph: &mut Builder, value: Value, encoding: Encoding) -> Value {
    match encoding {
        Encoding::F16 => graph.op("Cast", &[&value], &[int("to", Element::Float as usize)]),
        _ => value,
    }
}
