//! Distillation: a teacher, and how far a student is from it.

mod distance;
mod recording;

use crate::data::{LmBatch, Texts, tokens::TokenFile};
use crate::device;
use crate::nn::{BlockStates, DuckConfig, DuckQuantized};
use crate::report::progress::say;
use crate::run::identity::{Identity, hex, model_digest};
use crate::run::{Experiment, TrainError, last_checkpoint, packed_model, resolve_vocabulary};
use burn::tensor::{Device, Tensor};
use distance::{divergence, hidden_distance, recorded_divergence, relation_divergence};
pub use recording::{Recording, record};
use serde::{Deserialize, Serialize};
use std::{path::Path, sync::Arc};
use ternary_format::{
    ModelSpec, PackedModel, Tokenizer,
    disk::{self, RunLock},
    memory,
};

/// Which way the divergence of teacher `p` and student `q` is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Divergence {
    /// `KL(p || q)`: the student covers all that the teacher thinks possible.
    Forward,
    /// `KL(q || p)`: the student keeps to what the teacher thinks likely.
    Reverse,
    /// The mean of both.
    Mean,
}

/// The `[distill]` section of an experiment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DistillConfig {
    /// A run folder, a model file of any kind, or what `duck distill-logits` wrote of one; with the tokenizer of the run.
    /// Empty: no teacher.
    pub teacher: String,
    /// Share of the divergence in the loss; cross entropy has the rest.
    pub weight: f64,
    /// Both distributions are softened by it, and their divergence is multiplied by its square.
    pub temperature: f64,
    pub divergence: Divergence,
    /// Weight in the loss of the squared distance between hidden states, which wants a teacher as wide as the student.
    pub hidden_weight: f64,
    /// Weight in the loss of the divergence between the relations of queries, of keys and of values.
    pub relation_weight: f64,
    /// Parts into which queries, keys and values are cut for their relations; divides their widths in both models.
    pub relation_heads: usize,
    /// The student's block that hidden states and relations are taken from, from 1; 0: the last. The teacher's is the one
    /// at the same share of its depth.
    pub layer: usize,
}

impl Default for DistillConfig {
    /// No teacher; with one, the share of the loss that was best in our runs.
    fn default() -> Self {
        Self {
            teacher: String::new(),
            weight: 0.9,
            temperature: 1.0,
            divergence: Divergence::Forward,
            hidden_weight: 0.0,
            relation_weight: 0.0,
            relation_heads: 1,
            layer: 0,
        }
    }
}

impl DistillConfig {
    /// The setting that names the teacher, for errors.
    fn origin(&self) -> String {
        format!("distill.teacher = \"{}\"", self.teacher)
    }

    /// The blocks of student and teacher, from 0, that are compared; `None`: none is.
    fn blocks(&self, student: usize, teacher: usize) -> Option<[usize; 2]> {
        let layer = if self.layer == 0 { student } else { self.layer };
        let compared = self.hidden_weight > 0.0 || self.relation_weight > 0.0;
        compared.then(|| [layer - 1, (layer * teacher).div_ceil(student) - 1])
    }
}

/// What a student is compared with, and how.
#[derive(Clone, Debug)]
pub struct Teacher {
    source: Source,
    config: DistillConfig,
}

#[derive(Clone, Debug)]
enum Source {
    /// A frozen model; the blocks of student and teacher whose states are compared, from 0.
    Model(Box<DuckQuantized>, Option<[usize; 2]>),
    Recording(Arc<Recording>),
}

/// How far a student is from its teacher, each a tensor of one number.
pub struct Distances {
    /// Between next tokens, in nats; see [`Divergence`].
    pub divergence: Tensor<1>,
    /// Between hidden states: the mean square, where their root mean square is 1.
    pub hidden: Option<Tensor<1>>,
    /// Between relations of positions, in nats.
    pub relation: Option<Tensor<1>>,
}

/// What an experiment names as its teacher, read, and not yet a model on a device.
pub(crate) enum TeacherFile {
    Model(Box<PackedModel>),
    Recording(Recording),
}

