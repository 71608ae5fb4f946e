//! [`Flight`]: a request whose texts are being made, and its two ways back: one response, or a stream of events.

use super::{ApiError, request::Request};
use crate::{
    scheduler::{Event, Finish},
    score::{self, Score},
    server::Served,
    slot::Busy,
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

/// Between comments that keep a silent stream alive.
const ALIVE: Duration = Duration::from_secs(10);

/// How texts are written down; the two kinds of completions differ in nothing else.
pub trait Form: Send + Sync + Unpin + 'static {
    /// What ids begin with, the kind of a whole response, and the kind of a part of a stream.
    const NAMES: [&'static str; 3];

    /// The field of the prompt.
    const PROMPT: &'static str;

    /// The choice of a whole response.
    fn whole(&self, served: &Served, text: String, scores: Option<Vec<Score>>) -> Value;

    /// The choice that opens a text in a stream.
    fn open(&self) -> Option<Value>;

    /// The choice that goes on with it.
    fn part(&self, served: &Served, text: String, scores: Option<Vec<Score>>) -> Value;

    /// The choice that ends it.
    fn close(&self) -> Value;
}

/// A request whose texts are being made. When it is dropped, so is the work.
pub struct Flight<F> {
    form: F,
    request: Request,
    events: UnboundedReceiver<Event>,
    /// Texts, and those that have ended.
    choices: usize,
    ended: usize,
    prompt_tokens: usize,
    generated: usize,
    id: String,
    created: u64,
    begun: Instant,
    spoken: bool,
    finished: bool,
    _busy: Option<Busy>,
}

impl<F: Form> Flight<F> {
    /// Gives the work to the scheduler.
    ///
    /// # Errors
    /// As [`Request::submit`].
    pub fn new(
        form: F,
        request: Request,
        prompts: Vec<Vec<u32>>,
        busy: Option<Busy>,
    ) -> Result<Self, ApiError> {
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        let choices = prompts.len() * request.n;
        let begun = Instant::now();
        let events = request.submit(F::PROMPT, prompts)?;
        let random = [(); 2].map(|()| RandomState::new().build_hasher().finish());
        Ok(Self {
            form,
            request,
            events,
            choices,
            ended: 0,
            prompt_tokens,
            generated: 0,
            id: format!("{}-{:016x}{:016x}", F::NAMES[0], random[0], random[1]),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            begun,
            spoken: false,
            finished: false,
            _busy: busy,
        })
    }

    /// The response that the request asks for.
    pub async fn respond(self) -> Result<Response, ApiError> {
        if !self.request.stream {
            return Ok(self.collect().await?.into_response());
        }
        let mut pending = VecDeque::new();
        for choice in 0..self.choices {
            let open = self.form.open();
            pending.extend(open.map(|open| self.chunk(choice, open, None)));
        }
        let stream = Chunks { flight: self, pending, done: false };
        Ok(Sse::new(stream).keep_alive(KeepAlive::new().interval(ALIVE)).into_response())
    }

    /// Everything at once.
    async fn collect(mut self) -> Result<Json<Value>, ApiError> {
        let mut texts: Vec<(String, Vec<Score>, Option<Finish>)> = vec![Default::default(); self.choices];
        while self.ended < self.choices {
            let event = self.events.recv().await;
            match self.count(event)? {
                Event::Text { choice, text, scores } => {
                    texts[choice].0.push_str(&text);
                    texts[choice].1.extend(scores);
                }
                Event::End { choice, finish, .. } => texts[choice].2 = Some(finish),
                Event::NotFinite => return Err(not_finite()),
                Event::Failed(why) => return Err(failed(why)),
            }
        }
        let served = &self.request.served;
        let with_scores = self.request.scores.is_some();
        let choices = texts.into_iter().enumerate().map(|(index, (text, scores, finish))| {
            let choice = self.form.whole(served, text, with_scores.then_some(scores));
            placed(choice, index, finish)
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

    /// Takes note of an event.
    ///
    /// # Errors
    /// 503: the scheduler has gone.
    fn count(&mut self, event: Option<Event>) -> Result<Event, ApiError> {
        let event = event.ok_or_else(|| failed("the model's engine has failed"))?;
        match &event {
            Event::Text { .. } if !self.spoken => {
                self.spoken = true;
                self.request.served.metric.first_token(self.begun.elapsed());
            }
            Event::End { tokens, .. } => {
                self.ended += 1;
                self.generated += tokens;
                self.finished = self.ended == self.choices;
            }
            _ => (),
        }
        Ok(event)
    }

    fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt_tokens + self.generated,
        })
    }

    /// A part of a stream with one choice.
    fn chunk(&self, index: usize, choice: Value, finish: Option<Finish>) -> Value {
        self.part(vec![placed(choice, index, finish)])
    }

    fn part(&self, choices: Vec<Value>) -> Value {
        let mut part = json!({
            "id": self.id,
            "object": F::NAMES[2],
            "created": self.created,
            "model": self.request.served.model.name,
            "choices": choices,
        });
        if self.request.usage {
            part["usage"] = Value::Null;
        }
        part
    }
}

impl<F> Drop for Flight<F> {
    fn drop(&mut self) {
        let duration = self.begun.elapsed();
        self.request.served.metric.finished(duration, !self.finished);
        tracing::info!(
            id = self.id,
            model = self.request.served.model.name,
            texts = self.choices,
            prompt_tokens = self.prompt_tokens,
            generated_tokens = self.generated,
            finished = self.finished,
            milliseconds = duration.as_millis() as u64,
            "texts"
        );
    }
}

fn failed(why: &str) -> ApiError {
    tracing::warn!(why, "texts were given up");
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, why).code("given_up")
}

fn not_finite() -> ApiError {
    let error = EngineError::NotFinite;
    tracing::error!(%error, "a text was given up");
    ApiError::internal(error.to_string()).code("model_not_finite")
}

fn placed(mut choice: Value, index: usize, finish: Option<Finish>) -> Value {
    choice["index"] = index.into();
    choice["finish_reason"] = match finish {
        None => Value::Null,
        Some(Finish::Stop) => "stop".into(),
        Some(Finish::Length) => "length".into(),
    };
    choice
}

/// The events of a stream.
struct Chunks<F> {
    flight: Flight<F>,
    pending: VecDeque<Value>,
    done: bool,
}

impl<F: Form> Stream for Chunks<F> {
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
            if this.flight.finished {
                this.done = true;
                return Poll::Ready(Some(Ok(sse::Event::default().data("[DONE]"))));
            }
            let event = ready!(this.flight.events.poll_recv(context));
            this.take(event);
        }
    }
}

impl<F: Form> Chunks<F> {
    fn take(&mut self, event: Option<Event>) {
        let flight = &mut self.flight;
        let event = flight.count(event);
        let served = &flight.request.served;
        match event {
            Ok(Event::Text { choice, text, scores }) => {
                let scores = flight.request.scores.map(|_| scores);
                let part = flight.form.part(served, text, scores);
                self.pending.push_back(flight.chunk(choice, part, None));
            }
            Ok(Event::End { choice, finish, .. }) => {
                let close = flight.form.close();
                self.pending.push_back(flight.chunk(choice, close, Some(finish)));
                if flight.finished && flight.request.usage {
                    let mut last = flight.part(Vec::new());
                    last["usage"] = flight.usage();
                    self.pending.push_back(last);
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

/// A token and its log probability, as chat completions have them.
pub fn scored(served: &Served, id: u32, logprob: f32) -> Value {
    let (token, bytes) = score::text(served.model.tokenizer(), id);
    json!({ "token": token, "logprob": logprob, "bytes": bytes })
}
