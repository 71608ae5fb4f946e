//! Requests share an engine, and none of them can keep it for itself.

use crate::site::{Response, Site, endless};
use serde_json::{Value, json};
use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

const TEXT: &str = "/v1/completions";

/// Sends a request and does not wait for the answer.
fn begin(site: &Site, body: &Value) -> TcpStream {
    let mut stream = site.connect();
    let body = body.to_string();
    stream.write_all(&site.request("POST", TEXT, "", body.as_bytes())).unwrap();
    stream
}

fn streamed(mut body: Value) -> Value {
    body["stream"] = true.into();
    body
}

#[test]
fn a_client_that_disconnects_ends_its_work() {
    let site = Site::endless(|options| options.limits.batch = 4);
    for stream in [false, true] {
        let mut body = endless();
        body["stream"] = stream.into();
        body["n"] = 2.into();
        let client = begin(&site, &body);
        site.await_metric("duck_running", |running| running == 2.0);
        drop(client);
        site.await_metric("duck_running", |running| running == 0.0);
    }
    assert_eq!(site.metric("duck_abandoned_total"), 2.0);
    // Nor does it come to its turn when it leaves the queue.
    let busy = [(); 4].map(|()| begin(&site, &endless()));
    site.await_metric("duck_running", |running| running == 4.0);
    let waiting = begin(&site, &endless());
    site.await_metric("duck_waiting", |waiting| waiting == 1.0);
    drop(waiting);
    site.await_metric("duck_waiting", |waiting| waiting == 0.0);
    drop(busy);
    site.await_metric("duck_running", |running| running == 0.0);
}

