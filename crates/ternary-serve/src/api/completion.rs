//! `POST /v1/completions`

use super::{
    json_fields::{JsonFields, invalid_value},
    request::{CompletionRequest, accept, not_encoded},
    task::{CompletionTask, ResponseFormat},
};
use crate::{
    Truncation,
    api_error::ApiError,
    logprob::{TokenLogprob, token_text},
    state::{ServedModel, ServerState},
};
use axum::{extract::State, response::Response};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use ternary_format::{FormatError, Tokenizer};

/// Default of `max_tokens`, as in OpenAI's API.
const MAX_TOKENS: usize = 16;

/// More than the average length of a token: the end of a truncated prompt that is encoded first.
const BYTES_PER_TOKEN: usize = 16;

/// Maximum of `logprobs`.
const TOP_LOGPROBS: usize = 20;

/// Text completions.
pub struct Completion;

pub async fn completion(
    State(state): State<Arc<ServerState>>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    let ((request, prompts), in_flight) = accept(state, request, parse).await?;
    CompletionTask::new(Completion, request, prompts, in_flight)?.respond().await
}

fn parse(
    state: &ServerState,
    mut fields: JsonFields,
) -> Result<(CompletionRequest, Vec<Vec<u32>>), ApiError> {
    let mut request = CompletionRequest::take(state, &mut fields)?;
    request.max_tokens.get_or_insert(MAX_TOKENS);
    request.top_logprobs = fields.integer("logprobs", 0..=TOP_LOGPROBS)?;
    let prompt = fields.take("prompt").unwrap_or(Value::String(String::new()));
    if let Some(best_of) = fields.integer("best_of", 1..=usize::MAX >> 1)?
        && best_of != request.n
    {
        return Err(ApiError::field("best_of", "`best_of` is only supported with the value of `n`")
            .code("unsupported_parameter"));
    }
    fields.reject_unsupported(&["echo", "suffix"])?;
    fields.reject_unknown()?;
    let max = state.limits.choices.min(state.limits.batch);
    let prompts = match prompt {
        Value::Array(list) if list.iter().any(|item| !item.is_number()) => {
            if list.len() * request.n > max {
                let found = format!("{} prompts, {} completions for each", list.len(), request.n);
                return Err(ApiError::field(
                    "prompt",
                    format!("{found}; expected at most {max} completions"),
                ));
            }
            list.into_iter().map(|item| ids(&request, item)).collect::<Result<_, _>>()?
        }
        one => vec![ids(&request, one)?],
    };
    Ok((request, prompts))
}

/// The ids of a text, or ids as given. Truncation keeps the last ones that leave room for the answer.
fn ids(request: &CompletionRequest, prompt: Value) -> Result<Vec<u32>, ApiError> {
    let model = &request.served.model;
    let context = model.engine.context();
    let max = match request.truncation {
        Truncation::Disabled => usize::MAX,
        Truncation::Auto => context - request.answer_room(),
    };
    let last = |ids: &[u32], max: usize| ids[ids.len().saturating_sub(max)..].to_vec();
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match prompt {
        Value::String(text) => {
            let ids = match request.truncation {
                Truncation::Disabled => model.tokenizer().encode_within(&text, context),
                Truncation::Auto => encode_end(model.tokenizer(), &text, max),
            };
            let ids = ids.map_err(|error| not_encoded(Completion::PROMPT, &error))?;
            let ends = model.tokenizer().ends();
            let bos = Vec::from_iter(ends.bos.filter(|_| ends.add_bos || ids.is_empty()));
            let kept = last(&ids, max.saturating_sub(bos.len()));
            Ok([bos, kept].concat())
        }
        Value::Array(list) => {
            let ids =
                list.iter().map(|value| id(value).ok_or_else(|| invalid_value("prompt", value, "token ids")));
            Ok(last(&ids.collect::<Result<Vec<_>, _>>()?, max))
        }
        other => Err(invalid_value("prompt", &other, "a string, token ids, or an array of these")),
    }
}

/// The ids of the end of a text: more than `max`, or those of the whole text.
///
/// Only as much of a long text is encoded as is needed: the end is doubled until it has enough tokens.
fn encode_end(tokenizer: &Tokenizer, text: &str, max: usize) -> Result<Vec<u32>, FormatError> {
    let mut bytes = max.max(1).saturating_mul(BYTES_PER_TOKEN);
    loop {
        let start = text.len().saturating_sub(bytes);
        let ids = tokenizer.encode(&text[text.ceil_char_boundary(start)..])?;
        // More than `max`: a token at the cut is not kept.
        if start == 0 || ids.len() > max {
            return Ok(ids);
        }
        bytes = bytes.saturating_mul(2);
    }
}

impl ResponseFormat for Completion {
    const NAMES: [&'static str; 3] = ["cmpl", "text_completion", "text_completion"];
    const PROMPT: &'static str = "prompt";

    fn full(&self, served: &ServedModel, text: String, logprobs: Option<Vec<TokenLogprob>>) -> Value {
        json!({ "text": text, "logprobs": logprobs_json(served, logprobs) })
    }

    fn first_chunk(&self) -> Option<Value> {
        None
    }

    fn chunk(&self, served: &ServedModel, text: String, logprobs: Option<Vec<TokenLogprob>>) -> Value {
        self.full(served, text, logprobs)
    }

    fn last_chunk(&self) -> Value {
        json!({ "text": "", "logprobs": null })
    }
}

fn logprobs_json(served: &ServedModel, logprobs: Option<Vec<TokenLogprob>>) -> Value {
    let Some(logprobs) = logprobs else { return Value::Null };
    let text = |id: u32| token_text(served.model.tokenizer(), id).0;
    let top = |token: &TokenLogprob| {
        let mut map = Map::new();
        for (id, logprob) in &token.top {
            // Parts of characters have the same text; the most likely one is kept.
            map.entry(text(*id)).or_insert((*logprob).into());
        }
        map
    };
    json!({
        "tokens": logprobs.iter().map(|token| text(token.id)).collect::<Vec<_>>(),
        "token_logprobs": logprobs.iter().map(|token| token.logprob).collect::<Vec<_>>(),
        "top_logprobs": logprobs.iter().map(top).collect::<Vec<_>>(),
        "text_offset": logprobs.iter().map(|token| token.offset).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tokenizer with tokens of 1, 2, 4, ... 64 bytes.
    fn long_tokens() -> Tokenizer {
        let token = |i: u32| "a".repeat(1 << i);
        let vocab: Map<String, Value> = (0..7).map(|i| (token(i), i.into())).collect();
        let merges: Vec<[String; 2]> = (0..6).map(|i| [token(i), token(i)]).collect();
        let model = json!({ "type": "BPE", "vocab": vocab, "merges": merges });
        let tokenizer = json!({ "version": "1.0", "added_tokens": [], "model": model });
        Tokenizer::from_json(tokenizer.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn the_end_of_a_text_has_enough_tokens_however_long_they_are() {
        let tokenizer = long_tokens();
        let text = "a".repeat(64 * 100);
        let ids = tokenizer.encode(&text).unwrap();
        assert_eq!(ids.len(), 100);
        for max in [1, 10, 99, 100, 1000] {
            let end = encode_end(&tokenizer, &text, max).unwrap();
            assert!(end.len() == 100 || (max + 1..=2 * max + 4).contains(&end.len()), "{max}: {}", end.len());
            let kept = |ids: &[u32]| ids[ids.len().saturating_sub(max)..].to_vec();
            assert_eq!(kept(&end), kept(&ids), "{max}");
        }
        assert!(encode_end(&tokenizer, "", 0).unwrap().is_empty());
    }
}
