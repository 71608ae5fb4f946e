//! CPU inference of language models with ternary weights (BitNet b1.58 style).
//!
//! An [`Engine`] reads a GGUF file, an archive or a Hugging Face folder (gpt2, llama and bitnet families, weights of any
//! encoding that `ternary-format` reads) and packs the weights for this CPU. It continues [`Sequence`]s, each with its own
//! KV cache.
//!
//! # Example
//!
//! Generate text:
//!
//! ```
//! use ternary_infer::{Engine, EngineOptions, GenerateOptions, Sampling};
//! # use ternary_format::{Encoding, Family, ModelSpec, Tokenizer, WriteOptions, write_model};
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("duck.gguf");
//! # let tokenizer = Tokenizer::byte();
//! # let spec = ModelSpec::new(Family::Llama)
//! #     .with_vocab_size(tokenizer.vocab_size())
//! #     .with_context(128)
//! #     .with_d_model(64)
//! #     .with_n_layers(1)
//! #     .with_n_heads(2)
//! #     .with_n_kv_heads(1)
//! #     .with_d_ff(128);
//! # let model = ternary_infer::random::model(&spec, |_| Encoding::Q2_0, Encoding::F32, 1)?;
//! # write_model(&model.with_tokenizer(Some(tokenizer)), &path, &WriteOptions::default())?;
//!
//! let engine = Engine::load(path, EngineOptions::default())?;
//! let tokenizer = engine.tokenizer().expect("a tokenizer in the file");
//! let prompt = tokenizer.encode("The little duck")?;
//! let sampling = Sampling::default().with_temperature(0.7).with_top_p(0.95);
//! let options = GenerateOptions::default().with_sampling(sampling).with_max_tokens(20);
//! let ids: Vec<u32> = engine.generate(&prompt, options)?.collect();
//! println!("{}", tokenizer.decode(&ids));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Overview
//!
//! | task | call |
//! |---|---|
//! | generate tokens one by one | [`Engine::generate`], [`Engine::resume`] |
//! | prefill a prompt and read the logits of the next token | [`Engine::prefill`], [`Sequence::logits`] |
//! | decode: one token for each of several sequences | [`Engine::decode_batch`] |
//! | draw their next tokens | [`Engine::sample_batch`] |
//! | prefill prompts in the same pass (continuous batching) | [`Engine::extend_batch`] |
//! | compute the logits at every position of a text | [`Engine::logits`] |
//! | chat | [`DuckChatQuantized`] |
//! | create models with random weights for measurements | [`random`] |
//!
//! Files, tokenizers and chat templates are those of the crate `ternary-format`. `burn-ternary` re-exports this crate as its
//! module `infer`.
//!
//! # Precision
//!
//! Matrices multiply int8 activations with one scale per token ([`ActivationMode::Int8`]). [`ActivationMode::F32`] is exact:
//! it agrees with the float64 [`mod@reference`].
//!
//! The logits of a sequence do not depend, to the bit, on how its prompt is split into chunks, on the other sequences of a
//! batch, on the number of threads or on the instruction set.
//!
//! # Memory
//!
//! After the first tokens, generating a token allocates no memory.

#![warn(missing_docs)]

mod cache;
mod chat;
mod engine;
mod error;
mod forward;
mod generation;
mod model;
mod option;
pub mod random;
pub mod reference;
mod sampler;
mod sequence;

pub use chat::{Answer, DuckChatQuantized, answer_room};
pub use engine::Engine;
pub use error::EngineError;
pub use generation::{FinishReason, GenerateOptions, Generation};
pub use option::{ActivationMode, CacheType, EngineOptions};
pub use sampler::{Sampler, Sampling};
pub use sequence::Sequence;
