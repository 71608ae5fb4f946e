//! Shared code of the fuzz targets: small valid models, edits that corrupt them, and functions that use what was read.

pub mod archive;
pub mod container;
pub mod json;
mod model;
mod seed;

pub use model::{small, use_model, use_tokenizer};
pub use seed::{SEEDS, archives, files, folders, tokenizers};
use std::sync::Once;

/// Prints a line for panics of the crate `tokenizers`, which the code under test catches. All other panics end the process,
/// as libFuzzer requires.
pub fn init() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let abort = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let caught = panic.location().is_some_and(|at| at.file().contains("/tokenizers-"));
            if caught { eprintln!("{panic}") } else { abort(panic) }
        }));
    });
}
