//! [`ModelSpec`]: architecture and sizes of a language model, shared by all file types, the trainer and the engine.

use crate::FormatError;
use getset::WithSetters;
use serde::{Deserialize, Serialize};

/// Limit of a width, context or vocabulary: far above any model, yet a product of three such sizes cannot overflow.
pub(crate) const LARGEST_SIZE: usize = 1 << 20;

/// The architecture family. It determines norms, position encoding, biases and sub-norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schemars", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// LayerNorm, learned positions, biases.
    Gpt2,
    /// RMSNorm, rotary positions (RoPE), grouped-query attention, no biases.
    Llama,
    /// Llama with an additional norm (sub-norm) before the attention output and the down projection.
    Bitnet,
}

/// The activation function of the feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schemars", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// GELU in its tanh approximation, as in GPT-2 (`gelu_new` in transformers).
    Gelu,
    /// SwiGLU: `silu(gate(x)) * up(x)`.
    Swiglu,
    /// Squared ReLU: `relu(gate(x))^2 * up(x)` in the llama and bitnet families, `relu(up(x))^2` in gpt2.
    SquaredRelu,
}

/// Architecture and sizes of a model.
///
/// [`validate`](Self::validate) checks that the sizes fit each other.
///
/// ```
/// use ternary_format::{Family, ModelSpec};
///
/// let spec = ModelSpec::new(Family::Llama)
///     .with_vocab_size(4096)
///     .with_context(512)
///     .with_d_model(256)
///     .with_n_layers(6)
///     .with_n_heads(8)
///     .with_n_kv_heads(4)
///     .with_d_ff(1024);
/// spec.validate()?;
/// # Ok::<(), ternary_format::FormatError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, WithSetters)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct ModelSpec {
    /// Architecture family.
    pub family: Family,
    /// Rows of the token embedding.
    pub vocab_size: usize,
    /// Maximum sequence length, in tokens.
    pub context: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of transformer blocks.
    pub n_layers: usize,
    /// Number of query heads.
    pub n_heads: usize,
    /// Number of key and value heads: `n_heads` for multi-head attention, fewer for grouped-query attention.
    pub n_kv_heads: usize,
    /// Hidden width of the feed-forward network.
    pub d_ff: usize,
    /// Activation of the feed-forward network.
    pub activation: Activation,
    /// Whether the output head is the token embedding (tied embeddings).
    pub tied: bool,
    /// Epsilon of the norms.
    pub norm_eps: f32,
    /// Base of the RoPE frequencies; unused in gpt2.
    pub rope_theta: f32,
}

impl ModelSpec {
    /// Creates a spec without sizes: all are 0, which [`validate`](Self::validate) refuses, until they are set.
    ///
    /// The activation is GELU in gpt2, SwiGLU in llama and squared ReLU in bitnet. Embeddings are tied, `norm_eps` is 1e-5 and
    /// `rope_theta` is 10,000.
    pub fn new(family: Family) -> Self {
        let activation = match family {
            Family::Gpt2 => Activation::Gelu,
            Family::Llama => Activation::Swiglu,
            Family::Bitnet => Activation::SquaredRelu,
        };
        Self {
            family,
            vocab_size: 0,
            context: 0,
            d_model: 0,
            n_layers: 0,
            n_heads: 0,
            n_kv_heads: 0,
            d_ff: 0,
            activation,
            tied: true,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
        }
    }

    /// Width of one attention head: `d_model / n_heads`.
    pub fn head_dim(&self) -> usize {
        self.d_model / self.n_heads
    }

    /// Returns whether the feed-forward network has a gate projection: in all families but gpt2.
    pub fn is_gated(&self) -> bool {
        self.family != Family::Gpt2
    }

