//! Causal attention.

use super::{TernaryBackend, node};
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::{
    Autodiff, AutodiffBackend, Backend, Dispatch, TensorMetadata,
    tensor::{BoolTensor, FloatTensor},
};
use burn::tensor::{Bool, Shape, Tensor};

/// Number of query heads, and of key-value heads (grouped-query attention).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    pub queries: usize,
    /// A divisor of `queries`: query head `h` uses key-value head `h / (queries / keys)`.
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
    let (output, _) = Dispatch::causal_attention(
        query.into_dispatch(),
        key.into_dispatch(),
        value.into_dispatch(),
        future.into_dispatch(),
        heads,
    );
    Tensor::from_dispatch(output)
}

/// `[batch, seq, heads * width]` to `[batch, heads, seq, width]`.
fn split<B: Backend>(tensor: FloatTensor<B>, heads: usize) -> FloatTensor<B> {
    let [batch, seq, width] = tensor.shape().dims();
    B::float_swap_dims(B::float_reshape(tensor, Shape::new([batch, seq, heads, width / heads])), 1, 2)
}

/// The way back.
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

/// The output, and the log-sum-exp of the scores, `[batch, heads, seq, 1]`.
pub(super) fn forward<B: Backend>(
    query: FloatTensor<B>,
    key: FloatTensor<B>,
    value: FloatTensor<B>,
    future: BoolTensor<B>,
    heads: Heads,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let key = repeat::<B>(split::<B>(key, heads.keys), heads);
    let value = repeat::<B>(split::<B>(value, heads.keys), heads);
    let scores = scores::<B>(split::<B>(query, heads.queries), key, future);
    let max = B::float_max_dim(scores.clone(), 3);
    let powers = B::float_exp(B::float_sub(scores, max.clone()));
    let sum = B::float_sum_dim(powers.clone(), 3);
    let mixed = B::float_matmul(B::float_div(powers, sum.clone()), value);
    (join::<B>(mixed), B::float_add(B::float_log(sum), max))
}

/// Inputs and outputs of the forward pass.
pub(super) struct Saved<B: Backend> {
    pub query: FloatTensor<B>,
    pub key: FloatTensor<B>,
    pub value: FloatTensor<B>,
    pub future: BoolTensor<B>,
    pub output: FloatTensor<B>,
    pub log_partition: FloatTensor<B>,
}

/// Gradients of query, key and value.
///
/// # Source
/// Dao et al., FlashAttention, appendix B.
pub(super) fn backward<B: Backend>(
    saved: Saved<B>,
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

pub(super) fn track<B: TernaryBackend, C: CheckpointStrategy>(
    inputs: [FloatTensor<Autodiff<B, C>>; 3],
    future: BoolTensor<B>,
    heads: Heads,
) -> (node::Tracked<B, C>, node::Tracked<B, C>) {
    let mut partition = None;
    let output = node::track::<B, C, 3>(inputs, |[query, key, value]| {
        let (output, log_partition) =
            B::causal_attention(query.clone(), key.clone(), value.clone(), future.clone(), heads);
        partition = Some(log_partition.clone());
        let result = output.clone();
        let gradient = node::Gradient::new(move |grad| {
            B::causal_attention_backward(
                query.clone(),
                key.clone(),
                value.clone(),
                future.clone(),
                output.clone(),
                log_partition.clone(),
                grad,
                heads,
            )
            .into()
        });
        (result, gradient)
    });
    let partition = partition.expect("the forward pass was made");
    (output, <Autodiff<B, C> as AutodiffBackend>::from_inner(partition))
}
