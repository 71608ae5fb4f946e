//! The gradient of the embedding lookup on flex.

use super::EmbeddingOps;
use crate::ops::flex::{POOL, buffer_like, dense, from_buffer, indices, is_f32, shape, values};
use burn::backend::{
    Flex,
    ops::ModuleOps,
    tensor::{FloatTensor, IntTensor},
};
use ternary_kernels::nn;

impl EmbeddingOps for Flex {
    fn embed_backward(
        table: FloatTensor<Self>,
        ids: IntTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        if !is_f32(&[&grad]) {
            return Flex::embedding_backward(table, grad, ids);
        }
        let grad = dense(grad);
        let [_, d] = shape(&table).dims();
        let mut out = buffer_like(&table);
        nn::embedding_backward(&POOL, &indices(ids), values(&grad), d, &mut out);
        from_buffer(out, shape(&table))
    }
}
