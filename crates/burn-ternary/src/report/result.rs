//! `result.json`, and the summary that is printed at the end of a run.

use super::file::{at, write_atomic};
use super::format::{compact, duration, significant};
use super::real;
use serde::{Deserialize, Serialize};
use std::{
    io,
    path::{Path, PathBuf},
};
use ternary_format::disk;

/// The folder of a run that has just ended, for the commands that the summary suggests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The run folder.
    pub run_dir: PathBuf,
    /// Whether the model was trained on dialogues.
    pub chats: bool,
    /// A prompt that the model can continue.
    pub prompt: Option<String>,
    /// Name of an archive for a model that fits no GGUF file.
    pub archive: Option<String>,
    /// The model that the adapters of the run extend, if it trained adapters.
    pub base: Option<String>,
}

/// The contents of `result.json`. Losses are in nats per token; an `Option` is null where the run has no such number.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunResult {
    /// Name of the run.
    pub name: String,
    /// Seed of the run.
    pub seed: u64,
    /// The run folder and what its model can do; not in the file, which may move with its folder.
    #[serde(skip)]
    pub place: Option<Place>,
    /// The device, with the name of its hardware.
    pub device: String,
    /// CPU threads.
    pub threads: usize,
    /// Commit that this crate was built from; `None` where there was no repository.
    pub git: Option<String>,
    /// Whether its source differed from that commit.
    pub git_dirty: Option<bool>,
    /// Version of this crate.
    pub version: String,
    /// Optimizer steps done.
    pub steps: usize,
    /// Learned tokens trained on: positions of the windows whose target carries loss.
    pub tokens: u64,
    /// Wall time of all sessions of the run, in seconds: steps, evaluations, samples and checkpoints, and what this session
    /// took before and after them.
    #[serde(with = "real")]
    pub wall_s: f64,
    /// `tokens` over the wall time of all sessions between their first step and their last.
    #[serde(with = "real")]
    pub tokens_per_s: f64,
    /// Largest resident set of the process.
    pub peak_rss_bytes: Option<u64>,
    /// Parameters of the model.
    pub parameters: u64,
    /// Validation loss of the initial weights in float, where the run started from a model.
    #[serde(default, with = "real::option")]
    pub start_float_loss: Option<f64>,
    /// The same after quantization.
    #[serde(default, with = "real::option")]
    pub start_rounded_loss: Option<f64>,
    /// Loss of the last logged step with a learned token.
    #[serde(with = "real::option")]
    pub train_loss: Option<f64>,
    /// Over packed windows: documents follow each other, and a window begins wherever the one before ended. `duck eval` scores each
    /// document by itself.
    #[serde(with = "real::option")]
    pub valid_loss: Option<f64>,
    /// Validation loss in bits per byte of text.
    #[serde(with = "real::option")]
    pub valid_bits_per_byte: Option<f64>,
    /// `exp(valid_loss)`.
    #[serde(with = "real::option")]
    pub valid_perplexity: Option<f64>,
    /// The lowest validation loss.
    #[serde(with = "real::option")]
    pub best_valid_loss: Option<f64>,
    /// The step of the lowest validation loss.
    pub best_valid_step: Option<usize>,
    /// Share of ternary codes that are 0.
    #[serde(with = "real::option")]
    pub zero_fraction: Option<f64>,
    /// Bits per weight of the quantized layers, scales included.
    #[serde(with = "real::option")]
    pub bits_per_weight: Option<f64>,
    /// Size of `model.gguf`, the exported model.
    pub file_bytes: Option<u64>,
    /// Why there is no such file, otherwise.
    pub no_file: Option<String>,
    /// Size of the factors of the adapters in `adapter/`, where `[lora]` is on.
    #[serde(default)]
    pub adapter_bytes: Option<u64>,
    /// Size of the same model in f32.
    pub fp32_bytes: u64,
    /// Size of the packed tensors, computed from their shapes; a model file adds its header.
    pub packed_bytes: u64,
    /// `fp32_bytes / file_bytes`, or `/ packed_bytes` where there is no file.
    #[serde(with = "real::option")]
    pub compression: Option<f64>,
    /// Steps that the spike guard skipped.
    pub skipped_steps: usize,
    /// Steps without a learned token, which changed nothing.
    #[serde(default)]
    pub empty_steps: usize,
    /// Times that the run returned to an earlier checkpoint.
    pub rollbacks: usize,
    /// Whether all steps were done.
    pub finished: bool,
    /// Whether a signal or the terminal interface ended the run before that; `--resume` continues it.
    #[serde(default)]
    pub interrupted: bool,
    /// The error that ended the run.
    pub error: Option<String>,
}

