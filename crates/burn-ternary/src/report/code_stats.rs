//! Statistics of the ternary codes of a model over a run.

use crate::nn::DuckQuantized;

/// Codes and scales of a model, compared with those seen before.
pub struct CodeStats {
    /// Means over all layers.
    pub shares: CodeShares,
    /// Counts of the codes -1, 0 and +1 per layer.
    pub counts: Vec<(String, [u64; 3])>,
}

/// Means over all layers of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CodeShares {
    /// Share of zero codes over all linear layers.
    pub zero_fraction: f64,
    /// Code flip rate: share of codes that changed since the last evaluation; none at the first.
    pub flipped: Option<f64>,
    /// Scale drift: `mean |ln(scale / initial scale)|` over all scales.
    pub scale_drift: f64,
}

/// Keeps the initial scales, and the codes of the last evaluation.
#[derive(Clone, Debug, PartialEq)]
pub struct CodeTracker {
    initial_scales: Vec<f32>,
    last: Option<Evaluation>,
}

#[derive(Clone, Debug, PartialEq)]
struct Evaluation {
    shares: CodeShares,
    codes: Vec<i8>,
}

impl CodeTracker {
    /// Starts from an untrained model; none for a float twin.
    pub fn new(initial: &DuckQuantized) -> Option<Self> {
        let initial_scales = scales(initial);
        (!initial_scales.is_empty()).then_some(Self { initial_scales, last: None })
    }

    /// Statistics of a model of the same shape.
    pub fn update(&mut self, model: &DuckQuantized) -> CodeStats {
        let (codes, counts) = codes(model);
        let zeros: u64 = counts.iter().map(|(_, count)| count[1]).sum();
        let flipped = self.last.as_ref().map(|last| {
            let changed = last.codes.iter().zip(&codes).filter(|(last, now)| last != now).count();
            changed as f64 / codes.len() as f64
        });
        let drift: f64 = scales(model)
            .iter()
            .zip(&self.initial_scales)
            .map(|(now, start)| f64::from(now / start).ln().abs())
            .sum();
        let shares = CodeShares {
            zero_fraction: zeros as f64 / codes.len() as f64,
            flipped,
            scale_drift: drift / self.initial_scales.len() as f64,
        };
        self.last = Some(Evaluation { shares, codes });
        CodeStats { shares, counts }
    }

    /// The last shares of an earlier session, if there are any, with the counts of `model`.
    pub fn recall(&self, model: &DuckQuantized) -> Option<CodeStats> {
        let shares = self.last.as_ref()?.shares;
        Some(CodeStats { shares, counts: codes(model).1 })
    }

    /// For a checkpoint, little-endian: the number of initial scales as `u64`, these as `f32`; after an evaluation, the number of
    /// codes as `u64`, the three shares as `f64` (NaN: none), and the codes plus one, four to a byte from the lowest bits on.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = (self.initial_scales.len() as u64).to_le_bytes().to_vec();
        bytes.extend(self.initial_scales.iter().flat_map(|scale| scale.to_le_bytes()));
        if let Some(Evaluation { shares, codes }) = &self.last {
            let CodeShares { zero_fraction, flipped, scale_drift } = *shares;
            bytes.extend((codes.len() as u64).to_le_bytes());
            bytes.extend(
                [zero_fraction, flipped.unwrap_or(f64::NAN), scale_drift].map(f64::to_le_bytes).concat(),
            );
            let pack = |codes: &[i8]| codes.iter().rev().fold(0, |byte, code| byte << 2 | (code + 1) as u8);
            bytes.extend(codes.chunks(4).map(pack));
        }
        bytes
    }

    /// The inverse of [`to_bytes`](Self::to_bytes); none where these are not the bytes of a tracker of a model like `model`.
    pub fn from_bytes(bytes: &[u8], model: &DuckQuantized) -> Option<Self> {
        let mut rest = bytes;
        let initial_scales: Vec<f32> = {
            let number = usize::try_from(u64::from_le_bytes(take(&mut rest)?)).ok()?;
            let (scales, after) = rest.split_at_checked(number.checked_mul(4)?)?;
            rest = after;
            scales.chunks_exact(4).map(|scale| f32::from_le_bytes(scale.try_into().expect("four"))).collect()
        };
        if initial_scales.len() != scales(model).len() {
            return None;
        }
        if rest.is_empty() {
            return Some(Self { initial_scales, last: None });
        }
        let number = usize::try_from(u64::from_le_bytes(take(&mut rest)?)).ok()?;
        let [zero_fraction, flipped, scale_drift] =
            [take(&mut rest)?, take(&mut rest)?, take(&mut rest)?].map(f64::from_le_bytes);
        let flipped = (!flipped.is_nan()).then_some(flipped);
        let shares = CodeShares { zero_fraction, flipped, scale_drift };
        if number != codes(model).0.len() || rest.len() != number.div_ceil(4) {
            return None;
        }
        let unpacked = rest.iter().flat_map(|byte| [0, 2, 4, 6].map(|shift| (byte >> shift & 3) as i8 - 1));
        let evaluation = Evaluation { shares, codes: unpacked.take(number).collect() };
        Some(Self { initial_scales, last: Some(evaluation) })
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*first)
}

