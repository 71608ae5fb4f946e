//! The chat page: files that are part of the program.

use axum::{
    Router,
    http::{HeaderName, header},
    response::IntoResponse,
    routing::get,
};

/// The page loads from this server only, and no other page embeds it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; \
                      trusted-types 'none'";

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
const ICON: &str = "image/svg+xml";

/// A file of the page: path, media type, content.
struct File(&'static str, &'static str, &'static str);

const FILES: [File; 12] = [
    File("/", HTML, include_str!("page/index.html")),
    File("/style.css", STYLE, include_str!("page/style.css")),
    File("/icon.svg", ICON, include_str!("page/icon.svg")),
    File("/theme.js", SCRIPT, include_str!("page/theme.js")),
    File("/page.js", SCRIPT, include_str!("page/page.js")),
    File("/archive.js", SCRIPT, include_str!("page/archive.js")),
    File("/conversation.js", SCRIPT, include_str!("page/conversation.js")),
    File("/markdown.js", SCRIPT, include_str!("page/markdown.js")),
    File("/settings.js", SCRIPT, include_str!("page/settings.js")),
    File("/sidebar.js", SCRIPT, include_str!("page/sidebar.js")),
    File("/stream.js", SCRIPT, include_str!("page/stream.js")),
    File("/thread.js", SCRIPT, include_str!("page/thread.js")),
];

/// The path, if it is one of a file of the page.
pub fn path(path: &str) -> Option<&'static str> {
    FILES.iter().map(|file| file.0).find(|known| *known == path)
}

/// The files of the page, at their paths.
pub fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES.iter().fold(Router::new(), |router, File(path, kind, text)| {
        router.route(path, get(async || respond(kind, text)))
    })
}

fn respond(kind: &'static str, text: &'static str) -> impl IntoResponse {
    let headers: [(HeaderName, &str); 5] = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::CACHE_CONTROL, "no-cache"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ];
    (headers, text)
}
