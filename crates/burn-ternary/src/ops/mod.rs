//! Tensor ops that need a backend: the extension trait [`TernaryBackend`], and the list of backends that implement it.
//!
//! Weights have the shape `[groups, n, channels]`: Burn's `[d_input, d_output]` with the inputs split into `groups` of `n`, so
//! that weights that share a scale lie along dimension 1 and scales are `[groups, 1, channels]`. One scale per tensor is
//! `[1, d_input * d_output, 1]`. Each op has a default body made of float ops, a hand-written backward pass under `Autodiff`,
//! and a fused version for [`Flex`](burn::backend::Flex) where the default costs memory traffic.

// ndarray and libtorch are deprecated upstream and still supported here; the generated code of the extension names them.
#![allow(deprecated)]

mod absmax;
mod activation;
mod attention;
mod divergence;
mod embedding;
#[cfg(feature = "flex")]
mod flex;
#[cfg(feature = "flex")]
pub(crate) use flex::start_threads;
mod identity;
mod linear;
mod loss;
mod node;
mod norm;
mod optimizer;
mod scale;
mod ternary;

pub use absmax::{RowScale, absmax_quantize, absmax_scales};
pub use activation::{gelu, silu_mul};
pub use attention::{Heads, causal_attention};
pub use divergence::divergences;
pub use embedding::embed;
pub use linear::{Factors, GradientFactors, float_linear, latent_linear, project, ternary_linear};
pub use loss::log_likelihood;
pub use norm::{layer_norm, rms_norm};
pub use optimizer::{AdamWStep, MuonStep, adamw, adamw_int8, int8_moments, muon, square_sum};
pub use scale::{SCALE_MAX, SCALE_MIN, kth_magnitude, mean_abs, round_scale};
pub use ternary::{StraightThrough, ternary_codes, ternary_quantize};

use burn::backend::{
    Autodiff, AutodiffBackend, Backend,
    autodiff::checkpoint::strategy::CheckpointStrategy,
    backend_extension,
    tensor::{BoolTensor, FloatTensor, IntTensor},
};

/// The ops of ternary training. Calling one on a backend that is not in this list panics, which cannot happen with our
/// Cargo features.
///
/// # Overriding
/// A backend may override any default body. An override must agree with it to the bit for the ternary ops (codes, scales,
/// fake quantization) and within f32 rounding for all others (`tests/backends.rs`).
///
/// A forward method that returns tensors saved for its backward pass defines their layout, so override both or neither:
/// `causal_attention`, `divergences`, `ternary_linear` (with `latent_linear`), and the backward methods that belong to them.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    LibTorch: cfg(feature = "tch"),
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Fusion: cfg(any(feature = "wgpu", feature = "cuda")),
)]
pub trait TernaryBackend: Backend {
    /// See [`ternary_codes`].
    #[fusion(default)]
    fn ternary_codes(weight: FloatTensor<Self>, threshold: FloatTensor<Self>) -> FloatTensor<Self> {
        ternary::codes::<Self>(weight, threshold)
    }

    /// See [`ternary_quantize`].
    #[fusion(default)]
    fn ternary_quantize(
        weight: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        threshold: FloatTensor<Self>,
        estimator: StraightThrough,
    ) -> FloatTensor<Self> {
        let _ = estimator; // decides the backward pass only
        Self::float_mul(Self::ternary_codes(weight, threshold), scale)
    }

    /// See [`mean_abs`].
    #[fusion(default)]
    fn mean_abs(weight: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_mean_dim(Self::float_abs(weight), 1)
    }

    /// See [`kth_magnitude`].
    #[fusion(default)]
    fn kth_magnitude(weight: FloatTensor<Self>, k: usize) -> FloatTensor<Self> {
        scale::kth::<Self>(weight, k)
    }

    /// See [`round_scale`].
    #[fusion(default)]
    fn round_scale(scale: FloatTensor<Self>) -> FloatTensor<Self> {
        scale::round::<Self>(scale)
    }

