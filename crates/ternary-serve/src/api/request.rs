//! [`Request`]: what chat and text completions have in common.

use super::{
    ApiError,
    field::{Fields, wrong},
};
use crate::{
    Truncation, body,
    scheduler::{Event, Job},
    server::{Served, Server},
    slot::Busy,
};
use axum::http::StatusCode;
use serde_json::Value;
use std::{
    hash::{BuildHasher, Hasher, RandomState},
    sync::Arc,
};
use ternary_format::FormatError;
use ternary_infer::{Engine, EngineError, Sampling, answer_room};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// The longest stop string, in bytes.
const STOP: usize = 256;

/// Fields that clients send and that change no text.
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

/// Bytes of a body that are read sooner than another thread is woken for them.
const SHORT: usize = 4 << 10;

/// Reads a request and what `read` makes of its fields; long ones away from the threads that serve connections.
///
/// # Errors
/// Those of the body, of its JSON and of `read`.
pub async fn accept<T: Send + 'static>(
    server: Arc<Server>,
    request: axum::extract::Request,
    read: fn(&Server, Fields) -> Result<T, ApiError>,
) -> Result<(T, Option<Busy>), ApiError> {
    let busy = request.extensions().get::<Busy>().cloned();
    let (parts, body) = request.into_parts();
    let whole = body::read(&parts.headers, body, &server.limits, &server.intake).await?;
    busy.as_ref().inspect(|busy| busy.work());
    if whole.bytes.len() <= SHORT {
        return Ok((read(&server, Fields::parse(&whole.bytes)?)?, busy));
    }
    let permit = server.intake.read(whole.bytes.len()).await;
    // Long prompts take their time.
    let work = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        let fields = Fields::parse(&whole.bytes)?;
        drop(whole);
        read(&server, fields)
    });
    let value = work.await.map_err(|_| ApiError::internal("the request could not be read"))??;
    Ok((value, busy))
}

/// How texts are to be made, checked.
#[derive(Debug)]
pub struct Request {
    pub served: Arc<Served>,
    pub sampling: Sampling,
    /// Texts for each prompt.
    pub n: usize,
    /// `None`: as many as there is room for.
    pub tokens: Option<usize>,
    pub stops: Vec<String>,
    pub truncation: Truncation,
    pub stream: bool,
    /// The stream ends with how many tokens there were.
    pub usage: bool,
    /// Scores of the drawn tokens, and of so many others.
    pub scores: Option<usize>,
}

impl Request {
    /// # Errors
    /// 404: no such model. 400: a field has another value than it can have.
    pub fn take(server: &Server, fields: &mut Fields) -> Result<Self, ApiError> {
        let limits = &server.limits;
        let served = server.find(fields.string("model")?.as_deref())?;
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
        let newer = fields.integer("max_completion_tokens", 1..=limits.tokens)?;
        let tokens = fields.integer("max_tokens", 1..=limits.tokens)?;
        let stops = stops(fields.take("stop"), limits.stops)?;
        let truncation = match fields.take("truncation") {
            None => server.truncation,
            Some(value) => {
                let named = value.as_str().and_then(|name| name.parse().ok());
                named.ok_or_else(|| wrong("truncation", &value, "auto or disabled"))?
            }
        };
        let stream = fields.flag("stream")?;
        let mut usage = false;
        if let Some(options) = fields.take("stream_options") {
            if !stream {
                return Err(ApiError::field("stream_options", "`stream_options` are for `stream: true`"));
            }
            let mut options = Fields::inner("stream_options", options)?;
            usage = options.flag("include_usage")?;
            options.ignore(&["include_obfuscation"]);
            options.end()?;
        }
        fields.ignore(&IGNORED);
        fields.refuse(&["frequency_penalty", "presence_penalty", "logit_bias"])?;
        let tokens = newer.or(tokens);
        Ok(Self { served, sampling, n, tokens, stops, truncation, stream, usage, scores: None })
    }

    /// Tokens of the context reserved for the answer when the prompt is truncated.
    pub fn room(&self) -> usize {
        answer_room(self.served.model.engine.context(), self.tokens)
    }

    /// Gives the work to the scheduler: `n` texts for each prompt, which came in the field `param`.
    ///
    /// # Errors
    /// 400: a prompt is empty, has ids that are none, or is longer than the context. 429, 503: the work is not taken.
    pub fn submit(&self, param: &str, prompts: Vec<Vec<u32>>) -> Result<UnboundedReceiver<Event>, ApiError> {
        let (sender, events) = unbounded_channel();
        let mut jobs = Vec::with_capacity(prompts.len());
        for (i, prompt) in prompts.into_iter().enumerate() {
            check(&self.served.model.engine, param, &prompt)?;
            jobs.push(Job {
                prompt,
                sampling: self.sampling.clone(),
                choices: i * self.n..(i + 1) * self.n,
                tokens: self.tokens.unwrap_or(usize::MAX),
                stops: self.stops.clone(),
                scores: self.scores,
                events: sender.clone(),
            });
        }
        self.served.scheduler.submit(jobs)?;
        Ok(events)
    }
}

/// Why a prompt has no ids.
pub fn refused(param: &str, error: &FormatError) -> ApiError {
    match error {
        FormatError::TooManyTokens { most } => too_long(param, &format!("more than {most}"), *most),
        other => ApiError::field(param, other.to_string()),
    }
}

/// The error for a prompt longer than the context, without truncation.
fn too_long(param: &str, found: &str, context: usize) -> ApiError {
    let way_out = match param {
        "messages" => "shorten or remove messages, or send `truncation: \"auto\"` to drop the oldest turns",
        _ => "shorten it, or send `truncation: \"auto\"` to drop its beginning",
    };
    let message = format!(
        "the prompt has {found} tokens, expected at most the {context} of the model's context; {way_out}"
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
            format!("token {id} is outside of the vocabulary of {vocab_size}"),
        ));
    }
    if prompt.len() > context {
        return Err(too_long(param, &prompt.len().to_string(), context));
    }
    Ok(())
}

/// A string or some.
fn stops(value: Option<Value>, most: usize) -> Result<Vec<String>, ApiError> {
    let list = match value {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(one) => vec![one],
    };
    if list.len() > most {
        return Err(ApiError::field(
            "stop",
            format!("`stop` has {} strings, expected at most {most}", list.len()),
        ));
    }
    list.into_iter()
        .map(|stop| match stop {
            Value::String(stop) if (1..=STOP).contains(&stop.len()) => Ok(stop),
            other => Err(wrong("stop", &other, &format!("strings of 1 to {STOP} bytes"))),
        })
        .collect()
}

impl Server {
    /// A model by name; without a name, the only one.
    ///
    /// # Errors
    /// 404: no such model. 400: there are several.
    pub fn find(&self, name: Option<&str>) -> Result<Arc<Served>, ApiError> {
        let names = || {
            let names = self.served.iter().map(|served| format!("`{}`", served.model.name));
            names.collect::<Vec<_>>().join(", ")
        };
        match (name, &self.served[..]) {
            (None, [only]) => Ok(only.clone()),
            (None, _) => {
                let message = format!("`model` is missing, expected one of {}", names());
                Err(ApiError::field("model", message).code("model_missing"))
            }
            (Some(name), all) => {
                let served = all.iter().find(|served| served.model.name == name).cloned();
                served.ok_or_else(|| {
                    let short: String = name.chars().take(60).collect();
                    let message = format!("there is no model `{short}`, expected one of {}", names());
                    let error = ApiError::new(StatusCode::NOT_FOUND, message).code("model_not_found");
                    ApiError { param: Some("model".into()), ..error }
                })
            }
        }
    }
}
