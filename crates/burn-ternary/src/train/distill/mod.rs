//! Knowledge distillation: a teacher, and the distances of a student from it.

pub(crate) mod cached_logits;
mod distance;

use crate::ImportError;
use crate::data::{LmBatch, tokens::TokenFile};
use crate::device;
use crate::nn::{BlockStates, DuckConfig, DuckQuantized};
use burn::tensor::{Device, Tensor};
pub use cached_logits::CachedLogits;
use distance::{cached_divergence, divergence, hidden_distance, relation_divergence};
use getset::WithSetters;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use ternary_format::{
    ModelSpec, PackedModel, Tokenizer,
    memory::{self, OutOfMemory},
};

/// Direction of the Kullback-Leibler divergence between teacher `p` and student `q`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Divergence {
    /// `KL(p || q)`: the student covers every token that the teacher considers possible.
    Forward,
    /// `KL(q || p)`: the student concentrates on the tokens that the teacher considers likely.
    Reverse,
    /// The mean of both.
    Mean,
}

/// The `[distill]` section of an experiment: knowledge distillation from a teacher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema, WithSetters)]
#[serde(default, deny_unknown_fields)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct DistillConfig {
    /// Teacher: a run folder, a model file, or cached teacher logits (`duck distill-logits`), with the tokenizer of the run. Empty:
    /// no distillation.
    pub teacher: String,
    /// Weight of the divergence from the teacher in the loss; cross entropy has the weight `1 - weight`. 0 to 1.
    pub weight: f64,
    /// Temperature of both distributions; their divergence is multiplied by its square. Above 0.
    pub temperature: f64,
    /// Direction of the Kullback-Leibler divergence between teacher and student.
    pub divergence: Divergence,
    /// Weight in the loss of the mean squared distance between the hidden states of student and teacher; requires equal widths. 0:
    /// off.
    pub hidden_weight: f64,
    /// Weight in the loss of the divergence between the attention relations (of queries, keys and values) of student and teacher, for
    /// any widths; 0: off.
    pub relation_weight: f64,
    /// Number of heads into which queries, keys and values are split for their relations; a divisor of their widths in both models.
    pub relation_heads: usize,
    /// Block of the student whose hidden states and relations are compared, from 1; 0: the last. The teacher's block is the one at
    /// the same relative depth.
    pub layer: usize,
}

impl Default for DistillConfig {
    /// No teacher. The other values are the best of our runs.
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
    /// The compared blocks of student and teacher, from 0; `None` if no blocks are compared.
    fn blocks(&self, student: usize, teacher: usize) -> Option<[usize; 2]> {
        let layer = if self.layer == 0 { student } else { self.layer };
        let compared = self.hidden_weight > 0.0 || self.relation_weight > 0.0;
        compared.then(|| [layer - 1, (layer * teacher).div_ceil(student) - 1])
    }
}

/// An error of a teacher that does not fit its student.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TeacherError {
    /// Different token ids, another text, a smaller context, or widths that cannot be compared; names what was found and expected.
    #[error("{0}")]
    Mismatch(String),
    /// The teacher does not fit into memory.
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
    /// The packed model is not a language model.
    #[error(transparent)]
    Model(#[from] ImportError),
}

/// The teacher of a run, a model or cached logits, with the settings of the comparison.
#[derive(Clone, Debug)]
pub struct Teacher {
    source: Source,
    config: DistillConfig,
}

#[derive(Clone, Debug)]
enum Source {
    /// A frozen model; the blocks of student and teacher whose states are compared, from 0.
    Model(Box<DuckQuantized>, Option<[usize; 2]>),
    Logits(Arc<CachedLogits>),
}

/// Distances of a student from its teacher, each `[1]`.
pub struct Distances {
    /// Of the distributions of the next token, in nats; see [`Divergence`].
    pub divergence: Tensor<1>,
    /// Mean squared distance of the hidden states, after both are scaled to a root mean square of 1.
    pub hidden: Option<Tensor<1>>,
    /// KL divergence of the relations between positions, in nats.
    pub relation: Option<Tensor<1>>,
}

impl Teacher {
    /// Creates a teacher from a model, on `device`.
    ///
    /// # Errors
    /// `Mismatch`: token ids that differ from those of `tokenizer` and the student, a smaller context, or widths that cannot be
    /// compared. `Memory`: the model does not fit into memory. `Model`: it is not a language model.
    pub fn from_model(
        packed: &PackedModel,
        config: &DistillConfig,
        tokenizer: &Tokenizer,
        student: &DuckConfig,
        device: &Device,
    ) -> Result<Self, TeacherError> {
        let model = teacher_model(packed, config, tokenizer, student, device)?;
        let blocks = config.blocks(student.n_layers, packed.spec.n_layers);
        Ok(Self { source: Source::Model(Box::new(model), blocks), config: config.clone() })
    }

