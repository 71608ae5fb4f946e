//! `duck chat`: a dialogue in the terminal, or over pipes.

use crate::{
    Error,
    generate::finish_name,
    model::{self, EngineFlags, ModelArgument, SamplingFlags},
    terminal,
};
use rustyline::{
    Config, Editor, Helper, completion::Completer, error::ReadlineError, highlight::Highlighter,
    hint::Hinter, history::FileHistory, validate::Validator,
};
use serde::Serialize;
use std::{
    borrow::Cow,
    io::{self, BufRead, IsTerminal},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};
use ternary_infer::{DuckChatQuantized, EngineError, FinishReason, GenerateOptions, Sampling};

const EXAMPLES: &str = "\
Examples:
  duck chat
  duck chat runs/mine-1 --temperature 0.5
  printf 'Hello\\nWho are you?\\n' | duck chat model.gguf --seed 1 --json

From a pipe, each line is one question. A model that was trained on plain text continues each line.
In a terminal, /help lists the commands, Ctrl-C stops an answer, and Ctrl-D ends the dialogue. The history of questions is
saved in ~/.local/state/duck/history, or in the file named by DUCK_HISTORY; an empty DUCK_HISTORY disables it.";

/// Shown for a model without a chat template.
const CONTINUES: &str = "This model was trained on plain text: it continues what you write.";

const HELP: &str = "\
/help            this list
/reset           start a new dialogue
/system TEXT     start a new dialogue with a system message
/regenerate      generate another answer to the last question
/set             show temperature, top_k, top_p, min_p, repetition_penalty, seed and max_tokens
/set KEY=VALUE   change one of them
/stats           show tokens and speed
/save FILE       save the dialogue as JSON; /save --overwrite FILE replaces a file
/quit            exit

A question of several lines starts and ends with \"\"\"; in it, a / is text. Ctrl-C stops an answer, Ctrl-D exits.";

/// Maximum temperature, as in the server's API.
const MAX_TEMPERATURE: f32 = 2.0;
/// Starts and ends a question of several lines.
const QUOTES: &str = "\"\"\"";
/// Environment variable with the path of the history; empty: no history.
const HISTORY: &str = "DUCK_HISTORY";
/// Maximum number of questions in the history.
const HISTORY_SIZE: usize = 1000;

/// Chat with a model in the terminal or over a pipe.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Command {
    #[command(flatten)]
    model: ModelArgument,
    /// System message, for models trained with one
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    sampling: SamplingFlags,
    #[command(flatten)]
    engine: EngineFlags,
    /// Print one line of JSON per question
    #[arg(long)]
    json: bool,
}

impl Command {
    pub fn run(self) -> Result<(), Error> {
        let name = model::name(self.model.path());
        let engine = self.engine.load(self.model.path())?;
        let dialogue = DuckChatQuantized::new(Arc::new(engine), self.sampling.options(Vec::new()));
        let dialogue = dialogue.map_err(Error::engine(&name))?;
        let mut chat =
            Chat { name, dialogue, json: self.json, last: Stats::default(), total: 0, regenerations: 0 };
        if let Some(text) = self.system {
            chat.restart(Some(&text))?;
        }
        if io::stdin().is_terminal() {
            return chat.talk();
        }
        if chat.dialogue.continues_text() {
            terminal::print_stderr(CONTINUES);
        }
        chat.answer_lines(io::stdin().lock())
    }
}

struct Chat {
    name: String,
    dialogue: DuckChatQuantized,
    json: bool,
    last: Stats,
    /// Tokens of all answers.
    total: usize,
    /// How often the last answer was regenerated.
    regenerations: u64,
}

/// The output of `--json` for a turn.
#[derive(Serialize)]
struct Turn<'a> {
    question: &'a str,
    answer: &'a str,
    finish: &'static str,
    #[serde(flatten)]
    stats: Stats,
}

/// The output of `--json` for a question that is too long.
#[derive(Serialize)]
struct Unanswered<'a> {
    question: &'a str,
    error: &'a str,
}

