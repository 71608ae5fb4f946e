//! Output: results on standard output, everything else on standard error.

use crate::Error;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    borrow::Cow,
    fmt::Display,
    fs,
    io::{self, IsTerminal, Write},
    path::Path,
    time::{Duration, Instant},
};
use ternary_format::disk;

/// Work that takes less time shows no progress bar.
const PROGRESS_DELAY: Duration = Duration::from_secs(1);
/// Reading or writing a model of more bytes shows a spinner.
const SPINNER_BYTES: usize = 128 << 20;

/// Writes a line to standard output.
pub fn print(line: impl Display) -> Result<(), Error> {
    stream(&format!("{line}\n"))
}

pub use ternary_format::print_stderr;

/// Writes text to standard output immediately, without a line end.
pub fn stream(text: &str) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    let shown = if out.is_terminal() { harmless(text) } else { text.into() };
    out.write_all(shown.as_bytes()).and_then(|()| out.flush()).map_err(Error::Output)
}

/// Replaces control characters, which models and files may contain and which control a terminal.
fn harmless(text: &str) -> Cow<'_, str> {
    let commands = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if text.contains(commands) { text.replace(commands, "\u{fffd}").into() } else { text.into() }
}

/// Writes a value as one line of JSON.
pub fn print_json(value: &impl serde::Serialize) -> Result<(), Error> {
    print(serde_json::to_string(value).expect("texts and numbers are JSON"))
}

/// Refuses to write to a path that exists. With `overwrite` a plain file may be replaced, but no folder, link, FIFO, socket or
/// device.
pub fn expect_free(path: &Path, overwrite: bool) -> Result<(), Error> {
    let entry = match fs::symlink_metadata(path) {
        Ok(entry) => entry,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(Error::Write { path: path.into(), source }),
    };
    let (path, found) = (path.display(), disk::kind(&entry));
    match (entry.is_file(), overwrite) {
        (true, true) => Ok(()),
        (true, false) => {
            Err(Error::Usage(format!("{path}: {found} is there already; --overwrite replaces it")))
        }
        (false, true) => {
            Err(Error::Usage(format!("{path}: {found} is there; --overwrite replaces plain files only")))
        }
        (false, false) => Err(Error::Usage(format!("{path}: {found} is there already"))),
    }
}

/// Writes a file atomically, if [`expect_free`] permits it.
pub fn write_file(path: &Path, contents: &[u8], overwrite: bool) -> Result<(), Error> {
    expect_free(path, overwrite)?;
    disk::write(path, contents).map_err(|source| Error::Write { path: path.into(), source })
}

/// Bytes in a decimal unit: `12.3 MB`.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} bytes"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        _ => format!("{:.1} MB", bytes as f64 / 1e6),
    }
}

/// The message of an error on one line, without the control characters that a file may have brought into it.
pub fn line(error: &impl Display) -> String {
    let text = error.to_string();
    text.split(char::is_control).filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

/// A progress bar on standard error. It appears on terminals only, and only if the work takes a while.
pub struct Progress {
    bar: ProgressBar,
    start: Instant,
}

impl Progress {
    pub fn new(what: &'static str, total: u64) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden());
        let style = ProgressStyle::with_template("{prefix} {wide_bar} {human_pos}/{human_len} {eta}");
        bar.set_style(style.expect("a valid template"));
        bar.set_prefix(what);
        Self { bar, start: Instant::now() }
    }

    pub fn advance(&self, done: usize) {
        self.bar.inc(done as u64);
        if self.bar.is_hidden() && self.start.elapsed() > PROGRESS_DELAY {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Runs work without known progress. Shows a spinner if it is about many bytes and standard error is a terminal.
pub fn waiting<T>(what: String, bytes: usize, work: impl FnOnce() -> T) -> T {
    let spinner = (bytes > SPINNER_BYTES).then(|| {
        let spinner = ProgressBar::new_spinner().with_message(what);
        spinner.enable_steady_tick(Duration::from_millis(200));
        spinner
    });
    let done = work();
    spinner.inspect(ProgressBar::finish_and_clear);
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line() {
        assert_eq!(line(&"a\nb\r\n\u{1b}[31mc"), "a b [31mc");
    }

    #[test]
    fn a_size_has_the_unit_that_fits() {
        let sizes = [0, 999, 1_000, 56_789, 1_250_000, 2_000_000_000].map(size);
        assert_eq!(sizes, ["0 bytes", "999 bytes", "1.0 kB", "56.8 kB", "1.2 MB", "2000.0 MB"]);
    }

    #[test]
    fn control_characters_of_a_model_are_replaced() {
        assert_eq!(harmless("a\u{1b}[2Jb\tc\u{9b}\n"), "a\u{fffd}[2Jb\tc\u{fffd}\n");
        assert_eq!(harmless("\u{1f986}\n"), "\u{1f986}\n");
    }

    #[test]
    fn a_file_that_cannot_be_written_leaves_no_scratch_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = write_file(&folder.path().join("missing/file"), b"x", false).unwrap_err();
        assert_eq!(error.exit_code(), 5);
        write_file(&folder.path().join("file"), b"x", false).unwrap();
        let names: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["file"]);
    }
}
