//! [`JsonFields`]: the fields of a JSON object, each taken once and checked.

use crate::api_error::ApiError;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// The fields of a JSON object that have not been taken. A null counts as absent.
#[derive(Debug)]
pub struct JsonFields {
    /// The path of the object, such as `messages[0].`.
    prefix: String,
    map: Map<String, Value>,
}

impl JsonFields {
    /// # Errors
    /// 400: the body is not JSON, nested too deeply, or not an object.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let value: Value = serde_json::from_slice(body)
            .map_err(|error| ApiError::body(format!("the body is not JSON: {error}")).code("invalid_json"))?;
        match value {
            Value::Object(map) => Ok(Self { prefix: String::new(), map }),
            other => Err(ApiError::body(format!("the body is {}, expected an object", display(&other)))),
        }
    }

    /// A nested object.
    ///
    /// # Errors
    /// 400: the value is not an object. So do the other methods: the value has another type or is out of range.
    pub fn nested(prefix: &str, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { prefix: format!("{prefix}."), map }),
            other => Err(invalid_value(prefix, &other, "an object")),
        }
    }

    /// The path of a field, for errors.
    pub fn path(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.map.remove(key).filter(|value| !value.is_null())
    }

    pub fn string(&mut self, key: &str) -> Result<Option<String>, ApiError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(invalid_value(&self.path(key), &other, "a string")),
        }
    }

    pub fn boolean(&mut self, key: &str) -> Result<bool, ApiError> {
        match self.take(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(other) => Err(invalid_value(&self.path(key), &other, "true or false")),
        }
    }

    pub fn number(&mut self, key: &str, range: RangeInclusive<f64>, default: f64) -> Result<f64, ApiError> {
        let Some(value) = self.take(key) else { return Ok(default) };
        let found = value.as_f64().filter(|number| range.contains(number));
        let expected = || format!("a number from {} to {}", range.start(), range.end());
        found.ok_or_else(|| invalid_value(&self.path(key), &value, &expected()))
    }

    pub fn integer(&mut self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>, ApiError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let found = value.as_u64().and_then(|number| usize::try_from(number).ok());
        let expected = || format!("an integer from {} to {}", range.start(), range.end());
        match found.filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(invalid_value(&self.path(key), &value, &expected())),
        }
    }

    /// A signed or unsigned 64-bit integer.
    pub fn seed(&mut self, key: &str) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let found = value.as_u64().or(value.as_i64().map(|seed| seed as u64));
        found.map(Some).ok_or_else(|| invalid_value(&self.path(key), &value, "a 64-bit integer"))
    }

    /// Drops fields without effect.
    pub fn ignore(&mut self, keys: &[&str]) {
        for key in keys {
            self.map.remove(*key);
        }
    }

    /// Takes fields that this server does not support.
    ///
    /// # Errors
    /// 400: one of them has a value other than its neutral one, which would change the response.
    pub fn reject_unsupported(&mut self, keys: &[&str]) -> Result<(), ApiError> {
        for key in keys {
            let Some(value) = self.take(key) else { continue };
            let neutral = match &value {
                Value::Bool(flag) => !flag,
                Value::Number(number) => number.as_f64() == Some(0.0),
                Value::String(text) => text.is_empty() || text == "none" || text == "auto",
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                Value::Null => true,
            };
            if !neutral {
                let name = self.path(key);
                return Err(ApiError::field(&name, format!("`{name}` is not supported"))
                    .code("unsupported_parameter"));
            }
        }
        Ok(())
    }

    /// # Errors
    /// 400: a field is left.
    pub fn reject_unknown(self) -> Result<(), ApiError> {
        match self.map.into_iter().find(|(_, value)| !value.is_null()) {
            None => Ok(()),
            Some((key, _)) => {
                let name = format!("{}{}", self.prefix, shorten(&key));
                Err(ApiError::field(&name, format!("`{name}` is not a field of this request"))
                    .code("unknown_parameter"))
            }
        }
    }
}

