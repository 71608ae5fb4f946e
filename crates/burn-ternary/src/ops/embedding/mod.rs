//! Embedding lookup.
//!
//! # Overriding
//! The lookup copies rows, to the bit. The backward method sums gradients, within f32 rounding.

mod autodiff;
#[cfg(feature = "flex")]
mod flex;

use super::backend::backend_ops;
use burn::backend::{
    Backend, Dispatch,
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

backend_ops! {
    /// Embedding lookup, with its gradient.
    pub trait EmbeddingOps: Backend {
        /// See [`embed`].
        #[fusion(default)]
        fn embed(table: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
            Self::embedding(table, ids)
        }

        /// The gradient of the table; only the shape of `table` is used.
        #[fusion(default)]
        fn embed_backward(
            table: FloatTensor<Self>,
            ids: IntTensor<Self>,
            grad: FloatTensor<Self>,
        ) -> FloatTensor<Self> {
            Self::embedding_backward(table, grad, ids)
        }
    }
}