    /// See [`absmax_quantize`].
    #[fusion(default)]
    fn absmax_quantize(input: FloatTensor<Self>, levels: f32, scale: RowScale) -> FloatTensor<Self> {
        absmax::quantize::<Self>(input, levels, scale)
    }

    /// See [`embed`].
    #[fusion(default)]
    fn embed(table: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
        Self::embedding(table, ids)
    }

    /// The gradient of the table; only the shape of `table` is used.
    #[fusion(default)]
    fn embed_backward(
        table: FloatTensor<Self>,
        ids: IntTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        Self::embedding_backward(table, grad, ids)
    }

    /// See [`layer_norm`].
    #[fusion(default)]
    fn layer_norm_rows(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        epsilon: f32,
    ) -> FloatTensor<Self> {
        norm::layer::<Self>(input, weight, bias, epsilon)
    }

    /// Gradients of input, weight and bias.
    #[fusion(default)]
    fn layer_norm_rows_backward(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        epsilon: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        norm::layer_backward::<Self>(input, weight, grad, epsilon)
    }

    /// See [`rms_norm`].
    #[fusion(default)]
    fn rms_norm_rows(input: FloatTensor<Self>, weight: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self> {
        norm::rms::<Self>(input, weight, epsilon)
    }

    /// Gradients of input and weight.
    #[fusion(default)]
    fn rms_norm_rows_backward(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        epsilon: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        norm::rms_backward::<Self>(input, weight, grad, epsilon)
    }

    /// See [`gelu`].
    #[fusion(default)]
    fn gelu_tanh(input: FloatTensor<Self>) -> FloatTensor<Self> {
        activation::gelu_tanh::<Self>(input)
    }

    /// The gradient of the input.
    #[fusion(default)]
    fn gelu_tanh_backward(input: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        activation::gelu_tanh_backward::<Self>(input, grad)
    }

    /// See [`silu_mul`].
    #[fusion(default)]
    fn silu_mul(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        activation::silu_mul_default::<Self>(gate, up)
    }

    /// Gradients of gate and up.
    #[fusion(default)]
    fn silu_mul_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        activation::silu_mul_backward::<Self>(gate, up, grad)
    }