    /// Creates a teacher from cached logits on `text`.
    ///
    /// # Errors
    /// `Mismatch`: logits of another text, a larger vocabulary than the student's, or settings that require a model.
    pub fn from_logits(
        logits: CachedLogits,
        config: &DistillConfig,
        text: &TokenFile,
        student: &DuckConfig,
    ) -> Result<Self, TeacherError> {
        if !logits.is_of(text) {
            return Err(TeacherError::Mismatch(
                "the cached teacher logits are of another text or tokenizer; expected those of this run (data.train, data.tokenizer)"
                    .into(),
            ));
        }
        if config.temperature != 1.0 || config.hidden_weight > 0.0 || config.relation_weight > 0.0 {
            return Err(TeacherError::Mismatch(
                "found cached teacher logits, which have probabilities at temperature 1 only; expected \
                 distill.temperature = 1.0, hidden_weight = 0.0 and relation_weight = 0.0, or a model"
                    .into(),
            ));
        }
        if logits.vocab_size() > student.vocab_size {
            return Err(TeacherError::Mismatch(format!(
                "found {} tokens, expected at most model.vocab_size = {}",
                logits.vocab_size(),
                student.vocab_size
            )));
        }
        Ok(Self { source: Source::Logits(Arc::new(logits)), config: config.clone() })
    }

    /// The block of the student, from 0, whose hidden states [`Self::compare`] requires; `None` if it requires none.
    pub fn block(&self) -> Option<usize> {
        match self.source {
            Source::Model(_, Some([student, _])) => Some(student),
            _ => None,
        }
    }

    /// Distances of a student's `logits` and `states` from the teacher's on the same batch. The distance of the logits is a mean over
    /// the targets that count in the loss, those of the states over all positions. No gradient reaches the teacher.
    ///
    /// # Shapes
    /// - logits: `[batch, seq, vocab]`
    /// - states: those of [`Self::block`], as [`BlockStates`]
    /// - each distance: `[1]`
    pub fn compare(&self, batch: &LmBatch, logits: Tensor<3>, states: Option<BlockStates>) -> Distances {
        let LmBatch { inputs, mask, tokens, .. } = batch;
        let (mask, tokens) = (mask.clone(), *tokens);
        let DistillConfig { divergence: kind, temperature, .. } = self.config;
        // Under autodiff, an op requires all of its inputs there.
        let constant = |tensor: Tensor<3>| if logits.is_autodiff() { tensor.autodiff() } else { tensor };
        let (teacher, blocks) = match &self.source {
            Source::Model(teacher, blocks) => (teacher, blocks),
            Source::Logits(cached) => {
                let device = logits.device().without_autodiff();
                let (ids, log_p) = cached.rows(&batch.starts, inputs.dims()[1], &device);
                let ids = if logits.is_autodiff() { ids.autodiff() } else { ids };
                let log_p = constant(log_p);
                let divergence = cached_divergence(kind, ids, log_p, logits, mask, tokens);
                return Distances { divergence, hidden: None, relation: None };
            }
        };
        let shown = blocks.map(|[_, teacher]| teacher);
        let (own, own_states) = teacher.forward_with_states(inputs.clone().without_autodiff(), shown);
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

    /// The student's loss, from its cross entropy `loss` and its distances from the teacher:
    /// `(1 - weight) loss + weight divergence + hidden_weight hidden + relation_weight relation`.
    ///
    /// # Shapes
    /// `[1]`
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

/// The model of a teacher, on `device` and without autodiff.
///
/// # Errors
/// As [`Teacher::from_model`].
pub(crate) fn teacher_model(
    packed: &PackedModel,
    config: &DistillConfig,
    tokenizer: &Tokenizer,
    student: &DuckConfig,
    device: &Device,
) -> Result<DuckQuantized, TeacherError> {
    if let Some(difference) = packed.tokenizer.as_ref().and_then(|own| difference(own, tokenizer)) {
        return Err(TeacherError::Mismatch(format!(
            "{difference}; expected the tokenizer of this run, as data.tokenizer = \"PATH OF THE TEACHER\" gives it"
        )));
    }
    let ModelSpec { vocab_size, context, d_model, n_heads, n_kv_heads, .. } = packed.spec;
    if vocab_size > student.vocab_size {
        return Err(TeacherError::Mismatch(format!(
            "found {vocab_size} tokens, expected at most model.vocab_size = {}",
            student.vocab_size
        )));
    }
    if context < student.context {
        return Err(TeacherError::Mismatch(format!(
            "found a context of {context}, expected at least model.context = {}",
            student.context
        )));
    }
    if config.hidden_weight > 0.0 && d_model != student.d_model {
        return Err(TeacherError::Mismatch(format!(
            "found a width of {d_model}, expected model.d_model = {} for distill.hidden_weight above 0 (relations do \
             without)",
            student.d_model
        )));
    }
    let head_dim = d_model / n_heads;
    let heads = config.relation_heads;
    let divides = |n: usize| (n * head_dim).is_multiple_of(heads);
    if config.relation_weight > 0.0 && !(divides(n_heads) && divides(n_kv_heads)) {
        return Err(TeacherError::Mismatch(format!(
            "found queries of {} and keys of {}, expected widths that distill.relation_heads = {heads} divides",
            n_heads * head_dim,
            n_kv_heads * head_dim
        )));
    }
    // The special tokens of a run are unknown to most teachers, whose probabilities of them are 0.
    let device = device.clone().without_autodiff();
    if device::is_cpu(&device) {
        let parameters: usize = packed.tensors.values().map(|tensor| tensor.rows() * tensor.cols()).sum();
        memory::check((size_of::<f32>() * parameters) as u64)?;
    }
    Ok(DuckQuantized::from_packed_with(packed, student.vocab_size, &device)?)
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
