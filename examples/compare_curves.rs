//! Draws the validation losses of up to three runs in one SVG, from the `metrics.jsonl` of their run folders.
//!
//! `cargo run --release --example compare_curves -- OUT.svg TITLE LABEL=RUN_FOLDER LABEL=RUN_FOLDER`

use burn_ternary::report::{History, plot};
use std::{error::Error, path::Path};

const USAGE: &str = "expected arguments OUT.svg TITLE LABEL=RUN_FOLDER ..., with one to three runs";

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, title, runs @ ..] = &arguments[..] else { return Err(USAGE.into()) };
    if !(1..=3).contains(&runs.len()) {
        return Err(USAGE.into());
    }
    let mut curves = Vec::new();
    for run in runs {
        let (label, folder) = run.split_once('=').ok_or(USAGE)?;
        curves.push((label.to_string(), History::read(&Path::new(folder).join("metrics.jsonl"))?.valid));
    }
    plot::compared_losses(Path::new(path), &curves, title)?;
    Ok(())
}
