//! Gradients of causal attention.

use super::{Attended, AttentionOps, Heads, SavedAttention};
use crate::ops::autodiff::{Gradient, track};
use burn::backend::{
    Autodiff, AutodiffBackend,
    autodiff::checkpoint::strategy::CheckpointStrategy,
    tensor::{BoolTensor, FloatTensor},
};

impl<B: AttentionOps, C: CheckpointStrategy> AttentionOps for Autodiff<B, C> {
    fn causal_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        future: BoolTensor<Self>,
        heads: Heads,
    ) -> Attended<Self> {
        let mut log_sum_exp = None;
        let output = track::<B, C, 3>([query, key, value], |[query, key, value]| {
            let Attended { output, log_partition } =
                B::causal_attention(query.clone(), key.clone(), value.clone(), future.clone(), heads);
            log_sum_exp = Some(log_partition.clone());
            let result = output.clone();
            let gradient = Gradient::new(move |grad| {
                let saved = SavedAttention {
                    query: query.clone(),
                    key: key.clone(),
                    value: value.clone(),
                    future: future.clone(),
                    output: output.clone(),
                    log_partition: log_partition.clone(),
                };
                B::causal_attention_backward(saved, grad, heads).into()
            });
            (result, gradient)
        });
        let log_partition = log_sum_exp.expect("the forward pass ran");
        Attended { output, log_partition: Self::from_inner(log_partition) }
    }
}
