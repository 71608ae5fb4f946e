//! The manifest of a checkpoint.

use crate::train::TrainState;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub version: u64,
    /// Of the experiment, in place of an identity: manifests of version 0.1.0 of this crate have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experiment_sha256: Option<String>,
    /// Version of the keys in `identity`. Manifests without it have those of version 0.
    #[serde(default)]
    pub experiment_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<Identity>,
    pub state: TrainState,
    #[serde(rename = "model.bpk")]
    pub model: FileEntry,
    #[serde(rename = "optimizer.bpk")]
    pub optimizer: FileEntry,
    #[serde(rename = "codes.bin", default, skip_serializing_if = "Option::is_none")]
    pub codes: Option<FileEntry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileEntry {
    pub bytes: u64,
    pub sha256: String,
}

/// What a run depends on, as a checkpoint's manifest holds it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Value, as TOML, of each `section.key` that is compared by value.
    pub settings: BTreeMap<String, String>,
    /// Optimizer steps of the whole run.
    pub steps: usize,
    /// Digests of the inputs.
    pub inputs: Inputs,
    /// Name and hardware of the device that computed the last step. It is not compared: a resume on another device is a warning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
}

/// SHA-256 of what an experiment names by path, in hexadecimal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inputs {
    /// The training documents.
    pub train: String,
    /// The validation documents.
    pub valid: String,
    /// The tokenizer.
    pub tokenizer: String,
    /// The teacher.
    pub teacher: Option<String>,
    /// The initial model.
    pub start: Option<String>,
}
