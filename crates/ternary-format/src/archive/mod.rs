//! Archives, `*.ternary`: model files of little more than their entropy, for storing and sending.
//!
//! A [`PackedModel`] is restored bit for bit, each tensor in its own encoding. Ternary codes with a zero fraction `z`
//! cost `H(z) = h2(z) + 1 - z` bits per weight: 1.585 at one third, 1 at 77 %, 0.508 at 91.4 %, 0.336 at 95 %. A
//! model has to be unpacked to memory before it runs, so convert an archive to another kind of file for that.
//!
//! # How it works
//!
//! ```text
//! tensor -> chunks of rows -> decisions (true or false) -> rANS -> bytes
//!                                  ^
//!                           p(true), from adaptive bit models that learn from the decisions before
//! ```
//!
//! Packing and unpacking run the same function: an encoder returns the decision that it is given, a decoder the one
//! that it reads. Both update the same models, so probabilities are never stored. Chunks are coded independently, and
//! in parallel.
//!
//! # File
//!
//! Integers of fixed size are little-endian. A *varint* is an unsigned LEB128 integer in its shortest form. A
//! *string* is a varint, its length in bytes, followed by UTF-8. A *checksum* is the CRC-32 (IEEE 802.3, as in zip)
//! of all preceding bytes of the file except checksums, 4 bytes.
//!
//! | bytes | content |
//! |---|---|
//! | 4 | `TRNA` |
//! | 1 | version, 1 |
//! | varint | bytes of the unpacked header, at most 2^28 |
//! | varint, that many | header, a stream of [text](#text) |
//! | 4 | checksum |
//! | | tensors in the order of [`ModelSpec::tensors`](crate::ModelSpec::tensors), then the end of the file |
//!
//! A tensor is one byte for its encoding, then its chunks. The encoding is the number of the GGML type, or 255 for
//! `Ternary`, followed by the group size as a varint. A chunk is a varint, its length in bytes, then that many bytes,
//! then a checksum.
//!
//! A chunk stores as many rows as have at most 2^20 weights and at most 2^20 bytes (of codes and scales), but at
//! least one row; the last chunk stores the rest. A chunk that is as long as its rows is these rows, uncompressed,
//! laid out as a tensor of its own. Otherwise it is shorter, and a [stream](#streams).
//!
//! The unpacked header:
//!
//! | bytes | content |
//! |---|---|
//! | 1 | family: gpt2, llama, bitnet |
//! | 1 | activation: GELU, SwiGLU, squared ReLU |
//! | 1 | flags: 1 tied embeddings, 2 chat template, 4 tokenizer, 8 compact tokenizer, 16 begin token, 32 end token, 64 add the begin token |
//! | 7 varints | vocab_size, context, d_model, n_layers, n_heads, n_kv_heads, d_ff |
//! | 4, 4 | norm_eps, rope_theta, f32 |
//! | varint | id of the begin token, if flagged; then likewise of the end token |
//! | string | name of the model |
//! | string | chat template, if flagged |
//! | string | result of [`Tokenizer::to_json`](crate::Tokenizer::to_json), if flagged |
//!
//! A compact tokenizer is a `tokenizer.json` without redundancy. `model.vocab`, an object of tokens with the ids 0,
//! 1, 2, ..., is the list of its tokens. In `model.merges`, a pair of tokens whose concatenation is the token with
//! the id `next` is the number of characters of its first token. `next` starts at 0. After each merge, it is the
//! largest id that any merge produced so far, plus 1.
//!
//! A file is refused as a decompression bomb, before more of it is unpacked, if the bytes read so far expand to more
//! than 64 times their length plus 16 MiB. Ternary codes with 99 % zeros expand 22 times, all zeros 350 times. The
//! header may expand to 64 times its length plus 64 KiB.
//!
//! # Streams
//!
//! A stream is a sequence of decisions, true or false, each with a probability `p` of true in units of 1/65536,
//! clamped to 256 to 65280. Decisions are coded with rANS, by `DefaultAnsCoder` of [`constriction`]. All arithmetic
//! is on integers, so all machines agree. The bytes, padded with zeros to a multiple of four, are 32-bit words, read
//! from the last to the first. The state has 64 bits. It starts as the last word, or as `2^32 last + second to last`
//! if there are more words:
//!
//! ```text
//! quantile = state mod 65536
//! decision = quantile < p
//! start, length = if decision { 0, p } else { p, 65536 - p }
//! state = state / 65536 * length + quantile - start
//! if state < 2^32 and a word is left { state = 2^32 state + word }
//! ```
//!
//! After the last decision, no word is left and the state is 65536. One byte encodes at most 2048 decisions, since no
//! decision is free: a stream that is too short for its content is an error before it is unpacked.
//!
//! # Bit models
//!
//! A *bit model* estimates a probability: `q` in 22 bits, whose upper 16 bits are `p`, and a count `n`. They start at
//! 1/2 and 0. After each decision
//!
//! ```text
//! q += floor((target - q) * floor(131072 / (2 n + 3)) / 65536), target = 2^22 - 1 for true, 0 for false
//! n = min(n + 1, limit), limit = 1023 unless stated otherwise
//! ```
//!
//! A *bit tree* codes a value of several bits from the highest bit to the lowest, with one bit model for each prefix.
//!
//! # Ternary tensors
//!
//! First comes a decision of probability 1/2: whether codes are modeled by position. Then each row has its codes,
//! followed by its scales.
//!
//! A code is the decision whether it is zero and, if not, the decision whether it is +1. Without positions, each of
//! the two decisions has one bit model, the *shared* model. With positions, it also has one model per column, and one
//! that is reset at the start of each row. All of them learn every decision, but a *cell* provides the probability:
//! the model at `(class(row), class(column))`. A class is an interval of one half in log-odds, `floor((stretch(p) +
//! 2048) / 128)`. A new cell starts at the `p` of the shared model and `n = 12`. The writer models positions if that
//! saves more than 1/256, which it does when rows or columns differ in their zero fractions.
//!
//! A *scale* is the decision whether it equals the scale before (0 at first), by one of two bit models: one for the
//! case that the scale before was itself equal to its predecessor (not, at first), one for the other. If it differs,
//! its 16 bits follow, coded like an F16 below.
//!
//! # Other tensors
//!
//! Blocks are coded one after another. Each field of a block has its own bit models:
//!
//! | encoding | fields of a block |
//! |---|---|
//! | F32 | 32 bits |
//! | F16, BF16 | 16 bits |
//! | Q8_0 | scale, 32 bytes |
//! | Q4_0 | scale, 16 nibble pairs |
//! | Q4_1 | scale, scale, 16 nibble pairs |
//! | Q4_K | scale, scale, 12 bytes, 128 nibble pairs |
//! | Q6_K | 128 nibble pairs, 64 bytes, 16 bytes, scale |
//!
//! Of 16 or 32 bits, the upper 10 are a bit tree, and each other bit has one model per position. A byte is a bit
//! tree. A nibble pair is two values of the same 4-bit tree, the lower nibble first.
//!
//! # Text
//!
//! Text is coded by context mixing. The contexts of a byte are the 0, 1, 2, 3, 4 and 6 bytes before it (zeros before
//! the start). Each context length has a hash table of `slots` bit models with limit 250. `slots` is 16 times the
//! bytes of the text, rounded up to a power of two, within 2^12 and 2^20. Bits of a byte are coded from the highest
//! to the lowest; `found` is a 1 followed by the bits that are known. In arithmetic modulo 2^64:
//!
//! ```text
//! context = ((bytes before, the last one lowest) * 256 + length) * 0x9E3779B97F4A7C15 / 2^32
//! slot = (context xor found * 2^32) * 0x9E3779B97F4A7C15 / 2^40 mod slots
//! x = stretch(p of the slot), for each of the six lengths
//! p = squash(floor(sum of weight * x / 65536))
//! ```
//!
//! Each `found` has six weights, 16384 at first. After the bit, the six models learn it, and each weight grows by
//! `floor(x (65536 bit - p) 20 / 2^18)`, clamped to -2^20 and 2^20.
//!
//! `squash(x)` is `65536 / (1 + e^(-x / 256))`, interpolated linearly between its rounded values at -2048, -1920,
//! ..., 2048 (22, 36, 60, 98, 162, 267, 439, 720, 1179, 1921, 3108, 4971, 7812, 11955, 17625, 24743, 32768, and 65536
//! minus these), rounded down, with `x` clamped to -2047 and 2047. `stretch(p)` is the smallest `x` with
//! `floor(squash(x) / 16) >= floor(p / 16)`, or 2047.
//!
//! # Source
//! J. Duda, Asymmetric numeral systems, 2013, for rANS. M. Mahoney, Data Compression Explained, 2013, for bit models
//! with counts, and for context mixing of text (lpaq).

