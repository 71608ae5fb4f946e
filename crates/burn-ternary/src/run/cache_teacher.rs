//! Writes cached teacher logits, for runs whose teacher is too slow to run in each step.

use super::checkpoint::Identity;
use super::resolve::resolve_vocabulary;
use super::run_folder::last_checkpoint;
use super::teacher::{TeacherSource, origin, unfit};
use super::{Experiment, TrainError};
use crate::ImportError;
use crate::data::{
    LmBatcher, Texts,
    tokens::{TokenFile, replace},
    window::{TokenWindows, Window},
};
use crate::device;
use crate::nn::DuckQuantized;
use crate::train::distill::{
    DistillConfig,
    cached_logits::{ENTRY, SEAL, header, row},
    teacher_model,
};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::{
    io::{self, Seek, SeekFrom, Write},
    ops::Range,
    path::Path,
    sync::Arc,
};
use ternary_format::{
    disk::{self, RunLock},
    memory, print_stderr,
};

/// Windows that the teacher reads at once.
const BATCH: usize = 8;

/// Writes the `kept` most likely next tokens of an experiment's teacher, at every position of its training text, to `path`.
/// `distill.teacher` may then name that file, and no step waits for the teacher.
///
/// Locks the run folder and leaves the prepared texts in it, as the run itself does. `advance` receives the number of positions
/// completed since its last call, and the number of all positions.
///
/// # Errors
/// `Lock`; those of [`Texts::prepare`] and [`packed_model`](super::packed_model); `Experiment`: no teacher, cached logits as the teacher,
/// or a teacher that does not fit the experiment; `Import`: logits that are not finite.
pub fn cache_teacher_logits(
    mut experiment: Experiment,
    kept: usize,
    path: &Path,
    mut advance: impl FnMut(usize, usize),
) -> Result<(), TrainError> {
    let run_dir = experiment.run_dir();
    let _lock = RunLock::acquire(&run_dir)?;
    let _other = if disk::is_in(path, &run_dir) { None } else { RunLock::of_file(path)? };
    let device = device::device(&experiment.run.device)?;
    let seq_len = experiment.model.context;
    // The folder may hold a run, whose tokenizer and tokens are not replaced by others.
    let loaded = last_checkpoint(&run_dir)?;
    let texts = Texts::read(&experiment.data, &run_dir, loaded.is_some())?;
    if let Some(loaded) = loaded {
        Identity::expect_texts(&loaded, &texts, &run_dir)?;
    }
    resolve_vocabulary(&mut experiment, &texts.tokenizer)?;
    // Cached logits have no hidden states, so the teacher needs not have comparable ones.
    let config = DistillConfig { hidden_weight: 0.0, relation_weight: 0.0, ..experiment.distill };
    let source = TeacherSource::open(&config)?;
    memory::check(source.as_ref().map_or(0, TeacherSource::bytes))?;
    let Some(TeacherSource::Model(teacher)) = source else {
        let message = "expected a run folder or a model file, whose logits can be stored".into();
        return Err(TrainError::Experiment { origin: origin(&config), message });
    };
    for warning in &teacher.warnings {
        print_stderr(format_args!("warning: {}: {warning}", config.teacher));
    }
    let teacher = teacher_model(&teacher, &config, &texts.tokenizer, &experiment.model, &device)
        .map_err(|error| unfit(error, &config))?;
    // From here on files are written.
    let data = texts.prepare(seq_len, experiment.run.seed, &run_dir)?;
    let tokens = data.train.tokens();
    let total = tokens.len();
    write_logits(&teacher, tokens, seq_len, kept, path, |done| advance(done, total))
}

