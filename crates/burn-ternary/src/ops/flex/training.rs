//! The ops of a training step, by the kernels of `ternary-kernels`.

use super::{
    POOL, dense, is_f32,
    memory::{bytes, filled},
    tensor, values,
};
use crate::ops::{
    AdamWStep, Factors, GradientFactors, Heads, MuonStep, activation, attention, divergence, linear, loss,
    norm, optimizer,
};
use burn::backend::{
    Flex,
    ops::{FloatTensorOps, ModuleOps},
};
use burn::tensor::{DType, Shape};
use burn_flex::FlexTensor;
use std::sync::{LazyLock, Mutex, PoisonError};
use ternary_kernels::{self as kernels, TensorBuffer, nn, optim};

fn buffer_like(like: &FlexTensor) -> TensorBuffer {
    TensorBuffer::new(like.layout().num_elements())
}

fn shape(tensor: &FlexTensor) -> Shape {
    tensor.layout().shape().clone()
}

pub(super) fn norm(
    input: FlexTensor,
    weight: FlexTensor,
    bias: Option<FlexTensor>,
    epsilon: f32,
) -> FlexTensor {
    let fused = is_f32(&[&input, &weight]) && bias.as_ref().is_none_or(|bias| is_f32(&[bias]));
    if !fused {
        return match bias {
            Some(bias) => norm::layer::<Flex>(input, weight, bias, epsilon),
            None => norm::rms::<Flex>(input, weight, epsilon),
        };
    }
    let (input, weight, bias) = (dense(input), dense(weight), bias.map(dense));
    let mut out = buffer_like(&input);
    let norm = nn::Norm { weight: values(&weight), bias: bias.as_ref().map(values), epsilon };
    nn::norm(&POOL, values(&input), norm, &mut out);
    filled(out, shape(&input))
}

pub(super) fn layer_norm_backward(
    input: FlexTensor,
    weight: FlexTensor,
    grad: FlexTensor,
    epsilon: f32,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    if !is_f32(&[&input, &weight, &grad]) {
        return norm::layer_backward::<Flex>(input, weight, grad, epsilon);
    }
    let (input, weight, grad) = (dense(input), dense(weight), dense(grad));
    let mut dx = buffer_like(&input);
    // Which bias it is does not matter to gradients; that there is one does.
    let norm = nn::Norm { weight: values(&weight), bias: Some(values(&weight)), epsilon };
    let (dweight, dbias) = nn::norm_backward(&POOL, values(&input), norm, values(&grad), &mut dx);
    let dbias = dbias.expect("a norm with a bias has its gradient");
    (filled(dx, shape(&input)), tensor(dweight, shape(&weight)), tensor(dbias, shape(&weight)))
}

pub(super) fn rms_norm_backward(
    input: FlexTensor,
    weight: FlexTensor,
    grad: FlexTensor,
    epsilon: f32,
) -> (FlexTensor, FlexTensor) {
    if !is_f32(&[&input, &weight, &grad]) {
        return norm::rms_backward::<Flex>(input, weight, grad, epsilon);
    }
    let (input, weight, grad) = (dense(input), dense(weight), dense(grad));
    let mut dx = buffer_like(&input);
    let norm = nn::Norm { weight: values(&weight), bias: None, epsilon };
    let (dweight, _) = nn::norm_backward(&POOL, values(&input), norm, values(&grad), &mut dx);
    (filled(dx, shape(&input)), tensor(dweight, shape(&weight)))
}

pub(super) fn gelu(input: FlexTensor) -> FlexTensor {
    if !is_f32(&[&input]) {
        return activation::gelu_tanh::<Flex>(input);
    }
    let input = dense(input);
    let mut out = buffer_like(&input);
    nn::gelu(&POOL, values(&input), &mut out);
    filled(out, shape(&input))
}

pub(super) fn gelu_backward(input: FlexTensor, grad: FlexTensor) -> FlexTensor {
    if !is_f32(&[&input, &grad]) {
        return activation::gelu_tanh_backward::<Flex>(input, grad);
    }
    let (input, grad) = (dense(input), dense(grad));
    let mut dx = buffer_like(&input);
    nn::gelu_backward(&POOL, values(&input), values(&grad), &mut dx);
    filled(dx, shape(&input))
}

