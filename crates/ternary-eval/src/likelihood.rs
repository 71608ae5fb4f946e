//! [`Evaluator`]: how likely a model finds texts, answers and choices.

use crate::Example;
use std::{
    f64::consts::LN_2,
    ops::{AddAssign, Range},
};
use ternary_format::{
    FormatError, Tokenizer,
    chat::{ChatTemplate, Message, Role},
    document::Document,
};
use ternary_infer::{Engine, EngineError};

/// The likelihood of texts; a sum over documents.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Likelihood {
    /// `-ln p` of the scored tokens.
    pub nats: f64,
    /// Scored tokens.
    pub tokens: usize,
    /// Scored tokens to which the model gives the highest probability.
    pub hits: usize,
    /// Bytes of the scored text.
    pub bytes: usize,
}

impl Likelihood {
    /// Mean loss, in nats per token.
    pub fn loss(&self) -> f64 {
        self.nats / self.tokens as f64
    }

    /// `exp(loss)`.
    pub fn perplexity(&self) -> f64 {
        self.loss().exp()
    }

    /// Bits per byte, which compares models of different tokenizers.
    pub fn bits_per_byte(&self) -> f64 {
        self.nats / LN_2 / self.bytes as f64
    }

    /// Share of the tokens to which the model gives the highest probability.
    pub fn token_accuracy(&self) -> f64 {
        self.hits as f64 / self.tokens as f64
    }
}

impl AddAssign for Likelihood {
    fn add_assign(&mut self, other: Self) {
        self.nats += other.nats;
        self.tokens += other.tokens;
        self.hits += other.hits;
        self.bytes += other.bytes;
    }
}

/// Whether the correct choice is the most likely one; a sum over questions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChoiceAccuracy {
    /// Questions whose correct choice has the highest likelihood.
    pub correct: usize,
    /// The same with likelihoods per byte, so that short choices have no advantage.
    pub correct_per_byte: usize,
    /// Number of questions.
    pub questions: usize,
}

impl ChoiceAccuracy {
    /// The accuracy of one question, from the likelihoods of its choices and the index of the correct one.
    pub fn new(choices: &[Likelihood], answer: usize) -> Self {
        let is_least = |nats: fn(&Likelihood) -> f64| {
            (0..choices.len()).min_by(|a, b| nats(&choices[*a]).total_cmp(&nats(&choices[*b])))
                == Some(answer)
        };
        Self {
            correct: usize::from(is_least(|choice| choice.nats)),
            correct_per_byte: usize::from(is_least(|choice| choice.nats / choice.bytes.max(1) as f64)),
            questions: 1,
        }
    }

    /// Share of the questions whose correct choice has the highest likelihood.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.questions as f64
    }

    /// Share of the questions whose correct choice has the highest likelihood per byte.
    pub fn accuracy_per_byte(&self) -> f64 {
        self.correct_per_byte as f64 / self.questions as f64
    }
}

impl AddAssign for ChoiceAccuracy {
    fn add_assign(&mut self, other: Self) {
        self.correct += other.correct;
        self.correct_per_byte += other.correct_per_byte;
        self.questions += other.questions;
    }
}

/// Computes likelihoods with a model.
#[derive(Debug)]
pub struct Evaluator<'a> {
    engine: &'a Engine,
    tokenizer: &'a Tokenizer,
    /// `None`: the model was not trained on dialogues.
    template: Option<ChatTemplate>,
    stride: usize,
}

/// The token ids of a text, and the part of them that is scored.
#[derive(Debug)]
pub struct Passage {
    ids: Vec<u32>,
    /// The first scored token; at least 1, since nothing predicts the first one.
    from: usize,
    bytes: usize,
}

impl Passage {
    /// Number of scored tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len().saturating_sub(self.from)
    }
}

impl<'a> Evaluator<'a> {
    /// An evaluator whose window moves by `stride` tokens over texts longer than the context: each window but the first
    /// predicts with at least `context - stride` tokens before.
    ///
    /// # Errors
    /// `NoTokenizer`. `Format`: the chat template is invalid.
    pub fn new(engine: &'a Engine, stride: usize) -> Result<Self, EngineError> {
        let tokenizer = engine.tokenizer().ok_or(EngineError::NoTokenizer)?;
        let template = match engine.dialogues() {
            Ok((_, template)) => Some(template),
            Err(EngineError::NoChatTemplate) => None,
            Err(error) => return Err(error),
        };
        Ok(Self { engine, tokenizer, template, stride })
    }

