//! A `tokenizer.json` without redundancy, for archives. Two parts of a BPE tokenizer repeat information:
//!
//! ```text
//! "vocab": {"a": 0, "b": 1, "ab": 2}           ids count up:                        ["a", "b", "ab"]
//! "merges": [["a", "b"], ...]                  the result is the next new token:    [1, ...]       characters of its first part
//! ```
//!
//! A merge is abbreviated if its result is the token `next`. `next` starts at id 0; after each merge, it is the
//! largest id that any merge produced, plus 1. A BPE trainer numbers tokens in the order in which merges produce
//! them, so most merges are abbreviated. Merges that produce other tokens are kept as pairs.

use serde_json::{Map, Value};
use std::collections::HashMap;

/// The compact form; `None` if the tokenizer has none.
pub(super) fn compact(json: &str) -> Option<String> {
    let mut root: Value = serde_json::from_str(json).ok()?;
    let model = root.get_mut("model")?.as_object_mut()?;
    let ids = model.get("vocab")?.as_object()?;
    let mut tokens = vec![None; ids.len()];
    for (token, id) in ids {
        *tokens.get_mut(usize::try_from(id.as_u64()?).ok()?)? = Some(token.clone());
    }
    let tokens = tokens.into_iter().collect::<Option<Vec<String>>>()?;
    let mut merges = Merges::new(&tokens);
    for merge in model.get_mut("merges").and_then(Value::as_array_mut).into_iter().flatten() {
        let (first, second) = (merge.get(0)?.as_str()?, merge.get(1)?.as_str()?);
        let whole = [first, second].concat();
        let characters = first.chars().count();
        if merges.next() == Some(&whole) {
            *merge = characters.into();
        }
        merges.record(&whole);
    }
    model.insert("vocab".into(), tokens.into());
    serde_json::to_string(&root).ok()
}

/// The inverse of [`compact`]; `None` for text that it does not write.
pub(super) fn expand(json: &str) -> Option<String> {
    let mut root: Value = serde_json::from_str(json).ok()?;
    let model = root.get_mut("model")?.as_object_mut()?;
    let tokens = model.get("vocab")?.as_array()?.iter();
    let tokens = tokens.map(|token| token.as_str().map(String::from)).collect::<Option<Vec<_>>>()?;
    let mut merges = Merges::new(&tokens);
    for merge in model.get_mut("merges").and_then(Value::as_array_mut).into_iter().flatten() {
        let whole = match merge.as_u64() {
            None => [merge.get(0)?.as_str()?, merge.get(1)?.as_str()?].concat(),
            Some(characters) => {
                let whole = merges.next()?.clone();
                let mut ends = whole.char_indices().map(|(end, _)| end).chain([whole.len()]);
                let (first, second) = whole.split_at(ends.nth(usize::try_from(characters).ok()?)?);
                *merge = [first, second].as_slice().into();
                whole
            }
        };
        merges.record(&whole);
    }
    let ids = tokens.iter().enumerate().map(|(id, token)| (token.clone(), Value::from(id)));
    let ids: Map<String, Value> = ids.collect();
    model.insert("vocab".into(), ids.into());
    serde_json::to_string(&root).ok()
}

/// Tracks the token `next`. It never decreases, so no token is expanded twice.
struct Merges<'a> {
    tokens: &'a [String],
    ids: HashMap<&'a str, usize>,
    next: usize,
}

impl<'a> Merges<'a> {
    fn new(tokens: &'a [String]) -> Self {
        let ids = tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
        Self { tokens, ids, next: 0 }
    }

    fn next(&self) -> Option<&'a String> {
        self.tokens.get(self.next)
    }

    fn record(&mut self, whole: &str) {
        self.next = self.ids.get(whole).map_or(self.next, |id| self.next.max(id + 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn omitted_parts_are_restored() {
        let json = |vocab: &str, merges: &str| {
            format!(r#"{{"added_tokens":[],"model":{{"merges":[{merges}],"type":"BPE","vocab":{vocab}}}}}"#)
        };
        let vocab = r#"{"a":0,"b":1,"é":2,"ab":3,"éab":4,"ba":5,"bé":6}"#;
        let merges = r#"["a","b"],["é","ab"],["b","é"],["b","a"],["x","y"]"#;
        let short = compact(&json(vocab, merges)).unwrap();
        let list = r#"["a","b","é","ab","éab","ba","bé"]"#;
        assert_eq!(short, json(list, r#"["a","b"],1,["b","é"],["b","a"],["x","y"]"#));
        let whole: Value = serde_json::from_str(&json(vocab, merges)).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&expand(&short).unwrap()).unwrap(), whole);
        // Ids with gaps, repeated ids, and other models.
        for vocab in [r#"{"a":0,"b":2}"#, r#"{"a":0,"b":0}"#, r#"{"a":-1}"#, r#"[["a",-0.5]]"#, "null"] {
            assert_eq!(compact(&json(vocab, "")), None, "{vocab}");
        }
        assert_eq!(compact(r#"{"type":"byte"}"#), None);
        for merges in ["0", "1,1,1,1,1,1,1,1", "9", "-1", r#"["a"]"#, "null"] {
            let list = r#"["a","b"]"#;
            let short = merges == "0" || expand(&json(list, merges)).is_none();
            assert!(short, "{merges}");
        }
    }
}
