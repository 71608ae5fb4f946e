//! [`EngineOptions`]: how an engine computes.

use getset::WithSetters;

/// Precision of the activations that matrices multiply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ActivationMode {
    /// Int8 with one scale per token, KV cache of [`CacheType`]: fast.
    #[default]
    Int8,
    /// f32, including the KV cache: exact and slow, for comparison.
    F32,
}

/// Precision of the KV cache; [`ActivationMode::F32`] always uses f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheType {
    /// Half precision.
    #[default]
    F16,
    /// Int8 with one f32 scale per key and per value (one head, one position): about half of the memory.
    Int8,
}

/// Options of [`Engine::load`](crate::Engine::load).
///
/// ```
/// use ternary_infer::{CacheType, EngineOptions};
///
/// let options = EngineOptions::default().with_threads(4).with_cache(CacheType::Int8);
/// ```
#[derive(Clone, Copy, Debug, WithSetters)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct EngineOptions {
    /// Number of threads; 0: one per core.
    pub threads: usize,
    /// Precision of the activations that matrices multiply.
    pub activations: ActivationMode,
    /// Precision of the KV cache.
    pub cache: CacheType,
    /// Maximum length of a sequence, in tokens, but at most that of the model. The KV cache of each sequence is allocated for
    /// this many tokens.
    pub context: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            threads: 0,
            activations: ActivationMode::default(),
            cache: CacheType::default(),
            context: 4096,
        }
    }
}
