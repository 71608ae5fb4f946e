//! Causal attention.
//!
//! # Overriding
//! An override must agree with the default body within f32 rounding. The forward method also returns the log-sum-exp that
//! the backward method reads, so override both or neither.

mod autodiff;
#[cfg(feature = "flex")]
mod flex;
mod reference;

use super::backend::backend_ops;
use burn::backend::{
    Backend, Dispatch, ExtensionType,
    tensor::{BoolTensor, FloatTensor},
};
use burn::tensor::{Bool, Tensor};

/// Number of query heads, and of key-value heads (grouped-query attention).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Number of query heads.
    pub queries: usize,
    /// Number of key-value heads, a divisor of `queries`: query head `h` uses key-value head `h / (queries / keys)`.
    pub keys: usize,
}

/// `softmax(q k^T / sqrt(width)) v`; each position attends to itself and earlier positions.
///
/// # Shapes
/// - query: `[batch, seq, heads.queries * width]`, which is also that of the output
/// - key, value: `[batch, seq, heads.keys * width]`
/// - future: `[seq, seq]`, the causal mask: true above the diagonal, where attention is not allowed
///
/// # Source
/// Vaswani et al., Attention Is All You Need; Ainslie et al., GQA, for shared keys and values.
pub fn causal_attention(
    query: Tensor<3>,
    key: Tensor<3>,
    value: Tensor<3>,
    future: Tensor<2, Bool>,
    heads: Heads,
) -> Tensor<3> {
    let attended = Dispatch::causal_attention(
        query.into_dispatch(),
        key.into_dispatch(),
        value.into_dispatch(),
        future.into_dispatch(),
        heads,
    );
    Tensor::from_dispatch(attended.output)
}

/// Result of the forward pass.
#[derive(ExtensionType)]
pub struct Attended<B: Backend> {
    /// `[batch, seq, heads.queries * width]`
    pub output: FloatTensor<B>,
    /// Log-sum-exp of the scores, `[batch, heads.queries, seq, 1]`.
    pub log_partition: FloatTensor<B>,
}

/// What the backward pass reads: inputs and results of the forward pass.
#[derive(ExtensionType)]
pub struct SavedAttention<B: Backend> {
    /// `[batch, seq, heads.queries * width]`
    pub query: FloatTensor<B>,
    /// `[batch, seq, heads.keys * width]`
    pub key: FloatTensor<B>,
    /// As `key`.
    pub value: FloatTensor<B>,
    /// The causal mask.
    pub future: BoolTensor<B>,
    /// As `query`.
    pub output: FloatTensor<B>,
    /// As that of [`Attended`].
    pub log_partition: FloatTensor<B>,
}

backend_ops! {
    /// Causal attention, with its gradients.
    pub trait AttentionOps: Backend {
        /// See [`causal_attention`].
        #[fusion(default)]
        fn causal_attention(
            query: FloatTensor<Self>,
            key: FloatTensor<Self>,
            value: FloatTensor<Self>,
            future: BoolTensor<Self>,
            heads: Heads,
        ) -> Attended<Self> {
            reference::causal_attention::<Self>(query, key, value, future, heads)
        }

        /// Gradients of query, key and value.
        #[fusion(default)]
        fn causal_attention_backward(
            #[extension_type] saved: SavedAttention<Self>,
            grad: FloatTensor<Self>,
            heads: Heads,
        ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
            reference::causal_attention_backward::<Self>(saved, grad, heads)
        }
    }
}
