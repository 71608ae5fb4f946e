//! What a teacher thinks of a training text, written down once: the likeliest next tokens at every position.
//!
//! The file, all numbers little endian:
//!
//! | bytes | what |
//! |---|---|
//! | 8 | magic and version |
//! | 3 x 8 | positions, tokens kept a position, vocabulary |
//! | 32 | SHA-256 of the ids of the text |
//! | 32 | seal: SHA-256 of the header before it and of the rows |
//! | 6 x kept x positions | rows: the ids (4 bytes each), then their log probabilities (f16), likeliest first |

use crate::ImportError;
use crate::data::{
    LmBatcher,
    tokens::{TokenFile, replace},
    window::{TokenWindows, Window},
};
use crate::nn::DuckQuantized;
use crate::run::TrainError;
use burn::tensor::{Device, Int, Tensor, TensorData};
use half::f16;
use memmap2::Mmap;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::{
    io::{self, Read, Seek, SeekFrom, Write},
    ops::Range,
    path::Path,
    sync::Arc,
};
use ternary_format::disk;

const MAGIC: [u8; 8] = *b"BTLOGIT1";
const TEXT: Range<usize> = 32..64;
const SEAL: Range<usize> = 64..96;
const HEADER: usize = 96;
/// An id and its log probability.
const ENTRY: usize = 6;
/// Windows that the teacher reads at once.
const BATCH: usize = 8;

/// A recorded teacher: memory-mapped, checked, and unable to fail from here on.
#[derive(Debug)]
pub struct Recording {
    map: Mmap,
    positions: usize,
    kept: usize,
    vocab: usize,
}

impl Recording {
    /// Whether the file at `path` begins as a recording does.
    pub fn is_at(path: &Path) -> bool {
        let mut magic = [0; MAGIC.len()];
        let read = disk::open(path).and_then(|mut file| file.read_exact(&mut magic));
        read.is_ok() && magic == MAGIC
    }

    /// Opens the recording at `path`.
    ///
    /// # Errors
    /// `Read`: it cannot be read. `Experiment`: it is damaged; `origin` is the setting that names it.
    pub fn open(path: &Path, origin: &str) -> Result<Self, TrainError> {
        let at_path = |source| TrainError::Read { path: path.into(), source };
        let file = disk::open(path).map_err(at_path)?;
        // SAFETY: the map is only read, as bytes, and the file is only ever replaced by a rename, as a token file is.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(at_path)?;
        let damaged = || TrainError::Experiment {
            origin: origin.into(),
            message: "the recording is damaged; `duck distill-logits` writes it again".into(),
        };
        if map.len() < HEADER || map[..8] != MAGIC {
            return Err(damaged());
        }
        let number = |at: usize| {
            let bytes = map[at..at + 8].try_into().expect("eight bytes");
            usize::try_from(u64::from_le_bytes(bytes)).ok()
        };
        let (Some(positions), Some(kept), Some(vocab)) = (number(8), number(16), number(24)) else {
            return Err(damaged());
        };
        let rows = positions.checked_mul(kept).and_then(|n| n.checked_mul(ENTRY));
        let whole = rows.and_then(|n| n.checked_add(HEADER)) == Some(map.len()) && kept > 0;
        if !whole
            || map[SEAL]
                != *Sha256::new().chain_update(&map[..SEAL.start]).chain_update(&map[HEADER..]).finalize()
        {
            return Err(damaged());
        }
        // Whoever made a file can seal it: its ids are looked up, so they must be some.
        let is_known = |id: &[u8]| (u32::from_le_bytes(id.try_into().expect("four bytes")) as usize) < vocab;
        if !map[HEADER..].chunks_exact(kept * ENTRY).all(|row| row[..kept * 4].chunks_exact(4).all(is_known))
        {
            return Err(damaged());
        }
        Ok(Self { map, positions, kept, vocab })
    }

