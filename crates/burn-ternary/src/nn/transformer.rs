//! [`QuantizedTransformer`]: the stack of blocks between embedding and head.

use super::{
    Family,
    attention::{CausalAttention, Projections},
    factory::LayerFactory,
    feed_forward::FeedForward,
    norm::Norm,
    position::Rotary,
};
use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Bool, Device, Tensor};
use rand::Rng;

/// `x + attention(norm(x))`, then `x + feed_forward(norm(x))`.
#[derive(Module, Debug)]
pub struct TransformerBlock {
    /// Before the attention.
    pub attention_norm: Norm,
    /// Causal self-attention.
    pub attention: CausalAttention,
    /// Before the feed-forward block.
    pub feed_forward_norm: Norm,
    /// The feed-forward block.
    pub feed_forward: FeedForward,
    dropout: Dropout,
}

impl TransformerBlock {
    fn new(factory: &LayerFactory, rng: &mut impl Rng, device: &Device) -> Self {
        Self {
            attention_norm: factory.norm(device),
            attention: CausalAttention::new(factory, rng, device),
            feed_forward_norm: factory.norm(device),
            feed_forward: FeedForward::new(factory, rng, device),
            dropout: DropoutConfig::new(factory.config.dropout).init(),
        }
    }

    /// The output, and the projections of its attention if they are to be returned.
    fn forward(
        &self,
        input: Tensor<3>,
        rotary: Option<&Rotary>,
        future: Tensor<2, Bool>,
        returned: Returned,
    ) -> (Tensor<3>, Option<Projections>) {
        let projections = self.attention.project(self.attention_norm.forward(input.clone()));
        // An unused copy would keep the backend from working in place.
        let states = (returned == Returned::OutputAndProjections).then(|| projections.clone());
        let attended = self.attention.attend(projections, rotary, future);
        let hidden = input + self.dropout.forward(attended);
        let fed = self.feed_forward.forward(self.feed_forward_norm.forward(hidden.clone()));
        (hidden + self.dropout.forward(fed), states)
    }
}

/// What a block returns.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Returned {
    Output,
    OutputAndProjections,
}

/// Hidden states of one block, for distillation.
#[derive(Clone, Debug)]
pub struct BlockStates {
    /// Queries, keys and values of the attention.
    pub projections: Projections,
    /// The block's output, `[batch, seq, d_model]`.
    pub hidden: Tensor<3>,
}

/// Blocks and the final norm. Rotary positions are applied here; learned ones belong to the embedding.
#[derive(Module, Debug)]
pub struct QuantizedTransformer {
    /// In the order of the forward pass.
    pub blocks: Vec<TransformerBlock>,
    /// After the last block.
    pub norm: Norm,
    rotary: Option<Rotary>,
}

impl QuantizedTransformer {
    pub(super) fn new(factory: &LayerFactory, rng: &mut impl Rng, device: &Device) -> Self {
        let config = factory.config;
        let rotary = (config.family != Family::Gpt2)
            .then(|| Rotary::new(config.context, config.head_dim(), config.rope_theta, device));
        Self {
            blocks: (0..config.n_layers).map(|_| TransformerBlock::new(factory, rng, device)).collect(),
            norm: factory.norm(device),
            rotary,
        }
    }

    /// The output, and the hidden states of block `states_of` (counted from 0).
    ///
    /// # Shapes
    /// `[batch, seq, d_model]` to the same
    pub fn forward(&self, input: Tensor<3>, states_of: Option<usize>) -> (Tensor<3>, Option<BlockStates>) {
        let [_, seq, _] = input.dims();
        let future = Tensor::<2, Bool>::tril_mask([seq, seq], 0, &input.device());
        let (mut hidden, mut states) = (input, None);
        for (index, block) in self.blocks.iter().enumerate() {
            let returned = match states_of {
                Some(block) if block == index => Returned::OutputAndProjections,
                _ => Returned::Output,
            };
            let (output, projections) = block.forward(hidden, self.rotary.as_ref(), future.clone(), returned);
            hidden = output;
            if let Some(projections) = projections {
                states = Some(BlockStates { projections, hidden: hidden.clone() });
            }
        }
        (self.norm.forward(hidden), states)
    }
}
