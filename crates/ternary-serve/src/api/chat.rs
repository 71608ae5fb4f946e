//! `POST /v1/chat/completions`

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
use serde_json::{Value, json};
use std::sync::Arc;
use ternary_format::chat::{Message, Role};
use ternary_infer::EngineError;

/// Maximum of `top_logprobs`.
const TOP_LOGPROBS: usize = 20;

/// Response header that counts the messages dropped by truncation.
const DROPPED: &str = "x-dropped-messages";

/// Chat completions.
pub struct Chat;

pub async fn chat(
    State(state): State<Arc<ServerState>>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    let (Dialogue { request, ids, dropped }, in_flight) = accept(state, request, parse).await?;
    let mut response = CompletionTask::new(Chat, request, vec![ids], in_flight)?.respond().await?;
    if dropped > 0 {
        response.headers_mut().insert(DROPPED, dropped.into());
    }
    Ok(response)
}

/// A chat request, encoded.
struct Dialogue {
    request: CompletionRequest,
    ids: Vec<u32>,
    /// Messages dropped by truncation.
    dropped: usize,
}

fn parse(state: &ServerState, mut fields: JsonFields) -> Result<Dialogue, ApiError> {
    let mut request = CompletionRequest::take(state, &mut fields)?;
    let logprobs = fields.boolean("logprobs")?;
    let top = fields.integer("top_logprobs", 0..=TOP_LOGPROBS)?;
    if top.is_some() && !logprobs {
        return Err(ApiError::field("top_logprobs", "`top_logprobs` requires `logprobs: true`"));
    }
    request.top_logprobs = logprobs.then_some(top.unwrap_or(0));
    let mut messages = messages(fields.take("messages"))?;
    if let Some(format) = fields.take("response_format")
        && format.get("type").and_then(Value::as_str) != Some("text")
    {
        return Err(ApiError::field(
            "response_format",
            "`response_format` is only supported as `{\"type\": \"text\"}`",
        )
        .code("unsupported_parameter"));
    }
    if let Some(modalities) = fields.take("modalities")
        && modalities != json!(["text"])
    {
        return Err(invalid_value("modalities", &modalities, "[\"text\"]"));
    }
    fields.reject_unsupported(&[
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
    fields.reject_unknown()?;
    let before = messages.len();
    let ids = encode(&request, &mut messages)?;
    let dropped = before - messages.len();
    Ok(Dialogue { request, ids, dropped })
}

/// The tokens of a dialogue, from which truncation may drop messages.
fn encode(request: &CompletionRequest, messages: &mut Vec<Message>) -> Result<Vec<u32>, ApiError> {
    let model = &request.served.model;
    let Some(template) = &model.template else {
        let message =
            format!("model `{}` has no chat template; it continues text at /v1/completions", model.name);
        return Err(ApiError::field("model", message).code("no_chat_template"));
    };
    match request.truncation {
        Truncation::Disabled => {
            let ids = template.ids_within(model.tokenizer(), messages, true, model.engine.context());
            ids.map_err(|error| not_encoded(Chat::PROMPT, &error))
        }
        Truncation::Auto => {
            let ids = model.engine.fit_dialogue(template, messages, request.answer_room());
            ids.map_err(not_fitted)
        }
    }
}

/// The error for a dialogue that does not fit, even without its older turns.
fn not_fitted(error: EngineError) -> ApiError {
    match error {
        EngineError::Format(error) => not_encoded(Chat::PROMPT, &error),
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
            return Err(invalid_value(
                "messages",
                &other.unwrap_or_default(),
                "an array of at least one message",
            ));
        }
    };
    list.into_iter().enumerate().map(|(i, value)| message(&format!("messages[{i}]"), value)).collect()
}

fn message(place: &str, value: Value) -> Result<Message, ApiError> {
    let mut fields = JsonFields::nested(place, value)?;
    let role = fields.take("role").unwrap_or_default();
    let role = match role.as_str() {
        Some("system" | "developer") => Role::System,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        _ => return Err(invalid_value(&fields.path("role"), &role, "system, developer, user or assistant")),
    };
    let content = match fields.take("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => {
            let texts =
                parts.into_iter().enumerate().map(|(i, part)| text(&format!("{place}.content[{i}]"), part));
            texts.collect::<Result<String, _>>()?
        }
        other => {
            let expected = "a string or an array of text parts";
            return Err(invalid_value(&fields.path("content"), &other.unwrap_or_default(), expected));
        }
    };
    fields.ignore(&["name"]);
    fields.reject_unsupported(&["refusal", "tool_calls", "function_call", "audio", "annotations"])?;
    fields.reject_unknown()?;
    Ok(Message::new(role, content))
}

/// `{"type": "text", "text": ...}`
fn text(place: &str, value: Value) -> Result<String, ApiError> {
    let mut fields = JsonFields::nested(place, value)?;
    let kind = fields.take("type").unwrap_or_default();
    if kind != "text" {
        return Err(invalid_value(&fields.path("type"), &kind, "text"));
    }
    let text = fields.string("text")?;
    fields.reject_unknown()?;
    text.ok_or_else(|| invalid_value(&format!("{place}.text"), &Value::Null, "a string"))
}

impl ResponseFormat for Chat {
    const NAMES: [&'static str; 3] = ["chatcmpl", "chat.completion", "chat.completion.chunk"];
    const PROMPT: &'static str = "messages";

    fn full(&self, served: &ServedModel, text: String, logprobs: Option<Vec<TokenLogprob>>) -> Value {
        let message = json!({ "role": "assistant", "content": text, "refusal": null });
        json!({ "message": message, "logprobs": logprobs_json(served, logprobs) })
    }

    fn first_chunk(&self) -> Option<Value> {
        Some(json!({ "delta": { "role": "assistant", "content": "" }, "logprobs": null }))
    }

    fn chunk(&self, served: &ServedModel, text: String, logprobs: Option<Vec<TokenLogprob>>) -> Value {
        json!({ "delta": { "content": text }, "logprobs": logprobs_json(served, logprobs) })
    }

    fn last_chunk(&self) -> Value {
        json!({ "delta": {}, "logprobs": null })
    }
}

fn logprobs_json(served: &ServedModel, logprobs: Option<Vec<TokenLogprob>>) -> Value {
    let Some(logprobs) = logprobs else { return Value::Null };
    let tokens = logprobs.into_iter().map(|logprob| {
        let mut token = token_json(served, logprob.id, logprob.logprob);
        let top = logprob.top.into_iter().map(|(id, logprob)| token_json(served, id, logprob));
        token["top_logprobs"] = top.collect();
        token
    });
    json!({ "content": tokens.collect::<Vec<Value>>(), "refusal": null })
}

/// A token with its log probability.
fn token_json(served: &ServedModel, id: u32, logprob: f32) -> Value {
    let (token, bytes) = token_text(served.model.tokenizer(), id);
    json!({ "token": token, "logprob": logprob, "bytes": bytes })
}
