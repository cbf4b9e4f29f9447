//! Answers: JSON for successes, EC2's error body for everything else, a request id on both.

use crate::engine::Random;
use http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use http::{Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Bytes;
use roost_types::error::ErrorBody;
use roost_types::{ApiError, ErrorCode};
use serde::Serialize;
use std::io;

/// The body of every answer.
pub type ReplyBody = BoxBody<Bytes, io::Error>;
/// Every answer.
pub type Reply = Response<ReplyBody>;

/// The header that names a request in answers and in the log.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A new request id.
pub fn request_id(random: &dyn Random) -> String {
    let mut bytes = [0; 16];
    random.fill(&mut bytes);
    hex::encode(bytes)
}

/// An answer without a body.
pub fn empty(status: StatusCode) -> Reply {
    let mut reply = Response::new(Empty::new().map_err(|never| match never {}).boxed());
    *reply.status_mut() = status;
    reply
}

/// A success with a JSON body.
///
/// # Errors
/// `InternalError` if it cannot be written as JSON.
pub fn json(value: &impl Serialize) -> Result<Reply, ApiError> {
    let bytes = serde_json::to_vec(value).map_err(|error| {
        ApiError::new(ErrorCode::InternalError, format!("the answer cannot be written: {error}"))
    })?;
    Ok(json_bytes(StatusCode::OK, bytes))
}

/// An answer with a body that is JSON already.
pub fn json_bytes(status: StatusCode, bytes: Vec<u8>) -> Reply {
    let mut reply = Response::new(Full::from(bytes).map_err(|never| match never {}).boxed());
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    reply
}

/// Most characters of a refusal: the message quotes the client's input.
const MAX_MESSAGE: usize = 4000;

/// Returns the error with its message cut to the limit.
pub fn shortened(mut error: ApiError) -> ApiError {
    if let Some((end, _)) = error.message.char_indices().nth(MAX_MESSAGE) {
        error.message.truncate(end);
        error.message.push('…');
    }
    error
}

/// The answer to a request that failed.
pub fn error(error: &ApiError, request_id: &str) -> Reply {
    let status = StatusCode::from_u16(error.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let body = ErrorBody { error: error.clone(), request_id: request_id.to_owned() };
    // Strings and an enum: this is always JSON.
    json_bytes(status, serde_json::to_vec(&body).unwrap_or_default())
}

/// Runs what blocks (the store, the engine, cryptography) where it may.
///
/// # Errors
/// Those of `work`; `InternalError` if it panics.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let span = tracing::Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work)).await.unwrap_or_else(|error| {
        tracing::error!("a request's work ended early: {error}");
        Err(ApiError::new(ErrorCode::InternalError, "the request failed inside the controller: see its log"))
    })
}
