//! `duck new`: begins an experiment.

use crate::{Error, terminal};
use burn_ternary::run::{Experiment, Proposal, Size, propose};
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  duck new                                  writes experiment.toml, for the texts of this program
  duck new poems.toml --data poems/         chooses size, tokenizer and steps for a text, and measures a few steps
  duck new poems.toml --data poems/ --size small --full
  duck train poems.toml";

/// Write an experiment file for a text, to be changed and trained.
///
/// Counts the text, chooses a model, a tokenizer and a number of steps for it, trains a few steps to see how long they
/// take, and prints a summary. All other settings have the defaults that did best in our runs.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Command {
    /// File to write; `-` is standard output
    #[arg(default_value = "experiment.toml")]
    file: PathBuf,
    /// Text to train on: .txt or .jsonl files, or folders of them (repeatable); without it, the texts of this program
    #[arg(long, value_name = "FILE_OR_FOLDER", default_value = "embedded")]
    data: Vec<String>,
    /// Size of the model; without it, one that goes with the amount of text
    #[arg(long, value_enum)]
    size: Option<Size>,
    /// Device to train on, and to measure: auto, flex, ndarray, wgpu, tch or cuda, of those that were compiled in
    #[arg(long, default_value = "auto")]
    device: String,
    /// Name of the run, and of its folder; without it, that of the file
    #[arg(long)]
    name: Option<String>,
    /// Write every key, also those that have their defaults
    #[arg(long)]
    full: bool,
    /// Replace FILE if it is there and a plain file
    #[arg(long)]
    overwrite: bool,
}

impl Command {
    pub fn run(self) -> Result<(), Error> {
        let Self { file, data, size, device, name, full, overwrite } = self;
        let to_output = file.as_os_str() == "-";
        if !to_output {
            terminal::expect_free(&file, overwrite)?;
        }
        let stem = file.file_stem().filter(|_| !to_output).map(|stem| stem.to_string_lossy().into_owned());
        let name = name.or(stem).unwrap_or("experiment".into());
        // A name that no run folder can have is refused before texts are read.
        let mut named = Experiment::embedded();
        named.run.name.clone_from(&name);
        named.validate("--name")?;
        let mut proposal = propose(&data, size, &device)?;
        proposal.experiment.run.name = name;
        proposal.experiment.validate(&file.display().to_string())?;
        let summary = summary(&proposal);
        terminal::say(&summary);
        let text = header(&summary, full) + &sections(&proposal.experiment, full);
        if to_output {
            return terminal::stream(&text);
        }
        terminal::write_file(&file, text.as_bytes(), overwrite)?;
        terminal::say(format_args!("train it: duck train {}", file.display()));
        terminal::print(file.display())
    }
}

/// What was found and what is proposed, in three lines.
fn summary(proposal: &Proposal) -> String {
    let Proposal { size, text, tokens, passes, parameters, experiment, seconds, bytes, device } = proposal;
    let (model, run) = (&experiment.model, &experiment.run);
    let dialogues = match text.dialogues {
        0 => "no dialogues".into(),
        n if n == text.documents => "all of them dialogues".into(),
        n => format!("{n} of them dialogues"),
    };
    let documents = if text.documents == 1 { "document" } else { "documents" };
    let size = format!("{size:?}").to_lowercase();
    format!(
        "text: {:.1} MB in {} {documents}, {dialogues}; {} different characters; about {} tokens ({})\n\
         model: {size}, {} parameters: {} blocks, {} wide, a context of {} tokens\n\
         training: {} steps of {} tokens, {passes:.1} passes over the text; about {} and {} MiB of memory on this machine \
         ({device}), by steps that were measured just now",
        text.bytes as f64 / 1e6,
        text.documents,
        text.alphabet,
        count(*tokens as f64),
        experiment.data.tokenizer,
        count(*parameters as f64),
        model.n_layers,
        model.d_model,
        model.context,
        run.steps,
        run.batch_size * model.context,
        time(*seconds),
        bytes >> 20,
    )
}

fn count(number: f64) -> String {
    match number {
        0.0..1e3 => format!("{number:.0}"),
        1e3..1e6 => format!("{:.0} k", number / 1e3),
        _ => format!("{:.1} M", number / 1e6),
    }
}

fn time(seconds: f64) -> String {
    match seconds {
        0.0..90.0 => format!("{seconds:.0} seconds"),
        90.0..5400.0 => format!("{:.0} minutes", seconds / 60.0),
        5400.0..172_800.0 => format!("{:.0} hours", seconds / 3600.0),
        _ => format!("{:.0} days", seconds / 86_400.0),
    }
}