/// All codes, and the counts of each layer.
fn codes(model: &DuckQuantized) -> (Vec<i8>, Vec<(String, [u64; 3])>) {
    let mut codes = Vec::new();
    let mut counts = Vec::new();
    for (name, linear) in model.linears() {
        let Some(layer) = linear.codes() else { continue };
        let mut count = [0; 3];
        for code in layer.into_data().iter::<f32>() {
            let code = code as i8;
            count[(code + 1) as usize] += 1;
            codes.push(code);
        }
        counts.push((name, count));
    }
    (codes, counts)
}

fn scales(model: &DuckQuantized) -> Vec<f32> {
    let mut scales = Vec::new();
    for (_, linear) in model.linears() {
        if let Some(quantizer) = &linear.quantizer {
            scales.extend(quantizer.scales(linear.weight.val()).into_data().iter::<f32>());
        }
    }
    scales
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{self, device};
    use crate::nn::DuckConfig;
    use crate::quant::QuantConfig;

    fn model(seed: u64, width: usize) -> DuckQuantized {
        let config = DuckConfig { vocab_size: 61, d_ff: width, ..DuckConfig::duck_tiny() };
        config.init(&QuantConfig::default(), seed, &device(device::compiled()[0]).unwrap())
    }

    #[test]
    fn a_tracker_comes_back_from_its_bytes() {
        let (first, second) = (model(1, 90), model(2, 90));
        let mut tracker = CodeTracker::new(&first).unwrap();
        for updates in 0..3 {
            let bytes = tracker.to_bytes();
            let mut loaded = CodeTracker::from_bytes(&bytes, &first).unwrap();
            assert_eq!(loaded, tracker);
            assert_eq!(
                loaded.recall(&first).map(|stats| stats.shares.flipped.is_some()),
                [None, Some(false), Some(true)][updates]
            );
            let [expected, found] = [&mut tracker, &mut loaded].map(|tracker| tracker.update(&second));
            assert_eq!(found.shares, expected.shares);
            assert_eq!(found.counts, expected.counts);
            for wrong in [&bytes[..bytes.len() - 1], &[&bytes[..], &[0]].concat(), &bytes[..7], &[]] {
                assert_eq!(CodeTracker::from_bytes(wrong, &first), None);
            }
            assert_eq!(CodeTracker::from_bytes(&bytes, &model(1, 96)), None);
        }
        assert_eq!(CodeTracker::from_bytes(&[255; 64], &first), None);
        let float =
            DuckConfig::duck_tiny().init(&QuantConfig::default().float(), 1, &first.embedding.device());
        assert!(CodeTracker::new(&float).is_none());
    }
}
