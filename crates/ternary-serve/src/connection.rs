//! [`Listener`]: connections that may be slow only while we work for them.

use axum::{extract::connect_info::Connected, serve::IncomingStream};
use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep, sleep},
};

/// Accepts so many connections at a time; the others wait in the system's queue.
pub struct Listener {
    listener: TcpListener,
    places: Arc<Semaphore>,
    patience: Duration,
}

impl Listener {
    pub fn new(listener: TcpListener, connections: usize, patience: Duration) -> Self {
        let places = Arc::new(Semaphore::new(connections.min(Semaphore::MAX_PERMITS)));
        Self { listener, places, patience }
    }
}

impl axum::serve::Listener for Listener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        let place = self.places.clone().acquire_owned().await.expect("nobody closes it");
        let (stream, address) = axum::serve::Listener::accept(&mut self.listener).await;
        // Tokens are small and should not wait for each other.
        stream.set_nodelay(true).ok();
        let patience = self.patience;
        let (requests, reading, writing) = (Requests::default(), None, None);
        (Connection { stream, requests, patience, reading, writing, _place: place }, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// How many requests of a connection are being answered.
#[derive(Clone, Debug, Default)]
pub struct Requests(Arc<AtomicUsize>);

/// A request that is being answered, until the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Busy(#[allow(dead_code)] Arc<Counted>);

#[derive(Debug)]
struct Counted(Requests);

impl Requests {
    pub fn begin(&self) -> Busy {
        self.0.fetch_add(1, Relaxed);
        Busy(Arc::new(Counted(self.clone())))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Relaxed);
    }
}

impl Connected<IncomingStream<'_, Listener>> for Requests {
    fn connect_info(stream: IncomingStream<'_, Listener>) -> Self {
        stream.io().requests.clone()
    }
}

/// A connection that ends when, while no request is being answered, the headers of the next do not come in time, or
/// when what is sent is not taken in time.
pub struct Connection {
    stream: TcpStream,
    requests: Requests,
    patience: Duration,
    /// Until the headers have to be there. Single bytes that come do not prolong it.
    reading: Option<Pin<Box<Sleep>>>,
    /// Until something has to be taken.
    writing: Option<Pin<Box<Sleep>>>,
    _place: OwnedSemaphorePermit,
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Poll::Ready(read) = Pin::new(&mut this.stream).poll_read(context, buffer) {
            return Poll::Ready(read);
        }
        // Who waits here is not asked again when its request has been answered, so the time runs always.
        let reading = this.reading.get_or_insert_with(|| Box::pin(sleep(this.patience)));
        loop {
            ready!(reading.as_mut().poll(context));
            if this.requests.0.load(Relaxed) == 0 {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            reading.as_mut().reset(Instant::now() + this.patience);
        }
    }
}

impl Connection {
    fn written(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.writing = None;
            if let Some(reading) = &mut self.reading {
                reading.as_mut().reset(Instant::now() + self.patience);
            }
            return written;
        }
        let writing = self.writing.get_or_insert_with(|| Box::pin(sleep(self.patience)));
        ready!(writing.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.written(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.written(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