/// The error for a field with an invalid value.
pub fn invalid_value(param: &str, found: &Value, expected: &str) -> ApiError {
    ApiError::field(param, format!("`{param}` is {}, expected {expected}", display(found)))
        .code("invalid_value")
}

/// A value as errors show it.
fn display(value: &Value) -> String {
    match value {
        Value::Array(_) => "an array".into(),
        Value::Object(_) => "an object".into(),
        other => shorten(&other.to_string()),
    }
}

fn shorten(text: &str) -> String {
    const MAX_CHARACTERS: usize = 60;
    let short: String = text.chars().take(MAX_CHARACTERS).collect();
    if short.len() < text.len() { format!("{short}...") } else { short }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> JsonFields {
        JsonFields::parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn bodies_that_are_not_json_objects_are_refused() {
        let deep = "[".repeat(100_000);
        let nested = format!("{}1{}", r#"{"a":"#.repeat(500), "}".repeat(500));
        let bodies: [&[u8]; 10] = [
            b"",
            b"{",
            b"[]",
            b"1",
            b"{\"a\": NaN}",
            b"{\"a\": 1e999}",
            b"{\"a\": \"\xff\"}",
            b"\xff",
            deep.as_bytes(),
            nested.as_bytes(),
        ];
        for body in bodies {
            assert_eq!(JsonFields::parse(body).unwrap_err().status, 400, "{}", String::from_utf8_lossy(body));
        }
    }

    #[test]
    fn errors_name_values_out_of_range() {
        for value in ["-1", "3", "1.5", "1e300", "99999999999999999999999999", "\"1\"", "true", "[1]"] {
            let error = fields(&format!(r#"{{"n": {value}}}"#)).integer("n", 1..=2).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some("n")), "{value}");
            assert!(error.message.ends_with("expected an integer from 1 to 2"), "{}", error.message);
        }
        for value in ["-0.1", "2.1", "1e300", "\"1\"", "false", "{}"] {
            let error = fields(&format!(r#"{{"t": {value}}}"#)).number("t", 0.0..=2.0, 1.0).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("t"), "{value}");
        }
        assert_eq!(fields(r#"{"t": 2}"#).number("t", 0.0..=2.0, 1.0).unwrap(), 2.0);
        assert_eq!(fields(r#"{"t": null}"#).number("t", 0.0..=2.0, 1.0).unwrap(), 1.0);
        assert_eq!(fields(r#"{"seed": -1}"#).seed("seed").unwrap(), Some(u64::MAX));
        assert_eq!(fields(r#"{"seed": 18446744073709551615}"#).seed("seed").unwrap(), Some(u64::MAX));
        assert!(fields(r#"{"seed": 18446744073709551616}"#).seed("seed").is_err());
        let long = fields(&format!(r#"{{"n": "{}"}}"#, "🦆".repeat(1000))).integer("n", 1..=2).unwrap_err();
        assert!(long.message.len() < 500, "{}", long.message.len());
    }

    #[test]
    fn unsupported_fields_that_change_the_response_are_refused() {
        let neutral =
            r#"{"tools": [], "frequency_penalty": 0, "logit_bias": {}, "echo": false, "suffix": ""}"#;
        let keys = ["tools", "frequency_penalty", "logit_bias", "echo", "suffix"];
        let mut all = fields(neutral);
        all.reject_unsupported(&keys).unwrap();
        all.reject_unknown().unwrap();
        for json in [r#"{"tools": [1]}"#, r#"{"frequency_penalty": 0.1}"#, r#"{"echo": true}"#] {
            assert_eq!(
                fields(json).reject_unsupported(&keys).unwrap_err().code,
                Some("unsupported_parameter")
            );
        }
        assert_eq!(
            fields(r#"{"temprature": 1}"#).reject_unknown().unwrap_err().param.as_deref(),
            Some("temprature")
        );
    }
}
