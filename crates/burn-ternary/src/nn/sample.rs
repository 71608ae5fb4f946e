use super::DuckQuantized;
use burn::tensor::{Int, Tensor, TensorData};
use rand::Rng;

impl DuckQuantized {
    /// Continues `prompt` by up to `count` tokens, drawn at `temperature` (0: the likeliest), until `stop` is drawn.
    ///
    /// Runs the whole context for every token: meant for a look at a model in training.
    ///
    /// # Panics
    /// With an empty prompt.
    pub fn sample(&self, prompt: &[u32], count: usize, temperature: f64, stop: u32, rng: &mut impl Rng) -> Vec<u32> {
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
    let likeliest = logits.iter().position(|logit| *logit == max).unwrap_or(0);
    if temperature <= 0.0 {
        return likeliest;
    }
    let weights: Vec<f64> = logits.iter().map(|logit| ((logit - max) / temperature).exp()).collect();
    let mut point = rng.random::<f64>() * weights.iter().sum::<f64>();
    for (index, weight) in weights.iter().enumerate() {
        point -= weight;
        if point < 0.0 {
            return index;
        }
    }
    likeliest
}