mod chunk;
mod coder;
mod compact_tokenizer;
mod header;
mod io;
mod text;

use crate::{Encoding, FormatError, PackedModel, Tensor, disk};
use chunk::Chunk;
use io::{Sink, Source};
use rayon::prelude::*;
use std::{
    io::{BufReader, Read, Write},
    path::Path,
};

const MAGIC: [u8; 4] = *b"TRNA";
const VERSION: u8 = 1;

/// Encoding number of `Ternary`, which is not a GGML type.
const TERNARY: u8 = 255;

/// Tensors that are in memory both packed and unpacked.
const BATCH_TENSORS: usize = 16;

/// Maximum factor by which a file may expand.
const MAX_EXPANSION: usize = 64;
/// Bytes by which a file may exceed this factor: a small model may be all zeros.
const EXPANSION_ALLOWANCE: usize = 16 << 20;

/// Checks that `packed` bytes may expand to `unpacked` bytes.
///
/// # Errors
/// `Expands`: they may not.
fn check_expansion(packed: usize, unpacked: usize, free: usize) -> Result<(), FormatError> {
    let expected = packed.saturating_mul(MAX_EXPANSION).saturating_add(free);
    if unpacked <= expected {
        Ok(())
    } else {
        Err(FormatError::Expands { packed, found: unpacked, expected })
    }
}

