//! How likely a model finds a text: nats, and the choice that it finds likeliest.

use super::document::Document;
use crate::terminal::Progress;
use std::ops::{AddAssign, Range};
use ternary_format::{
    FormatError, Tokenizer,
    chat::{ChatTemplate, Message, Role},
};
use ternary_infer::{Engine, EngineError};

/// What a model says of texts; sums over documents.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// `-ln p` of the scored tokens.
    pub nats: f64,
    pub tokens: usize,
    /// Scored tokens that the model finds likeliest.
    pub hits: usize,
    /// Of the scored text.
    pub bytes: usize,
}

impl AddAssign for Score {
    fn add_assign(&mut self, other: Self) {
        self.nats += other.nats;
        self.tokens += other.tokens;
        self.hits += other.hits;
        self.bytes += other.bytes;
    }
}

/// Reads documents with a model.
pub struct Reader<'a> {
    pub engine: &'a Engine,
    pub tokenizer: &'a Tokenizer,
    /// `None`: nobody says how dialogues are written.
    pub template: Option<ChatTemplate>,
    /// Tokens by which a window moves on: each but the first sees at least `context - stride` tokens before.
    pub stride: usize,
}

/// A text in ids, and where what is scored begins: at least at 1, for nothing is before the first.
#[derive(Debug)]
pub struct Passage {
    ids: Vec<u32>,
    from: usize,
    bytes: usize,
}

impl Passage {
    /// How many tokens are scored.
    pub fn tokens(&self) -> usize {
        self.ids.len().saturating_sub(self.from)
    }
}

impl Reader<'_> {
    /// What is to be scored of a document: the text, the answer, or each choice.
    ///
    /// A text begins after the token that begins texts, where the tokenizer has one; its end is not scored. An answer
    /// is written as the chat template has it, and scored with the token that ends it. A choice is an answer where the
    /// model can talk, else the words that follow the question.
    ///
    /// # Errors
    /// `NoChatTemplate`: a dialogue for a model that cannot talk. `Format`: it cannot be encoded.
    pub fn passages(&self, document: &Document) -> Result<Vec<Passage>, EngineError> {
        let template = self.template.as_ref();
        Ok(match document {
            Document::Text(text) => vec![self.text(text)?],
            Document::Dialogue { question, answer } => {
                let template = template.ok_or(EngineError::NoChatTemplate)?;
                vec![self.answer(template, question, answer)?]
            }
            Document::Choice { question, choices, .. } => {
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
        let (asked, answered) = (Message::new(Role::User, question), Message::new(Role::Assistant, answer));
        let prompt = template.ids(self.tokenizer, std::slice::from_ref(&asked), true)?;
        let whole = template.ids(self.tokenizer, &[asked, answered], false)?;
        let from = prompt.len();
        let ids = match whole.starts_with(&prompt) {
            true => whole,
            // A template that writes a past turn otherwise than one in the making.
            false => {
                let end = Vec::from_iter(self.tokenizer.ends().eos);
                [prompt, self.tokenizer.encode(answer)?, end].concat()
            }
        };
        Ok(Passage { ids, from: from.max(1), bytes: answer.len() })
    }

    fn continuation(&self, question: &str, words: &str) -> Result<Passage, FormatError> {
        let asked = [self.begin(), self.tokenizer.encode(question)?].concat();
        let ids = [self.begin(), self.tokenizer.encode(&format!("{question} {words}"))?].concat();
        // A token at the seam may belong to both.
        let from = ids.iter().zip(&asked).take_while(|(a, b)| a == b).count();
        Ok(Passage { ids, from: from.max(1), bytes: words.len() })
    }

    /// The score of a passage.
    ///
    /// # Errors
    /// `UnknownToken`: the tokenizer does not belong to the model.
    pub fn score(&self, passage: &Passage, progress: &Progress) -> Result<Score, EngineError> {
        let Passage { ids, from, bytes } = passage;
        let mut sum = Score { bytes: *bytes, ..Score::default() };
        for Window { inputs, scored } in windows(ids.len(), *from, self.engine.context(), self.stride) {
            let logits = self.engine.logits(&ids[inputs.clone()])?;
            let rows = logits.chunks_exact(self.engine.spec().vocab_size);
            for (row, place) in rows.zip(inputs.start + 1..).filter(|(_, place)| scored.contains(place)) {
                let (nats, hit) = surprise(row, ids[place] as usize);
                sum += Score { nats, tokens: 1, hits: usize::from(hit), bytes: 0 };
            }
            progress.advance(scored.len());
        }
        Ok(sum)
    }
}

/// Tokens that a model reads at once, and the places of those that are scored by it.
#[derive(Debug, PartialEq, Eq)]
struct Window {
    inputs: Range<usize>,
    scored: Range<usize>,
}

/// Windows of at most `context` inputs that score each place in `from..length` once, with as many tokens before it as
/// windows that move by `stride` leave.
fn windows(length: usize, from: usize, context: usize, stride: usize) -> impl Iterator<Item = Window> {
    let mut next = from;
    std::iter::from_fn(move || {
        if next >= length {
            return None;
        }
        // The inputs end where the last scored token begins.
        let end = (next - 1 + stride.clamp(1, context)).max(context).min(length - 1);
        let window = Window { inputs: end.saturating_sub(context)..end, scored: next..end + 1 };
        next = end + 1;
        Some(window)
    })
}

/// `-ln p` of an id, in f64, and whether no other is likelier.
fn surprise(logits: &[f32], id: usize) -> (f64, bool) {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|logit| f64::from((logit - most).exp())).sum();
    (total.ln() - f64::from(logits[id] - most), logits[id] == most)
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
    fn surprise_is_the_definition() {
        let (nats, hit) = surprise(&[1.0, 2.0, 3.0], 1);
        let total = 1f64.exp() + 2f64.exp() + 3f64.exp();
        assert!((nats - (total.ln() - 2.0)).abs() < 1e-6 && !hit);
        assert!(surprise(&[1.0, 2.0, 3.0], 2).1);
    }

    #[test]
    fn a_published_model_has_its_published_perplexity() {
        let folder = crate::eval::shared("models/stories260k");
        let text = crate::eval::shared("text/tinystories/valid.txt");
        let (Some(folder), Some(text)) = (folder, text) else { return };
        let reference = std::fs::read_to_string(folder.join("reference.json")).unwrap();
        let reference: serde_json::Value = serde_json::from_str(&reference).unwrap();
        let options = EngineOptions::default().with_activations(ActivationMode::F32);
        let engine = Engine::load(&folder, options).unwrap();
        let reader =
            Reader { engine: &engine, tokenizer: engine.tokenizer().unwrap(), template: None, stride: 256 };
        let text = std::fs::read_to_string(text).unwrap();
        let ids = reader.tokenizer.encode(&text).unwrap();
        let tokens = reference["perplexity_tokens"].as_u64().unwrap() as usize;
        let progress = Progress::new("tokens", tokens as u64);
        let mut sum = Score::default();
        for chunk in ids[..tokens].chunks(256) {
            let passage = Passage { ids: [&[1], chunk].concat(), from: 1, bytes: 0 };
            sum += reader.score(&passage, &progress).unwrap();
        }
        let perplexity = (sum.nats / sum.tokens as f64).exp();
        let expected = reference["perplexity"].as_f64().unwrap();
        assert!((perplexity - expected).abs() < 1e-3, "{perplexity}, expected {expected}");
    }
}
