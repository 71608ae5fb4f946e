//! An experiment: everything that a run depends on, as strict TOML.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use crate::{
    data::DataConfig,
    invalid_value::{InvalidValue, require},
    nn::{DuckConfig, Family, LoraConfig, MixedPrecision},
    quant::{ActivationPrecision, Estimator, Granularity, MatmulPrecision, QuantConfig, Sparsity},
    run::{
        TrainError,
        version::{self, VERSION},
    },
    train::{distill::DistillConfig, optim::OptimConfig, schedule::ScheduleConfig},
};
use getset::WithSetters;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use ternary_format::disk;
use toml::{
    Value,
    de::{DeTable, Deserializer},
};

/// All settings of one run.
///
/// In a file, a missing key has its default, and an unknown key is an error. [`Experiment::validate`] refuses an experiment without
/// `data.train` or `run.name`, which have no default that could be trained. Files of older versions of the format are read too; see
/// [`VERSION`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema, WithSetters)]
#[serde(default, deny_unknown_fields)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct Experiment {
    /// The texts, and how they become tokens.
    pub data: DataConfig,
    /// The architecture of a Duck, a decoder-only transformer.
    pub model: DuckConfig,
    /// Which weights are quantized, and how.
    pub quant: QuantConfig,
    /// Knowledge distillation from a teacher.
    pub distill: DistillConfig,
    /// Low-rank adapters (LoRA) for a frozen model.
    pub lora: LoraConfig,
    /// Optimizers and loss terms.
    pub optim: OptimConfig,
    /// What changes during a run. Fractions are shares of `run.steps`, from 0 to 1.
    pub schedule: ScheduleConfig,
    /// Name, device, length, batch size, logging and checkpoints.
    pub run: RunConfig,
}

/// The experiment that is trained if no file is named.
pub(super) const DEFAULT: &str =
    include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/experiments/00-default.toml"));

/// The `[run]` section of an experiment: name, device, length, batch size, logging and checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema, WithSetters)]
#[serde(default, deny_unknown_fields)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct RunConfig {
    /// Name of the run. The run folder is `<out_dir>/<name>-<seed>`.
    pub name: String,
    /// Folder that contains the run folders.
    pub out_dir: String,
    /// A run folder or model file whose weights initialize the model; empty: random weights.
    pub start_from: String,
    /// Seed of weights, data order and dropout.
    pub seed: u64,
    /// Device: `"auto"` (the first of cuda, wgpu, tch, ndarray and flex that was compiled in and is no software renderer), `"flex"`,
    /// `"ndarray"`, `"wgpu"`, `"tch"` or `"cuda"`.
    pub device: String,
    /// Number of optimizer steps.
    pub steps: usize,
    /// Batch size of a forward pass: windows of `model.context` tokens.
    pub batch_size: usize,
    /// Gradient accumulation: forward passes per optimizer step. The gradient is their mean over tokens.
    pub gradient_accumulation: usize,
    /// Steps between two lines of training metrics.
    pub log_every: usize,
    /// Steps between two evaluations: validation loss and text samples. The last step is always evaluated.
    pub eval_every: usize,
    /// Number of validation windows per evaluation; 0: all.
    pub eval_windows: usize,
    /// Steps between two checkpoints. The last step always has one.
    pub checkpoint_every: usize,
    /// Number of checkpoints to keep, of those at multiples of `checkpoint_every`. The newest checkpoint is always kept.
    pub keep_checkpoints: usize,
    /// Prompts of the text samples: plain text, or `<|user|>question` for an answer. Empty: the first words of held-out texts, and a
    /// question if the texts contain dialogues.
    pub sample_prompts: Vec<String>,
    /// Maximum length of a text sample, in tokens; 0: no samples.
    pub sample_tokens: usize,
    /// Spike guard: a step is skipped if its loss exceeds this multiple of its running mean, and the mean by at least a nat; 0: no
    /// step is skipped.
    pub spike_factor: f64,
    /// Number of consecutive skipped steps after which the run rolls back to its last checkpoint.
    pub max_bad_steps: usize,
    /// Number of rollbacks after which the run stops with an error. The last good checkpoint is kept.
    pub max_rollbacks: usize,
}

