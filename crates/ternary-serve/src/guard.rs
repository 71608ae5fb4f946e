//! [`guard`]: who gets in.

use crate::{api::ApiError, connection::Requests, server::Server};
use axum::{
    extract::{ConnectInfo, Request, State},
    http::{HeaderMap, Method, StatusCode, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse, Response},
};
use std::{net::IpAddr, sync::Arc, time::Instant};
use subtle::ConstantTimeEq;

/// The route of a path as metrics name it; paths of strangers would be labels without number.
fn route(path: &str) -> &'static str {
    const ROUTES: [&str; 9] = [
        "/",
        "/page.js",
        "/style.css",
        "/icon.svg",
        "/health",
        "/metrics",
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
    ];
    match ROUTES.into_iter().find(|route| path == *route) {
        Some(route) => route,
        None if path.starts_with("/v1/models/") => "/v1/models/NAME",
        None => "other",
    }
}

/// Lets a request through to its handler, or refuses it; counts and logs either way.
pub async fn guard(State(server): State<Arc<Server>>, mut request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let method = request.method().clone();
    let route = route(request.uri().path());
    let connection = request.extensions().get::<ConnectInfo<Requests>>();
    let busy = connection.map(|ConnectInfo(requests)| requests.begin());
    if let Some(busy) = busy.clone() {
        request.extensions_mut().insert(busy);
    }
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
    if server.loopback {
        local(headers)?;
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        same_origin(headers)?;
    }
    // What the page consists of, and whether the server is there, everybody may know.
    let open = matches!(route, "/" | "/page.js" | "/style.css" | "/icon.svg" | "/health");
    match &server.key {
        Some(key) if !open => authorized(headers, key),
        _ => Ok(()),
    }
}

/// A page that makes its own name point at this machine still sends that name.
fn local(headers: &HeaderMap) -> Result<(), ApiError> {
    let mut hosts = headers.get_all(header::HOST).iter().peekable();
    if hosts.peek().is_none() {
        return Err(ApiError::body("there is no Host header"));
    }
    let is_local = |host: &axum::http::HeaderValue| {
        let authority: Authority = host.to_str().ok()?.parse().ok()?;
        let name = authority.host();
        let address = name.trim_start_matches('[').trim_end_matches(']');
        let loopback = address.parse().is_ok_and(|address: IpAddr| address.is_loopback());
        let named = name.eq_ignore_ascii_case("localhost");
        ((loopback || named) && !authority.as_str().contains('@')).then_some(())
    };
    match hosts.all(|host| is_local(host).is_some()) {
        true => Ok(()),
        false => Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "the Host header names another machine, expected localhost or a loopback address",
        )
        .code("foreign_host")),
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
        for host in ["localhost", "LOCALHOST:1", "127.0.0.1:8080", "127.9.9.9", "[::1]", "[::1]:80"] {
            local(&headers(header::HOST, host)).unwrap();
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
            assert_eq!(local(&headers(header::HOST, host)).unwrap_err().status, 403, "{host}");
        }
        assert_eq!(local(&HeaderMap::new()).unwrap_err().status, 400);
        let mut two = headers(header::HOST, "localhost");
        two.append(header::HOST, "evil.example".parse().unwrap());
        assert_eq!(local(&two).unwrap_err().status, 403);
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
