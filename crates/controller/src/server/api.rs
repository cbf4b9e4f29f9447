//! The users' API: `POST /v1/ACTION`, blobs, streams; every request signed, save the question whether anybody is up.

use super::doors::Seat;
use super::reply::{self, Reply, blocking};
use super::{Front, body, stopped};
use crate::actions;
use crate::auth::internal;
use crate::auth::sigv4::SignedRequest;
use crate::engine::Caller;
use crate::streams;
use http::header::{CONNECTION, CONTENT_LENGTH, HeaderValue, UPGRADE};
use http::request::Parts;
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use roost_store::{BlobRow, Released};
use roost_types::agent::StreamTarget;
use roost_types::api::DescribeInstances;
use roost_types::{AccountId, ApiError, BlobId, ErrorCode, Micros};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// Most bytes of an action's body.
pub const MAX_BODY: usize = 1 << 20;
/// What streams speak after the upgrade.
pub const STREAM_PROTOCOL: &str = "roost-stream";
/// The header that carries a body's SHA-256.
const PAYLOAD_HASH: &str = "x-amz-content-sha256";
const EMPTY_HASH: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// Answers a user's request.
///
/// # Errors
/// Whatever is wrong with the request or with us.
pub async fn handle(front: &Arc<Front>, request: Request<Incoming>) -> Result<Reply, ApiError> {
    let path = request.uri().path().to_owned();
    let segments: Vec<_> = path.split('/').skip(1).collect();
    match (request.method(), &segments[..]) {
        (&Method::GET, ["v1", "health"]) => reply::json(&serde_json::json!({
            "status": "ok",
            "version": env!("CARGO_PKG_VERSION"),
        })),
        (&Method::POST, ["v1", action]) => run_action(front, action, request).await,
        (&Method::PUT, ["v1", "blobs", id]) => put_blob(front, id.parse()?, request).await,
        (&Method::HEAD, ["v1", "blobs", id]) => head_blob(front, id.parse()?, request).await,
        (&Method::DELETE, ["v1", "blobs", id]) => delete_blob(front, id.parse()?, request).await,
        (&Method::GET, ["v1", "instances", id, "console"]) => {
            let target = console_target(request.uri().query().unwrap_or_default())?;
            open_stream(front, (*id).to_owned(), target, request).await
        }
        (&Method::GET, ["v1", "instances", id, "tcp", port]) => {
            let port = port
                .parse()
                .ok()
                .filter(|port| *port > 0)
                .ok_or_else(|| invalid(format!("the port is {port:?}, allowed are 1 to 65535")))?;
            open_stream(front, (*id).to_owned(), StreamTarget::Tcp { port }, request).await
        }
        (method, _) => Err(ApiError::new(
            ErrorCode::InvalidAction,
            format!("there is no {method} {path}: actions are POST /v1/ACTION"),
        )),
    }
}

async fn run_action(front: &Arc<Front>, action: &str, request: Request<Incoming>) -> Result<Reply, ApiError> {
    let (parts, body) = request.into_parts();
    // A body is read only if the key is known. With a hash in the header, the body is read only if
    // the signature is valid.
    let promised = parts.headers.get(PAYLOAD_HASH).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let caller = match &promised {
        Some(hash) => Some(authenticate(front, &parts, hash.clone()).await?),
        None => {
            let (inner, headers) = (Arc::clone(front), parts.headers.clone());
            blocking(move || inner.authenticator.check_claim(&headers)).await?;
            None
        }
    };
    let body = body::read(body, MAX_BODY, front.limits.body).await?;
    let hash = hex::encode(Sha256::digest(&body));
    let caller = match (caller, promised) {
        (Some(caller), Some(said)) if said == hash => caller,
        (Some(_), Some(said)) => {
            return Err(ApiError::new(
                ErrorCode::AuthFailure,
                format!("{PAYLOAD_HASH} is {said:?}, but the body's SHA-256 is {hash}"),
            ));
        }
        _ => authenticate(front, &parts, hash).await?,
    };
    let (front, action) = (Arc::clone(front), action.to_owned());
    let bytes = blocking(move || actions::run(&front, &caller, &action, &body)).await?;
    Ok(reply::json_bytes(StatusCode::OK, bytes))
}

