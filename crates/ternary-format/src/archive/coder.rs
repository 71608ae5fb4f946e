//! Decisions between two things, coded at the cost of their probabilities, and what learns these probabilities.

use constriction::stream::{
    Decode, Encode,
    model::{DecoderModel, EncoderModel, EntropyModel},
    stack::DefaultAnsCoder,
};
use std::{borrow::Borrow, num::NonZeroU32};

/// Bits of a probability in fixed point.
const PRECISION: usize = 16;

/// The least probability of anything, 1/256: nothing is free, so that a stream says no more than its length allows.
const LEAST: u32 = 1 << (PRECISION - 8);

/// The state of rANS before the first decision is put in, large enough for every decision to change it: by at least a
/// 254th of a bit.
const START: u64 = 1 << PRECISION;

/// Whether a stream of so many bytes can hold so many decisions.
pub(super) fn can_hold(bytes: usize, decisions: usize) -> bool {
    decisions / (8 * 256) <= bytes
}

/// Codes decisions. One function written against it both packs and unpacks: an encoder gives back the decision that
/// it was told, a decoder the one that it found.
pub(super) trait Coder {
    /// `p`: the probability of `true` in 1/65536.
    fn decide(&mut self, decision: bool, p: u32) -> bool;
}

/// Collects decisions; rANS gives out last what was put in first, so they are coded from the last on.
#[derive(Default)]
pub(super) struct Encoder {
    /// `p << 1 | decision`
    decisions: Vec<u32>,
}

impl Coder for Encoder {
    #[inline(always)]
    fn decide(&mut self, decision: bool, p: u32) -> bool {
        self.decisions.push(p.clamp(LEAST, (1 << PRECISION) - LEAST) << 1 | u32::from(decision));
        decision
    }
}

impl Encoder {
    /// The coded decisions.
    pub fn finish(self) -> Vec<u8> {
        let mut coder = DefaultAnsCoder::from_raw_parts(Vec::new(), START);
        for packed in self.decisions.into_iter().rev() {
            let Ok(()) = coder.encode_symbol(packed & 1 == 1, Bernoulli(packed >> 1)) else {
                unreachable!("both decisions have a probability and memory takes all words");
            };
        }
        let Ok(words) = coder.into_compressed();
        let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        while bytes.last() == Some(&0) {
            bytes.pop();
        }
        bytes
    }
}

/// Gives out decisions.
pub(super) struct Decoder(DefaultAnsCoder);

impl Coder for Decoder {
    #[inline(always)]
    fn decide(&mut self, _: bool, p: u32) -> bool {
        let Ok(decision) = self.0.decode_symbol(Bernoulli(p.clamp(LEAST, (1 << PRECISION) - LEAST)));
        decision
    }
}

impl Decoder {
    /// `None`: bytes that no [`Encoder`] wrote.
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let word = |bytes: &[u8]| {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            u32::from_le_bytes(word)
        };
        DefaultAnsCoder::from_compressed(bytes.chunks(4).map(word).collect()).ok().map(Self)
    }

    /// Whether every bit was used, as after the last decision of an [`Encoder`].
    pub fn finished(self) -> bool {
        let (words, state) = self.0.into_raw_parts();
        words.is_empty() && state == START
    }
}

/// The probability of `true` in 1/65536: neither 0 nor 65536.
#[derive(Clone, Copy)]
struct Bernoulli(u32);

impl Bernoulli {
    /// Start and length of the part of 0..65536 that stands for a decision.
    #[inline(always)]
    fn part(self, decision: bool) -> (u32, NonZeroU32) {
        let (start, length) = if decision { (0, self.0) } else { (self.0, (1 << PRECISION) - self.0) };
        (start, NonZeroU32::new(length).unwrap_or(NonZeroU32::MIN))
    }
}

impl EntropyModel<PRECISION> for Bernoulli {
    type Symbol = bool;
    type Probability = u32;
}

impl EncoderModel<PRECISION> for Bernoulli {
    #[inline(always)]
    fn left_cumulative_and_probability(&self, decision: impl Borrow<bool>) -> Option<(u32, NonZeroU32)> {
        Some(self.part(*decision.borrow()))
    }
}

impl DecoderModel<PRECISION> for Bernoulli {
    #[inline(always)]
    fn quantile_function(&self, quantile: u32) -> (bool, u32, NonZeroU32) {
        let decision = quantile < self.0;
        let (start, length) = self.part(decision);
        (decision, start, length)
    }
}

/// A probability that is learned: at first the mean of what was seen, with a half of each decision beforehand, then a
/// mean of about the last [`MEMORY`](Self::MEMORY).
#[derive(Clone, Copy)]
pub(super) struct Chance(u32);

impl Chance {
    /// Decisions that a mean is over at most.
    const MEMORY: u32 = 1023;
    /// `65536 / (n + 3/2)`
    const RATES: [u32; 1024] = {
        let mut rates = [0; 1024];
        let mut n = 0;
        while n < rates.len() {
            rates[n] = 2 * 65536 / (2 * n as u32 + 3);
            n += 1;
        }
        rates
    };
    /// Nothing is known.
    pub const EVEN: Self = Self::new(1 << (PRECISION - 1), 0);

    /// `p` in 1/65536, as if from `seen` decisions, at most [`MEMORY`](Self::MEMORY).
    pub const fn new(p: u32, seen: u32) -> Self {
        Self(p << 16 | seen)
    }

    /// Of `true`, in 1/65536.
    #[inline(always)]
    pub fn p(self) -> u32 {
        self.0 >> 16
    }

