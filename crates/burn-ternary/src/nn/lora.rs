//! LoRA: trained low-rank matrices next to the linear layers of a frozen model.
//!
//! Burn has `Lora` too, but composes `base + AB` into one weight. Here the product stays separate, because its sum with
//! a ternary weight would not be ternary.

use super::{DuckConfig, MixedPrecision, init::normal};
use crate::invalid_value::{InvalidValue, require};
use crate::ops::{FactorPrecision, float_linear};
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use getset::WithSetters;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use ternary_format::FormatError;

/// The `[lora]` section of an experiment: low-rank adapters (LoRA) for a frozen model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema, WithSetters)]
#[serde(default, deny_unknown_fields)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct LoraConfig {
    /// Rank of the adapters, which are trained instead of the weights of the model in `run.start_from`; 0: no adapters.
    pub rank: usize,
    /// Strength: the output of an adapter is multiplied by `alpha / rank`.
    pub alpha: f64,
    /// Linear layers that get an adapter: `"query"`, `"key"`, `"value"`, `"output"`, `"gate"`, `"up"`, `"down"`, or `"all"`.
    pub targets: Vec<String>,
}

impl Default for LoraConfig {
    /// Off.
    fn default() -> Self {
        Self { rank: 0, alpha: 16.0, targets: vec![ALL.into()] }
    }
}

/// Value of `lora.targets` that selects every layer.
const ALL: &str = "all";

/// The linear layers of a block in the order of the forward pass, by the last part of their path.
const LINEARS: [&str; 7] = ["query", "key", "value", "output", "gate", "up", "down"];

impl LoraConfig {
    /// Whether a model is frozen and gets adapters.
    pub fn is_on(&self) -> bool {
        self.rank > 0
    }

    /// Whether the linear layer at `path` gets an adapter.
    pub fn targets(&self, path: &str) -> bool {
        let name = path.rsplit('.').next().unwrap_or(path);
        self.targets.iter().any(|target| target == ALL || target == name)
    }

    /// Number of adapter parameters of a model, by arithmetic.
    pub fn num_params(&self, model: &DuckConfig) -> usize {
        let (d, d_ff, kv) = (model.d_model, model.d_ff, model.n_kv_heads * model.head_dim());
        let widths = [2 * d, d + kv, d + kv, 2 * d, d + d_ff, d + d_ff, d + d_ff];
        let named = LINEARS.into_iter().zip(widths).filter(|(name, _)| model.is_gated() || *name != "gate");
        let of_block: usize = named.filter(|(name, _)| self.targets(name)).map(|(_, width)| width).sum();
        self.rank * of_block * model.n_layers
    }

    pub(crate) fn check(&self, model: &DuckConfig) -> Result<(), InvalidValue> {
        let widest = model.d_model;
        require(self.rank <= widest, "lora.rank", self.rank, format!("0 (off) to d_model = {widest}"))?;
        let alpha = self.alpha > 0.0 && self.alpha.is_finite();
        require(alpha, "lora.alpha", self.alpha, "a finite number above 0")?;
        let has = |name: &&str| model.is_gated() || *name != "gate";
        let names: Vec<&str> = [ALL].into_iter().chain(LINEARS.into_iter().filter(has)).collect();
        let known = self.targets.iter().all(|target| names.contains(&target.as_str()));
        let expected = format!("some of {}", names.join(", "));
        require(known && !self.targets.is_empty(), "lora.targets", &self.targets, expected)
    }
}

/// The adapter of a linear layer: adds `scale x A B` to its output.
#[derive(Module, Debug)]
pub struct LowRank {
    /// `[d_input, rank]`
    pub a: Param<Tensor<2>>,
    /// `[rank, d_output]`
    pub b: Param<Tensor<2>>,
    #[module(skip)]
    alpha: f64,
}

impl LowRank {
    /// A is drawn on the host, with the standard deviation that gives `x A` the magnitude of `x`. B is zero, so that
    /// the layer initially computes what it did before.
    pub(super) fn init(
        [d_input, d_output]: [usize; 2],
        lora: &LoraConfig,
        seed: u64,
        device: &Device,
    ) -> Self {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let std = 1.0 / (d_input as f64).sqrt();
        Self {
            a: Param::from_tensor(normal(rng, [d_input, lora.rank], std, device)),
            b: Param::from_tensor(Tensor::zeros([lora.rank, d_output], device)),
            alpha: lora.alpha,
        }
    }