pub(super) fn silu_mul(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
    if !is_f32(&[&gate, &up]) {
        return activation::silu_mul_default::<Flex>(gate, up);
    }
    let (gate, up) = (dense(gate), dense(up));
    let mut out = buffer_like(&gate);
    nn::silu_mul(&POOL, values(&gate), values(&up), &mut out);
    filled(out, shape(&gate))
}

pub(super) fn silu_mul_backward(
    gate: FlexTensor,
    up: FlexTensor,
    grad: FlexTensor,
) -> (FlexTensor, FlexTensor) {
    if !is_f32(&[&gate, &up, &grad]) {
        return activation::silu_mul_backward::<Flex>(gate, up, grad);
    }
    let (gate, up, grad) = (dense(gate), dense(up), dense(grad));
    let (mut dgate, mut dup) = (buffer_like(&gate), buffer_like(&up));
    nn::silu_mul_backward(&POOL, values(&gate), values(&up), values(&grad), &mut dgate, &mut dup);
    (filled(dgate, shape(&gate)), filled(dup, shape(&up)))
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

/// The kernels know what the future is without the mask.
pub(super) fn causal_attention(
    query: FlexTensor,
    key: FlexTensor,
    value: FlexTensor,
    future: FlexTensor,
    heads: Heads,
) -> (FlexTensor, FlexTensor) {
    if !is_f32(&[&query, &key, &value]) {
        return attention::forward::<Flex>(query, key, value, future, heads);
    }
    let of = attention_shape(&query, heads);
    let (query, key, value) = (dense(query), dense(key), dense(value));
    let mut out = buffer_like(&query);
    let mut log_partition = vec![0.0; of.rows()];
    let inputs = [values(&query), values(&key), values(&value)];
    nn::causal_attention(&POOL, of, inputs, &mut out, &mut log_partition);
    let rows = Shape::new([of.batch, of.heads, of.seq, 1]);
    (filled(out, shape(&query)), tensor(log_partition, rows))
}

pub(super) fn causal_attention_backward(
    saved: attention::Saved<Flex>,
    grad: FlexTensor,
    heads: Heads,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    if !is_f32(&[&saved.query, &saved.key, &saved.value, &grad]) {
        return attention::backward::<Flex>(saved, grad, heads);
    }
    let of = attention_shape(&saved.query, heads);
    let (query, key, value) = (dense(saved.query), dense(saved.key), dense(saved.value));
    let (output, log_partition, grad) = (dense(saved.output), dense(saved.log_partition), dense(grad));
    let (mut dquery, mut dkey, mut dvalue) = (buffer_like(&query), buffer_like(&key), buffer_like(&value));
    nn::causal_attention_backward(
        &POOL,
        of,
        [values(&query), values(&key), values(&value)],
        values(&output),
        values(&log_partition),
        values(&grad),
        [&mut dquery, &mut dkey, &mut dvalue],
    );
    (filled(dquery, shape(&query)), filled(dkey, shape(&key)), filled(dvalue, shape(&value)))
}

/// Token ids, of whichever integer type.
fn indices(ids: FlexTensor) -> Vec<usize> {
    let ids = dense(ids);
    let part = ids.layout().start_offset()..;
    let count = ids.layout().num_elements();
    match ids.dtype() {
        DType::I64 => ids.storage::<i64>()[part].iter().take(count).map(|id| *id as usize).collect(),
        DType::I32 => ids.storage::<i32>()[part].iter().take(count).map(|id| *id as usize).collect(),
        dtype => panic!("token ids are i32 or i64, not {dtype:?}"),
    }
}

pub(super) fn embed_backward(table: FlexTensor, ids: FlexTensor, grad: FlexTensor) -> FlexTensor {
    if !is_f32(&[&grad]) {
        return Flex::embedding_backward(table, grad, ids);
    }
    let grad = dense(grad);
    let [_, d] = shape(&table).dims();
    let mut out = buffer_like(&table);
    nn::embedding_backward(&POOL, &indices(ids), values(&grad), d, &mut out);
    filled(out, shape(&table))
}

pub(super) fn log_likelihood(logits: FlexTensor, targets: FlexTensor) -> FlexTensor {
    if !is_f32(&[&logits]) {
        return loss::forward::<Flex>(logits, targets);
    }
    let logits = dense(logits);
    let [rows, vocab] = logits.layout().shape().dims();
    let mut out = vec![[0.0; 3]; rows];
    nn::cross_entropy(&POOL, values(&logits), vocab, &indices(targets), &mut out);
    tensor(out.into_flattened(), Shape::new([rows, 3]))
}

pub(super) fn log_likelihood_backward(
    logits: FlexTensor,
    targets: FlexTensor,
    output: FlexTensor,
    grad: FlexTensor,
) -> FlexTensor {
    if !is_f32(&[&logits, &output, &grad]) {
        return loss::backward::<Flex>(logits, targets, output, grad);
    }
    let (logits, output, grad) = (dense(logits), dense(output), dense(grad));
    let [_, vocab] = logits.layout().shape().dims();
    let log_partition: Vec<f32> = values(&output).chunks(3).map(|row| row[0]).collect();
    let grads: Vec<[f32; 2]> = values(&grad).chunks(3).map(|row| [row[0], row[1]]).collect();
    let mut dlogits = buffer_like(&logits);
    nn::cross_entropy_backward(
        &POOL,
        values(&logits),
        vocab,
        &indices(targets),
        &log_partition,
        &grads,
        &mut dlogits,
    );
    filled(dlogits, shape(&logits))
}

pub(super) fn divergences(teacher: FlexTensor, student: FlexTensor, temperature: f32) -> FlexTensor {
    if !is_f32(&[&teacher, &student]) {
        return divergence::forward::<Flex>(teacher, student, temperature);
    }
    let (teacher, student) = (dense(teacher), dense(student));
    let [rows, vocab] = student.layout().shape().dims();
    let mut out = vec![[0.0; 4]; rows];
    nn::kl_divergence(&POOL, values(&teacher), values(&student), vocab, temperature, &mut out);
    tensor(out.into_flattened(), Shape::new([rows, 4]))
}

pub(super) fn divergences_backward(
    teacher: FlexTensor,
    student: FlexTensor,
    output: FlexTensor,
    grad: FlexTensor,
    temperature: f32,
) -> FlexTensor {
    if !is_f32(&[&teacher, &student, &output, &grad]) {
        return divergence::backward::<Flex>(teacher, student, output, grad, temperature);
    }
    let [teacher, student, output, grad] = [teacher, student, output, grad].map(dense);
    let [_, vocab] = student.layout().shape().dims();
    let (saved, _) = values(&output).as_chunks::<4>();
    let grads: Vec<[f32; 2]> = values(&grad).chunks(4).map(|row| [row[0], row[1]]).collect();
    let mut dstudent = buffer_like(&student);
    nn::kl_divergence_backward(
        &POOL,
        values(&teacher),
        values(&student),
        vocab,
        temperature,
        saved,
        &grads,
        &mut dstudent,
    );
    filled(dstudent, shape(&student))
}

/// A dense matrix.
fn view(tensor: &FlexTensor) -> kernels::MatrixView<'_> {
    let [rows, cols] = tensor.layout().shape().dims();
    kernels::MatrixView::new(values(tensor), rows, cols)
}

