//! The ops fused for the CPU backend Flex, in f32; other types take the default bodies, which are the oracle.

mod memory;
mod quantize;
mod training;

use super::{
    AdamWStep, Factors, GradientFactors, Heads, MuonStep, RowScale, StraightThrough, TernaryBackend,
};
use burn::backend::{
    Flex,
    tensor::{BoolTensor, FloatTensor, IntTensor},
};
use burn::tensor::{Bytes, DType, Shape};
use burn_flex::{FlexTensor, Layout};
use std::{
    io,
    sync::{LazyLock, OnceLock},
};
use ternary_kernels::Pool;

/// As many threads as rayon has, on which flex computes. They wait with the CPU busy for a while: a step is a thousand short runs, and
/// to wake a thread for each took a twentieth of it.
static POOL: LazyLock<&'static Pool> =
    LazyLock::new(|| STARTED.get_or_init(|| Pool::new(rayon::current_num_threads())));

static STARTED: OnceLock<Pool> = OnceLock::new();

/// Starts these threads, unless they have been, where a failure can still be told.
pub(crate) fn start_threads(threads: usize) -> io::Result<()> {
    if STARTED.get().is_none() {
        let pool = Pool::try_new(threads)?;
        // Another one may have come first; this one then ends.
        let _ = STARTED.set(pool);
    }
    Ok(())
}

impl TernaryBackend for Flex {
    fn ternary_codes(weight: FloatTensor<Self>, threshold: FloatTensor<Self>) -> FloatTensor<Self> {
        quantize::ternary_codes(weight, threshold)
    }

    fn ternary_quantize(
        weight: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        threshold: FloatTensor<Self>,
        _estimator: StraightThrough,
    ) -> FloatTensor<Self> {
        quantize::ternary_quantize(weight, scale, threshold)
    }

    fn mean_abs(weight: FloatTensor<Self>) -> FloatTensor<Self> {
        quantize::mean_abs(weight)
    }

    fn kth_magnitude(weight: FloatTensor<Self>, k: usize) -> FloatTensor<Self> {
        quantize::kth_magnitude(weight, k)
    }

    fn round_scale(input: FloatTensor<Self>) -> FloatTensor<Self> {
        quantize::round_scale(input)
    }

    fn absmax_quantize(input: FloatTensor<Self>, levels: f32, scale: RowScale) -> FloatTensor<Self> {
        quantize::absmax_quantize(input, levels, scale)
    }

    fn embed_backward(
        table: FloatTensor<Self>,
        ids: IntTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        training::embed_backward(table, ids, grad)
    }

    fn layer_norm_rows(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        epsilon: f32,
    ) -> FloatTensor<Self> {
        training::norm(input, weight, Some(bias), epsilon)
    }

    fn layer_norm_rows_backward(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        epsilon: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        training::layer_norm_backward(input, weight, grad, epsilon)
    }

    fn rms_norm_rows(input: FloatTensor<Self>, weight: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self> {
        training::norm(input, weight, None, epsilon)
    }

    fn rms_norm_rows_backward(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        epsilon: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        training::rms_norm_backward(input, weight, grad, epsilon)
    }

    fn gelu_tanh(input: FloatTensor<Self>) -> FloatTensor<Self> {
        training::gelu(input)
    }

    fn gelu_tanh_backward(input: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        training::gelu_backward(input, grad)
    }

    fn silu_mul(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        training::silu_mul(gate, up)
    }

    fn silu_mul_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        training::silu_mul_backward(gate, up, grad)
    }

    fn causal_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        future: BoolTensor<Self>,
        heads: Heads,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        training::causal_attention(query, key, value, future, heads)
    }

    fn causal_attention_backward(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        future: BoolTensor<Self>,
        output: FloatTensor<Self>,
        log_partition: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        heads: Heads,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let saved = super::attention::Saved { query, key, value, future, output, log_partition };
        training::causal_attention_backward(saved, grad, heads)
    }

    fn log_likelihood(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        training::log_likelihood(logits, targets)
    }

    fn log_likelihood_backward(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        output: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        training::log_likelihood_backward(logits, targets, output, grad)
    }

    fn divergences(
        teacher: FloatTensor<Self>,
        student: FloatTensor<Self>,
        temperature: f32,
    ) -> FloatTensor<Self> {
        training::divergences(teacher, student, temperature)
    }

    fn divergences_backward(
        teacher: FloatTensor<Self>,
        student: FloatTensor<Self>,
        output: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        temperature: f32,
    ) -> FloatTensor<Self> {
        training::divergences_backward(teacher, student, output, grad, temperature)
    }

    fn float_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        factors: Factors,
    ) -> FloatTensor<Self> {
        training::float_linear(input, weight, bias, factors)
    }

    fn float_product(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        factors: Factors,
    ) -> FloatTensor<Self> {
        training::float_product(input, weight, factors)
    }

    fn float_product_backward(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        factors: Factors,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        training::float_product_backward(input, weight, grad, factors)
    }

    fn bias_gradient(grad: FloatTensor<Self>) -> FloatTensor<Self> {
        training::bias_gradient(grad)
    }

    fn project(hidden: FloatTensor<Self>, table: FloatTensor<Self>, factors: Factors) -> FloatTensor<Self> {
        training::project(hidden, table, factors)
    }

    fn project_backward(
        hidden: FloatTensor<Self>,
        table: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        factors: Factors,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        training::project_backward(hidden, table, grad, factors)
    }

    fn ternary_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        _factors: GradientFactors,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        training::ternary_linear(input, weight, bias)
    }

    fn latent_linear(
        input: FloatTensor<Self>,
        latent: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        threshold: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        _factors: GradientFactors,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        training::latent_linear(input, latent, scale, threshold, bias)
    }

    fn ternary_linear_backward(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        factors: GradientFactors,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        training::ternary_linear_backward(input, weight, grad, factors)
    }

    fn ternary_linear_input_backward(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        training::ternary_linear_input_backward(weight, grad)
    }

    fn adamw_step(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        training::adamw_step(weight, grad, m, v, step)
    }

    fn muon_step(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        velocity: FloatTensor<Self>,
        step: MuonStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        training::muon_step(weight, grad, velocity, step)
    }

    fn adamw_int8_step(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        moments: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        training::adamw_int8_step(weight, grad, moments, step)
    }

    fn square_sum(input: FloatTensor<Self>) -> FloatTensor<Self> {
        training::square_sum(input)
    }
}

fn is_f32(tensors: &[&FlexTensor]) -> bool {
    tensors.iter().all(|tensor| tensor.dtype() == DType::F32)
}

/// The same numbers, one after another.
fn dense(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
}

/// The numbers of a dense tensor.
fn values(tensor: &FlexTensor) -> &[f32] {
    let start = tensor.layout().start_offset();
    &tensor.storage::<f32>()[start..start + tensor.layout().num_elements()]
}

fn tensor(values: Vec<f32>, shape: Shape) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape), DType::F32)
}
