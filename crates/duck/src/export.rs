//! `duck export`: writes a model in another format.

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
  duck export mine.gguf folder/ --type F32     a Hugging Face folder
  duck export float.gguf merged.gguf --adapter runs/lora-1/adapter

The extension of OUT decides the format: .gguf, .onnx or .ternary (the smallest, for distribution). A name without an
extension, or one that ends in /, is a Hugging Face folder. Codes and scales are those of the model, without a second
rounding; a model that the format cannot store is an error. An adapter is merged into float weights. It cannot be merged
into ternary weights, and is stored next to them.";

/// Export a model as GGUF, ONNX, a Hugging Face folder or an archive (.ternary).
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Command {
    /// Run folder, model file or Hugging Face folder
    model: PathBuf,
    /// Output: NAME.gguf, NAME.onnx, NAME.ternary or a folder
    out: PathBuf,
    /// Type of the weights of the blocks: TQ2_0, TQ1_0, Q2_0, F16, BITNET, INT2, MATMULNBITS4 and others
    #[arg(long = "type", value_name = "TYPE")]
    weights: Option<WeightType>,
    /// Type of the token embedding and the untied head: F32, F16, Q8_0 and others [default: as trained]
    #[arg(long, value_name = "TYPE")]
    embedding: Option<Encoding>,
    #[command(flatten)]
    adapter: AdapterFlag,
    /// Replace OUT if it is an existing file; folders are never replaced
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
        let written = terminal::waiting(format!("writing {}", out.display()), model::bytes(&model), write)
            .map_err(Error::Export)?;
        let report = SizeReport::of_file(&out, &model.spec).map_err(Error::Export)?;
        let size = terminal::size(report.total.bytes);
        terminal::print_stderr(format_args!("wrote {} ({size}, weights as {written})", out.display()));
        if json { terminal::print_json(&report) } else { terminal::print(report) }
    }
}

/// Refuses a name with an unknown extension, since a folder of that name is rarely intended.
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
