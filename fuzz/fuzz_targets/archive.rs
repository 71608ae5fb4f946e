//! The bytes of an archive, or edits of a valid one. A model that can be read is used and run.
#![no_main]

use burn_ternary_fuzz::{archive::Sections, archives, init, use_model};
use libfuzzer_sys::{arbitrary::Unstructured, fuzz_target};
use std::{path::Path, sync::LazyLock};
use ternary_format::archive;

static SEEDS: LazyLock<Vec<Sections>> =
    LazyLock::new(|| archives().iter().map(|file| Sections::parse(file)).collect());

fuzz_target!(init: init(), |data: &[u8]| {
    let bytes = if data.starts_with(b"TRNA") {
        data.to_vec()
    } else {
        let mut input = Unstructured::new(data);
        let Ok(seed) = input.choose(&SEEDS) else { return };
        let mut seed = seed.clone();
        while !input.is_empty() && seed.edit(&mut input).is_ok() {}
        seed.bytes()
    };
    if let Ok(model) = archive::read_from(bytes.as_slice(), Path::new("memory")) {
        use_model(model);
    }
});
