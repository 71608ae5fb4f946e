//! [`CompletionTask`]: a request whose completions are being generated, and its response: one JSON object or a stream.

use super::request::CompletionRequest;
use crate::{
    api_error::ApiError,
    connection_slot::InFlight,
    job::{Event, FinishReason},
    logprob::TokenLogprob,
    state::ServedModel,
};
use axum::{
    Json,
    http::StatusCode,
    response::{
        IntoResponse, Response,
        sse::{self, KeepAlive, Sse},
    },
};
use serde_json::{Value, json};
use std::{
    collections::VecDeque,
    convert::Infallible,
    hash::{BuildHasher, Hasher, RandomState},
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use ternary_infer::EngineError;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_stream::Stream;

/// Interval of the comments that keep a silent stream open.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// The JSON of a completion. Chat and text completions differ in nothing else.
pub trait ResponseFormat: Send + Sync + Unpin + 'static {
    /// The prefix of ids, the `object` of a response, and the `object` of a chunk of a stream.
    const NAMES: [&'static str; 3];

    /// The field with the prompt.
    const PROMPT: &'static str;

    /// The choice of a response that is not streamed.
    fn full(&self, served: &ServedModel, text: String, logprobs: Option<Vec<TokenLogprob>>) -> Value;

    /// The choice before the text of a stream.
    fn first_chunk(&self) -> Option<Value>;

    /// The choice with the next part of the text.
    fn chunk(&self, served: &ServedModel, text: String, logprobs: Option<Vec<TokenLogprob>>) -> Value;

    /// The choice after the text.
    fn last_chunk(&self) -> Value;
}

/// A request whose completions are being generated. Dropping it ends the work.
pub struct CompletionTask<F> {
    format: F,
    request: CompletionRequest,
    events: UnboundedReceiver<Event>,
    /// Number of completions, and of those that have ended.
    choices: usize,
    ended: usize,
    prompt_tokens: usize,
    completion_tokens: usize,
    id: String,
    created: u64,
    start: Instant,
    has_first_token: bool,
    finished: bool,
    _in_flight: Option<InFlight>,
}

impl<F: ResponseFormat> CompletionTask<F> {
    /// Submits the prompts to the scheduler.
    ///
    /// # Errors
    /// As [`CompletionRequest::submit`].
    pub fn new(
        format: F,
        request: CompletionRequest,
        prompts: Vec<Vec<u32>>,
        in_flight: Option<InFlight>,
    ) -> Result<Self, ApiError> {
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        let choices = prompts.len() * request.n;
        let start = Instant::now();
        let events = request.submit(F::PROMPT, prompts)?;
        let random = [(); 2].map(|()| RandomState::new().build_hasher().finish());
        Ok(Self {
            format,
            request,
            events,
            choices,
            ended: 0,
            prompt_tokens,
            completion_tokens: 0,
            id: format!("{}-{:016x}{:016x}", F::NAMES[0], random[0], random[1]),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            start,
            has_first_token: false,
            finished: false,
            _in_flight: in_flight,
        })
    }

    /// The response: JSON, or a stream if the request has `stream`.
    pub async fn respond(self) -> Result<Response, ApiError> {
        if !self.request.stream {
            return Ok(self.collect().await?.into_response());
        }
        let mut pending = VecDeque::new();
        for choice in 0..self.choices {
            let first = self.format.first_chunk();
            pending.extend(first.map(|first| self.chunk(choice, first, None)));
        }
        let stream = EventStream { task: self, pending, done: false };
        Ok(Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response())
    }

    /// Waits for the end of all completions.
    async fn collect(mut self) -> Result<Json<Value>, ApiError> {
        let mut texts: Vec<(String, Vec<TokenLogprob>, Option<FinishReason>)> =
            vec![Default::default(); self.choices];
        while self.ended < self.choices {
            let event = self.events.recv().await;
            match self.record(event)? {
                Event::Text { choice, text, logprobs } => {
                    texts[choice].0.push_str(&text);
                    texts[choice].1.extend(logprobs);
                }
                Event::End { choice, finish, .. } => texts[choice].2 = Some(finish),
                Event::NotFinite => return Err(not_finite()),
                Event::Failed(why) => return Err(failed(why)),
            }
        }
        let served = &self.request.served;
        let with_logprobs = self.request.top_logprobs.is_some();
        let choices = texts.into_iter().enumerate().map(|(index, (text, logprobs, finish))| {
            let choice = self.format.full(served, text, with_logprobs.then_some(logprobs));
            with_finish_reason(choice, index, finish)
        });
        let choices: Vec<Value> = choices.collect();
        Ok(Json(json!({
            "id": self.id,
            "object": F::NAMES[1],
            "created": self.created,
            "model": served.model.name,
            "choices": choices,
            "usage": self.usage(),
        })))
    }

    /// Updates the counts by an event.
    ///
    /// # Errors
    /// 503: the scheduler has ended.
    fn record(&mut self, event: Option<Event>) -> Result<Event, ApiError> {
        let event = event.ok_or_else(|| failed("the model's engine has failed"))?;
        match &event {
            Event::Text { .. } if !self.has_first_token => {
                self.has_first_token = true;
                self.request.served.metric.first_token(self.start.elapsed());
            }
            Event::End { tokens, .. } => {
                self.ended += 1;
                self.completion_tokens += tokens;
                self.finished = self.ended == self.choices;
            }
            _ => (),
        }
        Ok(event)
    }

    fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        })
    }

    /// A chunk of a stream, with one choice.
    fn chunk(&self, index: usize, choice: Value, finish: Option<FinishReason>) -> Value {
        self.chunk_of(vec![with_finish_reason(choice, index, finish)])
    }

    fn chunk_of(&self, choices: Vec<Value>) -> Value {
        let mut chunk = json!({
            "id": self.id,
            "object": F::NAMES[2],
            "created": self.created,
            "model": self.request.served.model.name,
            "choices": choices,
        });
        if self.request.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }
}

