//! Writes a trained model, or a model file of another kind, as GGUF, ONNX or a Hugging Face folder:
//! `cargo run --release --example export -- runs/00-default-1 duck.gguf --type TQ2_0`

use burn_ternary::ExportError;
use burn_ternary::train::{TrainError, packed_model};
use clap::Parser;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use ternary_format::{Encoding, SizeReport, WeightType, WriteOptions, write_model};

#[derive(Parser)]
#[command(after_help = "Exit codes: 2 usage, 3 a model that does not fit, 4 device, 5 disk.")]
struct Command {
    /// A folder that `--example train` left, or a model file: GGUF, or a Hugging Face folder
    model: PathBuf,
    /// What to write: NAME.gguf, NAME.onnx, or a folder
    out: PathBuf,
    /// Weights of the blocks: TQ2_0, TQ1_0, Q2_0, F16, BITNET, INT2, MATMULNBITS4 and so on
    #[arg(long = "type", value_name = "TYPE")]
    weights: Option<WeightType>,
    /// Token embedding and untied head: F32, F16, Q8_0 and so on; without it, as they were trained
    #[arg(long, value_name = "TYPE")]
    embedding: Option<Encoding>,
    /// Replace OUT if it is there
    #[arg(long)]
    overwrite: bool,
    /// Print the sizes as JSON
    #[arg(long)]
    json: bool,
}

impl Command {
    fn run(&self) -> Result<String, TrainError> {
        if self.out.exists() && !self.overwrite {
            return Err(TrainError::Exists { path: self.out.clone() });
        }
        let options = WriteOptions { weights: self.weights, embedding: self.embedding };
        let model = packed_model(&self.model)?;
        let written = write_model(&model, &self.out, &options);
        let report = written.and_then(|()| SizeReport::of_file(&self.out, &model.spec));
        let report = report.map_err(ExportError::from)?;
        let json = || serde_json::to_string(&report).expect("numbers are JSON");
        Ok(if self.json { json() } else { report.to_string() })
    }
}

fn main() -> ExitCode {
    match Command::parse().run() {
        Ok(report) => {
            let _ = writeln!(std::io::stdout(), "{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
