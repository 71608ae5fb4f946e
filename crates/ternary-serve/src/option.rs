//! [`ServeOptions`]: the address of a server, who may use it, and its limits.

use crate::ServeError;
use getset::WithSetters;
use std::{
    net::{Ipv4Addr, SocketAddr},
    str::FromStr,
    time::Duration,
};

/// Options of a server.
///
/// # Example
/// ```
/// use ternary_serve::{Limits, ServeOptions, Truncation};
///
/// let options = ServeOptions::default()
///     .with_api_key(Some("secret".into()))
///     .with_truncation(Truncation::Auto)
///     .with_limits(Limits::default().with_batch(4));
/// options.check()?;
/// # Ok::<(), ternary_serve::ServeError>(())
/// ```
#[derive(Clone, WithSetters)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct ServeOptions {
    /// Address to listen on; port 0: any free port. Default: port 8080 of 127.0.0.1.
    pub address: SocketAddr,
    /// Requires this key from clients, as the header `Authorization: Bearer KEY`. Default: none.
    pub api_key: Option<String>,
    /// Allows an address other than a loopback one without a key. Default: false.
    pub allow_remote: bool,
    /// Names by which clients address the server, besides localhost and addresses. Default: none.
    pub host_names: Vec<String>,
    /// Truncation of long prompts, for requests without the field `truncation`. Default: disabled.
    pub truncation: Truncation,
    /// Limits of requests, connections and memory.
    pub limits: Limits,
}

/// How the server handles a prompt longer than the model's context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Truncation {
    /// Reject the request with the code `context_length_exceeded`.
    #[default]
    Disabled,
    /// Drop the oldest turns of a dialogue, or the beginning of a text, until the answer has room.
    Auto,
}

impl FromStr for Truncation {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "disabled" => Ok(Self::Disabled),
            "auto" => Ok(Self::Auto),
            _ => Err("expected auto or disabled".into()),
        }
    }
}

impl Default for ServeOptions {
    fn default() -> Self {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 8080));
        Self {
            address,
            api_key: None,
            allow_remote: false,
            host_names: Vec::new(),
            truncation: Truncation::default(),
            limits: Limits::default(),
        }
    }
}

impl std::fmt::Debug for ServeOptions {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { address, api_key, allow_remote, host_names, truncation, limits } = self;
        f.debug_struct("ServeOptions")
            .field("address", address)
            .field("api_key", &api_key.as_ref().map(|_| "..."))
            .field("allow_remote", allow_remote)
            .field("host_names", host_names)
            .field("truncation", truncation)
            .field("limits", limits)
            .finish()
    }
}

impl ServeOptions {
    /// Checks that a server can start with these options.
    ///
    /// # Errors
    /// `Open`: other machines could use the models without a key. `Key`, `HostName`, `Limit`: an invalid value.
    pub fn check(&self) -> Result<(), ServeError> {
        self.limits.check()?;
        if let Some(name) = self.host_names.iter().find(|name| !is_host_name(name)) {
            return Err(ServeError::HostName { name: name.clone() });
        }
        match &self.api_key {
            Some(key) if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) => {
                Err(ServeError::Key)
            }
            None if !self.address.ip().is_loopback() && !self.allow_remote => {
                Err(ServeError::Open { address: self.address })
            }
            _ => Ok(()),
        }
    }
}

/// Whether `name` can be the value of a `Host` header without a port.
fn is_host_name(name: &str) -> bool {
    let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    !name.is_empty() && name.chars().all(named)
}

/// Limits of one client, or of all together. Requests beyond a limit are refused, not reduced.
#[derive(Clone, Debug, PartialEq, Eq, WithSetters)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct Limits {
    /// Maximum length of a request body, in bytes; more: status 413. Default: 1 MiB.
    pub body_bytes: usize,
    /// Maximum length of the headers, in bytes; more: status 431. Default: 16 KiB.
    pub header_bytes: usize,
    /// Timeout of the headers, of the body, and of a client that does not read. Default: 30 s.
    pub timeout: Duration,
    /// Maximum number of open connections. Beyond it idle ones are closed, first those of the address with the most.
    /// Default: 512.
    pub connections: usize,
    /// The same for connections that have not presented the API key, if there is one. Default: 128.
    pub unauthenticated_connections: usize,
    /// Maximum concurrent completions per model. Each takes memory for its KV cache. Default: 16.
    pub batch: usize,
    /// Maximum queued completions per model; more: status 429. Default: 256.
    pub queue: usize,
    /// Largest `max_tokens` of a request. Default: 32,768.
    pub max_tokens: usize,
    /// Maximum completions per request: prompts times `n`. Never more than `batch`. Default: 8.
    pub choices: usize,
    /// Maximum number of stop sequences per request. Default: 16.
    pub stop_sequences: usize,
    /// How long active requests may take when the server stops. Default: 10 s.
    pub drain_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 1 << 20,
            header_bytes: 16 << 10,
            timeout: Duration::from_secs(30),
            connections: 512, // below the usual limit of open files
            unauthenticated_connections: 128,
            batch: 16,
            queue: 256,
            max_tokens: 1 << 15,
            choices: 8,
            stop_sequences: 16,
            drain_timeout: Duration::from_secs(10),
        }
    }
}

impl Limits {
    fn check(&self) -> Result<(), ServeError> {
        for (key, found) in [
            ("body_bytes", self.body_bytes),
            ("header_bytes", self.header_bytes),
            ("connections", self.connections),
            ("unauthenticated_connections", self.unauthenticated_connections),
            ("batch", self.batch),
            ("queue", self.queue),
            ("max_tokens", self.max_tokens),
            ("choices", self.choices),
        ] {
            if found == 0 {
                return Err(ServeError::Limit { key, found: found.to_string(), expected: "at least 1" });
            }
        }
        if self.timeout.is_zero() {
            return Err(ServeError::Limit { key: "timeout", found: "0".into(), expected: "more than 0 s" });
        }
        Ok(())
    }
}
