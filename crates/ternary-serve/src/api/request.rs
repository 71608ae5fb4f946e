//! [`CompletionRequest`]: the fields that chat and text completions have in common.

use super::json_fields::{JsonFields, invalid_value};
use crate::{
    Truncation,
    api_error::ApiError,
    connection_slot::InFlight,
    job::{Event, Job},
    request_body::RequestBody,
    state::{ServedModel, ServerState},
};
use serde_json::Value;
use std::{
    hash::{BuildHasher, Hasher, RandomState},
    sync::Arc,
};
use ternary_format::FormatError;
use ternary_infer::{Engine, EngineError, Sampling, answer_room};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// Maximum length of a stop sequence, in bytes.
const STOP_BYTES: usize = 256;

/// Fields that clients send and that do not change the completion.
const IGNORED: [&str; 8] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
];

/// Longest body that is parsed on the thread of its connection, faster than another thread wakes up.
const INLINE_PARSE_BYTES: usize = 4 << 10;

/// Reads the body of a request and parses its fields with `parse`. Long bodies are parsed on another thread than those that
/// serve connections.
///
/// # Errors
/// Those of the body, of its JSON and of `parse`.
pub async fn accept<T: Send + 'static>(
    state: Arc<ServerState>,
    request: axum::extract::Request,
    parse: fn(&ServerState, JsonFields) -> Result<T, ApiError>,
) -> Result<(T, Option<InFlight>), ApiError> {
    let in_flight = request.extensions().get::<InFlight>().cloned();
    let (parts, body) = request.into_parts();
    let body = RequestBody::read(&parts.headers, body, &state.limits, &state.body_permits).await?;
    in_flight.as_ref().inspect(|in_flight| in_flight.received());
    if body.bytes.len() <= INLINE_PARSE_BYTES {
        return Ok((parse(&state, JsonFields::parse(&body.bytes)?)?, in_flight));
    }
    let permit = state.body_permits.parse(body.bytes.len()).await;
    // Tokenizing a long prompt takes a while.
    let work = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        let fields = JsonFields::parse(&body.bytes)?;
        drop(body);
        parse(&state, fields)
    });
    let value = work.await.map_err(|_| ApiError::internal("the request could not be parsed"))??;
    Ok((value, in_flight))
}

/// A request for completions, checked.
#[derive(Debug)]
pub struct CompletionRequest {
    pub served: Arc<ServedModel>,
    pub sampling: Sampling,
    /// Completions per prompt.
    pub n: usize,
    /// `None`: until the context is full.
    pub max_tokens: Option<usize>,
    pub stop_sequences: Vec<String>,
    pub truncation: Truncation,
    pub stream: bool,
    /// The stream ends with the number of tokens.
    pub include_usage: bool,
    /// `Some(k)`: with the log probability of each token, and of the `k` most likely ones.
    pub top_logprobs: Option<usize>,
}

impl CompletionRequest {
    /// Takes the common fields.
    ///
    /// # Errors
    /// 404: there is no such model. 400: a field has an invalid value.
    pub fn take(state: &ServerState, fields: &mut JsonFields) -> Result<Self, ApiError> {
        let limits = &state.limits;
        let served = state.find(fields.string("model")?.as_deref())?;
        let sampling = Sampling::default()
            .with_repetition_penalty(fields.number("repetition_penalty", 0.01..=100.0, 1.0)? as f32)
            .with_temperature(fields.number("temperature", 0.0..=2.0, 1.0)? as f32)
            .with_top_k(fields.integer("top_k", 0..=usize::MAX >> 1)?.unwrap_or(0))
            .with_top_p(fields.number("top_p", 0.0..=1.0, 1.0)? as f32)
            .with_min_p(fields.number("min_p", 0.0..=1.0, 0.0)? as f32)
            .with_seed(fields.seed("seed")?.unwrap_or_else(|| RandomState::new().build_hasher().finish()));
        sampling.check().map_err(|error| match error {
            EngineError::Option { key, .. } => ApiError::field(key, error.to_string()).code("invalid_value"),
            other => ApiError::body(other.to_string()),
        })?;
        let choices = limits.choices.min(limits.batch);
        let n = fields.integer("n", 1..=choices)?.unwrap_or(1);
        let newer = fields.integer("max_completion_tokens", 1..=limits.max_tokens)?;
        let older = fields.integer("max_tokens", 1..=limits.max_tokens)?;
        let stop_sequences = stop_sequences(fields.take("stop"), limits.stop_sequences)?;
        let truncation = match fields.take("truncation") {
            None => state.truncation,
            Some(value) => {
                let named = value.as_str().and_then(|name| name.parse().ok());
                named.ok_or_else(|| invalid_value("truncation", &value, "auto or disabled"))?
            }
        };
        let stream = fields.boolean("stream")?;
        let mut include_usage = false;
        if let Some(options) = fields.take("stream_options") {
            if !stream {
                return Err(ApiError::field("stream_options", "`stream_options` are for `stream: true`"));
            }
            let mut options = JsonFields::nested("stream_options", options)?;
            include_usage = options.boolean("include_usage")?;
            options.ignore(&["include_obfuscation"]);
            options.reject_unknown()?;
        }
        fields.ignore(&IGNORED);
        fields.reject_unsupported(&["frequency_penalty", "presence_penalty", "logit_bias"])?;
        Ok(Self {
            served,
            sampling,
            n,
            max_tokens: newer.or(older),
            stop_sequences,
            truncation,
            stream,
            include_usage,
            top_logprobs: None,
        })
    }