/// Workspace of the bfloat16 products, shared by all of them.
static HALVES: LazyLock<Mutex<kernels::Bf16Workspace>> = LazyLock::new(Default::default);

fn product(
    factors: Factors,
    [left, right]: [kernels::MatrixView; 2],
    bias: Option<&[f32]>,
    [m, n]: [usize; 2],
) -> FlexTensor {
    let mut out = TensorBuffer::new(m * n);
    match factors {
        Factors::Whole => kernels::matmul_f32(&POOL, left, right, bias, &mut out),
        Factors::Half => {
            let mut workspace = HALVES.lock().unwrap_or_else(PoisonError::into_inner);
            kernels::matmul_bf16(&POOL, &mut workspace, left, right, bias, &mut out);
        }
    }
    filled(out, Shape::new([m, n]))
}

pub(super) fn float_linear(
    input: FlexTensor,
    weight: FlexTensor,
    bias: FlexTensor,
    factors: Factors,
) -> FlexTensor {
    if !is_f32(&[&input, &weight, &bias]) {
        return linear::float_forward::<Flex>(input, weight, bias);
    }
    let (input, weight, bias) = (dense(input), dense(weight), dense(bias));
    let ([tokens, _], [_, d_output]) = (shape(&input).dims::<2>(), shape(&weight).dims::<2>());
    product(factors, [view(&input), view(&weight)], Some(values(&bias)), [tokens, d_output])
}

