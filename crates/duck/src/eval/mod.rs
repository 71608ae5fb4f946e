//! `duck eval`: how well models read texts, answer questions and choose.

mod answer;
mod bleu;
mod bootstrap;
mod category;
mod document;
mod likelihood;
mod rouge;
mod table;
mod tokenize;

use crate::{
    Error,
    model::{self, EngineFlags},
    terminal::{self, Progress},
};
use answer::Nearness;
use bleu::{Bleu, Smoothing};
use bootstrap::Bootstrap;
use clap::ValueEnum;
use document::Document;
use likelihood::{Reader, Score};
use serde::Serialize;
use std::{
    ops::AddAssign,
    path::{Path, PathBuf},
};
use table::{Measure, Table};
use ternary_infer::{Engine, EngineError};
use tokenize::Tokenization;

const EXAMPLES: &str = "\
Examples:
  duck eval model.gguf --data valid.txt
  duck eval ternary.gguf float.gguf --data valid.txt --format markdown
  duck eval runs/duck-1 --data dialogues.jsonl --answers --save-answers answers.jsonl
  duck eval model.gguf --data quiz.jsonl --json

A .txt file holds documents between lines `<|endoftext|>`; a line of a .jsonl file is an object with \"text\" (scored
whole, without its end), with \"question\" and \"answer\" (the answer is scored, with the token that ends it), or with
\"question\", \"choices\" and \"answer\" (a place from 0 on, or one of the choices).

loss: nats a token, each document by itself; a run's packed valid loss is that of windows of several documents. Bits
a byte compare models of different tokenizers. In brackets: 95 % intervals, by drawing the
documents again; of one document there is none. A model is compared to the first one on the same draws.";

/// Measure models on texts: loss, perplexity, bits per byte; answers: BLEU, ROUGE, exact matches; choices: accuracy.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Command {
    /// Model files, folders of Hugging Face's or run folders; without any, the Duck of this program
    #[arg(value_name = "MODEL")]
    models: Vec<PathBuf>,
    /// Texts: a .txt or .jsonl file (repeatable)
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    /// Stride of the evaluation window, in tokens [default: half of the context]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    stride: Option<u32>,
    /// Answer the questions, greedily, and compare with the answers of the file
    #[arg(long)]
    answers: bool,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 128, requires = "answers")]
    max_tokens: usize,
    /// Write the answers as .jsonl
    #[arg(long, value_name = "FILE", requires = "answers")]
    save_answers: Option<PathBuf>,
    /// Replace that file if it is there and a plain file
    #[arg(long, requires = "save_answers")]
    overwrite: bool,
    /// Tokenization of BLEU, as sacrebleu names it
    #[arg(long, value_enum, value_name = "NAME", default_value = "13a")]
    bleu_tokenize: Tokenization,
    /// Smoothing of BLEU, as sacrebleu names it
    #[arg(long, value_enum, value_name = "NAME", default_value = "exp")]
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
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
    /// The same as --format json
    #[arg(long, conflicts_with = "format")]
    json: bool,
    #[command(flatten)]
    engine: EngineFlags,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Markdown,
    Json,
}

#[derive(Serialize)]
struct Report {
    files: Vec<Table>,
    /// Of sacrebleu, for these settings.
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

/// A file and what it holds.
struct File {
    name: String,
    documents: Vec<Document>,
}

impl File {
    fn read(path: &Path) -> Result<Self, Error> {
        Ok(Self { name: path.display().to_string(), documents: document::read(path)? })
    }

    /// Questions and answers.
    fn dialogues<'a>(&'a self) -> Vec<(&'a str, &'a str)> {
        let pair = |document: &'a Document| match document {
            Document::Dialogue { question, answer } => Some((question.as_str(), answer.as_str())),
            _ => None,
        };
        self.documents.iter().filter_map(pair).collect()
    }
}

