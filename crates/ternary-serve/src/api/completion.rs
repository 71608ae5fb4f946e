//! `POST /v1/completions`

use super::{
    ApiError,
    field::{Fields, wrong},
    flight::{Flight, Form},
    request::{Request, accept, refused},
};
use crate::{
    Truncation,
    score::{self, Score},
    server::{Served, Server},
};
use axum::{extract::State, response::Response};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Tokens of a text, if the request does not say, as in OpenAI's API.
const TOKENS: usize = 16;

/// More than the average length of a token. It bounds how much of a truncated prompt is encoded.
const BYTES_PER_TOKEN: usize = 16;

/// The most scores of other tokens.
const TOP: usize = 20;

/// Text completions.
pub struct Completion;

pub async fn completion(
    State(server): State<Arc<Server>>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    let ((request, prompts), busy) = accept(server, request, read).await?;
    Flight::new(Completion, request, prompts, busy)?.respond().await
}

fn read(server: &Server, mut fields: Fields) -> Result<(Request, Vec<Vec<u32>>), ApiError> {
    let mut request = Request::take(server, &mut fields)?;
    request.tokens.get_or_insert(TOKENS);
    request.scores = fields.integer("logprobs", 0..=TOP)?;
    let prompt = fields.take("prompt").unwrap_or(Value::String(String::new()));
    if let Some(best_of) = fields.integer("best_of", 1..=usize::MAX >> 1)?
        && best_of != request.n
    {
        return Err(ApiError::field("best_of", "`best_of` is not supported but as the value of `n`")
            .code("unsupported_parameter"));
    }
    fields.refuse(&["echo", "suffix"])?;
    fields.end()?;
    let most = server.limits.choices.min(server.limits.batch);
    let prompts = match prompt {
        Value::Array(list) if list.iter().any(|item| !item.is_number()) => {
            if list.len() * request.n > most {
                let found = format!("{} prompts, {} texts for each", list.len(), request.n);
                return Err(ApiError::field("prompt", format!("{found}; expected at most {most} texts")));
            }
            list.into_iter().map(|item| ids(&request, item)).collect::<Result<_, _>>()?
        }
        one => vec![ids(&request, one)?],
    };
    Ok((request, prompts))
}

/// The ids of a text, or ids as given. Truncation keeps the last ones that leave room for the answer.
fn ids(request: &Request, prompt: Value) -> Result<Vec<u32>, ApiError> {
    let model = &request.served.model;
    let context = model.engine.context();
    let most = match request.truncation {
        Truncation::Disabled => usize::MAX,
        Truncation::Auto => context - request.room(),
    };
    let last = |ids: &[u32], most: usize| ids[ids.len().saturating_sub(most)..].to_vec();
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match prompt {
        Value::String(text) => {
            // Encoding only the end bounds the work.
            let cut = text.len().saturating_sub(most.saturating_mul(BYTES_PER_TOKEN));
            let end = &text[text.ceil_char_boundary(cut)..];
            let ids = match request.truncation {
                Truncation::Disabled => model.tokenizer().encode_within(end, context),
                Truncation::Auto => model.tokenizer().encode(end),
            };
            let ids = ids.map_err(|error| refused(Completion::PROMPT, &error))?;
            let ends = model.tokenizer().ends();
            let bos = Vec::from_iter(ends.bos.filter(|_| ends.add_bos || ids.is_empty()));
            let kept = last(&ids, most.saturating_sub(bos.len()));
            Ok([bos, kept].concat())
        }
        Value::Array(list) => {
            let ids = list.iter().map(|value| id(value).ok_or_else(|| wrong("prompt", value, "token ids")));
            Ok(last(&ids.collect::<Result<Vec<_>, _>>()?, most))
        }
        other => Err(wrong("prompt", &other, "a string, token ids, or an array of these")),
    }
}

impl Form for Completion {
    const NAMES: [&'static str; 3] = ["cmpl", "text_completion", "text_completion"];
    const PROMPT: &'static str = "prompt";

    fn whole(&self, served: &Served, text: String, scores: Option<Vec<Score>>) -> Value {
        json!({ "text": text, "logprobs": columns(served, scores) })
    }

    fn open(&self) -> Option<Value> {
        None
    }

    fn part(&self, served: &Served, text: String, scores: Option<Vec<Score>>) -> Value {
        self.whole(served, text, scores)
    }

    fn close(&self) -> Value {
        json!({ "text": "", "logprobs": null })
    }
}

fn columns(served: &Served, scores: Option<Vec<Score>>) -> Value {
    let Some(scores) = scores else { return Value::Null };
    let text = |id: u32| score::text(served.model.tokenizer(), id).0;
    let top = |score: &Score| {
        let mut map = Map::new();
        for (id, logprob) in &score.top {
            // Parts of characters look alike; the likeliest is the one that is shown.
            map.entry(text(*id)).or_insert((*logprob).into());
        }
        map
    };
    json!({
        "tokens": scores.iter().map(|score| text(score.id)).collect::<Vec<_>>(),
        "token_logprobs": scores.iter().map(|score| score.logprob).collect::<Vec<_>>(),
        "top_logprobs": scores.iter().map(top).collect::<Vec<_>>(),
        "text_offset": scores.iter().map(|score| score.offset).collect::<Vec<_>>(),
    })
}
