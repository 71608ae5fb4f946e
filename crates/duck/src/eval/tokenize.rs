//! [`Tokenization`]: the words that BLEU counts, cut as sacrebleu cuts them.
//!
//! # Source
//! `tokenizers/` of sacrebleu 2.6; 13a is that of `mteval-v13a.pl`, intl that of `mteval-v14.pl` with
//! `--international-tokenization`.

use super::category::{is_punctuation, is_symbol};
use clap::ValueEnum;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Tokenization {
    /// Western punctuation is cut off, but within numbers.
    #[value(name = "13a")]
    V13a,
    /// The same for all of Unicode's punctuation and symbols.
    Intl,
    /// Characters.
    Char,
    /// What white space separates.
    None,
}

impl Tokenization {
    /// As flags and signatures have it.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().into())
    }

    /// The tokens of a text.
    pub fn tokens(self, text: &str) -> Vec<String> {
        let text = text.trim_end_matches(is_space);
        let cut = match self {
            Self::V13a => v13a(text),
            Self::Intl => intl(text),
            Self::Char => text.chars().flat_map(|c| [c, ' ']).collect(),
            Self::None => text.into(),
        };
        cut.split(is_space).filter(|token| !token.is_empty()).map(Into::into).collect()
    }
}

/// White space as Python has it.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn v13a(text: &str) -> String {
    let text = text.replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    let text = match text.contains('&') {
        true => text.replace("&quot;", "\"").replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"),
        false => text,
    };
    let text =
        separate(&format!(" {text} "), |c| c.is_ascii_punctuation() && !matches!(c, '\'' | ',' | '-' | '.'));
    let is_point = |c| matches!(c, '.' | ',');
    let is_digit = |c: char| c.is_ascii_digit();
    let text = pairs(&text, |a, b| !is_digit(a) && is_point(b), ["", " ", " "]);
    let text = pairs(&text, |a, b| is_point(a) && !is_digit(b), [" ", " ", ""]);
    pairs(&text, |a, b| is_digit(a) && b == '-', ["", " ", " "])
}

fn intl(text: &str) -> String {
    let text = pairs(text, |a, b| !a.is_numeric() && is_punctuation(b), ["", " ", " "]);
    let text = pairs(&text, |a, b| is_punctuation(a) && !b.is_numeric(), [" ", " ", ""]);
    separate(&text, is_symbol)
}

/// Spaces around characters.
fn separate(text: &str, which: impl Fn(char) -> bool) -> String {
    let mut cut = String::with_capacity(2 * text.len());
    for c in text.chars() {
        match which(c) {
            true => cut.extend([' ', c, ' ']),
            false => cut.push(c),
        }
    }
    cut
}

/// Puts spaces before, between and behind pairs of characters, found from left to right; no character is in two.
fn pairs(text: &str, which: impl Fn(char, char) -> bool, [before, between, behind]: [&str; 3]) -> String {
    let mut cut = String::with_capacity(2 * text.len());
    let mut rest = text.chars().peekable();
    while let Some(a) = rest.next() {
        match rest.next_if(|b| which(a, *b)) {
            Some(b) => {
                cut.push_str(before);
                cut.push(a);
                cut.push_str(between);
                cut.push(b);
                cut.push_str(behind);
            }
            None => cut.push(a),
        }
    }
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_cut_as_sacrebleu_cuts_them() {
        use Tokenization::{Char, Intl, None, V13a};
        for (tokenization, text, expected) in [
            (V13a, "It's 3.14, isn't it? (No--yes) ", "It's 3.14 , isn't it ? ( No--yes )"),
            (V13a, "a.. 1990-95 &quot;b&quot; <skipped>c-\nd", "a . . 1990 - 95 \" b \" cd"),
            (V13a, ".5 5. \u{201c}x\u{201d}", ". 5 5 . \u{201c}x\u{201d}"),
            (Intl, "\u{201c}x\u{201d} 3,5 \u{20ac} a,b", "\u{201c} x \u{201d} 3,5 \u{20ac} a , b"),
            (Char, "ab c", "a b c"),
            (None, "a,b\tc\n", "a,b c"),
        ] {
            assert_eq!(tokenization.tokens(text).join(" "), expected, "{text:?}");
        }
    }
}
