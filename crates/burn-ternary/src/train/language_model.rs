//! [`LanguageModel`]: from a batch to a loss.

use super::distill::Teacher;
use super::loss::language_model_loss;
use super::optim::OptimConfig;
use crate::data::LmBatch;
use crate::nn::DuckQuantized;
use crate::report::{StepReport, burn_metrics::LmItem};
use burn::module::Module;
use burn::tensor::Tensor;
use burn::train::{InferenceStep, TrainOutput, TrainStep};
use std::sync::Arc;

/// A model with the terms of its training loss.
#[derive(Module, Debug)]
pub struct LanguageModel {
    /// The model.
    pub model: DuckQuantized,
    #[module(skip)]
    objective: Objective,
    #[module(skip)]
    teacher: Option<Arc<Teacher>>,
}

/// Weights of the terms of the loss besides cross entropy.
#[derive(Clone, Copy, Debug)]
struct Objective {
    z_loss: f64,
    quantization_penalty: f64,
    scale_penalty: f64,
}

impl LanguageModel {
    pub(super) fn new(model: DuckQuantized, optim: &OptimConfig, teacher: Option<Teacher>) -> Self {
        let quant = model.quant();
        let objective = Objective {
            z_loss: optim.z_loss,
            quantization_penalty: quant.quantization_penalty,
            scale_penalty: quant.scale_penalty,
        };
        Self { model, objective, teacher: teacher.map(Arc::new) }
    }

    /// Total loss (with a gradient) and what is reported of it.
    fn loss(&self, batch: LmBatch, teacher: Option<&Teacher>) -> (Tensor<1>, StepReport) {
        let tokens = batch.tokens;
        let block = teacher.and_then(Teacher::block);
        let (logits, states) = self.model.forward_with_states(batch.inputs.clone(), block);
        let compared = teacher.map(|teacher| (teacher, teacher.compare(&batch, logits.clone(), states)));
        let loss = language_model_loss(logits, batch.targets, batch.mask, tokens);
        let mut total = loss.cross_entropy.clone();
        if let Some((teacher, distances)) = &compared {
            total = teacher.blend(total, distances);
        }
        if self.objective.z_loss > 0.0 {
            total = total + loss.z.clone().mul_scalar(self.objective.z_loss);
        }
        if let Some(penalty) = self.penalty() {
            total = total + penalty;
        }
        // One read for all numbers: a read waits for the device.
        let [divergence, hidden, relation] = match compared {
            Some((_, distances)) => [Some(distances.divergence), distances.hidden, distances.relation],
            None => [None, None, None],
        };
        let parts =
            [Some(loss.cross_entropy), Some(loss.z), Some(loss.correct), divergence, hidden, relation];
        let read = Tensor::cat(parts.iter().flatten().cloned().map(Tensor::detach).collect(), 0);
        let data = read.into_data();
        let mut numbers = data.iter::<f64>();
        let [nats, z_loss, correct, divergence, hidden, relation] =
            parts.map(|part| part.and_then(|_| numbers.next()));
        let report = StepReport {
            tokens,
            loss: nats.unwrap_or(f64::NAN),
            z_loss,
            divergence,
            hidden,
            relation,
            accuracy: correct.unwrap_or(0.0) / tokens.max(1) as f64,
            ..StepReport::default()
        };
        (total, report)
    }

    /// Mean over the linear layers of: the squared distance between latent and fake quantized weights; the squared
    /// log distance of learned scales from their least-squares value.
    fn penalty(&self) -> Option<Tensor<1>> {
        let Objective { quantization_penalty, scale_penalty, .. } = self.objective;
        if quantization_penalty == 0.0 && scale_penalty == 0.0 {
            return None;
        }
        let linears = self.model.linears();
        let share = 1.0 / linears.len() as f64;
        let mut terms = Vec::new();
        for (_, linear) in &linears {
            let Some(quantizer) = &linear.quantizer else { continue };
            let latent = linear.weight.val();
            if quantization_penalty > 0.0 {
                let distance = latent.clone() - quantizer.fake_quantize(latent.clone()).detach();
                terms.push(distance.square().mean().mul_scalar(quantization_penalty * share));
            }
            if let (Some(scale), true) = (quantizer.learned_scale(), scale_penalty > 0.0) {
                let best = quantizer.optimal_scale(latent.detach());
                let distance =
                    scale.clamp_min(f32::MIN_POSITIVE).log() - best.clamp_min(f32::MIN_POSITIVE).log();
                terms.push(distance.square().mean().mul_scalar(scale_penalty * share));
            }
        }
        terms.into_iter().reduce(|sum, term| sum + term)
    }
}

impl TrainStep for LanguageModel {
    type Input = LmBatch;
    type Output = LmItem;

    fn step(&self, batch: LmBatch) -> TrainOutput<LmItem> {
        let weight = batch.weight;
        let (loss, report) = self.loss(batch, self.teacher.as_deref());
        TrainOutput::new(self, loss.mul_scalar(weight).backward(), LmItem(report))
    }
}

impl InferenceStep for LanguageModel {
    type Input = LmBatch;
    type Output = LmItem;

    fn step(&self, batch: LmBatch) -> LmItem {
        LmItem(self.loss(batch, None).1)
    }
}