/// Checks a request's signature. Blocks.
fn authenticate_in_place(front: &Front, parts: &Parts, payload_hash: &str) -> Result<Caller, ApiError> {
    if let Some(said) = parts.headers.get(PAYLOAD_HASH)
        && said.as_bytes() != payload_hash.as_bytes()
    {
        return Err(ApiError::new(
            ErrorCode::AuthFailure,
            format!("{PAYLOAD_HASH} is {said:?}, but the body's SHA-256 is {payload_hash}"),
        ));
    }
    let caller = front.authenticator.authenticate(&SignedRequest {
        method: parts.method.as_str(),
        path: parts.uri.path(),
        query: parts.uri.query().unwrap_or_default(),
        headers: &parts.headers,
        payload_hash,
    })?;
    tracing::Span::current().record("account", caller.account_id.as_str());
    if let Some(seat) = parts.extensions.get::<Arc<Seat>>() {
        seat.prove(&format!("account {}", caller.account_id))?;
    }
    Ok(caller)
}

/// Checks the signature of a request whose body, if any, is promised to have this hash.
async fn authenticate(front: &Arc<Front>, parts: &Parts, payload_hash: String) -> Result<Caller, ApiError> {
    let (front, parts) = (Arc::clone(front), parts.clone());
    blocking(move || authenticate_in_place(&front, &parts, &payload_hash)).await
}

async fn put_blob(front: &Arc<Front>, id: BlobId, request: Request<Incoming>) -> Result<Reply, ApiError> {
    let (parts, body) = request.into_parts();
    // The signature covers the blob's name as the hash of the body; the bytes are checked against it as they come.
    let caller = authenticate(front, &parts, id.to_string()).await?;
    let announced = parts.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    let unique = reply::request_id(front.random.as_ref());
    let account = caller.account_id;
    let (inner, wanted, of) = (Arc::clone(front), id.clone(), account.clone());
    let others = blocking(move || other_bytes(&inner, &of, &wanted)).await?;
    let received = front.blobs.receive(&id, &unique, (&account, others), announced, body).await?;
    let (inner, wanted) = (Arc::clone(front), id.clone());
    let note = async |bytes| {
        blocking(move || {
            // Bytes that the account's other uploads brought meanwhile count too.
            inner.blobs.check_account(other_bytes(&inner, &account, &wanted)?, 0, bytes)?;
            let created_at = inner.clock.now();
            let row = BlobRow { blob_id: wanted, bytes, account_id: account, created_at };
            inner.store.put_blob(&row).map_err(internal)
        })
        .await
    };
    let bytes = front.blobs.keep(received, note).await?;
    tracing::info!(blob = %id, bytes, "blob uploaded");
    reply::json(&serde_json::json!({ "blob_id": id, "bytes": bytes }))
}

/// Bytes of an account's files except one. Blocks.
fn other_bytes(front: &Front, account: &AccountId, beside: &BlobId) -> Result<u64, ApiError> {
    let all = front.store.blob_bytes(account).map_err(internal)?;
    let owned = front.store.owns_blob(account, beside).map_err(internal)?;
    let row = if owned { front.store.blob(beside).map_err(internal)? } else { None };
    Ok(all.saturating_sub(row.map_or(0, |row| row.bytes)))
}