impl TeacherFile {
    /// Reads `distill.teacher`; `None` where the experiment names none.
    ///
    /// # Errors
    /// Those of [`packed_model`] and [`Recording::open`].
    pub fn open(config: &DistillConfig) -> Result<Option<Self>, TrainError> {
        if config.teacher.is_empty() {
            return Ok(None);
        }
        let path = Path::new(&config.teacher);
        Ok(Some(match Recording::is_at(path) {
            true => Self::Recording(Recording::open(path, &config.origin())?),
            false => Self::Model(Box::new(packed_model(path)?)),
        }))
    }

    /// What the reader of a model file did not understand.
    pub fn warnings(&self) -> &[String] {
        match self {
            Self::Model(model) => &model.warnings,
            Self::Recording(_) => &[],
        }
    }

    /// Bytes of memory that the model takes in floats; a recording stays on the disk.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Model(model) => {
                let weights = model.tensors.values().map(|tensor| tensor.rows() * tensor.cols());
                (size_of::<f32>() * weights.sum::<usize>()) as u64
            }
            Self::Recording(_) => 0,
        }
    }

    /// SHA-256 of what it teaches.
    pub fn digest(&self) -> String {
        match self {
            Self::Model(model) => model_digest(model),
            Self::Recording(recording) => hex(recording.digest()),
        }
    }
}

impl Teacher {
    /// The teacher that `file` holds, on `device`.
    ///
    /// # Errors
    /// `Experiment`: a teacher of other ids than `tokenizer` and the student, of another text, of a smaller context, or of widths
    /// that cannot be compared; `Import`: a model file that is no model.
    pub(crate) fn new(
        file: TeacherFile,
        config: &DistillConfig,
        tokenizer: &Tokenizer,
        text: &TokenFile,
        student: &DuckConfig,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let source = match file {
            TeacherFile::Recording(recording) => Self::recording(recording, config, text, student)?,
            TeacherFile::Model(packed) => {
                let (model, blocks) = Self::model(&packed, config, tokenizer, student, device)?;
                Source::Model(Box::new(model), blocks)
            }
        };
        Ok(Self { source, config: config.clone() })
    }

    fn recording(
        recording: Recording,
        config: &DistillConfig,
        text: &TokenFile,
        student: &DuckConfig,
    ) -> Result<Source, TrainError> {
        let origin = config.origin();
        recording.expect_text(text, &origin)?;
        let misfit = |message: String| Err(TrainError::Experiment { origin, message });
        if config.temperature != 1.0 || config.hidden_weight > 0.0 || config.relation_weight > 0.0 {
            return misfit(
                "found a recording, which has probabilities at temperature 1 only; expected distill.temperature = 1.0, \
                 hidden_weight = 0.0 and relation_weight = 0.0, or a model"
                    .into(),
            );
        }
        if recording.vocab_size() > student.vocab_size {
            return misfit(format!(
                "found {} tokens, expected at most model.vocab_size = {}",
                recording.vocab_size(),
                student.vocab_size
            ));
        }
        Ok(Source::Recording(Arc::new(recording)))
    }

