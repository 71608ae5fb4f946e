//! Archives as parts, so that after an edit of one part the offsets and checksums of the others are still valid.

use arbitrary::{Result, Unstructured};

/// Head and tensors of a file. Lengths and checksums are computed from the parts when it is written.
#[derive(Clone)]
pub struct Sections {
    /// Length of the head as declared, and packed.
    head: (u64, Vec<u8>),
    /// Encoding with its group, and the only chunk.
    tensors: Vec<(Vec<u8>, Vec<u8>)>,
}

fn number(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number > 127 {
        bytes.push(number as u8 | 128);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

/// Reads parts from the front of a valid file.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n);
        self.0 = rest;
        taken
    }

    fn number(&mut self) -> u64 {
        let byte = u64::from(self.take(1)[0]);
        if byte < 128 { byte } else { byte - 128 + 128 * self.number() }
    }

    /// A part with its length before it and its checksum after it.
    fn part(&mut self) -> Vec<u8> {
        let length = self.number() as usize;
        let part = self.take(length).to_vec();
        self.take(4);
        part
    }
}

impl Sections {
    /// The parts of a valid file whose tensors have one chunk each.
    pub fn parse(file: &[u8]) -> Self {
        let mut reader = Reader(&file[5..]);
        let head = (reader.number(), reader.part());
        let mut tensors = Vec::new();
        while !reader.0.is_empty() {
            let mut encoding = reader.take(1).to_vec();
            if encoding == [255] {
                encoding.extend(number(reader.number()));
            }
            tensors.push((encoding, reader.part()));
        }
        Self { head, tensors }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"TRNA\x01".to_vec();
        let mut crc = u32::MAX;
        let mut summed = 0;
        let mut put = |before: &[u8], part: &[u8]| {
            bytes.extend([before, &number(part.len() as u64), part].concat());
            for &byte in &bytes[summed..] {
                crc ^= u32::from(byte);
                (0..8).for_each(|_| crc = (crc >> 1) ^ if crc & 1 == 1 { 0xEDB8_8320 } else { 0 });
            }
            bytes.extend((!crc).to_le_bytes());
            summed = bytes.len();
        };
        put(&number(self.head.0), &self.head.1);
        self.tensors.iter().for_each(|(encoding, chunk)| put(encoding, chunk));
        bytes
    }

    /// Corrupts a part.
    ///
    /// # Errors
    /// When the input ends.
    pub fn edit(&mut self, input: &mut Unstructured) -> Result<()> {
        let tensor = input.choose_index(self.tensors.len().max(1))?;
        let choice = input.int_in_range(0..=7)?;
        if choice == 0 {
            self.head.0 = input.int_in_range(0..=1 << 16)?;
            return Ok(());
        }
        if choice == 1 {
            return spoil(&mut self.head.1, input);
        }
        let other = input.choose_index(self.tensors.len().max(1))?;
        let Some((encoding, chunk)) = self.tensors.get_mut(tensor) else { return Ok(()) };
        match choice {
            2 => *encoding = vec![*input.choose(&[0, 1, 2, 3, 8, 12, 14, 30, 34, 35, 42])?],
            3 => {
                *encoding =
                    [vec![255], number(*input.choose(&[0, 1, 2, 3, 16, 64, 1 << 20, u64::MAX])?)].concat()
            }
            4 => chunk.resize(input.int_in_range(0..=1 << 10)?, 0),
            5 => self.tensors.swap(tensor, other),
            6 if input.ratio(1, 4)? => drop(self.tensors.remove(tensor)),
            _ => return spoil(chunk, input),
        }
        Ok(())
    }
}

/// Changes, inserts or removes bytes.
fn spoil(bytes: &mut Vec<u8>, input: &mut Unstructured) -> Result<()> {
    let at = input.choose_index(bytes.len().max(1))?;
    match bytes.get_mut(at) {
        Some(byte) if input.ratio(3, 4)? => *byte = input.arbitrary()?,
        Some(_) if input.arbitrary()? => drop(bytes.remove(at)),
        _ => bytes.insert(at.min(bytes.len()), input.arbitrary()?),
    }
    Ok(())
}
