//! [`DuckQuantized`]: the language model, from token ids to logits.

use super::{
    DuckConfig, Family, LoraConfig, LowRank, MixedPrecision, QuantizedLinear,
    factory::LayerFactory,
    init::{INIT_STD, normal},
    transformer::{BlockStates, QuantizedTransformer},
};
use crate::ops::{FactorPrecision, embed, lm_head};
use crate::quant::{QuantConfig, ScheduleHandle, TablePrecision};
use crate::seed::mix;
use crate::tensor_name::tensor_name;
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Device, FloatDType, Int, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use ternary_format::{Adapter, FormatError};

impl MixedPrecision {
    /// Casts to the type in which the model computes.
    pub(super) fn cast<const D: usize>(self, tensor: Tensor<D>) -> Tensor<D> {
        tensor.cast(match self {
            Self::F32 => FloatDType::F32,
            Self::Bf16 => FloatDType::BF16,
            Self::F16 => FloatDType::F16,
        })
    }
}

/// A GPT-like language model with ternary linear layers, or float ones in its float twin.
///
/// # Example
/// ```
/// # use burn_ternary::{nn::DuckConfig, quant::QuantConfig};
/// # use burn::tensor::{Device, Int, Tensor};
/// let config = DuckConfig::duck_tiny().with_vocab_size(100);
/// let device = Device::default();
/// let duck = config.init(&QuantConfig::default(), 1, &device);
/// let logits = duck.forward(Tensor::<2, Int>::from_data([[3, 1, 4, 1, 5]], &device));
/// assert_eq!(logits.dims(), [1, 5, 100]);
/// assert!(duck.size().bits_per_weight() < 2.0);
/// ```
#[derive(Module, Debug)]
pub struct DuckQuantized {
    /// Token embedding, `[vocab, d_model]`; also the head if tied.
    pub embedding: Param<Tensor<2>>,
    /// Learned positions, `[context, d_model]`, in the gpt2 family.
    pub positions: Option<Param<Tensor<2>>>,
    /// The blocks and the last norm.
    pub transformer: QuantizedTransformer,
    /// Untied head, `[vocab, d_model]`.
    pub head: Option<Param<Tensor<2>>>,
    dropout: Dropout,
    #[module(skip)]
    config: DuckConfig,
    #[module(skip)]
    quant: QuantConfig,
    #[module(skip)]
    schedule: ScheduleHandle,
}

impl DuckConfig {
    /// A model with weights drawn from `seed`, the same on every backend.
    ///
    /// `quant.enabled = false` gives the float twin, with the same initial weights.
    ///
    /// # Panics
    /// If `vocab_size` is 0 (not yet set from a tokenizer).
    pub fn init(&self, quant: &QuantConfig, seed: u64, device: &Device) -> DuckQuantized {
        assert!(self.vocab_size > 0, "vocab_size is 0: set it to that of the tokenizer first");
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let schedule = ScheduleHandle::default();
        let factory = LayerFactory { config: self, quant, schedule: &schedule };
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
            schedule,
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
    /// If `seq` exceeds the context.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        self.forward_with_states(ids, None).0
    }

    /// [`Self::forward`], and the hidden states of block `states_of` (counted from 0).
    ///
    /// # Shapes
    /// ids `[batch, seq]` to `[batch, seq, vocab]`; those of the states: [`BlockStates`]
    ///
    /// # Panics
    /// If `seq` exceeds the context.
    pub fn forward_with_states(
        &self,
        ids: Tensor<2, Int>,
        states_of: Option<usize>,
    ) -> (Tensor<3>, Option<BlockStates>) {
        let [batch, seq] = ids.dims();
        assert!(seq <= self.config.context, "{seq} tokens exceed the context of {}", self.config.context);
        let table = self.table(&self.embedding, self.quant.embedding);
        let mut hidden = embed(table.clone(), ids);
        if let Some(positions) = &self.positions {
            hidden = hidden + positions.val().narrow(0, 0, seq).unsqueeze();
        }
        let hidden = self.config.mixed_precision.cast(self.dropout.forward(hidden));
        let (hidden, states) = self.transformer.forward(hidden, states_of);
        let head = match &self.head {
            Some(head) => self.table(head, self.quant.head),
            None => table,
        };
        let hidden: Tensor<2> = hidden.reshape([batch * seq, self.config.d_model]);
        let precision = if self.quant.enabled {
            self.quant.matmul_precision.factor_precision()
        } else {
            FactorPrecision::F32
        };
        let logits = lm_head(hidden, self.config.mixed_precision.cast(head), precision);
        (logits.cast(FloatDType::F32).reshape([batch, seq, self.config.vocab_size]), states)
    }