/// Tokens and seconds of an answer. Of the prompt, only the tokens that earlier turns had not computed.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Stats {
    prompt_tokens: usize,
    tokens: usize,
    prompt_s: f64,
    generate_s: f64,
}

/// Set by Ctrl-C, which stops an answer.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

impl Chat {
    /// A dialogue with a line editor. Errors of a turn are printed, and the dialogue continues.
    fn talk(&mut self) -> Result<(), Error> {
        let failed = |error: ReadlineError| Error::Input(io::Error::other(error));
        let config =
            Config::builder().max_history_size(HISTORY_SIZE).map_err(failed)?.auto_add_history(true).build();
        let mut editor: Editor<Dimmed, FileHistory> = Editor::with_config(config).map_err(failed)?;
        editor.set_helper(Some(Dimmed));
        let history = history();
        if let Some(path) = &history {
            // The file is missing before the first session.
            let _ = editor.load_history(path);
        }
        watch_interrupts();
        terminal::print_stderr(self.greeting());
        loop {
            let entry = match read_entry(&mut editor) {
                Ok(entry) => entry,
                Err(ReadlineError::Interrupted) => {
                    terminal::print_stderr("Ctrl-D exits");
                    continue;
                }
                Err(ReadlineError::Eof) => return Ok(()),
                Err(error) => return Err(failed(error)),
            };
            if let Some(path) = &history {
                // A history that cannot be saved lasts for this session.
                let _ = path.parent().map(std::fs::create_dir_all);
                let _ = editor.append_history(path);
            }
            let taken = match entry {
                Entry::Line(line) => self.take_line(&line),
                Entry::Block(text) => self.ask(&text).map(|()| true),
            };
            match taken {
                Ok(true) => (),
                Ok(false) => return Ok(()),
                Err(error @ (Error::Output(_) | Error::Input(_))) => return Err(error),
                Err(error) => terminal::print_stderr(terminal::line(&error)),
            }
        }
    }

    fn greeting(&self) -> String {
        let spec = self.dialogue.engine().spec();
        let weights: usize = spec.tensors().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        let millions = weights as f64 / 1e6;
        let (name, context) = (&self.name, spec.context);
        let invitation = match self.dialogue.continues_text() {
            true => CONTINUES,
            false => "Ask a question, such as: Who are you?",
        };
        format!(
            "{name}: {millions:.1} M weights, context of {context} tokens. {invitation}\n\
             /help lists the commands, {QUOTES} starts and ends a block of lines, Ctrl-C stops an answer, Ctrl-D exits."
        )
    }

    /// A dialogue over a pipe. Errors end it, except for questions that are too long.
    fn answer_lines(&mut self, lines: impl BufRead) -> Result<(), Error> {
        let (mut questions, mut unanswered) = (0, 0);
        for line in lines.lines() {
            let question = line.map_err(Error::Input)?;
            questions += usize::from(!question.trim().is_empty() && !question.starts_with('/'));
            match self.take_line(&question) {
                Ok(true) => (),
                Ok(false) => break,
                Err(
                    error @ Error::Engine {
                        source: EngineError::ContextFull { .. } | EngineError::MessageTooLong { .. },
                        ..
                    },
                ) => {
                    unanswered += 1;
                    let error = terminal::line(&error);
                    if self.json {
                        terminal::print_json(&Unanswered { question: question.trim(), error: &error })?;
                    }
                    terminal::print_stderr(format_args!("error: {error}"));
                }
                Err(error) => return Err(error),
            }
        }
        if unanswered > 0 { Err(Error::Unanswered { unanswered, questions }) } else { Ok(()) }
    }