impl Default for RunConfig {
    /// A run without a name, in the folder `runs`.
    fn default() -> Self {
        Self {
            name: String::new(),
            out_dir: "runs".into(),
            start_from: String::new(),
            seed: 1,
            device: "auto".into(),
            steps: 640,
            batch_size: 8,
            gradient_accumulation: 1,
            log_every: 16,
            eval_every: 128,
            eval_windows: 0,
            checkpoint_every: 128,
            keep_checkpoints: 2,
            sample_prompts: Vec::new(),
            sample_tokens: 48,
            spike_factor: 3.0,
            max_bad_steps: 5,
            max_rollbacks: 3,
        }
    }
}

/// The values of `run.device`.
pub const DEVICES: [&str; 6] = ["auto", "flex", "ndarray", "wgpu", "tch", "cuda"];

/// The largest count: of steps, windows, tokens.
pub(super) const LARGEST_COUNT: usize = 1_000_000_000;

/// The maximum number of tokens per optimizer step; times `LARGEST_COUNT` it fits 64 bits.
const LARGEST_STEP: usize = 1 << 32;

impl Experiment {
    /// `experiments/00-default.toml`, which is trained if no file is named: a Duck of a million parameters, trained in minutes
    /// on the embedded texts.
    pub fn embedded() -> Self {
        Self::parse(DEFAULT, "the embedded experiment").expect("it is part of this crate")
    }

    /// Read and validate an experiment file.
    ///
    /// # Errors
    /// [`TrainError::Experiment`] when the file cannot be read, is not UTF-8 or not TOML, a key is unknown or of
    /// the wrong type, or a value is out of range.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, TrainError> {
        let (text, origin) = read(path.as_ref())?;
        let experiment = Self::parse(&text, &origin)?;
        experiment.validate(&origin)?;
        Ok(experiment)
    }

    /// The experiment in `text`, of this or an older version; its values are not validated. Errors name `origin` and the line.
    ///
    /// # Errors
    /// [`TrainError::Experiment`] when it is not TOML or of a newer version, or a key is unknown or of the wrong type.
    pub fn parse(text: &str, origin: &str) -> Result<Self, TrainError> {
        let fail = |span: Option<Range<usize>>, message| {
            let before = span.and_then(|span| text.get(..span.start));
            match before {
                Some(before) => {
                    experiment_error(&format!("{origin}:{}", 1 + before.matches('\n').count()), message)
                }
                None => experiment_error(origin, message),
            }
        };
        let invalid = |error: toml::de::Error| fail(error.span(), describe(error));
        let mut table = DeTable::parse(text).map_err(invalid)?;
        version::migrate(table.get_mut()).map_err(|error| fail(Some(error.span), error.message))?;
        Self::deserialize(Deserializer::from(table)).map_err(invalid)
    }

    /// Check every value once; what passes can be trained, given its files, device and memory. Errors name `origin`.
    ///
    /// # Errors
    /// [`TrainError::Experiment`] with the first key whose value is out of range, the value and what is allowed.
    pub fn validate(&self, origin: &str) -> Result<(), TrainError> {
        self.check().map_err(|error| experiment_error(origin, error.to_string()))
    }

    /// Override one key, as in `optim.lr=3e-4`. The value is TOML; a bare word is a string.
    ///
    /// # Errors
    /// [`TrainError::Experiment`] when there is no such key, or the value is of the wrong type. The range is left to
    /// [`Self::validate`].
    pub fn set(&mut self, assignment: &str) -> Result<(), TrainError> {
        let fail = |message| experiment_error(&format!("override `{assignment}`"), message);
        let parts = assignment.split_once('=').and_then(|(path, value)| {
            let (section, key) = path.split_once('.')?;
            Some((section.trim(), key.trim(), value.trim()))
        });
        let (section, key, value) = parts.ok_or_else(|| fail("expected section.key=value".into()))?;
        let mut whole = toml::Table::try_from(&*self).map_err(|e| fail(e.to_string()))?;
        let sections = names(&whole);
        let Some(Value::Table(table)) = whole.get_mut(section) else {
            return Err(fail(format!("unknown section `{section}`, expected one of {sections}")));
        };
        if let Some(message) = version::renamed(section, key) {
            return Err(fail(message));
        }
        let keys = names(table);
        let Some(slot) = table.get_mut(key) else {
            return Err(fail(format!("unknown key `{section}.{key}`, expected one of {keys}")));
        };
        *slot = value.parse().unwrap_or_else(|_| Value::String(value.into()));
        *self = whole.try_into().map_err(|e| fail(describe(e)))?;
        Ok(())
    }

    /// The experiment as TOML, with its version and every key. [`Self::parse`] is the inverse.
    pub fn to_toml(&self) -> String {
        let sections =
            toml::to_string(self).expect("an experiment is made of tables, lists, strings and numbers");
        format!("version = {VERSION}\n\n{sections}")
    }

    /// The folder of the run: `<out_dir>/<name>-<seed>`.
    pub fn run_dir(&self) -> PathBuf {
        Path::new(&self.run.out_dir).join(format!("{}-{}", self.run.name, self.run.seed))
    }

    fn check(&self) -> Result<(), InvalidValue> {
        check_data(&self.data)?;
        self.model.validate().map_err(|e| InvalidValue { key: format!("model.{}", e.key), ..e })?;
        check_distill(&self.distill, &self.model)?;
        self.lora.check(&self.model)?;
        if self.lora.is_on() {
            self.check_frozen()?;
        }
        check_optim(&self.optim)?;
        check_schedule(&self.schedule)?;
        check_quant(&self.quant, &self.model, &self.schedule)?;
        check_run(&self.run, self.model.context)
    }
}

