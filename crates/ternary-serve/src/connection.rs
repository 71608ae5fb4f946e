//! [`Connection`]: a TCP stream with timeouts, and [`departed`], which detects that its client has gone.

use crate::{api_error::ApiError, connection_slot::ClientState};
use axum::http::StatusCode;
use std::{
    io,
    net::Shutdown,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
    time::{self, Instant, Sleep, sleep},
};

/// Interval of the checks whether a client is still connected.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// A TCP stream that fails if the headers of the next request are not complete in time, or if the client does not read a
/// response in time. The first timeout does not run out while a request is being answered.
///
/// hyper has a timeout for headers, but none for a client that does not read.
pub struct Connection {
    stream: Arc<TcpStream>,
    client: Arc<ClientState>,
    timeout: Duration,
    /// Maximum length of the headers, in bytes.
    header_bytes: usize,
    /// Until the headers must be complete. Bytes that arrive do not prolong it.
    reading: Option<Pin<Box<Sleep>>>,
    /// Until the client must have read something.
    writing: Option<Pin<Box<Sleep>>>,
    /// Sent instead of hyper's response, and how many of its bytes have been sent.
    refusal: Option<(Vec<u8>, usize)>,
}

impl Connection {
    pub fn new(
        stream: Arc<TcpStream>,
        client: Arc<ClientState>,
        timeout: Duration,
        header_bytes: usize,
    ) -> Self {
        let (reading, writing, refusal) = Default::default();
        Self { stream, client, timeout, header_bytes, reading, writing, refusal }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.stream.poll_read_ready(context)?.is_ready() {
            match this.stream.try_read(buffer.initialize_unfilled()) {
                Ok(read) => {
                    buffer.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => (),
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        // hyper does not poll again when a request has been answered, so the timeout always runs.
        let reading = this.reading.get_or_insert_with(|| Box::pin(sleep(this.timeout)));
        loop {
            ready!(reading.as_mut().poll(context));
            if !this.client.has_requests() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            reading.as_mut().reset(Instant::now() + this.timeout);
        }
    }
}

impl Connection {
    /// Writes as much as the stream takes.
    fn write(&mut self, context: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        while self.stream.poll_write_ready(context)?.is_ready() {
            match self.stream.try_write_vectored(slices) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => (),
                written => {
                    let all = slices.iter().map(|slice| slice.len()).sum();
                    self.client.set_unsent(written.as_ref().is_ok_and(|written| *written < all));
                    self.writing = None;
                    if let Some(reading) = &mut self.reading {
                        reading.as_mut().reset(Instant::now() + self.timeout);
                    }
                    return Poll::Ready(written);
                }
            }
        }
        self.client.set_unsent(true);
        let writing = self.writing.get_or_insert_with(|| Box::pin(sleep(self.timeout)));
        ready!(writing.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let Some(first) = slices.iter().find(|slice| !slice.is_empty()) else { return Poll::Ready(Ok(0)) };
        let Some((refusal, mut sent)) =
            this.refusal.take().or_else(|| Some((refusal(first, this.header_bytes)?, 0)))
        else {
            return this.write(context, slices);
        };
        while sent < refusal.len() {
            match this.write(context, &[io::IoSlice::new(&refusal[sent..])]) {
                Poll::Ready(Ok(written)) => sent += written,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    this.refusal = Some((refusal, sent));
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(first.len()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(socket2::SockRef::from(&*self.stream).shutdown(Shutdown::Write))
    }
}

/// The response to bytes that are not an HTTP request, instead of hyper's.
///
/// Such bytes reach no handler: hyper responds itself, with a status and an empty body, and offers no way to change that.
/// All other errors of this server have a body, so an error without one is hyper's.
fn refusal(response: &[u8], header_bytes: usize) -> Option<Vec<u8>> {
    let status =
        response.strip_prefix(b"HTTP/1.1 ")?.first_chunk::<3>().filter(|status| status[0] == b'4')?;
    let head = str::from_utf8(response).ok()?.strip_suffix("\r\n\r\n")?;
    head.split("\r\n").find(|line| line.eq_ignore_ascii_case("content-length: 0"))?;
    let status = StatusCode::from_bytes(status).ok()?;
    let message = match status {
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => {
            format!(
                "the headers are too long or too many, expected at most {header_bytes} bytes and 100 headers"
            )
        }
        StatusCode::URI_TOO_LONG => "the path is too long".into(),
        _ => "the request is not valid HTTP/1.1: its first line or one of its headers is malformed".into(),
    };
    let body = ApiError::new(status, message).code("invalid_http").json().to_string();
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nx-content-type-options: nosniff\r\n\
         content-length: {length}\r\nconnection: close\r\n\r\n"
    );
    Some((head + &body).into_bytes())
}

/// Completes when the client of an unanswered request has gone.
///
/// A client may close its half of the connection and still wait for the response. One that has gone looks the same until the
/// server sends something, which the client's system then refuses. So a client with a closed half gets one `interim`
/// response. HTTP/1.0 has no interim responses; its requests go on.
pub async fn departed(stream: &TcpStream, client: &ClientState, interim: bool) -> io::Error {
    let mut probed = !interim;
    loop {
        sleep(POLL_INTERVAL).await;
        let ready = time::timeout(Duration::ZERO, stream.ready(Interest::READABLE | Interest::ERROR)).await;
        match ready {
            Ok(Err(error)) => return error,
            Ok(Ok(ready)) if ready.is_error() => return io::ErrorKind::ConnectionReset.into(),
            Ok(Ok(ready)) if ready.is_read_closed() && !probed && !client.has_unsent() => {
                probed = true;
                if let Err(error) = stream.try_write(b"HTTP/1.1 102 Processing\r\n\r\n")
                    && error.kind() != io::ErrorKind::WouldBlock
                {
                    return error;
                }
            }
            _ => (),
        }
    }
}