/// A value that `build.rs` has found; it is empty where there is none.
fn known(text: &'static str) -> Option<&'static str> {
    Some(text).filter(|text| !text.is_empty())
}

impl RunResult {
    /// An empty result with what the program itself knows: this crate's version and commit.
    pub fn new(name: impl Into<String>, seed: u64) -> Self {
        Self {
            name: name.into(),
            seed,
            version: env!("CARGO_PKG_VERSION").into(),
            git: known(env!("BURN_TERNARY_COMMIT")).map(String::from),
            git_dirty: known(env!("BURN_TERNARY_DIRTY")).map(|dirty| dirty == "true"),
            ..Default::default()
        }
    }

    /// Writes `result.json`, as a whole or not at all.
    ///
    /// # Errors
    /// What the file system says, with the path.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        write_atomic(path, &text)
    }

    /// Reads what [`write`](RunResult::write) wrote.
    ///
    /// # Errors
    /// What the file system says; a key that is missing or has another type.
    pub fn read(path: &Path) -> io::Result<Self> {
        let bytes = disk::read(path).map_err(at(path))?;
        serde_json::from_slice(&bytes).map_err(|error| at(path)(error.into()))
    }

    /// The end of a run as a table of plain text, one fact per line; missing numbers are left out.
    pub fn summary(&self) -> String {
        let mib = |bytes: u64| significant(bytes as f64 / (1 << 20) as f64, 3) + " MiB";
        let mut rows = vec![("run", format!("{}, seed {}", self.name, self.seed))];
        rows.push((
            "outcome",
            match (&self.error, self.finished) {
                (Some(error), _) => format!("stopped: {error}"),
                (None, true) => "finished".into(),
                (None, false) => "not finished".into(),
            },
        ));
        let commit = match &self.git {
            Some(hash) => {
                let dirty = if self.git_dirty == Some(true) { ", changed since" } else { "" };
                format!(", git {:.10}{dirty}", hash)
            }
            None => String::new(),
        };
        rows.push(("code", format!("burn-ternary {}{commit}", self.version)));
        rows.push(("device", format!("{}, {} threads", self.device, self.threads)));
        let empty = match self.empty_steps {
            0 => String::new(),
            n => format!(", {n} without a learned token"),
        };
        rows.push((
            "steps",
            format!("{} ({} skipped, {} rollbacks{empty})", self.steps, self.skipped_steps, self.rollbacks),
        ));
        let speed = compact(self.tokens_per_s);
        rows.push(("learned tokens", format!("{}, {speed} tok/s", compact(self.tokens as f64))));
        rows.push(("wall time", duration(self.wall_s)));
        rows.push(("parameters", compact(self.parameters as f64)));
        let mut number = |name, value: Option<f64>, unit: &str| {
            rows.extend(value.map(|value| (name, significant(value, 4) + unit)));
        };
        number("start, float", self.start_float_loss, " nats/token");
        number("start, rounded", self.start_rounded_loss, " nats/token");
        number("train loss", self.train_loss, " nats/token");
        number("packed valid loss", self.valid_loss, " nats/token");
        number("perplexity", self.valid_perplexity, "");
        number("bits per byte", self.valid_bits_per_byte, "");
        let step = self.best_valid_step.map(|step| format!(" at step {step}")).unwrap_or_default();
        number("best packed valid loss", self.best_valid_loss, &step);
        number("zero fraction", self.zero_fraction, "");
        number("bits per weight", self.bits_per_weight, "");
        let compression =
            if self.file_bytes.is_some() { "compression, file" } else { "compression, weights" };
        number(compression, self.compression, "x");
        let size = match self.file_bytes {
            Some(bytes) => format!("{} ({} in f32)", mib(bytes), mib(self.fp32_bytes)),
            None => format!("{} in f32", mib(self.fp32_bytes)),
        };
        rows.push(("size", size));
        rows.extend(self.no_file.as_ref().map(|why| ("no model file", why.clone())));
        rows.extend(self.adapter_bytes.map(|bytes| {
            (
                "adapter",
                format!("{}, in `adapter` of the run folder: for --adapter with the base model", mib(bytes)),
            )
        }));
        rows.extend(self.peak_rss_bytes.map(|bytes| ("peak memory", mib(bytes))));
        rows.extend(self.place.iter().flat_map(Place::rows));
        let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        rows.iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect()
    }
}

/// A text as one word of a shell's command line.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

