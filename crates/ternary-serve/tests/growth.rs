//! The memory of a server does not grow under hostile load.

#[allow(dead_code)] // the other tests use more of it
mod site;

use serde_json::json;
use site::{Site, endless};
use std::{fs, io::Write, time::Duration};

/// Resident memory of this process, in bytes.
fn resident() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kilobytes| kilobytes << 10)
}

#[test]
fn hostile_clients_leave_nothing_behind() {
    if resident().is_none() {
        println!("skipped: /proc/self/status: not on this system");
        return;
    }
    let site = Site::endless(|options| {
        options.limits.timeout = Duration::from_millis(500);
        options.limits.batch = 4;
    });
    let chunk = vec![b'x'; 1 << 20];
    let round = || {
        // A hundred megabytes, that are not even looked at.
        let mut stream = site.connect();
        stream.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 104857600\r\n\r\n").unwrap();
        (0..100).for_each(|_| drop(stream.write_all(&chunk)));
        site::Response::read(stream).refused(413);
        // Clients that go away in all states.
        for i in 0..40 {
            let mut body = endless();
            body["stream"] = (i % 2 == 0).into();
            body["logprobs"] = 20.into();
            let request = site.request("POST", "/v1/completions", "", body.to_string().as_bytes());
            let mut stream = site.connect();
            stream.write_all(&request[..request.len() - i % 3]).unwrap();
            std::thread::sleep(Duration::from_millis(i as u64 % 10));
        }
        site.await_metric("duck_running", |running| running == 0.0);
        site.await_metric("duck_waiting", |waiting| waiting == 0.0);
        for i in 0..200 {
            let prompt = format!("{i}");
            site.post(
                "/v1/completions",
                &json!({ "model": "duck", "prompt": prompt, "max_tokens": 1, "n": 2 }),
            );
        }
    };
    (0..3).for_each(|_| round());
    let before = resident().unwrap();
    (0..5).for_each(|_| round());
    let after = resident().unwrap();
    assert!(after < before + (24 << 20), "{} MB became {} MB", before >> 20, after >> 20);
}
