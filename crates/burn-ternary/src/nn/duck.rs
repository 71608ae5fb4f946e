//! [`DuckQuantized`]: the language model, from token ids to logits.

use super::transformer::{INIT_STD, LayerFactory, QuantizedTransformer};
use super::{Compute, DuckConfig, Family, QuantizedLinear, linear::normal};
use crate::quant::{Dial, QuantConfig, TablePrecision};
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Device, FloatDType, Int, Tensor, module::embedding};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

impl Compute {
    /// Into the type that the model computes in.
    pub(super) fn cast<const D: usize>(self, tensor: Tensor<D>) -> Tensor<D> {
        match self {
            Self::F32 => tensor,
            Self::Bf16 => tensor.cast(FloatDType::BF16),
            Self::F16 => tensor.cast(FloatDType::F16),
        }
    }
}

/// A GPT-like language model whose linear layers are ternary, or float in its twin.
#[derive(Module, Debug)]
pub struct DuckQuantized {
    /// Token table, `[vocab, d_model]`; also the head when tied.
    pub embedding: Param<Tensor<2>>,
    /// Learned positions, `[context, d_model]`, in the gpt2 family.
    pub positions: Option<Param<Tensor<2>>>,
    pub transformer: QuantizedTransformer,
    /// Untied head, `[vocab, d_model]`.
    pub head: Option<Param<Tensor<2>>>,
    dropout: Dropout,
    #[module(skip)]
    config: DuckConfig,
    #[module(skip)]
    quant: QuantConfig,
    #[module(skip)]
    lambda: Dial,
}

impl DuckConfig {
    /// A model with weights drawn from `seed`, the same on every backend.
    ///
    /// `quant.enabled = false` gives the float twin: same seed, same start.
    ///
    /// # Panics
    /// When `vocab_size` is 0 (still to be taken from a tokenizer).
    pub fn init(&self, quant: &QuantConfig, seed: u64, device: &Device) -> DuckQuantized {
        assert!(self.vocab_size > 0, "the vocabulary size must be known before the model is made");
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let lambda = Dial::default();
        let factory = LayerFactory { config: self, quant, lambda: &lambda };
        let table = [self.vocab_size, self.d_model];
        DuckQuantized {
            embedding: Param::from_tensor(normal(rng, table, INIT_STD, device)),
            positions: (self.family == Family::Gpt2)
                .then(|| Param::from_tensor(normal(rng, [self.context, self.d_model], INIT_STD, device))),
            transformer: QuantizedTransformer::new(&factory, rng, device),
            head: (!self.tied).then(|| Param::from_tensor(normal(rng, table, INIT_STD, device))),
            dropout: DropoutConfig::new(self.dropout).init(),
            config: self.clone(),
            quant: quant.clone(),
            lambda,
        }
    }
}