    /// The model that teaches, and the blocks of student and teacher that are compared.
    fn model(
        packed: &PackedModel,
        config: &DistillConfig,
        tokenizer: &Tokenizer,
        student: &DuckConfig,
        device: &Device,
    ) -> Result<(DuckQuantized, Option<[usize; 2]>), TrainError> {
        let origin = config.origin();
        let misfit = |message: String| TrainError::Experiment { origin: origin.clone(), message };
        if let Some(difference) = packed.tokenizer.as_ref().and_then(|own| difference(own, tokenizer)) {
            return Err(misfit(format!(
                "{difference}; expected the tokenizer of this run, as data.tokenizer = \"PATH OF THE TEACHER\" gives it"
            )));
        }
        let ModelSpec { vocab_size, context, d_model, n_layers, n_heads, n_kv_heads, .. } = packed.spec;
        if vocab_size > student.vocab_size {
            return Err(misfit(format!(
                "found {vocab_size} tokens, expected at most model.vocab_size = {}",
                student.vocab_size
            )));
        }
        if context < student.context {
            return Err(misfit(format!(
                "found a context of {context}, expected at least model.context = {}",
                student.context
            )));
        }
        if config.hidden_weight > 0.0 && d_model != student.d_model {
            return Err(misfit(format!(
                "found a width of {d_model}, expected model.d_model = {} for distill.hidden_weight above 0 (relations do \
                 without)",
                student.d_model
            )));
        }
        let head_dim = d_model / n_heads;
        let heads = config.relation_heads;
        let divides = |n: usize| (n * head_dim).is_multiple_of(heads);
        if config.relation_weight > 0.0 && !(divides(n_heads) && divides(n_kv_heads)) {
            return Err(misfit(format!(
                "found queries of {} and keys of {}, expected widths that distill.relation_heads = {heads} divides",
                n_heads * head_dim,
                n_kv_heads * head_dim
            )));
        }
        // The special tokens of a run are new to most models of others; the teacher thinks nothing of them.
        let device = device.clone().without_autodiff();
        if device::is_cpu(&device) {
            let parameters: usize = packed.tensors.values().map(|tensor| tensor.rows() * tensor.cols()).sum();
            memory::check((size_of::<f32>() * parameters) as u64)?;
        }
        let model = DuckQuantized::from_packed_with(packed, student.vocab_size, &device)?;
        Ok((model, config.blocks(student.n_layers, n_layers)))
    }

    /// The student's block whose states [`Self::compare`] wants, from 0.
    pub fn block(&self) -> Option<usize> {
        match self.source {
            Source::Model(_, Some([student, _])) => Some(student),
            _ => None,
        }
    }

    /// Distances of a student's `logits` and `states` from the teacher's on the same batch: that of logits a mean over
    /// the targets that carry loss, those of states over all positions. No gradient reaches the teacher.
    ///
    /// # Shapes
    /// logits `[batch, seq, vocab]`
    pub fn compare(&self, batch: &LmBatch, logits: Tensor<3>, states: Option<BlockStates>) -> Distances {
        let LmBatch { inputs, mask, tokens, .. } = batch;
        let (mask, tokens) = (mask.clone(), *tokens);
        let DistillConfig { divergence: kind, temperature, .. } = self.config;
        // Constants under autodiff if the student is.
        let constant = |tensor: Tensor<3>| if logits.is_autodiff() { tensor.autodiff() } else { tensor };
        let (teacher, blocks) = match &self.source {
            Source::Model(teacher, blocks) => (teacher, blocks),
            Source::Recording(recording) => {
                let device = logits.device().without_autodiff();
                let (ids, log_p) = recording.rows(&batch.starts, inputs.dims()[1], &device);
                let ids = if logits.is_autodiff() { ids.autodiff() } else { ids };
                let log_p = constant(log_p);
                let divergence = recorded_divergence(kind, ids, log_p, logits, mask, tokens);
                return Distances { divergence, hidden: None, relation: None };
            }
        };
        let shown = blocks.map(|[_, teacher]| teacher);
        let (own, own_states) = teacher.forward_showing(inputs.clone().without_autodiff(), shown);
        let DistillConfig { hidden_weight, relation_weight, relation_heads, .. } = self.config;
        let both = own_states.zip(states);
        let hidden = both.clone().filter(|_| hidden_weight > 0.0);
        let relation = both.filter(|_| relation_weight > 0.0);
        Distances {
            hidden: hidden.map(|(own, student)| hidden_distance(constant(own.hidden), student.hidden)),
            relation: relation.map(|(own, student)| {
                let own = own.projections.map(constant);
                relation_divergence(relation_heads, own, student.projections)
            }),
            divergence: divergence(kind, temperature, constant(own), logits.clone(), mask, tokens),
        }
    }