/// Returns whether the caller has uploaded a file; another account's file is absent. A file that is
/// asked for is kept as if it had been uploaded now.
async fn head_blob(front: &Arc<Front>, id: BlobId, request: Request<Incoming>) -> Result<Reply, ApiError> {
    let (parts, _) = request.into_parts();
    let account_id = authenticate(front, &parts, EMPTY_HASH.to_owned()).await?.account_id;
    let inner = Arc::clone(front);
    let size = blocking(move || {
        let owned = inner.store.owns_blob(&account_id, &id).map_err(internal)?;
        let Some(bytes) = inner.blobs.size(&id).filter(|_| owned) else { return Ok(None) };
        let row = BlobRow { blob_id: id, bytes, account_id, created_at: inner.clock.now() };
        inner.store.put_blob(&row).map_err(internal)?;
        Ok(Some(bytes))
    })
    .await?;
    // An answer to HEAD has no body to hold an error: the status says it.
    let Some(size) = size else { return Ok(reply::empty(StatusCode::NOT_FOUND)) };
    let mut found = reply::empty(StatusCode::OK);
    found.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(size));
    Ok(found)
}

/// Gives up a file of the caller. The bytes are removed once no account has the file.
async fn delete_blob(front: &Arc<Front>, id: BlobId, request: Request<Incoming>) -> Result<Reply, ApiError> {
    let (parts, _) = request.into_parts();
    let account = authenticate(front, &parts, EMPTY_HASH.to_owned()).await?.account_id;
    let (inner, wanted) = (Arc::clone(front), id.clone());
    let release =
        blocking(move || inner.store.release_blob(&account, &wanted, inner.clock.now()).map_err(internal));
    match front.blobs.collect(release, known(front)).await? {
        Released::Done => reply::json(&serde_json::json!({})),
        Released::Absent => Err(ApiError::new(
            ErrorCode::InvalidBlobNotFound,
            format!("the account has not uploaded blob {id}"),
        )),
        Released::Named => Err(ApiError::new(
            ErrorCode::DependencyViolation,
            format!(
                "blob {id} belongs to an image that is registered or has instances: withdraw the image and \
                 terminate them first"
            ),
        )),
    }
}

fn known(front: &Arc<Front>) -> impl Fn(&BlobId) -> Result<bool, ApiError> + Send + use<> {
    let store = Arc::clone(&front.store);
    move |id| Ok(store.blob(id).map_err(internal)?.is_some())
}

/// Periodically removes uploaded files that no image has needed for a while, until the shutdown.
pub async fn collect_blobs(front: Arc<Front>) {
    let keep = front.limits.blobs.keep_unnamed;
    let pause = (keep / 4).clamp(Duration::from_millis(100), Duration::from_secs(600));
    let mut shutdown = front.shutdown.clone();
    loop {
        let inner = Arc::clone(&front);
        let release = blocking(move || {
            let now = inner.clock.now();
            let before = Micros(now.0.saturating_sub(i64::try_from(keep.as_micros()).unwrap_or(i64::MAX)));
            inner.store.release_unnamed_blobs(before, now).map_err(internal)
        });
        if let Err(error) = front.blobs.collect(release, known(&front)).await {
            tracing::error!(%error, "files that no image needs could not be removed; it is tried again");
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stopped(&mut shutdown) => return,
        }
    }
}

fn invalid(message: String) -> ApiError {
    ApiError::new(ErrorCode::InvalidParameterValue, message)
}

/// Reads `offset=N&follow=B&input=B`, each at most once, all optional.
fn console_target(query: &str) -> Result<StreamTarget, ApiError> {
    fn value<T: FromStr>(given: &BTreeMap<&str, &str>, name: &str, otherwise: T) -> Result<T, ApiError> {
        let Some(text) = given.get(name) else { return Ok(otherwise) };
        text.parse().map_err(|_| {
            let expected = if name == "offset" { "a whole number" } else { "true or false" };
            invalid(format!("the parameter {name:?} is {text:?}, expected {expected}"))
        })
    }
    let mut given = BTreeMap::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, text) = pair.split_once('=').unwrap_or((pair, ""));
        if !["offset", "follow", "input"].contains(&name) {
            return Err(ApiError::new(
                ErrorCode::UnknownParameter,
                format!("unknown parameter {name:?}: expected offset, follow or input"),
            ));
        }
        if given.insert(name, text).is_some() {
            return Err(invalid(format!("the parameter {name:?} is there twice")));
        }
    }
    Ok(StreamTarget::Console {
        offset: value(&given, "offset", 0)?,
        follow: value(&given, "follow", false)?,
        input: value(&given, "input", false)?,
    })
}

