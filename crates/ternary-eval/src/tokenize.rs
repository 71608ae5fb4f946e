//! [`Tokenization`]: the words that BLEU counts, split as sacrebleu splits them.
//!
//! # Source
//! `tokenizers/` of sacrebleu 2.6; 13a is that of `mteval-v13a.pl`, intl that of `mteval-v14.pl` with
//! `--international-tokenization`.

use regex::Regex;
use std::{str::FromStr, sync::LazyLock};

/// A tokenization of sacrebleu.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tokenization {
    /// `13a`: splits off Western punctuation, except within numbers.
    V13a,
    /// `intl`: the same with all punctuation and symbols of Unicode.
    Intl,
    /// `char`: characters.
    Char,
    /// `none`: splits at white space.
    None,
}

impl Tokenization {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::V13a, Self::Intl, Self::Char, Self::None];

    /// The name in sacrebleu.
    pub fn name(self) -> &'static str {
        match self {
            Self::V13a => "13a",
            Self::Intl => "intl",
            Self::Char => "char",
            Self::None => "none",
        }
    }

    /// The words of a text.
    pub fn tokens(self, text: &str) -> Vec<String> {
        let text = text.trim_end_matches(is_space);
        let split = match self {
            Self::V13a => v13a(text),
            Self::Intl => replace_all(&INTL, text),
            Self::Char => text.chars().flat_map(|c| [c, ' ']).collect(),
            Self::None => text.into(),
        };
        split.split(is_space).filter(|token| !token.is_empty()).map(Into::into).collect()
    }
}

impl FromStr for Tokenization {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|tokenization| tokenization.name() == name);
        known.ok_or_else(|| "expected 13a, intl, char or none".into())
    }
}

/// White space as Python defines it.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Expressions and their replacements, applied one after another.
type Rules = Vec<(Regex, &'static str)>;

fn rules(rules: &[(&str, &'static str)]) -> Rules {
    let compile = |(pattern, replacement): &(&str, &'static str)| {
        (Regex::new(pattern).expect("the pattern is valid"), *replacement)
    };
    rules.iter().map(compile).collect()
}

static V13A: LazyLock<Rules> = LazyLock::new(|| {
    rules(&[
        (r"([\{-~\[-` -&\(-+:-@/])", " $1 "),
        (r"([^0-9])([.,])", "$1 $2 "),
        (r"([.,])([^0-9])", " $1 $2"),
        (r"([0-9])(-)", "$1 $2 "),
    ])
});

static INTL: LazyLock<Rules> = LazyLock::new(|| {
    rules(&[(r"(\P{N})(\p{P})", "$1 $2 "), (r"(\p{P})(\P{N})", " $1 $2"), (r"(\p{S})", " $1 ")])
});

fn replace_all(rules: &Rules, text: &str) -> String {
    let replace =
        |text: String, (regex, replacement): &(Regex, _)| regex.replace_all(&text, *replacement).into_owned();
    rules.iter().fold(text.into(), replace)
}

fn v13a(text: &str) -> String {
    let text = text.replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    let text = match text.contains('&') {
        true => text.replace("&quot;", "\"").replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"),
        false => text,
    };
    replace_all(&V13A, &format!(" {text} "))
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
