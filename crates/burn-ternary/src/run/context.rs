//! What all phases of a run share.

use super::TrainError;
use super::checkpoint::Identity;
use super::experiment::Experiment;
use crate::data::Dataset;
use crate::report::screen::Display;
use burn::tensor::Device;
use std::io::Write;
use std::path::PathBuf;
use ternary_format::disk::RunLock;

/// A prepared run.
pub(super) struct RunContext {
    /// The resolved settings.
    pub experiment: Experiment,
    pub identity: Identity,
    pub run_dir: PathBuf,
    /// Held until the run has written its result.
    pub lock: RunLock,
    /// Without autodiff.
    pub device: Device,
    pub data: Dataset,
    pub chat_template: Option<String>,
    /// The prompts of text samples, as text and as ids.
    pub prompts: Vec<(String, Vec<u32>)>,
    /// A prompt that the model can continue, for the summary.
    pub example_prompt: Option<String>,
    /// The full-screen display, if there is one.
    pub display: Option<Display>,
    /// Whether progress lines go to standard output.
    pub prints: bool,
}

impl RunContext {
    /// Prints a progress line, where progress is lines.
    pub fn print(&self, line: impl FnOnce() -> String) {
        if self.prints {
            // A reader that has gone away (`| head`) must not stop a run.
            let _ = writeln!(std::io::stdout(), "{}", line());
        }
    }

    /// Refuses to write under a name that is no longer that of the run's folder: another run may be there.
    ///
    /// # Errors
    /// `Moved`.
    pub fn expect_in_place(&self) -> Result<(), TrainError> {
        if self.lock.is_in_place() {
            return Ok(());
        }
        Err(TrainError::Moved { path: self.run_dir.clone() })
    }
}
