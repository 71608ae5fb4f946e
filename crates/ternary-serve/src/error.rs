//! [`ServeError`]: why a server does not start, or stops.

use std::{io, net::SocketAddr};
use ternary_format::FormatError;

/// A server that cannot be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The address is taken, or not of this machine.
    #[error("{address}: {source}")]
    Address { address: SocketAddr, source: io::Error },
    /// Anybody who reaches the machine could use the models.
    #[error(
        "{address} is reachable from other machines, expected a loopback address, an API key, or leave to serve everybody"
    )]
    Open { address: SocketAddr },
    #[error("the API key is empty or has other characters than visible ASCII")]
    Key,
    #[error("`{name}` is no host name, expected letters, digits, dots and hyphens, without a port")]
    HostName { name: String },
    #[error("no models, expected at least one")]
    NoModels,
    #[error("two models have the name `{name}`")]
    SameName { name: String },
    #[error("the name `{name}` of a model is empty, longer than 256 bytes or has control characters")]
    Name { name: String },
    /// The API speaks text, the model ids.
    #[error("model `{name}` has no tokenizer")]
    NoTokenizer { name: String },
    #[error("model `{name}`: {source}")]
    ChatTemplate { name: String, source: FormatError },
    #[error("limit `{key}` is {found}, expected {expected}")]
    Limit { key: &'static str, found: String, expected: &'static str },
    #[error(transparent)]
    Io(#[from] io::Error),
}
