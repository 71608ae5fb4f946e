//! Requests and responses of clients of OpenAI's API.

use crate::site::{Site, alone, engine};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use ternary_format::chat::{ChatTemplate, Message, Role, TEMPLATE};
use ternary_infer::Sampling;
use ternary_serve::{Models, ServeError, ServeOptions, router};
use tower::ServiceExt;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn chat(more: Value) -> Value {
    let mut body = json!({
        "model": "duck",
        "messages": [{ "role": "user", "content": "Who are you?" }],
        "max_tokens": 40,
        "seed": 3,
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn chat_ids(question: &str) -> Vec<u32> {
    let message = Message::new(Role::User, question);
    ChatTemplate::new(TEMPLATE).unwrap().ids(engine().tokenizer().unwrap(), &[message], true).unwrap()
}

fn seeded(seed: u64) -> Sampling {
    Sampling::default().with_seed(seed)
}

#[test]
fn a_chat_completion_is_the_text_of_the_engine() {
    let site = Site::new(|_| ());
    let ids = chat_ids("Who are you?");
    let (text, tokens, finish) = alone(&engine(), &ids, seeded(3), 40);
    let response = site.post(CHAT, &chat(json!({})));
    assert_eq!(response.status, 200, "{}", response.text());
    assert_eq!(response.header("x-content-type-options"), Some("nosniff"));
    assert!(response.headers.iter().all(|(name, _)| !name.starts_with("access-control")));
    let body = response.json();
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], "duck");
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(body["created"].as_u64().unwrap() > 1_700_000_000);
    let choice = &body["choices"][0];
    assert_eq!(choice["message"], json!({ "role": "assistant", "content": text, "refusal": null }));
    assert_eq!((&choice["finish_reason"], &choice["index"]), (&json!(finish), &json!(0)));
    assert_eq!(choice["logprobs"], Value::Null);
    let usage = json!({
        "prompt_tokens": ids.len(),
        "completion_tokens": tokens,
        "total_tokens": ids.len() + tokens,
    });
    assert_eq!(body["usage"], usage);
}

#[test]
fn the_chunks_of_a_stream_are_the_whole_completion() {
    let site = Site::new(|_| ());
    for n in [1, 3] {
        let ask = |more: Value| {
            let mut body =
                chat(json!({ "n": n, "temperature": 1.1, "top_k": 100, "top_p": 0.99, "min_p": 0.001 }));
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            site.post(CHAT, &body)
        };
        let whole = ask(json!({})).json();
        let events = ask(json!({ "stream": true, "stream_options": { "include_usage": true } })).events();
        let mut texts = vec![String::new(); n];
        let mut ends = vec![Value::Null; n];
        let (last, events) = events.split_last().unwrap();
        assert_eq!(last["usage"], whole["usage"]);
        assert_eq!(last["choices"], json!([]));
        for event in events {
            assert_eq!(event["object"], "chat.completion.chunk");
            assert_eq!((&event["id"], &event["usage"]), (&last["id"], &Value::Null));
            assert!(event.as_object().unwrap().contains_key("usage"));
            let choice = &event["choices"][0];
            let index = choice["index"].as_u64().unwrap() as usize;
            assert_eq!(ends[index], Value::Null, "nothing follows an end");
            texts[index].push_str(choice["delta"]["content"].as_str().unwrap_or_default());
            ends[index] = choice["finish_reason"].clone();
        }
        let first: Vec<&Value> =
            events.iter().take(n).map(|event| &event["choices"][0]["delta"]["role"]).collect();
        assert_eq!(first, vec![&json!("assistant"); n]);
        for index in 0..n {
            assert_eq!(whole["choices"][index]["message"]["content"], texts[index]);
            assert_eq!(whole["choices"][index]["finish_reason"], ends[index]);
        }
        let plain = ask(json!({ "stream": true })).events();
        assert!(plain.iter().all(|event| event.get("usage").is_none() && event["choices"][0].is_object()));
    }
}

#[test]
fn each_choice_draws_with_its_own_seed() {
    let site = Site::new(|_| ());
    let ids = engine().tokenizer().unwrap().encode("One day").unwrap();
    let prompts = json!(["One day", ids, "Two days"]);
    let body = json!({ "model": "duck", "prompt": prompts, "n": 2, "seed": -5, "max_tokens": 30 });
    let choices = site.post(TEXT, &body).json()["choices"].clone();
    assert_eq!(choices.as_array().unwrap().len(), 6);
    for (index, prompt) in
        ["One day", "One day", "One day", "One day", "Two days", "Two days"].iter().enumerate()
    {
        let seed = (-5i64 as u64).wrapping_add(index as u64);
        let ids = engine().tokenizer().unwrap().encode(prompt).unwrap();
        let (text, _, finish) = alone(&engine(), &ids, seeded(seed), 30);
        assert_eq!(choices[index]["text"], text, "choice {index}");
        assert_eq!(choices[index]["finish_reason"], finish);
        assert_eq!(choices[index]["index"], index);
    }
}

#[test]
fn a_completion_ends_before_its_stop_sequence() {
    let site = Site::new(|_| ());
    let ids = engine().tokenizer().unwrap().encode("One day").unwrap();
    let (text, ..) = alone(&engine(), &ids, seeded(2), 60);
    let characters: Vec<char> = text.chars().collect();
    assert!(characters.len() > 20, "another seed, please: {text:?}");
    for (from, to) in [(3, 4), (8, 11), (12, 20)] {
        let stop: String = characters[from..to].iter().collect();
        let expected = &text[..text.find(&stop).unwrap()];
        let body = |stream: bool, stop: Value| json!({ "model": "duck", "prompt": "One day", "seed": 2, "max_tokens": 60, "stop": stop, "stream": stream });
        let whole = site.post(TEXT, &body(false, json!(stop))).json();
        assert_eq!(whole["choices"][0]["text"], expected, "stop {stop:?} in {text:?}");
        assert_eq!(whole["choices"][0]["finish_reason"], "stop");
        assert!(whole["usage"]["completion_tokens"].as_u64().unwrap() < 60);
        let events = site.post(TEXT, &body(true, json!(["never in a text", stop]))).events();
        let pieces = events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap());
        assert_eq!(pieces.collect::<String>(), expected);
    }
}

