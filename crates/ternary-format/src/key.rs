//! [`KeyTable`]: which keys of a configuration file a reader supports.
//!
//! A configuration key that a reader ignores may change what the same tensors compute. So a reader declares three
//! kinds of keys: those that it reads, those that change the computation together with the values at which they do
//! not, and those that change nothing. Another value of a key of the second kind is an error. A key that is not
//! declared is a warning.

use crate::FormatError;
use serde_json::{Map, Value};

/// The declared keys of one kind of file.
pub(crate) struct KeyTable<'a> {
    /// Prefix of all keys of the table, such as `llama.`. The keys below omit it.
    pub prefix: &'a str,
    /// Keys that the reader uses. It checks their values itself.
    pub used: &'a [&'a str],
    /// Keys that change what a model computes, and the values at which they do not: JSON, separated by ` or `. A list
    /// matches if all of its items do; an empty object always matches.
    pub fixed: &'a [(&'a str, &'a str)],
    /// Keys that do not change what a model computes. A trailing `*` matches any suffix.
    pub neutral: &'a [&'a str],
}

/// Unknown keys that a warning lists.
const LISTED_KEYS: usize = 40;
/// Characters of a key or value that a message shows.
const SHOWN_CHARS: usize = 60;

impl KeyTable<'_> {
    /// Returns whether the table declares the key.
    ///
    /// # Errors
    /// `Value`: the value changes what the model computes.
    fn declares(&self, whole: &str, value: &Value) -> Result<bool, FormatError> {
        let Some(key) = whole.strip_prefix(self.prefix) else { return Ok(false) };
        if let Some((_, expected)) = self.fixed.iter().find(|(fixed, _)| *fixed == key) {
            if !is_one_of(value, expected) {
                let found = truncated(&value.to_string());
                return Err(FormatError::Value { key: whole.into(), found, expected: (*expected).into() });
            }
            return Ok(true);
        }
        let neutral = |known: &&str| match known.strip_suffix('*') {
            Some(start) => key.starts_with(start),
            None => key == *known,
        };
        Ok(self.used.contains(&key) || self.neutral.iter().any(neutral))
    }
}

/// Returns a warning that lists the keys that no table declares. A key with the value `null` counts as not set.
///
/// # Errors
/// `Value`: the first key whose value changes what the model computes.
pub(crate) fn check(
    tables: &[KeyTable],
    file: &str,
    entries: impl IntoIterator<Item = (String, Value)>,
) -> Result<Option<String>, FormatError> {
    let mut unknown = Vec::new();
    for (key, value) in entries {
        let mut known = value.is_null();
        for table in tables {
            known |= table.declares(&key, &value)?;
        }
        if !known {
            unknown.push(format!("`{}`", truncated(&key)));
        }
    }
    let (count, more) = (unknown.len(), unknown.len().saturating_sub(LISTED_KEYS));
    unknown.truncate(LISTED_KEYS);
    let names = unknown.join(", ");
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    Ok((count > 0).then(|| format!("{file}: unknown keys are ignored: {names}{more}")))
}

/// Entries of a JSON object. The fields of the objects at the keys `nested` become `key.field`.
pub(crate) fn entries(object: &Map<String, Value>, nested: &[&str]) -> Vec<(String, Value)> {
    let mut entries = Vec::new();
    for (key, value) in object {
        match value {
            Value::Object(inner) if nested.contains(&&**key) => {
                entries.extend(inner.iter().map(|(name, value)| (format!("{key}.{name}"), value.clone())));
            }
            _ => entries.push((key.clone(), value.clone())),
        }
    }
    entries
}

fn is_one_of(value: &Value, expected: &str) -> bool {
    let equal = |text: &str| {
        let known: Value = serde_json::from_str(text).expect("the tables contain JSON");
        *value == known || value.as_f64().is_some_and(|value| Some(value) == known.as_f64())
    };
    match value {
        Value::Array(items) => items.iter().all(|item| is_one_of(item, expected)),
        Value::Object(fields) if fields.is_empty() => true,
        _ => expected.split(" or ").any(equal),
    }
}

fn truncated(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const KEYS: KeyTable = KeyTable {
        prefix: "a.",
        used: &["size"],
        fixed: &[("scale", "1 or null"), ("bias", "false"), ("kinds", "\"full\"")],
        neutral: &["dtype", "summary_*"],
    };

    fn warning(key: &str, value: Value) -> Result<Option<String>, FormatError> {
        check(&[KEYS], "config.json", [(format!("a.{key}"), value)])
    }

    #[test]
    fn declared_keys_are_silent_and_unknown_ones_are_named() {
        for (key, value) in [
            ("size", json!(3)),
            ("scale", json!(1)),
            ("scale", json!(1.0)),
            ("scale", json!(null)),
            ("bias", json!(false)),
            ("kinds", json!(["full", "full"])),
            ("kinds", json!({})),
            ("dtype", json!("float16")),
            ("summary_type", json!("last")),
            ("unset", json!(null)),
        ] {
            assert_eq!(warning(key, value.clone()).unwrap(), None, "{key} {value}");
        }
        let found = warning("novelty", json!(1)).unwrap().unwrap();
        assert_eq!(found, "config.json: unknown keys are ignored: `a.novelty`");
        let many: Vec<String> = (0..50).map(|i| format!("{i:0200}")).collect();
        let many = check(&[KEYS], "a", many.into_iter().map(|key| (key, json!(1)))).unwrap().unwrap();
        assert!(many.len() < 3000 && many.ends_with("and 10 more"), "{many}");
    }

    #[test]
    fn a_value_that_changes_the_model_is_an_error() {
        for (key, value, expected) in [
            ("scale", json!(2), "key `a.scale` is 2, expected 1 or null"),
            ("bias", json!(true), "key `a.bias` is true, expected false"),
            ("bias", json!(null), "key `a.bias` is null, expected false"),
            (
                "kinds",
                json!(["full", "sliding"]),
                "key `a.kinds` is [\"full\",\"sliding\"], expected \"full\"",
            ),
            ("kinds", json!({"a": 1}), "key `a.kinds` is {\"a\":1}, expected \"full\""),
        ] {
            assert_eq!(warning(key, value).unwrap_err().to_string(), expected);
        }
    }
}