/// Reads a model.
///
/// # Errors
/// `Io`: the file cannot be read. `InFile`: what is wrong with it.
pub fn read(path: &Path) -> Result<PackedModel, FormatError> {
    let file = disk::open(path).map_err(FormatError::io(path))?;
    read_from(BufReader::new(file), path)
}

/// Reads a model from a stream, up to its end. Errors name `path`.
///
/// # Errors
/// As [`read`].
pub fn read_from(reader: impl Read, path: &Path) -> Result<PackedModel, FormatError> {
    parse(Source::new(reader, path)).map_err(|error| error.in_file(path))
}

fn parse(mut source: Source<impl Read>) -> Result<PackedModel, FormatError> {
    let mut model = header::read(&mut source)?;
    let mut layout = model.spec.tensors().peekable();
    let mut unpacked = 0usize;
    while layout.peek().is_some() {
        let packed = layout.by_ref().take(BATCH_TENSORS).map(|(name, shape)| {
            let packed = PackedTensor::read(&mut source, shape).map_err(|error| error.in_tensor(&name))?;
            Ok((name, packed))
        });
        let packed = packed.collect::<Result<Vec<_>, FormatError>>()?;
        for (_, packed) in &packed {
            unpacked = unpacked.saturating_add(packed.encoding.bytes(&packed.shape)?);
        }
        check_expansion(source.offset(), unpacked, EXPANSION_ALLOWANCE)?;
        let tensors = packed.into_par_iter().map(|(name, packed)| {
            let tensor = packed.unpack().map_err(|error| error.in_tensor(&name))?;
            Ok((name, tensor))
        });
        model.tensors.extend(tensors.collect::<Result<Vec<_>, FormatError>>()?);
    }
    if !source.is_at_end()? {
        return Err(FormatError::Damaged { part: "end".into(), why: "bytes after the last tensor" });
    }
    Ok(model)
}

/// Names of the tensors in a file, and their packed bytes.
///
/// # Errors
/// As [`read`].
pub(crate) fn sizes(path: &Path) -> Result<Vec<(String, usize)>, FormatError> {
    let file = disk::open(path).map_err(FormatError::io(path))?;
    let mut source = Source::new(BufReader::new(file), path);
    let mut sizes = || {
        let model = header::read(&mut source)?;
        let size = |(name, shape): (String, _)| {
            let start = source.offset();
            PackedTensor::read(&mut source, shape).map_err(|error| error.in_tensor(&name))?;
            Ok((name, source.offset() - start))
        };
        model.spec.tensors().map(size).collect::<Result<Vec<_>, FormatError>>()
    };
    sizes().map_err(|error| error.in_file(path))
}

