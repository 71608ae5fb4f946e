//! [`Adapter`]: LoRA fine-tuning weights of a frozen model.

use crate::{FormatError, ModelSpec, Tensor};
use std::collections::BTreeMap;

/// A LoRA adapter: low-rank pairs for some matrices `W` of a frozen model. A layer with a pair computes `W x + alpha
/// / rank B (A x)`.
///
/// # Source
/// Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, equation 3.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Adapter {
    /// Pairs by the name of the matrix that they adapt, such as `blk.0.attn_q.weight`.
    pub pairs: BTreeMap<String, LowRank>,
    /// Signs of 512 weights of the base model, in the first matrix that has a pair: `+`, `-` or `0` each. Every file of the
    /// model has the same ones, and another model of the same shape has others. `None` for adapters of other programs.
    pub base_signs: Option<String>,
    /// Warnings for the user about unknown keys in the configuration.
    pub warnings: Vec<String>,
}

/// Weights of [`Adapter::base_signs`], or all weights of a smaller matrix.
const SAMPLED_WEIGHTS: usize = 512;
/// One in this many signs may differ, since rounding to 8 bits makes small weights zero.
const SIGNS_PER_DIFFERENCE: usize = 50;

/// A low-rank pair `alpha / rank B A`, of the shape `[out, in]` of the adapted matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    rank: usize,
    alpha: f64,
    a: Vec<f32>,
    b: Vec<f32>,
}

impl LowRank {
    /// Creates a pair from its factors.
    ///
    /// # Shapes
    /// a `[rank, in]`, b `[out, rank]`
    ///
    /// # Errors
    /// `Value`: a rank of 0, or an alpha that is not finite. `WrongShape`: a factor whose length is not a multiple of
    /// the rank.
    pub fn new(rank: usize, alpha: f64, a: Vec<f32>, b: Vec<f32>) -> Result<Self, FormatError> {
        require(rank > 0, "r", rank, "at least 1")?;
        require(alpha.is_finite(), "lora_alpha", alpha, "a finite number")?;
        for factor in [&a, &b] {
            if factor.is_empty() || !factor.len().is_multiple_of(rank) {
                let expected = vec![rank, factor.len() / rank];
                return Err(FormatError::WrongShape { expected, found: vec![factor.len()] });
            }
        }
        Ok(Self { rank, alpha, a, b })
    }

    /// The inner dimension of the product.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The numerator of the scale.
    pub fn alpha(&self) -> f64 {
        self.alpha
    }

    /// The scale of the product: `alpha / rank`.
    pub fn scale(&self) -> f32 {
        (self.alpha / self.rank as f64) as f32
    }

    /// Factor A, `[rank, in]`, row-major.
    pub fn a(&self) -> &[f32] {
        &self.a
    }

    /// Factor B, `[out, rank]`, row-major.
    pub fn b(&self) -> &[f32] {
        &self.b
    }

    /// Shape of the product, `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.b.len() / self.rank, self.a.len() / self.rank]
    }

    /// Returns whether the product is zero, as it is before the first training step.
    pub fn is_zero(&self) -> bool {
        let zero = |factor: &[f32]| factor.iter().all(|value| *value == 0.0);
        self.alpha == 0.0 || zero(&self.a) || zero(&self.b)
    }

    /// Removes the ranks whose column of B is zero; `None` if no rank is left.
    pub(crate) fn trimmed(self) -> Option<Self> {
        let used = |rank: &usize| self.b.iter().skip(*rank).step_by(self.rank).any(|value| *value != 0.0);
        let kept: Vec<usize> = (0..self.rank).filter(used).collect();
        if kept.is_empty() {
            return None;
        }
        let width = self.a.len() / self.rank;
        let a = kept.iter().flat_map(|rank| &self.a[rank * width..(rank + 1) * width]).copied().collect();
        let b = self.b.chunks_exact(self.rank).flat_map(|row| kept.iter().map(|rank| row[*rank])).collect();
        let alpha = self.alpha * kept.len() as f64 / self.rank as f64;
        Some(Self { rank: kept.len(), alpha, a, b })
    }

    /// Adds row `row` of the product to `values`.
    ///
    /// # Shapes
    /// values `[in]`
    pub(crate) fn add_row(&self, row: usize, values: &mut [f32]) {
        let (scale, b) = (self.scale(), &self.b[row * self.rank..(row + 1) * self.rank]);
        for (a, b) in self.a.chunks_exact(values.len()).zip(b) {
            let factor = b * scale;
            values.iter_mut().zip(a).for_each(|(value, a)| *value += factor * a);
        }
    }
}

