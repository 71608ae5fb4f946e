//! A dialogue over pipes.

use crate::{duck, failure, home, piped};
use serde_json::Value;
use std::fs;

const CHAT: [&str; 6] = ["chat", "model.gguf", "--max-tokens", "8", "--seed", "1"];

fn turns(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn each_line_of_a_pipe_is_a_question() {
    let home = home();
    let json = [&CHAT[..], &["--json"]].concat();
    let turns = turns(&piped(&home, &json, "Hello\n\n Who are you? \n"));
    assert_eq!(turns.iter().map(|turn| &turn["question"]).collect::<Vec<_>>(), ["Hello", "Who are you?"]);
    for turn in &turns {
        assert!(
            turn["tokens"].as_u64().unwrap() <= 8 && turn["prompt_tokens"].as_u64().unwrap() > 0,
            "{turn}"
        );
    }
    // Of the dialogue, only what is new is read.
    assert!(turns[1]["prompt_tokens"].as_u64().unwrap() < 5 + 8 + 12 + 6);
    let text = piped(&home, &CHAT, "Hello\n");
    assert_eq!(text, format!("{}\n", turns[0]["answer"].as_str().unwrap()));
    assert_eq!(piped(&home, &CHAT, ""), "");
}

#[test]
fn commands_change_and_save_the_dialogue() {
    let home = home();
    let json = [&CHAT[..], &["--json"]].concat();
    let talk = |input: &str| turns(&piped(&home, &json, input));
    let answers = |turns: &[Value]| turns.iter().map(|turn| turn["answer"].clone()).collect::<Vec<_>>();
    // A new dialogue gives the old answer.
    let again = answers(&talk("Hello\nWho?\n/reset\nHello\nWho?\n"));
    assert_eq!(again[..2], again[2..]);
    let set =
        talk("/set max_tokens=2\nHello\n/set temperature = 0\nHello\n/set top_k=5\n/set seed=9\nHello\n");
    assert!(set.iter().all(|turn| turn["tokens"].as_u64().unwrap() <= 2), "{set:?}");
    let greedy = answers(&talk("/set temperature=0\nHello\n/reset\n/set seed=7\nHello\n"));
    assert_eq!(greedy[0], greedy[1]);
    let saved = talk("/system Be brief.\nHello\n/save dialogue.json\n/quit\nWho?\n");
    assert_eq!(saved.len(), 1);
    let text = fs::read_to_string(home.path().join("dialogue.json")).unwrap();
    let messages: Value = serde_json::from_str(&text).unwrap();
    let expected = serde_json::json!([
        { "role": "system", "content": "Be brief." },
        { "role": "user", "content": "Hello" },
        { "role": "assistant", "content": saved[0]["answer"] },
    ]);
    assert_eq!(messages, expected);
}

#[test]
fn regenerate_gives_another_answer() {
    let home = home();
    let json = [&CHAT[..], &["--json", "--temperature", "1.5"]].concat();
    let talk = |input: &str| turns(&piped(&home, &json, input));
    let turns = talk("Hello\n/regenerate\n/regenerate\n/save dialogue.json\nWho?\n");
    let answers: Vec<&str> = turns.iter().map(|turn| turn["answer"].as_str().unwrap()).collect();
    assert!(turns[..3].iter().all(|turn| turn["question"] == "Hello"), "{turns:?}");
    assert!(answers[0] != answers[1] && answers[1] != answers[2], "{answers:?}");
    assert_eq!(talk("Hello\n/regenerate\n/regenerate\n").last().unwrap()["answer"], answers[2]);
    // Only the last answer stays, and other answers are drawn as before.
    let messages: Value =
        serde_json::from_slice(&fs::read(home.path().join("dialogue.json")).unwrap()).unwrap();
    assert_eq!((messages.as_array().unwrap().len(), &messages[1]["content"]), (2, &answers[2].into()));
    let assert = duck(&home, &CHAT).write_stdin("/set\n/set top_k=7\n/set\n").assert().success();
    let said = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
    assert!(said.contains("top_k=0 top_p=0.95") && said.contains("top_k=7 top_p=0.95"), "{said}");
}

#[test]
fn output_of_commands_is_on_standard_error() {
    let home = home();
    let assert = duck(&home, &CHAT).write_stdin("/help\n/system Be brief.\n/stats\n").assert().success();
    assert!(assert.get_output().stdout.is_empty());
    let said = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
    assert!(
        said.contains("/save FILE") && said.contains("no system messages") && said.contains("of 128 tokens"),
        "{said}"
    );
}

#[test]
fn an_error_ends_a_pipe() {
    let home = home();
    for (input, code, found) in [
        ("/quack\n", 2, "not a command"),
        ("/set temperature=9\n", 2, "`temperature` is 9, expected 0 to 2"),
        ("/set temperature 9\n", 2, "`temperature` is 9, expected 0 to 2"),
        ("/regenerate\n", 2, "no answer to regenerate"),
        ("/set warmth=1\n", 2, "`warmth` cannot be set"),
        ("/set temperature=warm\n", 2, "`warm`, expected a number"),
        ("/set temperature=-1\n", 2, "`temperature` is -1"),
        ("/save missing/dialogue.json\n", 5, "missing"),
    ] {
        let assert = duck(&home, &CHAT).write_stdin(input).assert().code(code);
        let error = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
        assert!(
            error.starts_with("error: ") && error.contains(found) && error.lines().count() == 1,
            "{error}"
        );
    }
    duck(&home, &CHAT).write_stdin(&b"caf\xe9\n"[..]).assert().code(3);
    assert!(failure(&home, &["chat", "model.gguf", "--top-p", "2"], 2).contains("top_p"));
}

/// One bad line among thousands must not end the pipe.
#[test]
fn a_question_that_is_too_long_does_not_end_a_pipe() {
    let home = home();
    let input = format!("Hello\n{}\nWho are you?\n", "long ".repeat(100));
    let mut command = duck(&home, &[&CHAT[..], &["--json"]].concat());
    let output = command.write_stdin(input).assert().code(2).get_output().clone();
    let turns = turns(std::str::from_utf8(&output.stdout).unwrap());
    assert_eq!(turns.len(), 3, "{turns:?}");
    assert!(turns[0]["answer"].is_string() && turns[2]["answer"].is_string(), "{turns:?}");
    assert!(turns[1]["error"].as_str().unwrap().contains("shorten the message"), "{turns:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("shorten the message") && said.contains("1 of 3 questions were not"), "{said}");
}

#[test]
fn a_dialogue_longer_than_the_context_goes_on() {
    let home = home();
    let input = "Tell me of the pond, please.\n".repeat(12);
    let json = [&CHAT[..], &["--json"]].concat();
    assert_eq!(turns(&piped(&home, &json, &input)).len(), 12);
}

#[test]
fn a_model_without_a_chat_template_continues_each_line_by_itself() {
    let home = home();
    let mut model = crate::model(ternary_format::Encoding::Q2_0, ternary_format::Encoding::Q8_0, 1);
    model.chat_template = None;
    ternary_format::write_model(&model, &home.path().join("text.gguf"), &Default::default()).unwrap();
    let chat = ["chat", "text.gguf", "--max-tokens", "8", "--temperature", "0"];
    let input =
        "One day\n/set max_tokens=4\n/regenerate\n/stats\n/system Be brief.\nOne day\n/save text.json\n";
    let assert = duck(&home, &chat).write_stdin(input).assert().success();
    let [answer, said] = [&assert.get_output().stdout, &assert.get_output().stderr]
        .map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    let text = |max: &str| {
        let arguments =
            ["generate", "text.gguf", "--prompt", "One day", "--temperature", "0", "--max-tokens"];
        piped(&home, &[&arguments[..], &[max]].concat(), "")
    };
    // The second time as the first: nothing was said before.
    assert_eq!(answer, [text("8"), text("4"), text("4")].concat());
    for part in ["trained on plain text", "tokens generated at", "has no system messages. This model was"] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    let saved: Value = serde_json::from_slice(&fs::read(home.path().join("text.json")).unwrap()).unwrap();
    assert_eq!((saved.as_array().unwrap().len(), &saved[0]["content"]), (2, &"One day".into()));
    let assert = duck(&home, &chat).write_stdin("long ".repeat(100)).assert().code(2);
    assert!(String::from_utf8_lossy(&assert.get_output().stderr).contains("exceed the context of 128"));
}

#[test]
fn the_built_in_duck_answers_the_last_question() {
    let answers =
        piped(&home(), &["chat", "--temperature", "0"], "Good morning!\nWhat is your name?\nI am sad\n");
    let answers: Vec<&str> = answers.lines().collect();
    assert_eq!(answers.len(), 3, "{answers:?}");
    assert!(answers[0].contains("morning") && answers[1].contains("name is Duck"), "{answers:?}");
    assert!(answers[2].contains("sorry") || answers[2].contains("sad"), "{answers:?}");
}

/// Runs a command under a pseudo-terminal, types each argument after the last answer, and prints all that was shown.
const TERMINAL: &str = r#"
import os, pty, select, sys, time
inputs, command = sys.argv[1].split("|"), sys.argv[2:]
child, keeper = pty.fork()
if child == 0: os.execv(command[0], command)
shown = b""
def read(quiet):
    global shown
    while select.select([keeper], [], [], quiet)[0]:
        try: part = os.read(keeper, 65536)
        except OSError: return
        if not part: return
        shown += part
read(3)
for text in inputs:
    os.write(keeper, bytes.fromhex(text)); read(1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
sys.stdout.buffer.write(shown)
"#;

#[test]
fn a_terminal_has_greeting_multiline_input_and_history() {
    let home = home();
    let history = home.path().join("state/history");
    let talk = |inputs: &[&str]| {
        let hex = |text: &&str| text.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
        let inputs = inputs.iter().map(hex).collect::<Vec<_>>().join("|");
        let duck = duck(&home, &[]);
        let python = std::process::Command::new("python3")
            .args(["-c", TERMINAL, &inputs])
            .arg(duck.get_program())
            .args(CHAT)
            .current_dir(&home)
            .env("DUCK_HISTORY", &history)
            .env("TERM", "xterm")
            .output();
        let Ok(python) = python else {
            println!("skipped: python3: not found");
            return None;
        };
        assert!(python.status.success(), "{}", String::from_utf8_lossy(&python.stderr));
        Some(String::from_utf8_lossy(&python.stdout).into_owned())
    };
    // A block that starts with / is a question, not a command.
    let first = talk(&["\"\"\"/Hello\r", "you\"\"\"\r", "\x03", "Who are you?\r", "/stats\r", "\x04"]);
    let Some(first) = first else { return };
    assert!(first.starts_with("0\n"), "{first}");
    for shown in
        ["Ask a question", "\x1b[2m> \x1b[0m", "\x1b[2m. \x1b[0m", "Ctrl-D exits", "dialogue: 4 messages"]
    {
        assert!(first.contains(shown), "{shown:?} is not in {first:?}");
    }
    let kept = fs::read_to_string(&history).unwrap();
    assert!(kept.contains("Who are you?"), "{kept}");
    // The last question of the session before, by the arrow up.
    let second = talk(&["\x1b[A\x1b[A\r", "\x04"]).unwrap();
    assert!(second.contains("Who are you?"), "{second:?}");
}
