//! [`MicroBatchReport`]: what a micro-batch adds to the report of its step, as processes exchange it.

use crate::report::StepReport;

/// Losses of one micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct MicroBatchReport {
    pub windows: usize,
    /// Learned tokens.
    pub tokens: usize,
    /// Its share of the learned tokens of the step.
    weight: f64,
    /// Means over the tokens of the micro-batch.
    loss: f64,
    accuracy: f64,
    /// Z-loss, and the teacher's divergence, hidden and relation distances, where they are part of the loss.
    terms: [Option<f64>; 4],
}

impl MicroBatchReport {
    /// Numbers of a report.
    pub const NUMBERS: usize = 13;

    /// Of a micro-batch without a learned token.
    pub fn empty(windows: usize) -> Self {
        Self { windows, ..Self::default() }
    }

    /// Of a micro-batch with this report, which has this share of the step's tokens.
    pub fn new(windows: usize, weight: f64, report: &StepReport) -> Self {
        let StepReport { tokens, loss, accuracy, z_loss, divergence, hidden, relation, .. } = *report;
        Self { windows, tokens, weight, loss, accuracy, terms: [z_loss, divergence, hidden, relation] }
    }

    /// A term that is missing is a flag of 0 and a 0.
    pub fn to_numbers(self) -> impl Iterator<Item = f64> {
        let Self { windows, tokens, weight, loss, accuracy, terms } = self;
        let terms = terms.into_iter().flat_map(|term| [f64::from(term.is_some()), term.unwrap_or(0.0)]);
        [windows as f64, tokens as f64, weight, loss, accuracy].into_iter().chain(terms)
    }

    /// The report of these [`NUMBERS`](Self::NUMBERS).
    pub fn from_numbers(numbers: &[f64]) -> Self {
        let term = |index: usize| (numbers[index] == 1.0).then(|| numbers[index + 1]);
        Self {
            windows: numbers[0] as usize,
            tokens: numbers[1] as usize,
            weight: numbers[2],
            loss: numbers[3],
            accuracy: numbers[4],
            terms: [term(5), term(7), term(9), term(11)],
        }
    }

    /// The report of a step, added in the order of its micro-batches.
    pub fn sum(parts: &[Self]) -> StepReport {
        let mut sum = StepReport::default();
        for part in parts.iter().filter(|part| part.tokens > 0) {
            sum.tokens += part.tokens;
            sum.loss += part.loss * part.weight;
            sum.accuracy += part.accuracy * part.weight;
            let StepReport { z_loss, divergence, hidden, relation, .. } = &mut sum;
            for (sum, term) in [z_loss, divergence, hidden, relation].into_iter().zip(part.terms) {
                if let Some(term) = term {
                    *sum = Some(sum.unwrap_or(0.0) + term * part.weight);
                }
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_restore_every_report() {
        let report = StepReport {
            tokens: 77,
            loss: 1.0 / 3.0,
            accuracy: 0.25,
            divergence: Some(f64::INFINITY),
            relation: Some(-0.0),
            ..StepReport::default()
        };
        for part in [MicroBatchReport::new(4, 0.3, &report), MicroBatchReport::empty(4)] {
            let numbers: Vec<f64> = part.to_numbers().collect();
            assert_eq!(numbers.len(), MicroBatchReport::NUMBERS);
            assert_eq!(MicroBatchReport::from_numbers(&numbers), part);
        }
    }

    #[test]
    fn a_step_is_the_weighted_sum_of_its_micro_batches() {
        let part = |weight: f64, tokens: usize, loss: f64, hidden: Option<f64>| {
            let report = StepReport { tokens, loss, hidden, accuracy: 0.5, ..StepReport::default() };
            MicroBatchReport::new(2, weight, &report)
        };
        let parts =
            [part(0.25, 10, 2.0, Some(4.0)), MicroBatchReport::empty(2), part(0.75, 30, 4.0, Some(8.0))];
        let sum = MicroBatchReport::sum(&parts);
        assert_eq!((sum.tokens, sum.loss, sum.accuracy), (40, 3.5, 0.5));
        assert_eq!((sum.hidden, sum.divergence), (Some(7.0), None));
    }
}