impl Experiment {
    /// Checks the settings of adapters, whose model stays frozen.
    fn check_frozen(&self) -> Result<(), InvalidValue> {
        let rank = self.lora.rank;
        require(
            !self.run.start_from.is_empty(),
            "run.start_from",
            &self.run.start_from,
            format!("a run folder or a model file, whose weights lora.rank = {rank} freezes"),
        )?;
        let ternary = format!("0.0, as lora.rank = {rank} freezes the weights as they are");
        for (key, until) in [
            ("schedule.float_until", self.schedule.float_until),
            ("schedule.ramp_until", self.schedule.ramp_until),
        ] {
            require(until == 0.0, key, until, ternary.as_str())?;
        }
        Ok(())
    }
}

/// The text of an experiment file, and its name for errors.
pub(super) fn read(path: &Path) -> Result<(String, String), TrainError> {
    let origin = path.display().to_string();
    match disk::read_to_string(path) {
        Ok(text) => Ok((text, origin)),
        Err(e) => Err(experiment_error(&origin, format!("expected an experiment in TOML: {e}"))),
    }
}

fn experiment_error(origin: &str, message: String) -> TrainError {
    TrainError::Experiment { origin: origin.into(), message }
}

/// The message of a TOML error on one line, its key first.
fn describe(mut error: toml::de::Error) -> String {
    // With its input an error draws the line; without, it says `in key` below the message.
    error.set_input(None);
    let text = error.to_string();
    let (message, key) = text.split_once("\nin ").unwrap_or((&text, ""));
    let message = with_toml_types(&message.trim_end().replace('\n', " "));
    match key.trim_end() {
        "" => message,
        key => format!("in {key}: {message}"),
    }
}

