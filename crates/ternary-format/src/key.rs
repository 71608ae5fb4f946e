//! [`Keys`]: what a reader makes of each key of a file.
//!
//! A key that nobody looks at may make another model of the same tensors. So a reader declares the keys that it uses,
//! those that change what a model computes, with the values at which they do not, and those that change nothing. Any
//! other value is an error, and any other key a warning.

use crate::FormatError;
use serde_json::{Map, Value};

/// The keys of one kind of file.
pub(crate) struct Keys<'a> {
    /// What all keys of the table begin with, such as `llama.`; it is not repeated below.
    pub prefix: &'a str,
    /// Read by the reader, which checks their values itself.
    pub used: &'a [&'a str],
    /// Keys that change what a model computes, and the values at which they do not, as JSON, with ` or ` between them.
    /// A list is such a value when all of its items are; so is an empty object.
    pub fixed: &'a [(&'a str, &'a str)],
    /// Keys that change nothing that a model computes; those that begin so where the last character is `*`.
    pub neutral: &'a [&'a str],
}

/// Unknown keys that are named in a warning.
const NAMED: usize = 40;
/// Characters of a key or a value in a message.
const SHOWN: usize = 60;

impl Keys<'_> {
    /// Whether the key is declared.
    ///
    /// # Errors
    /// `Value`: a value that makes another model.
    fn admit(&self, whole: &str, value: &Value) -> Result<bool, FormatError> {
        let Some(key) = whole.strip_prefix(self.prefix) else { return Ok(false) };
        if let Some((_, expected)) = self.fixed.iter().find(|(fixed, _)| *fixed == key) {
            if !is_one_of(value, expected) {
                let found = short(&value.to_string());
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

/// A warning that names the keys that no table of `tables` declares; `null` stands for a key that is not set.
///
/// # Errors
/// `Value`: the first key whose value makes another model.
pub(crate) fn check(
    tables: &[Keys],
    file: &str,
    entries: impl IntoIterator<Item = (String, Value)>,
) -> Result<Option<String>, FormatError> {
    let mut unknown = Vec::new();
    for (key, value) in entries {
        let mut known = value.is_null();
        for table in tables {
            known |= table.admit(&key, &value)?;
        }
        if !known {
            unknown.push(format!("`{}`", short(&key)));
        }
    }
    let (count, more) = (unknown.len(), unknown.len().saturating_sub(NAMED));
    unknown.truncate(NAMED);
    let names = unknown.join(", ");
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    Ok((count > 0).then(|| format!("{file}: unknown keys are ignored: {names}{more}")))
}

/// The entries of a JSON object; those of the objects that are its values at `nested` as `key.inner`.
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
        let known: Value = serde_json::from_str(text).expect("the tables hold JSON");
        *value == known || value.as_f64().is_some_and(|value| Some(value) == known.as_f64())
    };
    match value {
        Value::Array(items) => items.iter().all(|item| is_one_of(item, expected)),
        Value::Object(fields) if fields.is_empty() => true,
        _ => expected.split(" or ").any(equal),
    }
}

fn short(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const KEYS: Keys = Keys {
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
        let told = warning("novelty", json!(1)).unwrap().unwrap();
        assert_eq!(told, "config.json: unknown keys are ignored: `a.novelty`");
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
