//! Causal attention in float ops: the default body, and the oracle of faster ones. It materializes the score matrix.

use super::{Attended, Heads, SavedAttention};
use burn::backend::{
    Backend, TensorMetadata,
    tensor::{BoolTensor, FloatTensor},
};
use burn::tensor::Shape;

/// `[batch, seq, heads * width]` to `[batch, heads, seq, width]`.
fn split<B: Backend>(tensor: FloatTensor<B>, heads: usize) -> FloatTensor<B> {
    let [batch, seq, width] = tensor.shape().dims();
    B::float_swap_dims(B::float_reshape(tensor, Shape::new([batch, seq, heads, width / heads])), 1, 2)
}

/// The inverse of [`split`].
fn join<B: Backend>(tensor: FloatTensor<B>) -> FloatTensor<B> {
    let [batch, heads, seq, width] = tensor.shape().dims();
    B::float_reshape(B::float_swap_dims(tensor, 1, 2), Shape::new([batch, seq, heads * width]))
}

/// Key or value heads, each repeated for the query heads that share it.
fn repeat<B: Backend>(tensor: FloatTensor<B>, heads: Heads) -> FloatTensor<B> {
    let share = heads.queries / heads.keys;
    if share == 1 {
        return tensor;
    }
    let [batch, keys, seq, width] = tensor.shape().dims();
    let tensor = B::float_reshape(tensor, Shape::new([batch, keys, 1, seq, width]));
    let tensor = B::float_expand(tensor, Shape::new([batch, keys, share, seq, width]));
    B::float_reshape(tensor, Shape::new([batch, heads.queries, seq, width]))
}

/// The sum over the query heads that share a key-value head.
fn collect<B: Backend>(tensor: FloatTensor<B>, heads: Heads) -> FloatTensor<B> {
    let share = heads.queries / heads.keys;
    if share == 1 {
        return tensor;
    }
    let [batch, _, seq, width] = tensor.shape().dims();
    let tensor = B::float_reshape(tensor, Shape::new([batch, heads.keys, share, seq, width]));
    B::float_reshape(B::float_sum_dim(tensor, 2), Shape::new([batch, heads.keys, seq, width]))
}

fn scores<B: Backend>(query: FloatTensor<B>, key: FloatTensor<B>, future: BoolTensor<B>) -> FloatTensor<B> {
    let [batch, heads, seq, width] = query.shape().dims();
    let scale = (width as f32).sqrt().recip();
    let scores = B::float_mul_scalar(B::float_matmul(query, B::float_swap_dims(key, 2, 3)), scale.into());
    let future = B::bool_reshape(future, Shape::new([1, 1, seq, seq]));
    let future = B::bool_expand(future, Shape::new([batch, heads, seq, seq]));
    B::float_mask_fill(scores, future, f32::NEG_INFINITY.into())
}

pub(super) fn causal_attention<B: Backend>(
    query: FloatTensor<B>,
    key: FloatTensor<B>,
    value: FloatTensor<B>,
    future: BoolTensor<B>,
    heads: Heads,
) -> Attended<B> {
    let key = repeat::<B>(split::<B>(key, heads.keys), heads);
    let value = repeat::<B>(split::<B>(value, heads.keys), heads);
    let scores = scores::<B>(split::<B>(query, heads.queries), key, future);
    let max = B::float_max_dim(scores.clone(), 3);
    let powers = B::float_exp(B::float_sub(scores, max.clone()));
    let sum = B::float_sum_dim(powers.clone(), 3);
    let mixed = B::float_matmul(B::float_div(powers, sum.clone()), value);
    Attended { output: join::<B>(mixed), log_partition: B::float_add(B::float_log(sum), max) }
}

/// Gradients of query, key and value.
///
/// # Source
/// Dao et al., FlashAttention, appendix B.
pub(super) fn causal_attention_backward<B: Backend>(
    saved: SavedAttention<B>,
    grad: FloatTensor<B>,
    heads: Heads,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let query = split::<B>(saved.query, heads.queries);
    let key = repeat::<B>(split::<B>(saved.key, heads.keys), heads);
    let value = repeat::<B>(split::<B>(saved.value, heads.keys), heads);
    let (grad, output) = (split::<B>(grad, heads.queries), split::<B>(saved.output, heads.queries));
    let scale = (query.shape()[3] as f32).sqrt().recip();
    let scores = scores::<B>(query.clone(), key.clone(), saved.future);
    let shares = B::float_exp(B::float_sub(scores, saved.log_partition));
    let dvalue = B::float_matmul(B::float_swap_dims(shares.clone(), 2, 3), grad.clone());
    let along = B::float_sum_dim(B::float_mul(grad.clone(), output), 3);
    let dshares = B::float_sub(B::float_matmul(grad, B::float_swap_dims(value, 2, 3)), along);
    let dscores = B::float_mul_scalar(B::float_mul(shares, dshares), scale.into());
    let dquery = B::float_matmul(dscores.clone(), key);
    let dkey = B::float_matmul(B::float_swap_dims(dscores, 2, 3), query);
    (join::<B>(dquery), join::<B>(collect::<B>(dkey, heads)), join::<B>(collect::<B>(dvalue, heads)))
}