    /// What is scored of an example: the text, the answer, or each choice.
    ///
    /// A text follows the begin token, if the tokenizer has one; its end is not scored. An answer is formatted by the chat
    /// template, and scored with the token that ends it. A choice is an answer if the model has a chat template, otherwise
    /// the words that follow the question.
    ///
    /// # Errors
    /// `NoChatTemplate`: a dialogue for a model without a chat template. `Format`: a text cannot be encoded.
    pub fn passages(&self, example: &Example) -> Result<Vec<Passage>, EngineError> {
        let template = self.template.as_ref();
        Ok(match example {
            Example::Document(Document::Text(text)) => vec![self.text(text)?],
            Example::Document(Document::Dialogue { question, answer }) => {
                let template = template.ok_or(EngineError::NoChatTemplate)?;
                vec![self.answer(template, question, answer)?]
            }
            Example::Choice { question, choices, .. } => {
                let passage = |choice: &String| match template {
                    Some(template) => self.answer(template, question, choice),
                    None => self.continuation(question, choice),
                };
                choices.iter().map(passage).collect::<Result<_, _>>()?
            }
        })
    }

    fn begin(&self) -> Vec<u32> {
        let ends = self.tokenizer.ends();
        Vec::from_iter(ends.bos.or(ends.eos))
    }

    fn text(&self, text: &str) -> Result<Passage, FormatError> {
        let ids = [self.begin(), self.tokenizer.encode(text)?].concat();
        Ok(Passage { ids, from: 1, bytes: text.len() })
    }

    fn answer(&self, template: &ChatTemplate, question: &str, answer: &str) -> Result<Passage, FormatError> {
        let (user, assistant) = (Message::new(Role::User, question), Message::new(Role::Assistant, answer));
        let prompt = template.ids(self.tokenizer, std::slice::from_ref(&user), true)?;
        let whole = template.ids(self.tokenizer, &[user, assistant], false)?;
        let from = prompt.len();
        let ids = match whole.starts_with(&prompt) {
            true => whole,
            // The template formats past turns differently from the one that is generated.
            false => {
                let end = Vec::from_iter(self.tokenizer.ends().eos);
                [prompt, self.tokenizer.encode(answer)?, end].concat()
            }
        };
        Ok(Passage { ids, from: from.max(1), bytes: answer.len() })
    }

    fn continuation(&self, question: &str, words: &str) -> Result<Passage, FormatError> {
        let prompt = [self.begin(), self.tokenizer.encode(question)?].concat();
        let ids = [self.begin(), self.tokenizer.encode(&format!("{question} {words}"))?].concat();
        // A token at the seam may belong to both.
        let from = ids.iter().zip(&prompt).take_while(|(a, b)| a == b).count();
        Ok(Passage { ids, from: from.max(1), bytes: words.len() })
    }

    /// The likelihood of a passage. `advance` is called with the number of tokens that were scored since its last call.
    ///
    /// # Errors
    /// `UnknownToken`: the tokenizer does not belong to the model.
    pub fn likelihood(&self, passage: &Passage, advance: impl Fn(usize)) -> Result<Likelihood, EngineError> {
        let Passage { ids, from, bytes } = passage;
        let mut sum = Likelihood { bytes: *bytes, ..Likelihood::default() };
        for Window { inputs, scored } in windows(ids.len(), *from, self.engine.context(), self.stride) {
            let logits = self.engine.logits(&ids[inputs.clone()])?;
            let rows = logits.chunks_exact(self.engine.spec().vocab_size);
            for (row, place) in rows.zip(inputs.start + 1..).filter(|(_, place)| scored.contains(place)) {
                let (nats, hit) = negative_log_likelihood(row, ids[place] as usize);
                sum += Likelihood { nats, tokens: 1, hits: usize::from(hit), bytes: 0 };
            }
            advance(scored.len());
        }
        Ok(sum)
    }
}

