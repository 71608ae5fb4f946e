//! `duck eval`: likelihood of texts, quality of answers, and accuracy of choices, for one or more models.

mod table;

use crate::{
    Error,
    model::{self, EngineFlags},
    terminal::{self, Progress},
};
use clap::{
    ValueEnum,
    builder::{PossibleValue, PossibleValuesParser, TypedValueParser},
};
use serde::Serialize;
use std::{
    ops::AddAssign,
    path::{Path, PathBuf},
};
use table::{Measure, Table};
use ternary_eval::{
    Bleu, Bootstrap, ChoiceAccuracy, Estimate, Evaluator, Example, Likelihood, Resampled, Similarity,
    Smoothing, Tokenization, answer, distinct, read_examples,
};
use ternary_format::document::Document;
use ternary_infer::{Engine, EngineError};

const EXAMPLES: &str = "\
Examples:
  duck eval runs/poems-1 runs/float-1                    on the validation documents of the two runs
  duck eval model.gguf --data valid.txt
  duck eval ternary.gguf float.gguf --data valid.txt --format markdown
  duck eval runs/duck-1 --data dialogues.jsonl --answers --save-answers answers.jsonl
  duck eval model.gguf --data quiz.jsonl --json

Data:
  A .txt file consists of texts, separated by lines `<|endoftext|>`. A line of a .jsonl file is an object with
    \"text\"                              the text is scored, without its end
    \"question\" and \"answer\"           the answer is scored, with the token that ends it
    \"question\", \"choices\", \"answer\"  the likelihoods of the choices are compared; \"answer\" is an index
                                        from 0 on, or one of the choices
  Without --data, the documents are those that the run folders among the models held out from training
  (valid.jsonl). They must be the same in all of them: other documents may have been trained on.

Measures:
  Loss is the mean of -ln p, in nats per token, of each document by itself; the validation loss of a training run is
  that of windows that join documents. Bits per byte compare models with different tokenizers.
  In brackets: 95 % bootstrap intervals over documents; a single document has none. Every model is compared with the
  first one, on the same resamples.";

/// Evaluate models: perplexity of texts, BLEU and ROUGE of answers, accuracy of multiple choice.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Command {
    /// Model files, Hugging Face folders or run folders; without one, the built-in Duck
    #[arg(value_name = "MODEL")]
    models: Vec<PathBuf>,
    /// Texts: a .txt or .jsonl file (repeatable) [default: the validation documents of the run folders]
    #[arg(long, value_name = "FILE")]
    data: Vec<PathBuf>,
    /// Stride of the evaluation window, in tokens [default: half of the context]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    stride: Option<u32>,
    /// Generate greedy answers to the questions, and compare them with the answers of the file
    #[arg(long)]
    answers: bool,
    /// Maximum length of an answer, in tokens
    #[arg(long, value_name = "N", default_value_t = 128, requires = "answers")]
    max_tokens: usize,
    /// Write the answers to a .jsonl file
    #[arg(long, value_name = "FILE", requires = "answers")]
    save_answers: Option<PathBuf>,
    /// Replace the file of --save-answers if it exists
    #[arg(long, requires = "save_answers")]
    overwrite: bool,
    /// BLEU tokenization, as sacrebleu names it
    #[arg(long, value_name = "NAME", default_value = "13a", value_parser = tokenizations())]
    bleu_tokenize: Tokenization,
    /// BLEU smoothing, as sacrebleu names it
    #[arg(long, value_name = "NAME", default_value = "exp", value_parser = smoothings())]
    bleu_smooth: Smoothing,
    /// Case-insensitive BLEU
    #[arg(long)]
    bleu_lowercase: bool,
    /// Bootstrap resamples for the 95 % confidence intervals; 0 disables them
    #[arg(long, value_name = "N", default_value_t = 1000)]
    resamples: usize,
    /// Random seed of the bootstrap
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Output format
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
    /// The same as --format json
    #[arg(long, conflicts_with = "format")]
    json: bool,
    #[command(flatten)]
    engine: EngineFlags,
}

fn tokenizations() -> impl TypedValueParser<Value = Tokenization> {
    let value = |tokenization: Tokenization| {
        PossibleValue::new(tokenization.name()).help(match tokenization {
            Tokenization::V13a => "Split off Western punctuation, except within numbers",
            Tokenization::Intl => "Split off all punctuation and symbols of Unicode",
            Tokenization::Char => "Split into characters",
            Tokenization::None => "Split at white space",
        })
    };
    PossibleValuesParser::new(Tokenization::ALL.map(value)).try_map(|name| name.parse::<Tokenization>())
}

fn smoothings() -> impl TypedValueParser<Value = Smoothing> {
    let value = |smoothing: Smoothing| {
        PossibleValue::new(smoothing.name()).help(match smoothing {
            Smoothing::Exp => {
                "Half a match for the first precision without one, a quarter for the second, and so on"
            }
            Smoothing::None => "No smoothing: the score is 0",
            Smoothing::Floor => "A tenth of a match",
            Smoothing::AddK => "One match and one n-gram more for n above 1",
        })
    };
    PossibleValuesParser::new(Smoothing::ALL.map(value)).try_map(|name| name.parse::<Smoothing>())
}

