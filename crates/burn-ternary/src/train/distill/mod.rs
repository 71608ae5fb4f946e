//! Knowledge distillation: a teacher, and the distances of a student from it.

pub(crate) mod cached_logits;
mod distance;

use crate::ImportError;
use crate::data::{LmBatch, tokens::TokenFile};
use crate::device;
use crate::nn::{BlockStates, DuckConfig, DuckQuantized};
use burn::tensor::{Device, Tensor};
pub use cached_logits::CachedLogits;
use distance::{divergence, hidden_distance, recorded_divergence, relation_divergence};
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
    /// The blocks of student and teacher, from 0, that are compared; `None`: none is.
    fn blocks(&self, student: usize, teacher: usize) -> Option<[usize; 2]> {
        let layer = if self.layer == 0 { student } else { self.layer };
        let compared = self.hidden_weight > 0.0 || self.relation_weight > 0.0;
        compared.then(|| [layer - 1, (layer * teacher).div_ceil(student) - 1])
    }
}

/// Why a teacher cannot teach a student.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TeacherError {
    /// Other ids, another text, a smaller context, or widths that cannot be compared: what was found and expected.
    #[error("{0}")]
    Mismatch(String),
    /// The teacher does not fit into memory.
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
    /// The packed model is not a language model.
    #[error(transparent)]
    Model(#[from] ImportError),
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
    Logits(Arc<CachedLogits>),
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

impl Teacher {
    /// A teacher that is a model, on `device`.
    ///
    /// # Errors
    /// `Mismatch`: other ids than those of `tokenizer` and the student, a smaller context, or widths that cannot be compared;
    /// `Memory`, `Model`: a model that cannot be made.
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

    /// A teacher whose logits on `text` were cached.
    ///
    /// # Errors
    /// `Mismatch`: logits of another text, of more tokens than the student has, or settings that need a model.
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

    /// The student's block whose states [`Self::compare`] requires, from 0.
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
            Source::Logits(cached) => {
                let device = logits.device().without_autodiff();
                let (ids, log_p) = cached.rows(&batch.starts, inputs.dims()[1], &device);
                let ids = if logits.is_autodiff() { ids.autodiff() } else { ids };
                let log_p = constant(log_p);
                let divergence = recorded_divergence(kind, ids, log_p, logits, mask, tokens);
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

    /// The loss of a student with the cross entropy `loss` and these distances from its teacher:
    /// `(1 - weight) loss + weight divergence + hidden_weight hidden + relation_weight relation`.
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
