//! [`Rouge`]: n-grams, and the longest common subsequence, that two texts share.
//!
//! # Source
//! Lin, ROUGE: A Package for Automatic Evaluation of Summaries; `rouge_score` 0.1.2 without its stemmer.

use crate::bleu::counts;

/// F-measures of ROUGE, 0 to 1, as `rouge_score` computes them without its stemmer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rouge {
    /// ROUGE-1: common words.
    pub one: f64,
    /// ROUGE-2: common pairs of words.
    pub two: f64,
    /// ROUGE-L: the longest common subsequence of words.
    pub longest: f64,
}

impl Rouge {
    /// Compares a hypothesis with its reference.
    pub fn new(hypothesis: &str, reference: &str) -> Self {
        let (hypothesis, reference) = (tokens(hypothesis), tokens(reference));
        let grams = |n| {
            let (own, other) = (counts(&hypothesis, n), counts(&reference, n));
            let shared = own.iter().map(|(gram, count)| other.get(gram).map_or(0, |other| *count.min(other)));
            f_measure(shared.sum(), own.values().sum(), other.values().sum())
        };
        let common = longest_common_subsequence(&hypothesis, &reference);
        let longest = f_measure(common, hypothesis.len() as u64, reference.len() as u64);
        Self { one: grams(1), two: grams(2), longest }
    }
}

/// The harmonic mean of precision and recall; 0 without common parts.
fn f_measure(shared: u64, hypothesis: u64, reference: u64) -> f64 {
    if shared == 0 { 0.0 } else { 2.0 * shared as f64 / (hypothesis + reference) as f64 }
}

/// Runs of ASCII letters and digits, in lower case.
fn tokens(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let runs = lower.split(|c: char| !c.is_ascii_alphanumeric());
    runs.filter(|run| !run.is_empty()).map(Into::into).collect()
}

fn longest_common_subsequence(a: &[String], b: &[String]) -> u64 {
    // lengths[i]: of the words of `a` so far and the first i words of `b`.
    let mut lengths = vec![0; b.len() + 1];
    for word in a {
        let mut diagonal = 0;
        for (i, other) in b.iter().enumerate() {
            let above = lengths[i + 1];
            lengths[i + 1] = if word == other { diagonal + 1 } else { above.max(lengths[i]) };
            diagonal = above;
        }
    }
    lengths[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_those_of_rouge_score() {
        let Some(cases) = crate::reference_cases("metrics/rouge_cases.jsonl") else { return };
        for case in &cases {
            let text = |key: &str| case[key].as_str().unwrap();
            let rouge = Rouge::new(text("hypothesis"), text("reference"));
            for (key, found) in [("rouge1", rouge.one), ("rouge2", rouge.two), ("rougeL", rouge.longest)] {
                let expected = case[key]["fmeasure"].as_f64().unwrap();
                assert!((found - expected).abs() < 1e-12, "{key}: {found}, {case}");
            }
        }
        assert!(cases.len() >= 40);
    }
}