#[test]
fn a_client_that_has_closed_its_half_gets_its_response() {
    let site = Site::endless(|_| ());
    let ask = |version: &str, body: &Value| {
        let body = body.to_string();
        let mut stream = site.connect();
        let length = body.len();
        write!(
            stream,
            "POST {TEXT} HTTP/{version}\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    let mut body = endless();
    for (tokens, slow) in [(1, false), (6000, true)] {
        body["max_tokens"] = tokens.into();
        for version in ["1.0", "1.1"] {
            let begun = Instant::now();
            let text = ask(version, &body);
            if slow && begun.elapsed() < Duration::from_millis(300) {
                println!("skipped: the work took {:?} only", begun.elapsed());
            }
            // While it waits, it is asked whether it still does.
            let text = text.trim_start_matches("HTTP/1.1 102 Processing\r\n\r\n");
            assert!(text.starts_with(&format!("HTTP/{version} 200")), "{text}");
            assert!(
                text.contains(&format!("\"completion_tokens\":{tokens}")),
                "{}",
                &text[text.len() - 200..]
            );
        }
        let text = ask("1.1", &streamed(body.clone()));
        assert!(text.starts_with("HTTP/1.1 200") && text.contains("data: [DONE]"), "{text}");
    }
    let mut stream = site.connect();
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(Response::read(stream).status, 200);
}

#[test]
fn idle_connections_make_room_for_new_ones() {
    let site = Site::endless(|options| options.limits.connections = 8);
    let head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let closed = |mut stream: &TcpStream| {
        stream.set_nonblocking(true).unwrap();
        let mut buffer = [0; 1024];
        let read = std::iter::repeat_with(|| stream.read(&mut buffer)).find(|read| !matches!(read, Ok(1..)));
        !matches!(read, Some(Err(error)) if error.kind() == std::io::ErrorKind::WouldBlock)
    };
    // Silent ones, slow ones, and ones that have had an answer; and a request that takes its time.
    let mut work = begin(&site, &streamed(endless()));
    work.read_exact(&mut [0; 500]).unwrap();
    let idle: Vec<TcpStream> = (0..30)
        .map(|i| {
            let mut stream = site.connect();
            stream.write_all(&head[..[0, 10, head.len()][i % 3]]).unwrap();
            std::thread::sleep(Duration::from_millis(2));
            stream
        })
        .collect();
    let started = Instant::now();
    assert_eq!(site.get("/health").status, 200);
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    std::thread::sleep(Duration::from_millis(50));
    let closed: Vec<bool> = idle.iter().map(closed).collect();
    let first_open = closed.iter().position(|closed| !closed).unwrap();
    assert!(first_open >= 30 - 8 && !closed[first_open..].contains(&true), "{closed:?}");
    // The one that works was there first, and is there still.
    work.read_exact(&mut [0; 500]).unwrap();
}

#[test]
fn clients_without_the_key_do_not_keep_out_its_owner() {
    let site = Site::new(|options| {
        options.api_key = Some("quack".into());
        (options.limits.connections, options.limits.unauthenticated_connections) = (16, 4);
    });
    let models = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer quack\r\n\r\n";
    let ask = |mut stream: &TcpStream| {
        stream.write_all(models).unwrap();
        let mut buffer = [0; 1024];
        let read = stream.read(&mut buffer).unwrap();
        assert!(buffer[..read].starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&buffer[..read]));
    };
    let kept = site.connect();
    ask(&kept);
    let mut strangers = Vec::new();
    for _ in 0..10 {
        for _ in 0..10 {
            let mut stream = site.connect();
            stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
            strangers.push(stream);
        }
        let new = site.connect();
        ask(&new);
        ask(&kept);
    }
}

#[test]
fn a_full_queue_refuses_at_once() {
    let site = Site::endless(|options| (options.limits.batch, options.limits.queue) = (2, 1));
    let busy = [(); 3].map(|()| begin(&site, &endless()));
    site.await_metric("duck_running", |running| running == 2.0);
    site.await_metric("duck_waiting", |waiting| waiting == 1.0);
    for body in [endless(), streamed(endless())] {
        let refused = site.post(TEXT, &body);
        assert_eq!(refused.refused(429).0, "queue_full");
        assert_eq!(refused.header("retry-after"), Some("1"));
    }
    drop(busy);
    site.await_metric("duck_running", |running| running == 0.0);
    assert_eq!(site.post(TEXT, &json!({ "model": "duck", "prompt": "x" })).status, 200);
}

#[test]
fn a_long_prompt_does_not_delay_other_requests() {
    let site = Site::endless(|options| options.limits.body_bytes = 1 << 20);
    let mut client = begin(&site, &streamed(endless()));
    let mut buffer = vec![0; 1 << 16];
    client.read_exact(&mut buffer[..2000]).unwrap();
    let read = site.metric("duck_prompt_tokens_total");
    let long = json!({ "model": "duck", "prompt": "quack ".repeat(1500), "max_tokens": 1 });
    let reading = std::thread::scope(|scope| {
        let other = scope.spawn(|| site.post(TEXT, &long));
        site.await_metric("duck_prompt_tokens_total", |tokens| tokens > read);
        let (steps, begun) = (site.metric("duck_steps_total"), Instant::now());
        let mut pieces = 0;
        while !other.is_finished() {
            pieces += client.read(&mut buffer).unwrap();
        }
        assert_eq!(other.join().unwrap().status, 200);
        assert!(pieces > 0, "nothing came in {:?}", begun.elapsed());
        site.metric("duck_steps_total") - steps
    });
    // A chunk, a token: the prompt of 9,000 tokens leaves room for 140 of the other text.
    assert!(reading > 100.0, "{reading} tokens while a prompt was read");
}

#[test]
fn a_client_that_does_not_read_is_disconnected() {
    let site = Site::endless(|options| options.limits.timeout = Duration::from_millis(500));
    let mut body = streamed(endless());
    // Much, for the system holds megabytes for a client.
    (body["logprobs"], body["n"]) = (20.into(), 8.into());
    let client = begin(&site, &body);
    site.await_metric("duck_running", |running| running == 8.0);
    // It takes nothing; its buffers fill, and then the server loses its patience.
    site.await_metric("duck_abandoned_total", |abandoned| abandoned == 1.0);
    drop(client);
}

#[test]
fn a_stopping_server_finishes_its_requests() {
    let mut site = Site::endless(|options| options.limits.drain_timeout = Duration::from_secs(30));
    let mut body = streamed(endless());
    body["max_tokens"] = 2000.into();
    let client = begin(&site, &body);
    site.await_metric("duck_running", |running| running == 1.0);
    let mut idle = site.connect();
    idle.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    site.stop();
    let events = Response::read(client).events();
    assert!(!events.last().unwrap()["choices"][0]["finish_reason"].is_null());
    site.join();
}

#[test]
fn a_stopping_server_does_not_wait_forever() {
    let mut site = Site::endless(|options| options.limits.drain_timeout = Duration::from_millis(300));
    let whole = begin(&site, &endless());
    let stream = begin(&site, &streamed(endless()));
    site.await_metric("duck_running", |running| running == 2.0);
    let mut kept = site.connect();
    kept.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let silent = site.connect();
    let begun = Instant::now();
    site.stop();
    assert_eq!(Response::read(whole).refused(503).0, "given_up");
    let text = Response::read(stream).text();
    assert!(
        text.trim_end().ends_with(r#""type":"server_error"}}"#),
        "{}",
        &text[text.len().saturating_sub(300)..]
    );
    site.join();
    // Connections that say nothing hold up nobody.
    println!("stopped after {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    drop((kept, silent));
}
