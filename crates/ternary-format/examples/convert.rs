//! Converts a model file to another kind of file, and prints the size of its parts. The paths select the kinds.
//!
//! `cargo run --release -p ternary-format --example convert -- IN OUT [TYPE [EMBEDDING]]`

use std::{env, error::Error, path::Path};
use ternary_format::{SizeReport, WriteOptions, read_model, write_model};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let (from, to, rest) = match &arguments[..] {
        [from, to, rest @ ..] if rest.len() <= 2 => (from, to, rest),
        _ => return Err("usage: convert IN OUT [TYPE [EMBEDDING]]".into()),
    };
    let options = WriteOptions::default()
        .with_weights(rest.first().map(|name| name.parse()).transpose()?)
        .with_embedding(rest.get(1).map(|name| name.parse()).transpose()?);
    let model = read_model(Path::new(from))?;
    write_model(&model, Path::new(to), &options)?;
    println!("{to}\n{}", SizeReport::of_file(Path::new(to), &model.spec)?);
    Ok(())
}
