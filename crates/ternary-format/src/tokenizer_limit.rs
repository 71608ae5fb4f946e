//! Limits of a `tokenizer.json`, and a guard against panics of the crate `tokenizers`.
//!
//! The crate trusts its files: a small file can make it allocate without bound, loop without end, or panic.
//! [`check_limits`] refuses the first two before the file is loaded; [`catch_panic`] turns a panic into an error.

use crate::FormatError;
use serde_json::Value;
use std::panic::{self, AssertUnwindSafe};

/// Maximum factor by which one part may lengthen a text. No tokenizer in use needs as much.
const MAX_GROWTH: usize = 64;
/// Maximum product of the repeat counts in a regular expression. Those in use repeat three times.
const MAX_REPEATS: usize = 1000;

/// Checks that no part of a `tokenizer.json` needs memory or time without bound.
///
/// # Errors
/// `Tokenizer`: the part, its cost and the limit.
pub(crate) fn check_limits(json: &Value) -> Result<(), FormatError> {
    let refuse = |part: &str, what: &str, limit: usize| {
        Err(FormatError::Tokenizer { why: format!("{part}: {what}, expected at most {limit}") })
    };
    for part in ["normalizer", "pre_tokenizer", "post_processor", "decoder"] {
        let (growth, repeats) = cost(&json[part]);
        if growth > MAX_GROWTH {
            return refuse(part, &format!("makes texts {growth} times as long"), MAX_GROWTH);
        }
        if let Some(stop) = stripped_end(&json[part]).filter(|_| part == "decoder") {
            return refuse(part, &format!("Strip removes {stop} characters from the end of a token"), 0);
        }
        if repeats > MAX_REPEATS {
            return refuse(part, &format!("a regular expression with {repeats} repeats"), MAX_REPEATS);
        }
    }
    Ok(())
}

/// Factor by which the steps of `part` lengthen a text when applied in sequence, and the largest repeat count of an
/// expression in it.
fn cost(part: &Value) -> (usize, usize) {
    let own = match part["type"].as_str().unwrap_or_default() {
        "Replace" => {
            let pattern = part["pattern"]["String"].as_str().map_or(0, str::len);
            let content = part["content"].as_str().map_or(0, str::len);
            // An empty pattern matches between all characters.
            if pattern == 0 { content + 1 } else { content.div_ceil(pattern) }
        }
        "ByteLevel" => 2,
        "TemplateProcessing" => {
            let pieces = part["single"].as_array().into_iter().flatten();
            pieces.filter(|piece| piece.get("Sequence").is_some()).count()
        }
        _ => 1,
    };
    let start = (own.max(1), part["Regex"].as_str().map_or(1, repeats));
    let within = match part {
        Value::Array(items) => items.iter().map(cost).collect(),
        Value::Object(items) => items.values().map(cost).collect(),
        _ => Vec::new(),
    };
    within.into_iter().fold(start, |(g, r), (growth, repeats)| (g.saturating_mul(growth), r.max(repeats)))
}

/// The first `stop` above 0 of a `Strip` decoder. Such a decoder panics on a token that consists of stripped
/// characters only.
fn stripped_end(decoder: &Value) -> Option<u64> {
    let own = decoder["stop"].as_u64().filter(|&stop| stop > 0);
    own.or_else(|| decoder["decoders"].as_array()?.iter().find_map(stripped_end))
}

/// Product of the counts of all `{n}` and `{n,m}` in a regular expression.
fn repeats(regex: &str) -> usize {
    let counts = regex.split('{').skip(1).filter_map(|rest| {
        let numbers = rest.split_once('}')?.0.split(',');
        numbers.filter_map(|number| number.trim().parse::<u128>().ok()).max()
    });
    counts
        .fold(1, |product, count| product.saturating_mul(usize::try_from(count.max(1)).unwrap_or(usize::MAX)))
}

/// Runs a call of the crate `tokenizers`, and returns a panic as an error message.
///
/// Some malformed files panic only when they are used: a prefix longer than the token of a merge, or a damaged
/// character map. No check of the file can predict this.
pub(crate) fn catch_panic<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    // A panic may leave the tokenizer half changed. This is memory-safe, and callers drop it or keep the old one.
    match panic::catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            Err(format!("the crate tokenizers panicked: {text}"))
        }
    }
}