    /// Checks that the recording is of the text in `tokens`.
    ///
    /// # Errors
    /// `Experiment`: it is of another; `origin` is the setting that names it.
    pub fn expect_text(&self, tokens: &TokenFile, origin: &str) -> Result<(), TrainError> {
        if self.map[TEXT] == digest(tokens) && self.positions == tokens.len() {
            return Ok(());
        }
        let message = "the recording is of another text or tokenizer; expected that of this run (data.train, data.tokenizer)";
        Err(TrainError::Experiment { origin: origin.into(), message: message.into() })
    }

    /// The seal: SHA-256 of what was recorded.
    pub(crate) fn digest(&self) -> &[u8] {
        &self.map[SEAL]
    }

    /// Ids that the teacher knew.
    pub fn vocab_size(&self) -> usize {
        self.vocab
    }

    /// The recorded ids and log probabilities of the `seq` positions from each of `starts` on.
    ///
    /// # Shapes
    /// Both `[batch, seq, kept]`.
    ///
    /// # Panics
    /// A position beyond the text.
    pub fn rows(&self, starts: &[usize], seq: usize, device: &Device) -> (Tensor<3, Int>, Tensor<3>) {
        let shape = [starts.len(), seq, self.kept];
        let count = shape.iter().product();
        let (mut ids, mut logs) = (Vec::<i32>::with_capacity(count), Vec::<f32>::with_capacity(count));
        for position in starts.iter().flat_map(|start| *start..start + seq) {
            let at = HEADER + position * self.kept * ENTRY;
            let (row, logarithms) = self.map[at..at + self.kept * ENTRY].split_at(self.kept * 4);
            ids.extend(row.chunks_exact(4).map(|id| i32::from_le_bytes(id.try_into().expect("four bytes"))));
            logs.extend(
                logarithms
                    .chunks_exact(2)
                    .map(|log| f16::from_le_bytes(log.try_into().expect("two bytes")).to_f32()),
            );
        }
        (
            Tensor::from_data(TensorData::new(ids, shape), device),
            Tensor::from_data(TensorData::new(logs, shape), device),
        )
    }
}

/// Writes what `teacher` thinks of the text in `tokens` to `path`: at every position the `kept` likeliest next tokens.
/// The teacher reads windows of `seq_len` tokens, each half over the one before, so that it has seen at least half a
/// window before all positions but the first. `advance` is told how many positions are done more.
///
/// # Errors
/// `Data`: a text shorter than a window, or a file that cannot be written. `Import`: logits that are not finite; no file is written.
pub fn record(
    teacher: &DuckQuantized,
    tokens: &Arc<TokenFile>,
    seq_len: usize,
    kept: usize,
    path: &Path,
    mut advance: impl FnMut(usize),
) -> Result<(), TrainError> {
    let vocab = teacher.config().vocab_size;
    let kept = kept.clamp(1, vocab);
    // A text shorter than a window is refused as a training does.
    let windows = TokenWindows::sequential(tokens.clone(), seq_len)?;
    let device = teacher.embedding.device();
    let readings: Vec<Reading> = readings(tokens.len(), seq_len).collect();
    let mut header = MAGIC.to_vec();
    header.extend([tokens.len(), kept, vocab].iter().flat_map(|n| (*n as u64).to_le_bytes()));
    header.extend(digest(tokens));
    let mut finite = true;
    let written = replace(path, |file| {
        file.write_all(&header)?;
        // The seal is known at the end.
        file.write_all(&[0; SEAL.end - SEAL.start])?;
        let mut seal = Sha256::new().chain_update(&header);
        let mut write = |rows: &[u8]| {
            seal.update(rows);
            file.write_all(rows)
        };
        for batch in readings.chunks(BATCH) {
            let read: Vec<Window> = batch.iter().map(|reading| windows.at(reading.start)).collect();
            let logits = teacher.forward(LmBatcher.batch(&read, &device).inputs).into_data();
            let logits: Vec<f32> = logits.iter::<f32>().collect();
            finite = logits.iter().all(|logit| logit.is_finite());
            if !finite {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            }
            for (reading, logits) in batch.iter().zip(logits.chunks(seq_len * vocab)) {
                let new = logits.par_chunks(vocab).skip(reading.keeps.start);
                let likeliest: Vec<Vec<u8>> = new.map(|row| entry(row, kept)).collect();
                likeliest.iter().try_for_each(|row| write(row))?;
                advance(reading.keeps.len());
            }
        }
        // Nothing follows the last token.
        write(&vec![0; kept * ENTRY])?;
        file.seek(SeekFrom::Start(SEAL.start as u64))?;
        file.write_all(&seal.finalize())
    });
    if !finite {
        return Err(ImportError::NotFinite.into());
    }
    Ok(written?)
}

