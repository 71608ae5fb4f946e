//! The API: JSON in, work for a scheduler, JSON out.

mod chat;
mod completion;
mod error;
mod field;
mod flight;
mod model;
mod request;

pub use chat::chat;
pub use completion::completion;
pub use error::ApiError;
pub use model::{health, metrics, model, models};