/// A message of serde whose expected type is named as users of TOML know it, not as in Rust.
fn with_toml_types(message: &str) -> String {
    let Some((found, expected)) = message.rsplit_once(", expected ") else { return message.into() };
    let expected = match expected {
        "usize" | "u64" => "a whole number, at least 0",
        "f64" => "a number",
        _ if expected.starts_with("struct ") => "a table",
        other => other,
    };
    format!("{found}, expected {expected}")
}

fn names(table: &toml::Table) -> String {
    table.keys().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ")
}

/// 1 to a billion.
fn count(key: &str, n: usize) -> Result<(), InvalidValue> {
    let holds = (1..=LARGEST_COUNT).contains(&n);
    require(holds, key, n, format!("1 to {LARGEST_COUNT}"))
}

/// 0, which has its own meaning, to a billion.
fn count_or_zero(key: &str, n: usize) -> Result<(), InvalidValue> {
    require(n <= LARGEST_COUNT, key, n, format!("0 to {LARGEST_COUNT}"))
}

fn fraction(key: &str, x: f64) -> Result<(), InvalidValue> {
    require((0.0..=1.0).contains(&x), key, x, "0 to 1")
}

fn below_one(key: &str, x: f64) -> Result<(), InvalidValue> {
    require((0.0..1.0).contains(&x), key, x, "at least 0 and below 1")
}

fn positive(key: &str, x: f64) -> Result<(), InvalidValue> {
    require(x > 0.0 && x.is_finite(), key, x, "a finite number above 0")
}

fn not_negative(key: &str, x: f64) -> Result<(), InvalidValue> {
    require(x >= 0.0 && x.is_finite(), key, x, "a finite number, at least 0")
}

fn check_data(data: &DataConfig) -> Result<(), InvalidValue> {
    let named = |paths: &[String]| paths.iter().all(|path| !path.is_empty());
    require(
        !data.train.is_empty() && named(&data.train),
        "data.train",
        &data.train,
        "at least one file or folder, or \"embedded\"",
    )?;
    require(named(&data.valid), "data.valid", &data.valid, "files or folders")?;
    let share = data.valid_fraction > 0.0 && data.valid_fraction <= 0.5;
    require(share, "data.valid_fraction", data.valid_fraction, "above 0, at most 0.5")?;
    let tokenizer = data.tokenizer.as_str();
    require(
        matches!(tokenizer, "byte" | "char" | "bpe") || tokenizer.contains(['.', '/', '\\']),
        "data.tokenizer",
        tokenizer,
        "byte, char, bpe, or the path of a tokenizer.json or a model",
    )?;
    require(
        (257..=1 << 20).contains(&data.bpe_vocab_size),
        "data.bpe_vocab_size",
        data.bpe_vocab_size,
        "257 (all bytes and a special token) to 1048576",
    )
}

fn check_quant(
    quant: &QuantConfig,
    model: &DuckConfig,
    schedule: &ScheduleConfig,
) -> Result<(), InvalidValue> {
    if let Granularity::PerGroup(size) = quant.granularity {
        // The inputs of all quantized linear layers are as wide as one of these two.
        let (d_model, d_ff) = (model.d_model, model.d_ff);
        require(
            size > 0 && d_model.is_multiple_of(size) && d_ff.is_multiple_of(size),
            "quant.granularity",
            quant.granularity,
            format!("a per_group that divides d_model = {d_model} and d_ff = {d_ff}"),
        )?;
    }
    check_sparsity(quant, model)?;
    let open = quant.threshold > 0.0 && quant.threshold < 1.0;
    require(open, "quant.threshold", quant.threshold, "above 0 and below 1")?;
    check_estimator(quant, schedule)?;
    not_negative("quant.dead_bias", quant.dead_bias)?;
    if quant.dead_bias > 0.0 {
        let expected = "0 (off), because quant.sparsity selects zeros";
        require(quant.sparsity == Sparsity::None, "quant.dead_bias", quant.dead_bias, expected)?;
        let expected = "0 (off), because only model.family = \"gpt2\" has biases in files";
        require(model.family == Family::Gpt2, "quant.dead_bias", quant.dead_bias, expected)?;
    }
    check_matmul_precision(quant, model)?;
    not_negative("quant.quantization_penalty", quant.quantization_penalty)?;
    not_negative("quant.scale_penalty", quant.scale_penalty)
}

