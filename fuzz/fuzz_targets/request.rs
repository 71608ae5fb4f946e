//! A request, mostly an edited valid one. The response has the form of the API and never has status 500.
#![no_main]

use axum::{
    Router,
    body::Body,
    http::{Method, Request, StatusCode},
};
use burn_ternary_fuzz::{init, json, small};
use http_body_util::BodyExt;
use libfuzzer_sys::{
    arbitrary::{Result, Unstructured},
    fuzz_target,
};
use serde_json::{Value, json};
use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};
use ternary_format::{Family, Tokenizer};
use ternary_infer::{Engine, EngineOptions};
use ternary_serve::{Models, ServeOptions, router};
use tokio::runtime::{Builder, Runtime};
use tower::ServiceExt;

const PATHS: [&str; 8] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/duck",
    "/v1/models/%ff%00",
    "/health",
    "/metrics",
    "/",
];

static SERVER: LazyLock<(Runtime, Router)> = LazyLock::new(|| {
    let mut model = small(Family::Llama, 8, Tokenizer::byte());
    model.spec.context = 128;
    let options = EngineOptions::default().with_threads(1).with_context(128);
    let engine = Engine::from_model(model, options).expect("a sound model");
    let models = Models::new([("duck".to_string(), Arc::new(engine))]).expect("one model");
    let mut options = ServeOptions::default();
    (options.limits.body_bytes, options.limits.timeout) = (1 << 16, Duration::from_secs(5));
    let runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
    (runtime, router(models, &options).expect("a service"))
});

fn sound() -> [(&'static str, Value); 3] {
    [
        (
            PATHS[0],
            json!({
                "model": "duck", "messages": [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}],
                "max_tokens": 4, "temperature": 0.7, "top_p": 0.9, "seed": 1, "n": 2, "stream": true,
                "stream_options": {"include_usage": true}, "logprobs": true, "top_logprobs": 2, "stop": ["a", "bc"],
                "truncation": "auto",
            }),
        ),
        (
            PATHS[1],
            json!({"model": "duck", "prompt": ["one", "two"], "max_tokens": 3, "logprobs": 1, "top_k": 5, "min_p": 0.1}),
        ),
        (
            PATHS[1],
            json!({"prompt": [1, 2], "max_tokens": 2, "stream": true, "repetition_penalty": 1.1, "truncation": "auto"}),
        ),
    ]
}

fn request(input: &mut Unstructured) -> Result<Request<Body>> {
    let (mut path, mut value) = input.choose(&sound())?.clone();
    let mut method = Method::POST;
    if input.ratio(1, 16)? {
        path = input.choose(&PATHS)?;
        method = input.choose(&[Method::GET, Method::POST, Method::HEAD, Method::PUT])?.clone();
    }
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in
        [("host", "localhost"), ("content-type", "application/json"), ("origin", "http://localhost")]
    {
        match input.int_in_range(0..=31)? {
            0 => (),
            1 => request = request.header(name, input.bytes(input.len().min(9))?),
            _ => request = request.header(name, value),
        }
    }
    let body = if input.ratio(1, 8)? {
        input.bytes(input.len())?.to_vec()
    } else {
        let parts = json::request_parts();
        while !input.is_empty() && json::edit(&mut value, &parts, input).is_ok() {}
        value.to_string().into_bytes()
    };
    // Headers may be malformed.
    request.body(Body::from(body)).map_err(|_| libfuzzer_sys::arbitrary::Error::IncorrectFormat)
}

fuzz_target!(init: init(), |data: &[u8]| {
    let Ok(request) = request(&mut Unstructured::new(data)) else { return };
    let (runtime, router) = &*SERVER;
    let head = request.method() == Method::HEAD;
    let (status, stream, body) = runtime.block_on(async {
        let response = router.clone().oneshot(request).await.expect("a service never fails");
        let stream = response.headers().get("content-type").is_some_and(|kind| kind == "text/event-stream");
        let status = response.status();
        (status, stream, response.into_body().collect().await.expect("a whole body").to_bytes())
    });
    assert_ne!(status, StatusCode::INTERNAL_SERVER_ERROR, "{}", String::from_utf8_lossy(&body));
    if head {
        assert!(body.is_empty());
    } else if !status.is_success() {
        let text = String::from_utf8_lossy(&body);
        let body: Value = serde_json::from_slice(&body).unwrap_or_else(|_| panic!("{status}: {text}"));
        let error = body["error"].as_object().unwrap_or_else(|| panic!("{status}: {text}"));
        assert_eq!(error.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
    } else if stream {
        assert!(body.ends_with(b"data: [DONE]\n\n"), "{}", String::from_utf8_lossy(&body));
    }
});
