//! The agents' endpoints (`roost_types::agent` draws them). A request speaks for the host that its certificate
//! names, and for no other.

use crate::auth::internal;
use crate::server::api::{check_upgrade, switching};
use crate::server::doors::Seat;
use crate::server::reply::{self, Reply, blocking};
use crate::server::{Front, body, stopped};
use futures_util::TryStreamExt;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use roost_types::agent::{Desired, HelloRequest, Observation, Report};
use roost_types::{ApiError, BlobId, ErrorCode, HostId};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::io::ReaderStream;

/// Longest wait of a long poll.
const LONG_POLL: Duration = Duration::from_secs(10);
/// Most bytes of a report: some ten thousand instances, a few of them with long texts, which are
/// cut.
const MAX_BODY: usize = 64 << 20;
/// Most bytes that are kept of a text in an observation. Monitors add to these texts, and may be
/// compromised.
const MAX_TEXT: usize = 4 << 10;
/// Most parts that are kept of an instance's start.
const MAX_PARTS: usize = 64;

/// Answers an agent's request.
///
/// # Errors
/// Whatever is wrong with the request or with us.
pub async fn handle(
    front: &Arc<Front>,
    host: &HostId,
    request: Request<Incoming>,
) -> Result<Reply, ApiError> {
    let path = request.uri().path().to_owned();
    let segments: Vec<_> = path.split('/').skip(1).collect();
    let ["agent", "v1", rest @ ..] = &segments[..] else { return Err(unknown(request.method(), &path)) };
    match (request.method(), rest) {
        (&Method::POST, ["hello"]) => {
            let hello: HelloRequest =
                body::parse(&body::read(request.into_body(), MAX_BODY, front.limits.body).await?)?;
            let (engine, host) = (Arc::clone(&front.engine), host.clone());
            reply::json(&blocking(move || engine.hello(&host, hello)).await?)
        }
        (&Method::GET, ["desired"]) => {
            let after = after(request.uri().query())?;
            reply::json(&desired(front, host, after).await?)
        }
        (&Method::POST, ["observed"]) => {
            let mut report: Report =
                body::parse(&body::read(request.into_body(), MAX_BODY, front.limits.body).await?)?;
            report.instances.iter_mut().for_each(shorten);
            let (engine, host) = (Arc::clone(&front.engine), host.clone());
            reply::json(&blocking(move || engine.report(&host, report)).await?)
        }
        (&Method::GET, ["requests"]) => {
            let mut shutdown = front.shutdown.clone();
            let requests = tokio::select! {
                requests = front.streams.requests(host, LONG_POLL) => requests,
                () = stopped(&mut shutdown) => Vec::new(),
            };
            reply::json(&requests)
        }
        (&Method::GET, ["blobs", id]) => blob(front, host, id.parse()?).await,
        (&Method::GET, ["streams", stream]) => join(front, host, stream, request),
        (method, _) => Err(unknown(method, &path)),
    }
}

/// Cuts the texts of an observation. One long text must not silence the host with all its
/// instances.
fn shorten(seen: &mut Observation) {
    let parts = seen.timing.iter_mut().map(|part| &mut part.part);
    let reason = seen.reason.iter_mut().flat_map(|reason| [&mut reason.code, &mut reason.message]);
    let others = [&mut seen.refused, &mut seen.trouble, &mut seen.ssh_host_key].into_iter().flatten();
    for text in parts.chain(reason).chain(others) {
        if text.len() > MAX_TEXT {
            text.truncate(text.floor_char_boundary(MAX_TEXT - '…'.len_utf8()));
            text.push('…');
        }
    }
    seen.timing.truncate(MAX_PARTS);
}

fn unknown(method: &Method, path: &str) -> ApiError {
    ApiError::new(ErrorCode::InvalidAction, format!("there is no {method} {path} for agents"))
}

/// Reads `after=VERSION`.
fn after(query: Option<&str>) -> Result<Option<u64>, ApiError> {
    let Some(query) = query.filter(|query| !query.is_empty()) else { return Ok(None) };
    let version = query.strip_prefix("after=").and_then(|text| text.parse().ok());
    version.map(Some).ok_or_else(|| {
        ApiError::new(
            ErrorCode::InvalidParameterValue,
            format!("the query is {query:?}, expected after=VERSION"),
        )
    })
}