fn header(summary: &str, full: bool) -> String {
    let rest = match full {
        true => "Every key is here.",
        false => {
            "Keys that are not here have their defaults, the best that we know; `duck new --full` writes them all."
        }
    };
    format!(
        "# Question:\n# Expectation:\n# Cost: as below.\n#\n# {}\n#\n\
         # `duck train FILE` runs this experiment; `--set section.key=value` overrides a key. An unknown key is an error.\n\
         # {rest}\n",
        summary.replace('\n', "\n# ")
    )
}

/// The keys that matter and those that have not their defaults, or all of them, each below what it means.
fn sections(experiment: &Experiment, full: bool) -> String {
    let (mut text, mut opened) = (String::new(), "");
    let (whole, defaults) = (experiment.to_toml(), Experiment::default().to_toml());
    for (section, line) in key_lines(&whole) {
        let (key, _) = line.split_once(" = ").expect("a line that sets a key");
        let chosen = || !key_lines(&defaults).any(|default| default == (section, line));
        if !full && !MATTER.contains(&(section, key)) && !chosen() {
            continue;
        }
        if opened != section {
            text += &format!("\n[{section}]\n");
            opened = section;
        }
        if let Some((.., comment)) = COMMENTS.iter().find(|known| (known.0, known.1) == (section, key)) {
            text += &format!("# {comment}\n");
        }
        text += &format!("{line}\n");
    }
    text
}

/// The lines of a file that set a key, each with its section.
fn key_lines(toml: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut section = "";
    toml.lines().filter_map(move |line| {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']');
        }
        line.contains(" = ").then_some((section, line))
    })
}

/// The keys that a proposal chooses, or that are changed first.
const MATTER: [(&str, &str); 18] = [
    ("data", "train"),
    ("data", "tokenizer"),
    ("data", "bpe_vocab_size"),
    ("model", "context"),
    ("model", "d_model"),
    ("model", "n_layers"),
    ("model", "n_heads"),
    ("model", "n_kv_heads"),
    ("model", "d_ff"),
    ("model", "dropout"),
    ("quant", "embedding"),
    ("optim", "lr"),
    ("optim", "muon_lr"),
    ("schedule", "float_until"),
    ("run", "name"),
    ("run", "steps"),
    ("run", "batch_size"),
    ("run", "eval_every"),
];

