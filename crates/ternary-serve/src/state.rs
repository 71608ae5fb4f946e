//! [`ServerState`]: what the handlers of requests share.

use crate::{
    Limits, Models, ServeError, ServeOptions, Truncation,
    api_error::ApiError,
    body_permits::BodyPermits,
    host::Hosts,
    metric::{Metric, ModelMetric},
    model::Model,
    scheduler::Scheduler,
};
use axum::http::StatusCode;
use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

/// The state of a server.
#[derive(Debug)]
pub struct ServerState {
    pub models: Vec<Arc<ServedModel>>,
    pub limits: Limits,
    pub api_key: Option<String>,
    /// Accepted `Host` headers; `None`: all.
    pub hosts: Option<Hosts>,
    /// For requests without the field `truncation`.
    pub truncation: Truncation,
    pub body_permits: BodyPermits,
    pub metric: Metric,
    /// Time of the start, in seconds since the Unix epoch.
    pub created: u64,
}

/// A model with its scheduler.
#[derive(Debug)]
pub struct ServedModel {
    pub model: Model,
    pub scheduler: Scheduler,
    pub metric: Arc<ModelMetric>,
}

impl ServerState {
    /// Starts one scheduler per model.
    ///
    /// # Errors
    /// Those of [`ServeOptions::check`]. `Io`: no thread can be started.
    pub fn new(models: Models, options: &ServeOptions) -> Result<Self, ServeError> {
        options.check()?;
        let models = models.0.into_iter().map(|model| {
            let metric = Arc::new(ModelMetric::default());
            let scheduler = Scheduler::new(model.engine.clone(), &options.limits, metric.clone())?;
            Ok(Arc::new(ServedModel { model, scheduler, metric }))
        });
        Ok(Self {
            models: models.collect::<Result<_, ServeError>>()?,
            limits: options.limits.clone(),
            api_key: options.api_key.clone(),
            hosts: Hosts::new(options),
            truncation: options.truncation,
            body_permits: BodyPermits::default(),
            metric: Metric::default(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
        })
    }

    /// A model by name; without a name, the only one.
    ///
    /// # Errors
    /// 404: there is no such model. 400: the name is missing, and there are several models.
    pub fn find(&self, name: Option<&str>) -> Result<Arc<ServedModel>, ApiError> {
        let names = || {
            let names = self.models.iter().map(|served| format!("`{}`", served.model.name));
            names.collect::<Vec<_>>().join(", ")
        };
        match (name, &self.models[..]) {
            (None, [only]) => Ok(only.clone()),
            (None, _) => {
                let message = format!("`model` is missing, expected one of {}", names());
                Err(ApiError::field("model", message).code("model_missing"))
            }
            (Some(name), all) => {
                let served = all.iter().find(|served| served.model.name == name).cloned();
                served.ok_or_else(|| {
                    let short: String = name.chars().take(60).collect();
                    let message = format!("there is no model `{short}`, expected one of {}", names());
                    let error = ApiError::new(StatusCode::NOT_FOUND, message).code("model_not_found");
                    ApiError { param: Some("model".into()), ..error }
                })
            }
        }
    }
}
