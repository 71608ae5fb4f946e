//! Edits of JSON whose result is valid JSON.

use arbitrary::{Result, Unstructured};
use serde_json::{Value, json};

/// Longer strings and larger trees are not duplicated, since each edit could double them.
const LARGEST: usize = 500;

/// Parts of tokenizers, inserted anywhere.
pub fn tokenizer_parts() -> Vec<Value> {
    let regex = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let replace = |pattern: &str, content: &str| json!({"type": "Replace", "pattern": {"String": pattern}, "content": content});
    vec![
        json!({"type": "Sequence", "normalizers": [{"type": "NFD"}], "pretokenizers": [], "decoders": [{"type": "Fuse"}], "processors": []}),
        json!({"type": "Strip", "content": "a", "start": 0, "stop": 9, "strip_left": true, "strip_right": true}),
        json!({"type": "CTC", "pad_token": "", "word_delimiter_token": "|", "cleanup": true}),
        json!({"type": "BPEDecoder", "suffix": ""}),
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false}),
        json!({"type": "Precompiled", "precompiled_charsmap": "ALQCAACEAAAAAACAAQAAgMz8AgC4BQAAhyIAgMzkAgC4PQAAeyIAgMzsAgC4BQAAiyIAgMw8AADNvAAA"}),
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": false}),
        json!({"type": "FixedLength", "length": 0}),
        json!({"type": "Punctuation", "behavior": "MergedWithNext"}),
        json!({"type": "CharDelimiterSplit", "delimiter": "a"}),
        json!({"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["b", 2], "trim_offsets": true, "add_prefix_space": true}),
        json!({"type": "WordLevel", "vocab": {"a": 0, "ab": 7}, "unk_token": "[UNK]"}),
        json!({"type": "Lowercase"}),
        json!({"type": "StripAccents"}),
        json!({"type": "Nmt"}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Prepend", "prepend": "ab"}),
        replace("", "a"),
        replace("a", "aaaaaaaaaaaaaaaa"),
        regex("(?=a)|(a|b|ab)*c"),
        regex(""),
    ]
}

/// Parts of requests, inserted anywhere.
pub fn request_parts() -> Vec<Value> {
    let key = |key: &str, value: Value| Value::Object([(key.to_string(), value)].into_iter().collect());
    vec![
        json!({"role": "user", "content": "quack"}),
        json!({"role": "system", "content": [{"type": "text", "text": "be a duck"}]}),
        json!({"include_usage": true}),
        json!({"type": "text"}),
        json!(["<|user|>", "\u{1f986}", ""]),
        json!([0, 258, 259]),
        json!([["a"], [1]]),
        json!("\0"),
        key("stream", json!(true)),
        key("logprobs", json!(3)),
        key("best_of", json!(2)),
        key("echo", json!(true)),
        key("logit_bias", json!({"65": -100})),
        key("response_format", json!({"type": "json_object"})),
        key("tools", json!([])),
    ]
}

/// Swaps, duplicates or removes a node somewhere in `root`, or replaces it with one of `parts`.
///
/// # Errors
/// When the input ends.
pub fn edit(root: &mut Value, parts: &[Value], input: &mut Unstructured) -> Result<()> {
    let count = count(root);
    let from = nth(root, &mut input.choose_index(count)?).cloned();
    let from = from.filter(|_| count < LARGEST).unwrap_or_default();
    let place = nth(root, &mut input.choose_index(count)?).expect("a place below the count");
    match input.int_in_range(0..=7)? {
        0 => *place = from,
        1 => match (place, input.choose(parts)?) {
            (Value::Object(items), Value::Object(more)) => items.extend(more.clone()),
            (place, part) => *place = part.clone(),
        },
        2 => {
            let numbers = [
                json!(0),
                json!(1),
                json!(-1),
                json!(4_294_967_295u64),
                json!(u64::MAX),
                json!(1e308),
                json!(0.5),
            ];
            *place = input.choose(&numbers)?.clone();
        }
        3 => *place = input.choose(&[json!(null), json!(true), json!([]), json!({})])?.clone(),
        4 => *place = input.arbitrary::<String>()?.into(),
        5 => match place {
            Value::Array(items) if !items.is_empty() => drop(items.remove(input.choose_index(items.len())?)),
            Value::Object(items) if !items.is_empty() => {
                let name = items.keys().nth(input.choose_index(items.len())?).cloned().unwrap_or_default();
                items.remove(&name);
            }
            other => *other = Value::Null,
        },
        6 => match place {
            Value::Array(items) => items.push(from),
            Value::Object(items) => drop(items.insert(input.arbitrary()?, from)),
            Value::Number(number) => *place = json!(number.as_i64().unwrap_or_default().wrapping_add(1)),
            Value::String(text) if text.len() < LARGEST => *place = format!("{text}{text}").into(),
            _ => {}
        },
        _ => *place = input.arbitrary::<i32>()?.into(),
    }
    Ok(())
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(items) => items.values().map(count).sum::<usize>(),
        _ => 0,
    }
}

/// Node `n` in the order of the text.
fn nth<'a>(value: &'a mut Value, n: &mut usize) -> Option<&'a mut Value> {
    if *n == 0 {
        return Some(value);
    }
    *n -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| nth(item, n)),
        Value::Object(items) => items.values_mut().find_map(|item| nth(item, n)),
        _ => None,
    }
}
