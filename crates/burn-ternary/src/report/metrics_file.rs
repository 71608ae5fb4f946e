//! `metrics.jsonl`, one line per report, and `samples.txt`.

use super::file::{at, write_atomic};
use super::step_report::{Split, StepReport};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, value::RawValue};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};
use ternary_format::disk;

#[derive(Serialize, Deserialize)]
struct Line {
    split: Split,
    #[serde(flatten)]
    report: StepReport,
}

impl Line {
    /// Parses a line, its numbers bit for bit: serde_json's parser of floats may be one unit in the last place off, that of
    /// [`real`] for strings is the standard library's.
    fn parse(text: &[u8]) -> serde_json::Result<Self> {
        let fields: BTreeMap<String, &RawValue> = serde_json::from_slice(text)?;
        let exact = |(key, value): (String, &RawValue)| {
            let text = value.get();
            let float = text.starts_with(|first: char| first == '-' || first.is_ascii_digit())
                && text.contains(['.', 'e', 'E']);
            Ok((key, if float { Value::from(text) } else { serde_json::from_str(text)? }))
        };
        let fields: Map<_, _> = fields.into_iter().map(exact).collect::<serde_json::Result<_>>()?;
        serde_json::from_value(fields.into())
    }
}

/// The complete lines of a metrics file with their bytes. A process that is killed can tear the last line only; one
/// that has no line feed and does not parse is left out.
fn lines<'a>(path: &Path, bytes: &'a [u8]) -> io::Result<Vec<(&'a [u8], Line)>> {
    let mut lines = Vec::new();
    for (index, text) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
        match Line::parse(text) {
            Ok(line) => lines.push((text.trim_ascii_end(), line)),
            Err(_) if !text.ends_with(b"\n") => break,
            Err(error) => {
                let message =
                    format!("{}: line {}: expected a metrics line, found {error}", path.display(), index + 1);
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
        }
    }
    Ok(lines)
}

/// The writer of `metrics.jsonl`: a line `{"split":"train"|"valid", ...}` per report, on disk when [`append`] returns.
///
/// [`append`]: MetricsFile::append
pub struct MetricsFile {
    path: PathBuf,
    file: File,
    length: u64,
}

impl MetricsFile {
    /// Begins an empty file, or, to resume or roll back, keeps exactly the lines up to and including `resume_step`,
    /// byte for byte. A file that is missing counts as empty.
    ///
    /// # Errors
    /// What the file system says; a complete line that is no metrics line, by number.
    pub fn open(path: impl Into<PathBuf>, resume_step: Option<usize>) -> io::Result<Self> {
        let path = path.into();
        let mut kept = Vec::new();
        if let Some(last) = resume_step {
            let bytes = match disk::read(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
                other => other.map_err(at(&path))?,
            };
            for (text, line) in lines(&path, &bytes)? {
                if line.report.step <= last {
                    kept.extend_from_slice(text);
                    kept.push(b'\n');
                }
            }
        }
        write_atomic(&path, &kept)?;
        let file = disk::open_in_place(&path, File::options().append(true)).map_err(at(&path))?;
        Ok(Self { path, file, length: kept.len() as u64 })
    }

    /// Writes one line.
    ///
    /// # Errors
    /// What the file system says (a full disk, for one); the file then ends with the line before.
    pub fn append(&mut self, split: Split, report: &StepReport) -> io::Result<()> {
        let mut line = serde_json::to_vec(&Line { split, report: *report })?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(|error| {
            let _ = self.file.set_len(self.length);
            at(&self.path)(error)
        })?;
        self.length += line.len() as u64;
        Ok(())
    }
}

/// Keeps the lines `step N ...` of `samples.txt` up to and including `resume_step`: a resumed run writes the others again.
/// A new run keeps none.
///
/// # Errors
/// What the file system says.
pub(crate) fn keep_samples(path: &Path, resume_step: Option<usize>) -> io::Result<()> {
    if fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        return Ok(());
    }
    let Some(last) = resume_step else {
        return write_atomic(path, b"");
    };
    let text = disk::read_to_string(path).map_err(at(path))?;
    let step = |line: &str| line.strip_prefix("step ")?.split(' ').next()?.parse::<usize>().ok();
    let kept: String =
        text.split_inclusive('\n').filter(|line| step(line).is_some_and(|step| step <= last)).collect();
    write_atomic(path, kept.as_bytes())
}

/// The reports of a run, in the order in which they were written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// Reports of training steps.
    pub train: Vec<StepReport>,
    /// Reports of validations.
    pub valid: Vec<StepReport>,
}

