//! Named tensors without a model: one safetensors file with packed ternary matrices, for models of any architecture.
//!
//! A float tensor is stored under its name. A ternary matrix `x` of shape `[rows, cols]` is stored as three entries:
//!
//! | entry | type | shape | values |
//! |---|---|---|---|
//! | `x.codes` | U8 | `[rows, ceil(cols / 4)]` | four codes per byte, each plus 1, low bits first |
//! | `x.scales` | F16 | `[rows, cols / group]` | a weight is scale times code |
//! | `x.shape` | I64 | `[2]` | rows and columns |
//!
//! Any safetensors library can open the file. No name is reserved: an entry is a matrix of codes if its type is U8.

use crate::{
    Bytes, Encoding, FormatError, Tensor, disk,
    safetensors::{self, Entry, Stored},
};
use ::safetensors::tensor::Dtype;
use std::{
    collections::{BTreeMap, BTreeSet},
    io::BufWriter,
    path::Path,
};

const CODES: &str = ".codes";
const SCALES: &str = ".scales";
const SHAPE: &str = ".shape";

/// Writes tensors to a file atomically. F32, F16, BF16 and ternary tensors keep their values bit for bit; other
/// encodings become F32.
///
/// # Errors
/// `Io`. `DuplicateTensor`: a name equals that of an entry of a ternary matrix.
pub fn write(tensors: &BTreeMap<String, Tensor>, path: &Path) -> Result<(), FormatError> {
    let stored = tensors.iter().map(|(name, tensor)| {
        let encoding = match tensor.encoding() {
            same @ (Encoding::F32 | Encoding::F16 | Encoding::Bf16 | Encoding::Ternary { .. }) => same,
            ternary if ternary.is_ternary() => Encoding::Ternary { group: ternary.block_weights() },
            _ => Encoding::F32,
        };
        Ok((name, tensor.encode(encoding).map_err(|error| error.in_tensor(name))?))
    });
    let stored: Vec<(&String, Tensor)> = stored.collect::<Result<_, FormatError>>()?;
    let mut entries = BTreeMap::new();
    let mut add = |name: String, dtype, shape: Vec<usize>, bytes: Vec<u8>| {
        let produce: safetensors::Produce = Box::new(move |file| file.write_all(&bytes));
        match entries.insert(name.clone(), Entry { name: name.clone(), dtype, shape, produce }) {
            None => Ok(()),
            Some(_) => Err(FormatError::DuplicateTensor { tensor: name }),
        }
    };
    for (name, tensor) in &stored {
        let (shape, bytes) = (tensor.shape(), tensor.bytes());
        match tensor.encoding() {
            Encoding::Ternary { group } => {
                let [rows, cols] = [tensor.rows(), tensor.cols()];
                let (codes, scales) = bytes.split_at(rows * cols.div_ceil(4));
                let sizes = [rows, cols].map(|size| (size as i64).to_le_bytes()).concat();
                add(format!("{name}{CODES}"), Dtype::U8, vec![rows, cols.div_ceil(4)], codes.into())?;
                add(format!("{name}{SCALES}"), Dtype::F16, vec![rows, cols / group], scales.into())?;
                add(format!("{name}{SHAPE}"), Dtype::I64, vec![2], sizes)?;
            }
            Encoding::F16 => add(name.to_string(), Dtype::F16, shape.into(), bytes.into())?,
            Encoding::Bf16 => add(name.to_string(), Dtype::BF16, shape.into(), bytes.into())?,
            _ => add(name.to_string(), Dtype::F32, shape.into(), bytes.into())?,
        }
    }
    disk::atomic_write(path, |file| {
        let mut file = BufWriter::with_capacity(1 << 20, file);
        safetensors::write_to(&mut file, path, entries.into_values().collect(), &[])?;
        std::io::Write::flush(&mut file).map_err(FormatError::io(path))
    })
}

