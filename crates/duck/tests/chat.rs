//! A dialogue over pipes.

use crate::{duck, failure, home, piped};
use serde_json::Value;
use std::fs;

const CHAT: [&str; 6] = ["chat", "model.gguf", "--max-tokens", "8", "--seed", "1"];

fn turns(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn questions_of_a_pipe_are_answered_line_by_line() {
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
fn what_commands_say_is_no_answer() {
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
fn what_goes_wrong_over_a_pipe_ends_it() {
    let home = home();
    for (input, code, found) in [
        ("/quack\n", 2, "no command"),
        ("/set\n", 2, "no command"),
        ("/set warmth=1\n", 2, "`warmth` cannot be set"),
        ("/set temperature=warm\n", 2, "`warm`, expected a number"),
        ("/set temperature=-1\n", 2, "`temperature` is -1"),
        ("/save missing/dialogue.json\n", 5, "missing"),
        (&"long ".repeat(100), 2, "exceed the context"),
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

#[test]
fn a_dialogue_longer_than_the_context_goes_on() {
    let home = home();
    let input = "Tell me of the pond, please.\n".repeat(12);
    let json = [&CHAT[..], &["--json"]].concat();
    assert_eq!(turns(&piped(&home, &json, &input)).len(), 12);
}

#[test]
fn the_duck_inside_answers_the_question_and_not_the_turn_before() {
    let answers =
        piped(&home(), &["chat", "--temperature", "0"], "Good morning!\nWhat is your name?\nI am sad\n");
    let answers: Vec<&str> = answers.lines().collect();
    assert_eq!(answers.len(), 3, "{answers:?}");
    assert!(answers[0].contains("morning") && answers[1].contains("name is Duck"), "{answers:?}");
    assert!(answers[2].contains("sorry") || answers[2].contains("sad"), "{answers:?}");
}
