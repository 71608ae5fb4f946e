//! Archives, `*.ternary`: model files in little more than their entropy, for storing and sending. All of a
//! [`PackedModel`] comes back bit for bit, each tensor in its own encoding.
//!
//! Codes of which the share `z` is zero cost `H(z) = h2(z) + 1 - z` bits each: 1.585 at a third, 1 at 77 %, 0.508 at
//! 91.4 %, 0.336 at 95 %. What is unpacked takes the memory of any model file: an archive is not for running from.
//!
//! # File
//!
//! Numbers of fixed size are little-endian. A *number* has seven bits a byte, lowest first, in as few bytes as it needs;
//! the upper bit says that more follow. A *text* is a number of bytes, then UTF-8. A *checksum* is the CRC-32 (of IEEE
//! 802.3, as in zip) of all bytes of the file before it that are not checksums, in 4 bytes.
//!
//! | bytes | what |
//! |---|---|
//! | 4 | `TRNA` |
//! | 1 | the version, 1 |
//! | number | bytes of the head, at most 2^28 |
//! | number, that many | the head, as a stream of [text](#text) |
//! | 4 | checksum |
//! | | the tensors in the order of [`ModelSpec::tensors`](crate::ModelSpec::tensors), and the end |
//!
//! A tensor is its encoding, one byte: the number of the type in GGUF files, or 255 for `Ternary`, with its group, a
//! number. Then come its chunks: a number of bytes, that many, and a checksum. A chunk is as many rows as have at most
//! 2^20 weights and 2^20 bytes (of codes and scales), at least one; the last has the rest. If it is as long as these
//! rows, it is these rows, as a tensor of its own; else it is shorter, and a stream.
//!
//! The head:
//!
//! | bytes | what |
//! |---|---|
//! | 1 | the family: gpt2, llama, bitnet |
//! | 1 | the activation: GELU, SwiGLU, squared ReLU |
//! | 1 | flags: 1 tied, 2 chat template, 4 tokenizer, 8 which is compact, 16 first token, 32 last token, 64 add the first |
//! | 7 numbers | vocab_size, context, d_model, n_layers, n_heads, n_kv_heads, d_ff |
//! | 4, 4 | norm_eps, rope_theta, f32 |
//! | number | the token before texts, if the flag is set; likewise the one after |
//! | text | the name |
//! | text | the chat template, if the flag is set |
//! | text | what [`Tokenizer::to_json`](crate::Tokenizer::to_json) gives, if the flag is set |
//!
//! A compact tokenizer is a `tokenizer.json` without what it says twice. `model.vocab`, an object of tokens with the ids
//! 0, 1, 2, ..., is the list of its tokens. In `model.merges`, a pair of tokens that makes the token `next` is the number
//! of characters of its first part. `next` is at first the id 0, and after each merge the largest id that a merge made,
//! plus 1.
//!
//! A file is refused, before any more of it is unpacked, where what was read of it would become more than 64 times as long,
//! plus 16 MiB: ternary codes of which 99 % are zero become 22 times as long, all zeros 350 times. Of the head it is 64 times,
//! plus 64 KiB.
//!
//! # Streams
//!
//! A stream is decisions between true and false, each with a probability `p` of true in 1/65536, which is first brought
//! into 256 to 65280. They are coded with rANS, by [`constriction`]'s `DefaultAnsCoder`, and nothing but integers is
//! computed, so that all machines agree. The bytes, with zeros to a multiple of four, are words of 32 bits, taken from
//! the last one on. The state has 64 bits, at first the last word, and if there are more `2^32 last + the one before`:
//!
//! ```text
//! quantile = state mod 65536
//! decision = quantile < p
//! start, length = if decision { 0, p } else { p, 65536 - p }
//! state = state / 65536 * length + quantile - start
//! if state < 2^32 and a word is left { state = 2^32 state + word }
//! ```
//!
//! After the last decision no word is left and the state is 65536. A byte stands for at most 2048 decisions: a shorter
//! stream is an error before it is unpacked. Chunks are coded apart from each other and in parallel.
//!
//! # Chances
//!
//! A *chance* learns a probability: `q` in 22 bits, of which `p` is the upper 16, and a count `n`. It begins at 1/2 and 0.
//! After each decision
//!
//! ```text
//! q += floor((target - q) * floor(131072 / (2 n + 3)) / 65536), target = 2^22 - 1 for true, 0 for false
//! n = min(n + 1, memory), memory = 1023 if nothing else is said
//! ```
//!
//! A *tree* codes a value of some bits from the highest on, with a chance for each beginning of it.
//!
//! # Ternary tensors
//!
//! First a decision of probability 1/2, whether codes are told by their places. Then row by row the codes and the scales.
//!
//! A code is the decision whether it is zero, and if not, whether it is +1. Without places there is one chance for each,
//! *the whole*. With places, one also for each column, and for each row at its start. All learn every decision, but a
//! *cell* codes it: the chance at `(class(row), class(column))`, where a class is a step of a half in log odds,
//! `floor((stretch(p) + 2048) / 128)`. A cell that is new has the `p` of the whole, and `n = 12`. The writer takes places
//! where they save more than 1/256: they are for rows and columns that differ.
//!
//! A *scale* is the decision whether it is the one before (0 at first), with one of two chances, by whether that one was
//! (not, at first); if it is another one, then come its 16 bits, as those of an F16 below.
//!
//! # Other tensors
//!
//! Block by block, each part with its own chances:
//!
//! | encoding | parts of a block |
//! |---|---|
//! | F32 | 32 bits |
//! | F16, BF16 | 16 bits |
//! | Q8_0 | scale, 32 bytes |
//! | Q4_0 | scale, 16 pairs |
//! | Q4_1 | scale, scale, 16 pairs |
//! | Q4_K | scale, scale, 12 bytes, 128 pairs |
//! | Q6_K | 128 pairs, 64 bytes, 16 bytes, scale |
//!
//! The upper 10 bits of 16 or 32 are a tree, each other bit has a chance by its place. A byte is a tree; a pair is two
//! of the same tree of 4 bits, the lower one first.
//!
//! # Text
//!
//! The contexts of a byte are the 0, 1, 2, 3, 4 and 6 bytes before it (zeros before the first). Each has a table of
//! `slots` chances of memory 250: 16 times the bytes of the text, up to a power of two, within 2^12 and 2^20. The bits of
//! a byte are coded from the highest on; `found` is a 1 followed by those that are known. In arithmetic modulo 2^64,
//!
//! ```text
//! context = ((bytes before, the last one lowest) * 256 + length) * 0x9E3779B97F4A7C15 / 2^32
//! slot = (context xor found * 2^32) * 0x9E3779B97F4A7C15 / 2^40 mod slots
//! x = stretch(p of the slot), for each of the six lengths
//! p = squash(floor(sum of weight * x / 65536))
//! ```
//!
//! with six weights for each `found`, 16384 at first. After the bit, the six chances learn it, and each weight grows by
//! `floor(x (65536 bit - p) 20 / 2^18)`, within -2^20 and 2^20.
//!
//! `squash(x)` is `65536 / (1 + e^(-x / 256))` as straight lines between the values, rounded, at -2048, -1920, ..., 2048
//! (22, 36, 60, 98, 162, 267, 439, 720, 1179, 1921, 3108, 4971, 7812, 11955, 17625, 24743, 32768, and 65536 less these),
//! rounded down, of `x` within -2047 and 2047. `stretch(p)` is the least `x` with `floor(squash(x) / 16) >= floor(p / 16)`,
//! or 2047.
//!
//! # Source
//! J. Duda, Asymmetric numeral systems, 2013, for rANS. M. Mahoney, Data Compression Explained, 2013, for chances with
//! counts and the mixing of texts (lpaq).

