//! [`Bleu`]: corpus BLEU as sacrebleu computes it.
//!
//! # Source
//! Post, A Call for Clarity in Reporting BLEU Scores; `metrics/bleu.py` of sacrebleu 2.6.

use crate::Tokenization;
use std::{
    collections::{HashMap, HashSet},
    ops::AddAssign,
    str::FromStr,
};

/// The longest n-grams that are counted.
const ORDER: usize = 4;

/// Smoothing of precisions without a match, as sacrebleu names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Smoothing {
    /// `exp`: the first such precision counts half a match, the second a quarter, and so on.
    Exp,
    /// `none`: the score is 0.
    None,
    /// `floor`: a tenth of a match.
    Floor,
    /// `add-k`: one match and one n-gram more for all n above 1.
    AddK,
}

/// Matches that `floor` takes for none.
const FLOOR: f64 = 0.1;
/// Matches and n-grams that `add-k` adds.
const ADDED: f64 = 1.0;

impl Smoothing {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Exp, Self::None, Self::Floor, Self::AddK];

    /// The name in sacrebleu.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exp => "exp",
            Self::None => "none",
            Self::Floor => "floor",
            Self::AddK => "add-k",
        }
    }
}

impl FromStr for Smoothing {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|smoothing| smoothing.name() == name);
        known.ok_or_else(|| "expected exp, none, floor or add-k".into())
    }
}

/// Settings of BLEU. The default is that of sacrebleu.
#[derive(Clone, Copy, Debug)]
pub struct Bleu {
    /// How texts are split into words.
    pub tokenization: Tokenization,
    /// What replaces precisions without a match.
    pub smoothing: Smoothing,
    /// Compare in lower case.
    pub lowercase: bool,
    /// The longest n-grams that count, at most 4.
    pub order: usize,
    /// Ignore n-grams longer than the hypothesis: for single sentences.
    pub effective_order: bool,
}

impl Default for Bleu {
    fn default() -> Self {
        Self {
            tokenization: Tokenization::V13a,
            smoothing: Smoothing::Exp,
            lowercase: false,
            order: ORDER,
            effective_order: false,
        }
    }
}

/// The counts from which a score is computed; a sum over sentences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BleuStatistics {
    /// Matched n-grams, for n from 1 on.
    pub matches: [u64; ORDER],
    /// N-grams of the hypotheses.
    pub totals: [u64; ORDER],
    /// Words of the hypotheses.
    pub hypothesis: u64,
    /// Words of the references.
    pub reference: u64,
}

impl AddAssign for BleuStatistics {
    fn add_assign(&mut self, other: Self) {
        self.matches.iter_mut().zip(other.matches).for_each(|(sum, n)| *sum += n);
        self.totals.iter_mut().zip(other.totals).for_each(|(sum, n)| *sum += n);
        self.hypothesis += other.hypothesis;
        self.reference += other.reference;
    }
}

impl Bleu {
    /// Counts the matches of a hypothesis with its references. The reference length is the one closest to the hypothesis.
    pub fn statistics(&self, hypothesis: &str, references: &[&str]) -> BleuStatistics {
        let hypothesis = self.tokens(hypothesis);
        let references: Vec<Vec<String>> = references.iter().map(|text| self.tokens(text)).collect();
        let length = hypothesis.len();
        let closest = references.iter().map(Vec::len).min_by_key(|n| (n.abs_diff(length), *n));
        let mut statistics = BleuStatistics {
            hypothesis: length as u64,
            reference: closest.unwrap_or(0) as u64,
            ..BleuStatistics::default()
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

    /// The score, from 0 to 100.
    pub fn score(&self, statistics: &BleuStatistics) -> f64 {
        let BleuStatistics { matches, totals, hypothesis, reference } = *statistics;
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
                // No hypothesis is that long.
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

    /// The signature of these settings in sacrebleu, without its version.
    pub fn signature(&self, references: usize) -> String {
        let case = if self.lowercase { "lc" } else { "mixed" };
        let effective = if self.effective_order { "yes" } else { "no" };
        let smoothing = match self.smoothing {
            Smoothing::Exp | Smoothing::None => self.smoothing.name().into(),
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

/// The n-grams of a text, with their counts.
pub(crate) fn counts(tokens: &[String], n: usize) -> HashMap<&[String], u64> {
    let mut counts = HashMap::new();
    tokens.windows(n).for_each(|gram| *counts.entry(gram).or_default() += 1);
    counts
}

/// Distinct-n: the share of different n-grams among all n-grams of the texts, from the words of each text. 1 if none
/// repeats, 0 without n-grams.
///
/// # Source
/// Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models, section 5.
pub fn distinct(texts: &[Vec<String>], n: usize) -> f64 {
    let all: usize = texts.iter().map(|tokens| (tokens.len() + 1).saturating_sub(n)).sum();
    let different: HashSet<&[String]> = texts.iter().flat_map(|tokens| tokens.windows(n)).collect();
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
            tokenization: text(options, "tokenize").parse().unwrap(),
            smoothing,
            lowercase: options["lowercase"].as_bool().unwrap(),
            order: options["max_ngram_order"].as_u64().unwrap() as usize,
            effective_order: options["effective_order"].as_bool().unwrap(),
        }
    }

    #[test]
    fn scores_are_those_of_sacrebleu() {
        let Some(cases) = crate::reference_cases("metrics/bleu_cases.jsonl") else { return };
        for case in &cases {
            let bleu = bleu(&case["options"]);
            let streams = case["reference_streams"].as_array().unwrap();
            let mut sum = BleuStatistics::default();
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