/// Reads the tensors of a file that [`write()`] wrote, or of any safetensors file of floats.
///
/// # Errors
/// `Io`, `Safetensors`: a file that is missing or damaged. `MissingTensor`, `WrongShape`, `StoredType`, `RowLength`,
/// `NotACode`: entries that form neither a ternary matrix nor a float tensor.
pub fn read(path: &Path) -> Result<BTreeMap<String, Tensor>, FormatError> {
    let entries = safetensors::read(path)?;
    let tensors = || {
        let matrices = entries.iter().filter_map(|(name, entry)| {
            (entry.dtype == Dtype::U8).then(|| name.strip_suffix(CODES)).flatten()
        });
        let matrices: Vec<&str> = matrices.collect();
        let mut tensors = BTreeMap::new();
        for name in &matrices {
            let tensor = matrix(&entries, name).map_err(|error| error.in_tensor(name))?;
            tensors.insert(name.to_string(), tensor);
        }
        let parts: BTreeSet<String> = matrices
            .iter()
            .flat_map(|name| [CODES, SCALES, SHAPE].map(|part| format!("{name}{part}")))
            .collect();
        for (name, entry) in entries.iter().filter(|(name, _)| !parts.contains(*name)) {
            let tensor = entry.clone().float().map_err(|error| error.in_tensor(name))?;
            if tensors.insert(name.clone(), tensor).is_some() {
                return Err(FormatError::DuplicateTensor { tensor: name.clone() });
            }
        }
        Ok(tensors)
    };
    tensors().map_err(|error: FormatError| error.in_file(path))
}