/// Writes a model atomically, with its tensors in their own encodings.
///
/// # Errors
/// Those of [`PackedModel::validate`] and [`PackedModel::merged`]. `Expands`: the reader would refuse the file. `Io`.
pub fn write(model: &PackedModel, path: &Path) -> Result<(), FormatError> {
    model.validate()?;
    let model = &*model.merged()?;
    disk::atomic_write(path, |file| write_to(model, file, path))
}

/// Writes a model to a stream. Errors name `path`.
///
/// # Errors
/// As [`write()`].
pub fn write_to(model: &PackedModel, writer: impl Write, path: &Path) -> Result<(), FormatError> {
    model.validate()?;
    let model = &*model.merged()?;
    let mut sink = Sink::new(writer, path);
    header::write(model, &mut sink)?;
    let names: Vec<String> = model.spec.tensors().map(|(name, _)| name).collect();
    let (mut packed_bytes, mut unpacked) = (0, 0);
    for names in names.chunks(BATCH_TENSORS) {
        let packed = names.par_iter().map(|name| PackedTensor::new(&model.tensors[name]));
        let packed = packed.collect::<Result<Vec<_>, FormatError>>()?;
        // A file that the reader would refuse is not written.
        unpacked += names.iter().map(|name| model.tensors[name].bytes().len()).sum::<usize>();
        packed_bytes += packed.iter().flat_map(|packed| &packed.chunks).map(Vec::len).sum::<usize>();
        check_expansion(packed_bytes, unpacked, EXPANSION_ALLOWANCE)?;
        packed.into_iter().try_for_each(|packed| packed.write(&mut sink))?;
    }
    Ok(())
}

/// The packed chunks of a tensor.
struct PackedTensor {
    shape: Vec<usize>,
    encoding: Encoding,
    chunks: Vec<Vec<u8>>,
}

impl PackedTensor {
    fn new(tensor: &Tensor) -> Result<Self, FormatError> {
        let (shape, encoding) = (tensor.shape().to_vec(), tensor.encoding());
        let chunks: Vec<Chunk> = Chunk::all(encoding, &shape)?.1.collect();
        let chunks = chunks.into_par_iter().map(|chunk| chunk.pack(tensor)).collect();
        Ok(Self { shape, encoding, chunks })
    }

    fn write(&self, sink: &mut Sink<impl Write>) -> Result<(), FormatError> {
        sink.bytes(&[self.encoding.ggml_type().map_or(TERNARY, |number| number as u8)])?;
        if let Encoding::Ternary { group } = self.encoding {
            sink.varint(group)?;
        }
        for chunk in &self.chunks {
            sink.varint(chunk.len())?;
            sink.bytes(chunk)?;
            sink.checksum()?;
        }
        Ok(())
    }