    /// See [`causal_attention`]. Also returns the log-sum-exp of the scores, for the backward pass.
    #[fusion(default)]
    fn causal_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        future: BoolTensor<Self>,
        heads: Heads,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        attention::forward::<Self>(query, key, value, future, heads)
    }

    /// Gradients of query, key and value.
    #[allow(clippy::too_many_arguments)]
    #[fusion(default)]
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
        let saved = attention::Saved { query, key, value, future, output, log_partition };
        attention::backward::<Self>(saved, grad, heads)
    }

    /// See [`log_likelihood`].
    #[fusion(default)]
    fn log_likelihood(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        loss::forward::<Self>(logits, targets)
    }

    /// The gradient of the logits.
    #[fusion(default)]
    fn log_likelihood_backward(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        output: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        loss::backward::<Self>(logits, targets, output, grad)
    }

    /// See [`divergences`]. Also returns two more columns, for the backward pass.
    #[fusion(default)]
    fn divergences(
        teacher: FloatTensor<Self>,
        student: FloatTensor<Self>,
        temperature: f32,
    ) -> FloatTensor<Self> {
        divergence::forward::<Self>(teacher, student, temperature)
    }

    /// The gradient of the student's logits.
    #[fusion(default)]
    fn divergences_backward(
        teacher: FloatTensor<Self>,
        student: FloatTensor<Self>,
        output: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        temperature: f32,
    ) -> FloatTensor<Self> {
        divergence::backward::<Self>(teacher, student, output, grad, temperature)
    }

    /// See [`float_linear`].
    #[fusion(default)]
    fn float_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        _factors: Factors,
    ) -> FloatTensor<Self> {
        linear::float_forward::<Self>(input, weight, bias)
    }

    /// `input weight`, as [`float_linear`] without a bias.
    #[fusion(default)]
    fn float_product(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        _factors: Factors,
    ) -> FloatTensor<Self> {
        Self::float_matmul(input, weight)
    }

    /// Gradients of input and weight.
    #[fusion(default)]
    fn float_product_backward(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        _factors: Factors,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        linear::float_backward::<Self>(input, weight, grad)
    }

    /// The gradient of a bias `[d_output]`: the sum over the tokens.
    #[fusion(default)]
    fn bias_gradient(grad: FloatTensor<Self>) -> FloatTensor<Self> {
        linear::bias_gradient::<Self>(grad)
    }

    /// See [`project`].
    #[fusion(default)]
    fn project(hidden: FloatTensor<Self>, table: FloatTensor<Self>, _factors: Factors) -> FloatTensor<Self> {
        linear::project_forward::<Self>(hidden, table)
    }

    /// Gradients of hidden and table.
    #[fusion(default)]
    fn project_backward(
        hidden: FloatTensor<Self>,
        table: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        _factors: Factors,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        linear::project_backward::<Self>(hidden, table, grad)
    }

    /// Forward pass of [`ternary_linear`]. Also returns the tensors saved for its backward pass, in a backend-private layout.
    #[fusion(default)]
    fn ternary_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        _factors: GradientFactors,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        linear::forward::<Self>(input, weight, bias)
    }

    /// Forward pass of [`latent_linear`]. Returns the same as [`ternary_linear`](Self::ternary_linear), and shares its backward pass.
    #[fusion(default)]
    fn latent_linear(
        input: FloatTensor<Self>,
        latent: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        threshold: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        _factors: GradientFactors,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        linear::latent_forward::<Self>(input, latent, scale, threshold, bias)
    }

    /// Gradients of input, weight and bias.
    #[fusion(default)]
    fn ternary_linear_backward(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        _factors: GradientFactors,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        linear::backward::<Self>(input, weight, grad)
    }

    /// The gradient of the input only, for a frozen layer.
    #[fusion(default)]
    fn ternary_linear_input_backward(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        Self::float_matmul(grad, Self::float_transpose(weight))
    }

    /// See [`adamw`].
    #[fusion(default)]
    fn adamw_step(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        optimizer::adamw_step::<Self>(weight, grad, m, v, step)
    }

    /// See [`adamw_int8`].
    #[fusion(default)]
    fn adamw_int8_step(
        _weight: FloatTensor<Self>,
        _grad: FloatTensor<Self>,
        _moments: FloatTensor<Self>,
        _step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        panic!("moments at eight bits are there on flex only")
    }

    /// See [`muon`].
    #[fusion(default)]
    fn muon_step(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        velocity: FloatTensor<Self>,
        step: MuonStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        optimizer::muon_step::<Self>(weight, grad, velocity, step)
    }

    /// See [`square_sum`].
    #[fusion(default)]
    fn square_sum(input: FloatTensor<Self>) -> FloatTensor<Self> {
        optimizer::square_sum_default::<Self>(input)
    }
}

impl<B: TernaryBackend, C: CheckpointStrategy> TernaryBackend for Autodiff<B, C> {
    fn ternary_codes(weight: FloatTensor<Self>, threshold: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::from_inner(B::ternary_codes(Self::inner(weight), Self::inner(threshold)))
    }

    fn ternary_quantize(
        weight: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        threshold: FloatTensor<Self>,
        estimator: StraightThrough,
    ) -> FloatTensor<Self> {
        ternary::track::<B, C>(weight, scale, threshold, estimator)
    }

    fn mean_abs(weight: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::from_inner(B::mean_abs(Self::inner(weight)))
    }

    fn kth_magnitude(weight: FloatTensor<Self>, k: usize) -> FloatTensor<Self> {
        Self::from_inner(B::kth_magnitude(Self::inner(weight), k))
    }

