//! A setting out of range, named by its key.

use serde::Serialize;

/// A setting outside of its range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{key}` is {found}, expected {expected}")]
pub struct InvalidValue {
    /// The key, as experiments name it.
    pub key: String,
    /// Its value, as TOML writes it.
    pub found: String,
    /// The values that are allowed.
    pub expected: String,
}

/// Returns `InvalidValue` for `key` unless `holds`.
pub(crate) fn require(
    holds: bool,
    key: &str,
    found: impl Serialize,
    expected: impl Into<String>,
) -> Result<(), InvalidValue> {
    if holds {
        return Ok(());
    }
    // Formatted as TOML, so that an enum reads as the user spelled it.
    let found = toml::Value::try_from(found).map_or_else(|e| e.to_string(), |v| v.to_string());
    Err(InvalidValue { key: key.into(), found, expected: expected.into() })
}