impl<F> Drop for CompletionTask<F> {
    fn drop(&mut self) {
        let duration = self.start.elapsed();
        self.request.served.metric.finished(duration, !self.finished);
        tracing::info!(
            id = self.id,
            model = self.request.served.model.name,
            completions = self.choices,
            prompt_tokens = self.prompt_tokens,
            completion_tokens = self.completion_tokens,
            finished = self.finished,
            milliseconds = duration.as_millis() as u64,
            "completion"
        );
    }
}

fn failed(why: &str) -> ApiError {
    tracing::warn!(why, "completions were given up");
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, why).code("given_up")
}

fn not_finite() -> ApiError {
    let error = EngineError::NotFinite;
    tracing::error!(%error, "a completion was given up");
    ApiError::internal(error.to_string()).code("model_not_finite")
}

fn with_finish_reason(mut choice: Value, index: usize, finish: Option<FinishReason>) -> Value {
    choice["index"] = index.into();
    choice["finish_reason"] = match finish {
        None => Value::Null,
        Some(FinishReason::Stop) => "stop".into(),
        Some(FinishReason::Length) => "length".into(),
    };
    choice
}

/// The server-sent events of a streamed response.
struct EventStream<F> {
    task: CompletionTask<F>,
    pending: VecDeque<Value>,
    done: bool,
}

impl<F: ResponseFormat> Stream for EventStream<F> {
    type Item = Result<sse::Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(chunk) = this.pending.pop_front() {
                return Poll::Ready(Some(Ok(sse::Event::default().data(chunk.to_string()))));
            }
            if this.done {
                return Poll::Ready(None);
            }
            if this.task.finished {
                this.done = true;
                return Poll::Ready(Some(Ok(sse::Event::default().data("[DONE]"))));
            }
            let event = ready!(this.task.events.poll_recv(context));
            this.push(event);
        }
    }
}

impl<F: ResponseFormat> EventStream<F> {
    /// Queues the chunks of an event.
    fn push(&mut self, event: Option<Event>) {
        let task = &mut self.task;
        let event = task.record(event);
        let served = &task.request.served;
        match event {
            Ok(Event::Text { choice, text, logprobs }) => {
                let logprobs = task.request.top_logprobs.map(|_| logprobs);
                let chunk = task.format.chunk(served, text, logprobs);
                self.pending.push_back(task.chunk(choice, chunk, None));
            }
            Ok(Event::End { choice, finish, .. }) => {
                let last = task.format.last_chunk();
                self.pending.push_back(task.chunk(choice, last, Some(finish)));
                if task.finished && task.request.include_usage {
                    let mut usage = task.chunk_of(Vec::new());
                    usage["usage"] = task.usage();
                    self.pending.push_back(usage);
                }
            }
            Ok(Event::NotFinite) => self.fail(not_finite()),
            Ok(Event::Failed(why)) => self.fail(failed(why)),
            Err(error) => self.fail(error),
        }
    }

    fn fail(&mut self, error: ApiError) {
        self.pending.push_back(error.json());
        self.done = true;
    }
}
