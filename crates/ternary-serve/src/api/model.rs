//! The endpoints about the server itself: models, health, metrics.

use crate::{
    api_error::ApiError,
    state::{ServedModel, ServerState},
};
use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use std::sync::Arc;

fn object(state: &ServerState, served: &ServedModel) -> Value {
    json!({
        "id": served.model.name,
        "object": "model",
        "created": state.created,
        "owned_by": "local",
        "context_length": served.model.engine.context(),
        "chat_template": served.model.template.is_some(),
    })
}

/// `GET /v1/models`
pub async fn models(State(state): State<Arc<ServerState>>) -> Json<Value> {
    let data: Vec<Value> = state.models.iter().map(|served| object(&state, served)).collect();
    Json(json!({ "object": "list", "data": data }))
}

/// `GET /v1/models/NAME`
pub async fn model(
    State(state): State<Arc<ServerState>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(name) = name.map_err(|_| ApiError::body("the name in the path is not UTF-8"))?;
    let served = state.find(Some(&name))?;
    Ok(Json(object(&state, &served)))
}

/// `GET /health`
pub async fn health(State(state): State<Arc<ServerState>>) -> Response {
    match state.models.iter().all(|served| served.scheduler.is_open()) {
        true => Json(json!({ "status": "ok" })).into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "status": "unavailable" }))).into_response(),
    }
}

/// `GET /metrics`
pub async fn metrics(State(state): State<Arc<ServerState>>) -> impl IntoResponse {
    let models = state.models.iter();
    let models = models.map(|served| (served.model.name.as_str(), &*served.metric, served.scheduler.load()));
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], state.metric.render(models))
}