    /// The loss of a student that has the cross entropy `loss` and is so far from its teacher.
    pub fn blend(&self, loss: Tensor<1>, distances: &Distances) -> Tensor<1> {
        let DistillConfig { weight, hidden_weight, relation_weight, .. } = self.config;
        let mut total = loss.mul_scalar(1.0 - weight) + distances.divergence.clone().mul_scalar(weight);
        if let Some(hidden) = &distances.hidden {
            total = total + hidden.clone().mul_scalar(hidden_weight);
        }
        if let Some(relation) = &distances.relation {
            total = total + relation.clone().mul_scalar(relation_weight);
        }
        total
    }
}

/// Writes what the teacher of an experiment thinks of its training text to `path`: the `kept` likeliest next tokens at
/// every position. `distill.teacher` may then name that file, and no step waits for the teacher.
///
/// Leaves the prepared texts in the run folder, as the run itself does, and locks it meanwhile. `advance` is told how many positions are done
/// more, and how many there are.
///
/// # Errors
/// `Lock`; those of [`Texts::prepare`], [`packed_model`] and [`record`]; `Experiment`: no teacher, one that is a recording, or
/// one that does not fit the experiment.
pub fn record_teacher(
    mut experiment: Experiment,
    kept: usize,
    path: &Path,
    mut advance: impl FnMut(usize, usize),
) -> Result<(), TrainError> {
    let run_dir = experiment.run_dir();
    let _lock = RunLock::acquire(&run_dir)?;
    let _other = if disk::is_in(path, &run_dir) { None } else { RunLock::of_file(path)? };
    let device = device::device(&experiment.run.device)?;
    let seq_len = experiment.model.context;
    // The folder may hold a run, whose tokenizer and tokens are not replaced by others.
    let loaded = last_checkpoint(&run_dir)?;
    let texts = Texts::read(&experiment.data, &run_dir, loaded.is_some())?;
    if let Some(loaded) = loaded {
        Identity::expect_texts(&loaded, &texts, &run_dir)?;
    }
    resolve_vocabulary(&mut experiment, &texts.tokenizer)?;
    // What a recording does not have is not asked for while it is made.
    let config = DistillConfig { hidden_weight: 0.0, relation_weight: 0.0, ..experiment.distill };
    let file = TeacherFile::open(&config)?;
    memory::check(file.as_ref().map_or(0, TeacherFile::bytes))?;
    let Some(TeacherFile::Model(teacher)) = file else {
        let message = "expected a run folder or a model file, whose thoughts are to be recorded".into();
        return Err(TrainError::Experiment { origin: config.origin(), message });
    };
    for warning in &teacher.warnings {
        say(format_args!("warning: {}: {warning}", config.teacher));
    }
    let (teacher, _) = Teacher::model(&teacher, &config, &texts.tokenizer, &experiment.model, &device)?;
    // From here on files are written.
    let data = texts.prepare(seq_len, experiment.run.seed, &run_dir)?;
    let tokens = data.train.tokens();
    let total = tokens.len();
    record(&teacher, tokens, seq_len, kept, path, |done| advance(done, total))
}

/// The first id of the teacher's that the run's tokenizer reads differently.
fn difference(teacher: &Tokenizer, own: &Tokenizer) -> Option<String> {
    let (found, expected) = (teacher.vocab_size(), own.vocab_size());
    if found > expected {
        return Some(format!("found a tokenizer of {found} tokens, this run has {expected}"));
    }
    let differs = |id: &u32| teacher.decode(&[*id]) != own.decode(&[*id]);
    let id = (0..found as u32).find(differs)?;
    Some(format!(
        "found a tokenizer whose id {id} is {:?}, in this run {:?}",
        teacher.decode(&[id]),
        own.decode(&[id])
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokenizers_that_differ_are_told_apart() {
        let letters = |text: &str| Tokenizer::from_characters(text.chars().collect()).unwrap();
        assert_eq!(difference(&letters("abc"), &letters("abc")), None);
        assert!(difference(&letters("abc"), &letters("abd")).unwrap().contains("\"c\""));
        assert!(difference(&letters("abc"), &letters("ab")).unwrap().contains("tokens"));
    }
}
