//! [`answer`]: connections in, requests to the router, responses out.

use crate::{
    Limits,
    connection::{Connection, departed},
    slot::{Slot, Slots},
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

/// What hyper reads at once besides headers.
const BUFFER: usize = 64 << 10;
/// Until a new connection is tried again for which there was no room.
const RETRY: Duration = Duration::from_millis(20);
/// The same, when the system refuses it.
const PAUSE: Duration = Duration::from_secs(1);

/// Answers connections until `ending`, and then those that are open to the end of the request that they are at.
pub async fn answer(
    listener: TcpListener,
    router: Router,
    limits: &Limits,
    has_key: bool,
    ending: impl Future<Output = ()>,
) {
    let unauthenticated = if has_key { limits.unauthenticated } else { usize::MAX };
    let slots = Arc::new(Slots::new(limits.connections, unauthenticated));
    let (open, ended) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut ending = pin!(ending);
    loop {
        let (stream, slot) = tokio::select! {
            biased;
            () = &mut ending => break,
            next = accept(&listener, &slots) => next,
        };
        let connection = connect(stream, slot, router.clone(), limits.clone(), ended.clone());
        connections.spawn(connection);
        while connections.try_join_next().is_some() {}
    }
    drop((listener, open));
    while connections.join_next().await.is_some() {}
}

/// The next connection, when there is a slot for it.
async fn accept(listener: &TcpListener, slots: &Arc<Slots>) -> (TcpStream, Slot) {
    loop {
        match listener.accept().await {
            Ok((stream, address)) => loop {
                match slots.take(address.ip()) {
                    Some(slot) => return (stream, slot),
                    None => sleep(RETRY).await,
                }
            },
            // The client has gone already.
            Err(error) if is_of_connection(&error) => (),
            // Most likely the process has as many files open as it may.
            Err(error) if slots.close_one().is_some() => {
                tracing::debug!(%error, "no connection can be accepted");
                sleep(RETRY).await;
            }
            Err(error) => {
                tracing::error!(%error, "no connection can be accepted");
                sleep(PAUSE).await;
            }
        }
    }
}

fn is_of_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Answers the requests of a connection.
async fn connect(
    stream: TcpStream,
    slot: Slot,
    router: Router,
    limits: Limits,
    mut ended: watch::Receiver<()>,
) {
    // Tokens are small and should not wait for each other.
    stream.set_nodelay(true).ok();
    let (stream, client) = (Arc::new(stream), slot.client.clone());
    let io = Connection::new(stream.clone(), client.clone(), limits.patience, limits.header);
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: Request<Incoming>| {
        let interim = request.version() == Version::HTTP_11;
        request.extensions_mut().insert(client.begin());
        let response = router.call(request);
        let (stream, client) = (stream.clone(), client.clone());
        async move {
            tokio::select! {
                response = response => Ok(response.unwrap_or_else(|never: Infallible| match never {})),
                gone = departed(&stream, &client, interim) => Err(gone),
            }
        }
    });
    // Hyper would take a client that closes its half for one that has gone.
    let mut http = http1::Builder::new();
    http.half_close(true).max_buf_size(limits.header.saturating_add(BUFFER));
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
        tracing::debug!(%error, "a connection broke");
    }
}
