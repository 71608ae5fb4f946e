//! Distillation: a teacher, and how far a student is from it.

use super::{TrainError, saved::packed_model};
use crate::nn::{DuckConfig, DuckQuantized};
use burn::tensor::{Device, Int, Tensor, activation::log_softmax};
use serde::{Deserialize, Serialize};
use std::path::Path;
use ternary_format::{ModelSpec, Tokenizer};

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
#[serde(deny_unknown_fields)]
pub struct DistillConfig {
    /// A run folder, or a model file of any kind, with the tokenizer of the run; empty: no teacher.
    pub teacher: String,
    /// Share of the divergence in the loss; cross entropy has the rest.
    pub weight: f64,
    /// Both distributions are softened by it, and their divergence is multiplied by its square.
    pub temperature: f64,
    pub divergence: Divergence,
}

/// A frozen model and what is made of its logits.
#[derive(Clone, Debug)]
pub struct Teacher {
    model: DuckQuantized,
    weight: f64,
    temperature: f64,
    divergence: Divergence,
}

impl Teacher {
    /// The teacher of an experiment, on `device`; `None` where it names none.
    ///
    /// # Errors
    /// `Experiment`: a teacher of other ids than `tokenizer` and the student, or of a smaller context. Those of
    /// [`packed_model`]; `Import`: a model file that is no model.
    pub fn load(
        config: &DistillConfig,
        tokenizer: &Tokenizer,
        student: &DuckConfig,
        device: &Device,
    ) -> Result<Option<Self>, TrainError> {
        if config.teacher.is_empty() {
            return Ok(None);
        }
        let packed = packed_model(Path::new(&config.teacher))?;
        let misfit = |message: String| {
            let origin = format!("distill.teacher = \"{}\"", config.teacher);
            TrainError::Experiment { origin, message }
        };
        if let Some(difference) = packed.tokenizer.as_ref().and_then(|own| difference(own, tokenizer)) {
            return Err(misfit(format!(
                "{difference}; expected the tokenizer of this run, as data.tokenizer = \"PATH OF THE TEACHER\" gives it"
            )));
        }
        let ModelSpec { vocab_size, context, .. } = packed.spec;
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
        // The special tokens of a run are new to most models of others; the teacher thinks nothing of them.
        let device = device.clone().without_autodiff();
        let model = DuckQuantized::from_packed_with(&packed, student.vocab_size, &device)?;
        let DistillConfig { weight, temperature, divergence, .. } = *config;
        Ok(Some(Self { model, weight, temperature, divergence }))
    }

    /// Share of the divergence in the loss.
    pub fn weight(&self) -> f64 {
        self.weight
    }

