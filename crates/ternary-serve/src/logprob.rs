//! [`TokenLogprob`]: log probabilities of generated tokens.

use std::cmp::Ordering;
use ternary_format::Tokenizer;

/// Represents minus infinity, which JSON lacks, as in OpenAI's API.
const MINUS_INFINITY: f32 = -9999.0;

/// A generated token with its natural log probability, and the most likely tokens in its place.
///
/// Probabilities are those of the model: before temperature, top-k, top-p, min-p and penalties.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    pub id: u32,
    pub logprob: f32,
    /// The most likely first.
    pub top: Vec<(u32, f32)>,
    /// The start of the token's text, in characters of the completion.
    pub offset: usize,
}

impl TokenLogprob {
    /// `log softmax(logits)` at `id` and at the `top` most likely ids. NaN counts as minus infinity.
    pub fn new(logits: &[f32], id: u32, top: usize, offset: usize) -> Self {
        let number = |logit: f32| if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) };
        let max = logits.iter().copied().map(number).fold(f32::NEG_INFINITY, f32::max);
        let distance = |logit: f32| f64::from(number(logit)) - f64::from(max);
        let total: f64 = logits.iter().map(|logit| distance(*logit).exp()).sum();
        let logprob = |id: u32| {
            let logprob = (distance(logits[id as usize]) - total.ln()) as f32;
            if logprob > MINUS_INFINITY { logprob } else { MINUS_INFINITY }
        };
        let order = |a: &u32, b: &u32| -> Ordering {
            let [a_logit, b_logit] = [a, b].map(|id| number(logits[*id as usize]));
            b_logit.total_cmp(&a_logit).then(a.cmp(b))
        };
        let mut most_likely: Vec<u32> = if top > 0 { (0..logits.len() as u32).collect() } else { Vec::new() };
        if (1..most_likely.len()).contains(&top) {
            most_likely.select_nth_unstable_by(top - 1, order);
            most_likely.truncate(top);
        }
        most_likely.sort_unstable_by(order);
        let top = most_likely.into_iter().map(|id| (id, logprob(id))).collect();
        Self { id, logprob: logprob(id), top, offset }
    }
}

/// The text of one token, and its bytes if they are known. A part of a character is U+FFFD.
pub fn token_text(tokenizer: &Tokenizer, id: u32) -> (String, Option<Vec<u8>>) {
    if let Some((name, _)) = tokenizer.specials().find(|(_, special)| *special == id) {
        return (name.into(), Some(name.as_bytes().into()));
    }
    // Some decoders drop white space at the start of a text, so the token is decoded after itself.
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
    fn logprobs_are_the_log_softmax() {
        let logits = [1.0f32, -2.0, f32::NAN, 3.5, 3.5, f32::NEG_INFINITY, 0.25];
        let total: f64 = logits.iter().filter(|l| l.is_finite()).map(|l| f64::from(*l).exp()).sum();
        let expected = |id: usize| (f64::from(logits[id]).exp() / total).ln() as f32;
        let token = TokenLogprob::new(&logits, 1, 3, 7);
        assert!((token.logprob - expected(1)).abs() < 1e-6);
        assert_eq!(token.top.iter().map(|top| top.0).collect::<Vec<_>>(), [3, 4, 0]);
        assert!(token.top.iter().all(|(id, logprob)| (logprob - expected(*id as usize)).abs() < 1e-6));
        assert_eq!(token.offset, 7);
        assert_eq!(TokenLogprob::new(&logits, 5, 0, 0).logprob, MINUS_INFINITY);
        assert!(TokenLogprob::new(&logits, 0, 0, 0).top.is_empty());
        assert_eq!(TokenLogprob::new(&logits, 0, 99, 0).top.len(), logits.len());
    }

    #[test]
    fn logprobs_of_infinite_logits_are_finite() {
        for logits in
            [[f32::NAN; 3], [f32::NEG_INFINITY; 3], [f32::INFINITY, 0.0, f32::MAX], [f32::MAX, f32::MIN, 0.0]]
        {
            let token = TokenLogprob::new(&logits, 0, 3, 0);
            assert!(token.logprob.is_finite() && token.top.iter().all(|top| top.1.is_finite()), "{token:?}");
        }
    }

    #[test]
    fn the_text_of_a_token_is_that_within_a_text() {
        let tokenizer = Tokenizer::byte();
        assert_eq!(token_text(&tokenizer, u32::from(b' ')), (" ".into(), Some(b" ".into())));
        assert_eq!(token_text(&tokenizer, 0xf0), ("\u{fffd}".into(), None));
        assert_eq!(token_text(&tokenizer, 256).0, "<|endoftext|>");
    }
}