    fn read(source: &mut Source<impl Read>, shape: Vec<usize>) -> Result<Self, FormatError> {
        let encoding = match source.byte("an encoding")? {
            TERNARY => Encoding::Ternary { group: source.varint("a group")? },
            number => Encoding::from_ggml_type(number.into()).ok_or_else(|| FormatError::Value {
                key: "encoding".into(),
                found: number.to_string(),
                expected: "the number of a supported GGML type, or 255".into(),
            })?,
        };
        let (n, layout) = Chunk::all(encoding, &shape)?;
        let mut chunks = Vec::new();
        for (i, chunk) in layout.enumerate() {
            let packed = source.varint("the length of a chunk")?;
            if !chunk.accepts_length(packed) {
                return Err(damaged(i, n, "its length is impossible for these rows"));
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
            chunk.unpack(&packed).ok_or_else(|| damaged(i, n, "not a valid stream"))
        });
        let rows = rows.collect::<Result<Vec<_>, _>>()?;
        // In `Ternary`, the scales of all rows follow the codes of all rows.
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
    fn false_sizes_allocate_no_memory() {
        let mut huge = model::random(Family::Llama, None);
        let (spec, most) = (&mut huge.spec, 1 << 20);
        (spec.vocab_size, spec.d_model, spec.d_ff, spec.n_layers) = (most, most, most, most);
        let end = |write: &dyn Fn(&mut Sink<&mut Vec<u8>>)| {
            let mut file = Vec::new();
            let mut sink = Sink::new(&mut file, Path::new(NOWHERE));
            header::write(&huge, &mut sink).unwrap();
            write(&mut sink);
            error(&file).kind().to_string()
        };
        let ternary = |group, chunk: usize, bytes: usize| {
            end(&|sink| {
                sink.bytes(&[TERNARY]).unwrap();
                sink.varint(group).unwrap();
                sink.varint(chunk).unwrap();
                sink.bytes(&vec![1; bytes]).unwrap();
                sink.checksum().unwrap();
            })
        };
        for (found, expected) in [
            (end(&|_| ()), "an encoding takes 1 bytes"),
            (end(&|sink| sink.bytes(&[7]).unwrap()), "key `encoding` is 7"),
            (ternary(0, 0, 0), "a multiple of 0"),
            (ternary(3, 0, 0), "a multiple of 3"),
            (ternary(most, 0, 0), "chunk 1 of 1048576: its length is impossible for these rows"),
            (ternary(most, 511, 511), "chunk 1 of 1048576: its length is impossible for these rows"),
            (
                ternary(most, usize::MAX >> 1, 0),
                "chunk 1 of 1048576: its length is impossible for these rows",
            ),
            (ternary(most, 1 << 18, 100), "a chunk takes 262144 bytes, the file has 104 more"),
            (ternary(most, 512, 512), "the length of a chunk takes 1 bytes"),
        ] {
            assert!(found.contains(expected), "{found}");
        }
    }

    /// 393 kB of packed zeros would expand to 69 MB, which would take seconds on all cores.
    #[test]
    fn an_expansion_bomb_is_refused_before_it_is_unpacked() {
        let mut bomb = model::random(Family::Llama, None);
        let spec = &mut bomb.spec;
        (spec.d_model, spec.n_heads, spec.n_kv_heads, spec.d_ff) = (64, 1, 1, 1);
        let write = |vocab_size: usize, zeros: usize| {
            let mut bomb = bomb.clone();
            bomb.spec.vocab_size = vocab_size;
            let mut file = Vec::new();
            let mut sink = Sink::new(&mut file, Path::new(NOWHERE));
            header::write(&bomb, &mut sink).unwrap();
            for (name, shape) in bomb.spec.tensors() {
                let values = |shape: &[usize], value| {
                    let values: Vec<f32> = (0..shape.iter().product()).map(|_| value).collect();
                    PackedTensor::new(&Tensor::f32(shape, &values).unwrap()).unwrap()
                };
                let packed = if name == "token_embd.weight" {
                    // Chunks are coded independently, so equal rows have equal bytes.
                    let chunk = values(&[4096, 64], 0.0).chunks.remove(0);
                    let chunks = vec![chunk; zeros];
                    PackedTensor { shape, encoding: Encoding::F32, chunks }
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
        // A small amount of zeros is accepted.
        read_from(&write(4096, 1)[..], Path::new(NOWHERE)).unwrap();
    }

    #[test]
    fn a_header_that_expands_without_bound_is_refused() {
        let mut bomb = model::random(Family::Llama, None);
        bomb.name = "a".repeat(1 << 20);
        let mut file = Vec::new();
        write_to(&bomb, &mut file, Path::new(NOWHERE)).unwrap();
        let found = error(&file);
        assert!(matches!(found.kind(), FormatError::Expands { .. }), "{found}");
    }

    #[test]
    fn streams_that_do_not_end_with_their_rows_are_errors() {
        let model = model::random(Family::Gpt2, Some(2));
        for (bytes, expected) in [
            (vec![1; 900], "tensor `token_embd.weight`: chunk 1 of 1: not a valid stream"),
            (vec![0; 900], "tensor `token_embd.weight`: chunk 1 of 1: not a valid stream"),
        ] {
            let mut file = Vec::new();
            let mut sink = Sink::new(&mut file, Path::new(NOWHERE));
            header::write(&model, &mut sink).unwrap();
            for (i, (name, _)) in model.spec.tensors().enumerate() {
                let mut packed = PackedTensor::new(&model.tensors[&name]).unwrap();
                if i == 0 {
                    packed.chunks[0] = bytes.clone();
                }
                packed.write(&mut sink).unwrap();
            }
            assert!(error(&file).to_string().contains(expected), "{}", error(&file));
        }
    }
}