/// Whether a request asks for an upgrade to a stream.
pub(crate) fn check_upgrade(parts: &Parts) -> Result<(), ApiError> {
    let wanted = parts.headers.get(UPGRADE).and_then(|value| value.to_str().ok());
    if wanted.is_some_and(|value| value.eq_ignore_ascii_case(STREAM_PROTOCOL)) {
        return Ok(());
    }
    let message = format!("the request must have the header \"upgrade: {STREAM_PROTOCOL}\"");
    Err(ApiError::new(ErrorCode::MissingParameter, message))
}

/// `101 Switching Protocols`.
pub(crate) fn switching() -> Reply {
    let mut reply = reply::empty(StatusCode::SWITCHING_PROTOCOLS);
    reply.headers_mut().insert(UPGRADE, HeaderValue::from_static(STREAM_PROTOCOL));
    reply.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
    reply
}

async fn open_stream(
    front: &Arc<Front>,
    instance: String,
    target: StreamTarget,
    mut request: Request<Incoming>,
) -> Result<Reply, ApiError> {
    let upgrade = hyper::upgrade::on(&mut request);
    let (parts, _) = request.into_parts();
    let caller = authenticate(front, &parts, EMPTY_HASH.to_owned()).await?;
    check_upgrade(&parts)?;
    let (engine, account) = (Arc::clone(&front.engine), caller.account_id.clone());
    let ask =
        DescribeInstances { instance_ids: vec![instance], include_terminated: true, all_accounts: false };
    let found = blocking(move || engine.describe_instances(&caller, ask)).await?;
    let Some(instance) = found.instances.into_iter().next() else {
        return Err(ApiError::new(ErrorCode::InvalidInstanceIdNotFound, "there is no such instance"));
    };
    let (id, state) = (instance.instance_id, instance.state);
    let host = instance.host_id.ok_or_else(|| {
        let message = format!("instance {id} is {state} and on no host: it has no console and no network");
        ApiError::new(ErrorCode::IncorrectInstanceState, message)
    })?;
    let stream = reply::request_id(front.random.as_ref());
    let mut opened = front.streams.open(&account, &host, id.clone(), target, stream.clone())?;
    let agent = opened.agent(front.limits.agent).await?;
    if let Some(seat) = parts.extensions.get::<Arc<Seat>>() {
        seat.becomes_stream();
    }
    let mut shutdown = front.shutdown.clone();
    tokio::spawn(async move {
        // Forgotten when the pump ends, however it ends.
        let _opened = opened;
        let user = match upgrade.await {
            Ok(user) => TokioIo::new(user),
            Err(error) => return tracing::debug!(%stream, "the user left before the stream began: {error}"),
        };
        let ended = tokio::select! {
            ended = streams::pump(user, agent) => ended,
            () = stopped(&mut shutdown) => return,
        };
        match ended {
            Ok((up, down)) => tracing::debug!(%stream, instance = %id, up, down, "stream ended"),
            Err(error) => tracing::debug!(%stream, instance = %id, "stream broke: {error}"),
        }
    });
    Ok(switching())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_consoles_query_is_read_strictly() {
        let target = |offset, follow, input| StreamTarget::Console { offset, follow, input };
        assert_eq!(console_target("").unwrap(), target(0, false, false));
        assert_eq!(console_target("input=true&offset=7&follow=true").unwrap(), target(7, true, true));
        assert_eq!(console_target("ofset=7").unwrap_err().code, ErrorCode::UnknownParameter);
        for bad in ["offset=-1", "follow=yes", "offset=1&offset=2", "offset="] {
            assert_eq!(console_target(bad).unwrap_err().code, ErrorCode::InvalidParameterValue, "{bad}");
        }
    }
}
