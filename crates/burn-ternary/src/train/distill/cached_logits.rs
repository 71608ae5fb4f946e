//! Cached teacher logits: the most likely next tokens of a teacher at every position of a training text.
//!
//! The file, all numbers little endian:
//!
//! | bytes | contents |
//! |---|---|
//! | 8 | magic and version |
//! | 3 x 8 | positions, tokens kept per position, vocabulary size |
//! | 32 | SHA-256 of the ids of the text |
//! | 32 | seal: SHA-256 of the header before it and of the rows |
//! | 6 x kept x positions | rows: the ids (4 bytes each), then their log probabilities (f16), most likely first |

use crate::data::tokens::TokenFile;
use burn::tensor::{Device, Int, Tensor, TensorData};
use half::f16;
use memmap2::Mmap;
use sha2::{Digest, Sha256};
use std::ops::Range;

/// The first bytes of a file.
pub(crate) const MAGIC: [u8; 8] = *b"BTLOGIT1";
const TEXT: Range<usize> = 32..64;
/// The bytes of the seal.
pub(crate) const SEAL: Range<usize> = 64..96;
const HEADER: usize = SEAL.end;
/// Bytes per token kept: its id and its log probability.
pub(crate) const ENTRY: usize = 6;

/// The memory-mapped logits of a teacher. The file is checked completely when it is opened, so reading rows cannot fail.
#[derive(Debug)]
pub struct CachedLogits {
    map: Mmap,
    positions: usize,
    kept: usize,
    vocab_size: usize,
}

impl CachedLogits {
    /// The logits of a mapped file; `None` if the file is damaged.
    pub(crate) fn from_map(map: Mmap) -> Option<Self> {
        if map.len() < HEADER || map[..8] != MAGIC {
            return None;
        }
        let number = |at: usize| {
            let bytes = map[at..at + 8].try_into().expect("eight bytes");
            usize::try_from(u64::from_le_bytes(bytes)).ok()
        };
        let (positions, kept, vocab_size) = (number(8)?, number(16)?, number(24)?);
        let rows = positions.checked_mul(kept)?.checked_mul(ENTRY)?;
        if kept == 0 || rows.checked_add(HEADER)? != map.len() {
            return None;
        }
        let sealed = Sha256::new().chain_update(&map[..SEAL.start]).chain_update(&map[HEADER..]).finalize();
        // A seal does not prove that the ids are valid. They index the logits of the student, so they must be in the vocabulary.
        let is_known =
            |id: &[u8]| (u32::from_le_bytes(id.try_into().expect("four bytes")) as usize) < vocab_size;
        let mut rows = map[HEADER..].chunks_exact(kept * ENTRY);
        let whole = map[SEAL] == *sealed && rows.all(|row| row[..kept * 4].chunks_exact(4).all(is_known));
        whole.then_some(Self { map, positions, kept, vocab_size })
    }

    /// Whether these are the logits of the text in `tokens`.
    pub fn is_of(&self, tokens: &TokenFile) -> bool {
        self.map[TEXT] == text_digest(tokens) && self.positions == tokens.len()
    }

    /// The seal: SHA-256 of the contents.
    pub(crate) fn digest(&self) -> &[u8] {
        &self.map[SEAL]
    }

    /// Vocabulary size of the teacher.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The ids and log probabilities of the `seq` positions from each of `starts` on.
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

/// The header of the logits of a text, up to the seal.
pub(crate) fn header(tokens: &TokenFile, kept: usize, vocab_size: usize) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.extend([tokens.len(), kept, vocab_size].iter().flat_map(|n| (*n as u64).to_le_bytes()));
    header.extend(text_digest(tokens));
    header
}

/// The row of one position: the `kept` most likely ids and their log probabilities.
pub(crate) fn row(logits: &[f32], kept: usize) -> Vec<u8> {
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

fn text_digest(tokens: &TokenFile) -> [u8; 32] {
    let mut digest = Sha256::new();
    (0..tokens.len()).for_each(|i| digest.update(tokens.id(i).to_le_bytes()));
    digest.finalize().into()
}