    /// `alpha / rank x A B`.
    ///
    /// # Shapes
    /// `[tokens, d_input]` to `[tokens, d_output]`
    pub(super) fn forward(&self, input: Tensor<2>, precision: MixedPrecision) -> Tensor<2> {
        let inner =
            float_linear(precision.cast(input), precision.cast(self.a.val()), None, FactorPrecision::F32);
        float_linear(inner, precision.cast(self.b.val()), None, FactorPrecision::F32).mul_scalar(self.scale())
    }

    fn rank(&self) -> usize {
        self.a.dims()[1]
    }

    fn scale(&self) -> f64 {
        self.alpha / self.rank() as f64
    }

    /// The pair in the layout of files: Burn's `[in, out]` factors as `[out, in]`.
    pub(crate) fn to_file(&self) -> Result<ternary_format::LowRank, FormatError> {
        let values = |factor: &Param<Tensor<2>>| factor.val().transpose().into_data().iter::<f32>().collect();
        ternary_format::LowRank::new(self.rank(), self.alpha, values(&self.a), values(&self.b))
    }

    pub(super) fn from_file(pair: &ternary_format::LowRank, device: &Device) -> Self {
        let ([d_output, d_input], rank) = (pair.shape(), pair.rank());
        let factor = |values: &[f32], [rows, cols]: [usize; 2]| {
            let data = TensorData::new(values.to_vec(), [rows, cols]);
            Tensor::<2>::from_data(data, device).transpose()
        };
        Self {
            a: Param::from_tensor(factor(pair.a(), [rank, d_input])),
            b: Param::from_tensor(factor(pair.b(), [d_output, rank])),
            alpha: pair.alpha(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{
        DuckQuantized, Family, QuantizedLinear, QuantizedLinearConfig, duck::tests::tiny,
        linear::tests::prepared,
    };
    use crate::quant::{ActivationPrecision, MatmulPrecision, QuantConfig, ScaleRule, ScheduleHandle};
    use burn::module::ModuleVisitor;
    use burn::tensor::Int;

    const FAMILIES: [Family; 3] = [Family::Gpt2, Family::Llama, Family::Bitnet];
    /// Tokens, inputs, rank, outputs.
    const SIZES: [usize; 4] = [5, 13, 3, 7];

    fn device() -> Device {
        crate::device::device("flex").unwrap()
    }

    fn random(rng: &mut ChaCha8Rng, shape: [usize; 2], device: &Device) -> Tensor<2> {
        normal(rng, shape, 1.0, device)
    }

    fn values(tensor: Tensor<2>) -> Vec<f64> {
        tensor.into_data().iter::<f64>().collect()
    }

    fn lora(rank: usize, targets: &[&str]) -> LoraConfig {
        LoraConfig { rank, alpha: 5.0, targets: targets.iter().map(ToString::to_string).collect() }
    }

    /// Every quantizer that decides what an adapter sees, the float twin first.
    fn quants() -> Vec<QuantConfig> {
        let mut quants = vec![QuantConfig::default().float()];
        for input_norm in [false, true] {
            for (activations, matmul_precision) in [
                (ActivationPrecision::Float, MatmulPrecision::Float),
                (ActivationPrecision::Int8, MatmulPrecision::Float),
                (ActivationPrecision::Int8, MatmulPrecision::Int8Bf16),
                (ActivationPrecision::Int8, MatmulPrecision::Int8),
            ] {
                quants.push(QuantConfig {
                    input_norm,
                    activations,
                    matmul_precision,
                    ..QuantConfig::default()
                });
            }
        }
        quants
    }

    fn layer(quant: &QuantConfig, device: &Device) -> QuantizedLinear {
        let [_, d_input, rank, d_output] = SIZES;
        let config = QuantizedLinearConfig {
            d_input,
            d_output,
            bias: true,
            std: 0.3,
            mixed_precision: MixedPrecision::F32,
            quant: quant.clone(),
            schedule: ScheduleHandle::default(),
        };
        let rng = &mut ChaCha8Rng::seed_from_u64(3);
        let mut layer = config.init(rng, device).no_grad();
        let mut pair = LowRank::init([d_input, d_output], &lora(rank, &["all"]), 4, device);
        pair.b = Param::from_tensor(random(rng, [rank, d_output], device));
        layer.adapter = Some(pair);
        layer
    }

    /// The rows that the weight multiplies, by the definitions of norm and rounding.
    fn multiplied(input: &[f64], quant: &QuantConfig) -> Vec<f64> {
        input.chunks(SIZES[1]).flat_map(|row| prepared(row, quant)).collect()
    }

    /// `left right`, of `[rows, inner]` and `[inner, columns]`.
    fn product(left: &[f64], right: &[f64], inner: usize) -> Vec<f64> {
        let columns = right.len() / inner;
        let row = |row: &[f64]| -> Vec<f64> {
            (0..columns).map(|c| (0..inner).map(|k| row[k] * right[k * columns + c]).sum()).collect()
        };
        left.chunks(inner).flat_map(row).collect()
    }

    /// What the adapter adds, of the rows that the weight multiplies.
    fn added(x: &[f64], a: &[f64], b: &[f64]) -> Vec<f64> {
        let [_, d_input, rank, _] = SIZES;
        product(&product(x, a, d_input), b, rank).iter().map(|y| y * 5.0 / rank as f64).collect()
    }

    #[test]
    fn an_adapter_has_the_input_of_its_layer_and_exact_gradients() {
        let [tokens, d_input, rank, d_output] = SIZES;
        let device = device().autodiff();
        for quant in quants() {
            let rng = &mut ChaCha8Rng::seed_from_u64(11);
            let layer = layer(&quant, &device);
            let input = random(rng, [tokens, d_input], &device).mul_scalar(3.0).require_grad();
            let upstream = random(rng, [tokens, d_output], &device);
            let output = layer.forward(input.clone());

            let pair = layer.adapter.as_ref().unwrap();
            let (a, b) = (values(pair.a.val()), values(pair.b.val()));
            let x = multiplied(&values(input.clone()), &quant);
            let weight = values(layer.effective_weight());
            let base = product(&x, &weight, d_input);
            for ((found, base), added) in values(output.clone()).iter().zip(base).zip(added(&x, &a, &b)) {
                assert!((found - base - added).abs() < 1e-4, "{found} for {base} + {added}: {quant:?}");
            }

            let grads = (output * upstream.clone()).sum().backward();
            let upstream = values(upstream);
            let loss = |x: &[f64], a: &[f64], b: &[f64]| -> f64 {
                let outputs = product(x, &weight, d_input).into_iter().zip(added(x, a, b));
                outputs.zip(&upstream).map(|((base, added), up)| (base + added) * up).sum()
            };
            // The loss is linear in each: the step may be large.
            let slope = |values: &[f64], loss: &dyn Fn(&[f64]) -> f64, index: usize| {
                let mut moved = values.to_vec();
                moved[index] += 0.5;
                let above = loss(&moved);
                moved[index] -= 1.0;
                above - loss(&moved)
            };
            for (index, found) in values(pair.a.val().grad(&grads).unwrap()).iter().enumerate() {
                let expected = slope(&a, &|a: &[f64]| loss(&x, a, &b), index);
                assert!((found - expected).abs() < 2e-4 * expected.abs().max(1.0), "a: {found} {expected}");
            }
            for (index, found) in values(pair.b.val().grad(&grads).unwrap()).iter().enumerate() {
                let expected = slope(&b, &|b: &[f64]| loss(&x, &a, b), index);
                assert!((found - expected).abs() < 2e-4 * expected.abs().max(1.0), "b: {found} {expected}");
            }
            // Rounding passes straight through; a norm does not. Integer products round the gradient of the base.
            let bound = if quant.matmul_precision.is_integer() { 0.05 } else { 2e-4 };
            if !quant.input_norm {
                for (index, found) in values(input.grad(&grads).unwrap()).iter().enumerate() {
                    let expected = slope(&x, &|x: &[f64]| loss(x, &a, &b), index);
                    assert!(
                        (found - expected).abs() < bound * expected.abs().max(1.0),
                        "x: {found} {expected}"
                    );
                }
            }
            // Frozen.
            assert!(layer.weight.val().grad(&grads).is_none());
            assert!(layer.bias.as_ref().unwrap().val().grad(&grads).is_none());
            assert_eq!(rank, pair.rank());
        }
    }

    fn logits(model: &DuckQuantized) -> Vec<f32> {
        let ids: Vec<i64> = (0..2 * 9).map(|i| i * 7 % 11).collect();
        let device = model.embedding.val().device();
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [2, 9]), &device);
        model.forward(ids).into_data().iter::<f32>().collect()
    }

    #[test]
    fn a_new_adapter_changes_no_bit_and_follows_its_seed() {
        for family in FAMILIES {
            for quant in quants() {
                let model = tiny(family).init(&quant, 1, &device());
                let before = logits(&model);
                let adapted = model.clone().with_lora(&lora(3, &["all"]), 2);
                assert_eq!(logits(&adapted), before, "{family:?} {quant:?}");
                let again = model.clone().with_lora(&lora(3, &["all"]), 2);
                assert_eq!(adapted.adapter().unwrap(), again.adapter().unwrap());
                let other = model.clone().with_lora(&lora(3, &["all"]), 3);
                assert_ne!(adapted.adapter().unwrap(), other.adapter().unwrap());
                assert!(model.clone().with_lora(&lora(0, &["all"]), 2).adapter().unwrap().is_none());
            }
        }
        // No two layers begin alike, and A keeps the size of what it multiplies.
        let config = DuckConfig { d_model: 256, ..tiny(Family::Llama) };
        let model = config.init(&QuantConfig::default(), 1, &device()).with_lora(&lora(16, &["query"]), 1);
        let adapter = model.adapter().unwrap().unwrap();
        let all: Vec<&[f32]> = adapter.pairs.values().map(|pair| pair.a()).collect();
        assert!(all.len() == 2 && all[0] != all[1]);
        let square = all[0].iter().map(|a| a * a).sum::<f32>() / 16.0;
        assert!((square - 1.0).abs() < 0.1, "{square}");
    }

    /// Counts parameters by whether they are trained.
    #[derive(Default)]
    struct Count([usize; 2]);

    impl ModuleVisitor for Count {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0[usize::from(param.is_require_grad())] += param.shape().num_elements();
        }
    }

