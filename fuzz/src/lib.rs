//! What the fuzz targets share: small sound models, edits that spoil them, and a use of whatever is read.

pub mod archive;
pub mod container;
pub mod json;
mod model;
mod seed;

pub use model::{small, use_model, use_tokenizer};
pub use seed::{SEEDS, archives, files, folders, tokenizers};
use std::sync::Once;

/// Lets pass, with a line, the panics that the code under test may catch: those of the crate `tokenizers`. All others
/// end the process, as libFuzzer wants it.
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