/// The ternary matrix of three entries.
fn matrix(entries: &BTreeMap<String, Stored>, name: &str) -> Result<Tensor, FormatError> {
    let entry = |part: &str, dtype: Dtype, expected: &'static str| {
        let tensor = format!("{name}{part}");
        let Some(entry) = entries.get(&tensor) else {
            return Err(FormatError::MissingTensor { tensor });
        };
        if entry.dtype != dtype {
            return Err(FormatError::StoredType { expected, found: entry.dtype });
        }
        Ok(entry)
    };
    let (codes, scales) = (entry(CODES, Dtype::U8, "U8")?, entry(SCALES, Dtype::F16, "F16")?);
    let sizes = entry(SHAPE, Dtype::I64, "I64")?;
    let expect = |condition: bool, entry: &Stored, expected: &[usize]| match condition {
        true => Ok(()),
        false => Err(FormatError::WrongShape { expected: expected.into(), found: entry.shape.clone() }),
    };
    expect(sizes.shape == [2], sizes, &[2])?;
    let size = |i: usize| {
        let bytes = sizes.bytes[8 * i..8 * i + 8].try_into().expect("eight bytes");
        usize::try_from(i64::from_le_bytes(bytes)).unwrap_or(0)
    };
    let shape = [size(0), size(1)];
    let [rows, cols] = shape;
    expect(codes.shape == [rows, cols.div_ceil(4)], codes, &[rows, cols.div_ceil(4)])?;
    let groups = scales.shape.last().copied().unwrap_or(0);
    expect(scales.shape == [rows, groups] && groups > 0 && cols.is_multiple_of(groups), scales, &[rows, 1])?;
    let bytes = [&codes.bytes[..], &scales.bytes[..]].concat();
    Tensor::new(shape.into(), Encoding::Ternary { group: cols / groups }, Bytes::from(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    fn random(rng: &mut StdRng, rows: usize, cols: usize, group: usize) -> Tensor {
        let tensor = Tensor::ternary(rows, cols, group, |_, codes, scales| {
            codes.iter_mut().for_each(|code| *code = rng.random_range(-1..=1));
            scales.iter_mut().for_each(|scale| *scale = f16::from_f32(rng.random_range(0.01..2.0)));
        });
        tensor.unwrap()
    }

    fn tensors() -> BTreeMap<String, Tensor> {
        let rng = &mut StdRng::seed_from_u64(5);
        let floats: Vec<f32> = (0..15).map(|_| rng.random_range(-1.0..1.0)).collect();
        let halves: Vec<f16> = floats.iter().map(|x| f16::from_f32(*x)).collect();
        BTreeMap::from([
            ("a.weight".into(), random(rng, 3, 5, 5)),
            ("b.weight".into(), random(rng, 7, 24, 8)),
            ("one".into(), random(rng, 1, 1, 1)),
            ("wide".into(), random(rng, 2, 512, 512).encode(Encoding::Tq2_0).unwrap()),
            ("kernel".into(), Tensor::f32(&[3, 1, 5], &floats).unwrap()),
            ("codes".into(), Tensor::f16(&[15], &halves).unwrap()),
            ("tensor.shape".into(), Tensor::f32(&[15], &floats).unwrap()),
        ])
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        let mut values = vec![0.0; tensor.rows() * tensor.cols()];
        let rows = values.chunks_exact_mut(tensor.cols());
        rows.enumerate().for_each(|(row, values)| tensor.read_row(row, values));
        values
    }

    #[test]
    fn named_tensors_round_trip_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let tensors = tensors();
        for _ in 0..2 {
            write(&tensors, &path).unwrap();
        }
        let read = read(&path).unwrap();
        assert_eq!(Vec::from_iter(read.keys()), Vec::from_iter(tensors.keys()));
        for (name, tensor) in &tensors {
            assert_eq!(read[name].shape(), tensor.shape(), "{name}");
            assert_eq!(values(&read[name]), values(tensor), "{name}");
            assert_eq!(read[name].encoding().is_ternary(), tensor.encoding().is_ternary(), "{name}");
        }
        // Two bits per weight, one scale per row, and a header.
        let big = BTreeMap::from([("x".into(), random(&mut StdRng::seed_from_u64(1), 64, 256, 256))]);
        write(&big, &path).unwrap();
        let bytes = std::fs::metadata(&path).unwrap().len();
        assert!((64 * 64 + 2 * 64..64 * 64 + 2 * 64 + 400).contains(&bytes), "{bytes}");
    }

    #[test]
    fn a_name_of_an_entry_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let mut tensors = tensors();
        tensors.insert("one.scales".into(), Tensor::f32(&[1], &[1.0]).unwrap());
        let error = write(&tensors, &path).unwrap_err();
        assert!(
            matches!(&error, FormatError::DuplicateTensor { tensor } if tensor == "one.scales"),
            "{error}"
        );
        assert!(!path.exists());
    }

    #[test]
    fn entries_that_form_no_matrix_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let entry = |name: &str, dtype, shape: &[usize], bytes: Vec<u8>| Entry {
            name: name.into(),
            dtype,
            shape: shape.into(),
            produce: Box::new(move |file| file.write_all(&bytes)),
        };
        let sizes = |rows: i64, cols: i64| [rows.to_le_bytes(), cols.to_le_bytes()].concat();
        let sound = || {
            [
                entry("x.codes", Dtype::U8, &[2, 2], vec![0b01_01_01_01; 4]),
                entry("x.scales", Dtype::F16, &[2, 1], vec![0; 4]),
                entry("x.shape", Dtype::I64, &[2], sizes(2, 7)),
            ]
        };
        let refusal = |place: usize, other: Option<Entry<'static>>| {
            let mut entries = Vec::from(sound());
            entries.remove(place);
            entries.extend(other);
            let _ = std::fs::remove_file(&path);
            safetensors::write(&path, entries).unwrap();
            read(&path).unwrap_err().to_string()
        };
        safetensors::write(&path, sound().into()).unwrap();
        assert_eq!(values(&read(&path).unwrap()["x"]), [0.0; 14]);
        for (place, other, expected) in [
            (1, None, "`x.scales` is missing"),
            (2, None, "`x.shape` is missing"),
            (0, Some(entry("x.codes", Dtype::U8, &[2, 2], vec![0xff; 4])), "none of -1, 0, +1"),
            (0, Some(entry("x.codes", Dtype::U8, &[4], vec![0; 4])), "shape [2, 2], found [4]"),
            (1, Some(entry("x.scales", Dtype::F32, &[2], vec![0; 8])), "type F16"),
            (1, Some(entry("x.scales", Dtype::F16, &[2, 2], vec![0; 8])), "found [2, 2]"),
            (1, Some(entry("x.scales", Dtype::F16, &[2, 0], vec![])), "found [2, 0]"),
            (2, Some(entry("x.shape", Dtype::I64, &[2], sizes(2, 9))), "shape [2, 3], found [2, 2]"),
            (2, Some(entry("x.shape", Dtype::I64, &[2], sizes(-2, 7))), "found [2, 2]"),
            (2, Some(entry("x.shape", Dtype::I64, &[2], sizes(i64::MAX, i64::MAX))), "found [2, 2]"),
            (2, Some(entry("x.shape", Dtype::I64, &[1], vec![0; 8])), "shape [2], found [1]"),
        ] {
            let error = refusal(place, other);
            assert!(error.contains("tensor `x`") && error.contains(expected), "{expected}: {error}");
        }
    }
}