mod chunk;
mod coder;
mod crc;
mod head;
mod stream;
mod text;
mod vocabulary;

use crate::{Encoding, FormatError, PackedModel, Tensor, disk};
use chunk::Chunk;
use rayon::prelude::*;
use std::{
    io::{BufReader, Read, Write},
    path::Path,
};
use stream::{Sink, Source};

const MAGIC: [u8; 4] = *b"TRNA";
const VERSION: u8 = 1;

/// The number of `Ternary`, which GGML does not have.
const TERNARY: u8 = 255;

/// Tensors that are in memory in both forms.
const TOGETHER: usize = 16;

/// How many times as long a file may make its bytes, and what it may add to that.
const EXPANSION: usize = 64;
const FREE: usize = 16 << 20;

/// # Errors
/// `Expands`: `packed` bytes may not become so many.
fn check_expansion(packed: usize, unpacked: usize, free: usize) -> Result<(), FormatError> {
    let expected = packed.saturating_mul(EXPANSION).saturating_add(free);
    if unpacked <= expected {
        Ok(())
    } else {
        Err(FormatError::Expands { packed, found: unpacked, expected })
    }
}

/// Reads a model.
///
/// # Errors
/// `Io`, or what is wrong with the file, `InFile`.
pub fn read(path: &Path) -> Result<PackedModel, FormatError> {
    let file = disk::open(path).map_err(FormatError::io(path))?;
    read_from(BufReader::new(file), path)
}