/// The validation documents in a run folder.
const RUN_VALID: &str = "valid.jsonl";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Markdown,
    Json,
}

#[derive(Serialize)]
struct Report {
    files: Vec<Table>,
    /// The signature of sacrebleu for these settings.
    #[serde(skip_serializing_if = "Option::is_none")]
    bleu: Option<String>,
    resamples: usize,
    seed: u64,
}

/// A line of the file of answers.
#[derive(Serialize)]
struct SavedAnswer<'a> {
    model: &'a str,
    file: &'a str,
    question: &'a str,
    reference: &'a str,
    answer: &'a str,
}

/// A file and its examples.
struct File {
    name: String,
    examples: Vec<Example>,
}

impl File {
    fn read(path: &Path) -> Result<Self, Error> {
        Ok(Self { name: path.display().to_string(), examples: read_examples(path)? })
    }

    /// The documents that a run held out from training.
    fn held_out(run: &Path) -> Result<Self, Error> {
        let path = run.join(RUN_VALID);
        if path.exists() {
            return Self::read(&path);
        }
        let expected = format!("its validation documents in {RUN_VALID}, or --data FILE");
        let found = "no such file, as in run folders of earlier versions; a `duck train --resume` of the run writes it";
        Err(Error::Data { origin: run.display().to_string(), expected, found: found.into() })
    }

    /// The validation documents of the run folders among the models.
    fn held_out_of_all(models: &[PathBuf]) -> Result<Self, Error> {
        let mut runs = models.iter().filter(|path| model::is_run(path));
        let first = runs.next().ok_or_else(|| {
            Error::Usage(
                "expected --data FILE, or a run folder among the models, for its validation documents".into(),
            )
        })?;
        let file = Self::held_out(first)?;
        for run in runs {
            if Self::held_out(run)?.examples != file.examples {
                let expected = format!(
                    "the validation documents of {}, or --data FILE with documents that no model was trained on",
                    first.display()
                );
                return Err(Error::Data {
                    origin: run.display().to_string(),
                    expected,
                    found: "other documents in its valid.jsonl".into(),
                });
            }
        }
        Ok(file)
    }

    /// Questions and answers.
    fn dialogues(&self) -> Vec<(&str, &str)> {
        let pair = |example| match example {
            &Example::Document(Document::Dialogue { ref question, ref answer }) => {
                Some((question.as_str(), answer.as_str()))
            }
            _ => None,
        };
        self.examples.iter().filter_map(pair).collect()
    }
}

impl Command {
    pub fn run(self) -> Result<(), Error> {
        // Files that cannot be read or written are reported before anything is computed.
        if let Some(path) = &self.save_answers {
            terminal::expect_free(path, self.overwrite)?;
        }
        let files = match &self.data[..] {
            [] => vec![File::held_out_of_all(&self.models)?],
            data => data.iter().map(|path| File::read(path)).collect::<Result<_, _>>()?,
        };
        if self.answers && files.iter().all(|file| file.dialogues().is_empty()) {
            let origin = files.iter().map(|file| file.name.as_str()).collect::<Vec<_>>().join(", ");
            let expected = "objects with \"question\" and \"answer\", for --answers".into();
            return Err(Error::Data { origin, expected, found: "none".into() });
        }
        let table = |file: &File| Table::new(file.name.clone(), file.examples.len());
        let mut tables: Vec<Table> = files.iter().map(table).collect();
        let mut saved = String::new();
        let embedded = self.models.is_empty().then_some(None);
        for path in self.models.iter().map(|path| Some(path.as_path())).chain(embedded) {
            let name = model::name(path);
            let engine = self.engine.load(path)?;
            for (file, table) in files.iter().zip(&mut tables) {
                let mut measures = self.score(&engine, file).map_err(Error::engine(&name))?;
                if self.answers {
                    let pairs = file.dialogues();
                    let answers = self.generate_answers(&engine, &pairs).map_err(Error::engine(&name))?;
                    for ((question, reference), answer) in pairs.iter().zip(&answers) {
                        let (model, file) = (name.as_str(), file.name.as_str());
                        let line = SavedAnswer { model, file, question, reference, answer };
                        saved += &serde_json::to_string(&line).expect("texts are JSON");
                        saved += "\n";
                    }
                    measures.extend(self.compare(&pairs, &answers));
                }
                table.add(name.clone(), measures);
            }
        }
        if let Some(path) = &self.save_answers {
            terminal::write_file(path, saved.as_bytes(), self.overwrite)?;
        }
        self.print(tables)
    }

    fn print(&self, files: Vec<Table>) -> Result<(), Error> {
        let format = if self.json { Format::Json } else { self.format };
        let bleu = self.answers.then(|| self.bleu().signature(1));
        if format == Format::Json {
            return terminal::print_json(&Report { files, bleu, resamples: self.resamples, seed: self.seed });
        }
        let table = if format == Format::Text { Table::text } else { Table::markdown };
        let note = bleu.iter().map(|signature| format!("BLEU {signature}"));
        terminal::print(files.iter().map(table).chain(note).collect::<Vec<_>>().join("\n\n"))
    }

