//! Gradient of the embedding lookup.

use super::EmbeddingOps;
use crate::ops::autodiff::{Gradient, track};
use burn::backend::{
    Autodiff,
    autodiff::checkpoint::strategy::CheckpointStrategy,
    tensor::{FloatTensor, IntTensor},
};

impl<B: EmbeddingOps, C: CheckpointStrategy> EmbeddingOps for Autodiff<B, C> {
    fn embed(table: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
        track::<B, C, 1>([table], |[table]| {
            let output = B::embed(table.clone(), ids.clone());
            let gradient = Gradient::new(move |grad| [B::embed_backward(table.clone(), ids.clone(), grad)]);
            (output, gradient)
        })
    }
}
