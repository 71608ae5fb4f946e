//! `duck new`: writes an experiment for a text.

use crate::{Error, terminal};
use burn_ternary::run::{
    Experiment, Proposal, Size, propose,
    reference::{Choices, Key, Section, reference},
    version::VERSION,
};
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  duck new                                  writes experiment.toml for the embedded texts
  duck new poems.toml --data poems/         chooses size, tokenizer and steps for a text, and measures a few steps
  duck new poems.toml --data poems/ --size small --full
  duck train poems.toml";

/// Write an experiment file for a text.
///
/// Counts the text, chooses a model size, a tokenizer and a number of steps for it, trains a few steps to estimate the
/// training time, and prints a summary. All other settings have defaults, which were the best in our runs.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Command {
    /// Experiment file to write; `-` for standard output
    #[arg(default_value = "experiment.toml")]
    file: PathBuf,
    /// Training text: a .txt or .jsonl file, or a folder of them (repeatable); default: the embedded texts
    #[arg(long, value_name = "FILE_OR_FOLDER", default_value = "embedded")]
    data: Vec<String>,
    /// Model size; default: chosen by the amount of text
    #[arg(long, value_enum)]
    size: Option<Size>,
    /// Device for training and for the measured steps: auto, flex, ndarray, wgpu, tch or cuda, if compiled in
    #[arg(long, default_value = "auto")]
    device: String,
    /// Name of the run and its folder; default: the name of the file
    #[arg(long)]
    name: Option<String>,
    /// Write every key, including those with default values
    #[arg(long)]
    full: bool,
    /// Replace FILE if it is an existing plain file
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
        terminal::print_stderr(&summary);
        if proposal.software_renderer {
            terminal::print_stderr("this device is a software renderer; --device flex will be faster");
        }
        let text = header(&summary, full) + &sections(&proposal.experiment, full);
        if to_output {
            return terminal::stream(&text);
        }
        terminal::write_file(&file, text.as_bytes(), overwrite)?;
        terminal::print_stderr(format_args!("to train it: duck train {}", file.display()));
        terminal::print(file.display())
    }
}

/// The text, the model and the training that are proposed, one line each.
fn summary(proposal: &Proposal) -> String {
    let Proposal { size, text, tokens, epochs, parameters, experiment, seconds, bytes, device, .. } =
        proposal;
    let (model, run) = (&experiment.model, &experiment.run);
    let dialogues = match text.dialogues {
        0 => "no dialogues".into(),
        n if n == text.documents => "all of them dialogues".into(),
        n if !text.make_chat_model() => format!("{n} of them dialogues, too few for a chat model (1 %)"),
        n => format!("{n} of them dialogues"),
    };
    let documents = if text.documents == 1 { "document" } else { "documents" };
    let size = format!("{size:?}").to_lowercase();
    format!(
        "text: {} in {} {documents}, {dialogues}; {} distinct characters; about {} tokens (tokenizer: {})\n\
         model: {size}, {} parameters; {} blocks, width {}, context {} tokens\n\
         training: {} steps of {} tokens, which are {epochs:.1} epochs; about {} and {} MiB of memory on {device}, \
         estimated from a few steps",
        terminal::size(text.bytes as u64),
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
    let keys = match full {
        true => "This file has every key.",
        false => "Keys that are missing here have their defaults; `duck new --full` writes every key.",
    };
    format!(
        "# {}\n#\n\
         # `duck train FILE` runs this experiment; `--set section.key=value` overrides a key. An unknown key is an error.\n\
         # {keys}\n\nversion = {VERSION}\n",
        summary.replace('\n', "\n# ")
    )
}

/// The main keys and those with other values than their defaults, or all keys, each with a comment.
fn sections(experiment: &Experiment, full: bool) -> String {
    let mut text = String::new();
    for Section { name, keys, .. } in reference(experiment) {
        let is_written = |key: &&Key| {
            full || key.value != key.default || MAIN.contains(&(name.as_str(), key.name.as_str()))
        };
        let mut keys = keys.iter().filter(is_written).peekable();
        if keys.peek().is_some() {
            text += &format!("\n[{name}]\n");
        }
        for key in keys {
            text += &format!("{}{} = {}\n", comment(key), key.name, key.value);
        }
    }
    text
}

/// What a key sets, and the values that it may have, in lines of at most [`WIDTH`] characters.
fn comment(key: &Key) -> String {
    let mut words = key.description.lines().next().unwrap_or_default().to_owned();
    if let Choices::OneOf(choices) = &key.choices {
        let values: Vec<_> = choices.iter().map(|choice| choice.value.as_str()).collect();
        words += &format!(" Values: {}.", values.join(", "));
    }
    let mut lines = vec![String::from("#")];
    for word in words.replace('`', "").split(' ') {
        let line = lines.last_mut().expect("one line is there from the start");
        match line.chars().count() + 1 + word.chars().count() <= WIDTH {
            true => *line += &format!(" {word}"),
            false => lines.push(format!("# {word}")),
        }
    }
    lines.join("\n") + "\n"
}

/// Width of a comment line.
const WIDTH: usize = 110;

/// The keys that a proposal chooses, and those that users change most.
const MAIN: [(&str, &str); 18] = [
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
    fn a_missing_key_has_its_default() {
        let experiment = proposal().experiment;
        let [short, full] = [false, true].map(|full| header("", full) + &sections(&experiment, full));
        assert_eq!(parsed(&short), experiment);
        assert_eq!(parsed(&full), experiment);
        let keys =
            |text: &str| text.lines().filter(|line| !line.starts_with('#') && line.contains(" = ")).count();
        let all: usize = reference(&Experiment::default()).iter().map(|section| section.keys.len()).sum();
        // And the version, and `run.device`, which is not the default one.
        assert_eq!((keys(&short), keys(&full)), (MAIN.len() + 2, all + 1));
        experiment.validate("new").unwrap();
    }

    #[test]
    fn the_settings_that_were_best_are_the_defaults() {
        let Experiment { optim, schedule, distill, quant, .. } = proposal().experiment;
        assert_eq!((schedule.float_until, schedule.min_lr_ratio, distill.weight), (0.6, 0.0, 0.9));
        let text = toml::to_string(&optim).unwrap() + &toml::to_string(&quant).unwrap();
        for line in
            ["matrix_optimizer = \"muon\"", "muon_lr = 0.02", "scale = \"absmean\"", "embedding = \"int8\""]
        {
            assert!(text.contains(line), "{text}");
        }
    }

    #[test]
    fn each_key_has_a_comment_with_its_values() {
        let text = sections(&proposal().experiment, true);
        assert!(
            text.contains(
                "\n# Optimizer of the weight matrices of the blocks; AdamW has all other parameters."
            ),
            "{text}"
        );
        assert!(
            text.contains("Values: \"per_tensor\", \"per_channel\", { per_group = N }.\ngranularity = "),
            "{text}"
        );
        assert!(text.lines().all(|line| !line.starts_with('#') || line.chars().count() <= WIDTH), "{text}");
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