/// Writes the `kept` most likely next tokens of `teacher` at every position of the text in `tokens` to `path`.
/// The teacher reads windows of `seq_len` tokens that overlap by half, so all positions but the first ones have at least half
/// a window of context. `advance` receives the number of positions completed since its last call.
///
/// # Errors
/// `Data`: a text shorter than a window, or a file that cannot be written. `Import`: logits that are not finite; no file is written.
fn write_logits(
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
    let reads: Vec<TeacherWindow> = teacher_windows(tokens.len(), seq_len).collect();
    let header = header(tokens, kept, vocab);
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
        for batch in reads.chunks(BATCH) {
            let inputs: Vec<Window> = batch.iter().map(|read| windows.at(read.start)).collect();
            let logits = teacher.forward(LmBatcher.batch(&inputs, &device).inputs).into_data();
            let logits: Vec<f32> = logits.iter::<f32>().collect();
            finite = logits.iter().all(|logit| logit.is_finite());
            if !finite {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            }
            for (read, logits) in batch.iter().zip(logits.chunks(seq_len * vocab)) {
                let new = logits.par_chunks(vocab).skip(read.keeps.start);
                let likeliest: Vec<Vec<u8>> = new.map(|logits| row(logits, kept)).collect();
                likeliest.iter().try_for_each(|row| write(row))?;
                advance(read.keeps.len());
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

/// A window that the teacher reads, and the positions in it whose logits are kept.
#[derive(Debug, PartialEq, Eq)]
struct TeacherWindow {
    start: usize,
    keeps: Range<usize>,
}

/// Windows of `seq_len` that begin half a window apart, and the last one at the end of the text; together they keep
/// every position that has a successor once.
fn teacher_windows(tokens: usize, seq_len: usize) -> impl Iterator<Item = TeacherWindow> {
    let last = tokens - 1 - seq_len;
    let step = (seq_len / 2).max(1);
    let mut done = 0;
    std::iter::from_fn(move || {
        (done < tokens - 1).then(|| {
            let start = (done + step).saturating_sub(seq_len).min(last);
            let keeps = done - start..seq_len;
            done = start + seq_len;
            TeacherWindow { start, keeps }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{corpus::Document, tokens::tests::byte_tokens};
    use crate::nn::{DuckConfig, Norm};
    use crate::quant::QuantConfig;
    use ternary_format::Tokenizer;

    #[test]
    fn windows_keep_every_position_once_after_half_a_window() {
        for (tokens, seq_len) in [(9, 8), (10, 8), (13, 8), (40, 8), (41, 7), (5, 1), (300, 64)] {
            let mut next = 0;
            for TeacherWindow { start, keeps } in teacher_windows(tokens, seq_len) {
                assert_eq!(start + keeps.start, next, "{tokens} by {seq_len}");
                assert!(start + seq_len < tokens, "the last position has a successor");
                assert!(start == 0 || keeps.start >= seq_len / 2);
                next = start + keeps.end;
            }
            assert_eq!(next, tokens - 1, "{tokens} by {seq_len}");
        }
    }

    #[test]
    fn cached_logits_are_the_most_likely_tokens_of_the_teacher() {
        let device = crate::device::device("flex").unwrap();
        let text: String = (0..50).map(|i| char::from(b'a' + (i * i % 23) as u8)).collect();
        let tokens = byte_tokens(&[Document::Text(text)]);
        let (vocab, seq, kept) = (259, 12, 5);
        let config = DuckConfig { vocab_size: vocab, context: 20, ..DuckConfig::duck_tiny() };
        let teacher = config.init(&QuantConfig::default().float(), 1, &device);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("teacher.logits");
        let mut done = 0;
        write_logits(&teacher, &tokens, seq, kept, &path, |positions| done += positions).unwrap();
        assert_eq!(done, tokens.len() - 1);
        let config = DistillConfig { teacher: path.display().to_string(), ..DistillConfig::default() };
        let Some(TeacherSource::Logits(cached)) = TeacherSource::open(&config).unwrap() else {
            panic!("not cached logits")
        };
        assert_eq!(cached.vocab_size(), vocab);

        let windows = TokenWindows::sequential(tokens.clone(), seq).unwrap();
        // The first window is kept whole, the second from its middle on.
        for (start, from) in [(0, 0), (6, 6)] {
            let inputs = LmBatcher.batch(&[windows.at(start)], &device).inputs;
            let logits: Vec<f64> = teacher.forward(inputs).into_data().iter::<f64>().collect();
            let (ids, logs) = cached.rows(&[start], seq, &device);
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
    fn logits_that_are_not_finite_are_not_cached() {
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
        let error = write_logits(&teacher, &tokens, 8, 3, &path, |_| ()).unwrap_err();
        assert!(matches!(error, TrainError::Import(ImportError::NotFinite)), "{error}");
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
    }

    #[test]
    fn cached_logits_of_another_text_or_damaged_ones_are_refused() {
        let device = crate::device::device("flex").unwrap();
        let text = |end: &str| byte_tokens(&[Document::Text("quack ".repeat(9) + end)]);
        let tokens = text("a");
        let config = DuckConfig { vocab_size: 259, context: 8, ..DuckConfig::duck_tiny() };
        let teacher = config.init(&QuantConfig::default(), 1, &device);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("teacher.logits");
        write_logits(&teacher, &tokens, 8, 3, &path, |_| ()).unwrap();
        let distill = DistillConfig { teacher: path.display().to_string(), ..DistillConfig::default() };
        let message = |tokens: &TokenFile| {
            let teacher = TeacherSource::open(&distill).and_then(|source| {
                let tokenizer = Tokenizer::byte();
                source.expect("a teacher is named").load(&distill, &tokenizer, tokens, &config, &device)
            });
            teacher.unwrap_err().to_string()
        };
        let error = message(&text("b"));
        assert!(error.contains("distill.teacher") && error.contains("of another text"), "{error}");

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
        bytes[SEAL.end..SEAL.end + 4].copy_from_slice(&259u32.to_le_bytes());
        let seal =
            Sha256::new().chain_update(&bytes[..SEAL.start]).chain_update(&bytes[SEAL.end..]).finalize();
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