/// A window that the teacher reads, and the positions of it that are kept.
#[derive(Debug, PartialEq, Eq)]
struct Reading {
    start: usize,
    keeps: Range<usize>,
}

/// Windows of `seq_len` that begin half a window apart, and the last one at the end of the text; together they keep
/// every position that has a successor once.
fn readings(tokens: usize, seq_len: usize) -> impl Iterator<Item = Reading> {
    let last = tokens - 1 - seq_len;
    let step = (seq_len / 2).max(1);
    let mut done = 0;
    std::iter::from_fn(move || {
        (done < tokens - 1).then(|| {
            let start = (done + step).saturating_sub(seq_len).min(last);
            let keeps = done - start..seq_len;
            done = start + seq_len;
            Reading { start, keeps }
        })
    })
}

/// The `kept` likeliest ids of a row of logits and their log probabilities.
fn entry(logits: &[f32], kept: usize) -> Vec<u8> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let partition: f64 = logits.iter().map(|x| f64::from(x - largest).exp()).sum();
    let partition = partition.ln() + f64::from(largest);
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if kept < ids.len() {
        ids.select_nth_unstable_by(kept, order);
        ids.truncate(kept);
    }
    ids.sort_unstable_by(order);
    let logs =
        ids.iter().flat_map(|id| f16::from_f64(f64::from(logits[*id as usize]) - partition).to_le_bytes());
    ids.iter().flat_map(|id| id.to_le_bytes()).chain(logs).collect()
}

