//! Generates text from model files with ternary weights, on CPUs.
//!
//! An [`Engine`] reads a GGUF file or a Hugging Face folder (gpt2, llama and bitnet families, weights of any encoding
//! that `ternary-format` reads) and packs the weights for this CPU. It continues [`Sequence`]s, each with its own keys
//! and values:
//!
//! | to | call |
//! |---|---|
//! | draw tokens one by one | [`Engine::generate`], [`Engine::resume`] |
//! | feed a prompt and look at the logits | [`Engine::prefill`], [`Sequence::logits`] |
//! | continue several sequences in one pass | [`Engine::decode_batch`] |
//! | draw their next tokens | [`Engine::sample_batch`] |
//! | read prompts beside them | [`Engine::extend_batch`] |
//! | score a text | [`Engine::logits`] |
//! | talk | [`DuckChatQuantized`] |
//!
//! Matrices multiply int8 activations with one scale a token ([`ActivationMode::Int8`]); [`ActivationMode::F32`] is
//! exact, and agrees with the float64 [`mod@reference`]. What a sequence gets does not depend, to the bit, on how its prompt
//! was cut, on what else is in the batch, on the threads or on the instruction set. After the first tokens, none takes
//! memory from the system.
//!
//! [`random`] makes models of random weights for measurements. Files, tokenizers and chat templates are those of the crate
//! `ternary-format`; `burn-ternary` has this crate as its module `infer`.
//!
//! # Example
//! ```no_run
//! use ternary_infer::{Engine, EngineOptions, GenerateOptions, Sampling};
//!
//! let engine = Engine::load("duck.gguf", EngineOptions::default())?;
//! let tokenizer = engine.tokenizer().expect("a tokenizer in the file");
//! let prompt = tokenizer.encode("The little duck")?;
//! let sampling = Sampling { temperature: 0.7, top_p: 0.95, ..Sampling::default() };
//! let options = GenerateOptions { sampling, max_tokens: 100, ..GenerateOptions::default() };
//! let ids: Vec<u32> = engine.generate(&prompt, options)?.collect();
//! println!("{}", tokenizer.decode(&ids));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod cache;
mod chat;
mod engine;
mod error;
mod forward;
mod model;
pub mod random;
pub mod reference;
mod sampler;

pub use chat::{Answer, DuckChatQuantized, answer_room};
pub use engine::{
    ActivationMode, CacheType, Engine, EngineOptions, Finish, GenerateOptions, Generation, Sequence,
};
pub use error::EngineError;
pub use sampler::{Sampler, Sampling};
