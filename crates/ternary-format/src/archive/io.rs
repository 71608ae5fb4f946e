//! [`Source`] and [`Sink`]: bytes, varints, strings and checksums, from and to any stream.

use crate::FormatError;
use crc32fast::Hasher;
use std::{
    io::{Read, Write},
    path::Path,
};

/// Reads the fields of an archive, and keeps the checksum of all bytes read.
pub(super) struct Source<'a, R> {
    reader: R,
    /// File name for error messages.
    path: &'a Path,
    offset: usize,
    crc: Hasher,
}

impl<'a, R: Read> Source<'a, R> {
    pub fn new(reader: R, path: &'a Path) -> Self {
        Self { reader, path, offset: 0, crc: Hasher::new() }
    }

    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Reads `n` bytes. Memory grows with the bytes that arrive, so a false length allocates nothing.
    ///
    /// # Errors
    /// `Io`, `Truncated`
    pub fn bytes(&mut self, n: usize, what: &'static str) -> Result<Vec<u8>, FormatError> {
        let mut bytes = Vec::new();
        let mut part = (&mut self.reader).take(n as u64);
        part.read_to_end(&mut bytes).map_err(FormatError::io(self.path))?;
        if bytes.len() < n {
            let (offset, left) = (self.offset, bytes.len());
            return Err(FormatError::Truncated { what, offset, expected: n as u64, left });
        }
        self.offset += n;
        self.crc.update(&bytes);
        Ok(bytes)
    }

    pub fn byte(&mut self, what: &'static str) -> Result<u8, FormatError> {
        Ok(self.bytes(1, what)?[0])
    }

    /// Reads four bytes.
    pub fn word(&mut self, what: &'static str) -> Result<[u8; 4], FormatError> {
        let mut word = [0; 4];
        word.copy_from_slice(&self.bytes(4, what)?);
        Ok(word)
    }

    /// Reads an unsigned LEB128 varint.
    ///
    /// # Errors
    /// `Io`, `Truncated`. `Value`: more than 63 bits, or not in the shortest form.
    pub fn varint(&mut self, what: &'static str) -> Result<usize, FormatError> {
        let mut number = 0u64;
        for shift in (0..63).step_by(7) {
            let byte = self.byte(what)?;
            number |= u64::from(byte & 127) << shift;
            if byte < 128 && (byte > 0 || shift == 0) {
                return Ok(usize::try_from(number).unwrap_or(usize::MAX));
            }
            if byte < 128 {
                break;
            }
        }
        let (found, expected) =
            (format!("{number} in too many bytes"), "a varint in its shortest form".into());
        Err(FormatError::Value { key: what.into(), found, expected })
    }

    /// Reads a string: its length in bytes as a varint, then UTF-8.
    ///
    /// # Errors
    /// Those of [`varint`](Self::varint). `NotUtf8`.
    pub fn text(&mut self, what: &'static str) -> Result<String, FormatError> {
        let n = self.varint(what)?;
        let offset = self.offset;
        String::from_utf8(self.bytes(n, what)?).map_err(|_| FormatError::NotUtf8 { what, offset })
    }

    /// Reads a checksum, and compares it with that of all preceding bytes except checksums.
    ///
    /// # Errors
    /// `Io`, `Truncated`. `Damaged`: it differs.
    pub fn checksum(&mut self, part: impl FnOnce() -> String) -> Result<(), FormatError> {
        let crc = self.crc.clone();
        let found = u32::from_le_bytes(self.word("a checksum")?);
        self.crc = crc.clone();
        if found == crc.finalize() {
            return Ok(());
        }
        Err(FormatError::Damaged { part: part(), why: "its checksum does not match its bytes" })
    }

    /// Returns whether the stream has ended.
    ///
    /// # Errors
    /// `Io`
    pub fn is_at_end(&mut self) -> Result<bool, FormatError> {
        match self.bytes(1, "nothing") {
            Err(FormatError::Truncated { .. }) => Ok(true),
            other => other.map(|_| false),
        }
    }
}

/// Writes the fields of an archive, and keeps the checksum of all bytes written.
pub(super) struct Sink<'a, W> {
    writer: W,
    path: &'a Path,
    crc: Hasher,
}

impl<'a, W: Write> Sink<'a, W> {
    pub fn new(writer: W, path: &'a Path) -> Self {
        Self { writer, path, crc: Hasher::new() }
    }

    pub fn bytes(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        self.crc.update(bytes);
        self.writer.write_all(bytes).map_err(FormatError::io(self.path))
    }

    pub fn varint(&mut self, number: usize) -> Result<(), FormatError> {
        let mut rest = number;
        while rest > 127 {
            self.bytes(&[rest as u8 | 128])?;
            rest >>= 7;
        }
        self.bytes(&[rest as u8])
    }

    pub fn text(&mut self, text: &str) -> Result<(), FormatError> {
        self.varint(text.len())?;
        self.bytes(text.as_bytes())
    }

    pub fn checksum(&mut self) -> Result<(), FormatError> {
        let crc = self.crc.clone();
        self.bytes(&crc.clone().finalize().to_le_bytes())?;
        self.crc = crc;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_zip_and_leaves_out_checksums() {
        let mut file = Vec::new();
        let mut sink = Sink::new(&mut file, Path::new("memory"));
        sink.checksum().unwrap();
        sink.bytes(b"1234").unwrap();
        sink.checksum().unwrap();
        sink.bytes(b"56789").unwrap();
        sink.checksum().unwrap();
        let (crc, check) = (0x9BE3_E0A3_u32, 0xCBF4_3926_u32);
        assert_eq!(file[..4], [0; 4]);
        assert_eq!(file[8..12], crc.to_le_bytes());
        assert_eq!(file[17..], check.to_le_bytes());
        let mut source = Source::new(file.as_slice(), Path::new("memory"));
        for text in ["", "1234", "56789"] {
            assert_eq!(source.bytes(text.len(), "text").unwrap(), text.as_bytes());
            source.checksum(|| "text".into()).unwrap();
        }
        assert!(source.is_at_end().unwrap());
    }
}
