//! [`Sampler`]: from logits to a token.

use crate::EngineError;
use getset::WithSetters;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use std::cmp::Ordering;
use ternary_kernels::Isa;

/// Sampling parameters. Steps apply in the order of the fields, which is that of Hugging Face's `generate`.
///
/// ```
/// use ternary_infer::Sampling;
///
/// let sampling = Sampling::default().with_temperature(0.7).with_top_p(0.95);
/// sampling.check()?;
/// # Ok::<(), ternary_infer::EngineError>(())
/// ```
#[derive(Clone, Debug, PartialEq, WithSetters)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct Sampling {
    /// Repetition penalty: divides positive logits of tokens already in the sequence, multiplies negative ones; 1: off.
    ///
    /// # Source
    /// Keskar et al., CTRL, section 4.1.
    pub repetition_penalty: f32,
    /// Divides the logits; 0: greedy decoding (the first of equal logits), to which the parameters below do not apply.
    pub temperature: f32,
    /// Top-k sampling: keeps the `top_k` likeliest tokens; 0: all.
    pub top_k: usize,
    /// Nucleus sampling: keeps the smallest set of likeliest tokens whose probabilities reach this sum; 1: all.
    ///
    /// # Source
    /// Holtzman et al., The Curious Case of Neural Text Degeneration, section 3.1.
    pub top_p: f32,
    /// Min-p sampling: keeps tokens whose probability is at least this share of that of the likeliest token; 0: all.
    ///
    /// # Source
    /// Nguyen et al., Turning Up the Heat: Min-p Sampling.
    pub min_p: f32,
    /// Seed of the random numbers. Equal seeds give equal texts.
    pub seed: u64,
}

impl Default for Sampling {
    /// Samples from the model's own distribution.
    fn default() -> Self {
        Self { repetition_penalty: 1.0, temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 }
    }
}

impl Sampling {
    /// Greedy decoding: always the likeliest token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Returns whether top-k or top-p applies. They need sorted tokens.
    fn needs_order(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0
    }

    /// Checks that all parameters are in range.
    ///
    /// # Errors
    /// `Option`: one is out of range.
    pub fn check(&self) -> Result<(), EngineError> {
        let require = |holds: bool, key, found: f32, expected| {
            let error = EngineError::Option { key, found: found.to_string(), expected };
            if holds { Ok(()) } else { Err(error) }
        };
        let (penalty, temperature) = (self.repetition_penalty, self.temperature);
        let positive = penalty > 0.0 && penalty.is_finite();
        require(positive, "repetition_penalty", penalty, "a finite number above 0")?;
        let finite = temperature >= 0.0 && temperature.is_finite();
        require(finite, "temperature", temperature, "a finite number, at least 0")?;
        require(self.top_p > 0.0 && self.top_p <= 1.0, "top_p", self.top_p, "above 0, at most 1")?;
        require((0.0..=1.0).contains(&self.min_p), "min_p", self.min_p, "0 to 1")
    }
}

/// Draws the tokens of one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
    isa: Isa,
    /// One bit per id: whether it occurs in the sequence. Empty without a repetition penalty.
    seen: Vec<u64>,
    /// Unnormalized probabilities, 1 for the likeliest token, `[vocab]`.
    weights: Vec<f32>,
    /// Sums of `weights` by block.
    sums: Vec<f64>,
    candidates: Vec<Candidate>,
}

/// A token that top-k or top-p may keep.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    logit: f32,
    weight: f32,
}

impl Candidate {
    /// Orders by descending probability, then by id.
    fn order(&self, other: &Self) -> Ordering {
        other.logit.total_cmp(&self.logit).then(self.id.cmp(&other.id))
    }
}

impl Sampler {
    /// Creates the sampler of one sequence.
    ///
    /// # Errors
    /// `Option`: a parameter of `sampling` is out of range.
    pub fn new(sampling: Sampling, vocab_size: usize) -> Result<Self, EngineError> {
        sampling.check()?;
        let penalty = sampling.repetition_penalty != 1.0;
        let greedy = sampling.temperature == 0.0;
        Ok(Self {
            rng: ChaCha8Rng::seed_from_u64(sampling.seed),
            isa: Isa::get(),
            seen: vec![0; if penalty { vocab_size.div_ceil(64) } else { 0 }],
            weights: Vec::with_capacity(if greedy { 0 } else { vocab_size }),
            sums: Vec::with_capacity(if greedy { 0 } else { vocab_size.div_ceil(BLOCK) }),
            candidates: Vec::with_capacity(if greedy || !sampling.needs_order() { 0 } else { vocab_size }),
            sampling,
        })
    }