/// What the host must look like: at once if it is not what the agent has, else when it changes or time is up.
async fn desired(front: &Arc<Front>, host: &HostId, after: Option<u64>) -> Result<Desired, ApiError> {
    let mut changes = front.engine.subscribe();
    let mut shutdown = front.shutdown.clone();
    let deadline = tokio::time::Instant::now() + LONG_POLL;
    loop {
        // Seen before the look: a change during it wakes the next round.
        changes.borrow_and_update();
        let (engine, of) = (Arc::clone(&front.engine), host.clone());
        let desired = blocking(move || engine.desired(&of)).await?;
        if after != Some(desired.version) {
            return Ok(desired);
        }
        let woken = tokio::select! {
            woken = tokio::time::timeout_at(deadline, changes.changed()) => woken,
            () = stopped(&mut shutdown) => return Ok(desired),
        };
        if !matches!(woken, Ok(Ok(()))) {
            return Ok(desired);
        }
    }
}

/// A blob, for a host that has an instance whose image it belongs to.
async fn blob(front: &Arc<Front>, host: &HostId, id: BlobId) -> Result<Reply, ApiError> {
    let missing = || {
        let message = format!("there is no blob {id} that an instance on host {host} needs");
        ApiError::new(ErrorCode::InvalidBlobNotFound, message)
    };
    let (inner, of, wanted) = (Arc::clone(front), host.clone(), id.clone());
    let needed = blocking(move || {
        let desired = inner.engine.desired(&of)?;
        let needs = |image: &roost_types::agent::ImageSpec| {
            image.kernel == wanted || image.root == wanted || image.initrd.as_ref() == Some(&wanted)
        };
        let named = desired.instances.iter().any(|ensure| needs(&ensure.spec.image));
        Ok(named && inner.store.blob(&wanted).map_err(internal)?.is_some())
    })
    .await?;
    if !needed {
        return Err(missing());
    }
    let file = tokio::fs::File::open(front.blobs.path(&id)).await.map_err(|error| {
        tracing::error!(blob = %id, "{error}");
        missing()
    })?;
    let size = file.metadata().await.map(|meta| meta.len()).map_err(|_| missing())?;
    let frames = ReaderStream::with_capacity(file, 256 * 1024).map_ok(Frame::data);
    let mut reply = Response::new(BodyExt::boxed(StreamBody::new(frames)));
    reply.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(size));
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/zstd"));
    Ok(reply)
}

/// An agent dials in for a stream that a user waits for.
fn join(
    front: &Arc<Front>,
    host: &HostId,
    stream: &str,
    mut request: Request<Incoming>,
) -> Result<Reply, ApiError> {
    let upgrade = hyper::upgrade::on(&mut request);
    let (parts, _) = request.into_parts();
    check_upgrade(&parts)?;
    let waiting = front.streams.join(host, stream)?;
    if let Some(seat) = parts.extensions.get::<Arc<Seat>>() {
        seat.becomes_stream();
    }
    let stream = stream.to_owned();
    tokio::spawn(async move {
        match upgrade.await {
            // The user may have left meanwhile; then this connection is closed by being dropped.
            Ok(agent) => drop(waiting.send(Box::new(TokioIo::new(agent)))),
            Err(error) => tracing::debug!(%stream, "the agent left before the stream began: {error}"),
        }
    });
    Ok(switching())
}

#[cfg(test)]
mod tests {
    use super::*;
    use roost_types::InstanceId;
    use roost_types::agent::{Observed, StateReason, TimedPart};

    #[test]
    fn long_texts_of_an_observation_are_cut_and_the_rest_of_it_counts() {
        let long = "ü".repeat(17 << 20);
        let id = InstanceId::from_random([1; 9]);
        let mut seen = Observation::new(id.clone(), 3, 2, Observed::Stopped);
        seen.reason = Some(StateReason { code: "Server.InternalError".into(), message: long.clone() });
        seen.trouble = Some(long.clone());
        seen.timing = vec![TimedPart { part: long, took_us: 1 }; 100];
        shorten(&mut seen);
        let reason = seen.reason.unwrap();
        assert_eq!(reason.code, "Server.InternalError");
        assert!(reason.message.len() <= MAX_TEXT && reason.message.ends_with("ü…"));
        assert!(seen.trouble.unwrap().len() <= MAX_TEXT);
        assert_eq!(seen.timing.len(), MAX_PARTS);
        assert_eq!((seen.instance_id, seen.generation, seen.state), (id, 3, Observed::Stopped));
    }
}
