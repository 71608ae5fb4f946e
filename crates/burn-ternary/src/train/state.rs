//! [`TrainState`]: the position of a run.

use serde::{Deserialize, Serialize};

/// The state of a run besides its tensors: step, counters and running means. A file restores its floats bit for bit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainState {
    /// Number of optimizer steps done, including skipped ones; the name of the checkpoint.
    pub step: usize,
    /// Seed of the run.
    pub seed: u64,
    /// Training windows consumed: the position in the data order, which is a pure function of (seed, index).
    pub windows_seen: u64,
    /// Number of learned tokens so far.
    pub tokens: u64,
    /// Running mean of the loss that the spike guard compares with, nats per token.
    #[serde(with = "exact_option")]
    pub loss_average: Option<f64>,
    /// The lowest of these means, after the first steps.
    #[serde(default, with = "exact_option")]
    pub lowest_average: Option<f64>,
    /// Running share of steps whose loss was a spike.
    #[serde(default, with = "exact")]
    pub spike_share: f64,
    /// Number of consecutive steps whose loss was a spike or not finite.
    pub bad_steps: usize,
    /// Number of skipped steps of the whole run.
    pub skipped_steps: usize,
    /// Number of steps of the whole run without a learned token, which changed nothing.
    #[serde(default)]
    pub empty_steps: usize,
    /// Number of rollbacks to an earlier checkpoint.
    pub rollbacks: usize,
    /// Lowest validation loss, in nats per token.
    #[serde(with = "exact_option")]
    pub best_valid_loss: Option<f64>,
    /// The step of that loss; `None` in checkpoints of versions that did not record it.
    #[serde(default)]
    pub best_valid_step: Option<usize>,
    /// Validation losses of the initial weights, if the run started from a model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<StartLoss>,
    /// Wall time over all sessions of the run, seconds.
    #[serde(with = "exact")]
    pub elapsed_s: f64,
}

/// Validation loss of the initial weights before and after quantization, in nats per token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartLoss {
    /// Before quantization.
    #[serde(with = "exact")]
    pub float: f64,
    /// After quantization.
    #[serde(with = "exact")]
    pub rounded: f64,
}

/// `f64` as text: the shortest decimal that the standard library parses to the same bits (NaN stays NaN). The float parser of
/// serde_json may be off by one unit in the last place, and JSON has no infinities.
mod exact {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{value:?}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|_| D::Error::custom(format!("expected a number in quotes, found {text:?}")))
    }
}

mod exact_option {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Exact(#[serde(with = "super::exact")] f64);

    pub fn serialize<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
        value.map(Exact).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
        Ok(Option::deserialize(deserializer)?.map(|Exact(value)| value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn state_comes_back_bit_for_bit() {
        let mut random = ChaCha8Rng::from_os_rng();
        let mut values = vec![0.0, -0.0, 5e-324, -2.2e-308, f64::MIN_POSITIVE, f64::MAX];
        values.extend([f64::INFINITY, f64::NEG_INFINITY, 0.1 + 0.2, 1.0 / 3.0]);
        // Half of them subnormal: exponent bits zero.
        let subnormal = (1u64 << 63) | ((1 << 52) - 1);
        for _ in 0..2000 {
            let bits: u64 = random.random();
            values.extend([f64::from_bits(bits), f64::from_bits(bits & subnormal)]);
        }
        values.retain(|value| !value.is_nan());
        for value in values {
            let state = TrainState {
                step: random.random::<u64>() as usize,
                seed: random.random(),
                windows_seen: u64::MAX,
                loss_average: Some(value),
                lowest_average: random.random::<bool>().then_some(value),
                spike_share: value,
                bad_steps: 1,
                skipped_steps: 2,
                empty_steps: 4,
                rollbacks: 3,
                best_valid_loss: random.random::<bool>().then_some(value),
                best_valid_step: random.random::<bool>().then_some(5),
                start: Some(StartLoss { float: value, rounded: 1.0 / 3.0 }),
                elapsed_s: value,
                tokens: u64::MAX - 1,
            };
            let text = serde_json::to_vec(&state).unwrap();
            let back: TrainState = serde_json::from_slice(&text).unwrap();
            assert_eq!(back, state);
            assert_eq!(back.elapsed_s.to_bits(), value.to_bits());
            assert_eq!(back.loss_average.map(f64::to_bits), Some(value.to_bits()));
        }
        let nan = TrainState { elapsed_s: f64::NAN, ..TrainState::default() };
        let text = serde_json::to_vec(&nan).unwrap();
        assert!(serde_json::from_slice::<TrainState>(&text).unwrap().elapsed_s.is_nan());
    }
}