#[test]
fn logprobs_are_those_of_the_model() {
    let site = Site::new(|_| ());
    let ids = engine().tokenizer().unwrap().encode("One day").unwrap();
    let options = ternary_infer::GenerateOptions::default()
        .with_sampling(seeded(4))
        .with_max_tokens(12)
        .with_stop(vec![256, 257, 258]);
    let drawn: Vec<u32> = engine().generate(&ids, options).unwrap().collect();
    let logits = engine().logits(&[ids.clone(), drawn.clone()].concat()).unwrap();
    let logprob = |place: usize, id: u32| {
        let row = &logits[(ids.len() - 1 + place) * 259..][..259];
        let total: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
        f64::from(row[id as usize]) - total.ln()
    };
    let body = json!({ "model": "duck", "prompt": "One day", "seed": 4, "max_tokens": 12, "logprobs": 3 });
    let scores = site.post(TEXT, &body).json()["choices"][0]["logprobs"].clone();
    assert_eq!(scores["token_logprobs"].as_array().unwrap().len(), drawn.len());
    for (place, id) in drawn.iter().enumerate() {
        let found = scores["token_logprobs"][place].as_f64().unwrap();
        assert!((found - logprob(place, *id)).abs() < 1e-3, "token {place}: {found}");
        // Bytes that are no text look alike.
        assert!((1..=3).contains(&scores["top_logprobs"][place].as_object().unwrap().len()));
    }
    let offsets: Vec<u64> =
        scores["text_offset"].as_array().unwrap().iter().map(|o| o.as_u64().unwrap()).collect();
    assert!(offsets[0] == 0 && offsets.is_sorted());

    let body = chat(json!({ "logprobs": true, "top_logprobs": 5 }));
    let whole = site.post(CHAT, &body).json();
    let scores = whole["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(whole["usage"]["completion_tokens"], scores.len());
    for score in &scores {
        let top = score["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 5);
        assert!(top.is_sorted_by(|a, b| a["logprob"].as_f64() >= b["logprob"].as_f64()));
        if let Some(bytes) = score["bytes"].as_array() {
            let bytes: Vec<u8> = bytes.iter().map(|byte| byte.as_u64().unwrap() as u8).collect();
            assert_eq!(score["token"], String::from_utf8(bytes).unwrap());
        }
    }
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    let events = site.post(CHAT, &streamed).events();
    let parts = events.iter().filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(parts.flatten().cloned().collect::<Vec<_>>(), scores);
    assert_eq!(
        site.post(CHAT, &chat(json!({ "logprobs": true }))).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"],
        json!([])
    );
}

#[test]
fn messages_come_as_strings_or_parts() {
    let site = Site::new(|_| ());
    let parts = json!([{ "role": "user", "content": [{ "type": "text", "text": "Who are" }, { "type": "text", "text": " you?" }] }]);
    let plain = site.post(CHAT, &chat(json!({}))).json();
    let parted = site
        .post(CHAT, &chat(json!({ "messages": parts, "max_completion_tokens": 40, "max_tokens": null })))
        .json();
    assert_eq!(plain["choices"], parted["choices"]);
    let whole = json!([
        { "role": "developer", "content": "be a duck" },
        { "role": "user", "content": "hi", "name": "x" },
        { "role": "assistant", "content": "quack", "refusal": null },
        { "role": "user", "content": "again" },
    ]);
    assert_eq!(site.post(CHAT, &chat(json!({ "messages": whole }))).status, 200);
}

#[test]
fn default_max_tokens_of_chats_is_the_context_of_texts_sixteen() {
    let site = Site::new(|_| ());
    let greedy = json!({ "temperature": 0, "max_tokens": null });
    let body = site.post(CHAT, &chat(greedy)).json();
    let (finish, total) =
        (&body["choices"][0]["finish_reason"], body["usage"]["total_tokens"].as_u64().unwrap());
    // The last token need not be read.
    assert!(finish == "stop" || total == 513, "{finish} after {total}");
    let body = json!({ "model": "duck", "prompt": "quack", "temperature": 0 });
    let (_, tokens, finish) =
        alone(&engine(), &engine().tokenizer().unwrap().encode("quack").unwrap(), Sampling::greedy(), 16);
    let body = site.post(TEXT, &body).json();
    assert_eq!(
        (&body["usage"]["completion_tokens"], &body["choices"][0]["finish_reason"]),
        (&json!(tokens), &json!(finish))
    );
    assert_eq!(body["object"], "text_completion");
}

#[test]
fn several_models_are_selected_by_name() {
    let other = crate::site::engine_of(256, 2);
    let site = Site::of([("duck".into(), engine()), ("org/swan 2".into(), other.clone())], |_| ());
    let list = site.get("/v1/models").json();
    assert_eq!(list["object"], "list");
    let ids: Vec<&Value> = list["data"].as_array().unwrap().iter().map(|model| &model["id"]).collect();
    assert_eq!(ids, ["duck", "org/swan 2"]);
    assert_eq!(site.get("/v1/models/org/swan%202").json()["context_length"], 256);
    assert_eq!(site.get("/v1/models/goose").refused(404).0, "model_not_found");
    let ids = engine().tokenizer().unwrap().encode("One day").unwrap();
    for (name, engine) in [("duck", engine()), ("org/swan 2", other)] {
        let body = json!({ "model": name, "prompt": "One day", "seed": 1, "max_tokens": 20 });
        assert_eq!(
            site.post(TEXT, &body).json()["choices"][0]["text"],
            alone(&engine, &ids, seeded(1), 20).0
        );
    }
    assert_eq!(
        site.post(TEXT, &json!({ "model": "goose", "prompt": "x" })).refused(404),
        ("model_not_found".into(), "model".into())
    );
}

#[test]
fn a_model_of_plain_text_continues_and_does_not_chat() {
    let site = Site::of([("text".into(), crate::site::text_engine())], |_| ());
    let body = json!({ "model": "text", "messages": [{ "role": "user", "content": "One day" }] });
    assert_eq!(site.post("/v1/chat/completions", &body).refused(400).0, "no_chat_template");
    let ids = engine().tokenizer().unwrap().encode("One day").unwrap();
    let body = json!({ "model": "text", "prompt": "One day", "seed": 1, "max_tokens": 20 });
    let text = &site.post(TEXT, &body).json()["choices"][0]["text"];
    assert_eq!(*text, alone(&engine(), &ids, seeded(1), 20).0);
}

#[test]
fn unsupported_fields_are_refused() {
    let site = Site::new(|_| ());
    for (more, param) in [
        (json!({ "tools": [{ "type": "function" }] }), "tools"),
        (json!({ "frequency_penalty": 0.5 }), "frequency_penalty"),
        (json!({ "presence_penalty": -0.5 }), "presence_penalty"),
        (json!({ "logit_bias": { "1": 1 } }), "logit_bias"),
        (json!({ "response_format": { "type": "json_object" } }), "response_format"),
        (json!({ "modalities": ["audio"] }), "modalities"),
        (json!({ "temprature": 0.5 }), "temprature"),
        (json!({ "stream_options": {} }), "stream_options"),
        (json!({ "top_logprobs": 2 }), "top_logprobs"),
        (json!({ "messages": [{ "role": "tool", "content": "x" }] }), "messages[0].role"),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }),
            "messages[0].content[0].type",
        ),
    ] {
        assert_eq!(site.post(CHAT, &chat(more)).refused(400).1, param);
    }
    for (more, param) in [
        (json!({ "echo": true }), "echo"),
        (json!({ "suffix": "x" }), "suffix"),
        (json!({ "best_of": 2 }), "best_of"),
    ] {
        let mut body = json!({ "model": "duck", "prompt": "x" });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        assert_eq!(site.post(TEXT, &body).refused(400).1, param);
    }
    let harmless = json!({
        "user": "me", "metadata": {}, "store": false, "frequency_penalty": 0, "tools": [], "tool_choice": "none",
        "response_format": { "type": "text" }, "logit_bias": null, "n": 1, "stop": null, "service_tier": "auto",
    });
    assert_eq!(site.post(CHAT, &chat(harmless)).status, 200);
}