impl DuckQuantized {
    /// Logits of the next token at every position, in f32.
    ///
    /// # Shapes
    /// ids `[batch, seq]` to `[batch, seq, vocab]`
    ///
    /// # Panics
    /// When `seq` exceeds the context.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [batch, seq] = ids.dims();
        assert!(seq <= self.config.context, "{seq} tokens exceed the context of {}", self.config.context);
        let table = self.table(&self.embedding, self.quant.embedding);
        let mut hidden = embedding(table.clone(), ids);
        if let Some(positions) = &self.positions {
            hidden = hidden + positions.val().narrow(0, 0, seq).unsqueeze();
        }
        let hidden = self.config.compute.cast(self.dropout.forward(hidden));
        let hidden = self.transformer.forward(hidden);
        let head = match &self.head {
            Some(head) => self.table(head, self.quant.head),
            None => table,
        };
        let hidden: Tensor<2> = hidden.reshape([batch * seq, self.config.d_model]);
        let logits = hidden.matmul(self.config.compute.cast(head).transpose());
        logits.cast(FloatDType::F32).reshape([batch, seq, self.config.vocab_size])
    }

    pub fn config(&self) -> &DuckConfig {
        &self.config
    }

    pub fn quant(&self) -> &QuantConfig {
        &self.quant
    }

    /// The share of the ternary weight, for a float-first schedule to turn.
    pub fn lambda(&self) -> &Dial {
        &self.lambda
    }

    /// The linear layers with their parameter paths, in the order of the forward pass.
    pub fn linears(&self) -> Vec<(String, &QuantizedLinear)> {
        let mut linears = Vec::new();
        for (index, block) in self.transformer.blocks.iter().enumerate() {
            let (attention, feed_forward) = (&block.attention, &block.feed_forward);
            let named = [
                ("attention.query", Some(&attention.query)),
                ("attention.key", Some(&attention.key)),
                ("attention.value", Some(&attention.value)),
                ("attention.output", Some(&attention.output)),
                ("feed_forward.gate", feed_forward.gate.as_ref()),
                ("feed_forward.up", Some(&feed_forward.up)),
                ("feed_forward.down", Some(&feed_forward.down)),
            ];
            for (name, linear) in named {
                linears.extend(linear.map(|linear| (format!("transformer.blocks.{index}.{name}"), linear)));
            }
        }
        linears
    }

    /// Bytes of the packed tensors, by part.
    pub fn size(&self) -> ModelSize {
        let linears = self.linears();
        let matrices: usize = linears.iter().map(|(_, linear)| linear.weight.shape().num_elements()).sum();
        let [vocab, d] = self.embedding.dims();
        let mut tables = self.quantized(self.quant.embedding).bytes(vocab, d);
        let mut table_weights = vocab * d;
        if self.head.is_some() {
            tables += self.quantized(self.quant.head).bytes(vocab, d);
            table_weights += vocab * d;
        }
        let scales: usize = linears
            .iter()
            .filter_map(|(_, linear)| linear.quantizer.as_ref()?.scale.as_ref())
            .map(|scale| scale.shape().num_elements())
            .sum();
        let parameters = self.num_params() - scales;
        ModelSize {
            parameters,
            matrix_weights: matrices,
            matrix_bytes: linears.iter().map(|(_, linear)| linear.packed_bytes()).sum(),
            table_bytes: tables,
            other_bytes: (parameters - matrices - table_weights) * 4,
        }
    }

    fn table(&self, table: &Param<Tensor<2>>, precision: TablePrecision) -> Tensor<2> {
        self.quantized(precision).fake_quantize(table.val())
    }

    /// The precision of a table, which is float in a float twin.
    fn quantized(&self, precision: TablePrecision) -> TablePrecision {
        if self.quant.enabled { precision } else { TablePrecision::Float }
    }
}

/// Bytes of a model's packed tensors, computed from their shapes; a model file adds its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelSize {
    /// Weights of the float model, without learned scales.
    pub parameters: usize,
    /// Weights in linear layers.
    pub matrix_weights: usize,
    /// Linear layers: five codes a byte, an f16 a scale (four bytes a weight in a float twin).
    pub matrix_bytes: usize,
    /// Embedding and untied head at their precision.
    pub table_bytes: usize,
    /// Norms, biases, positions, in f32.
    pub other_bytes: usize,
}

impl ModelSize {
    pub fn fp32_bytes(&self) -> usize {
        self.parameters * 4
    }

    pub fn packed_bytes(&self) -> usize {
        self.matrix_bytes + self.table_bytes + self.other_bytes
    }

    /// Bits a weight of the linear layers takes, scales included.
    pub fn bits_per_weight(&self) -> f64 {
        self.matrix_bytes as f64 * 8.0 / self.matrix_weights as f64
    }

    /// f32 bytes over packed bytes of the whole model.
    pub fn compression(&self) -> f64 {
        self.fp32_bytes() as f64 / self.packed_bytes() as f64
    }
}
