//! The products of linear layers on flex: float ones by our kernels, ternary ones in int8.

use super::{
    FactorPrecision, LinearOps, SavedFactors, TernaryLinearForward, WeightGradientPrecision, reference,
};
use crate::ops::flex::{POOL, bytes_from_buffer, dense, from_buffer, from_vec, is_f32, shape, values};
use burn::backend::{Flex, ops::FloatTensorOps, tensor::FloatTensor};
use burn::tensor::Shape;
use burn_flex::FlexTensor;
use std::sync::{LazyLock, Mutex, PoisonError};
use ternary_kernels::{self as kernels, TensorBuffer, nn};

/// Workspace of the bfloat16 products, shared by all of them.
static BF16_WORKSPACE: LazyLock<Mutex<kernels::Bf16Workspace>> = LazyLock::new(Default::default);

/// Workspace of the int8 linear layers, shared by all of them.
static INT8_LINEAR: LazyLock<Mutex<nn::TernaryLinear>> = LazyLock::new(Default::default);

impl LinearOps for Flex {
    fn float_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        precision: FactorPrecision,
    ) -> FloatTensor<Self> {
        if !is_f32(&[&input, &weight, &bias]) {
            return reference::float_linear::<Flex>(input, weight, bias);
        }
        let (input, weight, bias) = (dense(input), dense(weight), dense(bias));
        let ([tokens, _], [_, d_output]) = (shape(&input).dims::<2>(), shape(&weight).dims::<2>());
        product(precision, [view(&input), view(&weight)], Some(values(&bias)), [tokens, d_output])
    }

    fn float_product(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        precision: FactorPrecision,
    ) -> FloatTensor<Self> {
        if !is_f32(&[&input, &weight]) {
            return Flex::float_matmul(input, weight);
        }
        let (input, weight) = (dense(input), dense(weight));
        let ([tokens, _], [_, d_output]) = (shape(&input).dims::<2>(), shape(&weight).dims::<2>());
        product(precision, [view(&input), view(&weight)], None, [tokens, d_output])
    }

    fn float_product_backward(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        precision: FactorPrecision,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if !is_f32(&[&input, &weight, &grad]) {
            return reference::product_backward::<Flex>(input, weight, grad);
        }
        let (input, weight, grad) = (dense(input), dense(weight), dense(grad));
        let ([tokens, d_input], [_, d_output]) = (shape(&input).dims(), shape(&weight).dims());
        (
            product(precision, [view(&grad), view(&weight).transposed()], None, [tokens, d_input]),
            product(precision, [view(&input).transposed(), view(&grad)], None, [d_input, d_output]),
        )
    }

    fn float_product_transposed(
        input: FloatTensor<Self>,
        table: FloatTensor<Self>,
        precision: FactorPrecision,
    ) -> FloatTensor<Self> {
        if !is_f32(&[&input, &table]) {
            return reference::product_transposed::<Flex>(input, table);
        }
        let (input, table) = (dense(input), dense(table));
        let ([tokens, _], [vocab, _]) = (shape(&input).dims::<2>(), shape(&table).dims::<2>());
        product(precision, [view(&input), view(&table).transposed()], None, [tokens, vocab])
    }

    fn float_product_transposed_backward(
        input: FloatTensor<Self>,
        table: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        precision: FactorPrecision,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if !is_f32(&[&input, &table, &grad]) {
            return reference::product_transposed_backward::<Flex>(input, table, grad);
        }
        let (input, table, grad) = (dense(input), dense(table), dense(grad));
        let ([tokens, d], [vocab, _]) = (shape(&input).dims(), shape(&table).dims());
        (
            product(precision, [view(&grad), view(&table)], None, [tokens, d]),
            product(precision, [view(&grad).transposed(), view(&input)], None, [vocab, d]),
        )
    }

    fn bias_gradient(grad: FloatTensor<Self>) -> FloatTensor<Self> {
        if !is_f32(&[&grad]) {
            return reference::bias_gradient::<Flex>(grad);
        }
        let grad = dense(grad);
        let [_, d_output] = shape(&grad).dims();
        from_vec(nn::column_sums(&POOL, values(&grad), d_output), Shape::new([d_output]))
    }

    fn ternary_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        _precision: WeightGradientPrecision,
    ) -> TernaryLinearForward<Self> {
        assert!(is_f32(&[&weight]), "int8 products need f32 tensors");
        let weight = dense(weight);
        let [_, d_output] = shape(&weight).dims();
        int8_linear(input, nn::LinearWeight::Ternary(values(&weight)), d_output, bias)
    }

    fn latent_linear(
        input: FloatTensor<Self>,
        latent: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        threshold: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        _precision: WeightGradientPrecision,
    ) -> TernaryLinearForward<Self> {
        assert!(is_f32(&[&latent, &scale, &threshold]), "int8 products need f32 tensors");
        let latent = dense(latent);
        let [_, d_output] = shape(&latent).dims();
        let [scales, thresholds] = [scale, threshold].map(|shared| match values(&dense(shared)) {
            [one] => vec![*one; d_output],
            channels => channels.to_vec(),
        });
        let weight = values(&latent);
        let weight = nn::LinearWeight::Latent { weight, scales: &scales, thresholds: &thresholds };
        int8_linear(input, weight, d_output, bias)
    }

    fn ternary_linear_backward(
        saved: SavedFactors<Self>,
        grad: FloatTensor<Self>,
        precision: WeightGradientPrecision,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let grad = dense(grad);
        let [tokens, d_output] = shape(&grad).dims();
        let (input_scales, input) = unpack(&saved.input, tokens);
        let (weight_scales, weight_codes) = unpack(&saved.weight, d_output);
        let d_input = weight_codes.len() / d_output;
        let tensors = nn::SavedTensors {
            input,
            input_scales: &input_scales,
            weight: weight_codes,
            weight_scales: &weight_scales,
        };
        if precision == WeightGradientPrecision::Bf16 {
            let mut input = TensorBuffer::new(tokens * d_input);
            tensors.activations(&POOL, &mut input);
            let left = kernels::MatrixView::new(&input, tokens, d_input).transposed();
            let dweight = product(FactorPrecision::Bf16, [left, view(&grad)], None, [d_input, d_output]);
            let dx = Self::ternary_linear_input_backward(saved.weight, grad.clone());
            return (dx, dweight, Self::bias_gradient(grad));
        }
        let (mut dx, mut dweight) =
            (TensorBuffer::new(tokens * d_input), TensorBuffer::new(d_input * d_output));
        let mut layer = INT8_LINEAR.lock().unwrap_or_else(PoisonError::into_inner);
        let dbias = layer.backward(&POOL, tensors, values(&grad), &mut dx, &mut dweight);
        (
            from_buffer(dx, Shape::new([tokens, d_input])),
            from_buffer(dweight, Shape::new([d_input, d_output])),
            from_vec(dbias, Shape::new([d_output])),
        )
    }

    fn ternary_linear_input_backward(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let grad = dense(grad);
        let [tokens, d_output] = shape(&grad).dims();
        let (scales, weight) = unpack(&weight, d_output);
        let d_input = weight.len() / d_output;
        let mut dx = TensorBuffer::new(tokens * d_input);
        let mut layer = INT8_LINEAR.lock().unwrap_or_else(PoisonError::into_inner);
        layer.input_backward(&POOL, weight, &scales, values(&grad), &mut dx);
        from_buffer(dx, Shape::new([tokens, d_input]))
    }
}