#[test]
fn health_metrics_and_the_page_are_there() {
    let site = Site::new(|_| ());
    assert_eq!(site.get("/health").json(), json!({ "status": "ok" }));
    site.post(TEXT, &json!({ "model": "duck", "prompt": "quack", "max_tokens": 5, "temperature": 0 }));
    assert_eq!(site.metric("duck_prompt_tokens_total"), 5.0);
    assert!(site.metric("duck_generated_tokens_total") <= 5.0);
    let page = site.get("/metrics");
    assert!(page.header("content-type").unwrap().starts_with("text/plain; version=0.0.4"));
    assert!(
        page.text().contains("duck_http_responses_total{route=\"/v1/completions\",status=\"200\"} 1"),
        "{}",
        page.text()
    );
    for (path, kind) in [
        ("/", "text/html"),
        ("/page.js", "text/javascript"),
        ("/theme.js", "text/javascript"),
        ("/archive.js", "text/javascript"),
        ("/conversation.js", "text/javascript"),
        ("/markdown.js", "text/javascript"),
        ("/settings.js", "text/javascript"),
        ("/sidebar.js", "text/javascript"),
        ("/stream.js", "text/javascript"),
        ("/thread.js", "text/javascript"),
        ("/style.css", "text/css"),
        ("/icon.svg", "image/svg+xml"),
    ] {
        let file = site.get(path);
        assert_eq!(file.status, 200);
        assert!(file.header("content-type").unwrap().starts_with(kind));
        let policy = file.header("content-security-policy").unwrap();
        for part in ["default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"] {
            assert!(policy.contains(part), "{policy}");
        }
        let text = file.text();
        let no_outside = [
            "https://",
            "//cdn",
            "innerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "style=",
            "onclick=",
        ];
        for word in no_outside {
            assert!(!text.contains(word), "{path} has {word}");
        }
    }
    assert_eq!(site.get("/nothing").refused(404).0, "not_found");
    assert_eq!(site.get(TEXT).refused(405).0, "method_not_allowed");
    assert_eq!(
        site.send(&site.request("DELETE", "/v1/models", "", b"")).refused(405).0,
        "method_not_allowed"
    );
}

#[test]
fn the_router_serves_without_a_listener() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let models = Models::new([("duck".to_string(), engine())]).unwrap();
        let router = router(models, &ServeOptions::default()).unwrap();
        let body = json!({ "model": "duck", "prompt": "quack", "max_tokens": 3 }).to_string();
        let request =
            axum::http::Request::post(TEXT).header("host", "localhost").body(axum::body::Body::from(body));
        let response = router.oneshot(request.unwrap()).await.unwrap();
        assert_eq!(response.status(), 200);
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(body["usage"]["prompt_tokens"], 5);
    });
}

#[test]
fn models_that_cannot_be_served_are_errors() {
    let models = |names: &[&str]| Models::new(names.iter().map(|name| (name.to_string(), engine())));
    assert_eq!(models(&["a", "b"]).unwrap().names().collect::<Vec<_>>(), ["a", "b"]);
    assert!(matches!(models(&[]), Err(ServeError::NoModels)));
    assert!(matches!(models(&["a", "a"]), Err(ServeError::SameName { .. })));
    assert!(matches!(models(&["a\n"]), Err(ServeError::Name { .. })));
    assert!(matches!(models(&[""]), Err(ServeError::Name { .. })));
}