    #[test]
    fn only_adapters_are_trained_and_counted_as_such() {
        for family in FAMILIES {
            for (rank, targets) in
                [(1, &["all"][..]), (3, &["query", "value"]), (4, &["key", "down", "up"]), (2, &["output"])]
            {
                let (config, lora) = (tiny(family), lora(rank, targets));
                lora.check(&config).unwrap();
                let quant = QuantConfig { scale: ScaleRule::Learned, ..QuantConfig::default() };
                let model = config.init(&quant, 1, &device().autodiff());
                let before = (model.num_params(), model.size());
                let model = model.with_lora(&lora, 1);
                let mut count = Count::default();
                model.visit(&mut count);
                assert_eq!(count.0, [before.0, lora.num_params(&config)], "{family:?} {targets:?}");
                let size = model.size();
                assert_eq!(size.adapter_bytes, 4 * lora.num_params(&config));
                assert_eq!(size.packed_bytes() - size.adapter_bytes, before.1.packed_bytes());
                assert_eq!(size.fp32_bytes(), before.1.fp32_bytes());
                // Also after a validation, from which training goes on.
                let mut count = Count::default();
                model.valid().train().visit(&mut count);
                assert_eq!(count.0[1], lora.num_params(&config));
                let with: Vec<String> = model
                    .linears()
                    .into_iter()
                    .filter_map(|(path, linear)| linear.adapter.as_ref().map(|_| path))
                    .collect();
                assert!(
                    with.iter().all(|path| targets[0] == ALL || targets.iter().any(|t| path.ends_with(t)))
                );
            }
        }
    }

