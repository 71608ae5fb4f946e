//! Greedy answers to questions, and their similarity to reference answers.

use crate::{Bleu, BleuStatistics, Rouge};
use std::ops::AddAssign;
use ternary_format::chat::{ChatTemplate, Message, Role};
use ternary_infer::{Engine, EngineError, FinishReason, GenerateOptions, Sampling};

/// The greedy answer to a question, without white space at its ends; `None` where the question leaves no room for one.
///
/// # Errors
/// `Format`: the question cannot be encoded. `NoTokenizer`, `NotFinite`.
pub fn answer(
    engine: &Engine,
    template: &ChatTemplate,
    question: &str,
    max_tokens: usize,
) -> Result<Option<String>, EngineError> {
    let tokenizer = engine.tokenizer().ok_or(EngineError::NoTokenizer)?;
    let prompt = template.ids(tokenizer, &[Message::new(Role::User, question)], true)?;
    let stop: Vec<_> = tokenizer.specials().map(|(_, id)| id).chain(tokenizer.ends().eos).collect();
    let options = GenerateOptions::default()
        .with_sampling(Sampling::greedy())
        .with_max_tokens(max_tokens)
        .with_stop(stop);
    match engine.generate(&prompt, options) {
        Ok(mut generation) => {
            let ids: Vec<u32> = generation.by_ref().collect();
            generation.finish_reason().map(FinishReason::check).transpose()?;
            Ok(Some(tokenizer.decode(&ids).trim().into()))
        }
        Err(EngineError::ContextFull { .. } | EngineError::EmptyPrompt) => Ok(None),
        Err(error) => Err(error),
    }
}

/// How similar answers are to their references; a sum over answers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Similarity {
    /// N-gram matches, from which [`Bleu::score`] computes corpus BLEU.
    pub bleu: BleuStatistics,
    /// Sum of the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L.
    pub rouge: [f64; 3],
    /// Answers equal to their references, but for white space at their ends.
    pub exact: usize,
    /// Number of answers.
    pub answers: usize,
}

impl Similarity {
    /// The similarity of one answer.
    pub fn new(bleu: &Bleu, answer: &str, reference: &str) -> Self {
        let Rouge { one, two, longest } = Rouge::new(answer, reference);
        Self {
            bleu: bleu.statistics(answer, &[reference]),
            rouge: [one, two, longest],
            exact: usize::from(answer.trim() == reference.trim()),
            answers: 1,
        }
    }

    /// Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L.
    pub fn mean_rouge(&self) -> [f64; 3] {
        self.rouge.map(|sum| sum / self.answers as f64)
    }

    /// Share of answers that equal their reference.
    pub fn exact_match(&self) -> f64 {
        self.exact as f64 / self.answers as f64
    }
}

impl AddAssign for Similarity {
    fn add_assign(&mut self, other: Self) {
        self.bleu += other.bleu;
        self.rouge.iter_mut().zip(other.rouge).for_each(|(sum, rouge)| *sum += rouge);
        self.exact += other.exact;
        self.answers += other.answers;
    }
}
