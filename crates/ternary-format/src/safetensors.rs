//! Safetensors files: memory-mapped on reading, streamed on writing.
//!
//! # Source
//! README of github.com/huggingface/safetensors, "Format".

use crate::{Bytes, Encoding, FormatError, Tensor};
use safetensors::{
    SafeTensorError, SafeTensors,
    tensor::{Dtype, Metadata, TensorInfo},
};
use serde::{Serialize, Serializer, ser::SerializeMap};
use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

/// A tensor of a file, of any type.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Bytes,
}

impl Stored {
    /// The encoding of a float tensor.
    ///
    /// # Errors
    /// `StoredType`: not F32, F16 or BF16.
    pub fn encoding(&self) -> Result<Encoding, FormatError> {
        match self.dtype {
            Dtype::F32 => Ok(Encoding::F32),
            Dtype::F16 => Ok(Encoding::F16),
            Dtype::BF16 => Ok(Encoding::Bf16),
            found => Err(FormatError::StoredType { expected: "F32, F16 or BF16", found }),
        }
    }

    /// Converts to a float [`Tensor`] without copying.
    ///
    /// # Errors
    /// `StoredType`: not F32, F16 or BF16.
    pub fn float(self) -> Result<Tensor, FormatError> {
        let encoding = self.encoding()?;
        Tensor::new(self.shape, encoding, self.bytes)
    }
}

/// Maps a file and returns its tensors. Lengths and offsets are checked; the data is not read.
///
/// # Errors
/// `Io`, `Safetensors`
pub(crate) fn read(path: &Path) -> Result<BTreeMap<String, Stored>, FormatError> {
    Ok(read_annotated(path)?.tensors)
}

/// The tensors of a file, and the texts of its `__metadata__`.
pub(crate) struct Annotated {
    pub tensors: BTreeMap<String, Stored>,
    pub texts: HashMap<String, String>,
}

/// [`read`] with the texts of the file.
///
/// # Errors
/// As [`read`].
pub(crate) fn read_annotated(path: &Path) -> Result<Annotated, FormatError> {
    let file = Bytes::map(path)?;
    let (header, metadata) =
        SafeTensors::read_metadata(&file).map_err(|source| FormatError::from(source).in_file(path))?;
    let start = 8 + header;
    let stored = |info: &TensorInfo| {
        let (from, to) = info.data_offsets;
        Stored { dtype: info.dtype, shape: info.shape.clone(), bytes: file.slice(start + from..start + to) }
    };
    Ok(Annotated {
        tensors: metadata.tensors().into_iter().map(|(name, info)| (name, stored(info))).collect(),
        texts: metadata.metadata().clone().unwrap_or_default(),
    })
}

/// Writes the data of a tensor.
pub(crate) type Produce<'a> = Box<dyn Fn(&mut dyn Write) -> io::Result<()> + 'a>;

/// A tensor to write. Its data is produced while it is written, so that a model need not fit in memory twice.
pub(crate) struct Entry<'a> {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub produce: Produce<'a>,
}

/// Writes a new file. Tensors of wide types come first, so that all are aligned.
///
/// # Errors
/// `Io`, `Safetensors`
pub(crate) fn write(path: &Path, entries: Vec<Entry>) -> Result<(), FormatError> {
    write_annotated(path, entries, &[])
}

/// [`write`] with texts for the file's `__metadata__`.
///
/// # Errors
/// As [`write`].
pub(crate) fn write_annotated(
    path: &Path,
    entries: Vec<Entry>,
    texts: &[(&str, &str)],
) -> Result<(), FormatError> {
    let io = |source| FormatError::io(path)(source);
    let mut file = BufWriter::with_capacity(1 << 20, File::create_new(path).map_err(io)?);
    write_to(&mut file, path, entries, texts)?;
    let file = file.into_inner().map_err(|error| io(error.into_error()))?;
    file.sync_all().map_err(io)
}

/// Writes to an open file. Errors name `path`.
///
/// # Errors
/// `Io`, `Safetensors`
pub(crate) fn write_to(
    file: &mut impl Write,
    path: &Path,
    mut entries: Vec<Entry>,
    texts: &[(&str, &str)],
) -> Result<(), FormatError> {
    entries.sort_by(|a, b| b.dtype.bitsize().cmp(&a.dtype.bitsize()).then_with(|| a.name.cmp(&b.name)));
    let mut end = 0;
    let infos = entries.iter().map(|entry| {
        let start = end;
        end += entry.shape.iter().product::<usize>() * entry.dtype.bitsize() / 8;
        let info = TensorInfo { dtype: entry.dtype, shape: entry.shape.clone(), data_offsets: (start, end) };
        (entry.name.clone(), info)
    });
    let infos: Vec<_> = infos.collect();
    Metadata::new(None, infos.clone()).map_err(FormatError::from)?;
    let mut header = serde_json::to_vec(&Header { texts, infos }).expect("names and numbers are JSON");
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut write = || {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        entries.iter().try_for_each(|entry| (entry.produce)(file))
    };
    write().map_err(FormatError::io(path))
}

/// The header of a file. Its order is that of its parts, so that equal contents are equal files.
struct Header<'a> {
    texts: &'a [(&'a str, &'a str)],
    infos: Vec<(String, TensorInfo)>,
}

impl Serialize for Header<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // transformers refuses a file whose metadata does not name the framework whose conventions it follows.
        let texts: BTreeMap<_, _> = self.texts.iter().copied().chain([("format", "pt")]).collect();
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("__metadata__", &texts)?;
        self.infos.iter().try_for_each(|(name, info)| map.serialize_entry(name, info))?;
        map.end()
    }
}

impl From<SafeTensorError> for FormatError {
    fn from(source: SafeTensorError) -> Self {
        Self::Safetensors { source }
    }
}
