//! An experiment for a text: shape, tokenizer and steps, with their cost on this machine.

use super::experiment::RunConfig;
use super::memory::{check_memory, memory_estimate};
use super::{Experiment, TrainError};
use crate::data::corpus::{self, Document};
use crate::data::window::Window;
use crate::data::{DataConfig, DataError, LmBatcher, SPLIT_SEED, tokenizer};
use crate::device;
use crate::nn::DuckConfig;
use crate::quant::{QuantConfig, TablePrecision};
use crate::train::QuantizationTrainer;
use burn::tensor::Device;
use std::collections::HashSet;
use std::time::Instant;
use ternary_format::Tokenizer;

/// Length of the sample of text that a tokenizer is trained on, to count tokens per byte.
const SAMPLE_BYTES: usize = 1 << 20;
/// Texts whose alphabet has at most this many characters (DNA, digits) have no words: each character is a token.
const SMALL_ALPHABET: usize = 16;
/// Windows per step.
const BATCH_SIZE: usize = 16;
/// Minimum number of windows of the held-out share.
const MIN_VALIDATION_WINDOWS: usize = 2;
/// Minimum context, in tokens. A text whose held-out share is too short for it is refused.
const MIN_CONTEXT: usize = 16;
/// Epochs from which on the model has dropout, as in our experiments with small texts.
const DROPOUT_EPOCHS: f64 = 4.0;
/// Duration of the measurement of steps, after a first one.
const MEASUREMENT_SECONDS: f64 = 2.0;
/// Time of a run relative to that of its steps: evaluations, samples and checkpoints take the rest.
const OVERHEAD: f64 = 1.1;

/// A shape that goes with an amount of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Size {
    /// About 1 M parameters, for about 1 MB of text
    Tiny,
    /// About 6 M parameters, for about 10 MB of text
    Small,
    /// About 30 M parameters, for about 100 MB of text
    Base,
}

impl Size {
    /// The size for a text of `bytes` bytes.
    fn of_text(bytes: usize) -> Self {
        match bytes {
            0..3_000_000 => Self::Tiny,
            3_000_000..30_000_000 => Self::Small,
            _ => Self::Base,
        }
    }

    /// The shape; every matrix row is a multiple of 64, as GGUF's ternary types need it.
    pub fn model(self) -> DuckConfig {
        let tiny = DuckConfig::default();
        match self {
            Self::Tiny => tiny,
            Self::Small => DuckConfig { context: 256, d_model: 256, n_layers: 6, d_ff: 768, ..tiny },
            Self::Base => DuckConfig {
                context: 256,
                d_model: 512,
                n_layers: 8,
                n_heads: 8,
                n_kv_heads: 8,
                d_ff: 1536,
                ..tiny
            },
        }
    }

    fn vocabulary(self) -> usize {
        match self {
            Self::Tiny => 1024,
            Self::Small => 4096,
            Self::Base => 8192,
        }
    }
}

/// Counts of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextCounts {
    /// UTF-8 bytes.
    pub bytes: usize,
    /// Documents, dialogues included.
    pub documents: usize,
    /// Documents that are dialogues.
    pub dialogues: usize,
    /// Different characters.
    pub alphabet: usize,
}

impl TextCounts {
    /// Whether enough documents are dialogues for a chat model; see [`corpus::make_chat_model`].
    pub fn make_chat_model(&self) -> bool {
        corpus::make_chat_model(self.dialogues, self.documents)
    }

    fn tokenizer(&self) -> &'static str {
        match self.dialogues == 0 && self.alphabet <= SMALL_ALPHABET {
            true => "char",
            false => "bpe",
        }
    }

    fn of(documents: &[Document]) -> Self {
        let characters: HashSet<char> =
            documents.iter().flat_map(Document::texts).flat_map(str::chars).collect();
        Self {
            bytes: documents.iter().flat_map(Document::texts).map(str::len).sum(),
            documents: documents.len(),
            dialogues: documents.iter().filter(|document| document.is_dialogue()).count(),
            alphabet: characters.len(),
        }
    }
}

