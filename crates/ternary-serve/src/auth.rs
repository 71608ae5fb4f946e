//! [`check`]: the middleware that admits requests, by size, host, origin and API key.

use crate::{api_error::ApiError, connection_slot::InFlight, page, state::ServerState};
use axum::{
    extract::{Request, State},
    http::{HeaderMap, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use std::{sync::Arc, time::Instant};
use subtle::ConstantTimeEq;

/// The route of a path, as metrics name it. Unknown paths share a label, so that clients cannot create labels.
fn route(path: &str) -> &'static str {
    const ROUTES: [&str; 5] =
        ["/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"];
    match page::path(path).or(ROUTES.into_iter().find(|route| path == *route)) {
        Some(route) => route,
        None if path.starts_with("/v1/models/") => "/v1/models/NAME",
        None => "other",
    }
}

/// Forwards a request to its handler or refuses it, and counts and logs the response.
pub async fn check(State(state): State<Arc<ServerState>>, request: Request, next: Next) -> Response {
    let start = Instant::now();
    let method = request.method().clone();
    let route = route(request.uri().path());
    // Held until the response is ready.
    let _in_flight = request.extensions().get::<InFlight>().cloned();
    let response = match admit(&state, &request, route) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    let status = response.status().as_u16();
    state.metric.response(route, status);
    let milliseconds = start.elapsed().as_millis() as u64;
    match status {
        500.. => tracing::warn!(%method, route, status, milliseconds, "response"),
        400.. => tracing::info!(%method, route, status, milliseconds, "response"),
        _ => tracing::debug!(%method, route, status, milliseconds, "response"),
    }
    response
}

fn admit(state: &ServerState, request: &Request, route: &str) -> Result<(), ApiError> {
    let headers = request.headers();
    let size: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    let size = size + request.uri().path().len() + request.uri().query().map_or(0, str::len);
    if size > state.limits.header_bytes {
        let message = format!("headers of {size} bytes, expected at most {}", state.limits.header_bytes);
        return Err(ApiError::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, message));
    }
    if let Some(hosts) = &state.hosts {
        hosts.check(headers)?;
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        same_origin(headers)?;
    }
    // The files of the page and the health check are public.
    let public = route == "/health" || page::path(route).is_some();
    match &state.api_key {
        Some(key) if !public => {
            authorize(headers, key)?;
            request.extensions().get::<InFlight>().inspect(|in_flight| in_flight.authenticate());
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Refuses requests from web pages of other origins, which browsers name in the `Origin` header.
fn same_origin(headers: &HeaderMap) -> Result<(), ApiError> {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let same = |origin: &str| {
        let authority = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        authority.zip(host).is_some_and(|(authority, host)| authority.eq_ignore_ascii_case(host))
    };
    match headers.get_all(header::ORIGIN).iter().all(|origin| origin.to_str().is_ok_and(same)) {
        true => Ok(()),
        false => Err(ApiError::new(StatusCode::FORBIDDEN, "requests from other origins are refused")
            .code("foreign_origin")),
    }
}

fn authorize(headers: &HeaderMap, key: &str) -> Result<(), ApiError> {
    let header = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
    let header = header.and_then(|value| value.split_at_checked(7));
    let (code, message) = match header {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case(b"bearer ") => {
            // In constant time for keys of equal length.
            if token.ct_eq(key.as_bytes()).into() {
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
    fn keys_are_compared_whole() {
        for (value, accepted) in [
            ("Bearer quack", true),
            ("bearer quack", true),
            ("Bearer quac", false),
            ("Bearer quackk", false),
            ("Bearer ", false),
            ("Bearer", false),
            ("Basic quack", false),
            ("quack", false),
        ] {
            assert_eq!(
                authorize(&headers(header::AUTHORIZATION, value), "quack").is_ok(),
                accepted,
                "{value}"
            );
        }
        assert_eq!(authorize(&HeaderMap::new(), "quack").unwrap_err().code, Some("missing_api_key"));
    }

    #[test]
    fn requests_from_pages_of_other_origins_are_refused() {
        for (origin, accepted) in [
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
            assert_eq!(same_origin(&headers).is_ok(), accepted, "{origin}");
        }
        same_origin(&HeaderMap::new()).unwrap();
    }
}