impl Place {
    /// The files of the run, and commands that use its model.
    fn rows(&self) -> Vec<(&'static str, String)> {
        const FILES: [&str; 6] =
            ["model.gguf", "adapter", "loss.svg", "codes.svg", "samples.txt", "metrics.jsonl"];
        let run = self.run_dir.display();
        let files: Vec<&str> = FILES.into_iter().filter(|name| self.run_dir.join(name).exists()).collect();
        let mut rows = vec![("wrote", format!("{run} ({})", files.join(", ")))];
        if let Some(base) = &self.base {
            let prompt = self
                .prompt
                .as_ref()
                .map(|prompt| format!(" --prompt {}", quoted(prompt)))
                .unwrap_or_default();
            rows.push(("with adapter", format!("duck generate {base} --adapter {run}/adapter{prompt}")));
        }
        rows.extend(self.archive.as_ref().map(|name| ("as an archive", format!("duck export {run} {name}"))));
        if files.contains(&"model.gguf") {
            if self.chats {
                rows.push(("talk to it", format!("duck chat {run}")));
            }
            let prompt = self.prompt.iter();
            rows.extend(
                prompt.map(|prompt| {
                    ("let it write", format!("duck generate {run} --prompt {}", quoted(prompt)))
                }),
            );
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn result() -> RunResult {
        RunResult {
            device: "flex".into(),
            threads: 2,
            git: Some("0123456789abcdef".into()),
            git_dirty: Some(true),
            steps: 700,
            tokens: 1_433_600,
            wall_s: 116.5,
            tokens_per_s: 12_305.5,
            peak_rss_bytes: Some(412 << 20),
            parameters: 1_234_567,
            train_loss: Some(1.25),
            valid_loss: Some(1.375),
            best_valid_loss: Some(1.25),
            best_valid_step: Some(600),
            zero_fraction: Some(0.3125),
            fp32_bytes: 5 << 20,
            finished: true,
            ..RunResult::new("duck", 3)
        }
    }

    #[test]
    fn a_result_reads_back_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("result.json");
        let mut expected = result();
        expected.write(&path).unwrap();
        assert_eq!(RunResult::read(&path).unwrap(), expected);
        expected.valid_loss = Some(f64::INFINITY);
        expected.error = Some("loss is not finite".into());
        expected.write(&path).unwrap();
        assert_eq!(RunResult::read(&path).unwrap(), expected);
        let json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(json["valid_loss"], "inf");
        assert_eq!(json["file_bytes"], serde_json::Value::Null);
        for key in [
            "name",
            "seed",
            "device",
            "threads",
            "git",
            "steps",
            "tokens",
            "wall_s",
            "tokens_per_s",
            "peak_rss_bytes",
            "parameters",
            "train_loss",
            "valid_loss",
            "valid_bits_per_byte",
            "zero_fraction",
            "file_bytes",
            "fp32_bytes",
            "compression",
        ] {
            assert!(json.get(key).is_some(), "{key} is missing");
        }
        fs::write(&path, "{}").unwrap();
        let error = RunResult::read(&path).unwrap_err().to_string();
        assert!(error.contains("result.json") && error.contains("name"), "{error}");
        let error = expected.write(&folder.path().join("none/result.json")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn the_summary_is_an_aligned_table_of_what_is_there() {
        let summary = result().summary();
        assert!(summary.is_ascii());
        let column = summary.find("duck").unwrap();
        for line in summary.lines() {
            assert_eq!(&line[column - 2..column], "  ", "{line}");
            assert_ne!(&line[column..column + 1], " ", "{line}");
        }
        for part in ["finished", "0123456789, changed", "1m57s", "best packed valid loss  1.250 at step 600"]
        {
            assert!(summary.contains(part), "{part} is not in\n{summary}");
        }
        assert!(!summary.contains("compression"), "{summary}");
        let unfit = RunResult { no_file: Some("d_model is 24".into()), ..result() };
        assert!(unfit.summary().contains("no model file           d_model is 24"), "{}", unfit.summary());
        let failed = RunResult { error: Some("loss is NaN".into()), ..RunResult::default() };
        assert!(failed.summary().contains("stopped: loss is NaN"));
    }

    #[test]
    fn the_summary_of_adapters_has_the_command_that_uses_them() {
        let place = Place {
            run_dir: "runs/poems-1".into(),
            chats: false,
            prompt: Some("the duck's".into()),
            archive: None,
            base: Some("base.gguf".into()),
        };
        let result = RunResult { adapter_bytes: Some(3 << 20), place: Some(place), ..result() };
        let summary = result.summary();
        for row in [
            "3.00 MiB, in `adapter` of the run folder: for --adapter with the base model",
            r"duck generate base.gguf --adapter runs/poems-1/adapter --prompt 'the duck'\''s'",
        ] {
            assert!(summary.contains(row), "{row} is not in\n{summary}");
        }
    }
}
