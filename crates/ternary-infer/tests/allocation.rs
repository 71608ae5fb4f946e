//! Promise: in steady state, generating a token allocates no memory.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};
use ternary_format::{Activation, Encoding, Family, ModelSpec};
use ternary_infer::{CacheType, Engine, EngineOptions, GenerateOptions, Sampling, random};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Of the quietest of three rounds: threads of the pool and of the test runner take some memory when they start.
fn allocations(mut work: impl FnMut()) -> usize {
    let mut round = || {
        let before = ALLOCATIONS.load(Relaxed);
        work();
        ALLOCATIONS.load(Relaxed) - before
    };
    round().min(round()).min(round())
}

#[test]
fn a_token_allocates_nothing() {
    for (family, activation, table, cache) in [
        (Family::Llama, Activation::Swiglu, Encoding::F16, CacheType::F16),
        (Family::Bitnet, Activation::SquaredRelu, Encoding::Q8_0, CacheType::Int8),
        (Family::Gpt2, Activation::Gelu, Encoding::Tq2_0, CacheType::F16),
    ] {
        let spec = ModelSpec::new(family)
            .with_activation(activation)
            .with_vocab_size(300)
            .with_context(128)
            .with_d_model(256)
            .with_n_layers(2)
            .with_n_heads(4)
            .with_n_kv_heads(4)
            .with_d_ff(256)
            .with_tied(true)
            .with_norm_eps(1e-5)
            .with_rope_theta(10_000.0);
        let model = random::model(&spec, |_| Encoding::Tq2_0, table, 1).unwrap();
        let options = EngineOptions::default().with_threads(2).with_cache(cache);
        let engine = Engine::from_model(model, options).unwrap();
        let sampling =
            Sampling::default().with_top_k(40).with_top_p(0.9).with_min_p(0.05).with_repetition_penalty(1.1);
        let options = GenerateOptions::default().with_sampling(sampling);
        let mut generation = engine.generate(&[1, 2, 3], options).unwrap();
        let mut next = || generation.next().expect("the context has room");
        (0..3).for_each(|_| assert!(next() < 300));
        let count = allocations(|| (0..30).for_each(|_| assert!(next() < 300)));
        assert_eq!(count, 0, "{family:?}: allocations in 30 tokens");

        let mut batch: Vec<_> = (0..5).map(|_| engine.sequence()).collect();
        let mut steps: Vec<_> = batch.iter_mut().map(|sequence| (sequence, 7)).collect();
        engine.decode_batch(&mut steps).unwrap();
        let count = allocations(|| (0..20).for_each(|_| engine.decode_batch(&mut steps).unwrap()));
        assert_eq!(count, 0, "{family:?}: allocations in 20 batches");
    }
}
