//! GGUF files as parts, so that after an edit of one part the offsets of the others are still valid.

use arbitrary::{Result, Unstructured};

/// Keys and tensors of a file. Lengths are computed from the parts when it is written.
#[derive(Clone)]
pub struct Sections {
    /// Name, type, value.
    pub keys: Vec<(Vec<u8>, u32, Vec<u8>)>,
    /// Name, dimensions, type, offset.
    infos: Vec<(Vec<u8>, Vec<u64>, u32, u64)>,
    alignment: usize,
    data: Vec<u8>,
}

const TEXT: u32 = 8;
const ARRAY: u32 = 9;
/// Bytes per value of the number types; 0 for strings and arrays.
const SIZES: [usize; 13] = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8];

fn text(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

/// Reads parts from the front of a valid file.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n);
        self.0 = rest;
        taken
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().expect("4 bytes"))
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take(8).try_into().expect("8 bytes"))
    }

    fn text(&mut self) -> &'a [u8] {
        let length = self.u64() as usize;
        self.take(length)
    }

    fn value(&mut self, kind: u32) -> Vec<u8> {
        match kind {
            TEXT => text(self.text()),
            ARRAY => {
                let (kind, n) = (self.u32(), self.u64());
                let items: Vec<u8> = (0..n).flat_map(|_| self.value(kind)).collect();
                [&kind.to_le_bytes()[..], &n.to_le_bytes(), &items].concat()
            }
            number => self.take(SIZES[number as usize]).into(),
        }
    }
}

impl Sections {
    /// The parts of a valid file.
    pub fn parse(file: &[u8]) -> Self {
        let mut reader = Reader(&file[8..]);
        let (tensors, keys) = (reader.u64(), reader.u64());
        let key = |reader: &mut Reader| {
            let (name, kind) = (reader.text().to_vec(), reader.u32());
            (name, kind, reader.value(kind))
        };
        let keys = (0..keys).map(|_| key(&mut reader)).collect();
        let info = |reader: &mut Reader| {
            let (name, n) = (reader.text().to_vec(), reader.u32());
            let dims = (0..n).map(|_| reader.u64()).collect();
            (name, dims, reader.u32(), reader.u64())
        };
        let infos = (0..tensors).map(|_| info(&mut reader)).collect();
        let start = (file.len() - reader.0.len()).next_multiple_of(32);
        Self { keys, infos, alignment: 32, data: file[start..].into() }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend((self.infos.len() as u64).to_le_bytes());
        bytes.extend((self.keys.len() as u64).to_le_bytes());
        for (name, kind, value) in &self.keys {
            bytes.extend([&text(name)[..], &kind.to_le_bytes(), value].concat());
        }
        for (name, dims, kind, offset) in &self.infos {
            bytes.extend([&text(name)[..], &(dims.len() as u32).to_le_bytes()].concat());
            dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
            bytes.extend(kind.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
        bytes.extend(&self.data);
        bytes
    }

    /// Corrupts a part.
    ///
    /// # Errors
    /// When the input ends.
    pub fn edit(&mut self, input: &mut Unstructured) -> Result<()> {
        let key = input.choose_index(self.keys.len().max(1))?;
        let tensor = input.choose_index(self.infos.len().max(1))?;
        match input.int_in_range(0..=9)? {
            0 if key < self.keys.len() => drop(self.keys.remove(key)),
            1 => {
                let name = [&b"rope.scaling.type"[..], b"general.alignment", b"tokenizer.ggml.scores"];
                self.keys.push(((*input.choose(&name)?).into(), 0, vec![]));
            }
            2 if key < self.keys.len() => self.keys.push(self.keys[key].clone()),
            3..=5 if key < self.keys.len() => {
                let (_, kind, value) = &mut self.keys[key];
                (*kind, *value) = arbitrary_value(input)?;
            }
            6 if key < self.keys.len() && !self.keys[key].2.is_empty() => {
                let value = &mut self.keys[key].2;
                let at = input.choose_index(value.len())?;
                value[at] = input.arbitrary()?;
            }
            7 if tensor < self.infos.len() => {
                let (_, dims, kind, _) = &mut self.infos[tensor];
                let dim = *input.choose(&[0, 1, 3, 256, 1 << 20, 1 << 32, u64::MAX / 2, u64::MAX])?;
                match dims.get_mut(input.choose_index(5)?) {
                    Some(old) => *old = dim,
                    None => *kind = *input.choose(&[0, 1, 2, 3, 8, 12, 14, 30, 34, 35, 42])?,
                }
            }
            8 if tensor < self.infos.len() => {
                // Another type with the same total size may be valid, so all offsets stay.
                self.infos[tensor].2 = *input.choose(&[0, 1, 2, 3, 8, 12, 14, 30, 34, 35, 42])?;
                self.place();
            }
            _ => {
                let at = input.choose_index(self.data.len().max(1))?;
                if let Some(byte) = self.data.get_mut(at) {
                    *byte = input.arbitrary()?;
                }
            }
        }
        Ok(())
    }

    /// Computes new offsets, and data of the required length.
    fn place(&mut self) {
        let mut end = 0;
        for (_, dims, kind, offset) in &mut self.infos {
            let (block, bytes) = match kind {
                0 => (1, 4),
                1 | 30 => (1, 2),
                2 => (32, 18),
                3 => (32, 20),
                8 => (32, 34),
                12 => (256, 144),
                14 => (256, 210),
                34 => (256, 54),
                35 => (256, 66),
                _ => (64, 18),
            };
            *offset = end;
            let weights = dims.iter().fold(1u64, |product, &dim| product.saturating_mul(dim)).min(1 << 16);
            end = (end + weights / block * bytes).next_multiple_of(32);
        }
        self.data.resize(end as usize, 0);
    }
}

/// A type and a value of this type.
fn arbitrary_value(input: &mut Unstructured) -> Result<(u32, Vec<u8>)> {
    let kind = input.int_in_range(0..=13)?;
    let value = match kind {
        TEXT => text(input.arbitrary()?),
        ARRAY => {
            let kind: u32 = input.int_in_range(0..=12)?;
            let n = input.int_in_range(0..=8u64)?;
            let item = |input: &mut Unstructured| match kind {
                TEXT | ARRAY => Ok(text(input.arbitrary()?)),
                number => input.bytes(SIZES[number as usize]).map(Vec::from),
            };
            let items = (0..n).map(|_| item(input)).collect::<Result<Vec<_>>>()?.concat();
            [&kind.to_le_bytes()[..], &n.to_le_bytes(), &items].concat()
        }
        13 => vec![],
        number => input.bytes(SIZES[number as usize])?.into(),
    };
    Ok((kind, value))
}