pub(super) fn float_product(input: FlexTensor, weight: FlexTensor, factors: Factors) -> FlexTensor {
    if !is_f32(&[&input, &weight]) {
        return Flex::float_matmul(input, weight);
    }
    let (input, weight) = (dense(input), dense(weight));
    let ([tokens, _], [_, d_output]) = (shape(&input).dims::<2>(), shape(&weight).dims::<2>());
    product(factors, [view(&input), view(&weight)], None, [tokens, d_output])
}

pub(super) fn float_product_backward(
    input: FlexTensor,
    weight: FlexTensor,
    grad: FlexTensor,
    factors: Factors,
) -> (FlexTensor, FlexTensor) {
    if !is_f32(&[&input, &weight, &grad]) {
        return linear::float_backward::<Flex>(input, weight, grad);
    }
    let (input, weight, grad) = (dense(input), dense(weight), dense(grad));
    let ([tokens, d_input], [_, d_output]) = (shape(&input).dims(), shape(&weight).dims());
    (
        product(factors, [view(&grad), view(&weight).transposed()], None, [tokens, d_input]),
        product(factors, [view(&input).transposed(), view(&grad)], None, [d_input, d_output]),
    )
}

pub(super) fn bias_gradient(grad: FlexTensor) -> FlexTensor {
    if !is_f32(&[&grad]) {
        return linear::bias_gradient::<Flex>(grad);
    }
    let grad = dense(grad);
    let [_, d_output] = shape(&grad).dims();
    tensor(nn::column_sums(&POOL, values(&grad), d_output), Shape::new([d_output]))
}

pub(super) fn project(hidden: FlexTensor, table: FlexTensor, factors: Factors) -> FlexTensor {
    if !is_f32(&[&hidden, &table]) {
        return linear::project_forward::<Flex>(hidden, table);
    }
    let (hidden, table) = (dense(hidden), dense(table));
    let ([tokens, _], [vocab, _]) = (shape(&hidden).dims::<2>(), shape(&table).dims::<2>());
    product(factors, [view(&hidden), view(&table).transposed()], None, [tokens, vocab])
}

pub(super) fn project_backward(
    hidden: FlexTensor,
    table: FlexTensor,
    grad: FlexTensor,
    factors: Factors,
) -> (FlexTensor, FlexTensor) {
    if !is_f32(&[&hidden, &table, &grad]) {
        return linear::project_backward::<Flex>(hidden, table, grad);
    }
    let (hidden, table, grad) = (dense(hidden), dense(table), dense(grad));
    let ([tokens, d], [vocab, _]) = (shape(&hidden).dims(), shape(&table).dims());
    (
        product(factors, [view(&grad), view(&table)], None, [tokens, d]),
        product(factors, [view(&grad).transposed(), view(&hidden)], None, [vocab, d]),
    )
}

/// Workspace of the int8 linear layers, shared by all of them.
static LINEAR: LazyLock<Mutex<nn::TernaryLinear>> = LazyLock::new(Default::default);

/// Scales and codes, as bytes: nothing but [`ternary_linear_backward`] looks into it.
fn sealed(buffer: TensorBuffer, scales: usize, codes: usize) -> FlexTensor {
    bytes(buffer, 4 * scales + codes)
}

/// A buffer for so many scales and codes, and its parts.
fn sealed_buffer(scales: usize, codes: usize) -> TensorBuffer {
    TensorBuffer::new(scales + codes.div_ceil(4))
}

fn parts(buffer: &mut TensorBuffer, scales: usize, codes: usize) -> (&mut [f32], &mut [i8]) {
    let (scales, rest) = buffer.split_at_mut(scales);
    (scales, &mut bytemuck::cast_slice_mut(rest)[..codes])
}

/// So many scales, and the codes.
fn unsealed(tensor: &FlexTensor, scales: usize) -> (Vec<f32>, &[i8]) {
    let (scales, codes) = tensor.storage::<i8>().split_at(4 * scales);
    (bytemuck::pod_collect_to_vec(scales), codes)
}