/// An experiment for a text, with estimates of its time and memory.
#[derive(Clone, Debug)]
pub struct Proposal {
    /// The size of the model.
    pub size: Size,
    /// Counts of the text.
    pub text: TextCounts,
    /// Training tokens, estimated.
    pub tokens: usize,
    /// Epochs: passes over the training tokens.
    pub epochs: f64,
    /// Parameters of the model.
    pub parameters: usize,
    /// The experiment, without a name of its own.
    pub experiment: Experiment,
    /// Seconds of the whole run, from steps measured on this machine under its current load.
    pub seconds: f64,
    /// Memory of the run, estimated.
    pub bytes: u64,
    /// The device on which steps were measured.
    pub device: String,
    /// Whether that device is a software renderer, such as llvmpipe, which is slower than flex.
    pub software_renderer: bool,
}

/// Counts the text of `sources` (files, folders, `embedded`), chooses an experiment for it and measures a few of its steps.
///
/// Without `size`, the length of the text decides. The other settings are the defaults of an experiment, which did best in our runs. A text of
/// `b` bytes gets `2 sqrt(10 MB / b)` epochs, from 1 to 12: a rule of thumb between our experiments, not a result.
///
/// # Errors
/// `Data`: texts that cannot be read, or too little text. `Device`: no such device. `Memory`: the model does not fit.
pub fn propose(sources: &[String], size: Option<Size>, device: &str) -> Result<Proposal, TrainError> {
    let documents = corpus::read("train", sources)?;
    let text = TextCounts::of(&documents);
    let size = size.unwrap_or(Size::of_text(text.bytes));
    let kind = text.tokenizer();
    let data = DataConfig {
        train: sources.to_vec(),
        tokenizer: kind.into(),
        bpe_vocab_size: size.vocabulary(),
        ..DataConfig::default()
    };
    let (mut train, valid) = corpus::split(documents, data.valid_fraction, SPLIT_SEED);
    corpus::shuffle(&mut train, SPLIT_SEED);
    let sample = sample(&train);
    let tokenizer = match kind {
        "char" => tokenizer::char(&sample),
        _ => tokenizer::train_bpe(&sample, data.bpe_vocab_size)?,
    };
    let density = tokens_per_byte(&sample, &tokenizer)?;
    let count = |documents: &[Document]| (TextCounts::of(documents).bytes as f64 * density) as usize;
    let (tokens, held_out) = (count(&train), count(&valid));

    let mut model = size.model();
    while held_out < MIN_VALIDATION_WINDOWS * (model.context + 1) {
        if model.context <= MIN_CONTEXT {
            return Err(DataError::TooLittle { bytes: text.bytes, documents: text.documents }.into());
        }
        model.context /= 2;
    }
    let epochs = (2.0 * (1e7 / text.bytes as f64).sqrt()).clamp(1.0, 12.0);
    model.dropout = if epochs >= DROPOUT_EPOCHS { 0.1 } else { 0.0 };
    let step = BATCH_SIZE * model.context;
    let steps = two_digits(epochs * tokens as f64 / step as f64).max(100);
    let experiment = Experiment {
        data,
        model,
        quant: QuantConfig { embedding: TablePrecision::Int8, ..QuantConfig::default() },
        run: RunConfig {
            steps,
            batch_size: BATCH_SIZE,
            eval_every: two_digits(steps as f64 / 5.0),
            device: device.into(),
            ..RunConfig::default()
        },
        ..Experiment::default()
    };
    let mut measured = experiment.clone();
    measured.model.vocab_size = tokenizer.vocab_size();
    let (step_s, device) = measure(&measured)?;
    Ok(Proposal {
        size,
        text,
        tokens,
        epochs: (steps * step) as f64 / tokens as f64,
        parameters: measured.model.num_params(),
        experiment,
        seconds: OVERHEAD * step_s * steps as f64,
        bytes: memory_estimate(&measured, &device),
        device: device::describe(&device),
        software_renderer: device::is_software(&device),
    })
}

/// The first documents, up to [`SAMPLE_BYTES`] bytes.
fn sample(documents: &[Document]) -> Vec<Document> {
    let mut left = SAMPLE_BYTES;
    let mut taken = Vec::new();
    for document in documents {
        let bytes: usize = document.texts().map(str::len).sum();
        match document {
            Document::Text(text) if bytes > left => {
                taken.push(Document::Text(text[..text.floor_char_boundary(left)].into()));
            }
            document => taken.push(document.clone()),
        }
        left = left.saturating_sub(bytes);
        if left == 0 {
            break;
        }
    }
    taken
}

