//! The GGUF container: metadata and tensors, whatever they mean.
//!
//! ```text
//! "GGUF"  version: u32 = 3  tensors: u64  keys: u64
//! keys x     { key: string  type: u32  value }
//! tensors x  { name: string  dimensions: u32  size: u64 each, innermost first  GGML type: u32  offset: u64 }
//! padding to `general.alignment` (32 by default)
//! data of each tensor, at its offset from here, padded to the alignment
//!
//! string = length: u64, then UTF-8
//! array  = type: u32  length: u64  values                    type 9 (array) has this as its value
//! ```
//!
//! All integers are little-endian. The reader checks every length against the rest of the file before it allocates or
//! reads, and requires tensors to be contiguous: no gaps, no overlaps. Data stays in the memory-mapped file.
//!
//! # Source
//! `docs/gguf.md` of GGML; `gguf.cpp` for what its reader refuses.

use crate::{Bytes, Encoding, FormatError, Tensor};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

const MAGIC: [u8; 4] = *b"GGUF";
const VERSION: u32 = 3;
/// Alignment of tensor data, in bytes, unless `general.alignment` sets another one.
pub(crate) const ALIGNMENT: usize = 32;
const ALIGNMENT_KEY: &str = "general.alignment";
/// Limit of GGML: names are shorter than this.
const NAME_BYTES: usize = 64;
/// Limit of GGML.
const DIMENSIONS: usize = 4;

/// Arrays up to this many bytes may store one setting per layer, and are compared with expected values. Longer ones
/// belong to tokenizers.
const SMALL_ARRAY: usize = 1 << 13;

/// A metadata value.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Text(String),
    U64(u64),
    I64(i64),
    F64(f64),
    Texts(Vec<String>),
    /// An array of numbers: its bytes in the file.
    Numbers {
        kind: Number,
        bytes: Bytes,
    },
}

/// Type of a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Number {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    U64,
    I64,
    F64,
}

impl Number {
    /// Every type with its number in the file, and its size in bytes.
    const ALL: [(Self, u32, usize); 11] = [
        (Self::U8, 0, 1),
        (Self::I8, 1, 1),
        (Self::U16, 2, 2),
        (Self::I16, 3, 2),
        (Self::U32, 4, 4),
        (Self::I32, 5, 4),
        (Self::F32, 6, 4),
        (Self::Bool, 7, 1),
        (Self::U64, 10, 8),
        (Self::I64, 11, 8),
        (Self::F64, 12, 8),
    ];

    fn code_and_bytes(self) -> (u32, usize) {
        let (_, code, bytes) =
            Self::ALL.into_iter().find(|known| known.0 == self).expect("`ALL` contains every kind");
        (code, bytes)
    }

    fn read(self, b: &[u8]) -> Value {
        match self {
            Self::U8 => Value::U8(b[0]),
            Self::I8 => Value::I8(b[0] as i8),
            Self::U16 => Value::U16(u16::from_le_bytes([b[0], b[1]])),
            Self::I16 => Value::I16(i16::from_le_bytes([b[0], b[1]])),
            Self::U32 => Value::U32(u32_of(b)),
            Self::I32 => Value::I32(u32_of(b) as i32),
            Self::F32 => Value::F32(f32::from_bits(u32_of(b))),
            Self::Bool => Value::Bool(b[0] != 0),
            Self::U64 => Value::U64(u64_of(b)),
            Self::I64 => Value::I64(u64_of(b) as i64),
            Self::F64 => Value::F64(f64::from_bits(u64_of(b))),
        }
    }
}

const TEXT: u32 = 8;
const ARRAY: u32 = 9;

fn u32_of(b: &[u8]) -> u32 {
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

fn u64_of(b: &[u8]) -> u64 {
    u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])
}

impl Value {
    /// An array of numbers.
    pub(crate) fn i32s(numbers: impl IntoIterator<Item = i32>) -> Self {
        let bytes: Vec<u8> = numbers.into_iter().flat_map(i32::to_le_bytes).collect();
        Self::Numbers { kind: Number::I32, bytes: bytes.into() }
    }

    /// An array of numbers.
    pub(crate) fn f32s(numbers: impl IntoIterator<Item = f32>) -> Self {
        let bytes: Vec<u8> = numbers.into_iter().flat_map(f32::to_le_bytes).collect();
        Self::Numbers { kind: Number::F32, bytes: bytes.into() }
    }