    /// Records that `id` is in the sequence, whether from the prompt or drawn.
    pub fn accept(&mut self, id: u32) {
        if let Some(word) = self.seen.get_mut(id as usize / 64) {
            *word |= 1 << (id % 64);
        }
    }

    /// Draws the next token. NaN logits are never drawn; if all are NaN, the result is token 0.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        if self.sampling.temperature == 0.0 {
            return self.likeliest(logits);
        }
        let unit = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        self.probabilities(logits);
        draw(&self.weights, &mut self.sums, unit)
    }

    /// The logit of a token after the repetition penalty; `None` for NaN and negative infinity, which are never drawn.
    fn penalized(&self, id: usize, logit: f32) -> Option<f32> {
        if logit.is_nan() || logit == f32::NEG_INFINITY {
            return None;
        }
        let seen = self.seen.get(id / 64).is_some_and(|word| word >> (id % 64) & 1 == 1);
        let penalty = self.sampling.repetition_penalty;
        let logit = match seen {
            true if logit > 0.0 => logit / penalty,
            true => logit * penalty,
            false => logit,
        };
        Some(logit.clamp(f32::MIN, f32::MAX))
    }

    fn likeliest(&self, logits: &[f32]) -> u32 {
        let mut best = (0, f32::NEG_INFINITY);
        for (id, logit) in logits.iter().enumerate() {
            if let Some(logit) = self.penalized(id, *logit)
                && logit > best.1
            {
                best = (id, logit);
            }
        }
        best.0 as u32
    }

    /// Unnormalized probabilities, `[vocab]`; 0 for tokens that are excluded.
    fn probabilities(&mut self, logits: &[f32]) -> &[f32] {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        let mut weights = std::mem::take(&mut self.weights);
        weights.clear();
        // NaN compares as unordered.
        let finite = |logit: f32| if logit >= f32::MIN { logit.min(f32::MAX) } else { f32::NEG_INFINITY };
        weights.extend(logits.iter().map(|logit| finite(*logit)));
        for (word, bits) in self.seen.iter().enumerate().filter(|(_, bits)| **bits != 0) {
            for id in (word * 64..logits.len().min(word * 64 + 64)).filter(|id| bits >> (id % 64) & 1 == 1) {
                weights[id] = self.penalized(id, logits[id]).unwrap_or(f32::NEG_INFINITY);
            }
        }
        let ordered = self.sampling.needs_order();
        let mut candidates = std::mem::take(&mut self.candidates);
        candidates.clear();
        if ordered {
            let drawable = weights.iter().enumerate().filter(|(_, logit)| **logit >= f32::MIN);
            candidates.extend(drawable.map(|(id, logit)| Candidate {
                id: id as u32,
                logit: *logit,
                weight: 0.0,
            }));
        }
        self.isa.softmax_weights(&mut weights, temperature);
        if ordered {
            candidates.iter_mut().for_each(|candidate| candidate.weight = weights[candidate.id as usize]);
            if (1..candidates.len()).contains(&top_k) {
                candidates.select_nth_unstable_by(top_k - 1, Candidate::order);
                candidates.truncate(top_k);
            }
            if top_p < 1.0 {
                keep_likeliest(&mut candidates, top_p);
            }
            weights.fill(0.0);
            candidates.iter().for_each(|candidate| weights[candidate.id as usize] = candidate.weight);
        }
        if min_p > 0.0 {
            weights.iter_mut().filter(|weight| **weight < min_p).for_each(|weight| *weight = 0.0);
        }
        self.candidates = candidates;
        self.weights = weights;
        &self.weights
    }
}

/// Block length of the partial sums.
const BLOCK: usize = 512;

/// Index at which the running sum of the weights passes the share `unit` (in `[0, 1)`) of the total; 0 if the total is 0.
fn draw(weights: &[f32], sums: &mut Vec<f64>, unit: f64) -> u32 {
    sums.clear();
    sums.extend(weights.chunks(BLOCK).map(sum));
    let mut point = unit * sums.iter().sum::<f64>();
    let mut last = 0;
    for (block, sum) in sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
        let start = block * BLOCK;
        let weights = &weights[start..weights.len().min(start + BLOCK)];
        last = start + weights.iter().rposition(|weight| *weight > 0.0).unwrap_or(0);
        if point < *sum {
            let mut left = point;
            let found = weights.iter().position(|weight| {
                left -= f64::from(*weight);
                left < 0.0
            });
            // Sums in two orders may differ by rounding.
            return found.map_or(last, |index| start + index) as u32;
        }
        point -= sum;
    }
    last as u32
}

