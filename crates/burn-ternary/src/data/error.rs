/// Why text could not become tokens.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {}
