//! Edits of a valid folder. A model that can be read is used and run.
#![no_main]

use burn_ternary_fuzz::{folders, init, json, use_model};
use libfuzzer_sys::{
    arbitrary::{Result, Unstructured},
    fuzz_target,
};
use std::{fs, sync::LazyLock};
use ternary_format::huggingface;

type Files = Vec<(String, Vec<u8>)>;

static SEEDS: LazyLock<Vec<Files>> = LazyLock::new(folders);

fuzz_target!(init: init(), |data: &[u8]| {
    let mut input = Unstructured::new(data);
    let Ok(seed) = input.choose(&SEEDS) else { return };
    let mut files = seed.clone();
    while !input.is_empty() && edit(&mut files, &mut input).is_ok() {}
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, contents) in files {
        fs::write(folder.path().join(name), contents).expect("room for a small file");
    }
    if let Ok(model) = huggingface::read(folder.path()) {
        use_model(model);
    }
});

/// Corrupts a file: a node of its JSON, the JSON header of a safetensors file, or a byte.
fn edit(files: &mut Files, input: &mut Unstructured) -> Result<()> {
    let (name, contents) = {
        let index = input.choose_index(files.len())?;
        &mut files[index]
    };
    let start = if name.ends_with(".safetensors") { 8 } else { 0 };
    let end = match contents.first_chunk::<8>() {
        Some(length) if start == 8 => (8 + u64::from_le_bytes(*length) as usize).min(contents.len()),
        _ => contents.len(),
    };
    if input.ratio(1, 8)? && !contents.is_empty() {
        let at = input.choose_index(contents.len())?;
        contents[at] = input.arbitrary()?;
    } else if let Some(Ok(mut value)) = contents.get(start..end).map(serde_json::from_slice) {
        json::edit(&mut value, &json::tokenizer_parts(), input)?;
        let json = value.to_string().into_bytes();
        let length = (json.len() as u64).to_le_bytes();
        *contents = [&length[..start], &json, &contents[end..]].concat();
    }
    Ok(())
}
