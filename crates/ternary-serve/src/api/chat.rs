//! `POST /v1/chat/completions`

use super::{
    ApiError,
    field::{Fields, wrong},
    flight::{Flight, Form, scored},
    request::{Request, accept, refused},
};
use crate::{
    Truncation,
    score::Score,
    server::{Served, Server},
};
use axum::{extract::State, response::Response};
use serde_json::{Value, json};
use std::sync::Arc;
use ternary_format::chat::{Message, Role};
use ternary_infer::EngineError;

/// The most scores of other tokens.
const TOP: usize = 20;

/// Response header that counts the messages dropped by truncation.
const DROPPED: &str = "x-dropped-messages";

/// Chat completions.
pub struct Chat;

pub async fn chat(
    State(server): State<Arc<Server>>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    let (Dialogue { request, ids, dropped }, busy) = accept(server, request, read).await?;
    let mut response = Flight::new(Chat, request, vec![ids], busy)?.respond().await?;
    if dropped > 0 {
        response.headers_mut().insert(DROPPED, dropped.into());
    }
    Ok(response)
}

/// A request that has been read.
struct Dialogue {
    request: Request,
    ids: Vec<u32>,
    /// Messages dropped by truncation.
    dropped: usize,
}

fn read(server: &Server, mut fields: Fields) -> Result<Dialogue, ApiError> {
    let mut request = Request::take(server, &mut fields)?;
    let scores = fields.flag("logprobs")?;
    let top = fields.integer("top_logprobs", 0..=TOP)?;
    if top.is_some() && !scores {
        return Err(ApiError::field("top_logprobs", "`top_logprobs` are for `logprobs: true`"));
    }
    request.scores = scores.then_some(top.unwrap_or(0));
    let mut messages = messages(fields.take("messages"))?;
    if let Some(format) = fields.take("response_format")
        && format.get("type").and_then(Value::as_str) != Some("text")
    {
        return Err(ApiError::field(
            "response_format",
            "`response_format` is not supported but as `{\"type\": \"text\"}`",
        )
        .code("unsupported_parameter"));
    }
    if let Some(modalities) = fields.take("modalities")
        && modalities != json!(["text"])
    {
        return Err(wrong("modalities", &modalities, "[\"text\"]"));
    }
    fields.refuse(&[
        "tools",
        "tool_choice",
        "functions",
        "function_call",
        "audio",
        "prediction",
        "web_search_options",
        "reasoning_effort",
        "verbosity",
    ])?;
    fields.end()?;
    let model = &request.served.model;
    let Some(template) = &model.template else {
        let message =
            format!("model `{}` has no chat template; it continues text at /v1/completions", model.name);
        return Err(ApiError::field("model", message).code("no_chat_template"));
    };
    let before = messages.len();
    let ids = match request.truncation {
        Truncation::Disabled => {
            let ids = template.ids_within(model.tokenizer(), &messages, true, model.engine.context());
            ids.map_err(|error| refused(Chat::PROMPT, &error))?
        }
        Truncation::Auto => {
            let ids = model.engine.fit_dialogue(template, &mut messages, request.room());
            ids.map_err(unfit)?
        }
    };
    let dropped = before - messages.len();
    Ok(Dialogue { request, ids, dropped })
}

/// The error for a dialogue that has no ids, even without its older turns.
fn unfit(error: EngineError) -> ApiError {
    match error {
        EngineError::Format(error) => refused(Chat::PROMPT, &error),
        error => {
            let code = match error {
                EngineError::MessageTooLong { .. } => "context_length_exceeded",
                EngineError::EmptyPrompt => "empty_prompt",
                _ => "invalid_value",
            };
            ApiError::field(Chat::PROMPT, error.to_string()).code(code)
        }
    }
}

fn messages(value: Option<Value>) -> Result<Vec<Message>, ApiError> {
    let list = match value {
        Some(Value::Array(list)) if !list.is_empty() => list,
        other => {
            return Err(wrong("messages", &other.unwrap_or_default(), "an array of at least one message"));
        }
    };
    list.into_iter().enumerate().map(|(i, value)| message(&format!("messages[{i}]"), value)).collect()
}

fn message(place: &str, value: Value) -> Result<Message, ApiError> {
    let mut fields = Fields::inner(place, value)?;
    let role = fields.take("role").unwrap_or_default();
    let role = match role.as_str() {
        Some("system" | "developer") => Role::System,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        _ => return Err(wrong(&fields.name("role"), &role, "system, developer, user or assistant")),
    };
    let content = match fields.take("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => {
            let texts =
                parts.into_iter().enumerate().map(|(i, part)| text(&format!("{place}.content[{i}]"), part));
            texts.collect::<Result<String, _>>()?
        }
        other => {
            let expected = "a string or an array of texts";
            return Err(wrong(&fields.name("content"), &other.unwrap_or_default(), expected));
        }
    };
    fields.ignore(&["name"]);
    fields.refuse(&["refusal", "tool_calls", "function_call", "audio", "annotations"])?;
    fields.end()?;
    Ok(Message::new(role, content))
}

/// `{"type": "text", "text": ...}`
fn text(place: &str, value: Value) -> Result<String, ApiError> {
    let mut fields = Fields::inner(place, value)?;
    let kind = fields.take("type").unwrap_or_default();
    if kind != "text" {
        return Err(wrong(&fields.name("type"), &kind, "text"));
    }
    let text = fields.string("text")?;
    fields.end()?;
    text.ok_or_else(|| wrong(&format!("{place}.text"), &Value::Null, "a string"))
}

impl Form for Chat {
    const NAMES: [&'static str; 3] = ["chatcmpl", "chat.completion", "chat.completion.chunk"];
    const PROMPT: &'static str = "messages";

    fn whole(&self, served: &Served, text: String, scores: Option<Vec<Score>>) -> Value {
        let message = json!({ "role": "assistant", "content": text, "refusal": null });
        json!({ "message": message, "logprobs": content(served, scores) })
    }

    fn open(&self) -> Option<Value> {
        Some(json!({ "delta": { "role": "assistant", "content": "" }, "logprobs": null }))
    }

    fn part(&self, served: &Served, text: String, scores: Option<Vec<Score>>) -> Value {
        json!({ "delta": { "content": text }, "logprobs": content(served, scores) })
    }

    fn close(&self) -> Value {
        json!({ "delta": {}, "logprobs": null })
    }
}

fn content(served: &Served, scores: Option<Vec<Score>>) -> Value {
    let Some(scores) = scores else { return Value::Null };
    let tokens = scores.into_iter().map(|score| {
        let mut token = scored(served, score.id, score.logprob);
        let top = score.top.into_iter().map(|(id, logprob)| scored(served, id, logprob));
        token["top_logprobs"] = top.collect();
        token
    });
    json!({ "content": tokens.collect::<Vec<Value>>(), "refusal": null })
}