/// Reads a model from a stream, to its end; `path` names it in errors.
///
/// # Errors
/// As [`read`].
pub fn read_from(reader: impl Read, path: &Path) -> Result<PackedModel, FormatError> {
    parse(Source::new(reader, path)).map_err(|error| error.in_file(path))
}

fn parse(mut source: Source<impl Read>) -> Result<PackedModel, FormatError> {
    let mut model = head::read(&mut source)?;
    let mut layout = model.spec.tensors().peekable();
    let mut unpacked = 0usize;
    while layout.peek().is_some() {
        let packed = layout.by_ref().take(TOGETHER).map(|(name, shape)| {
            let packed = Packed::read(&mut source, shape).map_err(|error| error.in_tensor(&name))?;
            Ok((name, packed))
        });
        let packed = packed.collect::<Result<Vec<_>, FormatError>>()?;
        for (_, packed) in &packed {
            unpacked = unpacked.saturating_add(packed.encoding.bytes(&packed.shape)?);
        }
        check_expansion(source.offset(), unpacked, FREE)?;
        let tensors = packed.into_par_iter().map(|(name, packed)| {
            let tensor = packed.unpack().map_err(|error| error.in_tensor(&name))?;
            Ok((name, tensor))
        });
        model.tensors.extend(tensors.collect::<Result<Vec<_>, FormatError>>()?);
    }
    if !source.ends()? {
        return Err(FormatError::Damaged { part: "end".into(), why: "bytes after the last tensor" });
    }
    Ok(model)
}

/// Names and bytes of the tensors in a file.
///
/// # Errors
/// As [`read`].
pub(crate) fn sizes(path: &Path) -> Result<Vec<(String, usize)>, FormatError> {
    let file = disk::open(path).map_err(FormatError::io(path))?;
    let mut source = Source::new(BufReader::new(file), path);
    let mut sizes = || {
        let model = head::read(&mut source)?;
        let size = |(name, shape): (String, _)| {
            let start = source.offset();
            Packed::read(&mut source, shape).map_err(|error| error.in_tensor(&name))?;
            Ok((name, source.offset() - start))
        };
        model.spec.tensors().map(size).collect::<Result<Vec<_>, FormatError>>()
    };
    sizes().map_err(|error| error.in_file(path))
}

/// Writes a model, its tensors in their own encodings, replacing what was there once the file is whole.
///
/// # Errors
/// As [`PackedModel::validate`] and [`PackedModel::merged`]. `Io`.
pub fn write(model: &PackedModel, path: &Path) -> Result<(), FormatError> {
    model.validate()?;
    let model = &*model.merged()?;
    disk::replace(path, |file| write_to(model, file, path))
}

/// Writes a model to a stream; `path` names it in errors.
///
/// # Errors
/// As [`write()`].
pub fn write_to(model: &PackedModel, writer: impl Write, path: &Path) -> Result<(), FormatError> {
    model.validate()?;
    let model = &*model.merged()?;
    let mut sink = Sink::new(writer, path);
    head::write(model, &mut sink)?;
    let names: Vec<String> = model.spec.tensors().map(|(name, _)| name).collect();
    let (mut packed_bytes, mut unpacked) = (0, 0);
    for names in names.chunks(TOGETHER) {
        let packed = names.par_iter().map(|name| Packed::new(&model.tensors[name]));
        let packed = packed.collect::<Result<Vec<_>, FormatError>>()?;
        // What would be refused is not written.
        unpacked += names.iter().map(|name| model.tensors[name].bytes().len()).sum::<usize>();
        packed_bytes += packed.iter().flat_map(|packed| &packed.chunks).map(Vec::len).sum::<usize>();
        check_expansion(packed_bytes, unpacked, FREE)?;
        packed.into_iter().try_for_each(|packed| packed.write(&mut sink))?;
    }
    Ok(())
}