    /// Names and shapes of the tensors of such a model, in the order of [`PackedModel`](crate::PackedModel).
    ///
    /// The iterator is lazy, so a spec with absurd sizes costs no memory.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Vec<usize>)> + use<> {
        let Self { vocab_size, context, d_model, d_ff, tied, .. } = *self;
        let kv = self.n_kv_heads * self.head_dim();
        let (gpt2, bitnet) = (self.family == Family::Gpt2, self.family == Family::Bitnet);
        let named = move |name: &str, shape: &[usize]| {
            let weight = (format!("{name}.weight"), shape.to_vec());
            let bias = (format!("{name}.bias"), shape[..1].to_vec());
            [weight].into_iter().chain(gpt2.then_some(bias))
        };
        let block = move |i: usize| {
            let parts = [
                Some(("attn_norm", vec![d_model])),
                Some(("attn_q", vec![d_model, d_model])),
                Some(("attn_k", vec![kv, d_model])),
                Some(("attn_v", vec![kv, d_model])),
                bitnet.then(|| ("attn_sub_norm", vec![d_model])),
                Some(("attn_output", vec![d_model, d_model])),
                Some(("ffn_norm", vec![d_model])),
                (!gpt2).then(|| ("ffn_gate", vec![d_ff, d_model])),
                Some(("ffn_up", vec![d_ff, d_model])),
                bitnet.then(|| ("ffn_sub_norm", vec![d_ff])),
                Some(("ffn_down", vec![d_model, d_ff])),
            ];
            let parts = parts.into_iter().flatten();
            parts.flat_map(move |(part, shape)| named(&format!("blk.{i}.{part}"), &shape))
        };
        let table = |name: &str, rows| (name.to_string(), vec![rows, d_model]);
        [table("token_embd.weight", vocab_size)]
            .into_iter()
            .chain(gpt2.then(|| table("position_embd.weight", context)))
            .chain((0..self.n_layers).flat_map(block))
            .chain(named("output_norm", &[d_model]))
            .chain((!tied).then(|| table("output.weight", vocab_size)))
    }

    /// Checks that all sizes are in range and fit each other.
    ///
    /// # Errors
    /// `Spec`: the first size that is out of range, or contradicts another.
    pub fn validate(&self) -> Result<(), FormatError> {
        let require = |condition: bool, key, found: String, expected: String| {
            if condition { Ok(()) } else { Err(FormatError::Spec { key, found, expected }) }
        };
        let Self { d_model, n_heads, n_kv_heads, activation, .. } = *self;
        for (key, size) in [
            ("vocab_size", self.vocab_size),
            ("context", self.context),
            ("d_model", d_model),
            ("n_layers", self.n_layers),
            ("n_heads", n_heads),
            ("n_kv_heads", n_kv_heads),
            ("d_ff", self.d_ff),
        ] {
            let expected = || format!("1 to {LARGEST_SIZE}");
            require((1..=LARGEST_SIZE).contains(&size), key, size.to_string(), expected())?;
        }
        let divides = |key, n: usize, of, whole: usize| {
            require(whole.is_multiple_of(n), key, n.to_string(), format!("a divisor of {of} = {whole}"))
        };
        divides("n_heads", n_heads, "d_model", d_model)?;
        divides("n_kv_heads", n_kv_heads, "n_heads", n_heads)?;
        let gpt2 = self.family == Family::Gpt2;
        let (unfit, expected) = match gpt2 {
            true => (Activation::Swiglu, "gelu or squared_relu in the gpt2 family"),
            false => (Activation::Gelu, "swiglu or squared_relu in the llama and bitnet families"),
        };
        require(activation != unfit, "activation", format!("{activation:?}"), expected.into())?;
        let (eps, theta) = (self.norm_eps, self.rope_theta);
        require(eps > 0.0 && eps < 1.0, "norm_eps", eps.to_string(), "above 0 and below 1".into())?;
        if gpt2 {
            let expected = format!("n_heads = {n_heads} in the gpt2 family");
            return require(n_kv_heads == n_heads, "n_kv_heads", n_kv_heads.to_string(), expected);
        }
        let even = self.head_dim().is_multiple_of(2);
        require(
            even,
            "n_heads",
            n_heads.to_string(),
            "an even d_model / n_heads for rotary positions".into(),
        )?;
        let expected = "a finite number, at least 1".into();
        require(theta >= 1.0 && theta.is_finite(), "rope_theta", theta.to_string(), expected)
    }
}
