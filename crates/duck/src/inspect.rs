//! `duck inspect`: shape, tensors and sizes of a model.

use crate::{
    Error,
    model::{self, ModelArgument},
    terminal::{self, Progress},
};
use serde::Serialize;
use std::{fmt::Write, path::Path};
use ternary_format::{ModelSpec, PackedModel, SizeReport, Tensor};

const EXAMPLES: &str = "\
Examples:
  duck inspect model.gguf
  duck inspect runs/mine-1 --json | jq .sizes.blocks.bits_per_weight";

/// Show a model's shape, tensors, encodings, sizes, bits per weight and zero fractions.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Command {
    #[command(flatten)]
    model: ModelArgument,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    model: String,
    name: &'a str,
    spec: &'a ModelSpec,
    /// Vocabulary size of the tokenizer; `None`: there is no tokenizer.
    tokens: Option<usize>,
    chat_template: bool,
    /// Sizes of the tensors below; of an archive, those of the compressed file.
    sizes: SizeReport,
    #[serde(skip)]
    compressed: bool,
    /// Share of zeros in the ternary matrices.
    zero_fraction: Option<f64>,
    /// The first tensor with NaN or infinite values. Other commands refuse such a model.
    not_finite: Option<String>,
    tensors: Vec<TensorReport<'a>>,
}

#[derive(Serialize)]
struct TensorReport<'a> {
    name: &'a str,
    shape: &'a [usize],
    encoding: String,
    bytes: usize,
    bits_per_weight: f64,
    /// Share of zeros.
    zero_fraction: f64,
}

impl Command {
    pub fn run(self) -> Result<(), Error> {
        let path = self.model.path();
        let model = model::read(path)?;
        let name = model::name(path);
        model.validate().map_err(|error| Error::engine(&name)(error.into()))?;
        let report = Report::new(path, &model)?;
        if self.json { terminal::print_json(&report) } else { terminal::print(report.table().trim_end()) }
    }
}

impl<'a> Report<'a> {
    fn new(path: Option<&Path>, model: &'a PackedModel) -> Result<Self, Error> {
        let archive =
            path.filter(|path| path.is_file() && path.extension().is_some_and(|end| end == "ternary"));
        let sizes = match archive {
            Some(path) => SizeReport::of_file(path, &model.spec).map_err(Error::Model)?,
            None => SizeReport::of_model(model),
        };
        let all: usize = model.tensors.values().map(weights).sum();
        let progress = Progress::new("weights", all as u64);
        let mut tensors = Vec::new();
        let (mut ternary_zeros, mut ternary_weights) = (0, 0);
        for (name, tensor) in &model.tensors {
            let (zeros, all) = (zeros(tensor, &progress), weights(tensor) as f64);
            if tensor.encoding().is_ternary() {
                ternary_zeros += zeros;
                ternary_weights += weights(tensor);
            }
            tensors.push(TensorReport {
                name,
                shape: tensor.shape(),
                encoding: tensor.encoding().to_string(),
                bytes: tensor.bytes().len(),
                bits_per_weight: 8.0 * tensor.bytes().len() as f64 / all,
                zero_fraction: zeros as f64 / all,
            });
        }
        Ok(Self {
            model: model::name(path),
            name: &model.name,
            spec: &model.spec,
            tokens: model.tokenizer.as_ref().map(|tokenizer| tokenizer.vocab_size()),
            chat_template: model.chat_template.is_some(),
            sizes,
            compressed: archive.is_some(),
            zero_fraction: (ternary_weights > 0).then(|| ternary_zeros as f64 / ternary_weights as f64),
            not_finite: model.check_finite().err().map(|error| error.to_string()),
            tensors,
        })
    }

    fn table(&self) -> String {
        let ModelSpec { family, vocab_size, context, d_model, n_layers, .. } = self.spec;
        let ModelSpec { n_heads, n_kv_heads, d_ff, activation, tied, norm_eps, rope_theta, .. } = self.spec;
        let lower = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
        let tokens = self.tokens.map_or("none".into(), |n| format!("{n} tokens"));
        let zeros = self.zero_fraction.map_or("no ternary matrices".into(), |share| format!("{share:.4}"));
        let rows = [
            ("model", self.model.clone()),
            ("name", self.name.into()),
            ("family", lower(family)),
            ("layers", format!("{n_layers} of {d_model} wide, feed-forward {d_ff} ({})", lower(activation))),
            ("heads", format!("{n_heads}, {n_kv_heads} for keys and values")),
            ("context", format!("{context} tokens")),
            ("vocabulary", format!("{vocab_size}, head {}", if *tied { "tied" } else { "of its own" })),
            ("norm epsilon", norm_eps.to_string()),
            ("rope theta", rope_theta.to_string()),
            ("tokenizer", tokens),
            ("chat template", if self.chat_template { "yes" } else { "no" }.into()),
            ("zero fraction", zeros),
        ];
        let mut text = String::new();
        let damage = self.not_finite.clone().map(|damage| ("damaged", damage));
        for (key, value) in rows.into_iter().chain(damage) {
            let _ = writeln!(text, "{key:<14}{value}");
        }
        let width = self.tensors.iter().map(|tensor| tensor.name.len()).max().unwrap_or(0).max(6);
        let header = ["tensor", "shape", "encoding", "bytes", "bits/weight", "zeros"];
        let [tensor, shape, encoding, bytes, bits, zeros] = header;
        let _ = writeln!(
            text,
            "\n{tensor:<width$}  {shape:>15}  {encoding:<8}  {bytes:>12}  {bits:>11}  {zeros:>6}"
        );
        for tensor in &self.tensors {
            let TensorReport { name, encoding, bytes, bits_per_weight, zero_fraction, .. } = tensor;
            let shape = tensor.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ");
            let _ = writeln!(
                text,
                "{name:<width$}  {shape:>15}  {encoding:<8}  {bytes:>12}  {bits_per_weight:>11.3}  {zero_fraction:>6.3}"
            );
        }
        if self.compressed {
            text += "\nThe bytes above are those of the unpacked tensors; those below are compressed, as in the file.\n";
        }
        let _ = write!(text, "\n{}", self.sizes);
        text
    }
}

fn weights(tensor: &Tensor) -> usize {
    tensor.rows() * tensor.cols()
}

fn zeros(tensor: &Tensor, progress: &Progress) -> usize {
    let mut row_values = vec![0.0; tensor.cols()];
    let mut zeros = 0;
    for row in 0..tensor.rows() {
        tensor.read_row(row, &mut row_values);
        zeros += row_values.iter().filter(|value| **value == 0.0).count();
        progress.advance(row_values.len());
    }
    tensor.release();
    zeros
}