fn check_estimator(quant: &QuantConfig, schedule: &ScheduleConfig) -> Result<(), InvalidValue> {
    let rule = quant.scale.rule();
    let (holds, expected) = match quant.estimator {
        Estimator::Identity => (true, ""),
        Estimator::Masked => {
            (rule.clip().is_some(), "identity, because only the scales learned and seq have a clipping range")
        }
        Estimator::Annealed if schedule.ramp_until <= schedule.float_until => (
            false,
            "identity, unless schedule.ramp_until is above float_until, so that weights can harden in between",
        ),
        Estimator::Annealed => (
            !rule.is_trained(),
            "identity, because soft weights require a computed scale: absmean, absmedian or twn",
        ),
    };
    require(holds, "quant.estimator", quant.estimator, expected)
}

fn check_matmul_precision(quant: &QuantConfig, model: &DuckConfig) -> Result<(), InvalidValue> {
    let required = |holds: bool, what: &str| {
        require(
            holds,
            "quant.matmul_precision",
            quant.matmul_precision,
            format!("float, because this value requires {what}"),
        )
    };
    if quant.matmul_precision.is_integer() {
        let activations = quant.activations == ActivationPrecision::Int8;
        required(activations, "quant.activations = \"int8\"")?;
        let whole = !matches!(quant.granularity, Granularity::PerGroup(_));
        required(whole, "one scale per tensor or per channel")?;
        required(quant.scale.rule().scales_per_group() == 1, "another scale than ttq, which has two")?;
    }
    if quant.matmul_precision != MatmulPrecision::Float {
        required(model.mixed_precision == MixedPrecision::F32, "model.mixed_precision = \"f32\"")?;
    }
    Ok(())
}

fn check_sparsity(quant: &QuantConfig, model: &DuckConfig) -> Result<(), InvalidValue> {
    let (d_model, d_ff) = (model.d_model, model.d_ff);
    let (holds, expected) = match quant.sparsity {
        Sparsity::None => return Ok(()),
        Sparsity::ZeroFraction(share) => {
            (share > 0.0 && share < 1.0, "a zero_fraction above 0 and below 1".into())
        }
        // The inputs of all quantized linear layers are as wide as one of these two.
        Sparsity::NOfM([n, m]) => (
            0 < n && n < m && d_model.is_multiple_of(m) && d_ff.is_multiple_of(m),
            format!(
                "n_of_m = [N, M] with 0 < N < M, and M a divisor of d_model = {d_model} and d_ff = {d_ff}"
            ),
        ),
    };
    require(holds, "quant.sparsity", quant.sparsity, expected)?;
    require(
        quant.estimator != Estimator::Masked,
        "quant.estimator",
        quant.estimator,
        "identity, because under quant.sparsity no code depends on a clipping range",
    )
}

fn check_distill(distill: &DistillConfig, model: &DuckConfig) -> Result<(), InvalidValue> {
    fraction("distill.weight", distill.weight)?;
    positive("distill.temperature", distill.temperature)?;
    not_negative("distill.hidden_weight", distill.hidden_weight)?;
    not_negative("distill.relation_weight", distill.relation_weight)?;
    // Whatever divides the keys' width divides the queries'.
    let keys = model.n_kv_heads * model.head_dim();
    require(
        distill.relation_heads > 0 && keys.is_multiple_of(distill.relation_heads),
        "distill.relation_heads",
        distill.relation_heads,
        format!("a divisor of the width of keys, n_kv_heads * d_model / n_heads = {keys}"),
    )?;
    require(
        distill.layer <= model.n_layers,
        "distill.layer",
        distill.layer,
        format!("1 to n_layers = {}, or 0 for the last", model.n_layers),
    )
}