    fn round_scale(scale: FloatTensor<Self>) -> FloatTensor<Self> {
        identity::straight_through::<B, C>(scale, B::round_scale)
    }

    fn absmax_quantize(input: FloatTensor<Self>, levels: f32, scale: RowScale) -> FloatTensor<Self> {
        identity::straight_through::<B, C>(input, |input| B::absmax_quantize(input, levels, scale))
    }

    fn embed(table: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
        embedding::track::<B, C>(table, ids)
    }

    fn layer_norm_rows(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        epsilon: f32,
    ) -> FloatTensor<Self> {
        norm::track_layer::<B, C>([input, weight, bias], epsilon)
    }

    fn rms_norm_rows(input: FloatTensor<Self>, weight: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self> {
        norm::track_rms::<B, C>([input, weight], epsilon)
    }

    fn gelu_tanh(input: FloatTensor<Self>) -> FloatTensor<Self> {
        activation::track_gelu::<B, C>(input)
    }

    fn silu_mul(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        activation::track_silu_mul::<B, C>([gate, up])
    }

    fn causal_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        future: BoolTensor<Self>,
        heads: Heads,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        attention::track::<B, C>([query, key, value], future, heads)
    }

    fn log_likelihood(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        loss::track::<B, C>(logits, targets)
    }

    fn divergences(
        teacher: FloatTensor<Self>,
        student: FloatTensor<Self>,
        temperature: f32,
    ) -> FloatTensor<Self> {
        divergence::track::<B, C>(Self::inner(teacher), student, temperature)
    }

    fn float_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        factors: Factors,
    ) -> FloatTensor<Self> {
        linear::track_float::<B, C>([input, weight, bias], factors)
    }

    fn float_product(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        factors: Factors,
    ) -> FloatTensor<Self> {
        linear::track_product::<B, C>([input, weight], factors)
    }

    fn project(hidden: FloatTensor<Self>, table: FloatTensor<Self>, factors: Factors) -> FloatTensor<Self> {
        linear::track_project::<B, C>([hidden, table], factors)
    }

    /// The saved tensors are captured by the autodiff node: the second and third tensor are empty.
    fn ternary_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        factors: GradientFactors,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let output = linear::track::<B, C>([input, weight, bias.clone()], factors);
        (output, bias.clone(), bias)
    }

    /// As there.
    fn latent_linear(
        input: FloatTensor<Self>,
        latent: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        threshold: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        factors: GradientFactors,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let shared = [Self::inner(scale), Self::inner(threshold)];
        let output = linear::track_latent::<B, C>([input, latent, bias.clone()], shared, factors);
        (output, bias.clone(), bias)
    }

    fn adamw_step(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let [weight, grad, m, v] = [weight, grad, m, v].map(Self::inner);
        let (weight, m, v) = B::adamw_step(weight, grad, m, v, step);
        (Self::from_inner(weight), Self::from_inner(m), Self::from_inner(v))
    }

    fn adamw_int8_step(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        moments: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [weight, grad, moments] = [weight, grad, moments].map(Self::inner);
        let (weight, moments) = B::adamw_int8_step(weight, grad, moments, step);
        (Self::from_inner(weight), Self::from_inner(moments))
    }

    fn muon_step(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        velocity: FloatTensor<Self>,
        step: MuonStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [weight, grad, velocity] = [weight, grad, velocity].map(Self::inner);
        let (weight, velocity) = B::muon_step(weight, grad, velocity, step);
        (Self::from_inner(weight), Self::from_inner(velocity))
    }

    fn square_sum(input: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::from_inner(B::square_sum(Self::inner(input)))
    }
}

#[cfg(feature = "ndarray")]
impl TernaryBackend for burn::backend::NdArray {}
#[cfg(feature = "tch")]
impl TernaryBackend for burn::backend::LibTorch {}
#[cfg(any(feature = "wgpu", feature = "cuda"))]
impl TernaryBackend for burn_cubecl::CubeBackend {}