    fn bleu(&self) -> Bleu {
        Bleu {
            tokenization: self.bleu_tokenize,
            smoothing: self.bleu_smooth,
            lowercase: self.bleu_lowercase,
            ..Bleu::default()
        }
    }

    fn resampled<T: Copy + Default + AddAssign>(&self, documents: &[T]) -> Resampled<T> {
        Resampled::new(documents, Bootstrap { resamples: self.resamples, seed: self.seed })
    }

    /// Likelihoods of the documents, and accuracy on the choices.
    fn score(&self, engine: &Engine, file: &File) -> Result<Vec<Measure>, EngineError> {
        let stride = self.stride.map_or(engine.context().div_ceil(2), |stride| stride as usize);
        let evaluator = Evaluator::new(engine, stride)?;
        let passages = file.examples.iter().map(|example| evaluator.passages(example));
        let passages = passages.collect::<Result<Vec<_>, _>>()?;
        let tokens: usize = passages.iter().flatten().map(|passage| passage.tokens()).sum();
        let progress = Progress::new("tokens", tokens as u64);
        let (mut documents, mut choices) = (Vec::new(), Vec::new());
        for (example, passages) in file.examples.iter().zip(&passages) {
            let likelihoods = passages
                .iter()
                .map(|passage| evaluator.likelihood(passage, |tokens| progress.advance(tokens)))
                .collect::<Result<Vec<_>, _>>()?;
            match example {
                Example::Choice { answer, .. } => choices.push(ChoiceAccuracy::new(&likelihoods, *answer)),
                Example::Document(_) => documents.extend(likelihoods),
            }
        }
        let documents = self.resampled(&documents);
        let choices = self.resampled(&choices);
        let measures = [
            measure("loss", "loss (nats per token)", 4, documents.estimate(Likelihood::loss)),
            measure("perplexity", "perplexity", 3, documents.estimate(Likelihood::perplexity)),
            measure("bits_per_byte", "bits per byte", 4, documents.estimate(Likelihood::bits_per_byte)),
            measure(
                "token_accuracy",
                "top-1 token accuracy",
                4,
                documents.estimate(Likelihood::token_accuracy),
            ),
            measure("choice_accuracy", "choice accuracy", 4, choices.estimate(ChoiceAccuracy::accuracy)),
            measure(
                "choice_accuracy_by_byte",
                "choice accuracy (per byte)",
                4,
                choices.estimate(ChoiceAccuracy::accuracy_per_byte),
            ),
        ];
        Ok(measures.into_iter().flatten().collect())
    }

    /// Answers all questions. A question that leaves no room in the context gets an empty answer.
    fn generate_answers(&self, engine: &Engine, pairs: &[(&str, &str)]) -> Result<Vec<String>, EngineError> {
        let (_, template) = engine.dialogues()?;
        let progress = Progress::new("answers", pairs.len() as u64);
        let generate = |(question, _): &(&str, &str)| {
            let answer = answer(engine, &template, question, self.max_tokens)?;
            progress.advance(1);
            Ok(answer.unwrap_or_default())
        };
        pairs.iter().map(generate).collect()
    }

    /// The similarity of answers to those of the file.
    fn compare(&self, pairs: &[(&str, &str)], answers: &[String]) -> Vec<Measure> {
        let bleu = self.bleu();
        let similarities: Vec<Similarity> = pairs
            .iter()
            .zip(answers)
            .map(|((_, reference), answer)| Similarity::new(&bleu, answer, reference))
            .collect();
        let sums = self.resampled(&similarities);
        let rouge = |i: usize| sums.estimate(move |sum| sum.mean_rouge()[i]);
        let words: Vec<_> = answers.iter().map(|answer| bleu.tokenization.tokens(answer)).collect();
        // A document that is resampled twice would count as a repetition: no interval.
        let distinct = |n| {
            let value = distinct(&words, n);
            (!answers.is_empty()).then_some(Estimate { value, resamples: Vec::new() })
        };
        let measures = [
            measure("bleu", "BLEU", 2, sums.estimate(|sum| bleu.score(&sum.bleu))),
            measure("rouge1", "ROUGE-1", 4, rouge(0)),
            measure("rouge2", "ROUGE-2", 4, rouge(1)),
            measure("rougeL", "ROUGE-L", 4, rouge(2)),
            measure("exact_match", "exact match", 4, sums.estimate(Similarity::exact_match)),
            measure("distinct_1", "distinct-1 (words)", 4, distinct(1)),
            measure("distinct_2", "distinct-2 (pairs of words)", 4, distinct(2)),
        ];
        measures.into_iter().flatten().collect()
    }
}

fn measure(
    key: &'static str,
    label: &'static str,
    digits: usize,
    estimate: Option<Estimate>,
) -> Option<Measure> {
    Some(Measure { key, label, digits, estimate: estimate? })
}