fn digest(tokens: &TokenFile) -> [u8; 32] {
    let mut digest = Sha256::new();
    (0..tokens.len()).for_each(|i| digest.update(tokens.id(i).to_le_bytes()));
    digest.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{corpus::Document, tokens::tests::byte_tokens};
    use crate::nn::{DuckConfig, Norm};
    use crate::quant::QuantConfig;

    #[test]
    fn readings_keep_every_position_once_after_half_a_window() {
        for (tokens, seq_len) in [(9, 8), (10, 8), (13, 8), (40, 8), (41, 7), (5, 1), (300, 64)] {
            let mut next = 0;
            for Reading { start, keeps } in readings(tokens, seq_len) {
                assert_eq!(start + keeps.start, next, "{tokens} by {seq_len}");
                assert!(start + seq_len < tokens, "the last position has a successor");
                assert!(start == 0 || keeps.start >= seq_len / 2);
                next = start + keeps.end;
            }
            assert_eq!(next, tokens - 1, "{tokens} by {seq_len}");
        }
    }

    #[test]
    fn a_recording_holds_the_likeliest_tokens_of_the_teacher() {
        let device = crate::device::device("flex").unwrap();
        let text: String = (0..50).map(|i| char::from(b'a' + (i * i % 23) as u8)).collect();
        let tokens = byte_tokens(&[Document::Text(text)]);
        let (vocab, seq, kept) = (259, 12, 5);
        let config = DuckConfig { vocab_size: vocab, context: 20, ..DuckConfig::duck_tiny() };
        let teacher = config.init(&QuantConfig::default().float(), 1, &device);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("teacher.logits");
        let mut done = 0;
        record(&teacher, &tokens, seq, kept, &path, |positions| done += positions).unwrap();
        assert_eq!(done, tokens.len() - 1);
        assert!(Recording::is_at(&path));
        let recording = Recording::open(&path, "").unwrap();
        assert_eq!(recording.vocab_size(), vocab);

        let windows = TokenWindows::sequential(tokens.clone(), seq).unwrap();
        // The first window is kept whole, the second from its middle on.
        for (start, from) in [(0, 0), (6, 6)] {
            let inputs = LmBatcher.batch(&[windows.at(start)], &device).inputs;
            let logits: Vec<f64> = teacher.forward(inputs).into_data().iter::<f64>().collect();
            let (ids, logs) = recording.rows(&[start], seq, &device);
            assert_eq!((ids.dims(), logs.dims()), ([1, seq, kept], [1, seq, kept]));
            let ids: Vec<usize> = ids.into_data().iter::<i64>().map(|id| id as usize).collect();
            let logs: Vec<f64> = logs.into_data().iter::<f64>().collect();
            for position in from..seq {
                let row = &logits[position * vocab..(position + 1) * vocab];
                let partition = row.iter().map(|x| x.exp()).sum::<f64>().ln();
                let mut order: Vec<usize> = (0..vocab).collect();
                order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
                for rank in 0..kept {
                    let (id, log) = (ids[position * kept + rank], logs[position * kept + rank]);
                    assert_eq!(id, order[rank], "position {position}");
                    assert!((log - (row[id] - partition)).abs() < 3e-3, "{log}");
                }
            }
        }
    }

    #[test]
    fn logits_that_are_not_finite_are_not_recorded() {
        let device = crate::device::device("flex").unwrap();
        let tokens = byte_tokens(&[Document::Text("quack ".repeat(9))]);
        let config = DuckConfig { vocab_size: 259, context: 8, ..DuckConfig::duck_tiny() };
        let mut teacher = config.init(&QuantConfig::default().float(), 1, &device);
        let huge = |norm: &mut Norm| match norm {
            Norm::Layer(norm) => {
                norm.weight = norm.weight.clone().map(|weights| weights.mul_scalar(f32::MAX))
            }
            Norm::Rms(norm) => norm.weight = norm.weight.clone().map(|weights| weights.mul_scalar(f32::MAX)),
        };
        huge(&mut teacher.transformer.norm);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("teacher.logits");
        let error = record(&teacher, &tokens, 8, 3, &path, |_| ()).unwrap_err();
        assert!(matches!(error, TrainError::Import(ImportError::NotFinite)), "{error}");
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
    }

    #[test]
    fn a_recording_of_another_text_or_a_damaged_one_is_refused() {
        let device = crate::device::device("flex").unwrap();
        let text = |end: &str| byte_tokens(&[Document::Text("quack ".repeat(9) + end)]);
        let tokens = text("a");
        let config = DuckConfig { vocab_size: 259, context: 8, ..DuckConfig::duck_tiny() };
        let teacher = config.init(&QuantConfig::default(), 1, &device);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("teacher.logits");
        record(&teacher, &tokens, 8, 3, &path, |_| ()).unwrap();
        let message = |tokens: &TokenFile| {
            let opened = Recording::open(&path, "here");
            opened.and_then(|recording| recording.expect_text(tokens, "here")).unwrap_err().to_string()
        };
        let error = message(&text("b"));
        assert!(error.contains("here: the recording is of another text"), "{error}");

        let whole = std::fs::read(&path).unwrap();
        for (at, size) in
            [(20, whole.len()), (70, whole.len()), (200, whole.len()), (0, 95), (0, whole.len() - 1)]
        {
            let mut bytes = whole[..size].to_vec();
            if size == whole.len() {
                bytes[at] ^= 1;
            }
            std::fs::write(&path, bytes).unwrap();
            let error = message(&tokens);
            assert!(error.contains("damaged"), "{at}, {size}: {error}");
        }
        // An id that no teacher has, well sealed.
        let mut bytes = whole.clone();
        bytes[HEADER..HEADER + 4].copy_from_slice(&259u32.to_le_bytes());
        let seal = Sha256::new().chain_update(&bytes[..SEAL.start]).chain_update(&bytes[HEADER..]).finalize();
        bytes[SEAL].copy_from_slice(&seal);
        std::fs::write(&path, &bytes).unwrap();
        assert!(message(&tokens).contains("damaged"));
        // A length that would overflow.
        let mut bytes = whole;
        bytes[8..24].fill(255);
        std::fs::write(&path, bytes).unwrap();
        assert!(message(&tokens).contains("damaged"));
    }
}
