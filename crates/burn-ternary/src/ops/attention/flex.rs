//! Causal attention on flex, which never materializes the score matrix.

use super::{Attended, AttentionOps, Heads, SavedAttention, reference};
use crate::ops::flex::{POOL, buffer_like, dense, from_buffer, from_vec, is_f32, shape, values};
use burn::backend::{
    Flex,
    tensor::{BoolTensor, FloatTensor},
};
use burn::tensor::Shape;
use burn_flex::FlexTensor;
use ternary_kernels::nn;

impl AttentionOps for Flex {
    /// The kernels are causal without the mask.
    fn causal_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        future: BoolTensor<Self>,
        heads: Heads,
    ) -> Attended<Self> {
        if !is_f32(&[&query, &key, &value]) {
            return reference::causal_attention::<Flex>(query, key, value, future, heads);
        }
        let of = attention_shape(&query, heads);
        let (query, key, value) = (dense(query), dense(key), dense(value));
        let mut out = buffer_like(&query);
        let mut log_partition = vec![0.0; of.rows()];
        let inputs = [values(&query), values(&key), values(&value)];
        nn::causal_attention(&POOL, of, inputs, &mut out, &mut log_partition);
        let rows = Shape::new([of.batch, of.heads, of.seq, 1]);
        Attended { output: from_buffer(out, shape(&query)), log_partition: from_vec(log_partition, rows) }
    }

    fn causal_attention_backward(
        saved: SavedAttention<Self>,
        grad: FloatTensor<Self>,
        heads: Heads,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        if !is_f32(&[&saved.query, &saved.key, &saved.value, &grad]) {
            return reference::causal_attention_backward::<Flex>(saved, grad, heads);
        }
        let of = attention_shape(&saved.query, heads);
        let (query, key, value) = (dense(saved.query), dense(saved.key), dense(saved.value));
        let (output, log_partition, grad) = (dense(saved.output), dense(saved.log_partition), dense(grad));
        let (mut dquery, mut dkey, mut dvalue) =
            (buffer_like(&query), buffer_like(&key), buffer_like(&value));
        nn::causal_attention_backward(
            &POOL,
            of,
            [values(&query), values(&key), values(&value)],
            values(&output),
            values(&log_partition),
            values(&grad),
            [&mut dquery, &mut dkey, &mut dvalue],
        );
        (
            from_buffer(dquery, shape(&query)),
            from_buffer(dkey, shape(&key)),
            from_buffer(dvalue, shape(&value)),
        )
    }
}

fn attention_shape(query: &FlexTensor, heads: Heads) -> nn::AttentionShape {
    let [batch, seq, width] = query.layout().shape().dims();
    nn::AttentionShape {
        batch,
        seq,
        heads: heads.queries,
        kv_heads: heads.keys,
        width: width / heads.queries,
    }
}
