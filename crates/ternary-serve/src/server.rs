//! [`serve`]: connections in, responses out.

use crate::{
    Models, ServeError, ServeOptions, api, api_error::ApiError, auth, listener, page, state::ServerState,
};
use axum::{
    Router,
    http::{HeaderValue, StatusCode, Uri, header},
    middleware,
    routing::{get, post},
};
use std::{sync::Arc, time::Duration};
use tokio::{net::TcpListener, sync::oneshot, time::sleep};
use tower_http::set_header::SetResponseHeaderLayer;

/// How long the last responses may take to be sent once all work has ended. Clients that read receive them at once.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(10);

/// Named in the error for unknown paths.
const PATHS: &str = "the paths are POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /health, \
                     GET /metrics, and GET / for the chat page";

fn routes(state: &Arc<ServerState>) -> Router {
    Router::new()
        .merge(page::router())
        .route("/health", get(api::health))
        .route("/metrics", get(api::metrics))
        .route("/v1/models", get(api::models))
        .route("/v1/models/{*name}", get(api::model))
        .route("/v1/completions", post(api::completion))
        .route("/v1/chat/completions", post(api::chat))
        .fallback(async |uri: Uri| {
            let path: String = uri.path().chars().take(60).collect();
            let message = format!("there is nothing at {path}; {PATHS}");
            ApiError::new(StatusCode::NOT_FOUND, message).code("not_found")
        })
        .method_not_allowed_fallback(async || {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "the method is not for this path")
                .code("method_not_allowed")
        })
        .layer(middleware::from_fn_with_state(state.clone(), auth::check))
        .layer(SetResponseHeaderLayer::overriding(
            header::X_CONTENT_TYPE_OPTIONS,
            HeaderValue::from_static("nosniff"),
        ))
        .with_state(state.clone())
}

/// The service alone, without the limits on connections and the timeouts of headers.
///
/// All work ends when the router and its clones are dropped.
///
/// # Errors
/// Those of [`ServeOptions::check`]. `Io`: no thread can be started.
pub fn router(models: Models, options: &ServeOptions) -> Result<Router, ServeError> {
    Ok(routes(&Arc::new(ServerState::new(models, options)?)))
}

/// Binds to the address of `options`. The listener's `local_addr` has the port.
///
/// # Errors
/// Those of [`ServeOptions::check`]. `Address`: it is in use, or not an address of this machine.
pub async fn bind(options: &ServeOptions) -> Result<TcpListener, ServeError> {
    options.check()?;
    let address = options.address;
    TcpListener::bind(address).await.map_err(|source| ServeError::Address { address, source })
}

/// Serves until `shutdown` completes. Active requests then have `limits.drain_timeout` to end; new ones get status 503.
///
/// # Errors
/// `Open`: `listener` is not bound to a loopback address, and `options` do not allow that. Those of
/// [`ServeOptions::check`]. `Io`: no thread can be started.
pub async fn serve(
    listener: TcpListener,
    models: Models,
    options: ServeOptions,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let options = ServeOptions { address: listener.local_addr()?, ..options };
    let state = Arc::new(ServerState::new(models, &options)?);
    let drain = options.limits.drain_timeout;
    tracing::info!(address = %options.address, models = state.models.len(), key = state.api_key.is_some(), "serving");
    let (started, start) = oneshot::channel();
    let draining = state.clone();
    let ending = async move {
        shutdown.await;
        tracing::info!("stopping");
        draining.models.iter().for_each(|served| served.scheduler.drain());
        started.send(()).ok();
    };
    let stop = || state.models.iter().for_each(|served| served.scheduler.stop());
    let late = async {
        start.await.ok();
        sleep(drain).await;
        stop();
        sleep(FLUSH_TIMEOUT).await;
    };
    tokio::select! {
        () = listener::accept_connections(listener, routes(&state), &state.limits, state.api_key.is_some(), ending) => (),
        () = late => (),
    }
    stop();
    tracing::info!("stopped");
    Ok(())
}
