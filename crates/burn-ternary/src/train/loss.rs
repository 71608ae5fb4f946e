//! The loss of a language model, computed from its logits.

use crate::ops::log_likelihood;
use burn::tensor::{Int, Tensor};

/// The parts of the loss of a batch, each a tensor of one number.
pub struct LmLoss {
    /// Mean cross entropy over the targets that count in the loss, in nats per token.
    pub cross_entropy: Tensor<1>,
    /// Mean squared log partition function over the same targets.
    pub z: Tensor<1>,
    /// Number of those targets that have the largest logit. No gradient.
    pub correct: Tensor<1>,
}

/// Cross entropy, z-loss and number of correct predictions of a batch, over the targets where the mask is 1.
///
/// `cross_entropy = mean(log Z - logit[target])` and `z = mean((log Z)^2)` with `Z = sum exp(logits)`. `tokens` is the number of
/// ones in the mask; if it is 0, all three results are 0.
///
/// # Shapes
/// - logits: `[batch, seq, vocab]`
/// - targets, mask: `[batch, seq]`
/// - each result: `[1]`
///
/// # Source
/// Chowdhery et al., PaLM, section 5, for the z-loss.
pub fn language_model_loss(
    logits: Tensor<3>,
    targets: Tensor<2, Int>,
    mask: Tensor<2>,
    tokens: usize,
) -> LmLoss {
    let [batch, seq, vocab] = logits.dims();
    let logits: Tensor<2> = logits.reshape([batch * seq, vocab]);
    let targets = targets.reshape([batch * seq, 1]);
    let mask: Tensor<2> = mask.reshape([batch * seq, 1]);
    let share = 1.0 / tokens.max(1) as f64;

    let likelihood = log_likelihood(logits, targets);
    let column = |i: usize| likelihood.clone().narrow(1, i, 1);
    let mean = |values: Tensor<2>| (values * mask.clone()).sum().mul_scalar(share);
    LmLoss {
        cross_entropy: mean(column(0) - column(1)),
        z: mean(column(0).square()),
        correct: (column(2).detach() * mask.clone()).sum(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// The definition, in float64, a target at a time.
    fn reference(logits: &[f32], targets: &[i32], mask: &[f32], vocab: usize) -> (f64, f64, f64) {
        let (mut nats, mut z, mut hits, mut tokens) = (0.0, 0.0, 0.0, 0.0);
        for (index, (&target, &carries)) in targets.iter().zip(mask).enumerate() {
            if carries == 0.0 {
                continue;
            }
            let row: Vec<f64> =
                logits[index * vocab..(index + 1) * vocab].iter().map(|&x| f64::from(x)).collect();
            let partition = row.iter().map(|x| x.exp()).sum::<f64>().ln();
            nats += partition - row[target as usize];
            z += partition * partition;
            hits += f64::from(u8::from(row.iter().all(|x| *x <= row[target as usize])));
            tokens += 1.0;
        }
        (nats / tokens, z / tokens, hits)
    }

    #[test]
    fn agrees_with_float64_and_leaves_masked_targets_out() {
        let device = Device::default();
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for (batch, seq, vocab) in [(1, 1, 3), (2, 5, 17), (3, 7, 101)] {
            let count = batch * seq;
            let logits: Vec<f32> = (0..count * vocab).map(|_| rng.random_range(-8.0..8.0)).collect();
            let targets: Vec<i32> = (0..count).map(|_| rng.random_range(0..vocab as i32)).collect();
            let mut mask: Vec<f32> = (0..count).map(|_| f32::from(u8::from(rng.random_bool(0.6)))).collect();
            mask[0] = 1.0;
            let tokens = mask.iter().filter(|m| **m == 1.0).count();
            let loss = language_model_loss(
                Tensor::from_data(TensorData::new(logits.clone(), [batch, seq, vocab]), &device),
                Tensor::from_data(TensorData::new(targets.clone(), [batch, seq]), &device),
                Tensor::from_data(TensorData::new(mask.clone(), [batch, seq]), &device),
                tokens,
            );
            let (nats, z, hits) = reference(&logits, &targets, &mask, vocab);
            assert!((f64::from(loss.cross_entropy.into_scalar::<f32>()) - nats).abs() < 1e-5 * nats.max(1.0));
            assert!((f64::from(loss.z.into_scalar::<f32>()) - z).abs() < 1e-5 * z.max(1.0));
            assert_eq!(f64::from(loss.correct.into_scalar::<f32>()), hits);
        }
    }

    #[test]
    fn a_batch_without_targets_costs_nothing() {
        let device = Device::default();
        let loss = language_model_loss(
            Tensor::ones([1, 2, 3], &device),
            Tensor::zeros([1, 2], &device),
            Tensor::zeros([1, 2], &device),
            0,
        );
        assert_eq!(loss.cross_entropy.into_scalar::<f32>(), 0.0);
    }
}
