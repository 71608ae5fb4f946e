//! A server that starts, answers and stops.

#![cfg(unix)]

use crate::home;
use serde_json::Value;
use std::{
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// Kills the server of a failed test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server of the model `pond`, and its address.
fn start(home: &TempDir, port: &str) -> (Server, String) {
    spawn(home, &["pond=model.gguf", "--port", port], Stdio::null())
}

/// A server, and its address.
fn spawn(home: &TempDir, arguments: &[&str], stderr: Stdio) -> (Server, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_duck"));
    command.current_dir(home).arg("serve").args(arguments).env_remove("DUCK_API_KEY").env_remove("DUCK_LOG");
    let mut server = Server(command.stdout(Stdio::piped()).stderr(stderr).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (server, line.trim().strip_prefix("http://").unwrap().to_string())
}

/// The response until the connection ends; empty if the connection fails.
fn ask(address: &str, method: &str, path: &str, body: &str) -> String {
    let mut bytes = Vec::new();
    if let Ok(mut stream) = TcpStream::connect(address) {
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: {length}\r\n");
        let _ = write!(stream, "{head}Content-Type: application/json\r\nConnection: close\r\n\r\n{body}");
        let _ = stream.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[test]
fn a_server_prints_its_address_answers_and_stops_at_a_signal() {
    let home = home();
    let (mut server, address) = start(&home, "0");
    let response = ask(&address, "GET", "/v1/models", "");
    assert!(response.starts_with("HTTP/1.1 200") && response.contains("\"pond\""), "{response}");
    terminate(&mut server);
}

#[test]
fn truncation_is_a_flag_of_the_server() {
    let home = home();
    let turns =
        r#"{"role": "user", "content": "quack"}, {"role": "assistant", "content": "quack"}, "#.repeat(500);
    let body = format!(r#"{{"messages": [{turns}{{"role": "user", "content": "quack"}}], "max_tokens": 2}}"#);
    for (truncation, status) in [(None, "400"), (Some("disabled"), "400"), (Some("auto"), "200")] {
        let more = truncation.map_or(vec![], |truncation| vec!["--truncation", truncation]);
        let (mut server, address) =
            spawn(&home, &[&["pond=model.gguf", "--port", "0"], &more[..]].concat(), Stdio::null());
        let response = ask(&address, "POST", "/v1/chat/completions", &body);
        assert!(response.starts_with(&format!("HTTP/1.1 {status}")), "{truncation:?}: {response}");
        terminate(&mut server);
    }
    let error = crate::failure(&home, &["serve", "--truncation", "middle"], 2);
    assert!(error.contains("auto"), "{error}");
}

/// Sends SIGTERM to a server, which must end in time and with success.
#[track_caller]
fn terminate(server: &mut Server) {
    let pid = server.0.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let begun = Instant::now();
    let status = loop {
        match server.0.try_wait().unwrap() {
            Some(status) => break status,
            None => {
                assert!(begun.elapsed() < Duration::from_secs(20), "still there after {:?}", begun.elapsed())
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(status.success(), "{status}");
}

#[test]
fn a_server_that_has_printed_its_address_ends_well() {
    let home = home();
    for _ in 0..10 {
        terminate(&mut start(&home, "0").0);
    }
}

/// A file that is always full.
fn full() -> Option<File> {
    let full = OpenOptions::new().write(true).open("/dev/full");
    full.inspect_err(|error| println!("skipped: /dev/full: {error}")).ok()
}

#[test]
fn a_server_whose_log_cannot_be_written_serves() {
    let home = home();
    let (reader, closed) = std::io::pipe().unwrap();
    drop(reader);
    let (_unread, blocked) = std::io::pipe().unwrap();
    let logs = [Some(closed.into()), full().map(Stdio::from), Some(blocked.into())];
    for log in logs.into_iter().flatten() {
        let (mut server, address) = spawn(&home, &["model.gguf", "--port", "0"], log);
        let begun = Instant::now();
        let body = r#"{"model": "model", "prompt": "quack", "max_tokens": 1}"#;
        // A pipe holds some 600 lines, the queue behind it 1,024.
        for i in 0..2000 {
            let (path, body, status) = match i % 20 {
                0 => ("/v1/completions", body, "HTTP/1.1 200"),
                _ => ("/v1/completions", r#"{"prompt": 7}"#, "HTTP/1.1 400"),
            };
            let response = ask(&address, "POST", path, body);
            assert!(response.starts_with(status), "request {i} after {:?}: {response}", begun.elapsed());
        }
        assert!(ask(&address, "GET", "/health", "").starts_with("HTTP/1.1 200"));
        let metrics = ask(&address, "GET", "/metrics", "");
        let counted = "duck_http_responses_total{route=\"/v1/completions\",status=\"400\"} 1900";
        assert!(metrics.contains(counted), "{metrics}");
        terminate(&mut server);
    }
}

/// Peak resident memory of a process, in bytes.
#[cfg(target_os = "linux")]
fn peak(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.0.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

/// The time of a request that is independent of all others.
fn time(address: &str) -> Duration {
    let begun = Instant::now();
    let body = r#"{"model": "duck", "prompt": "One", "max_tokens": 2}"#;
    let response = ask(address, "POST", "/v1/completions", body);
    assert!(response.starts_with("HTTP/1.1 200"), "{response}");
    begun.elapsed()
}

#[cfg(target_os = "linux")]
#[test]
fn large_prompts_take_little_memory_and_delay_no_request() {
    let home = home();
    // The Duck of the program, whose tokenizer is byte-pair encoding.
    let (mut server, address) = spawn(&home, &["--port", "0"], Stdio::null());
    time(&address);
    let text = "x".repeat(1_000_000);
    let words = "a duck ".repeat(140_000);
    let message = |content: &str| format!(r#"{{"role": "user", "content": {content}}}"#);
    let part = r#"{"type": "text", "text": "quack"}"#;
    let parts = vec![part; 30_000].join(",");
    let messages = vec![message("\"quack\""); 20_000].join(",");
    let bodies = [
        ("/v1/completions", format!(r#"{{"model": "duck", "prompt": "{text}"}}"#)),
        ("/v1/completions", format!(r#"{{"model": "duck", "prompt": ["x", "{words}"]}}"#)),
        (
            "/v1/chat/completions",
            format!(r#"{{"model": "duck", "messages": [{}]}}"#, message(&format!("\"{words}\""))),
        ),
        (
            "/v1/chat/completions",
            format!(r#"{{"model": "duck", "messages": [{}]}}"#, message(&format!("[{parts}]"))),
        ),
        ("/v1/chat/completions", format!(r#"{{"model": "duck", "messages": [{messages}]}}"#)),
    ];
    let slowest = std::thread::scope(|scope| {
        let large: Vec<_> = (0..40)
            .map(|i| {
                let (path, body) = &bodies[i % bodies.len()];
                let address = &address;
                scope.spawn(move || ask(address, "POST", path, body))
            })
            .collect();
        let mut slowest = Duration::ZERO;
        while !large.iter().all(|request| request.is_finished()) {
            slowest = slowest.max(time(&address));
        }
        for request in large {
            let response = request.join().unwrap();
            assert!(response.starts_with("HTTP/1.1 400"), "{response}");
            assert!(response.contains("context_length_exceeded"), "{response}");
        }
        slowest
    });
    let peak = peak(&server) >> 20;
    println!("{peak} MB at most, {slowest:?} for a small request");
    assert!(peak < 300, "{peak} MB");
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    terminate(&mut server);
}

#[test]
fn connections_without_the_key_do_not_keep_out_its_owner() {
    const STRANGERS: usize = 530;
    let home = home();
    let (mut server, address) =
        spawn(&home, &["model.gguf", "--port", "0", "--api-key", "quack"], Stdio::null());
    let owner = || {
        let begun = Instant::now();
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let head = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer quack\r\nConnection: close\r\n\r\n";
        stream.write_all(head.as_bytes()).unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        assert!(response.starts_with("HTTP/1.1 200"), "{response}");
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    };
    let health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let mut strangers = Vec::new();
    for _ in 0..STRANGERS {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.write_all(health).unwrap();
        strangers.push(stream);
    }
    owner();
    // And clients that send their headers byte by byte, and come again when they are sent away.
    let until = Instant::now() + Duration::from_secs(3);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while Instant::now() < until {
                for stream in &mut strangers {
                    if stream.write_all(b"x").is_err() {
                        *stream = TcpStream::connect(&address).unwrap();
                    }
                }
            }
        });
        while Instant::now() < until {
            owner();
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    terminate(&mut server);
}

#[test]
fn a_killed_server_restarts_with_the_same_answers() {
    let home = home();
    let (mut server, address) = start(&home, "0");
    let text = |address: &str| {
        let body = r#"{"model": "pond", "prompt": "quack", "seed": 7, "max_tokens": 40}"#;
        let response = ask(address, "POST", "/v1/completions", body);
        let body: Value = serde_json::from_str(response.split_once("\r\n\r\n").unwrap().1).unwrap();
        body["choices"].to_string()
    };
    let before = text(&address);
    let mut cut = 0;
    for _ in 0..3 {
        let clients: Vec<_> = (0..8)
            .map(|_| {
                let address = address.clone();
                let body = r#"{"model": "pond", "prompt": "quack", "n": 8, "stream": true}"#;
                std::thread::spawn(move || {
                    loop {
                        let stream = ask(&address, "POST", "/v1/completions", body);
                        if !stream.contains("data: [DONE]") {
                            return stream.contains("data: {");
                        }
                    }
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(300));
        server.0.kill().unwrap();
        server.0.wait().unwrap();
        cut += clients.into_iter().map(|client| client.join().unwrap()).filter(|cut| *cut).count();
        let port = address.rsplit_once(':').unwrap().1;
        let place;
        (server, place) = start(&home, port);
        assert_eq!(place, address);
        assert_eq!(text(&address), before);
    }
    assert!(cut > 0, "no stream was cut");
}

#[test]
fn a_port_that_is_taken_is_an_error() {
    let home = home();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let error = crate::failure(&home, &["serve", "model.gguf", "--port", &port], 1);
    assert!(
        error.contains(&format!("port {port} of 127.0.0.1 is taken")) && error.contains("--port"),
        "{error}"
    );
}
