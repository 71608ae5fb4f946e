//! The activation functions on flex: one pass over memory each.

use super::{ActivationOps, reference};
use crate::ops::flex::{POOL, buffer_like, dense, from_buffer, is_f32, shape, values};
use burn::backend::{Flex, tensor::FloatTensor};
use ternary_kernels::nn;

impl ActivationOps for Flex {
    fn gelu_tanh(input: FloatTensor<Self>) -> FloatTensor<Self> {
        if !is_f32(&[&input]) {
            return reference::gelu_tanh::<Flex>(input);
        }
        let input = dense(input);
        let mut out = buffer_like(&input);
        nn::gelu(&POOL, values(&input), &mut out);
        from_buffer(out, shape(&input))
    }

    fn gelu_tanh_backward(input: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        if !is_f32(&[&input, &grad]) {
            return reference::gelu_tanh_backward::<Flex>(input, grad);
        }
        let (input, grad) = (dense(input), dense(grad));
        let mut dx = buffer_like(&input);
        nn::gelu_backward(&POOL, values(&input), values(&grad), &mut dx);
        from_buffer(dx, shape(&input))
    }

    fn silu_mul(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        if !is_f32(&[&gate, &up]) {
            return reference::silu_mul::<Flex>(gate, up);
        }
        let (gate, up) = (dense(gate), dense(up));
        let mut out = buffer_like(&gate);
        nn::silu_mul(&POOL, values(&gate), values(&up), &mut out);
        from_buffer(out, shape(&gate))
    }

    fn silu_mul_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if !is_f32(&[&gate, &up, &grad]) {
            return reference::silu_mul_backward::<Flex>(gate, up, grad);
        }
        let (gate, up, grad) = (dense(gate), dense(up), dense(grad));
        let (mut dgate, mut dup) = (buffer_like(&gate), buffer_like(&up));
        nn::silu_mul_backward(&POOL, values(&gate), values(&up), values(&grad), &mut dgate, &mut dup);
        (from_buffer(dgate, shape(&gate)), from_buffer(dup, shape(&up)))
    }
}