pub(super) fn ternary_linear(
    input: FlexTensor,
    weight: FlexTensor,
    bias: FlexTensor,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    assert!(is_f32(&[&weight]), "the int8 products have f32 factors");
    let weight = dense(weight);
    let [_, d_output] = shape(&weight).dims();
    ternary_linear_of(input, nn::LinearWeight::Ternary(values(&weight)), d_output, bias)
}

pub(super) fn latent_linear(
    input: FlexTensor,
    latent: FlexTensor,
    scale: FlexTensor,
    threshold: FlexTensor,
    bias: FlexTensor,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    assert!(is_f32(&[&latent, &scale, &threshold]), "the int8 products have f32 factors");
    let latent = dense(latent);
    let [_, d_output] = shape(&latent).dims();
    let [scales, thresholds] = [scale, threshold].map(|shared| match values(&dense(shared)) {
        [one] => vec![*one; d_output],
        channels => channels.to_vec(),
    });
    let weight = values(&latent);
    let weight = nn::LinearWeight::Latent { weight, scales: &scales, thresholds: &thresholds };
    ternary_linear_of(input, weight, d_output, bias)
}

fn ternary_linear_of(
    input: FlexTensor,
    weight: nn::LinearWeight,
    d_output: usize,
    bias: FlexTensor,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    assert!(is_f32(&[&input, &bias]), "the int8 products have f32 factors");
    let (input, bias) = (dense(input), dense(bias));
    let [tokens, d_input] = shape(&input).dims();
    let mut out = TensorBuffer::new(tokens * d_output);
    let (input_len, weight_len) = (nn::SavedTensors::input_len(tokens, d_input), d_input * d_output);
    let (mut kept_input, mut kept_weight) =
        (sealed_buffer(tokens, input_len), sealed_buffer(d_output, weight_len));
    let (input_scales, input_codes) = parts(&mut kept_input, tokens, input_len);
    let (weight_scales, weight_codes) = parts(&mut kept_weight, d_output, weight_len);
    let saved = nn::SavedTensorsMut { input: input_codes, input_scales, weight: weight_codes, weight_scales };
    let mut layer = LINEAR.lock().unwrap_or_else(PoisonError::into_inner);
    layer.forward(&POOL, values(&input), weight, Some(values(&bias)), &mut out, saved);
    (
        filled(out, Shape::new([tokens, d_output])),
        sealed(kept_input, tokens, input_len),
        sealed(kept_weight, d_output, weight_len),
    )
}

pub(super) fn ternary_linear_backward(
    input: FlexTensor,
    weight: FlexTensor,
    grad: FlexTensor,
    factors: GradientFactors,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let grad = dense(grad);
    let [tokens, d_output] = shape(&grad).dims();
    let (input_scales, input) = unsealed(&input, tokens);
    let (weight_scales, weight_codes) = unsealed(&weight, d_output);
    let d_input = weight_codes.len() / d_output;
    let saved = nn::SavedTensors {
        input,
        input_scales: &input_scales,
        weight: weight_codes,
        weight_scales: &weight_scales,
    };
    if factors == GradientFactors::Half {
        let mut input = TensorBuffer::new(tokens * d_input);
        saved.activations(&POOL, &mut input);
        let left = kernels::MatrixView::new(&input, tokens, d_input).transposed();
        let dweight = product(Factors::Half, [left, view(&grad)], None, [d_input, d_output]);
        return (ternary_linear_input_backward(weight, grad.clone()), dweight, bias_gradient(grad));
    }
    let (mut dx, mut dweight) = (TensorBuffer::new(tokens * d_input), TensorBuffer::new(d_input * d_output));
    let mut layer = LINEAR.lock().unwrap_or_else(PoisonError::into_inner);
    let dbias = layer.backward(&POOL, saved, values(&grad), &mut dx, &mut dweight);
    (
        filled(dx, Shape::new([tokens, d_input])),
        filled(dweight, Shape::new([d_input, d_output])),
        tensor(dbias, Shape::new([d_output])),
    )
}

