//! Dialogues and texts that are longer than the context.

use crate::site::{Response, Site, engine_of};
use serde_json::{Value, json};
use ternary_serve::Truncation;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";
/// Context of the model; a token is a byte.
const CONTEXT: usize = 256;

fn site(truncation: Truncation) -> Site {
    Site::of([("duck".into(), engine_of(CONTEXT, 1))], |options| options.truncation = truncation)
}

fn message(role: &str, text: &str) -> Value {
    json!({ "role": role, "content": text })
}

/// Questions and answers that end with a question; all but the last have `length` bytes.
fn dialogue(turns: usize, length: usize, last: &str) -> Vec<Value> {
    let turn = |i: usize| message(["user", "assistant"][i % 2], &"x".repeat(length));
    (0..2 * turns).map(turn).chain([message("user", last)]).collect()
}

fn body(messages: &[Value], more: Value) -> Value {
    let mut body = json!({ "messages": messages, "seed": 1 });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// The number of dropped messages, and the tokens of the others.
fn kept(response: &Response) -> (usize, u64) {
    assert_eq!(response.status, 200, "{}", response.text());
    let dropped = response.header("x-dropped-messages").map_or(0, |number| number.parse().unwrap());
    (dropped, response.json()["usage"]["prompt_tokens"].as_u64().unwrap())
}

#[test]
fn the_oldest_turns_are_dropped_until_an_answer_has_room() {
    let site = site(Truncation::Disabled);
    let ask = |messages: &[Value], more: Value| {
        let mut more = more;
        more["truncation"] = "auto".into();
        kept(&site.post(CHAT, &body(messages, more)))
    };
    // A turn has 2 x 20 bytes and 3 special tokens; the question has 4 bytes and 2.
    let tokens = |turns: u64| 43 * turns + 6;
    let messages = dialogue(9, 20, "hi? ");
    // The larger of 64 and a quarter of the context.
    assert_eq!(ask(&messages, json!({})), (10, tokens(4)));
    // `max_tokens`, up to half of the context.
    assert_eq!(ask(&messages, json!({ "max_tokens": 1 })), (8, tokens(5)));
    assert_eq!(ask(&messages, json!({ "max_tokens": 110 })), (12, tokens(3)));
    assert_eq!(ask(&messages, json!({ "max_completion_tokens": 128 })), (14, tokens(2)));
    assert_eq!(ask(&messages, json!({ "max_tokens": 5000 })), (14, tokens(2)));
    // What has room stays whole.
    assert_eq!(ask(&messages[10..], json!({})), (0, tokens(4)));
    assert_eq!(ask(&messages[8..], json!({})), (2, tokens(4)));
    // The template of our own models leaves system messages out, but nobody drops them.
    let with_system = [&[message("system", "be a duck")], &messages[..]].concat();
    assert_eq!(ask(&with_system, json!({})), (10, tokens(4)));
    // A greeting that answers nothing goes before the first question.
    let greeted = [&[message("assistant", &"x".repeat(100))], &messages[10..]].concat();
    assert_eq!(ask(&greeted, json!({})), (1, tokens(4)));
}

#[test]
fn a_stream_reports_dropped_messages() {
    let site = site(Truncation::Auto);
    let response = site.post(CHAT, &body(&dialogue(9, 20, "hi? "), json!({ "stream": true })));
    assert_eq!(response.header("x-dropped-messages"), Some("10"));
    assert!(!response.events().is_empty());
}

#[test]
fn truncation_of_the_request_overrides_the_server() {
    let messages = dialogue(9, 20, "hi?");
    for (server, request, status) in [
        (Truncation::Disabled, json!({}), 400),
        (Truncation::Disabled, json!({ "truncation": "auto" }), 200),
        (Truncation::Auto, json!({}), 200),
        (Truncation::Auto, json!({ "truncation": null }), 200),
        (Truncation::Auto, json!({ "truncation": "disabled" }), 400),
    ] {
        let response = site(server).post(CHAT, &body(&messages, request.clone()));
        assert_eq!(response.status, status, "{server:?} {request}: {}", response.text());
    }
    for wrong in [json!("middle"), json!(true), json!(7)] {
        let response = site(Truncation::Auto).post(CHAT, &body(&messages, json!({ "truncation": wrong })));
        assert_eq!(response.refused(400), ("invalid_value".into(), "truncation".into()));
    }
}

#[test]
fn a_prompt_that_is_too_long_is_refused_with_numbers_and_advice() {
    let site = site(Truncation::Disabled);
    let refused = |path: &str, body: Value, param: &str, words: &[&str]| {
        let response = site.post(path, &body);
        assert_eq!(response.refused(400), ("context_length_exceeded".into(), param.into()));
        let error = response.json()["error"].clone();
        assert_eq!(error["type"], "invalid_request_error");
        let message = error["message"].as_str().unwrap();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    };
    let long = dialogue(9, 20, "hi?");
    refused(CHAT, body(&long, json!({})), "messages", &["392 tokens", "256", "truncation"]);
    refused(TEXT, json!({ "prompt": "x".repeat(300) }), "prompt", &["300 tokens", "256", "truncation"]);
    // The last question is never cut. It has 200 bytes and 2 special tokens; the answer has 64.
    let auto = || json!({ "truncation": "auto" });
    let last = dialogue(2, 20, &"x".repeat(200));
    refused(CHAT, body(&last, auto()), "messages", &["202 tokens", "at most 192", "64", "shorten"]);
    let endless = dialogue(2, 20, &"x".repeat(100_000));
    refused(CHAT, body(&endless, auto()), "messages", &["more than 192 tokens", "shorten"]);
    let only_answers = [message("assistant", &"x".repeat(300))];
    refused(CHAT, body(&only_answers, auto()), "messages", &["shorten"]);
    // A shorter answer leaves more room.
    assert_eq!(
        kept(&site.post(CHAT, &body(&last, json!({ "truncation": "auto", "max_tokens": 9 })))),
        (2, 245)
    );
}

#[test]
fn thousands_of_turns_are_dropped_as_fast_as_a_few() {
    let site = site(Truncation::Auto);
    let begun = std::time::Instant::now();
    let (dropped, tokens) = kept(&site.post(CHAT, &body(&dialogue(7_000, 1, "hi?"), json!({}))));
    assert_eq!((dropped, tokens), (2 * (7_000 - 37), 37 * 5 + 5));
    assert!(begun.elapsed().as_secs() < 20, "{:?}", begun.elapsed());
}

#[test]
fn a_text_keeps_its_end() {
    let site = site(Truncation::Disabled);
    let ask = |prompt: Value, more: Value| {
        let mut body = json!({ "prompt": prompt, "temperature": 0, "truncation": "auto" });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let response = site.post(TEXT, &body);
        (response.json()["choices"][0]["text"].clone(), kept(&response).1)
    };
    let text: String = (0..100_000u64).map(|i| char::from(b'a' + (i * i % 23) as u8)).collect();
    for (tokens, room) in [(16, 16), (40, 40), (1_000, 128)] {
        let end = &text[text.len() - (CONTEXT - room)..];
        let more = json!({ "max_tokens": tokens });
        let expected = ask(json!(end), more.clone());
        assert_eq!(expected.1 as usize, CONTEXT - room);
        assert_eq!(ask(json!(text), more.clone()), expected);
        let ids: Vec<u32> = text.bytes().map(u32::from).collect();
        assert_eq!(ask(json!(ids), more), expected);
    }
    // A character that begins before the cut.
    assert_eq!(ask(json!("🦆".repeat(3_000)), json!({})).1 as usize, CONTEXT - 16);
}

#[test]
fn the_model_is_optional_with_one_model() {
    let one = site(Truncation::Disabled);
    let messages = dialogue(0, 0, "hi?");
    let body = body(&messages, json!({ "max_tokens": 5 }));
    assert_eq!(one.post(CHAT, &body).json()["model"], "duck");
    assert_eq!(one.post(TEXT, &json!({ "prompt": "quack", "model": null })).json()["model"], "duck");
    let mut other = body.clone();
    other["model"] = "gpt-4o".into();
    let response = one.post(CHAT, &other);
    assert_eq!(response.refused(404), ("model_not_found".into(), "model".into()));
    assert!(response.text().contains("`duck`"), "{}", response.text());
    let engines = [("duck".into(), engine_of(64, 1)), ("swan".into(), engine_of(64, 2))];
    let response = Site::of(engines, |_| ()).post(CHAT, &body);
    assert_eq!(response.refused(400), ("model_missing".into(), "model".into()));
    assert!(response.text().contains("`duck`, `swan`"), "{}", response.text());
}

#[test]
fn an_unknown_path_is_answered_with_the_known_ones() {
    let site = site(Truncation::Disabled);
    for path in ["/v1/responses", "/v1/embeddings", "/chat"] {
        let response = site.post(path, &json!({}));
        assert_eq!(response.refused(404).0, "not_found");
        let text = response.text();
        assert!(text.contains(path) && text.contains(CHAT) && text.contains(TEXT), "{text}");
    }
}