    /// An integer of any type that is not negative.
    pub(crate) fn as_size(&self) -> Option<usize> {
        match *self {
            Self::U8(n) => Some(n.into()),
            Self::I8(n) => n.try_into().ok(),
            Self::U16(n) => Some(n.into()),
            Self::I16(n) => n.try_into().ok(),
            Self::U32(n) => n.try_into().ok(),
            Self::I32(n) => n.try_into().ok(),
            Self::U64(n) => n.try_into().ok(),
            Self::I64(n) => n.try_into().ok(),
            _ => None,
        }
    }

    /// A number of any type.
    pub(crate) fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(x) => Some(x.into()),
            Self::F64(x) => Some(x),
            Self::I8(n) => Some(n.into()),
            Self::I16(n) => Some(n.into()),
            Self::I32(n) => Some(n.into()),
            Self::I64(n) => Some(n as f64),
            _ => self.as_size().map(|n| n as f64),
        }
    }

    pub(crate) fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The numbers of an array of numbers.
    pub(crate) fn items(&self) -> Option<impl Iterator<Item = Self> + '_> {
        let Self::Numbers { kind, bytes } = self else { return None };
        Some(bytes.chunks_exact(kind.code_and_bytes().1).map(|item| kind.read(item)))
    }

    /// Converts to JSON. Arrays of strings, long arrays and numbers without a JSON form become their description.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        match self {
            Self::Bool(flag) => (*flag).into(),
            Self::Text(text) => text.as_str().into(),
            Self::Numbers { bytes, .. } if bytes.len() <= SMALL_ARRAY => {
                self.items().into_iter().flatten().map(|item| item.to_json()).collect()
            }
            number => match (number.as_size(), number.as_f64()) {
                (Some(size), _) => size.into(),
                (None, Some(value)) if value.is_finite() => value.into(),
                _ => self.describe().into(),
            },
        }
    }

    /// A short description for error messages.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Texts(texts) => format!("an array of {} texts", texts.len()),
            Self::Numbers { kind, bytes } => {
                format!("an array of {} {kind:?}", bytes.len() / kind.code_and_bytes().1)
            }
            Self::Text(text) => format!("`{}`", text.chars().take(40).collect::<String>()),
            number => format!("{number:?}"),
        }
    }

    fn write(&self, to: &mut Vec<u8>) {
        let mut number = |kind: Number, bytes: &[u8]| {
            to.extend(kind.code_and_bytes().0.to_le_bytes());
            to.extend(bytes);
        };
        match self {
            Self::U8(n) => number(Number::U8, &n.to_le_bytes()),
            Self::I8(n) => number(Number::I8, &n.to_le_bytes()),
            Self::U16(n) => number(Number::U16, &n.to_le_bytes()),
            Self::I16(n) => number(Number::I16, &n.to_le_bytes()),
            Self::U32(n) => number(Number::U32, &n.to_le_bytes()),
            Self::I32(n) => number(Number::I32, &n.to_le_bytes()),
            Self::F32(x) => number(Number::F32, &x.to_le_bytes()),
            Self::Bool(b) => number(Number::Bool, &[u8::from(*b)]),
            Self::U64(n) => number(Number::U64, &n.to_le_bytes()),
            Self::I64(n) => number(Number::I64, &n.to_le_bytes()),
            Self::F64(x) => number(Number::F64, &x.to_le_bytes()),
            Self::Text(text) => {
                to.extend(TEXT.to_le_bytes());
                write_text(text, to);
            }
            Self::Texts(texts) => {
                write_array_head(TEXT, texts.len(), to);
                texts.iter().for_each(|text| write_text(text, to));
            }
            Self::Numbers { kind, bytes } => {
                let (code, size) = kind.code_and_bytes();
                write_array_head(code, bytes.len() / size, to);
                to.extend_from_slice(bytes);
            }
        }
    }
}

fn write_array_head(code: u32, n: usize, to: &mut Vec<u8>) {
    to.extend(ARRAY.to_le_bytes());
    to.extend(code.to_le_bytes());
    to.extend((n as u64).to_le_bytes());
}

fn write_text(text: &str, to: &mut Vec<u8>) {
    to.extend((text.len() as u64).to_le_bytes());
    to.extend(text.as_bytes());
}

/// The error for a key whose value cannot be used.
pub(crate) fn unexpected(key: &str, expected: &str, found: &Value) -> FormatError {
    FormatError::Value { key: key.into(), expected: expected.into(), found: found.describe() }
}

/// Name, shape (outermost dimension first, unlike in the file) and encoding of a tensor.
#[derive(Clone, Debug)]
pub(crate) struct TensorInfo {
    pub name: String,
    pub shape: Vec<usize>,
    pub encoding: Encoding,
}

/// A parsed file.
#[derive(Debug)]
pub(crate) struct Container {
    pub metadata: BTreeMap<String, Value>,
    /// Headers and data by name.
    tensors: BTreeMap<String, (TensorInfo, Bytes)>,
}

