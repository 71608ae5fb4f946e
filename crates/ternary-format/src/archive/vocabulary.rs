//! A `tokenizer.json` without what it says twice: ids that count up, and merges of which the tokens are known.
//!
//! `model.vocab`, an object of tokens with the ids 0, 1, 2, ..., becomes the list of its tokens. Of `model.merges`, pairs
//! of tokens, a pair that makes the token `next` becomes the number of characters of its first part. `next` is at first
//! the id 0, and after each merge the largest id that a merge made, plus 1.

use serde_json::{Map, Value};
use std::collections::HashMap;

/// The shorter form; `None` where there is none.
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
        merges.made(&whole);
    }
    model.insert("vocab".into(), tokens.into());
    serde_json::to_string(&root).ok()
}

/// The inverse of [`compact`]; `None` for what it does not write.
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
        merges.made(&whole);
    }
    let ids = tokens.iter().enumerate().map(|(id, token)| (token.clone(), Value::from(id)));
    let ids: Map<String, Value> = ids.collect();
    model.insert("vocab".into(), ids.into());
    serde_json::to_string(&root).ok()
}

/// Which token is next. It never goes back, so that no token is written out twice.
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

    fn made(&mut self, whole: &str) {
        self.next = self.ids.get(whole).map_or(self.next, |id| self.next.max(id + 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_comes_back() {
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
        // Ids with holes or there twice, and other models.
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
