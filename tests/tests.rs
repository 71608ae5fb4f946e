mod backends;
mod claims;
mod distill;
mod experiments;
mod folder;
mod gradients;
mod hostile;
mod identity;
mod learns;
mod library;
mod lora;
mod oracle;
mod parity;
mod processes;
mod resume;
mod roundtrip;
mod sparsity;
mod start;
mod targets;
mod versions;

use burn_ternary::nn::{Activation, DuckConfig, Family};
use burn_ternary::run::Experiment;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The default experiment, small enough for a run in a second.
fn small_experiment(out: &Path, name: &str, assignments: &[&str]) -> Experiment {
    let mut experiment = Experiment::load("experiments/00-default.toml").unwrap();
    let (out, name) = (format!("run.out_dir={}", out.display()), format!("run.name={name}"));
    let common = [
        "run.device=flex",
        "run.batch_size=4",
        "run.eval_windows=16",
        "run.log_every=1",
        "run.checkpoint_every=60",
        "run.sample_tokens=0",
        "data.tokenizer=byte",
        "model.context=48",
        "model.d_model=32",
        "model.d_ff=64",
        "model.n_layers=1",
        "schedule.warmup_steps=5",
    ];
    for assignment in [&[&*out, &*name], &common[..], assignments].concat() {
        experiment.set(assignment).unwrap();
    }
    experiment
}

/// For tests of runs with dropout that are repeated: a device has one random generator per process, and another such run that
/// draws from it between a step's seed and its draws changes them.
fn alone_with_the_generator() -> MutexGuard<'static, ()> {
    static DRAWS: Mutex<()> = Mutex::new(());
    DRAWS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A small shape that uses every feature of its family.
fn shape(family: Family) -> DuckConfig {
    let gpt2 = family == Family::Gpt2;
    DuckConfig::duck_tiny()
        .with_family(family)
        .with_activation(if gpt2 { Activation::Gelu } else { Activation::Swiglu })
        .with_vocab_size(13)
        .with_context(11)
        .with_d_model(64)
        .with_n_layers(2)
        .with_n_heads(4)
        .with_n_kv_heads(if gpt2 { 4 } else { 2 })
        .with_d_ff(96)
}