pub(super) fn ternary_linear_input_backward(weight: FlexTensor, grad: FlexTensor) -> FlexTensor {
    let grad = dense(grad);
    let [tokens, d_output] = shape(&grad).dims();
    let (scales, weight) = unsealed(&weight, d_output);
    let d_input = weight.len() / d_output;
    let mut dx = TensorBuffer::new(tokens * d_input);
    let mut layer = LINEAR.lock().unwrap_or_else(PoisonError::into_inner);
    layer.input_backward(&POOL, weight, &scales, values(&grad), &mut dx);
    filled(dx, Shape::new([tokens, d_input]))
}

pub(super) fn adamw_step(
    weight: FlexTensor,
    grad: FlexTensor,
    m: FlexTensor,
    v: FlexTensor,
    step: AdamWStep,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    if !is_f32(&[&weight, &grad, &m, &v]) {
        return optimizer::adamw_step::<Flex>(weight, grad, m, v, step);
    }
    let grad = dense(grad);
    let [mut weight, mut m, mut v] = [weight, m, v].map(owned);
    let moments = (m.storage_mut(), v.storage_mut());
    optim::adamw(&POOL, numbers(step), weight.storage_mut(), values(&grad), moments.0, moments.1);
    (weight, m, v)
}

/// What the other backends and the moments' owner go by.
const _: () = {
    assert!(
        optim::MOMENT_BLOCK == optimizer::MOMENTS[0] && optim::MomentBlock::WORDS == optimizer::MOMENTS[1]
    );
    assert!(optim::NEWTON_SCHULZ_STEPS == optimizer::NEWTON_SCHULZ_STEPS);
    let [a, b, c] = optimizer::NEWTON_SCHULZ;
    assert!(optim::NEWTON_SCHULZ[0] == a && optim::NEWTON_SCHULZ[1] == b && optim::NEWTON_SCHULZ[2] == c);
};

pub(super) fn adamw_int8_step(
    weight: FlexTensor,
    grad: FlexTensor,
    moments: FlexTensor,
    step: AdamWStep,
) -> (FlexTensor, FlexTensor) {
    assert!(is_f32(&[&weight, &grad, &moments]), "parameters have f32");
    let grad = dense(grad);
    let [mut weight, mut moments] = [weight, moments].map(owned);
    let blocks = optim::MomentBlock::from_words(moments.storage_mut());
    optim::adamw_8bit(&POOL, numbers(step), weight.storage_mut(), values(&grad), blocks);
    (weight, moments)
}

pub(super) fn muon_step(
    weight: FlexTensor,
    grad: FlexTensor,
    velocity: FlexTensor,
    step: MuonStep,
) -> (FlexTensor, FlexTensor) {
    if !is_f32(&[&weight, &grad, &velocity]) {
        return optimizer::muon_step::<Flex>(weight, grad, velocity, step);
    }
    let MuonStep { rate, keep, momentum, grad_factor } = step;
    let step = optim::Muon { rate, keep, momentum, grad_factor };
    let [_, cols] = shape(&weight).dims();
    let grad = dense(grad);
    let [mut weight, mut velocity] = [weight, velocity].map(owned);
    optim::muon(&POOL, step, cols, weight.storage_mut(), values(&grad), velocity.storage_mut());
    (weight, velocity)
}

fn numbers(step: AdamWStep) -> optim::AdamW {
    let AdamWStep { lr, beta1, beta2, epsilon, keep, corrections, grad_factor } = step;
    optim::AdamW { lr, beta1, beta2, epsilon, keep, corrections, grad_factor }
}

/// The same numbers, and no others, in memory of the tensor's own: copied where somebody else holds them too.
fn owned(mut tensor: FlexTensor) -> FlexTensor {
    let whole = tensor.layout().start_offset() == 0
        && tensor.storage::<f32>().len() == tensor.layout().num_elements();
    if whole && tensor.is_contiguous() && tensor.try_storage_mut::<f32>().is_some() {
        return tensor;
    }
    let tensor = dense(tensor);
    let mut copy = buffer_like(&tensor);
    POOL.copy(values(&tensor), &mut copy);
    filled(copy, shape(&tensor))
}

pub(super) fn square_sum(input: FlexTensor) -> FlexTensor {
    if !is_f32(&[&input]) {
        return optimizer::square_sum_default::<Flex>(input);
    }
    let sum = optim::square_sum(&POOL, values(&dense(input)));
    tensor(vec![sum as f32], Shape::new([1]))
}
