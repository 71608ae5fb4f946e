//! [`Score`]: how likely a token was, beside others.

use std::cmp::Ordering;
use ternary_format::Tokenizer;

/// Stands for minus infinity, which JSON does not know, as in OpenAI's API.
const NEVER: f32 = -9999.0;

/// A drawn token with its natural log probability, and those of the likeliest tokens in its place.
///
/// Probabilities are the model's own: before temperature, and before anything was cut off.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    pub id: u32,
    pub logprob: f32,
    /// The likeliest first.
    pub top: Vec<(u32, f32)>,
    /// Where the token's text begins, in characters of the answer.
    pub offset: usize,
}

impl Score {
    /// `log softmax(logits)` at `id` and at the `top` likeliest; logits that are no numbers are never drawn.
    pub fn new(logits: &[f32], id: u32, top: usize, offset: usize) -> Self {
        let number = |logit: f32| if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) };
        let max = logits.iter().copied().map(number).fold(f32::NEG_INFINITY, f32::max);
        let distance = |logit: f32| f64::from(number(logit)) - f64::from(max);
        let total: f64 = logits.iter().map(|logit| distance(*logit).exp()).sum();
        let logprob = |id: u32| {
            let logprob = (distance(logits[id as usize]) - total.ln()) as f32;
            if logprob > NEVER { logprob } else { NEVER }
        };
        let order = |a: &u32, b: &u32| -> Ordering {
            let [a_logit, b_logit] = [a, b].map(|id| number(logits[*id as usize]));
            b_logit.total_cmp(&a_logit).then(a.cmp(b))
        };
        let mut likeliest: Vec<u32> = if top > 0 { (0..logits.len() as u32).collect() } else { Vec::new() };
        if (1..likeliest.len()).contains(&top) {
            likeliest.select_nth_unstable_by(top - 1, order);
            likeliest.truncate(top);
        }
        likeliest.sort_unstable_by(order);
        let top = likeliest.into_iter().map(|id| (id, logprob(id))).collect();
        Self { id, logprob: logprob(id), top, offset }
    }
}

/// The text of one token, and its bytes if they are known: a part of a character is U+FFFD.
pub fn text(tokenizer: &Tokenizer, id: u32) -> (String, Option<Vec<u8>>) {
    if let Some((name, _)) = tokenizer.specials().find(|(_, special)| *special == id) {
        return (name.into(), Some(name.as_bytes().into()));
    }
    // Some decoders drop the white space that a text begins with: look at the token after itself.
    let once = tokenizer.decode(&[id]);
    let twice = tokenizer.decode(&[id, id]);
    let text = twice.strip_prefix(&once).map(String::from).unwrap_or(once);
    let whole = !text.contains(char::REPLACEMENT_CHARACTER);
    let bytes = whole.then(|| text.as_bytes().into());
    (text, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_the_log_softmax() {
        let logits = [1.0f32, -2.0, f32::NAN, 3.5, 3.5, f32::NEG_INFINITY, 0.25];
        let total: f64 = logits.iter().filter(|l| l.is_finite()).map(|l| f64::from(*l).exp()).sum();
        let expected = |id: usize| (f64::from(logits[id]).exp() / total).ln() as f32;
        let score = Score::new(&logits, 1, 3, 7);
        assert!((score.logprob - expected(1)).abs() < 1e-6);
        assert_eq!(score.top.iter().map(|top| top.0).collect::<Vec<_>>(), [3, 4, 0]);
        assert!(score.top.iter().all(|(id, logprob)| (logprob - expected(*id as usize)).abs() < 1e-6));
        assert_eq!(score.offset, 7);
        assert_eq!(Score::new(&logits, 5, 0, 0).logprob, NEVER);
        assert!(Score::new(&logits, 0, 0, 0).top.is_empty());
        assert_eq!(Score::new(&logits, 0, 99, 0).top.len(), logits.len());
    }

    #[test]
    fn scores_of_absurd_logits_are_numbers() {
        for logits in
            [[f32::NAN; 3], [f32::NEG_INFINITY; 3], [f32::INFINITY, 0.0, f32::MAX], [f32::MAX, f32::MIN, 0.0]]
        {
            let score = Score::new(&logits, 0, 3, 0);
            assert!(score.logprob.is_finite() && score.top.iter().all(|top| top.1.is_finite()), "{score:?}");
        }
    }

    #[test]
    fn tokens_are_written_as_they_stand_in_a_text() {
        let tokenizer = Tokenizer::byte();
        assert_eq!(text(&tokenizer, u32::from(b' ')), (" ".into(), Some(b" ".into())));
        assert_eq!(text(&tokenizer, 0xf0), ("\u{fffd}".into(), None));
        assert_eq!(text(&tokenizer, 256).0, "<|endoftext|>");
    }
}
