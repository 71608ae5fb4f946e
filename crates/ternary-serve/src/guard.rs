//! [`guard`]: who gets in.

use crate::{ServeOptions, api::ApiError, page, server::Server, slot::Busy};
use axum::{
    extract::{Request, State},
    http::{HeaderMap, Method, StatusCode, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse, Response},
};
use std::{net::IpAddr, sync::Arc, time::Instant};
use subtle::ConstantTimeEq;

/// The route of a path as metrics name it; paths of strangers would be labels without number.
fn route(path: &str) -> &'static str {
    const ROUTES: [&str; 5] =
        ["/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"];
    match page::path(path).or(ROUTES.into_iter().find(|route| path == *route)) {
        Some(route) => route,
        None if path.starts_with("/v1/models/") => "/v1/models/NAME",
        None => "other",
    }
}

/// Lets a request through to its handler, or refuses it; counts and logs either way.
pub async fn guard(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let method = request.method().clone();
    let route = route(request.uri().path());
    // Until the response is there.
    let _busy = request.extensions().get::<Busy>().cloned();
    let response = match admit(&server, &request, route) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    let status = response.status().as_u16();
    server.metric.response(route, status);
    let milliseconds = begun.elapsed().as_millis() as u64;
    match status {
        500.. => tracing::warn!(%method, route, status, milliseconds, "response"),
        400.. => tracing::info!(%method, route, status, milliseconds, "response"),
        _ => tracing::debug!(%method, route, status, milliseconds, "response"),
    }
    response
}

fn admit(server: &Server, request: &Request, route: &str) -> Result<(), ApiError> {
    let headers = request.headers();
    let size: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    let size = size + request.uri().path().len() + request.uri().query().map_or(0, str::len);
    if size > server.limits.header {
        let message = format!("headers of {size} bytes, expected at most {}", server.limits.header);
        return Err(ApiError::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, message));
    }
    if let Some(hosts) = &server.hosts {
        hosts.check(headers)?;
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        same_origin(headers)?;
    }
    // What the page consists of, and whether the server is there, everybody may know.
    let open = route == "/health" || page::path(route).is_some();
    match &server.key {
        Some(key) if !open => {
            authorized(headers, key)?;
            request.extensions().get::<Busy>().inspect(|busy| busy.authenticate());
            Ok(())
        }
        _ => Ok(()),
    }
}

/// How the `Host` header may name the server.
///
/// A page can make its own name point at this server, whose answers its scripts then read (DNS rebinding); but its requests
/// still send that name. It cannot do that with an address, nor without knowing the key.
#[derive(Debug)]
pub struct Hosts {
    names: Vec<String>,
    /// Other addresses than those of loopback reach the server.
    remote: bool,
}

impl Hosts {
    /// `None`: everybody who has the key may name it as they like.
    pub fn new(options: &ServeOptions) -> Option<Self> {
        let remote = !options.address.ip().is_loopback();
        let names = options.host_names.clone();
        let open = remote && names.is_empty() && options.api_key.is_some();
        (!open).then_some(Self { names, remote })
    }

    fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let mut hosts = headers.get_all(header::HOST).iter().peekable();
        if hosts.peek().is_none() {
            return Err(ApiError::body("there is no Host header"));
        }
        if hosts.all(|host| host.to_str().is_ok_and(|host| self.is_ours(host))) {
            return Ok(());
        }
        let expected = match (&self.names[..], self.remote) {
            ([], false) => "localhost or a loopback address".to_string(),
            ([], true) => "localhost or an address; --host-name NAME allows a name".into(),
            (names, _) => format!("localhost, an address or {}", names.join(", ")),
        };
        let message = format!("the Host header names another machine, expected {expected}");
        Err(ApiError::new(StatusCode::FORBIDDEN, message).code("foreign_host"))
    }

    fn is_ours(&self, host: &str) -> bool {
        let Ok(authority) = host.parse::<Authority>() else { return false };
        let name = authority.host();
        let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        let names = self.names.iter().map(String::as_str).chain(["localhost"]);
        let known = match address {
            Ok(address) => self.remote || address.is_loopback(),
            Err(_) => names.into_iter().any(|known| name.eq_ignore_ascii_case(known)),
        };
        known && !host.contains('@')
    }
}