/// Section, key, what it means.
const COMMENTS: [(&str, &str, &str); 81] = [
    (
        "data",
        "train",
        "Files or folders of .txt and .jsonl, or \"embedded\": the stories and dialogues of the program.",
    ),
    ("data", "valid", "The validation texts; empty: a share of the training texts is held out."),
    ("data", "valid_fraction", "That share; above 0, at most 0.5."),
    (
        "data",
        "tokenizer",
        "\"byte\", \"char\", \"bpe\" (trained on the texts), or the path of a tokenizer.json or a model.",
    ),
    ("data", "bpe_vocab_size", "Largest vocabulary of a trained bpe tokenizer; the others ignore it."),
    (
        "model",
        "family",
        "\"llama\" (rotary positions, RMSNorm), \"gpt2\", or \"bitnet\" (llama with two more norms).",
    ),
    ("model", "vocab_size", "0: as many ids as the tokenizer has."),
    ("model", "context", "Longest sequence, in tokens."),
    ("model", "d_model", "Width. A multiple of 256 fits the smallest files (TQ2_0), one of 64 fits Q2_0."),
    ("model", "n_layers", "Blocks of attention and feed-forward."),
    ("model", "n_heads", "Attention heads; a divisor of d_model."),
    (
        "model",
        "n_kv_heads",
        "Heads that share keys and values: a divisor of n_heads; n_heads for ordinary attention.",
    ),
    ("model", "d_ff", "Width of the feed-forward blocks; multiples as for d_model."),
    (
        "model",
        "activation",
        "\"swiglu\" or \"squared_relu\"; in the gpt2 family \"gelu\" or \"squared_relu\".",
    ),
    ("model", "dropout", "Probability; 0: none."),
    ("model", "tied", "The head is the token embedding."),
    ("model", "norm_eps", "Added to the variance in norms."),
    ("model", "rope_theta", "Base of the rotary frequencies; gpt2 ignores it."),
    ("model", "compute", "\"f32\", or the matrix products in \"bf16\" or \"f16\"."),
    ("quant", "enabled", "false: the float twin, the same model without a quantizer."),
    ("quant", "scale", "\"absmean\", \"absmedian\", \"twn\"; \"learned\", \"seq\" and \"ttq\" are trained."),
    ("quant", "granularity", "Who shares a scale: \"per_tensor\", \"per_channel\" or { per_group = N }."),
    (
        "quant",
        "threshold",
        "Weights of at most this share of the scale become 0; twn and sparsity ignore it.",
    ),
    (
        "quant",
        "sparsity",
        "Zeros by rank: \"none\", { zero_fraction = 0.9 }, or { n_of_m = [N, M] }: N codes in each M inputs.",
    ),
    (
        "quant",
        "estimator",
        "Gradient: \"identity\", \"masked\" (none outside of a learned scale's range), \"annealed\" (soft until ramp_until).",
    ),
    ("quant", "activations", "\"float\", or \"int8\" with a scale a token."),
    (
        "quant",
        "compute",
        "Matrix products in \"float\" or, on flex, \"bf16\", \"int8_bf16\" or \"int8\"; the last two want int8 activations.",
    ),
    (
        "quant",
        "dead_bias",
        "Weight of the sums of zeroed weights as a bias; 0: none. For gpt2; 0.001 is usual.",
    ),
    ("quant", "input_norm", "A norm without parameters before each ternary layer; no file type can hold it."),
    ("quant", "embedding", "The token embedding: \"float\", \"int8\", \"int4\" or \"ternary\"."),
    ("quant", "head", "The same for a head that is not tied."),
    (
        "quant",
        "quantization_penalty",
        "Weight in the loss of the distance between latent and quantized weights.",
    ),
    ("quant", "scale_penalty", "Weight in the loss of the distance of learned scales from their best value."),
    ("distill", "teacher", "A run folder or model file with the same tokenizer to learn from; empty: none."),
    ("distill", "weight", "Share of the teacher in the loss."),
    ("distill", "temperature", "Softens both distributions."),
    (
        "distill",
        "divergence",
        "Kullback-Leibler divergence: \"forward\", \"reverse\" or \"mean\", half of each.",
    ),
    (
        "distill",
        "hidden_weight",
        "Weight in the loss of the distance between hidden states; wants equal widths.",
    ),
    (
        "distill",
        "relation_weight",
        "The same for how the positions' queries, keys and values relate to each other; any widths.",
    ),
    ("distill", "relation_heads", "Parts of queries, keys and values for that; a divisor of their widths."),
    ("distill", "layer", "Block that these two look at, from 1; 0: the last."),
    (
        "lora",
        "rank",
        "Rank of the products beside a frozen model, that of run.start_from; 0: the model itself is trained.",
    ),
    ("lora", "alpha", "The products are multiplied by alpha / rank."),
    (
        "lora",
        "targets",
        "\"all\", or layers that have one: \"query\", \"key\", \"value\", \"output\", \"gate\", \"up\", \"down\".",
    ),
    ("optim", "matrices", "\"muon\" for the matrices and AdamW for the rest, or \"adamw\" for all."),
    ("optim", "lr", "Peak learning rate of AdamW."),
    ("optim", "muon_lr", "Peak learning rate of Muon."),
    ("optim", "muon_momentum", "Momentum of Muon."),
    ("optim", "beta1", "Decay of AdamW's first moment."),
    ("optim", "beta2", "Decay of its second moment."),
    ("optim", "epsilon", "Added to the root of that."),
    ("optim", "moments", "\"float\", or \"int8\": two bytes a weight in place of eight; on flex."),
    ("optim", "weight_decay", "Decoupled; matrices only."),
    ("optim", "clip_norm", "Largest norm of the whole gradient; 0: any."),
    ("optim", "z_loss", "Weight in the loss of the squared log partition function; 0: none."),
    (
        "schedule",
        "shape",
        "Of the learning rate: \"constant\", \"cosine\", \"linear\" or \"warmup_stable_decay\".",
    ),
    ("schedule", "warmup_steps", "Steps over which the rate rises."),
    ("schedule", "decay_fraction", "Share of the steps that decays, for \"warmup_stable_decay\"."),
    ("schedule", "min_lr_ratio", "The last rate over the peak rate."),
    ("schedule", "weight_decay_until", "Share of the steps with weight decay; 1: all."),
    (
        "schedule",
        "float_until",
        "Share of the steps before weights become ternary; 0: ternary from the start.",
    ),
    ("schedule", "ramp_until", "Until here they blend from float to ternary; at most float_until: at once."),
    ("schedule", "sparse_until", "Until here quant.sparsity grows from float_until; at most that: at once."),
    ("run", "name", "The run folder is out_dir/name-seed."),
    ("run", "out_dir", "Folder of run folders."),
    ("run", "start_from", "A run folder or model file with the first weights; empty: they are random."),
    ("run", "seed", "Of weights, data order and dropout."),
    (
        "run",
        "device",
        "\"auto\", \"flex\", \"ndarray\", \"wgpu\", \"tch\" or \"cuda\", of those that were compiled in.",
    ),
    ("run", "steps", "Optimizer steps."),
    ("run", "batch_size", "Windows a forward pass."),
    ("run", "accumulation", "Forward passes a step."),
    ("run", "log_every", "Steps between two lines of metrics."),
    ("run", "eval_every", "Steps between two validations."),
    ("run", "eval_windows", "Windows of a validation; 0: all."),
    ("run", "checkpoint_every", "Steps between two checkpoints."),
    ("run", "keep_checkpoints", "Checkpoints that are kept."),
    (
        "run",
        "sample_prompts",
        "Text samples begin so; `<|user|>question` is answered. Empty: as held-out texts and questions do.",
    ),
    ("run", "sample_tokens", "Tokens of a sample; 0: no samples."),
    (
        "run",
        "spike_factor",
        "A step whose loss is more than so many times its running mean is skipped; 0: none.",
    ),
    (
        "run",
        "max_bad_steps",
        "After so many skipped steps in a row the run goes back to its last checkpoint.",
    ),
    ("run", "max_rollbacks", "After so many returns it stops."),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn proposal() -> Proposal {
        let mut proposal = propose(&["embedded".into()], None, "flex").unwrap();
        proposal.experiment.run.name = "a-b".into();
        proposal
    }

    fn parsed(text: &str) -> Experiment {
        Experiment::parse(text, "new").unwrap()
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let experiment = proposal().experiment;
        let [short, full] = [false, true].map(|full| header("", full) + &sections(&experiment, full));
        assert_eq!(parsed(&short), experiment);
        assert_eq!(parsed(&full), experiment);
        let keys =
            |text: &str| text.lines().filter(|line| !line.starts_with('#') && line.contains(" = ")).count();
        // The device is not the default one.
        assert_eq!((keys(&short), keys(&full)), (MATTER.len() + 1, COMMENTS.len()));
        experiment.validate("new").unwrap();
    }

    #[test]
    fn the_settings_that_were_best_are_the_defaults() {
        let Experiment { optim, schedule, distill, quant, .. } = proposal().experiment;
        assert_eq!((schedule.float_until, schedule.min_lr_ratio, distill.weight), (0.6, 0.0, 0.9));
        let text = toml::to_string(&optim).unwrap() + &toml::to_string(&quant).unwrap();
        for line in ["matrices = \"muon\"", "muon_lr = 0.02", "scale = \"absmean\"", "embedding = \"int8\""] {
            assert!(text.contains(line), "{text}");
        }
    }

    #[test]
    fn every_key_is_explained_and_nothing_else() {
        let whole = toml::Table::try_from(Experiment::default()).unwrap();
        let keys = whole.iter().flat_map(|(section, keys)| {
            let keys = keys.as_table().unwrap().keys();
            keys.map(move |key| (section.as_str(), key.as_str()))
        });
        let keys: Vec<_> = keys.collect();
        let explained: Vec<_> = COMMENTS.iter().map(|(section, key, _)| (*section, *key)).collect();
        let unexplained: Vec<_> = keys.iter().filter(|key| !explained.contains(key)).collect();
        let unknown: Vec<_> = explained.iter().filter(|key| !keys.contains(key)).collect();
        assert!(
            unexplained.is_empty() && unknown.is_empty(),
            "COMMENTS lacks {unexplained:?}, needs no {unknown:?}"
        );
        assert_eq!(keys.len(), explained.len());
    }

    #[test]
    fn a_summary_counts_in_words() {
        let mut proposal = proposal();
        let text = summary(&proposal);
        assert!(
            text.contains("of them dialogues") && text.contains("model: tiny, 984 k parameters"),
            "{text}"
        );
        proposal.text.dialogues = 0;
        proposal.seconds = 7_300.0;
        let text = summary(&proposal);
        assert!(text.contains("no dialogues") && text.contains("about 2 hours and"), "{text}");
    }
}
