//! Evaluates language models: likelihood of texts, multiple choice, generated answers, confidence intervals.
//!
//! | question | item |
//! |---|---|
//! | How well does a model predict a text? | [`Evaluator`] and [`Likelihood`]: loss, perplexity, bits per byte |
//! | Does it prefer the correct choice? | [`ChoiceAccuracy`] |
//! | How close are its answers to references? | [`answer()`] and [`Similarity`]: [BLEU](Bleu), [ROUGE](Rouge), exact matches |
//! | How certain are these numbers? | [`Bootstrap`] and [`Resampled`]: 95 % confidence intervals, paired over models |
//!
//! Metrics are sums over documents, so that a bootstrap resamples documents and adds up what was computed once.
//! BLEU equals sacrebleu's, and ROUGE that of `rouge_score`, to the last digits of a float64.
//!
//! # Examples
//!
//! BLEU of three answers, with its confidence interval:
//!
//! ```
//! use ternary_eval::{Bleu, Bootstrap, Resampled};
//!
//! let bleu = Bleu::default();
//! let pairs = [
//!     ("a duck swims on the pond", "the duck swims on the pond"),
//!     ("it is a grey goose", "it is a white goose"),
//!     ("quack", "quack"),
//! ];
//! let statistics = pairs.map(|(answer, reference)| bleu.statistics(answer, &[reference]));
//! let resampled = Resampled::new(&statistics, Bootstrap { resamples: 1000, seed: 1 });
//! let estimate = resampled.estimate(|statistics| bleu.score(statistics)).expect("there are documents");
//! let [low, high] = estimate.interval().expect("there are resamples");
//! assert!((40.0..60.0).contains(&estimate.value) && low <= estimate.value && estimate.value <= high);
//! ```
//!
//! Perplexity of a model on a file:
//!
//! ```no_run
//! use ternary_eval::{Evaluator, Likelihood, read_examples};
//! use ternary_infer::{Engine, EngineOptions};
//!
//! let engine = Engine::load("model.gguf", EngineOptions::default())?;
//! let evaluator = Evaluator::new(&engine, engine.context() / 2)?;
//! let mut total = Likelihood::default();
//! for example in read_examples("valid.txt".as_ref())? {
//!     for passage in evaluator.passages(&example)? {
//!         total += evaluator.likelihood(&passage, |_| ())?;
//!     }
//! }
//! println!("perplexity {:.3}", total.perplexity());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![warn(missing_docs)]

mod answer;
mod bleu;
mod bootstrap;
mod example;
mod likelihood;
mod rouge;
mod tokenize;

pub use answer::{Similarity, answer};
pub use bleu::{Bleu, BleuStatistics, Smoothing, distinct};
pub use bootstrap::{Bootstrap, Estimate, Resampled};
pub use example::{Example, ExampleError, read_examples};
pub use likelihood::{ChoiceAccuracy, Evaluator, Likelihood, Passage};
pub use rouge::Rouge;
pub use tokenize::Tokenization;

/// A path of the shared test data. Prints `skipped` where it is missing.
#[cfg(test)]
fn shared(path: &str) -> Option<std::path::PathBuf> {
    let full = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data").join(path);
    if full.exists() {
        return Some(full);
    }
    println!("skipped: ../shared/data/{path}: not there");
    None
}

/// The lines of a file of reference values.
#[cfg(test)]
fn reference_cases(path: &str) -> Option<Vec<serde_json::Value>> {
    let text = std::fs::read_to_string(shared(path)?).unwrap();
    Some(text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}
