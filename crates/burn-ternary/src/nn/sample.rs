//! Sampling during training.

use super::DuckQuantized;
use burn::tensor::{Int, Tensor, TensorData};
use rand::Rng;

impl DuckQuantized {
    /// Continues `prompt` by up to `count` tokens, sampled at `temperature` (0: greedy), until `stop` is drawn.
    ///
    /// Without a KV cache: it computes the whole context for every token. Meant for samples during training.
    ///
    /// # Panics
    /// If the prompt is empty.
    pub fn sample(
        &self,
        prompt: &[u32],
        count: usize,
        temperature: f64,
        stop: u32,
        rng: &mut impl Rng,
    ) -> Vec<u32> {
        let device = self.embedding.device();
        let mut ids = prompt.to_vec();
        for _ in 0..count {
            let seen = &ids[ids.len().saturating_sub(self.config().context)..];
            let input: Vec<i32> = seen.iter().map(|id| *id as i32).collect();
            let input = Tensor::<2, Int>::from_data(TensorData::new(input, [1, seen.len()]), &device);
            let logits = self.forward(input).narrow(1, seen.len() - 1, 1);
            let logits: Vec<f64> = logits.into_data().iter::<f64>().collect();
            let next = draw(&logits, temperature, rng) as u32;
            if next == stop {
                break;
            }
            ids.push(next);
        }
        ids.split_off(prompt.len())
    }
}

fn draw(logits: &[f64], temperature: f64, rng: &mut impl Rng) -> usize {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let greedy = logits.iter().position(|logit| *logit == max).unwrap_or(0);
    if temperature <= 0.0 {
        return greedy;
    }
    let weights: Vec<f64> = logits.iter().map(|logit| ((logit - max) / temperature).exp()).collect();
    let mut point = rng.random::<f64>() * weights.iter().sum::<f64>();
    for (index, weight) in weights.iter().enumerate() {
        point -= weight;
        if point < 0.0 {
            return index;
        }
    }
    greedy
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{nn::DuckConfig, quant::QuantConfig};
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn draws_follow_the_tempered_softmax() {
        let logits = [1.0, -0.5, 2.0, 0.0];
        let rng = &mut ChaCha8Rng::seed_from_u64(0);
        for temperature in [0.5, 1.0, 3.0] {
            let weights = logits.map(|logit: f64| (logit / temperature).exp());
            let total: f64 = weights.iter().sum();
            let mut counts = [0.0; 4];
            (0..20_000).for_each(|_| counts[draw(&logits, temperature, rng)] += 1.0);
            for (count, weight) in counts.iter().zip(weights) {
                // Four standard deviations of a fraction of 20,000.
                assert!((count / 20_000.0 - weight / total).abs() < 0.015, "{counts:?} at {temperature}");
            }
        }
        assert_eq!(draw(&logits, 0.0, rng), 2);
    }

    #[test]
    fn text_may_outgrow_the_context_and_ends_before_the_stop() {
        let config =
            DuckConfig { vocab_size: 5, context: 4, d_model: 8, n_heads: 2, ..DuckConfig::duck_tiny() };
        let config = DuckConfig { n_kv_heads: 2, d_ff: 8, ..config };
        let device = crate::device::device("flex").unwrap();
        let model = config.init(&QuantConfig::default(), 0, &device);
        let draw = |stop| model.sample(&[1, 2, 3], 12, 5.0, stop, &mut ChaCha8Rng::seed_from_u64(1));
        let free = draw(99);
        assert_eq!(free.len(), 12);
        assert!(free.iter().all(|id| *id < 5));
        let stop = free[6];
        let first = free.iter().position(|id| *id == stop).unwrap();
        assert_eq!(draw(stop), free[..first]);
    }
}
