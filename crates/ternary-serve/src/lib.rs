//! Serves language models with ternary weights over an OpenAI-compatible API, with a chat page at `/`.
//!
//! [`serve`] answers connections until it is told to stop; [`router`] is the same as a service of `axum`, for tests
//! and for programs that have a server of their own.
//!
//! | path | what |
//! |---|---|
//! | `POST /v1/chat/completions`, `POST /v1/completions` | text, at once or as server-sent events |
//! | `GET /v1/models` | the models by name |
//! | `GET /health`, `GET /metrics` | for supervisors and Prometheus |
//! | `GET /` | the page |
//!
//! Requests share an engine by continuous batching: one thread an engine reads prompts chunk by chunk and draws one
//! token for each text in the making, all in one pass. What a request with a seed gets does not depend on the others.
//!
//! What would change a text and cannot be done (tools, JSON schemas, `logit_bias`, penalties by count, `echo`, `suffix`) is
//! refused, not ignored, and so are fields that nobody knows. Beyond OpenAI's, requests have `top_k`, `min_p` and
//! `repetition_penalty`. `model` may be missing where one model is served.
//!
//! A prompt longer than the context is refused with the code `context_length_exceeded`. With `truncation: "auto"` (a field of
//! the request, as in OpenAI's Responses API, or [`ServeOptions::truncation`]) the server drops the oldest turns instead, but
//! never a system message or the last question, until [`answer_room`](ternary_infer::answer_room) tokens are free for the
//! answer. The response header `x-dropped-messages` counts the dropped messages. Text completions keep the end of the prompt.
//!
//! Without an API key the server listens on loopback only, unless told otherwise, and requests must name it by an address or by a
//! name that it was given. A page of another origin gets nothing.
//!
//! # Example
//! ```no_run
//! use std::sync::Arc;
//! use ternary_infer::{Engine, EngineOptions};
//! use ternary_serve::{Models, ServeOptions, bind, serve};
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let engine = Arc::new(Engine::load("duck.gguf", EngineOptions::default())?);
//! let models = Models::new([("duck".to_string(), engine)])?;
//! let options = ServeOptions::default();
//! let listener = bind(&options).await?;
//! println!("http://{}", listener.local_addr()?);
//! let interrupted = async { tokio::signal::ctrl_c().await.unwrap_or_default() };
//! serve(listener, models, options, interrupted).await?;
//! # Ok(())
//! # }
//! ```

mod api;
mod batch;
mod body;
mod connection;
mod error;
mod guard;
mod intake;
mod listener;
mod metric;
mod model;
mod option;
mod page;
mod scheduler;
mod score;
mod server;
mod slot;
mod stop;

pub use error::ServeError;
pub use model::Models;
pub use option::{Limits, ServeOptions, Truncation};
pub use server::{bind, router, serve};
