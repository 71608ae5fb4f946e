//! [`ServeOptions`]: where a server listens, whom it lets in, and what it lets them do.

use crate::ServeError;
use std::{
    net::{Ipv4Addr, SocketAddr},
    str::FromStr,
    time::Duration,
};

/// How models are served.
#[derive(Clone)]
pub struct ServeOptions {
    /// Where to listen; port 0: any that is free.
    pub address: SocketAddr,
    /// What clients have to show as `Authorization: Bearer KEY`.
    pub api_key: Option<String>,
    /// Listen on another address than loopback without a key.
    pub allow_remote: bool,
    /// Names by which clients reach the server, besides localhost and addresses.
    pub host_names: Vec<String>,
    /// Truncation of long prompts, for requests without the field `truncation`.
    pub truncation: Truncation,
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
    /// Port 8080 of loopback.
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
    /// # Errors
    /// `Open`: everybody could reach the models. `Key`, `HostName`, `Limit`: values that cannot be.
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

/// A name as a `Host` header has it, without a port.
fn is_host_name(name: &str) -> bool {
    let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    !name.is_empty() && name.chars().all(named)
}

/// What one client, or all together, may ask for. More is refused, never cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a request's body; more: 413.
    pub body: usize,
    /// Bytes of a request's headers; more: 431.
    pub header: usize,
    /// Until headers, and again until the body, have to be there, and until a client takes what it is sent.
    pub patience: Duration,
    /// Open connections; when more come, idle ones are closed, first those of the address that has the most.
    pub connections: usize,
    /// Open connections that have not shown the API key, where there is one.
    pub unauthenticated: usize,
    /// Texts in the making at a time, by model; each takes memory for its keys and values.
    pub batch: usize,
    /// Texts that wait for their turn, by model; more: 429.
    pub queue: usize,
    /// `max_tokens`
    pub tokens: usize,
    /// Texts that one request asks for: prompts times `n`; never more than `batch`.
    pub choices: usize,
    /// Stop strings of a request.
    pub stops: usize,
    /// How long requests may go on when the server stops.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body: 1 << 20,
            header: 16 << 10,
            patience: Duration::from_secs(30),
            connections: 512, // below the files that a process may usually open
            unauthenticated: 128,
            batch: 16,
            queue: 256,
            tokens: 1 << 15,
            choices: 8,
            stops: 16,
            drain: Duration::from_secs(10),
        }
    }
}

impl Limits {
    fn check(&self) -> Result<(), ServeError> {
        for (key, found) in [
            ("body", self.body),
            ("header", self.header),
            ("connections", self.connections),
            ("unauthenticated", self.unauthenticated),
            ("batch", self.batch),
            ("queue", self.queue),
            ("tokens", self.tokens),
            ("choices", self.choices),
        ] {
            if found == 0 {
                return Err(ServeError::Limit { key, found: found.to_string(), expected: "at least 1" });
            }
        }
        if self.patience.is_zero() {
            return Err(ServeError::Limit { key: "patience", found: "0".into(), expected: "more than 0 s" });
        }
        Ok(())
    }
}
