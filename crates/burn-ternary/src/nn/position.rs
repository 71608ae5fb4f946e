//! Rotary position embedding.

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};

/// Turns pairs of a head's components by an angle that grows with the position: component `i` pairs with
/// `i + head_dim / 2` (the half-rotation convention of the Hugging Face llama), at frequency `theta^(-2i / head_dim)`.
///
/// # Source
/// Su et al., RoFormer, equation 34.
#[derive(Module, Debug)]
pub struct Rotary {
    /// `[context, head_dim]`: the cosines twice side by side.
    cos: Tensor<2>,
    /// `[context, head_dim]`
    sin: Tensor<2>,
}

impl Rotary {
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

    /// # Shapes
    /// `[batch, heads, seq, head_dim]` to the same
    pub fn forward(&self, input: Tensor<4>) -> Tensor<4> {
        let [_, _, seq, head_dim] = input.dims();
        let dtype = input.dtype();
        let table = |table: &Tensor<2>| table.clone().narrow(0, 0, seq).cast(dtype).unsqueeze::<4>();
        let first = input.clone().narrow(3, 0, head_dim / 2);
        let second = input.clone().narrow(3, head_dim / 2, head_dim / 2);
        let turned = Tensor::cat(vec![second.neg(), first], 3);
        input * table(&self.cos) + turned * table(&self.sin)
    }
}
