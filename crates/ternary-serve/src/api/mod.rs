//! The endpoints: JSON requests to jobs, and their events to JSON responses.

mod chat;
mod completion;
mod json_fields;
mod model;
mod request;
mod task;

pub use chat::chat;
pub use completion::completion;
pub use model::{health, metrics, model, models};
