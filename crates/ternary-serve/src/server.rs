//! [`serve`]: connections in, responses out.

use crate::{
    Limits, Models, ServeError, ServeOptions, Truncation,
    api::{self, ApiError},
    guard::{Hosts, guard},
    intake::Intake,
    listener,
    metric::{Metric, ModelMetric},
    model::Model,
    page,
    scheduler::Scheduler,
};
use axum::{
    Router,
    http::{HeaderValue, StatusCode, Uri, header},
    middleware,
    routing::{get, post},
};
use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{net::TcpListener, sync::oneshot, time::sleep};
use tower_http::set_header::SetResponseHeaderLayer;

/// For last words, when all work has been ended. Who listens gets them at once; this is for who does not.
const GRACE: Duration = Duration::from_secs(10);

/// Named in the error for unknown paths.
const PATHS: &str = "the paths are POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /health, \
                     GET /metrics, and GET / for the chat page";

/// What handlers share.
#[derive(Debug)]
pub struct Server {
    pub served: Vec<Arc<Served>>,
    pub limits: Limits,
    pub key: Option<String>,
    /// How requests may name the server; `None`: as they like.
    pub hosts: Option<Hosts>,
    /// For requests without the field `truncation`.
    pub truncation: Truncation,
    pub intake: Intake,
    pub metric: Metric,
    /// Since when, in seconds of the Unix epoch.
    pub created: u64,
}

/// A model that is being served.
#[derive(Debug)]
pub struct Served {
    pub model: Model,
    pub scheduler: Scheduler,
    pub metric: Arc<ModelMetric>,
}

impl Server {
    fn new(models: Models, options: &ServeOptions) -> Result<Self, ServeError> {
        options.check()?;
        let served = models.0.into_iter().map(|model| {
            let metric = Arc::new(ModelMetric::default());
            let scheduler = Scheduler::new(model.engine.clone(), &options.limits, metric.clone())?;
            Ok(Arc::new(Served { model, scheduler, metric }))
        });
        Ok(Self {
            served: served.collect::<Result<_, ServeError>>()?,
            limits: options.limits.clone(),
            key: options.api_key.clone(),
            hosts: Hosts::new(options),
            truncation: options.truncation,
            intake: Intake::default(),
            metric: Metric::default(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
        })
    }

    fn router(self: &Arc<Self>) -> Router {
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
            .layer(middleware::from_fn_with_state(self.clone(), guard))
            .layer(SetResponseHeaderLayer::overriding(
                header::X_CONTENT_TYPE_OPTIONS,
                HeaderValue::from_static("nosniff"),
            ))
            .with_state(self.clone())
    }
}

/// The service alone, without the limits on connections and on the time that headers take.
///
/// The work ends when the router and its clones are dropped.
///
/// # Errors
/// Those of [`ServeOptions::check`]. `Io`: no thread can be started.
pub fn router(models: Models, options: &ServeOptions) -> Result<Router, ServeError> {
    Ok(Arc::new(Server::new(models, options)?).router())
}

/// Listens where `options` say; `local_addr` of the listener tells the port.
///
/// # Errors
/// Those of [`ServeOptions::check`]. `Address`: it is taken, or not of this machine.
pub async fn bind(options: &ServeOptions) -> Result<TcpListener, ServeError> {
    options.check()?;
    let address = options.address;
    TcpListener::bind(address).await.map_err(|source| ServeError::Address { address, source })
}

/// Serves until `shutdown` is there; requests then may go on for `limits.drain`, and new ones get 503.
///
/// # Errors
/// `Open`: `listener` is not on loopback, and `options` do not allow it. Those of [`ServeOptions::check`]. `Io`: no
/// thread can be started.
pub async fn serve(
    listener: TcpListener,
    models: Models,
    options: ServeOptions,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let options = ServeOptions { address: listener.local_addr()?, ..options };
    let server = Arc::new(Server::new(models, &options)?);
    let drain = options.limits.drain;
    tracing::info!(address = %options.address, models = server.served.len(), key = server.key.is_some(), "serving");
    let (told, tell) = oneshot::channel();
    let open = server.clone();
    let ending = async move {
        shutdown.await;
        tracing::info!("stopping");
        open.served.iter().for_each(|served| served.scheduler.drain());
        told.send(()).ok();
    };
    let stop = || server.served.iter().for_each(|served| served.scheduler.stop());
    let late = async {
        tell.await.ok();
        sleep(drain).await;
        stop();
        sleep(GRACE).await;
    };
    tokio::select! {
        () = listener::answer(listener, server.router(), &server.limits, server.key.is_some(), ending) => (),
        () = late => (),
    }
    stop();
    tracing::info!("stopped");
    Ok(())
}