impl History {
    /// Reads a metrics file, a torn last line left out.
    ///
    /// # Errors
    /// What the file system says; a complete line that is no metrics line, by number.
    pub fn read(path: &Path) -> io::Result<Self> {
        let bytes = disk::read(path).map_err(at(path))?;
        let mut history = Self::default();
        for (_, line) in lines(path, &bytes)? {
            match line.split {
                Split::Train => history.train.push(line.report),
                Split::Valid => history.valid.push(line.report),
            }
        }
        Ok(history)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(step: usize) -> StepReport {
        StepReport { step, loss: 3.5 / step as f64, tokens: 64, ..Default::default() }
    }

    fn steps(reports: &[StepReport]) -> Vec<usize> {
        reports.iter().map(|report| report.step).collect()
    }

    #[test]
    fn a_line_is_on_disk_when_append_returns_and_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let full = StepReport {
            step: 7,
            epoch: 0.25,
            loss: f64::NAN,
            grad_norm: f64::INFINITY,
            z_loss: Some(f64::NEG_INFINITY),
            lr: 0.0,
            zero_fraction: Some(0.5),
            peak_rss_bytes: Some(u64::MAX),
            ..Default::default()
        };
        let mut file = MetricsFile::open(&path, None).unwrap();
        file.append(Split::Train, &full).unwrap();
        file.append(Split::Valid, &report(8)).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let line = text.lines().next().unwrap();
        assert!(line.starts_with(r#"{"split":"train","step":7,"#), "{line}");
        for part in [r#""loss":"NaN""#, r#""grad_norm":"inf""#, r#""z_loss":"-inf""#] {
            assert!(line.contains(part), "{line}");
        }
        assert!(!line.contains("null") && !line.contains("flipped"), "{line}");
        let History { train, valid } = History::read(&path).unwrap();
        assert!(train[0].loss.is_nan());
        assert_eq!(StepReport { loss: 0.0, ..train[0] }, StepReport { loss: 0.0, ..full });
        assert_eq!(valid, [report(8)]);
    }

    #[test]
    fn floats_read_back_bit_for_bit() {
        use rand::Rng;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut file = MetricsFile::open(&path, None).unwrap();
        let mut random = rand::rng();
        let mut reports = vec![StepReport { loss: -0.0, lr: 5e-324, ..report(1) }];
        reports.extend((0..500).map(|_| StepReport {
            loss: random.random_range(0.0..6.0),
            bits_per_byte: Some(random.random()),
            grad_norm: f64::from_bits(random.random_range(0..0x7ff0_0000_0000_0000)),
            ..report(1)
        }));
        for report in &reports {
            file.append(Split::Train, report).unwrap();
        }
        let bits = |report: &StepReport| {
            [report.loss, report.bits_per_byte.unwrap_or(0.0), report.grad_norm, report.lr].map(f64::to_bits)
        };
        let read = History::read(&path).unwrap().train;
        assert_eq!(read.iter().map(bits).collect::<Vec<_>>(), reports.iter().map(bits).collect::<Vec<_>>());
    }

    #[test]
    fn resume_keeps_exactly_the_lines_up_to_its_step() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut file = MetricsFile::open(&path, None).unwrap();
        for step in 1..=6 {
            file.append(Split::Train, &report(step)).unwrap();
            if step % 2 == 0 {
                file.append(Split::Valid, &report(step)).unwrap();
            }
        }
        drop(file);
        let whole = fs::read(&path).unwrap();
        let kept: Vec<u8> = whole.split_inclusive(|b| *b == b'\n').take(6).flatten().copied().collect();
        // Torn at every byte after the last line that must stay.
        for end in kept.len()..=whole.len() {
            fs::write(&path, &whole[..end]).unwrap();
            let mut file = MetricsFile::open(&path, Some(4)).unwrap();
            assert_eq!(fs::read(&path).unwrap(), kept);
            file.append(Split::Train, &report(5)).unwrap();
            let history = History::read(&path).unwrap();
            assert_eq!(steps(&history.train), [1, 2, 3, 4, 5]);
            assert_eq!(steps(&history.valid), [2, 4]);
        }
        // A whole line that lacks only its line feed is no torn line.
        fs::write(&path, &kept[..kept.len() - 1]).unwrap();
        MetricsFile::open(&path, Some(4)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), kept);
        MetricsFile::open(&path, None).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"", "a new run starts empty");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no scratch file stays");
    }

    #[test]
    fn a_bad_line_is_named_and_nothing_is_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut file = MetricsFile::open(&path, None).unwrap();
        file.append(Split::Train, &report(1)).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        bytes.extend_from_slice(b"{\"split\":\"trial\"}\n");
        fs::write(&path, &bytes).unwrap();
        let error = MetricsFile::open(&path, Some(4)).err().unwrap().to_string();
        assert!(error.contains("metrics.jsonl: line 2"), "{error}");
        assert!(History::read(&path).is_err());
        assert_eq!(fs::read(&path).unwrap(), bytes);
        let error = History::read(&folder.path().join("none")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().contains("none"), "{error}");
    }

    /// `/dev/full` is a file system without space.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error_with_the_path() {
        let path = PathBuf::from("/dev/full");
        let file = File::options().append(true).open(&path).unwrap();
        let mut metrics = MetricsFile { path, file, length: 0 };
        let error = metrics.append(Split::Train, &report(1)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(error.to_string().starts_with("/dev/full: "), "{error}");
        assert_eq!(metrics.length, 0);
    }
}
