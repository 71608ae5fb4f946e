//! [`SpikeGuard`]: which steps are skipped.

use super::TrainState;

/// Weight of a new value in the exponential running means of the loss and of the share of spikes.
const AVERAGE_RATE: f64 = 0.02;
/// Steps until the running mean is good enough to compare with.
const WARMUP_STEPS: usize = 20;
/// Minimum excess of a spike over the running mean, in nats per token: a perplexity `e` times as high.
const MIN_EXCESS: f64 = 1.0;
/// Minimum excess for a step of one token, whose loss exceeds the mean by chance: four standard deviations of 2.5 nats each (an
/// assumption, not a measurement).
const MIN_EXCESS_OF_ONE_TOKEN: f64 = 10.0;
/// Share of spikes above which they count as harder parts of the text, and are learned: about the fourth in fifty steps. A run that
/// diverges has consecutive ones, and returns to its last checkpoint.
const COMMON_SPIKE_SHARE: f64 = 0.05;

/// The rule by which a step is skipped.
///
/// The loss of a step with `n` learned tokens is a spike if it exceeds its running mean both by the factor and by
/// `max(1, 10 / sqrt(n))` nats per token. The ratio alone would call every step of a memorized text a spike, whose mean
/// is near 0, and a rare token in a step of few tokens.
///
/// Spikes are rare. If more than 5 % of the steps (a running share) are spikes, the text has harder parts, which would never be learned
/// if their steps were skipped: they are taken. They still count as bad steps; a run with `run.max_bad_steps` consecutive bad steps
/// diverges.
///
/// # Source
/// Relative and absolute tolerance as in Lightning's `SpikeDetection` (`rtol`, `atol`).
#[derive(Clone, Copy, Debug)]
pub struct SpikeGuard {
    /// A spike exceeds this multiple of the running mean; 0 disables the guard.
    pub factor: f64,
}

impl SpikeGuard {
    /// Whether the mean `loss` of `tokens` learned tokens is a spike above the running mean `average`.
    fn is_spike(self, loss: f64, tokens: usize, average: f64) -> bool {
        let excess = MIN_EXCESS.max(MIN_EXCESS_OF_ONE_TOKEN / (tokens as f64).sqrt());
        self.factor > 0.0 && loss > average * self.factor && loss > average + excess
    }

    /// Whether to take a step, after `learned_steps` steps with learned tokens; counts bad steps and spikes.
    pub(super) fn admits(
        self,
        state: &mut TrainState,
        loss: f64,
        norm: f64,
        tokens: usize,
        learned_steps: usize,
    ) -> bool {
        if !(loss.is_finite() && norm.is_finite()) {
            state.bad_steps += 1;
            return false;
        }
        let average = state.loss_average.filter(|_| learned_steps >= WARMUP_STEPS);
        let spike = average.is_some_and(|average| self.is_spike(loss, tokens, average));
        let common = state.spike_share > COMMON_SPIKE_SHARE;
        state.bad_steps = if spike { state.bad_steps + 1 } else { 0 };
        state.spike_share += AVERAGE_RATE * (f64::from(spike) - state.spike_share);
        !spike || common
    }

    /// Adds the loss of a step that was taken to the running mean.
    pub(super) fn record(state: &mut TrainState, loss: f64, learned_steps: usize) {
        let average = state.loss_average.unwrap_or(loss);
        let average = average + AVERAGE_RATE * (loss - average);
        state.loss_average = Some(average);
        if learned_steps >= WARMUP_STEPS {
            state.lowest_average = Some(state.lowest_average.map_or(average, |lowest| lowest.min(average)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spike_exceeds_the_mean_by_its_ratio_and_by_a_floor() {
        let guard = SpikeGuard { factor: 3.0 };
        // Loss, learned tokens and mean.
        for (loss, tokens, average, spike) in [
            (6.1, 2048, 2.0, true),
            (5.9, 2048, 2.0, false),
            (f64::INFINITY, 2048, 2.0, true),
            // Three times nothing.
            (1e-3, 2048, 1e-5, false),
            (0.9, 2048, 1e-5, false),
            (1.1, 2048, 1e-5, true),
            (1.1, 100, 0.3, false),
            // Few tokens, of which one may be rare.
            (9.0, 1, 0.3, false),
            (9.0, 16, 0.3, true),
        ] {
            assert_eq!(guard.is_spike(loss, tokens, average), spike, "{loss} {tokens} {average}");
        }
        assert!(!SpikeGuard { factor: 0.0 }.is_spike(1e9, 2048, 1.0));
    }

    /// Steps that are taken of a run with the mean 1 whose losses, from the hundredth on, are those given.
    fn taken(losses: impl IntoIterator<Item = f64>) -> (Vec<bool>, TrainState) {
        let mut state = TrainState { loss_average: Some(1.0), ..TrainState::default() };
        let guard = SpikeGuard { factor: 3.0 };
        let admit = |loss| guard.admits(&mut state, loss, 1.0, 2048, 100);
        (losses.into_iter().map(admit).collect(), state)
    }

    #[test]
    fn rare_spikes_are_skipped_and_common_ones_are_what_the_text_is_like() {
        let rare = (0..3000).map(|step| if step % 60 == 59 { 9.0 } else { 1.0 });
        let (steps, _) = taken(rare);
        assert_eq!(steps.iter().filter(|taken| !**taken).count(), 50);
        let common = (0..3000).map(|step| if step % 6 == 5 { 9.0 } else { 1.0 });
        let (steps, state) = taken(common);
        assert!(steps.iter().filter(|taken| !**taken).count() < 10, "hard parts of a text are learned");
        assert_eq!(state.bad_steps, 1);
        // In a row, taken or not.
        let (steps, state) = taken([9.0; 5]);
        assert_eq!((steps, state.bad_steps), (vec![false, false, false, true, true], 5));
        let (steps, state) = taken([f64::NAN, 1.0, f64::INFINITY, f64::NAN]);
        assert_eq!((steps, state.bad_steps), (vec![false, true, false, false], 2));
    }
}