/// A tensor in chunks.
struct Packed {
    shape: Vec<usize>,
    encoding: Encoding,
    chunks: Vec<Vec<u8>>,
}

impl Packed {
    fn new(tensor: &Tensor) -> Result<Self, FormatError> {
        let (shape, encoding) = (tensor.shape().to_vec(), tensor.encoding());
        let chunks: Vec<Chunk> = Chunk::all(encoding, &shape)?.1.collect();
        let chunks = chunks.into_par_iter().map(|chunk| chunk.pack(tensor)).collect();
        Ok(Self { shape, encoding, chunks })
    }

    fn write(&self, sink: &mut Sink<impl Write>) -> Result<(), FormatError> {
        sink.bytes(&[self.encoding.ggml_type().map_or(TERNARY, |number| number as u8)])?;
        if let Encoding::Ternary { group } = self.encoding {
            sink.number(group)?;
        }
        for chunk in &self.chunks {
            sink.number(chunk.len())?;
            sink.bytes(chunk)?;
            sink.checksum()?;
        }
        Ok(())
    }

    fn read(source: &mut Source<impl Read>, shape: Vec<usize>) -> Result<Self, FormatError> {
        let encoding = match source.byte("an encoding")? {
            TERNARY => Encoding::Ternary { group: source.number("a group")? },
            number => Encoding::from_ggml_type(number.into()).ok_or_else(|| FormatError::Value {
                key: "encoding".into(),
                found: number.to_string(),
                expected: "the number of a type that is read here".into(),
            })?,
        };
        let (n, layout) = Chunk::all(encoding, &shape)?;
        let mut chunks = Vec::new();
        for (i, chunk) in layout.enumerate() {
            let packed = source.number("the length of a chunk")?;
            if !chunk.can_be(packed) {
                return Err(damaged(i, n, "a length that no such chunk has"));
            }
            chunks.push(source.bytes(packed, "a chunk")?);
            source.checksum(|| part(i, n))?;
        }
        Ok(Self { shape, encoding, chunks })
    }

    fn unpack(self) -> Result<Tensor, FormatError> {
        let Self { shape, encoding, chunks } = self;
        let (n, layout) = Chunk::all(encoding, &shape)?;
        let chunks: Vec<(Chunk, Vec<u8>)> = layout.zip(chunks).collect();
        let rows = chunks.into_par_iter().enumerate().map(|(i, (chunk, packed))| {
            chunk.unpack(&packed).ok_or_else(|| damaged(i, n, "codes that no writer leaves"))
        });
        let rows = rows.collect::<Result<Vec<_>, _>>()?;
        // Where scales are apart, those of all rows follow the codes of all rows.
        let codes = |rows: &Tensor| match encoding {
            Encoding::Ternary { .. } => rows.rows() * rows.cols().div_ceil(4),
            _ => rows.bytes().len(),
        };
        let mut data = Vec::with_capacity(encoding.bytes(&shape)?);
        rows.iter().for_each(|rows| data.extend_from_slice(&rows.bytes()[..codes(rows)]));
        rows.iter().for_each(|rows| data.extend_from_slice(&rows.bytes()[codes(rows)..]));
        Tensor::new(shape, encoding, data)
    }
}

fn part(i: usize, n: usize) -> String {
    format!("chunk {} of {n}", i + 1)
}