impl Command {
    pub fn run(self) -> Result<(), Error> {
        // What cannot be read or written is said before anything is computed.
        if let Some(path) = &self.save_answers {
            terminal::expect_free(path, self.overwrite)?;
        }
        let files = self.data.iter().map(|path| File::read(path)).collect::<Result<Vec<_>, _>>()?;
        if self.answers && files.iter().all(|file| file.dialogues().is_empty()) {
            let origin = files.iter().map(|file| file.name.as_str()).collect::<Vec<_>>().join(", ");
            let expected = "objects with \"question\" and \"answer\", for --answers".into();
            return Err(Error::Data { origin, expected, found: "none".into() });
        }
        let table = |file: &File| Table::new(file.name.clone(), file.documents.len());
        let mut tables: Vec<Table> = files.iter().map(table).collect();
        let mut saved = String::new();
        let embedded = self.models.is_empty().then_some(None);
        for path in self.models.iter().map(|path| Some(path.as_path())).chain(embedded) {
            let name = model::name(path);
            let engine = self.engine.load(path)?;
            for (file, table) in files.iter().zip(&mut tables) {
                let mut measures = self.read_texts(&engine, file).map_err(Error::engine(&name))?;
                if self.answers {
                    let pairs = file.dialogues();
                    let answers = self.answer(&engine, &pairs).map_err(Error::engine(&name))?;
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
            order: 4,
            effective_order: false,
        }
    }

    fn bootstrap(&self) -> Bootstrap {
        Bootstrap { resamples: self.resamples, seed: self.seed }
    }

    /// Loss and accuracy of the documents, and of the choices.
    fn read_texts(&self, engine: &Engine, file: &File) -> Result<Vec<Measure>, EngineError> {
        let tokenizer = engine.tokenizer().ok_or(EngineError::NoTokenizer)?;
        let template = match engine.dialogues() {
            Ok((_, template)) => Some(template),
            Err(EngineError::NoChatTemplate) => None,
            Err(error) => return Err(error),
        };
        let stride = self.stride.map_or(engine.context().div_ceil(2), |stride| stride as usize);
        let reader = Reader { engine, tokenizer, template, stride };
        let passages = file.documents.iter().map(|document| reader.passages(document));
        let passages = passages.collect::<Result<Vec<_>, _>>()?;
        let tokens: usize = passages.iter().flatten().map(|passage| passage.tokens()).sum();
        let progress = Progress::new("tokens", tokens as u64);
        let (mut scores, mut choices) = (Vec::new(), Vec::new());
        for (document, passages) in file.documents.iter().zip(&passages) {
            let scored = passages.iter().map(|passage| reader.score(passage, &progress));
            let scored = scored.collect::<Result<Vec<_>, _>>()?;
            match document {
                Document::Choice { answer, .. } => choices.push(Choices::new(&scored, *answer)),
                _ => scores.extend(scored),
            }
        }
        let ratio = |over: f64, under: usize| over / under as f64;
        let loss = |score: &Score| ratio(score.nats, score.tokens);
        let mut measures = Vec::new();
        let sums = Sums::new(&scores, self.bootstrap());
        measures.extend(sums.measure("loss", "loss, nats a token", 4, loss));
        measures.extend(sums.measure("perplexity", "perplexity", 3, |score| loss(score).exp()));
        measures.extend(sums.measure("bits_per_byte", "bits a byte", 4, |score| {
            ratio(score.nats / std::f64::consts::LN_2, score.bytes)
        }));
        let hits = |score: &Score| ratio(score.hits as f64, score.tokens);
        measures.extend(sums.measure("token_accuracy", "likeliest token is right", 4, hits));
        let sums = Sums::new(&choices, self.bootstrap());
        let right = |choices: &Choices| ratio(choices.right as f64, choices.all);
        measures.extend(sums.measure("choice_accuracy", "likeliest choice is right", 4, right));
        let right = |choices: &Choices| ratio(choices.right_by_byte as f64, choices.all);
        measures.extend(sums.measure("choice_accuracy_by_byte", "the same, a byte", 4, right));
        Ok(measures)
    }

    fn answer(&self, engine: &Engine, pairs: &[(&str, &str)]) -> Result<Vec<String>, EngineError> {
        let (_, template) = engine.dialogues()?;
        let questions: Vec<&str> = pairs.iter().map(|(question, _)| *question).collect();
        answer::answers(engine, &template, &questions, self.max_tokens)
    }

    /// How near answers come to those of the file.
    fn compare(&self, pairs: &[(&str, &str)], answers: &[String]) -> Vec<Measure> {
        let bleu = self.bleu();
        let nearness =
            pairs.iter().zip(answers).map(|((_, known), answer)| Nearness::new(&bleu, answer, known));
        let nearness: Vec<Nearness> = nearness.collect();
        let sums = Sums::new(&nearness, self.bootstrap());
        let mean = |sum: f64, nearness: &Nearness| sum / nearness.answers as f64;
        let mut measures = Vec::new();
        measures.extend(sums.measure("bleu", "BLEU", 2, |nearness| bleu.score(&nearness.bleu)));
        measures.extend(sums.measure("rouge1", "ROUGE-1", 4, |nearness| mean(nearness.rouge[0], nearness)));
        measures.extend(sums.measure("rouge2", "ROUGE-2", 4, |nearness| mean(nearness.rouge[1], nearness)));
        measures.extend(sums.measure("rougeL", "ROUGE-L", 4, |nearness| mean(nearness.rouge[2], nearness)));
        let exact = |nearness: &Nearness| mean(nearness.exact as f64, nearness);
        measures.extend(sums.measure("exact_match", "exact matches", 4, exact));
        let tokens: Vec<_> = answers.iter().map(|answer| bleu.tokenization.tokens(answer)).collect();
        for (n, key, label) in
            [(1, "distinct_1", "distinct words"), (2, "distinct_2", "distinct pairs of words")]
        {
            // Documents drawn twice would repeat what the model said once: no interval.
            let value = bleu::distinct(&tokens, n);
            let measure = Measure { key, label, digits: 4, value, draws: Vec::new() };
            measures.extend((!answers.is_empty()).then_some(measure));
        }
        measures
    }
}

/// Which choice is the likeliest; sums over documents.
#[derive(Clone, Copy, Debug, Default)]
struct Choices {
    right: usize,
    /// Likelihoods by byte, so that short choices have no advantage.
    right_by_byte: usize,
    all: usize,
}

impl Choices {
    fn new(scores: &[Score], answer: usize) -> Self {
        let least = |nats: fn(&Score) -> f64| {
            (0..scores.len()).min_by(|a, b| nats(&scores[*a]).total_cmp(&nats(&scores[*b]))) == Some(answer)
        };
        Self {
            right: usize::from(least(|score| score.nats)),
            right_by_byte: usize::from(least(|score| score.nats / score.bytes.max(1) as f64)),
            all: 1,
        }
    }
}

impl AddAssign for Choices {
    fn add_assign(&mut self, other: Self) {
        self.right += other.right;
        self.right_by_byte += other.right_by_byte;
        self.all += other.all;
    }
}

/// A sum over documents, and the same of those that were drawn again.
struct Sums<T> {
    /// `None` of no documents.
    whole: Option<T>,
    draws: Vec<T>,
}

impl<T: Copy + Default + AddAssign> Sums<T> {
    fn new(documents: &[T], bootstrap: Bootstrap) -> Self {
        let sum = |items: &mut dyn Iterator<Item = T>| {
            let mut sum = T::default();
            items.for_each(|item| sum += item);
            sum
        };
        let draws = bootstrap.draws(documents.len(), |places| sum(&mut places.iter().map(|i| documents[*i])));
        Self { whole: (!documents.is_empty()).then(|| sum(&mut documents.iter().copied())), draws }
    }

    fn measure(
        &self,
        key: &'static str,
        label: &'static str,
        digits: usize,
        value: impl Fn(&T) -> f64,
    ) -> Option<Measure> {
        let whole = self.whole.as_ref()?;
        Some(Measure {
            key,
            label,
            digits,
            value: value(whole),
            draws: self.draws.iter().map(value).collect(),
        })
    }
}

/// A path of the shared test data; says so where it is absent.
#[cfg(test)]
fn shared(path: &str) -> Option<PathBuf> {
    let full = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data").join(path);
    if full.exists() {
        return Some(full);
    }
    println!("skipped: ../shared/data/{path}: not there");
    None
}

/// The lines of a file of reference values.
#[cfg(test)]
fn cases(path: &str) -> Option<Vec<serde_json::Value>> {
    let text = std::fs::read_to_string(shared(path)?).unwrap();
    Some(text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}
