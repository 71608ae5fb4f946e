//! Initial weights.

use burn::tensor::{Device, Tensor, TensorData};
use rand::Rng;
use rand_distr::{Distribution, Normal};

/// Standard deviation of initial weights, GPT-2's.
pub(super) const INIT_STD: f64 = 0.02;

/// `[rows, columns]` of normal deviates, drawn on the host.
pub(super) fn normal(
    rng: &mut impl Rng,
    [rows, columns]: [usize; 2],
    std: f64,
    device: &Device,
) -> Tensor<2> {
    let normal = Normal::new(0.0f32, std as f32).expect("a finite standard deviation");
    let values: Vec<f32> = (0..rows * columns).map(|_| normal.sample(rng)).collect();
    Tensor::from_data(TensorData::new(values, [rows, columns]), device)
}