    /// The bits of the gradients of all adapters, and how many other parameters have one.
    fn adapter_gradients(model: &DuckQuantized) -> (Vec<u32>, usize) {
        let ids: Vec<i64> = (0..2 * 9).map(|i| i * 5 % 11).collect();
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [2, 9]), &device().autodiff());
        let grads = model.forward(ids).square().mean().backward();
        let bits =
            model.linears().into_iter().filter_map(|(_, linear)| linear.adapter.as_ref()).flat_map(|pair| {
                [&pair.a, &pair.b].map(|factor| factor.val().grad(&grads).expect("a gradient of each factor"))
            });
        let bits = bits.flat_map(|grad| grad.into_data().iter::<f32>().map(f32::to_bits).collect::<Vec<_>>());
        let tables = [Some(&model.embedding), model.head.as_ref()].into_iter().flatten();
        let weights = model.linears().into_iter().map(|(_, linear)| &linear.weight).chain(tables);
        let others = weights.filter(|weight| weight.val().grad(&grads).is_some()).count();
        (bits.collect(), others)
    }

    #[test]
    fn freezing_the_base_changes_no_adapter_gradient() {
        for family in FAMILIES {
            for quant in quants() {
                let config = DuckConfig { tied: family == Family::Gpt2, ..tiny(family) };
                let model = config.init(&quant, 1, &device().autodiff());
                let mut frozen = model.with_lora(&lora(3, &["all"]), 2);
                // B is not zero, so that A has a gradient.
                let rng = &mut ChaCha8Rng::seed_from_u64(9);
                for (_, linear) in frozen.linears_mut() {
                    let b = &mut linear.adapter.as_mut().unwrap().b;
                    *b = Param::from_tensor(random(rng, b.dims(), &device().autodiff()));
                }
                let (expected, all) = adapter_gradients(&frozen.clone().set_require_grad(true));
                let (found, none) = adapter_gradients(&frozen);
                assert!(found == expected && found.iter().any(|bits| *bits != 0), "{family:?} {quant:?}");
                assert_eq!((none, all > 0), (0, true));
            }
        }
    }
}