fn check_optim(optim: &OptimConfig) -> Result<(), InvalidValue> {
    positive("optim.lr", optim.lr)?;
    positive("optim.muon_lr", optim.muon_lr)?;
    below_one("optim.muon_momentum", optim.muon_momentum)?;
    below_one("optim.beta1", optim.beta1)?;
    below_one("optim.beta2", optim.beta2)?;
    positive("optim.epsilon", optim.epsilon)?;
    not_negative("optim.weight_decay", optim.weight_decay)?;
    not_negative("optim.clip_norm", optim.clip_norm)?;
    not_negative("optim.z_loss", optim.z_loss)
}

fn check_schedule(schedule: &ScheduleConfig) -> Result<(), InvalidValue> {
    count_or_zero("schedule.warmup_steps", schedule.warmup_steps)?;
    fraction("schedule.decay_fraction", schedule.decay_fraction)?;
    fraction("schedule.min_lr_ratio", schedule.min_lr_ratio)?;
    fraction("schedule.weight_decay_until", schedule.weight_decay_until)?;
    fraction("schedule.float_until", schedule.float_until)?;
    fraction("schedule.ramp_until", schedule.ramp_until)?;
    let (from, to) = (schedule.float_until, schedule.ramp_until);
    require(
        to == 0.0 || to >= from,
        "schedule.ramp_until",
        to,
        format!("0 (a switch) or at least float_until = {from}"),
    )?;
    let to = schedule.sparse_until;
    require(
        to == 0.0 || (to >= from && to < 1.0),
        "schedule.sparse_until",
        to,
        format!("0 (at once), or at least float_until = {from} and below 1"),
    )
}

fn check_run(run: &RunConfig, context: usize) -> Result<(), InvalidValue> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    require(
        (1..=100).contains(&run.name.len()) && !run.name.starts_with('.') && run.name.chars().all(plain),
        "run.name",
        &run.name,
        "a plain file name of 1 to 100 letters, digits, `-`, `_` and `.`, not beginning with `.`",
    )?;
    require(!run.out_dir.is_empty(), "run.out_dir", &run.out_dir, "a folder, `.` for the current one")?;
    // TOML's integers have a sign.
    require(i64::try_from(run.seed).is_ok(), "run.seed", run.seed, format!("0 to {}", i64::MAX))?;
    require(
        DEVICES.contains(&run.device.as_str()),
        "run.device",
        &run.device,
        format!("one of {}", DEVICES.join(", ")),
    )?;
    count("run.steps", run.steps)?;
    count("run.batch_size", run.batch_size)?;
    count("run.gradient_accumulation", run.gradient_accumulation)?;
    let tokens = run.batch_size.checked_mul(run.gradient_accumulation).and_then(|n| n.checked_mul(context));
    require(
        tokens.is_some_and(|n| n <= LARGEST_STEP),
        "run.batch_size",
        run.batch_size,
        format!("at most {LARGEST_STEP} tokens per step (batch_size * gradient_accumulation * context)"),
    )?;
    count("run.log_every", run.log_every)?;
    count("run.eval_every", run.eval_every)?;
    count_or_zero("run.eval_windows", run.eval_windows)?;
    count("run.checkpoint_every", run.checkpoint_every)?;
    count("run.keep_checkpoints", run.keep_checkpoints)?;
    count_or_zero("run.sample_tokens", run.sample_tokens)?;
    let spike = run.spike_factor == 0.0 || (run.spike_factor > 1.0 && run.spike_factor.is_finite());
    require(spike, "run.spike_factor", run.spike_factor, "0 (never) or a finite number above 1")?;
    count("run.max_bad_steps", run.max_bad_steps)?;
    count_or_zero("run.max_rollbacks", run.max_rollbacks)
}
