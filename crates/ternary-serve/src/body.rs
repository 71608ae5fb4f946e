//! [`read`]: the body of a request, as long as it may be, in the time that it may take.

use crate::{
    Limits,
    api::ApiError,
    intake::{Intake, SMALL},
};
use axum::{
    body::Body,
    http::{HeaderMap, StatusCode, header},
};
use tokio::sync::OwnedSemaphorePermit;
use tokio_stream::StreamExt;

/// A body, and the right to hold it if it is large.
pub struct Whole {
    pub bytes: Vec<u8>,
    _held: Option<OwnedSemaphorePermit>,
}

/// The whole body.
///
/// What is too long is taken and let go, for a client that is still sending may not hear the answer.
///
/// # Errors
/// 413: it is too long. 408: it does not come. 400: the client went away. 503: too many large bodies are there already.
pub async fn read(
    headers: &HeaderMap,
    body: Body,
    limits: &Limits,
    intake: &Intake,
) -> Result<Whole, ApiError> {
    let declared = headers.get(header::CONTENT_LENGTH);
    let declared = declared.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    let mut long = declared.is_some_and(|length| length > limits.body as u64);
    let too_long = || {
        let message = format!("the body is too long, expected at most {} bytes", limits.body);
        Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message).code("body_too_large"))
    };
    if long && headers.contains_key(header::EXPECT) {
        return too_long(); // The client has not begun to send.
    }
    let mut stream = body.into_data_stream();
    let mut bytes = Vec::new();
    let (mut held, mut waits) = (None, false);
    let reading = async {
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|_| ApiError::body("the body ended before its end"))?;
            long |= bytes.len() + chunk.len() > limits.body;
            if long {
                bytes = Vec::new();
            } else {
                if held.is_none() && bytes.len() + chunk.len() > SMALL {
                    waits = true;
                    held = Some(intake.hold().await);
                    waits = false;
                }
                bytes.extend_from_slice(&chunk);
            }
        }
        Ok(())
    };
    let read = tokio::time::timeout(limits.patience, reading).await;
    match read {
        _ if long => too_long(),
        Ok(Ok(())) => Ok(Whole { bytes, _held: held }),
        Ok(Err(error)) => Err(error),
        Err(_) if waits => {
            let message = "too many large requests are waiting; try again later";
            Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).code("server_busy"))
        }
        Err(_) => {
            let seconds = limits.patience.as_secs_f32();
            let message = format!("the body did not come within {seconds} seconds");
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message).code("body_timeout"))
        }
    }
}
