//! Embedding lookup.

use super::{TernaryBackend, node};
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::{
    Autodiff, Dispatch,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{Int, Tensor};

/// The row of the table for each id.
///
/// # Shapes
/// table `[vocab, d]`, ids `[batch, seq]`, to `[batch, seq, d]`
pub fn embed(table: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
    Tensor::from_dispatch(Dispatch::embed(table.into_dispatch(), ids.into_dispatch()))
}

pub(super) fn track<B: TernaryBackend, C: CheckpointStrategy>(
    table: FloatTensor<Autodiff<B, C>>,
    ids: IntTensor<B>,
) -> FloatTensor<Autodiff<B, C>> {
    node::track::<B, C, 1>([table], |[table]| {
        let output = B::embed(table.clone(), ids.clone());
        let gradient = node::Gradient::new(move |grad| [B::embed_backward(table.clone(), ids.clone(), grad)]);
        (output, gradient)
    })
}
