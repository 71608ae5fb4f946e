//! Greedy answers to questions, and how near they come to the answers that are known.

use super::{
    bleu::{Bleu, Statistics},
    rouge::Rouge,
};
use crate::{model, terminal::Progress};
use std::ops::AddAssign;
use ternary_format::chat::{ChatTemplate, Message, Role};
use ternary_infer::{Engine, EngineError, FinishReason, GenerateOptions, Sampling};

/// The likeliest answer, without white space at its ends; `None` where the question leaves no room for one.
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
    let options = GenerateOptions::default()
        .with_sampling(Sampling::greedy())
        .with_max_tokens(max_tokens)
        .with_stop(model::stop(tokenizer));
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

/// Answers all questions; those that leave no room get an empty answer.
///
/// # Errors
/// As [`answer`].
pub fn answers(
    engine: &Engine,
    template: &ChatTemplate,
    questions: &[&str],
    max_tokens: usize,
) -> Result<Vec<String>, EngineError> {
    let progress = Progress::new("answers", questions.len() as u64);
    let answer = |question: &&str| {
        let answer = answer(engine, template, question, max_tokens)?;
        progress.advance(1);
        Ok(answer.unwrap_or_default())
    };
    questions.iter().map(answer).collect()
}

/// How near answers come; sums over answers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nearness {
    pub bleu: Statistics,
    /// F-measures.
    pub rouge: [f64; 3],
    pub exact: usize,
    pub answers: usize,
}

impl Nearness {
    pub fn new(bleu: &Bleu, answer: &str, reference: &str) -> Self {
        let Rouge { one, two, longest } = Rouge::new(answer, reference);
        Self {
            bleu: bleu.statistics(answer, &[reference]),
            rouge: [one, two, longest],
            exact: usize::from(answer.trim() == reference.trim()),
            answers: 1,
        }
    }
}

impl AddAssign for Nearness {
    fn add_assign(&mut self, other: Self) {
        self.bleu += other.bleu;
        self.rouge.iter_mut().zip(other.rouge).for_each(|(sum, rouge)| *sum += rouge);
        self.exact += other.exact;
        self.answers += other.answers;
    }
}
