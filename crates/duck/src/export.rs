//! `duck export`: writes a model as another kind of file.

use crate::{
    Error,
    model::{self, AdapterFlag},
    terminal,
};
use std::path::{Path, PathBuf, is_separator};
use ternary_format::{Encoding, SizeReport, WeightType, WriteOptions, disk::RunLock, write_model};

const EXAMPLES: &str = "\
Examples:
  duck export runs/mine-1 mine.gguf --type Q2_0
  duck export runs/mine-1 mine.onnx
  duck export mine.gguf folder/ --type F32     a folder of Hugging Face's
  duck export float.gguf merged.gguf --adapter runs/lora-1/adapter

The ending of OUT decides: .gguf, .onnx, .ternary (the smallest, for shipping); a name without an ending, or one that ends
in /, is a folder. Codes and scales are those of the model; nothing is rounded a second time, and a model that the kind of
file cannot hold is an error. An adapter becomes part of float weights; with ternary ones its sum is not ternary, and it
stays beside them.";

/// Write a model as GGUF, ONNX or a Hugging Face folder.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Command {
    /// Run folder, model file or folder of Hugging Face's
    model: PathBuf,
    /// What to write: NAME.gguf, NAME.onnx, NAME.ternary or a folder
    out: PathBuf,
    /// Weights of the blocks: TQ2_0, TQ1_0, Q2_0, F16, BITNET, INT2, MATMULNBITS4 and so on
    #[arg(long = "type", value_name = "TYPE")]
    weights: Option<WeightType>,
    /// Token embedding and untied head: F32, F16, Q8_0 and so on; without it, as they were trained
    #[arg(long, value_name = "TYPE")]
    embedding: Option<Encoding>,
    #[command(flatten)]
    adapter: AdapterFlag,
    /// Replace OUT if it is there and a plain file; a folder is never replaced
    #[arg(long)]
    overwrite: bool,
    /// Print the sizes as JSON
    #[arg(long)]
    json: bool,
}

impl Command {
    pub fn run(self) -> Result<(), Error> {
        let Self { model, out, weights, embedding, adapter, overwrite, json } = self;
        expect_kind(&out)?;
        terminal::expect_free(&out, overwrite)?;
        let _lock = RunLock::of_file(&out)?;
        let model = adapter.read(Some(&model))?;
        let options = WriteOptions::default().with_weights(weights).with_embedding(embedding);
        let write = || write_model(&model, &out, &options);
        terminal::waiting(format!("writing {}", out.display()), model::bytes(&model), write)
            .map_err(Error::Export)?;
        let report = SizeReport::of_file(&out, &model.spec).map_err(Error::Export)?;
        if json { terminal::print_json(&report) } else { terminal::print(report) }
    }
}

/// Refuses a name with an ending of no kind of model file: a folder of that name is rarely meant.
fn expect_kind(out: &Path) -> Result<(), Error> {
    let Some(ending) = out.extension() else { return Ok(()) };
    let is_folder = out.to_string_lossy().ends_with(is_separator);
    if is_folder || ["gguf", "onnx", "ternary"].iter().any(|known| ending == *known) {
        return Ok(());
    }
    let out = out.display();
    Err(Error::Usage(format!(
        "{out}: expected a name that ends in .gguf, .onnx or .ternary, or a folder; `{out}/` is a folder"
    )))
}
