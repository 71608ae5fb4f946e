//! `duck convert`: makes a pretrained float model ternary, by quantization-aware training with itself as the teacher.

use crate::{Error, train};
use burn_ternary::{
    ImportError,
    run::{TrainCommand, TrainError, packed_model},
};
use std::path::{Path, PathBuf};
use toml::Value;

const EXAMPLES: &str = "\
Examples:
  duck convert --from SmolLM2-135M --data my_texts/ --steps 2000
  duck convert --from llama.gguf --data my_texts/ --set model.family=bitnet     a BitNet, with sub-norms
  duck convert --from SmolLM2-135M --experiment mine.toml
  duck export runs/converted-1 converted.gguf

The texts should resemble those that the model was trained on. The summary reports the validation loss of the float model,
of the rounded model before training, and of the trained model.";

/// Make a pretrained float model ternary, by quantization-aware training with itself as the teacher.
///
/// Shape, tokenizer, initial weights and teacher are those of the model. Everything else works as in `duck train`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES, mut_arg("experiment", |experiment| {
    experiment.long("experiment").value_name("FILE").help("Experiment file; keys that it omits have the values of this command's recipe")
}))]
pub struct Command {
    /// Model to convert: a Hugging Face folder, a GGUF file, or the run folder of a float model
    #[arg(long, value_name = "MODEL")]
    from: PathBuf,
    #[command(flatten)]
    train: TrainCommand,
}

/// The recipe: settings for keys that the experiment file does not set, besides the shape of the model.
const RECIPE: [&str; 15] = [
    "run.name=converted",
    "run.sample_prompts=[]",
    "distill.weight=0.9",
    "distill.temperature=1.0",
    // Pretrained weights change little: lower learning rates than from scratch, which decay to zero.
    "optim.lr=0.001",
    "optim.muon_lr=0.005",
    "optim.weight_decay=0.0",
    "schedule.shape=cosine",
    "schedule.warmup_steps=50",
    "schedule.min_lr_ratio=0.0",
    "schedule.float_until=0.0",
    "schedule.ramp_until=0.0",
    "schedule.sparse_until=0.0",
    "model.dropout=0.0",
    "quant.embedding=float",
];

impl Command {
    pub fn run(mut self) -> Result<(), Error> {
        if self.train.args.experiment.is_none() && self.train.args.data.is_empty() && !self.sets("data.train")
        {
            let message = "expected --data FILE_OR_FOLDER or --experiment FILE: the texts to train on".into();
            return Err(Error::Usage(message));
        }
        let spec = match packed_model(&self.from) {
            Ok(model) => model.spec,
            // Reported as by other commands.
            Err(TrainError::Import(ImportError::Format(error))) => return Err(Error::Model(error)),
            Err(error) => return Err(error.into()),
        };
        let path = |path: &Path| Value::from(path.display().to_string());
        let from = path(&self.from);
        // The bare name of a folder could also be a kind of tokenizer.
        let tokenizer = if self.from.is_dir() { self.from.join("tokenizer.json") } else { self.from.clone() };
        let value = |value: Result<Value, _>| {
            value.unwrap_or_else(|_: toml::ser::Error| unreachable!("names and numbers"))
        };
        let file = self.file();
        // The recipe replaces defaults, not keys of the file.
        let left_out = |setting: &str| {
            let key = setting.split_once('=').map_or(setting, |(key, _)| key);
            let (section, key) = key.split_once('.').expect("a key has a section");
            file.get(section).and_then(|section| section.get(key)).is_none()
        };
        let recipe = RECIPE.into_iter().filter(|setting| left_out(setting));
        let mut defaults: Vec<String> = recipe.map(String::from).collect();
        defaults.extend([
            format!("run.start_from={from}"),
            format!("distill.teacher={from}"),
            format!("data.tokenizer={}", path(&tokenizer)),
            format!("model.family={}", value(Value::try_from(spec.family))),
            format!("model.activation={}", value(Value::try_from(spec.activation))),
            "model.vocab_size=0".into(),
            format!("model.d_model={}", spec.d_model),
            format!("model.n_layers={}", spec.n_layers),
            format!("model.n_heads={}", spec.n_heads),
            format!("model.n_kv_heads={}", spec.n_kv_heads),
            format!("model.d_ff={}", spec.d_ff),
            format!("model.tied={}", spec.tied),
            format!("model.norm_eps={:?}", spec.norm_eps),
            format!("model.rope_theta={:?}", spec.rope_theta),
        ]);
        if left_out("model.context") {
            // Longer windows cost more than they gain; `--set model.context=` overrides this.
            defaults.push(format!("model.context={}", spec.context.min(256)));
        }
        self.train.args.defaults = defaults;
        train::run(&self.train)
    }

    /// The keys of the experiment file. Empty without a file, or if it cannot be read, which `train` reports.
    fn file(&self) -> toml::Table {
        let text = self.train.args.experiment.as_deref().map(ternary_format::disk::read_to_string);
        text.and_then(|text| text.ok()?.parse().ok()).unwrap_or_default()
    }

    fn sets(&self, key: &str) -> bool {
        self.train.args.set.iter().any(|assignment| assignment.split('=').next().map(str::trim) == Some(key))
    }
}