/// Returns a `Value` error unless the condition is true.
pub(crate) fn require(
    condition: bool,
    key: &str,
    found: impl ToString,
    expected: impl Into<String>,
) -> Result<(), FormatError> {
    if condition {
        return Ok(());
    }
    Err(FormatError::Value { key: key.into(), found: found.to_string(), expected: expected.into() })
}

impl Adapter {
    /// Creates an adapter from pairs by the name of the matrix that they adapt.
    pub fn new(pairs: BTreeMap<String, LowRank>) -> Self {
        Self { pairs, ..Self::default() }
    }

    /// Records the base model, of which these are the tensors, in `base_signs`.
    pub fn with_base(self, base: &BTreeMap<String, Tensor>) -> Self {
        Self { base_signs: self.signs(base), ..self }
    }

    /// Returns whether the adapter was trained on the model of these tensors; `true` where that is not known.
    pub fn was_trained_on(&self, base: &BTreeMap<String, Tensor>) -> bool {
        let (Some(expected), Some(found)) = (&self.base_signs, self.signs(base)) else { return true };
        let differ =
            expected.bytes().zip(found.bytes()).filter(|(expected, found)| expected != found).count();
        expected.len() == found.len() && differ * SIGNS_PER_DIFFERENCE <= found.len()
    }

    /// Signs of weights at equal distances in the first matrix that has a pair.
    fn signs(&self, base: &BTreeMap<String, Tensor>) -> Option<String> {
        let (name, _) = self.pairs.first_key_value()?;
        let matrix = base.get(name)?;
        let (cols, weights) = (matrix.cols(), matrix.rows() * matrix.cols());
        let count = SAMPLED_WEIGHTS.min(weights);
        let mut row = vec![0.0; cols];
        let sign = |i: usize| {
            let place = i * weights / count;
            matrix.read_row(place / cols, &mut row);
            match row[place % cols] {
                weight if weight > 0.0 => '+',
                weight if weight < 0.0 => '-',
                _ => '0',
            }
        };
        Some((0..count).map(sign).collect())
    }

    /// Checks that each pair adapts a matrix of a transformer block, and has its shape.
    ///
    /// # Errors
    /// `UnknownTensor`, `WrongShape`
    pub fn validate(&self, spec: &ModelSpec) -> Result<(), FormatError> {
        let mut known = 0;
        for (name, shape) in matrices(spec) {
            let Some(pair) = self.pairs.get(&name) else { continue };
            if shape != pair.shape() {
                let found = pair.shape().into();
                return Err(FormatError::WrongShape { expected: shape.into(), found }.in_tensor(&name));
            }
            known += 1;
        }
        if known == self.pairs.len() {
            return Ok(());
        }
        let is_known = |name: &String| matrices(spec).any(|(known, _)| known == *name);
        let tensor = self.pairs.keys().find(|name| !is_known(name)).cloned().unwrap_or_default();
        Err(FormatError::UnknownTensor { tensor })
    }

    /// Checks that no factor is NaN or infinite.
    ///
    /// # Errors
    /// `NotFinite`: the first such pair, named by its matrix.
    pub fn check_finite(&self) -> Result<(), FormatError> {
        for (name, pair) in &self.pairs {
            for (factor, width) in [(&pair.a, pair.a.len() / pair.rank), (&pair.b, pair.rank)] {
                if let Some(place) = factor.iter().position(|value| !value.is_finite()) {
                    return Err(FormatError::NotFinite { row: place / width }.in_tensor(name));
                }
            }
        }
        Ok(())
    }

    /// Bytes of all factors in f32.
    pub fn bytes(&self) -> usize {
        self.pairs.values().map(|pair| 4 * (pair.a.len() + pair.b.len())).sum()
    }
}

/// Names and shapes, `[out, in]`, of the matrices of the transformer blocks.
pub(crate) fn matrices(spec: &ModelSpec) -> impl Iterator<Item = (String, [usize; 2])> + use<> {
    spec.tensors().filter_map(|(name, shape)| match shape[..] {
        [out, inputs] if name.starts_with("blk.") => Some((name, [out, inputs])),
        _ => None,
    })
}
