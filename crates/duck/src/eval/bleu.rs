//! [`Bleu`]: corpus BLEU as sacrebleu computes it.
//!
//! # Source
//! Post, A Call for Clarity in Reporting BLEU Scores; `metrics/bleu.py` of sacrebleu 2.6.

use super::tokenize::Tokenization;
use clap::ValueEnum;
use std::{collections::HashMap, ops::AddAssign};

/// The longest n-grams that are counted.
const ORDER: usize = 4;

/// What is done where no n-gram of some length matches.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum Smoothing {
    /// The first such precision is half a match, the second a quarter, and so on.
    Exp,
    /// The score is 0.
    None,
    /// A tenth of a match.
    Floor,
    /// One match and one n-gram more for all lengths above 1.
    AddK,
}

/// What floor takes for no match.
const FLOOR: f64 = 0.1;
/// What add-k adds.
const ADDED: f64 = 1.0;

/// How a score is computed.
#[derive(Clone, Copy, Debug)]
pub struct Bleu {
    pub tokenization: Tokenization,
    pub smoothing: Smoothing,
    pub lowercase: bool,
    /// The longest n-grams that count, at most 4.
    pub order: usize,
    /// Leave out lengths that are longer than the hypothesis: for single sentences.
    pub effective_order: bool,
}

/// What a score is made of; sums over sentences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    pub matches: [u64; ORDER],
    pub totals: [u64; ORDER],
    pub hypothesis: u64,
    pub reference: u64,
}

impl AddAssign for Statistics {
    fn add_assign(&mut self, other: Self) {
        self.matches.iter_mut().zip(other.matches).for_each(|(sum, n)| *sum += n);
        self.totals.iter_mut().zip(other.totals).for_each(|(sum, n)| *sum += n);
        self.hypothesis += other.hypothesis;
        self.reference += other.reference;
    }
}

impl Bleu {
    /// Matches of a hypothesis with its references; the length is that of the reference that is closest to it.
    pub fn statistics(&self, hypothesis: &str, references: &[&str]) -> Statistics {
        let hypothesis = self.tokens(hypothesis);
        let references: Vec<Vec<String>> = references.iter().map(|text| self.tokens(text)).collect();
        let length = hypothesis.len();
        let closest = references.iter().map(Vec::len).min_by_key(|n| (n.abs_diff(length), *n));
        let mut statistics = Statistics {
            hypothesis: length as u64,
            reference: closest.unwrap_or(0) as u64,
            ..Statistics::default()
        };
        for n in 1..=self.order.min(ORDER) {
            let mut most: HashMap<&[String], u64> = HashMap::new();
            for reference in &references {
                for (gram, count) in counts(reference, n) {
                    let known = most.entry(gram).or_default();
                    *known = count.max(*known);
                }
            }
            let own = counts(&hypothesis, n);
            let matches = own.iter().map(|(gram, count)| most.get(gram).map_or(0, |most| *count.min(most)));
            statistics.matches[n - 1] = matches.sum();
            statistics.totals[n - 1] = own.values().sum();
        }
        statistics
    }

    /// 0 to 100.
    pub fn score(&self, statistics: &Statistics) -> f64 {
        let Statistics { matches, totals, hypothesis, reference } = *statistics;
        let order = self.order.min(ORDER);
        if matches[..order].iter().all(|n| *n == 0) {
            return 0.0;
        }
        let brevity = match hypothesis < reference {
            true => (1.0 - reference as f64 / hypothesis as f64).exp(),
            false => 1.0,
        };
        let (mut logs, mut counted, mut share) = (0.0, order, 1.0);
        for n in 0..order {
            let (mut matches, mut total) = (matches[n] as f64, totals[n] as f64);
            if self.smoothing == Smoothing::AddK && n > 0 {
                (matches, total) = (matches + ADDED, total + ADDED);
            }
            if total == 0.0 {
                // Longer than every hypothesis.
                if !self.effective_order {
                    return 0.0;
                }
                counted = n;
                break;
            }
            let matches = match self.smoothing {
                _ if matches > 0.0 => matches,
                Smoothing::Exp => {
                    share /= 2.0;
                    share
                }
                Smoothing::Floor => FLOOR,
                Smoothing::None | Smoothing::AddK => return 0.0,
            };
            logs += (100.0 * matches / total).ln();
        }
        brevity * (logs / counted as f64).exp()
    }