    /// The configuration of the model.
    pub fn config(&self) -> &DuckConfig {
        &self.config
    }

    /// The configuration of its quantizers.
    pub fn quant(&self) -> &QuantConfig {
        &self.quant
    }

    /// The values that a schedule sets at each step.
    pub fn schedule_handle(&self) -> &ScheduleHandle {
        &self.schedule
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

    /// The same, mutable.
    pub(super) fn linears_mut(&mut self) -> Vec<(String, &mut QuantizedLinear)> {
        let paths: Vec<String> = self.linears().into_iter().map(|(path, _)| path).collect();
        let linears = self.transformer.blocks.iter_mut().flat_map(|block| {
            let (attention, feed_forward) = (&mut block.attention, &mut block.feed_forward);
            let all = [
                Some(&mut attention.query),
                Some(&mut attention.key),
                Some(&mut attention.value),
                Some(&mut attention.output),
                feed_forward.gate.as_mut(),
                Some(&mut feed_forward.up),
                Some(&mut feed_forward.down),
            ];
            all.into_iter().flatten()
        });
        paths.into_iter().zip(linears).collect()
    }

    /// Bytes of the packed tensors, per part.
    pub fn size(&self) -> ModelSize {
        let linears = self.linears();
        let matrices: usize = linears.iter().map(|(_, linear)| linear.weight.shape().num_elements()).sum();
        let [vocab, d] = self.embedding.dims();
        let mut tables = self.precision(self.quant.embedding).bytes(vocab, d);
        let mut table_weights = vocab * d;
        if self.head.is_some() {
            tables += self.precision(self.quant.head).bytes(vocab, d);
            table_weights += vocab * d;
        }
        let scales: usize = linears
            .iter()
            .filter_map(|(_, linear)| linear.quantizer.as_ref()?.scale.as_ref())
            .map(|scale| scale.shape().num_elements())
            .sum();
        let pairs = linears.iter().filter_map(|(_, linear)| linear.adapter.as_ref());
        let adapters = pairs.map(|pair| pair.num_params()).sum::<usize>();
        let parameters = self.num_params() - scales - adapters;
        ModelSize {
            parameters,
            matrix_weights: matrices,
            matrix_bytes: linears.iter().map(|(_, linear)| linear.packed_bytes()).sum(),
            table_bytes: tables,
            other_bytes: (parameters - matrices - table_weights) * 4,
            adapter_bytes: adapters * 4,
        }
    }

    /// Freezes the model and adds adapters, drawn from `seed`, to the layers that `lora` targets. Returns it unchanged if
    /// `lora` is off.
    pub fn with_lora(self, lora: &LoraConfig, seed: u64) -> Self {
        if !lora.is_on() {
            return self;
        }
        let mut model = self.no_grad();
        let device = model.embedding.val().device();
        for (index, (path, linear)) in model.linears_mut().into_iter().enumerate() {
            linear.adapter = lora.targets(&path).then(|| {
                // Distinct from the seeds of steps, which count from 0.
                LowRank::init(linear.weight.dims(), lora, mix(seed, u64::MAX - index as u64), &device)
            });
        }
        model
    }

    /// The model with the pairs of an adapter file, whose shapes must match.
    pub(crate) fn with_adapter(mut self, adapter: &Adapter) -> Self {
        let device = self.embedding.val().device();
        for (path, linear) in self.linears_mut() {
            let pair = adapter.pairs.get(&tensor_name(&format!("{path}.weight")));
            linear.adapter = pair.map(|pair| LowRank::from_file(pair, &device));
        }
        self
    }

    /// The adapters in the layout of files; `None` if no layer has one.
    ///
    /// # Errors
    /// `Value`: a factor that is not finite.
    pub fn adapter(&self) -> Result<Option<Adapter>, FormatError> {
        let mut adapter = Adapter::default();
        for (path, linear) in self.linears() {
            if let Some(pair) = &linear.adapter {
                let name = tensor_name(&format!("{path}.weight"));
                adapter.pairs.insert(name, pair.to_file()?);
            }
        }
        Ok(Some(adapter).filter(|adapter| !adapter.pairs.is_empty()))
    }

    fn table(&self, table: &Param<Tensor<2>>, precision: TablePrecision) -> Tensor<2> {
        self.precision(precision).fake_quantize(table.val())
    }

    /// The precision of a table; always float in a float twin.
    pub(crate) fn precision(&self, precision: TablePrecision) -> TablePrecision {
        if self.quant.enabled { precision } else { TablePrecision::Float }
    }
}

/// Bytes of a model's packed tensors, computed from their shapes, without the header of a model file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelSize {
    /// Weights of the float model, without learned scales and adapters.
    pub parameters: usize,
    /// Weights in linear layers.
    pub matrix_weights: usize,
    /// Linear layers: five codes per byte, one f16 per scale (four bytes per weight in a float twin).
    pub matrix_bytes: usize,
    /// Embedding and untied head at their precision.
    pub table_bytes: usize,
    /// Norms, biases, positions, in f32.
    pub other_bytes: usize,
    /// Adapters, in f32.
    pub adapter_bytes: usize,
}

