//! Promise: every command that runs out of memory ends with exit code 4 and a message.

use crate::{failure, home, output};
use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Command, ExitStatus, Stdio},
};
use tempfile::TempDir;

/// Every command that takes memory, with a small model.
const COMMANDS: [&[&str]; 7] = [
    &["generate", "model.gguf", "--prompt", "a", "--max-tokens", "3"],
    &["chat", "model.gguf"],
    &["bench", "model.gguf", "--prompt", "4", "--generate", "2", "--repetitions", "1"],
    &["inspect", "model.gguf"],
    &["eval", "model.gguf", "--data", "text.txt"],
    &["export", "--overwrite", "model.gguf", "out.ternary"],
    &["serve", "model.gguf", "--port", "0"],
];

#[cfg(feature = "train")]
const TRAINING: [&[&str]; 4] = [
    &["train", "--overwrite", "--steps", "2", "--batch-size", "2", "--quiet", "--data", "text.txt", DEVICE],
    &[
        "train",
        "--resume",
        "--steps",
        "3",
        "--batch-size",
        "2",
        "--quiet",
        "--data",
        "text.txt",
        DEVICE,
        "--set",
        CONSTANT,
    ],
    &[
        "convert",
        "--overwrite",
        "--steps",
        "2",
        "--from",
        "model.gguf",
        "--data",
        "text.txt",
        DEVICE,
        "--set",
        LEARNED,
    ],
    &["distill-logits", "--teacher", "model.gguf", "--tokenizer", "model.gguf", "--data", "text.txt", DEVICE],
];
#[cfg(feature = "train")]
const DEVICE: &str = "--device=flex";
/// A learning rate schedule with which a run may be extended.
#[cfg(feature = "train")]
const CONSTANT: &str = "schedule.shape=constant";
/// The scale rule that a ternary start model requires.
#[cfg(feature = "train")]
const LEARNED: &str = "quant.scale=learned";
#[cfg(not(feature = "train"))]
const TRAINING: [&[&str]; 0] = [];

/// Runs a command under `ulimit -v`; a server is stopped once it has answered, which counts as success.
fn run(home: &TempDir, kib: u64, arguments: &[&str]) -> (Option<i32>, String) {
    let mut child = Command::new("sh")
        .args(["-c", &format!("ulimit -v {kib}; exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_duck")])
        .args(arguments)
        .current_dir(home)
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(fs::File::create(home.path().join("stderr")).unwrap())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let address = (arguments[0] == "serve")
        .then(|| lines.find_map(|line| line.ok()?.strip_prefix("http://").map(String::from)))
        .flatten();
    let answered = address.as_ref().map(|address| answers(address));
    if answered.is_some() {
        child.kill().unwrap();
    }
    lines.for_each(drop);
    let status: ExitStatus = child.wait().unwrap();
    let code = match answered {
        Some(answered) => answered.then_some(0),
        None => status.code(),
    };
    (code, fs::read_to_string(home.path().join("stderr")).unwrap_or_default())
}

fn answers(address: &str) -> bool {
    let body = r#"{"prompt": "a", "max_tokens": 2, "model": "model"}"#;
    let mut stream = TcpStream::connect(address).unwrap();
    let length = body.len();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).is_ok() && response.starts_with("HTTP/1.1 200")
}

fn texts(home: &TempDir) {
    let text = "the little duck swims on the pond and the pond is blue\n".repeat(4000);
    fs::write(home.path().join("text.txt"), text).unwrap();
}

/// The tested limits; `DUCK_LIMITS_MB`, numbers separated by spaces, replaces them.
fn limits() -> Vec<u64> {
    let asked = std::env::var("DUCK_LIMITS_MB").unwrap_or("100 200 400 800".into());
    asked.split_whitespace().map(|mb| mb.parse().expect("a number of MB")).collect()
}