    /// Divergence of the student's `logits` from the teacher's on the same `inputs`, mean over the `tokens` targets
    /// where the mask is 1. No gradient reaches the teacher.
    ///
    /// # Shapes
    /// inputs and mask `[batch, seq]`, logits `[batch, seq, vocab]` -> `[1]`
    pub fn divergence(
        &self,
        inputs: Tensor<2, Int>,
        logits: Tensor<3>,
        mask: Tensor<2>,
        tokens: usize,
    ) -> Tensor<1> {
        let teacher = self.model.forward(inputs.without_autodiff());
        // Constants under autodiff if the student is.
        let teacher = if logits.is_autodiff() { teacher.autodiff() } else { teacher };
        divergence(self.divergence, self.temperature, teacher, logits, mask, tokens)
    }
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

/// `T² D(softmax(teacher / T), softmax(student / T))`, the mean over the `tokens` targets where the mask is 1.
///
/// # Source
/// Hinton et al., Distilling the Knowledge in a Neural Network, section 2, for `T²`.
fn divergence(
    kind: Divergence,
    temperature: f64,
    teacher: Tensor<3>,
    student: Tensor<3>,
    mask: Tensor<2>,
    tokens: usize,
) -> Tensor<1> {
    let log_p = log_softmax(teacher / temperature, 2);
    let log_q = log_softmax(student / temperature, 2);
    let gap = log_p.clone() - log_q.clone();
    let sum = match kind {
        Divergence::Forward => log_p.exp() * gap,
        Divergence::Reverse => log_q.exp() * gap.neg(),
        Divergence::Mean => (log_p.exp() - log_q.exp()) * gap / 2.0,
    };
    let sum: Tensor<2> = sum.sum_dim(2).squeeze_dim(2);
    (sum * mask).sum().mul_scalar(temperature * temperature / tokens.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::TensorData;
    use rand::{Rng, SeedableRng};

    const SHAPE: [usize; 3] = [2, 3, 7];

    fn numbers(seed: u64) -> Vec<f32> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        (0..SHAPE.iter().product()).map(|_| rng.random_range(-6.0..6.0)).collect()
    }

    fn probabilities(logits: &[f32], temperature: f64) -> Vec<f64> {
        let powers: Vec<f64> = logits.iter().map(|x| (f64::from(*x) / temperature).exp()).collect();
        let sum: f64 = powers.iter().sum();
        powers.iter().map(|power| power / sum).collect()
    }

    /// The definition in float64, over the targets under the mask.
    fn reference(kind: Divergence, temperature: f64, teacher: &[f32], student: &[f32], mask: &[f32]) -> f64 {
        let kl = |p: &[f64], q: &[f64]| -> f64 { p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum() };
        let rows = teacher
            .chunks(SHAPE[2])
            .zip(student.chunks(SHAPE[2]))
            .zip(mask)
            .filter(|(_, mask)| **mask == 1.0);
        let each = rows.map(|((teacher, student), _)| {
            let (p, q) = (probabilities(teacher, temperature), probabilities(student, temperature));
            match kind {
                Divergence::Forward => kl(&p, &q),
                Divergence::Reverse => kl(&q, &p),
                Divergence::Mean => (kl(&p, &q) + kl(&q, &p)) / 2.0,
            }
        });
        let each: Vec<f64> = each.collect();
        each.iter().sum::<f64>() / each.len() as f64 * temperature * temperature
    }

    #[test]
    fn divergence_and_its_gradient_agree_with_float64() {
        let device = crate::device::device("flex").unwrap().autodiff();
        let (teacher, student) = (numbers(1), numbers(2));
        let mask = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0];
        let tensor =
            |values: &[f32]| Tensor::<3>::from_data(TensorData::new(values.to_vec(), SHAPE), &device);
        for kind in [Divergence::Forward, Divergence::Reverse, Divergence::Mean] {
            for temperature in [1.0, 2.5] {
                let logits = tensor(&student).require_grad();
                let mask_tensor =
                    Tensor::from_data(TensorData::new(mask.to_vec(), [SHAPE[0], SHAPE[1]]), &device);
                let found = divergence(kind, temperature, tensor(&teacher), logits.clone(), mask_tensor, 4);
                let expected = reference(kind, temperature, &teacher, &student, &mask);
                let value = f64::from(found.clone().into_scalar::<f32>());
                assert!(
                    (value - expected).abs() < 1e-5 * expected,
                    "{kind:?} at {temperature}: {value}, {expected}"
                );

                let gradient = logits.grad(&found.backward()).unwrap();
                for (i, found) in gradient.into_data().iter::<f64>().enumerate() {
                    let moved = |by: f32| {
                        let mut student = student.clone();
                        student[i] += by;
                        reference(kind, temperature, &teacher, &student, &mask)
                    };
                    let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                    assert!(
                        (found - slope).abs() < 1e-3 * slope.abs().max(0.1),
                        "{kind:?}: {found}, {slope}"
                    );
                }
            }
        }
    }

    #[test]
    fn tokenizers_that_differ_are_told_apart() {
        let letters = |text: &str| Tokenizer::from_characters(text.chars().collect()).unwrap();
        assert_eq!(difference(&letters("abc"), &letters("abc")), None);
        assert!(difference(&letters("abc"), &letters("abd")).unwrap().contains("\"c\""));
        assert!(difference(&letters("abc"), &letters("ab")).unwrap().contains("tokens"));
    }
}
