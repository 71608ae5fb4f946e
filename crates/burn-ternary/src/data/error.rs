use std::{io, path::PathBuf};
use ternary_format::FormatError;

/// Why text could not become tokens.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A key of the `[data]` section is out of its range.
    #[error("data.{key}: expected {expected}, found {found}")]
    BadValue {
        /// Key of the section.
        key: &'static str,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },

    /// A file or folder is missing or may not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },

    /// A file could not be written: no permission, no space.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },

    /// A named file is neither `.txt` nor `.jsonl`.
    #[error("{}: expected a folder or a file that ends in .txt or .jsonl", path.display())]
    UnknownKind {
        /// The file or folder.
        path: PathBuf,
    },

    /// Not enough text to train on and to hold some out.
    #[error("{bytes} bytes in {documents} document{} are too little to train on and to hold some out; expected some 2,000 bytes of text, or 20 documents", if *documents == 1 { "" } else { "s" })]
    TooLittle {
        /// Bytes of text.
        bytes: usize,
        /// Number of documents.
        documents: usize,
    },

    /// A folder without texts.
    #[error("{}: expected .txt or .jsonl files in this folder, found none", path.display())]
    NothingFound {
        /// The file or folder.
        path: PathBuf,
    },

    /// A file without text.
    #[error("{}: expected text, found an empty file", path.display())]
    Empty {
        /// The file or folder.
        path: PathBuf,
    },

    /// A file that is not UTF-8.
    #[error("{}: expected UTF-8 text, found an invalid byte at offset {offset}", path.display())]
    NotUtf8 {
        /// The file or folder.
        path: PathBuf,
        /// Offset of the first invalid byte.
        offset: usize,
    },

    /// A line of a `.jsonl` file is not a document.
    #[error(
        "{}, line {line}: expected an object with a string \"text\" or the strings \"question\" and \"answer\", \
         found {found}",
        path.display()
    )]
    BadLine {
        /// The file or folder.
        path: PathBuf,
        /// Line of the file, from 1.
        line: usize,
        /// What was found.
        found: String,
    },

    /// A file without a tokenizer that can be used.
    #[error("{}: expected a tokenizer.json or a model, found {found}", path.display())]
    Tokenizer {
        /// The file or folder.
        path: PathBuf,
        /// What was found.
        found: String,
    },

    /// The training of a tokenizer failed.
    #[error("cannot train the bpe tokenizer: {reason}")]
    Training {
        /// What the trainer reported.
        reason: String,
    },

    /// The character tokenizer met a character that the training text does not have.
    #[error(
        "the char tokenizer knows only the {known} characters of the training text, found {character:?} (U+{:04X}); \
         add it to the training text or take the byte or bpe tokenizer",
        *character as u32
    )]
    UnknownCharacter {
        /// The unknown character.
        character: char,
        /// Number of characters that the tokenizer knows.
        known: usize,
    },

    /// A `tokenizer.json` refused a text.
    #[error(transparent)]
    Encode(FormatError),

    /// A training text whose windows hold questions only.
    #[error(
        "expected learned tokens, found none in the {windows} windows of the training text: answers are too short for a \
         context of {context}, or lie outside of its whole windows; choose another context or add dialogues"
    )]
    NothingLearned {
        /// Number of training windows.
        windows: usize,
        /// Context length, in tokens.
        context: usize,
    },

    /// A corpus that is shorter than one window.
    #[error(
        "the {split} text has {tokens} tokens, but one window needs {needed} (context + 1): \
         add text or choose a smaller context"
    )]
    TooShort {
        /// `training` or `validation`.
        split: String,
        /// Tokens of the text.
        tokens: usize,
        /// Tokens of one window: context + 1.
        needed: usize,
    },
}

/// What a tokenizer says of a text.
impl From<FormatError> for DataError {
    fn from(error: FormatError) -> Self {
        match error {
            FormatError::UnknownCharacter { character, known } => Self::UnknownCharacter { character, known },
            other => Self::Encode(other),
        }
    }
}