#[test]
fn every_command_under_a_memory_limit_works_or_exits_with_4() {
    let home = home();
    texts(&home);
    let mut wrong = Vec::new();
    for mb in limits() {
        // The program itself takes address space.
        if run(&home, mb * 1000, &["--version"]).0 != Some(0) {
            println!("skipped: {mb} MB: the program does not start");
            continue;
        }
        for command in COMMANDS.into_iter().chain(TRAINING) {
            let _ = fs::remove_dir_all(home.path().join("runs"));
            let _ = fs::remove_file(home.path().join("out.ternary"));
            if command.contains(&"--resume") {
                let begun: Vec<&str> =
                    command.iter().map(|word| if *word == "3" { "2" } else { word }).collect();
                output(&home, &begun);
            }
            let (code, stderr) = run(&home, mb * 1000, command);
            println!("{mb} MB: {}: {code:?} {}", command[0], stderr.lines().last().unwrap_or_default());
            let says = stderr.lines().any(|line| line.starts_with("error: "));
            if code != Some(0) && !(code == Some(4) && says) {
                wrong.push(format!("{mb} MB: {command:?}: {code:?}: {stderr}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn threads_and_prompts_are_bounded() {
    let home = home();
    texts(&home);
    for (arguments, expected) in [
        (&["generate", "model.gguf", "--prompt", "a", "--threads", "99999"][..], "threads"),
        (&["eval", "model.gguf", "--data", "text.txt", "--threads", "99999"], "threads"),
        (&["bench", "model.gguf", "--prompt", "99999999999"], "--prompt is 99999999999, expected at most"),
        (
            &["bench", "model.gguf", "--generate", "99999999999"],
            "--generate is 99999999999, expected at most",
        ),
    ] {
        let error = failure(&home, arguments, 2);
        assert!(error.contains(expected), "{arguments:?}: {error}");
    }
    output(&home, &["generate", "model.gguf", "--prompt", "a", "--max-tokens", "2", "--threads", "3"]);
    let assert =
        crate::duck(&home, &["inspect", "model.gguf"]).env("RAYON_NUM_THREADS", "100000").assert().code(2);
    let error = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
    assert!(error.contains("RAYON_NUM_THREADS is 100000, expected at most"), "{error}");
}

/// More memory than any machine has: millions of sequences.
#[test]
fn sequences_beyond_memory_are_exit_code_4() {
    let home = home();
    let bench = ["bench", "model.gguf", "--batch", "1000000", "--prompt", "1", "--generate", "1"];
    let (code, stderr) = run(&home, 2_000_000, &bench);
    assert!(code == Some(4) && stderr.contains("error: out of memory"), "{code:?}: {stderr}");
    assert!(stderr.contains("ulimit -v"), "{stderr}");
}

/// A run folder whose settings require more memory than any machine has.
#[cfg(feature = "train")]
#[test]
fn settings_that_the_checkpoint_does_not_fill_are_refused() {
    let home = home();
    texts(&home);
    let train =
        ["train", "--device", "flex", "--data", "text.txt", "--steps", "1", "--quiet", "--set", "run.name=a"];
    let small = ["--set", "model.d_model=16", "--set", "model.n_heads=2", "--set", "model.n_kv_heads=2"];
    output(&home, &[&train[..], &small].concat());
    let run = fs::read_dir(home.path().join("runs")).unwrap().next().unwrap().unwrap().path();
    fs::remove_file(run.join("model.gguf")).ok();
    let path = run.join("experiment.toml");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains("d_model = 16\n"), "{text}");
    fs::write(&path, text.replace("d_model = 16\n", "d_model = 32768\n")).unwrap();
    let run = run.to_str().unwrap();
    let error = failure(&home, &["inspect", run], 3);
    assert!(error.contains("parameters, which take") && error.contains(run), "{error}");
    for key in ["run.start_from", "distill.teacher"] {
        let set = format!("{key}={run}");
        let mut arguments = train.to_vec();
        arguments.extend(["--set", "run.name=b", "--overwrite", "--set", &set]);
        let assert = crate::duck(&home, &arguments).assert().failure();
        let stderr = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
        let code = assert.get_output().status.code();
        assert!(code == Some(3) && stderr.contains("parameters, which take"), "{key}: {code:?} {stderr}");
    }
}
