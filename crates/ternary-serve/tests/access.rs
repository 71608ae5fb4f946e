//! API key, host names and origins: which requests are admitted.

use crate::site::{Site, engine};
use serde_json::json;
use ternary_serve::{Limits, Models, ServeError, ServeOptions, bind, router};
use tower::ServiceExt;

const TEXT: &str = "/v1/completions";

fn body() -> String {
    json!({ "model": "duck", "prompt": "x", "max_tokens": 1 }).to_string()
}

#[test]
fn without_a_key_only_loopback_addresses_are_served() {
    let everywhere = |change: fn(&mut ServeOptions)| {
        let mut options = ServeOptions::default().with_address("0.0.0.0:0".parse().unwrap());
        change(&mut options);
        options
    };
    assert!(ServeOptions::default().address.ip().is_loopback());
    let open = everywhere(|_| ());
    assert!(matches!(open.check(), Err(ServeError::Open { .. })));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    assert!(matches!(runtime.block_on(bind(&open)), Err(ServeError::Open { .. })));
    let models = || Models::new([("duck".to_string(), engine())]).unwrap();
    assert!(matches!(router(models(), &open), Err(ServeError::Open { .. })));
    // A listener that was made elsewhere changes nothing.
    let listener = runtime.block_on(tokio::net::TcpListener::bind("0.0.0.0:0")).unwrap();
    let served =
        runtime.block_on(ternary_serve::serve(listener, models(), ServeOptions::default(), async {}));
    assert!(matches!(served, Err(ServeError::Open { .. })));
    everywhere(|options| options.allow_remote = true).check().unwrap();
    everywhere(|options| options.api_key = Some("quack".into())).check().unwrap();
    for key in ["", "qu ack", "quäck", "quack\n"] {
        let options = ServeOptions::default().with_api_key(Some(key.into()));
        assert!(matches!(options.check(), Err(ServeError::Key)), "{key:?}");
    }
    for name in ["", "duck.lan:80", "http://duck.lan", "dück", "a b"] {
        let options = ServeOptions::default().with_host_names(vec![name.into()]);
        assert!(matches!(options.check(), Err(ServeError::HostName { .. })), "{name:?}");
    }
    let nothing = ServeOptions::default().with_limits(Limits::default().with_batch(0));
    assert!(matches!(nothing.check(), Err(ServeError::Limit { key: "batch", .. })));
}

#[test]
fn everything_but_the_page_and_the_health_check_requires_the_key() {
    let site = Site::new(|options| options.api_key = Some("quack".into()));
    let send = |method: &str, path: &str, headers: &str| {
        let body = if method == "POST" { body() } else { String::new() };
        site.send(&site.request(method, path, headers, body.as_bytes()))
    };
    for (method, path) in [
        ("POST", TEXT),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/nothing"),
    ] {
        let refused = send(method, path, "");
        assert_eq!(refused.refused(401).0, "missing_api_key");
        assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
        for wrong in ["quac", "quackk", "QUACK", ""] {
            let headers = format!("Authorization: Bearer {wrong}\r\n");
            assert_eq!(send(method, path, &headers).status, 401, "{path} with {wrong}");
        }
        assert_ne!(send(method, path, "Authorization: Bearer quack\r\n").status, 401, "{path}");
    }
    for path in ["/", "/page.js", "/markdown.js", "/style.css", "/icon.svg", "/health"] {
        assert_eq!(send("GET", path, "").status, 200, "{path}");
    }
    let options = ServeOptions::default().with_api_key(Some("quack".into()));
    assert!(!format!("{options:?}").contains("quack"));
}

#[test]
fn pages_of_other_origins_are_refused() {
    let site = Site::new(|_| ());
    let post = |headers: &str| site.send(&site.request("POST", TEXT, headers, body().as_bytes()));
    assert_eq!(post(&format!("Origin: http://{}\r\n", site.address)).status, 200);
    for origin in ["http://evil.example", "null", "http://localhost:1", "file://"] {
        assert_eq!(post(&format!("Origin: {origin}\r\n")).refused(403).0, "foreign_origin");
    }
    let asked = site.send(&site.request(
        "OPTIONS",
        TEXT,
        "Origin: http://evil.example\r\nAccess-Control-Request-Method: POST\r\n",
        b"",
    ));
    assert_eq!(asked.status, 403);
    assert!(asked.headers.iter().all(|(name, _)| !name.starts_with("access-control")));
}

#[test]
fn dns_rebinding_is_refused() {
    let site = Site::new(|_| ());
    let get = |host: &str| {
        site.send(format!("GET /v1/models HTTP/1.1\r\n{host}Connection: close\r\n\r\n").as_bytes())
    };
    assert_eq!(get("Host: localhost\r\n").status, 200);
    assert_eq!(get("Host: 127.0.0.1:1\r\n").status, 200);
    assert_eq!(get("Host: evil.example\r\n").refused(403).0, "foreign_host");
    assert_eq!(get("Host: localhost\r\nHost: evil.example\r\n").refused(403).0, "foreign_host");
    assert_eq!(get("").status, 400);
}

#[test]
fn a_server_accepts_the_host_names_of_its_options() {
    let options = ServeOptions::default()
        .with_address("0.0.0.0:0".parse().unwrap())
        .with_allow_remote(true)
        .with_host_names(vec!["duck.lan".into()]);
    let models = Models::new([("duck".to_string(), engine())]).unwrap();
    let router = router(models, &options).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let status = |host: &str| {
        let request = axum::http::Request::get("/v1/models").header("host", host);
        let response = router.clone().oneshot(request.body(axum::body::Body::empty()).unwrap());
        runtime.block_on(response).unwrap().status().as_u16()
    };
    for host in ["duck.lan", "DUCK.lan:8080", "localhost", "127.0.0.1", "10.1.2.3"] {
        assert_eq!(status(host), 200, "{host}");
    }
    for host in ["evil.example", "duck.lan.evil.example"] {
        assert_eq!(status(host), 403, "{host}");
    }
}
