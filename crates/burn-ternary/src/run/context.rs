//! What all phases of a run share.

use super::TrainError;
use super::checkpoint::Identity;
use super::experiment::Experiment;
use super::home::Home;
use super::ranks::Ranks;
use crate::data::Dataset;
use crate::report::screen::Display;
use burn::tensor::Device;
use std::io::Write;

/// A prepared run.
pub(super) struct RunContext {
    /// The resolved settings.
    pub experiment: Experiment,
    pub identity: Identity,
    /// The folder of this process.
    pub home: Home,
    /// The processes that share the run.
    pub ranks: Ranks,
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
        if self.home.is_in_place() {
            return Ok(());
        }
        Err(TrainError::Moved { path: self.home.dir().into() })
    }
}