    /// The signature that sacrebleu gives for the same settings, without its version.
    pub fn signature(&self, references: usize) -> String {
        let case = if self.lowercase { "lc" } else { "mixed" };
        let effective = if self.effective_order { "yes" } else { "no" };
        let smoothing = match self.smoothing {
            Smoothing::Exp => "exp".into(),
            Smoothing::None => "none".into(),
            Smoothing::Floor => format!("floor[{FLOOR:.2}]"),
            Smoothing::AddK => format!("add-k[{ADDED:.2}]"),
        };
        let tokenization = self.tokenization.name();
        format!("nrefs:{references}|case:{case}|eff:{effective}|tok:{tokenization}|smooth:{smoothing}")
    }

    fn tokens(&self, text: &str) -> Vec<String> {
        let lower = self.lowercase.then(|| text.to_lowercase());
        self.tokenization.tokens(lower.as_deref().unwrap_or(text))
    }
}

/// The n-grams of a text and how often each is there.
pub fn counts(tokens: &[String], n: usize) -> HashMap<&[String], u64> {
    let mut counts = HashMap::new();
    tokens.windows(n).for_each(|gram| *counts.entry(gram).or_default() += 1);
    counts
}

/// Different n-grams over all n-grams of the texts: 1 where none is said twice, 0 of no n-grams.
///
/// # Source
/// Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models, section 5.
pub fn distinct(texts: &[Vec<String>], n: usize) -> f64 {
    let all: usize = texts.iter().map(|tokens| (tokens.len() + 1).saturating_sub(n)).sum();
    let different: std::collections::HashSet<&[String]> =
        texts.iter().flat_map(|tokens| tokens.windows(n)).collect();
    if all == 0 { 0.0 } else { different.len() as f64 / all as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn text<'a>(value: &'a Value, key: &str) -> &'a str {
        value[key].as_str().unwrap()
    }

    fn bleu(options: &Value) -> Bleu {
        let value = options["smooth_value"].as_f64();
        let smoothing = match (text(options, "smooth_method"), value) {
            ("exp", None) => Smoothing::Exp,
            ("none", None) => Smoothing::None,
            ("floor", Some(FLOOR)) => Smoothing::Floor,
            ("add-k", Some(ADDED)) => Smoothing::AddK,
            other => panic!("{other:?}"),
        };
        Bleu {
            tokenization: Tokenization::from_str(text(options, "tokenize"), false).unwrap(),
            smoothing,
            lowercase: options["lowercase"].as_bool().unwrap(),
            order: options["max_ngram_order"].as_u64().unwrap() as usize,
            effective_order: options["effective_order"].as_bool().unwrap(),
        }
    }

    #[test]
    fn scores_are_those_of_sacrebleu() {
        let Some(cases) = crate::eval::cases("metrics/bleu_cases.jsonl") else { return };
        for case in &cases {
            let bleu = bleu(&case["options"]);
            let streams = case["reference_streams"].as_array().unwrap();
            let mut sum = Statistics::default();
            for (i, hypothesis) in case["hypotheses"].as_array().unwrap().iter().enumerate() {
                let references: Vec<&str> =
                    streams.iter().map(|stream| stream[i].as_str().unwrap()).collect();
                sum += bleu.statistics(hypothesis.as_str().unwrap(), &references);
            }
            let counts = |key: &str| -> Vec<u64> {
                case[key].as_array().unwrap().iter().map(|n| n.as_f64().unwrap() as u64).collect()
            };
            let id = text(case, "id");
            if bleu.smoothing != Smoothing::AddK {
                assert_eq!(sum.matches[..bleu.order], counts("counts"), "{id}");
                assert_eq!(sum.totals[..bleu.order], counts("totals"), "{id}");
            }
            let lengths = [&case["sys_len"], &case["ref_len"]].map(|n| n.as_u64().unwrap());
            assert_eq!([sum.hypothesis, sum.reference], lengths, "{id}");
            let (found, expected) = (bleu.score(&sum), case["score"].as_f64().unwrap());
            assert!((found - expected).abs() < 1e-9, "{id}: {found}, sacrebleu has {expected}");
            if let Some(signature) = case["signature"].as_str() {
                assert_eq!(format!("{}|version:2.6.0", bleu.signature(streams.len())), signature, "{id}");
            }
        }
        assert!(cases.len() > 80);
    }

    #[test]
    fn texts_that_repeat_themselves_are_less_distinct() {
        let texts = |lines: &[&str]| -> Vec<Vec<String>> {
            lines.iter().map(|line| Tokenization::None.tokens(line)).collect()
        };
        assert_eq!(distinct(&texts(&["a b", "c"]), 1), 1.0);
        assert_eq!(distinct(&texts(&["a b", "a b"]), 2), 0.5);
        assert_eq!(distinct(&texts(&["a", ""]), 2), 0.0);
    }
}