fn tokens_per_byte(documents: &[Document], tokenizer: &Tokenizer) -> Result<f64, DataError> {
    let (mut tokens, mut bytes) = (0, 0);
    for text in documents.iter().flat_map(Document::texts) {
        tokens += tokenizer.encode(text)?.len();
        bytes += text.len();
    }
    Ok(tokens as f64 / bytes as f64)
}

/// `count`, rounded to two significant digits.
fn two_digits(count: f64) -> usize {
    let unit = 10_f64.powf((count.max(10.0)).log10().floor() - 1.0);
    ((count / unit).round() * unit).max(1.0) as usize
}

/// Seconds of an optimizer step, and the device.
fn measure(experiment: &Experiment) -> Result<(f64, Device), TrainError> {
    let Experiment { model, quant, optim, schedule, run, .. } = experiment;
    device::start_threads()?;
    let device = device::device(&run.device)?;
    check_memory(experiment, &device, 0, 0)?;
    let autodiff = device.clone().autodiff();
    let module = model.init(quant, run.seed, &autodiff);
    let mut trainer = QuantizationTrainer::new(module, optim, schedule, run.steps, run.seed);
    let window = |start: usize| Window {
        start,
        ids: (0..=model.context).map(|i| ((start + i) % model.vocab_size) as u32).collect(),
        mask: vec![true; model.context],
    };
    let windows: Vec<_> = (0..run.batch_size).map(|i| window(7 * i)).collect();
    let batch = LmBatcher.batch(&windows, &autodiff);
    // The first step also compiles kernels and allocates memory.
    trainer.train_step(vec![batch.clone()]);
    let (start, mut steps) = (Instant::now(), 0);
    while steps == 0 || start.elapsed().as_secs_f64() < MEASUREMENT_SECONDS {
        trainer.train_step(vec![batch.clone()]);
        steps += 1;
    }
    Ok((start.elapsed().as_secs_f64() / steps as f64, device))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn counts_keep_their_first_two_digits() {
        let counts = [0.2, 7.4, 10.0, 96.0, 99.7, 123.0, 1261.0, 98765.0].map(two_digits);
        assert_eq!(counts, [1, 7, 10, 96, 100, 120, 1300, 99000]);
    }

    #[test]
    fn a_sample_ends_within_a_document() {
        let long = Document::Text("é".repeat(SAMPLE_BYTES));
        let taken = sample(&[Document::Text("a".into()), long, Document::Text("b".into())]);
        assert_eq!(taken.len(), 2);
        assert_eq!(TextCounts::of(&taken).bytes, SAMPLE_BYTES - 1);
    }

    #[test]
    fn more_text_gets_a_larger_model() {
        let sizes = [1_000_000, 10_000_000, 100_000_000].map(Size::of_text);
        assert_eq!(sizes, [Size::Tiny, Size::Small, Size::Base]);
        for (size, most) in sizes.into_iter().zip([2_000_000, 10_000_000, 40_000_000]) {
            let model = DuckConfig { vocab_size: size.vocabulary(), ..size.model() };
            model.validate().unwrap();
            assert!(model.num_params() < most && model.num_params() > most / 3, "{size:?}");
            assert!([model.d_model, model.d_ff].iter().all(|width| width.is_multiple_of(64)), "{size:?}");
        }
    }

    #[test]
    fn little_text_gets_a_short_context_or_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text.txt");
        let proposed = |text: String| {
            fs::write(&path, text).unwrap();
            propose(&[path.display().to_string()], None, "flex")
        };
        // Digits have no words.
        let digits = proposed("3141592653589793\n".repeat(200)).unwrap();
        assert_eq!((digits.experiment.data.tokenizer.as_str(), digits.text.alphabet), ("char", 10));
        assert_eq!(digits.experiment.model.context, 64);
        assert!(digits.seconds > 0.0 && digits.bytes > 0 && digits.epochs >= 12.0);
        let error = proposed("One day".into()).unwrap_err();
        assert!(error.to_string().contains("7 bytes in 1 document"), "{error}");
        assert_eq!(error.exit_code(), 3);
    }
}