impl ModelSize {
    /// Bytes of the float model, four per weight.
    pub fn fp32_bytes(&self) -> usize {
        self.parameters * 4
    }

    /// Bytes of all packed tensors.
    pub fn packed_bytes(&self) -> usize {
        self.matrix_bytes + self.table_bytes + self.other_bytes + self.adapter_bytes
    }

    /// Bits per weight of the linear layers, scales included.
    pub fn bits_per_weight(&self) -> f64 {
        self.matrix_bytes as f64 * 8.0 / self.matrix_weights as f64
    }

    /// FP32 bytes / packed bytes of the whole model.
    pub fn compression(&self) -> f64 {
        self.fp32_bytes() as f64 / self.packed_bytes() as f64
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::nn::Activation;
    use crate::quant::{ActivationPrecision, Granularity, ScaleRule};
    use burn::tensor::TensorData;

    const FAMILIES: [Family; 3] = [Family::Gpt2, Family::Llama, Family::Bitnet];
    const PRECISIONS: [TablePrecision; 4] =
        [TablePrecision::Float, TablePrecision::Int8, TablePrecision::Int4, TablePrecision::Ternary];

    fn device() -> Device {
        crate::device::device("flex").unwrap()
    }

    fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().iter::<f32>().collect()
    }

    pub(in crate::nn) fn tiny(family: Family) -> DuckConfig {
        DuckConfig {
            family,
            vocab_size: 11,
            context: 9,
            d_model: 16,
            n_layers: 2,
            n_heads: 4,
            n_kv_heads: if family == Family::Gpt2 { 4 } else { 2 },
            d_ff: 24,
            activation: if family == Family::Gpt2 { Activation::Gelu } else { Activation::Swiglu },
            ..DuckConfig::duck_tiny()
        }
    }

    fn logits(model: &DuckQuantized, rows: &[&[i32]]) -> Vec<f32> {
        let shape = [rows.len(), rows[0].len()];
        let ids = Tensor::from_data(TensorData::new(rows.concat(), shape), &model.embedding.device());
        let logits = model.forward(ids);
        assert_eq!(logits.dtype(), FloatDType::F32.into());
        values(logits)
    }

