//! Model files of ternary language models (BitNet b1.58 style): GGUF, Hugging Face safetensors, ONNX and compressed
//! archives.
//!
//! Every reader returns a [`PackedModel`], and every writer takes one: a [`ModelSpec`], a [`Tokenizer`] and named
//! [`Tensor`]s. Training and inference meet in this crate only. It depends on no deep-learning framework, and
//! computes nothing but the conversion between storage types.
//!
//! # Example
//!
//! Convert a model to GGUF for llama.cpp, and report its size:
//!
//! ```
//! use ternary_format::{SizeReport, WriteOptions, read_model, write_model};
//! # use ternary_format::{Family, ModelSpec, PackedModel, Tensor, Tokenizer};
//! # let folder = tempfile::tempdir()?;
//! # let (input, output) = (folder.path().join("model.ternary"), folder.path().join("model.gguf"));
//! # let tokenizer = Tokenizer::byte();
//! # let spec = ModelSpec::new(Family::Llama)
//! #     .with_vocab_size(tokenizer.vocab_size())
//! #     .with_context(64)
//! #     .with_d_model(64)
//! #     .with_n_layers(1)
//! #     .with_n_heads(2)
//! #     .with_n_kv_heads(1)
//! #     .with_d_ff(128);
//! # let tensors = spec.tensors().map(|(name, shape)| {
//! #     let tensor = match shape[..] {
//! #         [rows, cols] => Tensor::ternary(rows, cols, cols, |row, codes, scales| {
//! #             codes[row % cols] = 1;
//! #             scales.fill(half::f16::ONE);
//! #         }),
//! #         _ => Tensor::f32(&shape, &vec![1.0; shape[0]]),
//! #     };
//! #     Ok((name, tensor?))
//! # });
//! # let tensors = tensors.collect::<Result<_, ternary_format::FormatError>>()?;
//! # let model = PackedModel::new("example", spec, tensors).with_tokenizer(Some(tokenizer));
//! # write_model(&model, &input, &WriteOptions::default())?;
//!
//! let model = read_model(&input)?; // a GGUF file, a Hugging Face folder, or a `*.ternary` archive
//! write_model(&model, &output, &WriteOptions::default())?; // the smallest lossless type of the kind of file
//! println!("{}", SizeReport::of_file(&output, &model.spec)?);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! `cargo run --release -p ternary-format --example convert -- IN OUT` does the same.
//!
//! # Modules
//!
//! | module | content |
//! |---|---|
//! | [`gguf`] | GGUF files of llama.cpp |
//! | [`huggingface`] | folders of transformers, and LoRA adapters of PEFT |
//! | [`onnx`] | ONNX graphs with a KV cache |
//! | [`archive`] | `*.ternary`: entropy-coded archives |
//! | [`chat`] | chat templates |
//! | [`tensors`] | named tensors of a model that belongs to no family |
//! | [`document`] | texts and dialogues of a corpus |
//! | [`disk`] | reading files, atomic writes, locks of run folders |
//! | [`memory`], [`threads`] | available memory, thread pool |
//!
//! At the root are the model ([`PackedModel`], [`ModelSpec`], [`Adapter`]), its tensors ([`Tensor`], [`Encoding`]),
//! the [`Tokenizer`], errors ([`FormatError`]) and sizes ([`SizeReport`]).
//!
//! # Files from strangers
//!
//! Readers do not trust their files: a malformed file is an error. It cannot cause a panic, an endless loop, or an
//! allocation by an unchecked length. See `fuzz/` in the repository.

#![warn(missing_docs)]

mod adapter;
pub mod archive;
mod block;
pub mod chat;
pub mod disk;
pub mod document;
mod encoding;
mod error;
mod file;
pub mod gguf;
pub mod huggingface;
mod key;
pub mod memory;
mod model;
pub mod onnx;
mod rotary;
mod safetensors;
mod size;
mod spec;
mod stderr;
mod tensor;
pub mod tensors;
mod ternary;
pub mod threads;
mod tokenizer;
mod tokenizer_limit;
mod weight_type;
mod write_options;

pub use adapter::{Adapter, LowRank};
pub use encoding::Encoding;
pub use error::FormatError;
pub use file::{read_model, write_model};
/// Half-precision float, the type of scales.
pub use half::f16;
pub use model::PackedModel;
pub use size::{PartSize, SizeReport};
pub use spec::{Activation, Family, ModelSpec};
pub use stderr::print_stderr;
pub use tensor::{Bytes, Tensor};
pub use tokenizer::{Decoder, Ends, Special, Tokenizer};
pub use weight_type::WeightType;
pub use write_options::WriteOptions;
