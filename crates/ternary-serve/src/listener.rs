//! [`accept_connections`]: accepts connections and passes their requests to the router.

use crate::{
    Limits,
    connection::{Connection, departed},
    connection_slot::{ConnectionSlot, ConnectionSlots},
};
use axum::{Router, extract::Request, http::Version};
use hyper::{
    body::Incoming,
    server::conn::http1,
    service::{Service, service_fn},
};
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use std::{convert::Infallible, io, pin::pin, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::sleep,
};

/// Size of hyper's read buffer besides the headers, in bytes.
const READ_BUFFER_BYTES: usize = 64 << 10;
/// Delay before another attempt when no slot is free.
const RETRY_DELAY: Duration = Duration::from_millis(20);
/// Delay before another attempt when the system refuses connections.
const RETRY_ERROR: Duration = Duration::from_secs(1);

/// Serves connections until `ending` completes, and then waits for the requests in flight.
pub async fn accept_connections(
    listener: TcpListener,
    router: Router,
    limits: &Limits,
    has_key: bool,
    ending: impl Future<Output = ()>,
) {
    let unauthenticated = if has_key { limits.unauthenticated_connections } else { usize::MAX };
    let slots = Arc::new(ConnectionSlots::new(limits.connections, unauthenticated));
    let (open, ended) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut ending = pin!(ending);
    loop {
        let (stream, slot) = tokio::select! {
            biased;
            () = &mut ending => break,
            next = accept(&listener, &slots) => next,
        };
        let connection = serve_connection(stream, slot, router.clone(), limits.clone(), ended.clone());
        connections.spawn(connection);
        while connections.try_join_next().is_some() {}
    }
    drop((listener, open));
    while connections.join_next().await.is_some() {}
}

/// The next connection for which there is a slot.
async fn accept(listener: &TcpListener, slots: &Arc<ConnectionSlots>) -> (TcpStream, ConnectionSlot) {
    loop {
        match listener.accept().await {
            Ok((stream, address)) => loop {
                match slots.take(address.ip()) {
                    Some(slot) => return (stream, slot),
                    None => sleep(RETRY_DELAY).await,
                }
            },
            // The client has already gone.
            Err(error) if is_of_connection(&error) => (),
            // Most likely the process has reached its limit of open files.
            Err(error) if slots.close_one().is_some() => {
                tracing::debug!(%error, "no connection can be accepted");
                sleep(RETRY_DELAY).await;
            }
            Err(error) => {
                tracing::error!(%error, "no connection can be accepted");
                sleep(RETRY_ERROR).await;
            }
        }
    }
}

fn is_of_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Serves the requests of one connection.
async fn serve_connection(
    stream: TcpStream,
    slot: ConnectionSlot,
    router: Router,
    limits: Limits,
    mut ended: watch::Receiver<()>,
) {
    // Each token is sent at once (no Nagle delay).
    stream.set_nodelay(true).ok();
    let (stream, client) = (Arc::new(stream), slot.client.clone());
    let io = Connection::new(stream.clone(), client.clone(), limits.timeout, limits.header_bytes);
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: Request<Incoming>| {
        let interim = request.version() == Version::HTTP_11;
        request.extensions_mut().insert(client.begin_request());
        let response = router.call(request);
        let (stream, client) = (stream.clone(), client.clone());
        async move {
            tokio::select! {
                response = response => Ok(response.unwrap_or_else(|never: Infallible| match never {})),
                gone = departed(&stream, &client, interim) => Err(gone),
            }
        }
    });
    // Otherwise hyper ends the connection of a client that closes its half.
    let mut http = http1::Builder::new();
    http.half_close(true).max_buf_size(limits.header_bytes.saturating_add(READ_BUFFER_BYTES));
    let mut connection = pin!(http.serve_connection(TokioIo::new(io), service));
    let served = tokio::select! {
        served = &mut connection => served,
        () = slot.client.closed() => return,
        _ = ended.changed() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                served = connection => served,
                () = slot.client.closed() => return,
            }
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "a connection failed");
    }
}