/// Tokens that the model reads in one pass, and the positions that this pass scores.
#[derive(Debug, PartialEq, Eq)]
struct Window {
    inputs: Range<usize>,
    scored: Range<usize>,
}

/// Windows of at most `context` inputs that score each position in `from..length` once and move by `stride`.
fn windows(length: usize, from: usize, context: usize, stride: usize) -> impl Iterator<Item = Window> {
    let mut next = from;
    std::iter::from_fn(move || {
        if next >= length {
            return None;
        }
        // The inputs end just before the last scored token.
        let end = (next - 1 + stride.clamp(1, context)).max(context).min(length - 1);
        let window = Window { inputs: end.saturating_sub(context)..end, scored: next..end + 1 };
        next = end + 1;
        Some(window)
    })
}

/// `-ln softmax(logits)[id]`, in f64, and whether it is the most likely id.
fn negative_log_likelihood(logits: &[f32], id: usize) -> (f64, bool) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|logit| f64::from((logit - max).exp())).sum();
    // Of equal logits the first is taken, as greedy decoding does: a model whose logits are all equal predicts nothing.
    let first = logits.iter().position(|&logit| logit == max);
    (total.ln() - f64::from(logits[id] - max), first == Some(id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ternary_infer::{ActivationMode, EngineOptions};

    #[test]
    fn windows_score_each_place_once_with_enough_before_it() {
        for (length, from, context, stride) in [
            (10, 1, 4, 2),
            (10, 1, 4, 4),
            (10, 1, 16, 8),
            (10, 7, 4, 2),
            (2, 1, 1, 1),
            (50, 3, 7, 5),
            (9, 9, 4, 2),
        ] {
            let windows: Vec<Window> = windows(length, from, context, stride).collect();
            let scored: Vec<usize> = windows.iter().flat_map(|window| window.scored.clone()).collect();
            assert_eq!(scored, (from..length).collect::<Vec<_>>());
            for Window { inputs, scored } in windows {
                assert!(inputs.len() <= context && inputs.end <= length);
                assert!(inputs.start < scored.start && scored.end == inputs.end + 1);
                let before = scored.start - inputs.start;
                assert!(inputs.start == 0 || before > context - stride.min(context), "{inputs:?} {scored:?}");
            }
        }
    }

    #[test]
    fn the_negative_log_likelihood_is_that_of_softmax() {
        let (nats, hit) = negative_log_likelihood(&[1.0, 2.0, 3.0], 1);
        let total = 1f64.exp() + 2f64.exp() + 3f64.exp();
        assert!((nats - (total.ln() - 2.0)).abs() < 1e-6 && !hit);
        assert!(negative_log_likelihood(&[1.0, 2.0, 3.0], 2).1);
        let ties = [0, 1, 2].map(|id| negative_log_likelihood(&[1.0, 4.0, 4.0], id).1);
        assert_eq!(ties, [false, true, false], "one token is the likeliest");
    }

    #[test]
    fn a_published_model_has_its_published_perplexity() {
        let folder = crate::shared("models/stories260k");
        let text = crate::shared("text/tinystories/valid.txt");
        let (Some(folder), Some(text)) = (folder, text) else { return };
        let reference = std::fs::read_to_string(folder.join("reference.json")).unwrap();
        let reference: serde_json::Value = serde_json::from_str(&reference).unwrap();
        let options = EngineOptions::default().with_activations(ActivationMode::F32);
        let engine = Engine::load(&folder, options).unwrap();
        let evaluator = Evaluator::new(&engine, 256).unwrap();
        let text = std::fs::read_to_string(text).unwrap();
        let ids = evaluator.tokenizer.encode(&text).unwrap();
        let tokens = reference["perplexity_tokens"].as_u64().unwrap() as usize;
        let mut sum = Likelihood::default();
        for chunk in ids[..tokens].chunks(256) {
            let passage = Passage { ids: [&[1], chunk].concat(), from: 1, bytes: 0 };
            sum += evaluator.likelihood(&passage, |_| ()).unwrap();
        }
        let perplexity = sum.perplexity();
        let expected = reference["perplexity"].as_f64().unwrap();
        assert!((perplexity - expected).abs() < 1e-3, "{perplexity}, expected {expected}");
    }
}