    /// Answers a line, or executes its command. Returns whether the dialogue continues.
    fn take_line(&mut self, line: &str) -> Result<bool, Error> {
        let line = line.trim();
        let Some(command) = line.strip_prefix('/') else {
            self.ask(line)?;
            return Ok(true);
        };
        let (word, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        match (word, rest) {
            ("help", "") => terminal::print_stderr(HELP),
            ("reset", "") => self.restart(None)?,
            ("system", text) if !text.is_empty() => self.restart(Some(text))?,
            ("set", "") => terminal::print_stderr(self.settings()),
            ("set", assignment) => self.set(assignment)?,
            ("regenerate", "") => self.regenerate()?,
            ("stats", "") => terminal::print_stderr(self.stats()),
            ("save", file) if !file.is_empty() => self.save(file)?,
            ("quit" | "exit", "") => return Ok(false),
            _ => return Err(Error::Usage(format!("`{line}` is not a command; /help lists them"))),
        }
        Ok(true)
    }

    /// Answers a question, unless it is blank.
    fn ask(&mut self, question: &str) -> Result<(), Error> {
        let question = question.trim();
        if question.is_empty() {
            return Ok(());
        }
        self.regenerations = 0;
        self.answer(question)
    }

    fn answer(&mut self, question: &str) -> Result<(), Error> {
        INTERRUPTED.store(false, Ordering::Relaxed);
        let start = Instant::now();
        let mut answer = self.dialogue.say(question).map_err(Error::engine(&self.name))?;
        let prompt_s = start.elapsed().as_secs_f64();
        while !INTERRUPTED.load(Ordering::Relaxed)
            && let Some(piece) = answer.next()
        {
            if !self.json {
                terminal::stream(&piece)?;
            }
        }
        self.last = Stats {
            prompt_tokens: answer.prompt_tokens(),
            tokens: answer.tokens(),
            prompt_s,
            generate_s: start.elapsed().as_secs_f64() - prompt_s,
        };
        self.total += self.last.tokens;
        let finish =
            answer.finish_reason().map(FinishReason::check).transpose().map_err(Error::engine(&self.name))?;
        match self.json {
            false => terminal::print(""),
            true => terminal::print_json(&Turn {
                question,
                answer: answer.text(),
                finish: finish_name(finish),
                stats: self.last,
            }),
        }
    }

    /// Each time with another seed, which is the same in every session with the same `seed`.
    fn regenerate(&mut self) -> Result<(), Error> {
        let question = self.dialogue.take_back();
        let question = question.ok_or_else(|| Error::Usage("there is no answer to regenerate".into()))?;
        self.regenerations += 1;
        let options = self.dialogue.options().clone();
        let mut other = options.clone();
        other.sampling.seed = options.sampling.seed.wrapping_add(self.regenerations << 32);
        let set = |dialogue: &mut DuckChatQuantized, options| {
            dialogue.set_options(options).map_err(|error| Error::Usage(error.to_string()))
        };
        set(&mut self.dialogue, other)?;
        let answered = self.answer(&question);
        set(&mut self.dialogue, options)?;
        answered
    }

    fn settings(&self) -> String {
        let GenerateOptions { sampling, max_tokens, .. } = self.dialogue.options();
        let Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed, .. } = sampling;
        format!(
            "temperature={temperature} top_k={top_k} top_p={top_p} min_p={min_p} \
             repetition_penalty={repetition_penalty} seed={seed} max_tokens={max_tokens}"
        )
    }

    fn restart(&mut self, system: Option<&str>) -> Result<(), Error> {
        let accepted = self.dialogue.restart(system).map_err(Error::engine(&self.name))?;
        if system.is_some() && !accepted {
            let why = match self.dialogue.continues_text() {
                true => CONTINUES,
                false => "Its chat template omits them.",
            };
            terminal::print_stderr(format_args!("{} has no system messages. {why}", self.name));
        }
        Ok(())
    }

