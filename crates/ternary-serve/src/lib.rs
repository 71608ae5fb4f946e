//! HTTP server for language models with ternary weights: an OpenAI-compatible API, and a chat page at `/`.
//!
//! [`serve`] accepts connections until it is stopped. [`router`] is the same service for `axum`, for tests and for programs
//! with a server of their own.
//!
//! | path | response |
//! |---|---|
//! | `POST /v1/chat/completions`, `POST /v1/completions` | completions, as JSON or as server-sent events |
//! | `GET /v1/models` | the models by name |
//! | `GET /health`, `GET /metrics` | for supervisors and Prometheus |
//! | `GET /` | the chat page |
//!
//! # Example
//!
//! One request to a model, without a network:
//!
//! ```
//! use axum::{body::Body, http::Request};
//! use std::sync::Arc;
//! use ternary_infer::{Engine, EngineOptions};
//! use ternary_serve::{Models, ServeOptions, router};
//! use tower::ServiceExt;
//!
//! # let duck = concat!(env!("CARGO_MANIFEST_DIR"), "/../duck/duck.gguf");
//! let engine = Arc::new(Engine::load(duck, EngineOptions::default())?);
//! let models = Models::new([("duck".to_string(), engine)])?;
//! let router = router(models, &ServeOptions::default())?;
//! let body = r#"{"messages": [{"role": "user", "content": "Who are you?"}]}"#;
//! let request = Request::post("/v1/chat/completions").header("host", "localhost").body(Body::from(body))?;
//! # let runtime = tokio::runtime::Runtime::new()?;
//! # runtime.block_on(async {
//! let response = router.oneshot(request).await?;
//! assert_eq!(response.status(), 200);
//! # Ok::<(), std::convert::Infallible>(())
//! # })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A server until Ctrl-C:
//!
//! ```no_run
//! # use ternary_serve::{Models, ServeOptions, bind, serve};
//! # async fn run(models: Models) -> Result<(), Box<dyn std::error::Error>> {
//! let options = ServeOptions::default();
//! let listener = bind(&options).await?;
//! println!("http://{}", listener.local_addr()?);
//! let interrupted = async { tokio::signal::ctrl_c().await.unwrap_or_default() };
//! serve(listener, models, options, interrupted).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # Requests
//!
//! Beyond OpenAI's fields, requests have `top_k`, `min_p`, `repetition_penalty` and `truncation`. With one model, `model` is
//! optional. Fields that would change a completion and are not supported (tools, JSON schemas, `logit_bias`, presence and
//! frequency penalties, `echo`, `suffix`) are errors, and so are unknown fields.
//!
//! A prompt longer than the context is refused with the code `context_length_exceeded`. With `truncation: "auto"` (a field of
//! the request, as in OpenAI's Responses API, or [`ServeOptions::truncation`]) the server drops the oldest turns instead, but
//! never a system message or the last question, until [`answer_room`](ternary_infer::answer_room) tokens are free for the
//! answer. The response header `x-dropped-messages` counts the dropped messages. Text completions keep the end of the prompt.
//!
//! # Scheduling
//!
//! Requests share an engine by continuous batching: one thread per engine computes prompts in chunks, and one token for each
//! active completion, in one pass. Prompts with a common prefix share its KV cache (prefix caching). The completion of a
//! request with a seed does not depend on other requests.
//!
//! # Security
//!
//! Without an API key the server listens on loopback addresses only, unless [`ServeOptions::allow_remote`] is set, and
//! requests must address it by an IP address, as localhost or by one of [`ServeOptions::host_names`]. Requests from web
//! pages of other origins are refused. [`Limits`] bound the connections, memory and time that clients take.

#![warn(missing_docs)]

mod api;
mod api_error;
mod auth;
mod batch;
mod body_permits;
mod connection;
mod connection_slot;
mod error;
mod host;
mod job;
mod listener;
mod logprob;
mod metric;
mod model;
mod option;
mod page;
mod request_body;
mod scheduler;
mod server;
mod state;
mod stop_sequence;

pub use error::ServeError;
pub use model::Models;
pub use option::{Limits, ServeOptions, Truncation};
pub use server::{bind, router, serve};