    fn distance(a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len());
        a.iter()
            .zip(b)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, |worst, d| if d.is_nan() { d } else { worst.max(d) })
    }

    /// Float, ternary, and ternary with activations whose scales could leak from one token to another.
    fn quants() -> [QuantConfig; 3] {
        let ternary = QuantConfig::default();
        let int8 = QuantConfig {
            activations: ActivationPrecision::Int8,
            input_norm: true,
            ..QuantConfig::default()
        };
        [ternary.clone().float(), ternary, int8]
    }

    #[test]
    fn a_later_id_never_changes_an_earlier_logit() {
        for (family, quant) in FAMILIES.iter().flat_map(|family| quants().map(|quant| (*family, quant))) {
            let model = tiny(family).init(&quant, 1, &device());
            let ids = [3, 1, 4, 1, 5, 9, 2, 6];
            let before = logits(&model, &[&ids]);
            for position in 0..ids.len() {
                let mut changed = ids;
                changed[position] = 10;
                let after = logits(&model, &[&changed]);
                let (earlier, later) = (position * 11, (ids.len() - 1) * 11);
                assert_eq!(before[..earlier], after[..earlier], "{family:?} at {position}");
                assert!(distance(&before[later..], &after[later..]) > 1e-6, "{family:?} at {position}");
            }
        }
    }

    #[test]
    fn rows_of_a_batch_are_independent() {
        for (family, quant) in FAMILIES.iter().flat_map(|family| quants().map(|quant| (*family, quant))) {
            let model = tiny(family).init(&quant, 2, &device());
            let row: &[i32] = &[1, 2, 3, 4, 5];
            let first = logits(&model, &[row, &[10, 0, 0, 7, 7], &[9, 9, 9, 9, 9]]);
            let second = logits(&model, &[row, &[4, 4, 1, 8, 6], &[2, 10, 2, 0, 3]]);
            assert_eq!(first[..5 * 11], second[..5 * 11], "{family:?}");
            // Products of other shapes may round differently, and int8 makes a step of that.
            if quant.activations == ActivationPrecision::Float {
                assert!(distance(&first[..5 * 11], &logits(&model, &[row])) < 1e-5, "{family:?}");
            }
        }
    }

    #[test]
    fn dropout_is_on_in_training_and_off_in_valid() {
        let config = DuckConfig { dropout: 0.5, ..tiny(Family::Llama) };
        let quant = QuantConfig::default();
        let training = config.init(&quant, 3, &device().autodiff());
        let ids: [&[i32]; 1] = [&[1, 2, 3, 4]];
        assert!(distance(&logits(&training, &ids), &logits(&training, &ids)) > 1e-3);
        let without = DuckConfig { dropout: 0.0, ..config }.init(&quant, 3, &device());
        assert_eq!(logits(&training.valid(), &ids), logits(&without, &ids));
        assert_eq!(logits(&training.valid(), &ids), logits(&training.valid(), &ids));
    }

    #[test]
    fn half_precision_stays_near_f32() {
        for family in FAMILIES {
            for quant in quants() {
                let quant = QuantConfig { embedding: TablePrecision::Int8, ..quant };
                let of = |mixed_precision| {
                    let model = DuckConfig { mixed_precision, ..tiny(family) }.init(&quant, 4, &device());
                    logits(&model, &[&[1, 2, 3, 4, 5, 6, 7, 8, 9], &[0, 10, 0, 10, 5, 5, 5, 1, 2]])
                };
                let full = of(MixedPrecision::F32);
                let largest = full.iter().fold(0f32, |max, x| max.max(x.abs()));
                for precision in [MixedPrecision::Bf16, MixedPrecision::F16] {
                    let error = distance(&of(precision), &full) / largest;
                    println!(
                        "{family:?} {precision:?} ternary {}: {error:.1e} of the largest logit",
                        quant.enabled
                    );
                    // Exactly equal would mean that it was not computed in half precision.
                    assert!(error > 0.0 && error < 3e-2, "{family:?} {precision:?}: {error}");
                }
            }
        }
    }

    /// A table's row by the definition of its precision.
    fn by_hand(precision: TablePrecision, row: &[f32]) -> Vec<f32> {
        let largest = row.iter().fold(0f32, |max, x| max.max(x.abs()));
        let mean = row.iter().map(|x| x.abs() as f64).sum::<f64>() / row.len() as f64;
        let (scale, levels) = match precision {
            TablePrecision::Float => return row.to_vec(),
            TablePrecision::Int8 => (f64::from(largest / 127.0), 127.0),
            TablePrecision::Int4 => (f64::from(largest / 7.0), 7.0),
            TablePrecision::Ternary => (mean, 1.0),
        };
        let scale = half::f16::from_f64(scale).to_f32();
        row.iter().map(|x| (x / scale).clamp(-levels, levels).round_ties_even() * scale).collect()
    }

    #[test]
    fn quantized_tables_equal_tables_quantized_by_hand() {
        for (tied, embedding, head) in PRECISIONS
            .iter()
            .flat_map(|a| PRECISIONS.iter().flat_map(move |b| [(true, *a, *b), (false, *a, *b)]))
        {
            let config = DuckConfig { tied, ..tiny(Family::Llama) };
            let quant = QuantConfig { embedding, head, ..QuantConfig::default() };
            let found = logits(&config.init(&quant, 5, &device()), &[&[1, 2, 3, 10, 0]]);
            let mut model = config.init(&QuantConfig::default(), 5, &device());
            let quantize = |table: &Param<Tensor<2>>, precision| {
                let rows = values(table.val());
                let rows: Vec<f32> = rows.chunks(16).flat_map(|row| by_hand(precision, row)).collect();
                Param::from_tensor(Tensor::from_data(TensorData::new(rows, [11, 16]), &device()))
            };
            model.embedding = quantize(&model.embedding, embedding);
            model.head = model.head.as_ref().map(|table| quantize(table, head));
            let error = distance(&found, &logits(&model, &[&[1, 2, 3, 10, 0]]));
            assert!(error < 1e-6, "tied {tied}, {embedding:?}, {head:?}: {error}");
            let twin = config.init(&quant.float(), 5, &device());
            let plain = config.init(&QuantConfig::default().float(), 5, &device());
            assert_eq!(logits(&twin, &[&[1, 2]]), logits(&plain, &[&[1, 2]]));
        }
    }

    #[test]
    fn sizes_agree_with_the_arithmetic_of_the_configuration() {
        for (family, tied) in FAMILIES.iter().flat_map(|family| [(*family, true), (*family, false)]) {
            let config = DuckConfig { tied, ..tiny(family) };
            let count = config.count();
            let float = config.init(&QuantConfig::default().float(), 0, &device());
            assert_eq!(float.num_params(), config.num_params());
            let size = float.size();
            assert_eq!((size.parameters, size.matrix_weights), (config.num_params(), count.matrices));
            assert_eq!(
                (size.packed_bytes(), size.fp32_bytes()),
                (4 * config.num_params(), 4 * config.num_params())
            );
            assert_eq!((size.compression(), size.bits_per_weight()), (1.0, 32.0));

            for (scale, granularity) in [
                (ScaleRule::Absmean, Granularity::PerChannel),
                (ScaleRule::Learned, Granularity::PerGroup(8)),
            ] {
                let (embedding, head) = (TablePrecision::Int8, TablePrecision::Int4);
                let quant = QuantConfig { scale, granularity, embedding, head, ..QuantConfig::default() };
                let model = config.init(&quant, 0, &device());
                let dims = model.linears().into_iter().map(|(_, linear)| linear.weight.dims());
                let packed = dims.map(|[d_input, d_output]| {
                    let groups = if granularity == Granularity::PerChannel { 1 } else { d_input / 8 };
                    [(d_input * d_output).div_ceil(5), groups * d_output]
                });
                let [codes, scales] = packed.fold([0, 0], |[a, b], [c, d]| [a + c, b + d]);
                let learned = if scale == ScaleRule::Learned { scales } else { 0 };
                assert_eq!(model.num_params(), config.num_params() + learned);
                let size = model.size();
                assert_eq!((size.parameters, size.matrix_weights), (config.num_params(), count.matrices));
                assert_eq!(size.matrix_bytes, codes + 2 * scales);
                assert_eq!(size.table_bytes, 11 * (16 + 2) + if tied { 0 } else { 11 * (8 + 2) });
                assert_eq!(size.other_bytes, 4 * count.other);
                assert_eq!(size.packed_bytes(), size.matrix_bytes + size.table_bytes + size.other_bytes);
                assert_eq!(size.compression(), size.fp32_bytes() as f64 / size.packed_bytes() as f64);
            }
        }
    }

    #[test]
    fn linears_are_named_in_the_order_of_the_forward_pass() {
        let names = |family: Family| -> Vec<String> {
            let model = tiny(family).init(&QuantConfig::default(), 0, &device());
            model.linears().into_iter().map(|(name, _)| name).collect()
        };
        let attention = ["attention.query", "attention.key", "attention.value", "attention.output"];
        let path = |block: usize, name: &str| format!("transformer.blocks.{block}.{name}");
        for (family, feed_forward) in [
            (Family::Gpt2, &["feed_forward.up", "feed_forward.down"][..]),
            (Family::Llama, &["feed_forward.gate", "feed_forward.up", "feed_forward.down"]),
        ] {
            let expected: Vec<String> = (0..2)
                .flat_map(|block| attention.iter().chain(feed_forward).map(move |name| path(block, name)))
                .collect();
            assert_eq!(names(family), expected);
        }
    }

    #[test]
    fn equal_seeds_give_equal_weights_also_to_the_float_twin() {
        let config = tiny(Family::Bitnet);
        let weights = |quant: &QuantConfig, seed| {
            let model = config.init(quant, seed, &device());
            let linears: Vec<_> =
                model.linears().into_iter().flat_map(|(_, l)| values(l.weight.val())).collect();
            (values(model.embedding.val()), linears)
        };
        let ternary = weights(&QuantConfig::default(), 7);
        assert_eq!(ternary, weights(&QuantConfig::default(), 7));
        assert_eq!(ternary, weights(&QuantConfig::default().float(), 7));
        assert_ne!(ternary, weights(&QuantConfig::default(), 8));
    }
}
