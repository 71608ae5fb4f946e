//! A server that starts, answers and stops.

#![cfg(unix)]

use crate::home;
use serde_json::Value;
use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
    time::Duration,
};
use tempfile::TempDir;

/// Kills what a failed test leaves.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server of `pond`, and where it is.
fn start(home: &TempDir, port: &str) -> (Server, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_duck"));
    command.current_dir(home).args(["serve", "pond=model.gguf", "--port", port]).env_remove("DUCK_API_KEY");
    let mut server = Server(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (server, line.trim().strip_prefix("http://").unwrap().to_string())
}

/// What comes until the connection ends; nothing if there is none.
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
fn a_server_says_where_it_is_answers_and_stops_when_asked() {
    let home = home();
    let (mut server, address) = start(&home, "0");
    let response = ask(&address, "GET", "/v1/models", "");
    assert!(response.starts_with("HTTP/1.1 200") && response.contains("\"pond\""), "{response}");
    let pid = server.0.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert!(server.0.wait().unwrap().success());
}

#[test]
fn killed_in_the_middle_of_streams_it_comes_back_with_the_same_answers() {
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
    assert!(error.contains(&port), "{error}");
}