/// Sixteen independent partial sums, so that additions need not wait for each other.
fn sum(weights: &[f32]) -> f64 {
    let (blocks, rest) = weights.as_chunks::<16>();
    let mut sums = [0.0; 16];
    for block in blocks {
        sums.iter_mut().zip(block).for_each(|(sum, weight)| *sum += f64::from(*weight));
    }
    sums.into_iter().chain(rest.iter().map(|weight| f64::from(*weight))).sum()
}

/// The smallest set of likeliest tokens with `share` of the total weight, sorted.
fn keep_likeliest(candidates: &mut Vec<Candidate>, share: f32) {
    let total: f64 = candidates.iter().map(|candidate| candidate.weight as f64).sum();
    let mut left = share as f64 * total;
    let mut sorted = 0;
    // Few tokens have most of the weight, and sorting all of them costs more than the model: sort twice as many at each try.
    while sorted < candidates.len() {
        let next = (sorted * 2).max(64).min(candidates.len());
        if next < candidates.len() {
            candidates[sorted..].select_nth_unstable_by(next - sorted, Candidate::order);
        }
        candidates[sorted..next].sort_unstable_by(Candidate::order);
        for index in sorted..next {
            left -= candidates[index].weight as f64;
            if left <= 0.0 {
                candidates.truncate(index + 1);
                return;
            }
        }
        sorted = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Probabilities by the definition, in float64; zero for what may not be drawn.
    fn plain(sampling: &Sampling, logits: &[f32], seen: &[u32]) -> Vec<f64> {
        let mut logits: Vec<f64> = logits.iter().map(|logit| *logit as f64).collect();
        let mut seen = seen.to_vec();
        seen.sort();
        seen.dedup();
        for id in seen {
            let logit = &mut logits[id as usize];
            let penalty = sampling.repetition_penalty as f64;
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
        if sampling.top_k > 0 {
            order.truncate(sampling.top_k);
        }
        let max = logits[order[0]];
        let weight = |id: usize| ((logits[id] - max) / sampling.temperature as f64).exp();
        let total: f64 = order.iter().map(|id| weight(*id)).sum();
        let mut kept = Vec::new();
        let mut sum = 0.0;
        for id in order {
            if sum >= sampling.top_p as f64 {
                break;
            }
            sum += weight(id) / total;
            kept.push(id);
        }
        kept.retain(|id| weight(*id) >= sampling.min_p as f64);
        let total: f64 = kept.iter().map(|id| weight(*id)).sum();
        let mut probabilities = vec![0.0; logits.len()];
        kept.into_iter().for_each(|id| probabilities[id] = weight(id) / total);
        probabilities
    }

    fn found(sampler: &mut Sampler, logits: &[f32]) -> Vec<f64> {
        let weights = sampler.probabilities(logits);
        let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
        weights.iter().map(|weight| f64::from(*weight) / total).collect()
    }

    fn sampling() -> impl Strategy<Value = Sampling> {
        let number = |off: f32, range: std::ops::Range<f32>| prop_oneof![Just(off), range];
        (
            number(1.0, 0.5..2.0),
            number(1.0, 0.2..5.0),
            0usize..300,
            number(1.0, 0.01..1.0),
            number(0.0, 0.0..0.9),
        )
            .prop_map(|(repetition_penalty, temperature, top_k, top_p, min_p)| Sampling {
                repetition_penalty,
                temperature,
                top_k,
                top_p,
                min_p,
                seed: 0,
            })
    }

    proptest! {
        #[test]
        fn probabilities_are_those_of_the_definition(
            sampling in sampling(),
            logits in prop::collection::vec(-10f32..10.0, 1..500),
            seen in prop::collection::vec(0usize..500, 0..5),
        ) {
            let seen: Vec<u32> = seen.iter().map(|id| (id % logits.len()) as u32).collect();
            let mut sampler = Sampler::new(sampling.clone(), logits.len()).unwrap();
            seen.iter().for_each(|id| sampler.accept(*id));
            let expected = plain(&sampling, &logits, &seen);
            let found = found(&mut sampler, &logits);
            let differences = found.iter().zip(&expected).filter(|(a, b)| (*a - *b).abs() > 1e-5);
            // Because of float rounding, one token more or less may be kept at the edge of top-p or min-p.
            let edge = expected.iter().copied().filter(|p| *p > 0.0).fold(1.0, f64::min);
            let worst = differences.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            let near = |a: f64, b: f64| (a - b).abs() < 1e-5;
            let on_the_edge = || {
                let looser = |by: f32| Sampling {
                    top_p: (sampling.top_p * (1.0 + by)).min(1.0),
                    min_p: sampling.min_p * (1.0 - by),
                    ..sampling.clone()
                };
                [1e-5, -1e-5].iter().any(|by| {
                    let expected = plain(&looser(*by), &logits, &seen);
                    found.iter().zip(&expected).all(|(a, b)| near(*a, *b))
                })
            };
            prop_assert!(worst == 0.0 || on_the_edge(), "off by {worst}, edge {edge}");
        }

        #[test]
        fn no_logits_make_it_panic(
            sampling in sampling(),
            greedy in any::<bool>(),
            logits in prop::collection::vec(any::<f32>(), 0..200),
            seen in any::<u32>(),
        ) {
            let temperature = if greedy { 0.0 } else { sampling.temperature };
            let mut sampler = Sampler::new(Sampling { temperature, ..sampling }, logits.len()).unwrap();
            sampler.accept(seen);
            let id = sampler.sample(&logits) as usize;
            prop_assert!(id < logits.len().max(1));
            let number = |logit: &f32| !logit.is_nan() && *logit != f32::NEG_INFINITY;
            prop_assert!(!logits.iter().any(number) || number(&logits[id]));
        }
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [1.0, -0.5, 2.0, 0.0, f32::NAN, f32::NEG_INFINITY];
        for temperature in [0.5, 1.0, 3.0] {
            let sampling = Sampling { temperature, ..Sampling::default() };
            let expected = plain(&sampling, &logits[..4], &[]);
            let mut sampler = Sampler::new(sampling, logits.len()).unwrap();
            let mut counts = [0.0; 6];
            (0..20_000).for_each(|_| counts[sampler.sample(&logits) as usize] += 1.0);
            for (count, expected) in counts.iter().zip(expected) {
                // Four standard deviations of a fraction of 20,000.
                assert!((count / 20_000.0 - expected).abs() < 0.015, "{counts:?} at {temperature}");
            }
        }
    }

    #[test]
    fn greedy_takes_the_most_likely_token_after_penalties() {
        let logits = [f32::NAN, 1.0, 3.0, 3.0, f32::NEG_INFINITY];
        assert_eq!(Sampler::new(Sampling::greedy(), 5).unwrap().sample(&logits), 2);
        assert_eq!(Sampler::new(Sampling::greedy(), 5).unwrap().sample(&[f32::NAN; 5]), 0);
        assert_eq!(Sampler::new(Sampling::greedy(), 3).unwrap().sample(&[1.0, f32::INFINITY, 2.0]), 1);
        let sampling = Sampling { repetition_penalty: 1.5, ..Sampling::greedy() };
        let mut sampler = Sampler::new(sampling, 5).unwrap();
        sampler.accept(2);
        assert_eq!(sampler.sample(&logits), 3);
    }

    #[test]
    fn equal_seeds_give_equal_draws() {
        let logits: Vec<f32> = (0..100).map(|i| (i as f32).sin()).collect();
        let draws = |seed| -> Vec<u32> {
            let sampling = Sampling { seed, top_k: 50, ..Sampling::default() };
            let mut sampler = Sampler::new(sampling, 100).unwrap();
            (0..50).map(|_| sampler.sample(&logits)).collect()
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
    }

    #[test]
    fn numbers_out_of_range_are_named() {
        for (key, sampling) in [
            ("temperature", Sampling { temperature: -1.0, ..Sampling::default() }),
            ("temperature", Sampling { temperature: f32::NAN, ..Sampling::default() }),
            ("top_p", Sampling { top_p: 0.0, ..Sampling::default() }),
            ("min_p", Sampling { min_p: 1.5, ..Sampling::default() }),
            ("repetition_penalty", Sampling { repetition_penalty: 0.0, ..Sampling::default() }),
        ] {
            let error = sampling.check().unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}
