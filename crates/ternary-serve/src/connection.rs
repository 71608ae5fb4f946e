//! [`Connection`]: a connection that may be slow only while we work for it, and [`departed`], when its client has gone.

use crate::{api::ApiError, slot::Client};
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
    time::{Instant, Sleep, sleep, timeout},
};

/// Between two looks at whether a client still waits.
const GLANCE: Duration = Duration::from_millis(200);

/// A connection that ends when, while no request is being answered, the headers of the next do not come in time, or
/// when what is sent is not taken in time.
pub struct Connection {
    stream: Arc<TcpStream>,
    client: Arc<Client>,
    patience: Duration,
    /// The longest headers, in bytes.
    header: usize,
    /// Until the headers have to be there. Single bytes that come do not prolong it.
    reading: Option<Pin<Box<Sleep>>>,
    /// Until something has to be taken.
    writing: Option<Pin<Box<Sleep>>>,
    /// What is sent in place of hyper's answer, and how much of it has been sent.
    refusal: Option<(Vec<u8>, usize)>,
}

impl Connection {
    pub fn new(stream: Arc<TcpStream>, client: Arc<Client>, patience: Duration, header: usize) -> Self {
        let (reading, writing, refusal) = Default::default();
        Self { stream, client, patience, header, reading, writing, refusal }
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
        // Who waits here is not asked again when its request has been answered, so the time runs always.
        let reading = this.reading.get_or_insert_with(|| Box::pin(sleep(this.patience)));
        loop {
            ready!(reading.as_mut().poll(context));
            if !this.client.is_busy() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            reading.as_mut().reset(Instant::now() + this.patience);
        }
    }
}

impl Connection {
    /// Writes what the stream takes.
    fn write(&mut self, context: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        while self.stream.poll_write_ready(context)?.is_ready() {
            match self.stream.try_write_vectored(slices) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => (),
                written => {
                    let all = slices.iter().map(|slice| slice.len()).sum();
                    self.client.set_unsent(written.as_ref().is_ok_and(|written| *written < all));
                    self.writing = None;
                    if let Some(reading) = &mut self.reading {
                        reading.as_mut().reset(Instant::now() + self.patience);
                    }
                    return Poll::Ready(written);
                }
            }
        }
        self.client.set_unsent(true);
        let writing = self.writing.get_or_insert_with(|| Box::pin(sleep(self.patience)));
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
            this.refusal.take().or_else(|| Some((refusal(first, this.header)?, 0)))
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

/// The answer to bytes that are no request, in place of hyper's.
///
/// Such bytes reach no handler: hyper answers them itself, with a status and an empty body, and offers no way to choose
/// another. All other errors here have a body, so an error without one is hyper's.
fn refusal(answer: &[u8], header: usize) -> Option<Vec<u8>> {
    let status = answer.strip_prefix(b"HTTP/1.1 ")?.first_chunk::<3>().filter(|status| status[0] == b'4')?;
    let head = str::from_utf8(answer).ok()?.strip_suffix("\r\n\r\n")?;
    head.split("\r\n").find(|line| line.eq_ignore_ascii_case("content-length: 0"))?;
    let status = StatusCode::from_bytes(status).ok()?;
    let message = match status {
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => {
            format!("the headers are too long or too many, expected at most {header} bytes and 100 headers")
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

/// Ends when the client of a request that has not been answered has gone.
///
/// A client may close its half of the connection and still wait for the answer; one that has gone looks the same until it
/// is sent something, which its system then refuses. So an `interim` response is sent, once, to a client whose half is closed.
/// Clients of HTTP/1.0 know no such responses; their requests go on.
pub async fn departed(stream: &TcpStream, client: &Client, interim: bool) -> io::Error {
    let mut asked = !interim;
    loop {
        sleep(GLANCE).await;
        let ready = timeout(Duration::ZERO, stream.ready(Interest::READABLE | Interest::ERROR)).await;
        match ready {
            Ok(Err(error)) => return error,
            Ok(Ok(ready)) if ready.is_error() => return io::ErrorKind::ConnectionReset.into(),
            Ok(Ok(ready)) if ready.is_read_closed() && !asked && !client.has_unsent() => {
                asked = true;
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