impl Container {
    /// Reads metadata and tensor headers. Tensor data is located, but not read.
    pub(crate) fn parse(file: Bytes) -> Result<Self, FormatError> {
        let mut reader = Reader { file, at: 0 };
        let magic = reader.take(4, "the magic bytes")?;
        if *magic != MAGIC {
            return Err(FormatError::Magic { found: magic.to_vec() });
        }
        let version = reader.u32("the version")?;
        if !(2..=VERSION).contains(&version) {
            return Err(FormatError::Version { found: version });
        }
        // The minimum size of an entry bounds the counts.
        let tensors = reader.count(8 + 4 + 4 + 8, "tensors")?;
        let keys = reader.count(8 + 1 + 4 + 1, "metadata keys")?;
        let mut metadata = BTreeMap::new();
        for _ in 0..keys {
            let at = reader.at;
            let key = reader.text("a key")?;
            if key.is_empty() {
                return Err(FormatError::EmptyKey { offset: at });
            }
            if metadata.contains_key(&key) {
                return Err(FormatError::DuplicateKey { key });
            }
            let value = reader.value(&key)?;
            metadata.insert(key, value);
        }
        let alignment = match metadata.get(ALIGNMENT_KEY) {
            None => ALIGNMENT,
            Some(Value::U32(found)) => {
                let fits = found.is_power_of_two() && (*found as usize) <= reader.file.len();
                if !fits {
                    return Err(FormatError::Alignment { found: *found, file: reader.file.len() });
                }
                *found as usize
            }
            Some(other) => {
                return Err(unexpected(ALIGNMENT_KEY, "an unsigned 32-bit number", other));
            }
        };
        let infos = reader.tensor_infos(tensors)?;
        Ok(Self { metadata, tensors: reader.locate(infos, alignment)? })
    }

    /// Shape of a tensor; `None` if it is missing.
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|(info, _)| &*info.shape)
    }

    /// Names of all tensors.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor, or some of its rows; for one dimension, some of its values.
    pub(crate) fn tensor(
        &self,
        name: &str,
        rows: Option<Range<usize>>,
        expected: &[usize],
    ) -> Result<Tensor, FormatError> {
        let (info, bytes) =
            self.tensors.get(name).ok_or_else(|| FormatError::MissingTensor { tensor: name.into() })?;
        let at = |error: FormatError| error.in_tensor(name);
        if info.shape != expected {
            let (expected, found) = (expected.to_vec(), info.shape.clone());
            return Err(at(FormatError::WrongShape { expected, found }));
        }
        let Some(rows) = rows else {
            return Tensor::new(info.shape.clone(), info.encoding, bytes.clone()).map_err(at);
        };
        let mut shape = info.shape.clone();
        shape[0] = 1;
        let row = info.encoding.bytes(&shape).map_err(at)?;
        shape[0] = rows.len();
        Tensor::new(shape, info.encoding, bytes.slice(rows.start * row..rows.end * row)).map_err(at)
    }
}

/// Reads a file from front to back. Every length is checked before it is used.
struct Reader {
    file: Bytes,
    at: usize,
}