fn damaged(i: usize, n: usize, why: &'static str) -> FormatError {
    FormatError::Damaged { part: part(i, n), why }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Family, model};

    const NOWHERE: &str = "memory";

    fn error(file: &[u8]) -> FormatError {
        read_from(file, Path::new(NOWHERE)).unwrap_err()
    }

    #[test]
    fn sizes_that_lie_take_no_memory() {
        let mut huge = model::random(Family::Llama, None);
        let (spec, most) = (&mut huge.spec, 1 << 20);
        (spec.vocab_size, spec.d_model, spec.d_ff, spec.n_layers) = (most, most, most, most);
        let end = |write: &dyn Fn(&mut Sink<&mut Vec<u8>>)| {
            let mut file = Vec::new();
            let mut sink = Sink::new(&mut file, Path::new(NOWHERE));
            head::write(&huge, &mut sink).unwrap();
            write(&mut sink);
            error(&file).kind().to_string()
        };
        let ternary = |group, chunk: usize, bytes: usize| {
            end(&|sink| {
                sink.bytes(&[TERNARY]).unwrap();
                sink.number(group).unwrap();
                sink.number(chunk).unwrap();
                sink.bytes(&vec![1; bytes]).unwrap();
                sink.checksum().unwrap();
            })
        };
        for (found, expected) in [
            (end(&|_| ()), "an encoding takes 1 bytes"),
            (end(&|sink| sink.bytes(&[7]).unwrap()), "key `encoding` is 7"),
            (ternary(0, 0, 0), "a multiple of 0"),
            (ternary(3, 0, 0), "a multiple of 3"),
            (ternary(most, 0, 0), "chunk 1 of 1048576: a length that no such chunk has"),
            (ternary(most, 511, 511), "chunk 1 of 1048576: a length that no such chunk has"),
            (ternary(most, usize::MAX >> 1, 0), "chunk 1 of 1048576: a length that no such chunk has"),
            (ternary(most, 1 << 18, 100), "a chunk takes 262144 bytes, the file has 104 more"),
            (ternary(most, 512, 512), "the length of a chunk takes 1 bytes"),
        ] {
            assert!(found.contains(expected), "{found}");
        }
    }

    /// 393 kB of packed zeros would become 69 MB, in seconds of every core.
    #[test]
    fn a_file_that_expands_without_bound_is_refused_before_it_is_unpacked() {
        let mut bomb = model::random(Family::Llama, None);
        let spec = &mut bomb.spec;
        (spec.d_model, spec.n_heads, spec.n_kv_heads, spec.d_ff) = (64, 1, 1, 1);
        let write = |vocab_size: usize, zeros: usize| {
            let mut bomb = bomb.clone();
            bomb.spec.vocab_size = vocab_size;
            let mut file = Vec::new();
            let mut sink = Sink::new(&mut file, Path::new(NOWHERE));
            head::write(&bomb, &mut sink).unwrap();
            for (name, shape) in bomb.spec.tensors() {
                let values = |shape: &[usize], value| {
                    let values: Vec<f32> = (0..shape.iter().product()).map(|_| value).collect();
                    Packed::new(&Tensor::f32(shape, &values).unwrap()).unwrap()
                };
                let packed = if name == "token_embd.weight" {
                    // Chunks are coded apart from each other: equal rows are equal bytes.
                    let chunk = values(&[4096, 64], 0.0).chunks.remove(0);
                    let chunks = vec![chunk; zeros];
                    Packed { shape, encoding: Encoding::F32, chunks }
                } else {
                    values(&shape, 0.0)
                };
                packed.write(&mut sink).unwrap();
            }
            file
        };
        let bomb = write(66 * 4096, 66);
        assert!((380_000..480_000).contains(&bomb.len()), "{} bytes", bomb.len());
        let found = error(&bomb);
        assert!(matches!(found.kind(), FormatError::Expands { .. }), "{found}");
        // Where it is little, zeros are zeros.
        read_from(&write(4096, 1)[..], Path::new(NOWHERE)).unwrap();
    }

    #[test]
    fn a_head_that_expands_without_bound_is_refused() {
        let mut bomb = model::random(Family::Llama, None);
        bomb.name = "a".repeat(1 << 20);
        let mut file = Vec::new();
        write_to(&bomb, &mut file, Path::new(NOWHERE)).unwrap();
        let found = error(&file);
        assert!(matches!(found.kind(), FormatError::Expands { .. }), "{found}");
    }

    #[test]
    fn streams_that_do_not_end_where_their_rows_do_are_errors() {
        let model = model::random(Family::Gpt2, Some(2));
        for (bytes, expected) in [
            (vec![1; 900], "tensor `token_embd.weight`: chunk 1 of 1: codes that no writer leaves"),
            (vec![0; 900], "tensor `token_embd.weight`: chunk 1 of 1: codes that no writer leaves"),
        ] {
            let mut file = Vec::new();
            let mut sink = Sink::new(&mut file, Path::new(NOWHERE));
            head::write(&model, &mut sink).unwrap();
            for (i, (name, _)) in model.spec.tensors().enumerate() {
                let mut packed = Packed::new(&model.tensors[&name]).unwrap();
                if i == 0 {
                    packed.chunks[0] = bytes.clone();
                }
                packed.write(&mut sink).unwrap();
            }
            assert!(error(&file).to_string().contains(expected), "{}", error(&file));
        }
    }
}
