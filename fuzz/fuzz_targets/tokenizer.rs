//! A `tokenizer.json`, or edits of a valid one. A tokenizer that can be read encodes and decodes.
#![no_main]

use burn_ternary_fuzz::{init, json, tokenizers, use_tokenizer};
use libfuzzer_sys::{arbitrary::Unstructured, fuzz_target};
use ternary_format::Tokenizer;

fuzz_target!(init: init(), |data: &[u8]| {
    let json = if data.starts_with(b"{") {
        data.to_vec()
    } else {
        let mut input = Unstructured::new(data);
        let Ok(seed) = input.choose(&tokenizers()).copied() else { return };
        let parts = json::tokenizer_parts();
        let mut value = serde_json::from_str(seed).expect("a sound tokenizer");
        while !input.is_empty() && json::edit(&mut value, &parts, &mut input).is_ok() {}
        value.to_string().into_bytes()
    };
    if let Ok(tokenizer) = Tokenizer::from_json(&json) {
        use_tokenizer(&tokenizer);
        if let Ok(tokenizer) = tokenizer.with_specials() {
            use_tokenizer(&tokenizer);
        }
    }
});
