//! Binary entropy coding with rANS, and the adaptive bit models that provide its probabilities.
//!
//! [`Coder`] codes one decision with a given probability. [`Encoder`] and [`Decoder`] implement it, so that a format
//! is written once, as a function over `impl Coder`:
//!
//! ```text
//! encoder.decide(x, p)       records x, returns x
//! decoder.decide(_, p)       ignores its argument, returns the x that was recorded
//! ```
//!
//! A decision costs `-log2 p(x)` bits. [`BitModel`] learns `p` from the decisions before, in both directions alike.
//! See the [module](super) for the exact arithmetic.
//!
//! rANS is a stack: it returns the last recorded decision first. So the encoder collects all decisions of a chunk,
//! and codes them from the last to the first. Models run forward, before that.

use constriction::stream::{
    Decode, Encode,
    model::{DecoderModel, EncoderModel, EntropyModel},
    stack::DefaultAnsCoder,
};
use std::{borrow::Borrow, num::NonZeroU32};

/// Bits of a probability in fixed point.
const PRECISION: usize = 16;

/// Smallest probability, 1/256. Even a certain decision costs 0.0056 bits, so that the length of a stream bounds its
/// number of decisions.
const MIN_PROBABILITY: u32 = 1 << (PRECISION - 8);

/// State of rANS before the first decision. It is large enough that every decision changes it, by at least 1/254 of a
/// bit.
const INITIAL_STATE: u64 = 1 << PRECISION;

/// Returns whether `bytes` bytes can encode `decisions` decisions.
pub(super) fn can_encode(bytes: usize, decisions: usize) -> bool {
    decisions / (8 * 256) <= bytes
}

/// Codes decisions, in either direction. An encoder returns its argument; a decoder ignores it and returns the
/// decision that it reads.
pub(super) trait Coder {
    /// Codes one decision. `p` is the probability of `true` in units of 1/65536.
    fn decide(&mut self, decision: bool, p: u32) -> bool;
}

/// Collects decisions. They are coded by [`finish`](Self::finish), from the last to the first.
#[derive(Default)]
pub(super) struct Encoder {
    /// `p << 1 | decision`.
    decisions: Vec<u32>,
}

impl Coder for Encoder {
    #[inline(always)]
    fn decide(&mut self, decision: bool, p: u32) -> bool {
        self.decisions
            .push(p.clamp(MIN_PROBABILITY, (1 << PRECISION) - MIN_PROBABILITY) << 1 | u32::from(decision));
        decision
    }
}

