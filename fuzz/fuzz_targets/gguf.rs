//! The bytes of a GGUF file, or edits of a valid one. A model that can be read is used and run.
#![no_main]

use burn_ternary_fuzz::{container::Sections, files, init, use_model};
use libfuzzer_sys::{arbitrary::Unstructured, fuzz_target};
use std::sync::LazyLock;
use ternary_format::gguf;

static SEEDS: LazyLock<Vec<Sections>> =
    LazyLock::new(|| files().iter().map(|file| Sections::parse(file)).collect());

fuzz_target!(init: init(), |data: &[u8]| {
    let bytes = if data.starts_with(b"GGUF") {
        data.to_vec()
    } else {
        let mut input = Unstructured::new(data);
        let Ok(seed) = input.choose(&SEEDS) else { return };
        let mut seed = seed.clone();
        while !input.is_empty() && seed.edit(&mut input).is_ok() {}
        seed.bytes()
    };
    if let Ok(model) = gguf::parse(bytes.into()) {
        use_model(model);
    }
});
