//! What can be asked of the server itself: its models, its health, its counters.

use super::ApiError;
use crate::server::{Served, Server};
use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use std::sync::Arc;

fn object(server: &Server, served: &Served) -> Value {
    json!({
        "id": served.model.name,
        "object": "model",
        "created": server.created,
        "owned_by": "local",
        "context_length": served.model.engine.context(),
        "chat_template": served.model.template.is_some(),
    })
}

/// `GET /v1/models`
pub async fn models(State(server): State<Arc<Server>>) -> Json<Value> {
    let data: Vec<Value> = server.served.iter().map(|served| object(&server, served)).collect();
    Json(json!({ "object": "list", "data": data }))
}

/// `GET /v1/models/NAME`
pub async fn model(
    State(server): State<Arc<Server>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(name) = name.map_err(|_| ApiError::body("the name in the path is not UTF-8"))?;
    let served = server.find(Some(&name))?;
    Ok(Json(object(&server, &served)))
}

/// `GET /health`
pub async fn health(State(server): State<Arc<Server>>) -> Response {
    match server.served.iter().all(|served| served.scheduler.is_open()) {
        true => Json(json!({ "status": "ok" })).into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "status": "unavailable" }))).into_response(),
    }
}

/// `GET /metrics`
pub async fn metrics(State(server): State<Arc<Server>>) -> impl IntoResponse {
    let models = server.served.iter();
    let models = models.map(|served| (served.model.name.as_str(), &*served.metric, served.scheduler.load()));
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], server.metric.render(models))
}
