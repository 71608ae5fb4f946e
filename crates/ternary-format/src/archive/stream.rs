//! Bytes, numbers and checksums, to and from any stream.

use super::crc::Crc;
use crate::FormatError;
use std::{
    io::{Read, Write},
    path::Path,
};

/// What archives are read from.
pub(super) struct Source<'a, R> {
    reader: R,
    /// For errors.
    path: &'a Path,
    offset: usize,
    crc: Crc,
}

impl<'a, R: Read> Source<'a, R> {
    pub fn new(reader: R, path: &'a Path) -> Self {
        Self { reader, path, offset: 0, crc: Crc::new() }
    }

    pub fn offset(&self) -> usize {
        self.offset
    }

    /// The next `n` bytes; no more memory is taken than there are.
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

    /// Four bytes.
    pub fn word(&mut self, what: &'static str) -> Result<[u8; 4], FormatError> {
        let mut word = [0; 4];
        word.copy_from_slice(&self.bytes(4, what)?);
        Ok(word)
    }

    /// A number of seven bits a byte, lowest first; the upper bit says that more follow.
    ///
    /// # Errors
    /// `Io`, `Truncated`. `Value`: more than 63 bits, or more bytes than it needs.
    pub fn number(&mut self, what: &'static str) -> Result<usize, FormatError> {
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
        let (found, expected) = (format!("{number} in too many bytes"), "the shortest form".into());
        Err(FormatError::Value { key: what.into(), found, expected })
    }

    /// A number of bytes, then so many of UTF-8.
    ///
    /// # Errors
    /// As [`number`](Self::number); `NotUtf8`.
    pub fn text(&mut self, what: &'static str) -> Result<String, FormatError> {
        let n = self.number(what)?;
        let offset = self.offset;
        String::from_utf8(self.bytes(n, what)?).map_err(|_| FormatError::NotUtf8 { what, offset })
    }

    /// Reads the checksum of all bytes before it but checksums.
    ///
    /// # Errors
    /// `Io`, `Truncated`. `Damaged`: it is another one.
    pub fn checksum(&mut self, part: impl FnOnce() -> String) -> Result<(), FormatError> {
        let crc = self.crc;
        let found = u32::from_le_bytes(self.word("a checksum")?);
        self.crc = crc;
        if found == crc.value() {
            return Ok(());
        }
        Err(FormatError::Damaged { part: part(), why: "its checksum is not that of its bytes" })
    }

    /// Whether no byte is left.
    ///
    /// # Errors
    /// `Io`
    pub fn ends(&mut self) -> Result<bool, FormatError> {
        match self.bytes(1, "nothing") {
            Err(FormatError::Truncated { .. }) => Ok(true),
            other => other.map(|_| false),
        }
    }
}

/// What archives are written to.
pub(super) struct Sink<'a, W> {
    writer: W,
    path: &'a Path,
    crc: Crc,
}

impl<'a, W: Write> Sink<'a, W> {
    pub fn new(writer: W, path: &'a Path) -> Self {
        Self { writer, path, crc: Crc::new() }
    }

    pub fn bytes(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        self.crc.update(bytes);
        self.writer.write_all(bytes).map_err(FormatError::io(self.path))
    }

    pub fn number(&mut self, number: usize) -> Result<(), FormatError> {
        let mut rest = number;
        while rest > 127 {
            self.bytes(&[rest as u8 | 128])?;
            rest >>= 7;
        }
        self.bytes(&[rest as u8])
    }

    pub fn text(&mut self, text: &str) -> Result<(), FormatError> {
        self.number(text.len())?;
        self.bytes(text.as_bytes())
    }

    pub fn checksum(&mut self) -> Result<(), FormatError> {
        let crc = self.crc;
        self.bytes(&crc.value().to_le_bytes())?;
        self.crc = crc;
        Ok(())
    }
}
