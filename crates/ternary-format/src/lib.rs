//! Files of language models whose weights are -1, 0 or +1, and the one container that all of them are read into and
//! written from: a [`ModelSpec`], a tokenizer and named [`Tensor`]s make a [`PackedModel`].
//!
//! No deep-learning framework and no arithmetic beyond decoding: training and inference meet here only.

mod adapter;
pub mod archive;
mod block;
pub mod chat;
pub mod disk;
mod encoding;
mod error;
mod file;
pub mod gguf;
mod guard;
pub mod huggingface;
mod key;
pub mod memory;
mod model;
pub mod onnx;
mod safetensors;
mod say;
mod size;
mod spec;
mod tensor;
mod ternary;
pub mod threads;
mod tokenizer;

pub use adapter::{Adapter, LowRank};
pub use encoding::Encoding;
pub use error::FormatError;
pub use file::{WeightType, WriteOptions, read_model, write_model};
pub use model::PackedModel;
pub use say::say;
pub use size::{PartSize, SizeReport};
pub use spec::{Activation, Family, ModelSpec};
pub use tensor::{Bytes, Tensor};
pub use tokenizer::{Decoder, Ends, Special, Tokenizer};
