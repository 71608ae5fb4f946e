//! Causal self-attention with grouped key and value heads.

use super::{DuckConfig, Family, QuantizedLinear, factory::LayerFactory, norm::RmsNorm, position::Rotary};
use crate::ops::{Heads, causal_attention};
use burn::module::Module;
use burn::tensor::{Bool, Device, Tensor};
use rand::Rng;

/// Queries, keys and values before rotary embedding, with heads concatenated.
#[derive(Clone, Debug)]
pub struct Projections {
    /// `[batch, seq, n_heads * head_dim]`
    pub query: Tensor<3>,
    /// `[batch, seq, n_kv_heads * head_dim]`
    pub key: Tensor<3>,
    /// As `key`.
    pub value: Tensor<3>,
}

impl Projections {
    /// Applies `f` to queries, keys and values.
    pub fn map(self, f: impl Fn(Tensor<3>) -> Tensor<3>) -> Self {
        Self { query: f(self.query), key: f(self.key), value: f(self.value) }
    }
}

/// Causal self-attention, whose four projections are quantized linear layers.
#[derive(Module, Debug)]
pub struct CausalAttention {
    /// `[d_model, d_model]`
    pub query: QuantizedLinear,
    /// `[d_model, n_kv_heads * head_dim]`
    pub key: QuantizedLinear,
    /// `[d_model, n_kv_heads * head_dim]`
    pub value: QuantizedLinear,
    /// `[d_model, d_model]`
    pub output: QuantizedLinear,
    /// Norm before the output projection, in the bitnet family.
    pub sub_norm: Option<RmsNorm>,
    #[module(skip)]
    heads: Heads,
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
            heads: Heads { queries: config.n_heads, keys: config.n_kv_heads },
        }
    }

    /// The query, key and value projections of the input.
    ///
    /// # Shapes
    /// input: `[batch, seq, d_model]`
    pub fn project(&self, input: Tensor<3>) -> Projections {
        Projections {
            query: self.query.forward(input.clone()),
            key: self.key.forward(input.clone()),
            value: self.value.forward(input),
        }
    }

    /// `output(attention(query, key, value))`; see [`causal_attention`].
    ///
    /// # Shapes
    /// - future: `[seq, seq]`, true where attention is masked
    /// - result: `[batch, seq, d_model]`
    pub fn attend(
        &self,
        projections: Projections,
        rotary: Option<&Rotary>,
        future: Tensor<2, Bool>,
    ) -> Tensor<3> {
        let Projections { mut query, mut key, value } = projections;
        if let Some(rotary) = rotary {
            query = rotate(rotary, query, self.heads.queries);
            key = rotate(rotary, key, self.heads.keys);
        }
        let mixed = causal_attention(query, key, value, future, self.heads);
        self.output.forward(match &self.sub_norm {
            Some(norm) => norm.forward(mixed),
            None => mixed,
        })
    }
}

/// Applies rotary embedding to each of the concatenated heads of `[batch, seq, heads * head_dim]`.
fn rotate(rotary: &Rotary, input: Tensor<3>, heads: usize) -> Tensor<3> {
    let [batch, seq, width] = input.dims();
    rotary.forward(input.reshape([batch, seq, heads, width / heads])).reshape([batch, seq, width])
}