    fn set(&mut self, assignment: &str) -> Result<(), Error> {
        // `KEY VALUE` too, as other programs have it.
        let pair = assignment.split_once('=').or_else(|| assignment.split_once(char::is_whitespace));
        let (key, value) = pair.unwrap_or((assignment, ""));
        let (key, value) = (key.trim(), value.trim());
        let mut options = self.dialogue.options().clone();
        let sampling = &mut options.sampling;
        let taken = match key {
            "temperature" => value.parse().map(|number| sampling.temperature = number).is_ok(),
            "top_k" => value.parse().map(|number| sampling.top_k = number).is_ok(),
            "top_p" => value.parse().map(|number| sampling.top_p = number).is_ok(),
            "min_p" => value.parse().map(|number| sampling.min_p = number).is_ok(),
            "repetition_penalty" => value.parse().map(|number| sampling.repetition_penalty = number).is_ok(),
            "seed" => value.parse().map(|number| sampling.seed = number).is_ok(),
            "max_tokens" => value.parse().map(|number| options.max_tokens = number).is_ok(),
            _ => return Err(Error::Usage(format!("`{key}` cannot be set; /help lists the settings"))),
        };
        if key == "temperature" && sampling.temperature > MAX_TEMPERATURE {
            return Err(Error::Usage(format!("`temperature` is {value}, expected 0 to {MAX_TEMPERATURE}")));
        }
        if !taken {
            return Err(Error::Usage(format!("`{key}` is `{value}`, expected a number")));
        }
        let set = self.dialogue.set_options(options);
        set.map_err(|error: EngineError| Error::Usage(error.to_string()))
    }

    fn stats(&self) -> String {
        let Stats { prompt_tokens, tokens, prompt_s, generate_s } = self.last;
        let speed = |tokens: usize, seconds: f64| tokens as f64 / seconds.max(1e-9);
        format!(
            "last answer: prompt of {prompt_tokens} tokens at {:.0} tokens/s, {tokens} tokens generated at {:.0} tokens/s\n\
             dialogue: {} messages, {} of {} tokens of the context, {} tokens generated",
            speed(prompt_tokens, prompt_s),
            speed(tokens, generate_s),
            self.dialogue.messages().len(),
            self.dialogue.tokens(),
            self.dialogue.engine().context(),
            self.total,
        )
    }

    fn save(&self, file: &str) -> Result<(), Error> {
        let replaced = file.strip_prefix("--overwrite ").map(str::trim_start);
        let text = serde_json::to_string_pretty(self.dialogue.messages()).expect("texts are JSON");
        let path = Path::new(replaced.unwrap_or(file));
        terminal::write_file(path, (text + "\n").as_bytes(), replaced.is_some())
    }
}

/// Dims the prompt, so that the user's text stands out.
struct Dimmed;

impl Helper for Dimmed {}
impl Completer for Dimmed {
    type Candidate = String;
}
impl Hinter for Dimmed {
    type Hint = String;
}
impl Validator for Dimmed {}
impl Highlighter for Dimmed {
    fn highlight_prompt<'b, 's: 'b, 'p: 'b>(&'s self, prompt: &'p str, _default: bool) -> Cow<'b, str> {
        Cow::Owned(format!("\x1b[2m{prompt}\x1b[0m"))
    }
}

/// What the user entered.
enum Entry {
    /// One line: a question or a command.
    Line(String),
    /// The lines between triple quotes: a question, whatever it starts with.
    Block(String),
}

fn read_entry(editor: &mut Editor<Dimmed, FileHistory>) -> Result<Entry, ReadlineError> {
    let line = editor.readline("> ")?;
    let Some(first) = line.trim_start().strip_prefix(QUOTES) else { return Ok(Entry::Line(line)) };
    let mut text = String::from(first);
    while !text.trim_end().ends_with(QUOTES) {
        text.push('\n');
        text += &editor.readline(". ")?;
    }
    let end = text.trim_end().len() - QUOTES.len();
    text.truncate(end);
    Ok(Entry::Block(text))
}

/// The path of the history. `None`: the system has no place for it, or the user disabled it.
fn history() -> Option<PathBuf> {
    let named = |name: &str| std::env::var_os(name).map(PathBuf::from);
    if let Some(file) = named(HISTORY) {
        return (!file.as_os_str().is_empty()).then_some(file);
    }
    let state = named("XDG_STATE_HOME").or_else(|| Some(named("HOME")?.join(".local/state")))?;
    Some(state.join("duck/history"))
}

/// From now on, Ctrl-C stops answers instead of the program.
fn watch_interrupts() {
    let watch = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            loop {
                tokio::signal::ctrl_c().await?;
                INTERRUPTED.store(true, Ordering::Relaxed);
            }
        })
    };
    // If signals cannot be watched, Ctrl-C ends the program, as usual.
    std::thread::spawn(move || -> io::Result<()> { watch() });
}
