//! Registers an op in the autodiff graph, with its backward pass as one function of the gradient.

use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, Backend, tensor::FloatTensor};
use std::{fmt, sync::Arc};

/// A tensor in the autodiff graph.
pub(super) type Tracked<B, C> = FloatTensor<Autodiff<B, C>>;

/// Computes the gradients of the `N` inputs from that of the output; a flag per input says whether it needs one.
pub(super) struct Gradient<B: Backend, const N: usize>(Arc<Backpropagate<B, N>>);

type Backpropagate<B, const N: usize> =
    dyn Fn(FloatTensor<B>, [bool; N]) -> [Option<FloatTensor<B>>; N] + Send + Sync;

impl<B: Backend, const N: usize> Gradient<B, N> {
    /// A gradient function that computes the gradients of all inputs.
    pub fn new(gradient: impl Fn(FloatTensor<B>) -> [FloatTensor<B>; N] + Send + Sync + 'static) -> Self {
        Self::of_required(move |grad, _| gradient(grad).map(Some))
    }

    /// A gradient function that skips the work for frozen inputs.
    pub fn of_required(
        gradient: impl Fn(FloatTensor<B>, [bool; N]) -> [Option<FloatTensor<B>>; N] + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(gradient))
    }
}

impl<B: Backend, const N: usize> Clone for Gradient<B, N> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: Backend, const N: usize> fmt::Debug for Gradient<B, N> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("Gradient")
    }
}

#[derive(Debug)]
struct Node<const N: usize>;

impl<B: Backend, const N: usize> Backward<B, N> for Node<N> {
    type State = Gradient<B, N>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let required = ops.parents.each_ref().map(Option::is_some);
        for (node, grad) in ops.parents.into_iter().zip((ops.state.0)(grad, required)) {
            if let (Some(node), Some(grad)) = (node, grad) {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

/// Runs `forward(inputs)`, which returns its output and the gradient function. Tensors captured by that function live until
/// the backward pass; if no input needs a gradient, they are dropped at once.
pub(super) fn track<B: Backend, C: CheckpointStrategy, const N: usize>(
    inputs: [Tracked<B, C>; N],
    forward: impl FnOnce([FloatTensor<B>; N]) -> (FloatTensor<B>, Gradient<B, N>),
) -> Tracked<B, C> {
    let mut nodes = Vec::with_capacity(N);
    let inputs = inputs.map(|input| {
        let (input, node) = input.into_parts();
        nodes.push(node);
        input
    });
    let nodes = nodes.try_into().unwrap_or_else(|_| unreachable!("one node per input"));
    match Node::<N>.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let (output, gradient) = forward(inputs);
            prep.finish(gradient, output)
        }
        OpsKind::UnTracked(prep) => prep.finish(forward(inputs).0),
    }
}

/// `forward(input)` with the plain straight-through estimator: the gradient passes unchanged.
pub(super) fn straight_through<B: Backend, C: CheckpointStrategy>(
    input: Tracked<B, C>,
    forward: impl FnOnce(FloatTensor<B>) -> FloatTensor<B>,
) -> Tracked<B, C> {
    track::<B, C, 1>([input], |[input]| (forward(input), Gradient::new(|grad| [grad])))
}