    /// A mean over at most `memory` decisions.
    #[inline(always)]
    pub fn learn_within(&mut self, decision: bool, memory: u32) {
        // 22 bits of probability above 10 bits of count.
        let (p, seen) = (self.0 >> 10, self.0 & 1023);
        let target = if decision { (1i64 << 22) - 1 } else { 0 };
        let change = ((target - i64::from(p)) * i64::from(Self::RATES[seen as usize])) >> 16;
        self.0 = ((i64::from(p) + change) as u32) << 10 | (seen + 1).min(memory);
    }

    #[inline(always)]
    pub fn learn(&mut self, decision: bool) {
        self.learn_within(decision, Self::MEMORY);
    }

    /// Codes a decision and learns it.
    #[inline(always)]
    pub fn decide(&mut self, coder: &mut impl Coder, decision: bool) -> bool {
        let decision = coder.decide(decision, self.p());
        self.learn(decision);
        decision
    }
}

/// Codes the lowest `bits` bits of a number, from the highest on, each with a chance for all that is before it.
///
/// # Shapes
/// chances `[2^bits]`
#[inline(always)]
pub(super) fn number(coder: &mut impl Coder, chances: &mut [Chance], bits: u32, value: u32) -> u32 {
    let mut found = 1;
    for bit in (0..bits).rev() {
        let one = chances[found as usize].decide(coder, value >> bit & 1 == 1);
        found = found << 1 | u32::from(one);
    }
    found - (1 << bits)
}

/// `65536 / (1 + e^-x)` at `x` from -8 to 8 in steps of a half.
const LOGISTIC: [i32; 33] = [
    22, 36, 60, 98, 162, 267, 439, 720, 1179, 1921, 3108, 4971, 7812, 11955, 17625, 24743, 32768, 40793,
    47911, 53581, 57724, 60565, 62428, 63615, 64357, 64816, 65097, 65269, 65374, 65438, 65476, 65500, 65514,
];

/// The probability of odds `e^(x / 256)`, in 1/65536: [`LOGISTIC`] and straight lines between.
#[inline(always)]
pub(super) const fn squash(x: i32) -> u32 {
    let x = if x < -2047 {
        -2047
    } else if x > 2047 {
        2047
    } else {
        x
    } + 2048;
    let (i, rest) = ((x >> 7) as usize, x & 127);
    ((LOGISTIC[i] * (128 - rest) + LOGISTIC[i + 1] * rest) >> 7) as u32
}

/// The inverse of [`squash`], by the upper 12 bits of a probability.
static STRETCH: [i16; 4096] = {
    let mut table = [2047; 4096];
    let (mut x, mut next) = (-2047, 0);
    while x <= 2047 {
        let p = (squash(x) >> 4) as usize;
        while next <= p {
            table[next] = x as i16;
            next += 1;
        }
        x += 1;
    }
    table
};

/// `256 ln(p / (1 - p))`
#[inline(always)]
pub(super) fn stretch(p: u32) -> i32 {
    i32::from(STRETCH[(p >> 4) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    #[test]
    fn decisions_come_back_at_the_cost_of_their_probabilities() {
        let mut rng = StdRng::seed_from_u64(1);
        for n in [0, 1, 2, 31, 100_000] {
            let decisions: Vec<(bool, u32)> = (0..n)
                .map(|_| {
                    let p = rng.random_range(0..=1 << 16);
                    (rng.random_range(0..1 << 16) < p, p)
                })
                .collect();
            let mut encoder = Encoder::default();
            let mut bits = 0.0;
            for &(decision, p) in &decisions {
                assert_eq!(encoder.decide(decision, p), decision);
                let p = f64::from(p.clamp(LEAST, (1 << PRECISION) - LEAST)) / f64::from(1 << PRECISION);
                bits -= if decision { p } else { 1.0 - p }.log2();
            }
            let bytes = encoder.finish();
            assert!(can_hold(bytes.len(), n));
            assert!(
                (bytes.len() as f64) < bits / 8.0 * 1.001 + 4.0,
                "{n}: {} bytes, {bits} bits",
                bytes.len()
            );
            let mut decoder = Decoder::new(&bytes).unwrap();
            for &(decision, p) in &decisions {
                assert_eq!(decoder.decide(false, p), decision);
            }
            assert!(decoder.finished());
        }
    }

    #[test]
    fn what_is_certain_is_not_free() {
        for n in [10, 1000, 1_000_000] {
            for (decision, p) in [(true, 1 << PRECISION), (false, 0)] {
                let mut encoder = Encoder::default();
                (0..n).for_each(|_| assert_eq!(encoder.decide(decision, p), decision));
                let bytes = encoder.finish().len();
                assert!(can_hold(bytes, n) && bytes <= 4 + n / 1000, "{n}: {bytes}");
            }
        }
    }

    #[test]
    fn chances_are_means_and_stay_within_their_bits() {
        let mut chance = Chance::EVEN;
        for n in 1..1000u32 {
            chance.learn(n.is_multiple_of(4));
        }
        assert!((f64::from(chance.p()) / 65536.0 - 0.25).abs() < 0.01);
        for decision in [true, false] {
            (0..100_000).for_each(|_| chance.learn(decision));
            assert_eq!(chance.p() > 1 << 15, decision);
            assert_eq!(chance.0 & 1023, Chance::MEMORY);
        }
    }

    #[test]
    fn stretch_is_the_inverse_of_squash() {
        for x in -1400..1400 {
            assert!((stretch(squash(x)) - x).abs() <= 2 + x * x / 50_000, "{x}: {}", stretch(squash(x)));
        }
        assert!((0..4096).is_sorted_by_key(|i| stretch(i << 4)));
        for x in [-2000, -300, 0, 1, 700, 2000] {
            let exact = 65536.0 / (1.0 + (-f64::from(x) / 256.0).exp());
            assert!((f64::from(squash(x)) - exact).abs() < 300.0, "{x}");
        }
    }
}
