//! Causal self-attention with grouped key and value heads.

use super::{DuckConfig, Family, QuantizedLinear, norm::RmsNorm, position::Rotary};
use burn::module::Module;
use burn::tensor::{Bool, Device, Tensor, activation::softmax};
use rand::Rng;

use super::transformer::LayerFactory;

/// Queries, keys, values and output are quantized linear layers.
#[derive(Module, Debug)]
pub struct CausalAttention {
    pub query: QuantizedLinear,
    pub key: QuantizedLinear,
    pub value: QuantizedLinear,
    pub output: QuantizedLinear,
    /// Norm before the output projection, in the bitnet family.
    pub sub_norm: Option<RmsNorm>,
    #[module(skip)]
    n_heads: usize,
    #[module(skip)]
    n_kv_heads: usize,
}

impl CausalAttention {
    pub(super) fn new(factory: &LayerFactory, rng: &mut impl Rng, device: &Device) -> Self {
        let config: &DuckConfig = factory.config;
        let width = config.n_heads * config.head_dim();
        let kv_width = config.n_kv_heads * config.head_dim();
        Self {
            query: factory.linear(config.d_model, width).init(rng, device),
            key: factory.linear(config.d_model, kv_width).init(rng, device),
            value: factory.linear(config.d_model, kv_width).init(rng, device),
            output: factory.residual_linear(width, config.d_model).init(rng, device),
            sub_norm: (config.family == Family::Bitnet).then(|| RmsNorm::new(width, config.norm_eps, device)),
            n_heads: config.n_heads,
            n_kv_heads: config.n_kv_heads,
        }
    }

    /// `softmax(q k^T / sqrt(head_dim)) v`, each position over itself and those before it.
    ///
    /// # Shapes
    /// - input: `[batch, seq, d_model]` to the same
    /// - future: `[1, 1, seq, seq]`, true where a position may not look
    pub fn forward(&self, input: Tensor<3>, rotary: Option<&Rotary>, future: Tensor<4, Bool>) -> Tensor<3> {
        let [batch, seq, _] = input.dims();
        let heads = |projected: Tensor<3>, n_heads: usize| {
            let head_dim = projected.dims()[2] / n_heads;
            projected.reshape([batch, seq, n_heads, head_dim]).swap_dims(1, 2)
        };
        let mut query = heads(self.query.forward(input.clone()), self.n_heads);
        let mut key = heads(self.key.forward(input.clone()), self.n_kv_heads);
        let value = self.repeat(heads(self.value.forward(input), self.n_kv_heads));
        if let Some(rotary) = rotary {
            query = rotary.forward(query);
            key = rotary.forward(key);
        }
        let key = self.repeat(key);
        let head_dim = query.dims()[3];
        let scores = query.matmul(key.swap_dims(2, 3)).mul_scalar((head_dim as f64).sqrt().recip());
        let scores = scores.mask_fill(future, f32::NEG_INFINITY);
        let mixed = softmax(scores, 3).matmul(value);
        let mixed = mixed.swap_dims(1, 2).reshape([batch, seq, self.n_heads * head_dim]);
        self.output.forward(match &self.sub_norm {
            Some(norm) => norm.forward(mixed),
            None => mixed,
        })
    }

    /// Each key and value head as often as query heads share it: `[batch, n_kv_heads, seq, d]` to `n_heads`.
    fn repeat(&self, heads: Tensor<4>) -> Tensor<4> {
        let [batch, n_kv_heads, seq, d] = heads.dims();
        let share = self.n_heads / self.n_kv_heads;
        if share == 1 {
            return heads;
        }
        let heads: Tensor<5> = heads.unsqueeze_dim(2);
        heads.expand([batch, n_kv_heads, share, seq, d]).reshape([batch, self.n_heads, seq, d])
    }
}
