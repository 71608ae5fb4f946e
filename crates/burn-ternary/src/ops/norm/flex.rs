//! The norms on flex: one pass over memory each.

use super::{NormOps, reference};
use crate::ops::flex::{POOL, buffer_like, dense, from_buffer, from_vec, is_f32, shape, values};
use burn::backend::{Flex, tensor::FloatTensor};
use ternary_kernels::nn;

impl NormOps for Flex {
    fn layer_norm_rows(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        epsilon: f32,
    ) -> FloatTensor<Self> {
        if !is_f32(&[&input, &weight, &bias]) {
            return reference::layer_norm::<Flex>(input, weight, bias, epsilon);
        }
        let (input, weight, bias) = (dense(input), dense(weight), dense(bias));
        let mut out = buffer_like(&input);
        let norm = nn::Norm { weight: values(&weight), bias: Some(values(&bias)), epsilon };
        nn::norm(&POOL, values(&input), norm, &mut out);
        from_buffer(out, shape(&input))
    }

    fn layer_norm_rows_backward(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        epsilon: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        if !is_f32(&[&input, &weight, &grad]) {
            return reference::layer_norm_backward::<Flex>(input, weight, grad, epsilon);
        }
        let (input, weight, grad) = (dense(input), dense(weight), dense(grad));
        let mut dx = buffer_like(&input);
        // The gradients depend on whether there is a bias, not on its values.
        let norm = nn::Norm { weight: values(&weight), bias: Some(values(&weight)), epsilon };
        let (dweight, dbias) = nn::norm_backward(&POOL, values(&input), norm, values(&grad), &mut dx);
        let dbias = dbias.expect("a norm with a bias has its gradient");
        (from_buffer(dx, shape(&input)), from_vec(dweight, shape(&weight)), from_vec(dbias, shape(&weight)))
    }

    fn rms_norm_rows(input: FloatTensor<Self>, weight: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self> {
        if !is_f32(&[&input, &weight]) {
            return reference::rms_norm::<Flex>(input, weight, epsilon);
        }
        let (input, weight) = (dense(input), dense(weight));
        let mut out = buffer_like(&input);
        let norm = nn::Norm { weight: values(&weight), bias: None, epsilon };
        nn::norm(&POOL, values(&input), norm, &mut out);
        from_buffer(out, shape(&input))
    }

    fn rms_norm_rows_backward(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        epsilon: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if !is_f32(&[&input, &weight, &grad]) {
            return reference::rms_norm_backward::<Flex>(input, weight, grad, epsilon);
        }
        let (input, weight, grad) = (dense(input), dense(weight), dense(grad));
        let mut dx = buffer_like(&input);
        let norm = nn::Norm { weight: values(&weight), bias: None, epsilon };
        let (dweight, _) = nn::norm_backward(&POOL, values(&input), norm, values(&grad), &mut dx);
        (from_buffer(dx, shape(&input)), from_vec(dweight, shape(&weight)))
    }
}