/// A dense matrix.
fn view(tensor: &FlexTensor) -> kernels::MatrixView<'_> {
    let [rows, cols] = tensor.layout().shape().dims();
    kernels::MatrixView::new(values(tensor), rows, cols)
}

fn product(
    precision: FactorPrecision,
    [left, right]: [kernels::MatrixView; 2],
    bias: Option<&[f32]>,
    [m, n]: [usize; 2],
) -> FlexTensor {
    let mut out = TensorBuffer::new(m * n);
    match precision {
        FactorPrecision::F32 => kernels::matmul_f32(&POOL, left, right, bias, &mut out),
        FactorPrecision::Bf16 => {
            let mut workspace = BF16_WORKSPACE.lock().unwrap_or_else(PoisonError::into_inner);
            kernels::matmul_bf16(&POOL, &mut workspace, left, right, bias, &mut out);
        }
    }
    from_buffer(out, Shape::new([m, n]))
}

/// The int8 forward product; saves the codes and scales of both factors.
fn int8_linear(
    input: FlexTensor,
    weight: nn::LinearWeight,
    d_output: usize,
    bias: FlexTensor,
) -> TernaryLinearForward<Flex> {
    assert!(is_f32(&[&input, &bias]), "int8 products need f32 tensors");
    let (input, bias) = (dense(input), dense(bias));
    let [tokens, d_input] = shape(&input).dims();
    let mut out = TensorBuffer::new(tokens * d_output);
    let (input_len, weight_len) = (nn::SavedTensors::input_len(tokens, d_input), d_input * d_output);
    let (mut saved_input, mut saved_weight) =
        (packed_buffer(tokens, input_len), packed_buffer(d_output, weight_len));
    let (input_scales, input_codes) = parts(&mut saved_input, tokens, input_len);
    let (weight_scales, weight_codes) = parts(&mut saved_weight, d_output, weight_len);
    let saved = nn::SavedTensorsMut { input: input_codes, input_scales, weight: weight_codes, weight_scales };
    let mut layer = INT8_LINEAR.lock().unwrap_or_else(PoisonError::into_inner);
    layer.forward(&POOL, values(&input), weight, Some(values(&bias)), &mut out, saved);
    TernaryLinearForward {
        output: from_buffer(out, Shape::new([tokens, d_output])),
        saved: SavedFactors {
            input: bytes_from_buffer(saved_input, 4 * tokens + input_len),
            weight: bytes_from_buffer(saved_weight, 4 * d_output + weight_len),
        },
    }
}

/// A buffer for [`SavedFactors`]: scales in f32, followed by int8 codes.
fn packed_buffer(scales: usize, codes: usize) -> TensorBuffer {
    TensorBuffer::new(scales + codes.div_ceil(4))
}

/// Scales and codes of a packed buffer.
fn parts(buffer: &mut TensorBuffer, scales: usize, codes: usize) -> (&mut [f32], &mut [i8]) {
    let (scales, rest) = buffer.split_at_mut(scales);
    (scales, &mut bytemuck::cast_slice_mut(rest)[..codes])
}

/// Scales (this many) and codes of a saved factor.
fn unpack(tensor: &FlexTensor, scales: usize) -> (Vec<f32>, &[i8]) {
    let (scales, codes) = tensor.storage::<i8>().split_at(4 * scales);
    (bytemuck::pod_collect_to_vec(scales), codes)
}