    /// Tokens of the context that truncation reserves for the answer.
    pub fn answer_room(&self) -> usize {
        answer_room(self.served.model.engine.context(), self.max_tokens)
    }

    /// Submits `n` completions for each prompt to the scheduler. `param` is the field with the prompt.
    ///
    /// # Errors
    /// 400: a prompt is empty, has unknown ids, or is longer than the context. 429: the queue is full. 503: the server is
    /// stopping, or the engine has failed.
    pub fn submit(&self, param: &str, prompts: Vec<Vec<u32>>) -> Result<UnboundedReceiver<Event>, ApiError> {
        let (sender, events) = unbounded_channel();
        let mut jobs = Vec::with_capacity(prompts.len());
        for (i, prompt) in prompts.into_iter().enumerate() {
            check(&self.served.model.engine, param, &prompt)?;
            jobs.push(Job {
                prompt,
                sampling: self.sampling.clone(),
                choices: i * self.n..(i + 1) * self.n,
                max_tokens: self.max_tokens.unwrap_or(usize::MAX),
                stop_sequences: self.stop_sequences.clone(),
                top_logprobs: self.top_logprobs,
                events: sender.clone(),
            });
        }
        self.served.scheduler.submit(jobs)?;
        Ok(events)
    }
}

/// The error for a prompt that cannot be encoded.
pub fn not_encoded(param: &str, error: &FormatError) -> ApiError {
    match error {
        FormatError::TooManyTokens { most } => too_long(param, &format!("more than {most}"), *most),
        other => ApiError::field(param, other.to_string()),
    }
}

/// The error for a prompt longer than the context, without truncation.
fn too_long(param: &str, found: &str, context: usize) -> ApiError {
    let advice = match param {
        "messages" => "shorten or remove messages, or send `truncation: \"auto\"` to drop the oldest turns",
        _ => "shorten it, or send `truncation: \"auto\"` to drop its beginning",
    };
    let message = format!(
        "the prompt has {found} tokens, expected at most the {context} of the model's context; {advice}"
    );
    ApiError::field(param, message).code("context_length_exceeded")
}

fn check(engine: &Engine, param: &str, prompt: &[u32]) -> Result<(), ApiError> {
    let (context, vocab_size) = (engine.context(), engine.spec().vocab_size);
    if prompt.is_empty() {
        return Err(
            ApiError::field(param, "the prompt is empty, expected at least one token").code("empty_prompt")
        );
    }
    if let Some(id) = prompt.iter().find(|id| **id as usize >= vocab_size) {
        return Err(ApiError::field(
            "prompt",
            format!("token {id} is outside the vocabulary of {vocab_size}"),
        ));
    }
    if prompt.len() > context {
        return Err(too_long(param, &prompt.len().to_string(), context));
    }
    Ok(())
}

/// A string or an array of strings.
fn stop_sequences(value: Option<Value>, max: usize) -> Result<Vec<String>, ApiError> {
    let list = match value {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(one) => vec![one],
    };
    if list.len() > max {
        return Err(ApiError::field(
            "stop",
            format!("`stop` has {} strings, expected at most {max}", list.len()),
        ));
    }
    list.into_iter()
        .map(|stop| match stop {
            Value::String(stop) if (1..=STOP_BYTES).contains(&stop.len()) => Ok(stop),
            other => Err(invalid_value("stop", &other, &format!("strings of 1 to {STOP_BYTES} bytes"))),
        })
        .collect()
}
