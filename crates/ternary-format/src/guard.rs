//! Guards around the crate `tokenizers`, which trusts the files that it reads.

use crate::FormatError;
use serde_json::Value;
use std::panic::{self, AssertUnwindSafe};

/// How many times as long as its text a part may make it: more than any tokenizer in use.
const GROWTH: usize = 64;
/// Repeats that a regular expression may ask for, multiplied: those in use have three.
const REPEATS: usize = 1000;

/// Refuses what would cost memory or time without end, which no caller can undo.
///
/// # Errors
/// `Tokenizer`
pub(crate) fn check(json: &Value) -> Result<(), FormatError> {
    let refuse = |part: &str, what: &str, limit: usize| {
        Err(FormatError::Tokenizer { why: format!("{part}: {what}, expected at most {limit}") })
    };
    for part in ["normalizer", "pre_tokenizer", "post_processor", "decoder"] {
        let (growth, repeats) = costs(&json[part]);
        if growth > GROWTH {
            return refuse(part, &format!("makes texts {growth} times as long"), GROWTH);
        }
        if let Some(stop) = ends_stripped(&json[part]).filter(|_| part == "decoder") {
            return refuse(part, &format!("Strip takes {stop} characters off the ends of tokens"), 0);
        }
        if repeats > REPEATS {
            return refuse(part, &format!("a regular expression with {repeats} repeats"), REPEATS);
        }
    }
    Ok(())
}

/// How much longer the steps within `part` make a text, one after the other, and the most repeats of an expression.
fn costs(part: &Value) -> (usize, usize) {
    let own = match part["type"].as_str().unwrap_or_default() {
        "Replace" => {
            let pattern = part["pattern"]["String"].as_str().map_or(0, str::len);
            let content = part["content"].as_str().map_or(0, str::len);
            // What has no length is found between all characters.
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
        Value::Array(items) => items.iter().map(costs).collect(),
        Value::Object(items) => items.values().map(costs).collect(),
        _ => Vec::new(),
    };
    within.into_iter().fold(start, |(g, r), (growth, repeats)| (g.saturating_mul(growth), r.max(repeats)))
}

/// A `stop` above 0 of a `Strip` decoder, which panics on a token with nothing else.
fn ends_stripped(decoder: &Value) -> Option<u64> {
    let own = decoder["stop"].as_u64().filter(|&stop| stop > 0);
    own.or_else(|| decoder["decoders"].as_array()?.iter().find_map(ends_stripped))
}

/// The counts of an expression's `{n}` and `{n,m}`, multiplied.
fn repeats(regex: &str) -> usize {
    let counts = regex.split('{').skip(1).filter_map(|rest| {
        let numbers = rest.split_once('}')?.0.split(',');
        numbers.filter_map(|number| number.trim().parse::<u128>().ok()).max()
    });
    counts
        .fold(1, |product, count| product.saturating_mul(usize::try_from(count.max(1)).unwrap_or(usize::MAX)))
}

/// What `call` gives, or why it failed or panicked.
///
/// The crate panics on some files: a prefix that is longer than the token of a merge, a damaged character map. Which
/// these are shows only when they are run.
pub(crate) fn run<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    // What it leaves half done is memory-safe, and used no more or as it was.
    match panic::catch_unwind(AssertUnwindSafe(call)) {
        Ok(made) => made.map_err(|error| error.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            Err(format!("the crate tokenizers panicked: {text}"))
        }
    }
}
