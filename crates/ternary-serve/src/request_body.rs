//! [`RequestBody`]: reads the body of a request, within its limits of length and time.

use crate::{
    Limits,
    api_error::ApiError,
    body_permits::{BodyPermits, SMALL_BODY_BYTES},
};
use axum::{
    body::Body,
    http::{HeaderMap, StatusCode, header},
};
use tokio::sync::OwnedSemaphorePermit;
use tokio_stream::StreamExt;

/// A complete body, with the permit to buffer it if it is large.
pub struct RequestBody {
    pub bytes: Vec<u8>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl RequestBody {
    /// Reads a body to its end.
    ///
    /// A body that is too long is read and discarded, since a client that is still sending may not read the response.
    ///
    /// # Errors
    /// 413: it is too long. 408: it takes too long. 400: the client went away. 503: too many large bodies are waiting.
    pub async fn read(
        headers: &HeaderMap,
        body: Body,
        limits: &Limits,
        permits: &BodyPermits,
    ) -> Result<Self, ApiError> {
        let declared = headers.get(header::CONTENT_LENGTH);
        let declared = declared.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        let mut is_too_long = declared.is_some_and(|length| length > limits.body_bytes as u64);
        let too_long = || {
            let message = format!("the body is too long, expected at most {} bytes", limits.body_bytes);
            Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message).code("body_too_large"))
        };
        if is_too_long && headers.contains_key(header::EXPECT) {
            return too_long(); // The client waits before it sends the body.
        }
        let mut stream = body.into_data_stream();
        let mut bytes = Vec::new();
        let (mut permit, mut waits) = (None, false);
        let reading = async {
            while let Some(chunk) = stream.next().await {
                let chunk = chunk.map_err(|_| ApiError::body("the body is shorter than declared"))?;
                is_too_long |= bytes.len() + chunk.len() > limits.body_bytes;
                if is_too_long {
                    bytes = Vec::new();
                } else {
                    if permit.is_none() && bytes.len() + chunk.len() > SMALL_BODY_BYTES {
                        waits = true;
                        permit = Some(permits.buffer().await);
                        waits = false;
                    }
                    bytes.extend_from_slice(&chunk);
                }
            }
            Ok(())
        };
        let read = tokio::time::timeout(limits.timeout, reading).await;
        match read {
            _ if is_too_long => too_long(),
            Ok(Ok(())) => Ok(Self { bytes, _permit: permit }),
            Ok(Err(error)) => Err(error),
            Err(_) if waits => {
                let message = "too many large requests are waiting; try again later";
                Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).code("server_busy"))
            }
            Err(_) => {
                let seconds = limits.timeout.as_secs_f32();
                let message = format!("the body was not complete after {seconds} seconds");
                Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message).code("body_timeout"))
            }
        }
    }
}
