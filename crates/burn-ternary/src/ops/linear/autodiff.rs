//! Gradients of linear layers. A frozen factor costs no product: its gradient is not computed.

use super::{FactorPrecision, LinearOps, SavedFactors, TernaryLinearForward, WeightGradientPrecision};
use crate::ops::autodiff::{Gradient, Tracked, track};
use burn::backend::{
    Autodiff, AutodiffBackend, autodiff::checkpoint::strategy::CheckpointStrategy, tensor::FloatTensor,
};

impl<B: LinearOps, C: CheckpointStrategy> LinearOps for Autodiff<B, C> {
    fn float_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        precision: FactorPrecision,
    ) -> FloatTensor<Self> {
        track::<B, C, 3>([input, weight, bias], |[input, weight, bias]| {
            let output = B::float_linear(input.clone(), weight.clone(), bias, precision);
            let gradient = Gradient::of_required(move |grad: FloatTensor<B>, [_, weight_too, bias_too]| {
                let dbias = bias_too.then(|| B::bias_gradient(grad.clone()));
                let (dinput, dweight) =
                    product_gradients::<B>([&input, &weight], grad, weight_too, precision);
                [Some(dinput), dweight, dbias]
            });
            (output, gradient)
        })
    }

    fn float_product(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        precision: FactorPrecision,
    ) -> FloatTensor<Self> {
        track::<B, C, 2>([input, weight], |[input, weight]| {
            let output = B::float_product(input.clone(), weight.clone(), precision);
            let gradient = Gradient::of_required(move |grad, [_, weight_too]| {
                let (dinput, dweight) =
                    product_gradients::<B>([&input, &weight], grad, weight_too, precision);
                [Some(dinput), dweight]
            });
            (output, gradient)
        })
    }

    fn float_product_transposed(
        input: FloatTensor<Self>,
        table: FloatTensor<Self>,
        precision: FactorPrecision,
    ) -> FloatTensor<Self> {
        track::<B, C, 2>([input, table], |[input, table]| {
            let output = B::float_product_transposed(input.clone(), table.clone(), precision);
            let gradient = Gradient::of_required(move |grad, [_, table_too]| {
                if !table_too {
                    return [Some(B::float_product(grad, table.clone(), precision)), None];
                }
                let (input, table) = (input.clone(), table.clone());
                let (dinput, dtable) = B::float_product_transposed_backward(input, table, grad, precision);
                [Some(dinput), Some(dtable)]
            });
            (output, gradient)
        })
    }

    fn ternary_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        precision: WeightGradientPrecision,
    ) -> TernaryLinearForward<Self> {
        track_ternary::<B, C>([input, weight, bias], precision, |[input, weight, bias]| {
            B::ternary_linear(input, weight, bias, precision)
        })
    }

    fn latent_linear(
        input: FloatTensor<Self>,
        latent: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        threshold: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        precision: WeightGradientPrecision,
    ) -> TernaryLinearForward<Self> {
        let (scale, threshold) = (Self::inner(scale), Self::inner(threshold));
        track_ternary::<B, C>([input, latent, bias], precision, |[input, latent, bias]| {
            B::latent_linear(input, latent, scale, threshold, bias, precision)
        })
    }
}

/// Gradients of input and weight; a frozen weight needs one of the two products only.
fn product_gradients<B: LinearOps>(
    [input, weight]: [&FloatTensor<B>; 2],
    grad: FloatTensor<B>,
    weight_too: bool,
    precision: FactorPrecision,
) -> (FloatTensor<B>, Option<FloatTensor<B>>) {
    if !weight_too {
        return (B::float_product_transposed(grad, weight.clone(), precision), None);
    }
    let (dinput, dweight) = B::float_product_backward(input.clone(), weight.clone(), grad, precision);
    (dinput, Some(dweight))
}

/// Straight-through: the gradient of the latent weight is that of the ternary one.
fn track_ternary<B: LinearOps, C: CheckpointStrategy>(
    inputs: [Tracked<B, C>; 3],
    precision: WeightGradientPrecision,
    forward: impl FnOnce([FloatTensor<B>; 3]) -> TernaryLinearForward<B>,
) -> TernaryLinearForward<Autodiff<B, C>> {
    let mut factors = None;
    let output = track::<B, C, 3>(inputs, |inputs| {
        let TernaryLinearForward { output, saved: SavedFactors { input, weight } } = forward(inputs);
        factors = Some((input.clone(), weight.clone()));
        let gradient = Gradient::of_required(move |grad, [_, weight_too, bias_too]| {
            if !(weight_too || bias_too) {
                return [Some(B::ternary_linear_input_backward(weight.clone(), grad)), None, None];
            }
            let saved = SavedFactors { input: input.clone(), weight: weight.clone() };
            let (dinput, dweight, dbias) = B::ternary_linear_backward(saved, grad, precision);
            [Some(dinput), Some(dweight), Some(dbias)]
        });
        (output, gradient)
    });
    let (input, weight) = factors.expect("the forward pass ran");
    let [input, weight] = [input, weight].map(<Autodiff<B, C> as AutodiffBackend>::from_inner);
    TernaryLinearForward { output, saved: SavedFactors { input, weight } }
}
