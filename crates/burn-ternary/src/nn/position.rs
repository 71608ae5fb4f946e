//! Rotary position embedding.

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};

/// Rotates pairs of a head's components by an angle proportional to the position: component `i` pairs with
/// `i + head_dim / 2` (the half-rotation convention of the Hugging Face llama), at frequency `theta^(-2i / head_dim)`.
///
/// # Source
/// Su et al., RoFormer, equation 34.
#[derive(Module, Debug)]
pub struct Rotary {
    /// `[context, head_dim]`: the cosines, twice in each row.
    cos: Tensor<2>,
    /// `[context, head_dim]`
    sin: Tensor<2>,
}

impl Rotary {
    /// Tables for sequences of up to `context` tokens.
    pub fn new(context: usize, head_dim: usize, theta: f64, device: &Device) -> Self {
        let half = head_dim / 2;
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = (0..context * head_dim)
                .map(|index| {
                    let (position, i) = (index / head_dim, index % head_dim % half);
                    f(position as f64 * theta.powf(-2.0 * i as f64 / head_dim as f64)) as f32
                })
                .collect();
            Tensor::from_data(TensorData::new(values, [context, head_dim]), device)
        };
        Self { cos: table(f64::cos), sin: table(f64::sin) }
    }

    /// Applies the rotation of positions `0..seq`.
    ///
    /// # Shapes
    /// `[batch, seq, heads, head_dim]` to the same
    pub fn forward(&self, input: Tensor<4>) -> Tensor<4> {
        let [_, seq, _, head_dim] = input.dims();
        let dtype = input.dtype();
        let table =
            |table: &Tensor<2>| table.clone().narrow(0, 0, seq).cast(dtype).reshape([1, seq, 1, head_dim]);
        let first = input.clone().narrow(3, 0, head_dim / 2);
        let second = input.clone().narrow(3, head_dim / 2, head_dim / 2);
        let rotated = Tensor::cat(vec![second.neg(), first], 3);
        input * table(&self.cos) + rotated * table(&self.sin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Distribution;

    fn device() -> Device {
        crate::device::device("flex").unwrap()
    }

    fn values(tensor: Tensor<4>) -> Vec<f64> {
        tensor.into_data().iter::<f64>().collect()
    }

    #[test]
    fn pairs_turn_by_the_angle_of_their_position() {
        for (head_dim, theta, seq) in [(2, 10_000.0, 3), (8, 10_000.0, 512), (6, 500_000.0, 40)] {
            let input = Tensor::<4>::random([2, seq, 3, head_dim], Distribution::Normal(0.0, 1.0), &device());
            let found = values(Rotary::new(512, head_dim, theta, &device()).forward(input.clone()));
            let half = head_dim / 2;
            let heads = values(input);
            for (index, (found, input)) in found.chunks(head_dim).zip(heads.chunks(head_dim)).enumerate() {
                for i in 0..half {
                    let angle = (index / 3 % seq) as f64 * theta.powf(-2.0 * i as f64 / head_dim as f64);
                    let (x, y) = (input[i], input[i + half]);
                    let rotated = [x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()];
                    for (found, expected) in [found[i], found[i + half]].iter().zip(rotated) {
                        assert!(
                            (found - expected).abs() < 2e-6,
                            "{found} for {expected} at {index}, pair {i}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn scores_depend_on_the_distance_only() {
        let (seq, head_dim) = (60, 8);
        let same = |seed: u64| {
            device().seed(seed);
            let vector = Tensor::<4>::random([1, 1, 1, head_dim], Distribution::Normal(0.0, 1.0), &device());
            vector.expand([1, seq, 1, head_dim])
        };
        let rotary = Rotary::new(64, head_dim, 10_000.0, &device());
        let heads = |seed| rotary.forward(same(seed)).swap_dims(1, 2);
        let scores = heads(1).matmul(heads(2).swap_dims(2, 3));
        let scores = values(scores);
        let score = |query: usize, key: usize| scores[query * seq + key];
        for distance in [0, 1, 7, 30] {
            for key in 1..seq - distance {
                assert!((score(key + distance, key) - score(distance, 0)).abs() < 1e-4);
            }
        }
        assert!((score(9, 0) - score(0, 0)).abs() > 1e-2);
    }
}
