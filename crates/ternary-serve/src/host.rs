//! [`Hosts`]: the `Host` headers that a server accepts.

use crate::{ServeOptions, api_error::ApiError};
use axum::http::{HeaderMap, StatusCode, header, uri::Authority};
use std::net::IpAddr;

/// The names by which requests may address the server: a defence against DNS rebinding.
///
/// A web page can let its own name resolve to the address of this server, and its scripts can then read the responses.
/// Their requests still have that name in the `Host` header. A page cannot do this with an address instead of a name,
/// nor without the API key.
#[derive(Debug)]
pub struct Hosts {
    names: Vec<String>,
    /// The server can be reached by other addresses than loopback ones.
    remote: bool,
}

impl Hosts {
    /// `None`: an API key protects the server, and any name is accepted.
    pub fn new(options: &ServeOptions) -> Option<Self> {
        let remote = !options.address.ip().is_loopback();
        let names = options.host_names.clone();
        let any = remote && names.is_empty() && options.api_key.is_some();
        (!any).then_some(Self { names, remote })
    }

    /// # Errors
    /// 400: there is no `Host` header. 403: it has another name.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let mut hosts = headers.get_all(header::HOST).iter().peekable();
        if hosts.peek().is_none() {
            return Err(ApiError::body("there is no Host header"));
        }
        if hosts.all(|host| host.to_str().is_ok_and(|host| self.accepts(host))) {
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

    fn accepts(&self, host: &str) -> bool {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: header::HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, value.parse().unwrap())])
    }

    #[test]
    fn a_local_server_accepts_localhost_and_loopback_addresses() {
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
    fn a_remote_server_without_a_key_accepts_the_names_of_its_options() {
        let mut options =
            ServeOptions::default().with_address("0.0.0.0:80".parse().unwrap()).with_allow_remote(true);
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
        // An API key protects as well: a page does not know it.
        options.api_key = Some("quack".into());
        assert!(Hosts::new(&options).is_some());
        options.host_names.clear();
        assert!(Hosts::new(&options).is_none());
    }
}