impl Encoder {
    /// Codes all decisions. Trailing zero bytes are dropped: the decoder pads to whole words.
    pub fn finish(self) -> Vec<u8> {
        let mut coder = DefaultAnsCoder::from_raw_parts(Vec::new(), INITIAL_STATE);
        for packed in self.decisions.into_iter().rev() {
            let Ok(()) = coder.encode_symbol(packed & 1 == 1, Bernoulli(packed >> 1)) else {
                unreachable!("both decisions have a nonzero probability, and the buffer grows");
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

/// Reads decisions from a stream.
pub(super) struct Decoder(DefaultAnsCoder);

impl Coder for Decoder {
    #[inline(always)]
    fn decide(&mut self, _: bool, p: u32) -> bool {
        let Ok(decision) =
            self.0.decode_symbol(Bernoulli(p.clamp(MIN_PROBABILITY, (1 << PRECISION) - MIN_PROBABILITY)));
        decision
    }
}

impl Decoder {
    /// Opens a stream; `None` for bytes that no [`Encoder`] writes.
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let word = |bytes: &[u8]| {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            u32::from_le_bytes(word)
        };
        DefaultAnsCoder::from_compressed(bytes.chunks(4).map(word).collect()).ok().map(Self)
    }

    /// Returns whether the stream ends here, as after the last decision of its [`Encoder`].
    pub fn finished(self) -> bool {
        let (words, state) = self.0.into_raw_parts();
        words.is_empty() && state == INITIAL_STATE
    }
}

/// The probability of `true` in units of 1/65536, neither 0 nor 65536.
#[derive(Clone, Copy)]
struct Bernoulli(u32);

impl Bernoulli {
    /// Start and length of the interval of 0..65536 that encodes a decision.
    #[inline(always)]
    fn interval(self, decision: bool) -> (u32, NonZeroU32) {
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
        Some(self.interval(*decision.borrow()))
    }
}

impl DecoderModel<PRECISION> for Bernoulli {
    #[inline(always)]
    fn quantile_function(&self, quantile: u32) -> (bool, u32, NonZeroU32) {
        let decision = quantile < self.0;
        let (start, length) = self.interval(decision);
        (decision, start, length)
    }
}

/// An adaptive bit model: the estimated probability of a decision.
///
/// At first it is the mean of the decisions seen, plus half a decision of each kind. Once it has seen
/// [`MAX_COUNT`](Self::MAX_COUNT) decisions, it becomes an exponential moving average over about that many.
#[derive(Clone, Copy)]
pub(super) struct BitModel(u32);

impl BitModel {
    /// Maximum count, that is the length of the average.
    const MAX_COUNT: u32 = 1023;
    /// Learning rates: `65536 / (n + 3/2)` after `n` decisions.
    const RATES: [u32; 1024] = {
        let mut rates = [0; 1024];
        let mut n = 0;
        while n < rates.len() {
            rates[n] = 2 * 65536 / (2 * n as u32 + 3);
            n += 1;
        }
        rates
    };
    /// Probability 1/2, no decisions seen.
    pub const EVEN: Self = Self::new(1 << (PRECISION - 1), 0);

    /// Probability `p` in units of 1/65536, weighted like `seen` decisions, at most [`MAX_COUNT`](Self::MAX_COUNT).
    pub const fn new(p: u32, seen: u32) -> Self {
        Self(p << 16 | seen)
    }

    /// The probability of `true`, in units of 1/65536.
    #[inline(always)]
    pub fn p(self) -> u32 {
        self.0 >> 16
    }

    /// Learns a decision. The average is over at most `limit` decisions.
    #[inline(always)]
    pub fn learn_with_limit(&mut self, decision: bool, limit: u32) {
        // Bit layout: 22 bits of probability, then 10 bits of count.
        let (p, seen) = (self.0 >> 10, self.0 & 1023);
        let target = if decision { (1i64 << 22) - 1 } else { 0 };
        let change = ((target - i64::from(p)) * i64::from(Self::RATES[seen as usize])) >> 16;
        self.0 = ((i64::from(p) + change) as u32) << 10 | (seen + 1).min(limit);
    }

    /// Learns a decision.
    #[inline(always)]
    pub fn learn(&mut self, decision: bool) {
        self.learn_with_limit(decision, Self::MAX_COUNT);
    }

    /// Codes a decision, and learns it.
    #[inline(always)]
    pub fn decide(&mut self, coder: &mut impl Coder, decision: bool) -> bool {
        let decision = coder.decide(decision, self.p());
        self.learn(decision);
        decision
    }
}

/// Codes the lowest `bits` bits of a number with a bit tree: from the highest bit to the lowest, with one bit model
/// per prefix.
///
/// # Shapes
/// models `[2^bits]`
#[inline(always)]
pub(super) fn bit_tree(coder: &mut impl Coder, models: &mut [BitModel], bits: u32, value: u32) -> u32 {
    let mut found = 1;
    for bit in (0..bits).rev() {
        let one = models[found as usize].decide(coder, value >> bit & 1 == 1);
        found = found << 1 | u32::from(one);
    }
    found - (1 << bits)
}

/// `65536 / (1 + e^-x)` at `x` from -8 to 8 in steps of 1/2.
const LOGISTIC: [i32; 33] = [
    22, 36, 60, 98, 162, 267, 439, 720, 1179, 1921, 3108, 4971, 7812, 11955, 17625, 24743, 32768, 40793,
    47911, 53581, 57724, 60565, 62428, 63615, 64357, 64816, 65097, 65269, 65374, 65438, 65476, 65500, 65514,
];

/// The probability of log-odds `x / 256`, in units of 1/65536, interpolated linearly in [`LOGISTIC`].
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

/// The inverse of [`squash`], by the upper 12 bits of the probability.
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

/// Log-odds of a probability: `256 ln(p / (1 - p))`.
#[inline(always)]
pub(super) fn stretch(p: u32) -> i32 {
    i32::from(STRETCH[(p >> 4) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    #[test]
    fn decisions_round_trip_at_the_cost_of_their_probabilities() {
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
                let p = f64::from(p.clamp(MIN_PROBABILITY, (1 << PRECISION) - MIN_PROBABILITY))
                    / f64::from(1 << PRECISION);
                bits -= if decision { p } else { 1.0 - p }.log2();
            }
            let bytes = encoder.finish();
            assert!(can_encode(bytes.len(), n));
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
    fn certain_decisions_are_not_free() {
        for n in [10, 1000, 1_000_000] {
            for (decision, p) in [(true, 1 << PRECISION), (false, 0)] {
                let mut encoder = Encoder::default();
                (0..n).for_each(|_| assert_eq!(encoder.decide(decision, p), decision));
                let bytes = encoder.finish().len();
                assert!(can_encode(bytes, n) && bytes <= 4 + n / 1000, "{n}: {bytes}");
            }
        }
    }

    #[test]
    fn bit_models_converge_to_means_and_stay_within_their_bits() {
        let mut model = BitModel::EVEN;
        for n in 1..1000u32 {
            model.learn(n.is_multiple_of(4));
        }
        assert!((f64::from(model.p()) / 65536.0 - 0.25).abs() < 0.01);
        for decision in [true, false] {
            (0..100_000).for_each(|_| model.learn(decision));
            assert_eq!(model.p() > 1 << 15, decision);
            assert_eq!(model.0 & 1023, BitModel::MAX_COUNT);
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