impl Reader {
    fn take(&mut self, bytes: usize, what: &'static str) -> Result<Bytes, FormatError> {
        let left = self.file.len() - self.at;
        if bytes > left {
            return Err(FormatError::Truncated { what, offset: self.at, expected: bytes as u64, left });
        }
        self.at += bytes;
        Ok(self.file.slice(self.at - bytes..self.at))
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, FormatError> {
        Ok(u32_of(&self.take(4, what)?))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, FormatError> {
        Ok(u64_of(&self.take(8, what)?))
    }

    /// A count of items that take at least `min_bytes` bytes each.
    fn count(&mut self, min_bytes: usize, what: &'static str) -> Result<usize, FormatError> {
        let found = self.u64(what)?;
        let left = self.file.len() - self.at;
        match usize::try_from(found) {
            Ok(count) if count <= left / min_bytes => Ok(count),
            _ => Err(FormatError::Count { what, offset: self.at - 8, found, left }),
        }
    }

    fn text(&mut self, what: &'static str) -> Result<String, FormatError> {
        let length = self.count(1, what)?;
        let bytes = self.take(length, what)?.to_vec();
        String::from_utf8(bytes).map_err(|_| FormatError::NotUtf8 { what, offset: self.at - length })
    }

    fn value(&mut self, key: &str) -> Result<Value, FormatError> {
        let number = |code: u32| Number::ALL.iter().find(|known| known.1 == code);
        let code = self.u32("the type of a value")?;
        if let Some(&(kind, _, size)) = number(code) {
            return Ok(kind.read(&self.take(size, "a value")?));
        }
        match code {
            TEXT => Ok(Value::Text(self.text("a text value")?)),
            ARRAY => {
                let code = self.u32("the type of an array")?;
                if let Some(&(kind, _, size)) = number(code) {
                    let n = self.count(size, "numbers of an array")?;
                    return Ok(Value::Numbers { kind, bytes: self.take(n * size, "numbers of an array")? });
                }
                if code != TEXT {
                    return Err(FormatError::ValueType { key: key.into(), found: code });
                }
                let n = self.count(8, "texts of an array")?;
                (0..n).map(|_| self.text("a text of an array")).collect::<Result<_, _>>().map(Value::Texts)
            }
            found => Err(FormatError::ValueType { key: key.into(), found }),
        }
    }

    /// Tensor headers in the order of the file, with their data offsets.
    fn tensor_infos(&mut self, n: usize) -> Result<Vec<(TensorInfo, u64)>, FormatError> {
        let mut seen = BTreeSet::new();
        let mut infos = Vec::new();
        for _ in 0..n {
            let name = self.text("the name of a tensor")?;
            if name.len() >= NAME_BYTES {
                return Err(FormatError::TensorName { bytes: name.len() });
            }
            if !seen.insert(name.clone()) {
                return Err(FormatError::DuplicateTensor { tensor: name });
            }
            let dimensions = self.u32("the number of dimensions")?;
            if dimensions == 0 || dimensions > DIMENSIONS as u32 {
                return Err(FormatError::Dimensions { tensor: name, found: dimensions });
            }
            let mut shape = Vec::new();
            for _ in 0..dimensions {
                let size = self.u64("a dimension")?;
                shape.push(usize::try_from(size).unwrap_or(usize::MAX));
            }
            shape.reverse(); // the file stores the innermost dimension first
            let number = self.u32("the type of a tensor")?;
            let encoding = Encoding::from_ggml_type(number)
                .ok_or_else(|| FormatError::TensorType { tensor: name.clone(), found: number })?;
            let offset = self.u64("the offset of a tensor")?;
            infos.push((TensorInfo { name, shape, encoding }, offset));
        }
        Ok(infos)
    }

    /// Locates the data of the tensors, which must be contiguous.
    fn locate(
        &mut self,
        infos: Vec<(TensorInfo, u64)>,
        alignment: usize,
    ) -> Result<BTreeMap<String, (TensorInfo, Bytes)>, FormatError> {
        let start = self.at.next_multiple_of(alignment);
        let mut expected = 0usize;
        let mut tensors = BTreeMap::new();
        for (info, offset) in infos {
            let at = |error: FormatError| error.in_tensor(&info.name);
            let bytes = info.encoding.bytes(&info.shape).map_err(at)?;
            if offset != expected as u64 {
                return Err(at(FormatError::Offset { expected: expected as u64, found: offset }));
            }
            // This cannot overflow: both are less than the length of the file, which is less than `isize::MAX`.
            let first = start + expected;
            if bytes > self.file.len().saturating_sub(first) {
                let left = self.file.len().saturating_sub(first);
                return Err(at(FormatError::Truncated {
                    what: "tensor data",
                    offset: first,
                    expected: bytes as u64,
                    left,
                }));
            }
            let data = self.file.slice(first..first + bytes);
            expected = (expected + bytes).next_multiple_of(alignment);
            tensors.insert(info.name.clone(), (info, data));
        }
        Ok(tensors)
    }
}

/// The bytes of a file before its tensor data. Each tensor starts at a multiple of [`ALIGNMENT`].
///
/// # Errors
/// `Shape`, `RowLength`: a shape that does not fit its encoding. `ReadOnly`: an encoding that GGUF does not have.
pub(crate) fn header(metadata: &[(String, Value)], tensors: &[TensorInfo]) -> Result<Vec<u8>, FormatError> {
    let mut header = Vec::new();
    header.extend(MAGIC);
    header.extend(VERSION.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        write_text(key, &mut header);
        value.write(&mut header);
    }
    let mut offset = 0u64;
    for TensorInfo { name, shape, encoding } in tensors {
        write_text(name, &mut header);
        header.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|&size| header.extend((size as u64).to_le_bytes()));
        header
            .extend(encoding.ggml_type().ok_or(FormatError::ReadOnly { encoding: *encoding })?.to_le_bytes());
        header.extend(offset.to_le_bytes());
        let bytes = encoding.bytes(shape).map_err(|error| error.in_tensor(name))?;
        offset += bytes.next_multiple_of(ALIGNMENT) as u64;
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
    Ok(header)
}