/// Browsers tell which page a request comes from; no other page than ours may have work done.
fn same_origin(headers: &HeaderMap) -> Result<(), ApiError> {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let same = |origin: &str| {
        let authority = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        authority.zip(host).is_some_and(|(authority, host)| authority.eq_ignore_ascii_case(host))
    };
    match headers.get_all(header::ORIGIN).iter().all(|origin| origin.to_str().is_ok_and(same)) {
        true => Ok(()),
        false => Err(ApiError::new(StatusCode::FORBIDDEN, "requests of other origins are refused")
            .code("foreign_origin")),
    }
}

fn authorized(headers: &HeaderMap, key: &str) -> Result<(), ApiError> {
    let shown = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
    let shown = shown.and_then(|value| value.split_at_checked(7));
    let (code, message) = match shown {
        Some((scheme, shown)) if scheme.eq_ignore_ascii_case(b"bearer ") => {
            // In a time that tells nothing but the length.
            if shown.ct_eq(key.as_bytes()).into() {
                return Ok(());
            }
            ("invalid_api_key", "the API key is wrong")
        }
        _ => ("missing_api_key", "there is no API key, expected the header `Authorization: Bearer KEY`"),
    };
    Err(ApiError::new(StatusCode::UNAUTHORIZED, message).code(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: header::HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, value.parse().unwrap())])
    }

    #[test]
    fn only_names_of_this_machine_are_local() {
        let local = Hosts::new(&ServeOptions::default()).unwrap();
        for host in ["localhost", "LOCALHOST:1", "127.0.0.1:8080", "127.9.9.9", "[::1]", "[::1]:80"] {
            local.check(&headers(header::HOST, host)).unwrap();
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "x@localhost",
            "10.0.0.1",
            "[::2]",
            "a b",
            "",
            "0.0.0.0",
        ] {
            assert_eq!(local.check(&headers(header::HOST, host)).unwrap_err().status, 403, "{host}");
        }
        assert_eq!(local.check(&HeaderMap::new()).unwrap_err().status, 400);
        let mut two = headers(header::HOST, "localhost");
        two.append(header::HOST, "evil.example".parse().unwrap());
        assert_eq!(local.check(&two).unwrap_err().status, 403);
    }

    #[test]
    fn a_remote_server_without_a_key_has_the_names_that_it_was_given() {
        let mut options =
            ServeOptions { address: "0.0.0.0:80".parse().unwrap(), allow_remote: true, ..Default::default() };
        for names in [&[][..], &["duck.lan", "pond"]] {
            options.host_names = names.iter().map(|name| name.to_string()).collect();
            let hosts = Hosts::new(&options).unwrap();
            for host in ["localhost", "127.0.0.1:80", "10.0.0.1", "[2001:db8::1]:80"] {
                hosts.check(&headers(header::HOST, host)).unwrap();
            }
            for host in ["evil.example", "x@10.0.0.1", "duck.lan.evil.example", "10.0.0.1.nip.io", ""] {
                assert_eq!(hosts.check(&headers(header::HOST, host)).unwrap_err().status, 403, "{host}");
            }
            for host in ["duck.lan", "Duck.LAN:80", "pond"] {
                assert_eq!(hosts.check(&headers(header::HOST, host)).is_ok(), !names.is_empty(), "{host}");
            }
        }
        // A key is as good: a page does not know it.
        options.api_key = Some("quack".into());
        assert!(Hosts::new(&options).is_some());
        options.host_names.clear();
        assert!(Hosts::new(&options).is_none());
    }

    #[test]
    fn keys_are_compared_whole() {
        for (shown, right) in [
            ("Bearer quack", true),
            ("bearer quack", true),
            ("Bearer quac", false),
            ("Bearer quackk", false),
            ("Bearer ", false),
            ("Bearer", false),
            ("Basic quack", false),
            ("quack", false),
        ] {
            assert_eq!(authorized(&headers(header::AUTHORIZATION, shown), "quack").is_ok(), right, "{shown}");
        }
        assert_eq!(authorized(&HeaderMap::new(), "quack").unwrap_err().code, Some("missing_api_key"));
    }

    #[test]
    fn only_our_own_page_may_have_work_done() {
        for (origin, right) in [
            ("http://localhost:8080", true),
            ("https://localhost:8080", true),
            ("http://localhost", false),
            ("http://localhost:8081", false),
            ("http://evil.example", false),
            ("null", false),
            ("", false),
        ] {
            let mut headers = headers(header::ORIGIN, origin);
            headers.insert(header::HOST, "localhost:8080".parse().unwrap());
            assert_eq!(same_origin(&headers).is_ok(), right, "{origin}");
        }
        same_origin(&HeaderMap::new()).unwrap();
    }
}
