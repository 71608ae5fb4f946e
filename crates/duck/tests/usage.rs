//! Arguments, shell completions and man pages.

use crate::{duck, failure, home, output};
use std::fs;

const COMMANDS: [&str; 9] =
    ["export", "inspect", "eval", "generate", "chat", "serve", "bench", "completions", "man"];

#[test]
fn every_command_explains_itself() {
    let home = home();
    for command in COMMANDS {
        let help = output(&home, &[command, "--help"]);
        assert!(help.contains("Examples:") && help.contains("Usage: duck"), "{help}");
        assert!(output(&home, &["--help"]).contains(command));
    }
    assert!(output(&home, &["--version"]).starts_with("duck "));
}

#[test]
fn wrong_arguments_are_usage_errors() {
    let home = home();
    for arguments in [
        &[][..],
        &["quack"],
        &["inspect", "--what"],
        &["export", "model.gguf"],
        &["export", "model.gguf", "out.gguf", "--type", "INT3"],
        &["export", "model.gguf", "model.gguf"],
        &["eval", "model.gguf"],
        &["eval", "--data", "a.txt", "--save-answers", "b"],
        &["eval", "--data", "a.txt", "--stride", "0"],
        &["eval", "--data", "a.txt", "--json", "--format", "text"],
        &["generate", "model.gguf", "--prompt", "a", "--temperature", "-1"],
        &["generate", "model.gguf", "--prompt", "a", "--temperature", "nan"],
        &["generate", "model.gguf", "--prompt", "a", "--top-p", "0"],
        &["generate", "model.gguf", "--prompt", "a", "--context", "0"],
        &["generate", "model.gguf", "--prompt", "longer than this", "--context", "4"],
        &["bench", "model.gguf", "--repetitions", "0"],
        &["bench", "model.gguf", "--prompt", "4000"],
        &["serve", "--host", "nowhere"],
        &["serve", "--host", "0.0.0.0"],
        &["serve", "model.gguf", "model.gguf"],
        &["completions", "cmd"],
    ] {
        duck(&home, arguments).assert().code(2).stdout("");
    }
}

#[test]
fn completions_and_man_pages_are_printed() {
    let home = home();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(output(&home, &["completions", shell]).contains("duck"), "{shell}");
    }
    output(&home, &["man", "pages/man1"]);
    for command in COMMANDS {
        let page = fs::read_to_string(home.path().join(format!("pages/man1/duck-{command}.1"))).unwrap();
        assert!(page.contains(".TH"), "{page}");
    }
    assert!(failure(&home, &["man", "model.gguf/man"], 5).contains("model.gguf"));
}

#[cfg(unix)]
#[test]
fn a_closed_pipe_is_no_error_but_a_full_disk_is() {
    let home = home();
    let run = |arguments: &[&str], to: std::process::Stdio| {
        let program = env!("CARGO_BIN_EXE_duck");
        let mut command = std::process::Command::new(program);
        command.current_dir(&home).args(arguments).stdout(to).stdin(std::process::Stdio::null());
        let output = command.stderr(std::process::Stdio::piped()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    for arguments in [
        &["inspect", "model.gguf"][..],
        &["generate", "model.gguf", "--prompt", "a"],
        &["generate", "model.gguf", "--prompt", "a", "--json"],
        &["completions", "bash"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        assert_eq!(run(arguments, writer.into()), (Some(0), String::new()), "{arguments:?}");
        if let Ok(full) = fs::File::options().write(true).open("/dev/full") {
            let (code, error) = run(arguments, full.into());
            assert!(code == Some(5) && error.starts_with("error: standard output"), "{arguments:?}: {error}");
        }
    }
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut unheard = std::process::Command::new(env!("CARGO_BIN_EXE_duck"));
    unheard.current_dir(&home).args(["inspect", "missing.gguf"]).stderr(writer);
    assert_eq!(unheard.status().unwrap().code(), Some(3));
}
