//! [`Error`]: the errors of all commands, and their exit codes.

use std::{io, path::PathBuf};
use ternary_eval::ExampleError;
use ternary_format::{FormatError, disk::LockError, memory, threads::ThreadError};
use ternary_infer::EngineError;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An invalid argument.
    #[error("{0}")]
    Usage(String),
    /// A model file that cannot be read.
    #[error(transparent)]
    Model(FormatError),
    /// A model that the command cannot use, or a prompt that does not fit.
    #[error("{model}: {source}")]
    Engine { model: String, source: EngineError },
    /// A model that the format cannot store, or a file that cannot be written.
    #[error(transparent)]
    Export(FormatError),
    /// An evaluation file that cannot be read.
    #[error(transparent)]
    Examples(#[from] ExampleError),
    #[error("{}: cannot write: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    /// A file with other content than expected.
    #[error("{origin}: expected {expected}, found {found}")]
    Data { origin: String, expected: String, found: String },
    /// A run folder that another process writes.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Questions of a pipe that a chat could not answer; their errors have been printed.
    #[error("{unanswered} of {questions} questions were not answered")]
    Unanswered { unanswered: usize, questions: usize },
    /// Standard output cannot be written.
    #[error("standard output: {0}")]
    Output(io::Error),
    #[error("standard input: {0}")]
    Input(io::Error),
    #[error(transparent)]
    Threads(#[from] ThreadError),
    #[error("the network: {0}")]
    Network(String),
    /// A run folder without a model file, whose checkpoints cannot be exported either.
    #[cfg(feature = "train")]
    #[error("{}: there is no model.gguf, and no checkpoint can be exported: {source}", run.display())]
    Run { run: PathBuf, source: Box<burn_ternary::run::TrainError> },
    #[cfg(feature = "train")]
    #[error(transparent)]
    Train(#[from] burn_ternary::run::TrainError),
}

impl Error {
    /// An error of the engine that runs `model`.
    pub fn engine(model: &str) -> impl FnOnce(EngineError) -> Self {
        move |source| match source {
            // These messages have the path.
            EngineError::Format(source @ (FormatError::Io { .. } | FormatError::InFile { .. })) => {
                Self::Model(source)
            }
            source => Self::Engine { model: model.into(), source },
        }
    }

    /// Whether the reader of standard output has gone, as `head` does. That is not an error.
    pub fn is_closed_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }

    /// Whether another process of a training reports the cause.
    pub fn is_reported(&self) -> bool {
        match self {
            #[cfg(feature = "train")]
            Self::Train(error) => error.is_reported(),
            _ => false,
        }
    }

    /// 2 usage, 3 data or model file, 4 device or memory, 5 disk, 1 other errors; 0 if the reader of the output has gone.
    pub fn exit_code(&self) -> u8 {
        use EngineError::{ContextFull, EmptyPrompt, MessageTooLong, Option as OutOfRange};
        match self {
            _ if self.is_closed_pipe() => 0,
            // In any of the errors below.
            _ if memory::is_cause_of(self) => 4,
            Self::Threads(ThreadError::TooMany { .. }) => 2,
            Self::Threads(_) => 4,
            Self::Engine { source: EngineError::Memory(_) | EngineError::Weights { .. }, .. } => 4,
            Self::Engine { source: EngineError::Threads { .. }, .. } => 4,
            Self::Usage(_) | Self::Unanswered { .. } | Self::Lock(LockError::Held { .. }) => 2,
            Self::Engine {
                source: OutOfRange { .. } | ContextFull { .. } | MessageTooLong { .. } | EmptyPrompt,
                ..
            } => 2,
            Self::Model(_) | Self::Engine { .. } | Self::Data { .. } | Self::Examples(_) | Self::Input(_) => {
                3
            }
            Self::Export(error) if !matches!(error.kind(), FormatError::Io { .. }) => 3,
            Self::Export(_) | Self::Write { .. } | Self::Lock(_) | Self::Output(_) => 5,
            Self::Network(_) => 1,
            #[cfg(feature = "train")]
            Self::Run { .. } => 3,
            #[cfg(feature = "train")]
            Self::Train(error) => error.exit_code(),
        }
    }
}
