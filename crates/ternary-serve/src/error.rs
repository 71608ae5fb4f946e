//! [`ServeError`]: why a server does not start, or stops.

use std::{io, net::SocketAddr};
use ternary_format::FormatError;

/// Why a server does not start, or stops.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The address is in use, or not an address of this machine.
    #[error("{address}: {source}")]
    Address {
        /// The address of [`ServeOptions`](crate::ServeOptions).
        address: SocketAddr,
        /// Why the system refuses it.
        source: io::Error,
    },
    /// Other machines could use the models without an API key.
    #[error(
        "{address} is reachable from other machines, expected a loopback address, an API key \
             (`--api-key`), or `--allow-remote`"
    )]
    Open {
        /// The address of [`ServeOptions`](crate::ServeOptions), or of the listener.
        address: SocketAddr,
    },
    /// The API key cannot be sent in a header.
    #[error("the API key is empty or has characters other than visible ASCII")]
    Key,
    /// A host name is invalid.
    #[error("`{name}` is not a host name, expected letters, digits, dots and hyphens, without a port")]
    HostName {
        /// The name.
        name: String,
    },
    /// There are no models.
    #[error("no models, expected at least one")]
    NoModels,
    /// Names of models must be unique.
    #[error("two models have the name `{name}`, expected another name for one of them: NAME=PATH")]
    SameName {
        /// The name.
        name: String,
    },
    /// The name of a model is invalid.
    #[error("the name `{name}` of a model is empty, longer than 256 bytes or has control characters")]
    Name {
        /// The name.
        name: String,
    },
    /// A model cannot read or write text.
    #[error("model `{name}` has no tokenizer")]
    NoTokenizer {
        /// The name of the model.
        name: String,
    },
    /// The chat template of a model is invalid.
    #[error("model `{name}`: {source}")]
    ChatTemplate {
        /// The name of the model.
        name: String,
        /// Why.
        source: FormatError,
    },
    /// A limit is out of range.
    #[error("limit `{key}` is {found}, expected {expected}")]
    Limit {
        /// The field of [`Limits`](crate::Limits).
        key: &'static str,
        /// Its value.
        found: String,
        /// The range.
        expected: &'static str,
    },
    /// The system refuses threads or connections.
    #[error(transparent)]
    Io(#[from] io::Error),
}
