//! The two listeners: the API for users, and the one for agents.
//!
//! ```text
//! TCP ─→ TLS (10 s) ─→ HTTP/1.1 head (20 s, 64 headers, 64 KiB) ─→ api.rs      signature, then action, blob, stream
//!   doors.rs: places                                            └→ agents.rs   the certificate says which host
//!   patient.rs: peers must read
//! ```

pub mod api;
pub mod body;
pub mod doors;
pub mod patient;
pub mod reply;

use crate::auth::{Authenticator, Sealer};
use crate::blobs::{BlobLimits, BlobStore};
use crate::engine::{Clock, Engine, Random};
use crate::streams::{Broker, StreamLimits};
use crate::{agents, tls};
use doors::{DoorLimits, Doors, Seat};
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use patient::Patient;
use reply::Reply;
use roost_billing::PriceBook;
use roost_store::Store;
use roost_types::HostId;
use rustls::ServerConfig;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::TaskTracker;

/// Most characters of a refusal in the log.
const LOGGED: usize = 500;

/// What clients may take of the controller's patience.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections to the API.
    pub api: DoorLimits,
    /// Connections of agents.
    pub agents: DoorLimits,
    /// Consoles and tunnels.
    pub streams: StreamLimits,
    /// Longest TLS handshake.
    pub handshake: Duration,
    /// Longest time for a request's head; also how long a connection may be idle.
    pub head: Duration,
    /// Time limit of a whole request body, uploads excepted.
    pub body: Duration,
    /// Longest time without progress of a write to a peer, streams excepted.
    pub write: Duration,
    /// How long an agent may take to dial in for a stream.
    pub agent: Duration,
    /// How long what is under way may take to finish at shutdown.
    pub grace: Duration,
    /// Limits of uploads.
    pub blobs: BlobLimits,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            api: DoorLimits { connections: 1024, per_address: 256, per_owner: 64 },
            agents: DoorLimits { connections: 4096, per_address: 256, per_owner: 64 },
            streams: StreamLimits::default(),
            handshake: Duration::from_secs(10),
            head: Duration::from_secs(20),
            body: Duration::from_secs(30),
            write: Duration::from_secs(30),
            agent: Duration::from_secs(10),
            grace: Duration::from_secs(3),
            blobs: BlobLimits::default(),
        }
    }
}

/// Everything that requests are answered with.
pub struct Front {
    /// Instances.
    pub engine: Arc<Engine>,
    /// Accounts, key pairs, images, the usage log.
    pub store: Arc<dyn Store>,
    /// Prices.
    pub prices: Arc<PriceBook>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Randomness.
    pub random: Arc<dyn Random>,
    /// Seals secrets.
    pub sealer: Arc<Sealer>,
    /// Checks signatures.
    pub authenticator: Authenticator,
    /// Uploaded files.
    pub blobs: BlobStore,
    /// Consoles and tunnels.
    pub streams: Arc<Broker>,
    /// What clients may take.
    pub limits: Limits,
    /// Region of this controller.
    pub region: String,
    /// Zones that a new account gets a subnet in.
    pub zones: Vec<String>,
    /// Turns true when the controller shuts down.
    pub shutdown: watch::Receiver<bool>,
}

/// The two listening sockets with their TLS.
pub struct Listeners {
    /// For the API.
    pub api: (TcpListener, Arc<ServerConfig>),
    /// For agents.
    pub agents: (TcpListener, Arc<ServerConfig>),
}

/// Serves until `front.shutdown` turns true, then lets what is under way finish for a few seconds.
pub async fn serve(front: Arc<Front>, listeners: Listeners) {
    let tracker = TaskTracker::new();
    let api = accept(&front, listeners.api, &tracker, false);
    let agents = accept(&front, listeners.agents, &tracker, true);
    tokio::join!(api, agents);
    tracker.close();
    // Streams may be longer than anybody's patience: they end with the process.
    if tokio::time::timeout(front.limits.grace, tracker.wait()).await.is_err() {
        tracing::info!(connections = tracker.len(), "closing connections that did not finish");
    }
}

/// Returns once the controller shuts down.
pub(crate) async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    // An error means that whoever could shut us down is gone: that is one as well.
    let _ = shutdown.wait_for(|stop| *stop).await;
}

async fn accept(
    front: &Arc<Front>,
    (listener, tls): (TcpListener, Arc<ServerConfig>),
    tracker: &TaskTracker,
    of_agents: bool,
) {
    let acceptor = TlsAcceptor::from(tls);
    let doors = Doors::new(if of_agents { front.limits.agents } else { front.limits.api });
    let mut shutdown = front.shutdown.clone();
    loop {
        let accepted = async {
            let (stream, peer) = listener.accept().await?;
            Ok::<_, std::io::Error>((stream, peer, doors.admit(peer.ip()).await))
        };
        let accepted = tokio::select! {
            accepted = accepted => accepted,
            () = stopped(&mut shutdown) => return,
        };
        let (stream, peer, seat) = match accepted {
            Ok(accepted) => accepted,
            // Out of descriptors, mostly: give what is open a moment to close.
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (front, acceptor, seat) = (Arc::clone(front), acceptor.clone(), Arc::new(seat));
        tracker.spawn(async move {
            tokio::select! {
                () = connection(front, acceptor, stream, peer, &seat, of_agents) => {}
                () = seat.lost() => tracing::debug!(%peer, "closed to make room: it has signed nothing yet"),
            }
        });
    }
}

/// A peer that is gone without a word is noticed within a minute or so.
fn keep_alive(stream: &TcpStream) -> Result<(), rustix::io::Errno> {
    use rustix::net::sockopt;
    sockopt::set_tcp_nodelay(stream, true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(30))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(10))?;
    sockopt::set_tcp_keepcnt(stream, 3)
}

async fn connection(
    front: Arc<Front>,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    peer: SocketAddr,
    seat: &Arc<Seat>,
    of_agents: bool,
) {
    if let Err(error) = keep_alive(&stream) {
        tracing::debug!(%peer, "socket options: {error}");
    }
    let stream = Patient::new(stream, front.limits.write, seat.is_stream());
    let stream = match tokio::time::timeout(front.limits.handshake, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%peer, "TLS handshake: {error}"),
        Err(_) => return tracing::debug!(%peer, "TLS handshake took too long"),
    };
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let host = certificate.and_then(tls::host_of);
    if of_agents && host.is_none() {
        return tracing::warn!(%peer, "an agent's certificate names no host");
    }
    if let Some(host) = &host
        && let Err(error) = seat.prove(&format!("host {host}"))
    {
        return tracing::warn!(%peer, "{error}");
    }
    let (mut shutdown, limits) = (front.shutdown.clone(), front.limits.clone());
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(Arc::clone(seat));
        let (front, host) = (Arc::clone(&front), host.clone());
        async move { Ok::<_, Infallible>(answer(front, host, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .max_headers(64)
        .max_header_size(64 * 1024)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopped(&mut shutdown) => {
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout(limits.grace, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, "connection: {error}");
    }
}

/// Answers one request and logs it.
async fn answer(front: Arc<Front>, host: Option<HostId>, request: Request<Incoming>) -> Reply {
    use tracing::Instrument as _;
    let id = reply::request_id(front.random.as_ref());
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let span = tracing::info_span!("request", %id, %method, %path, account = tracing::field::Empty);
    let started = tokio::time::Instant::now();
    let work = async {
        let result = match &host {
            Some(host) => agents::handle(&front, host, request).await,
            None => api::handle(&front, request).await,
        };
        let took_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        match result {
            Ok(reply) => {
                tracing::debug!(status = reply.status().as_u16(), took_ms, "answered");
                reply
            }
            Err(error) => {
                let error = reply::shortened(error);
                let logged: String = error.message.chars().take(LOGGED).collect();
                tracing::info!(code = %error.code, took_ms, "refused: {logged}");
                reply::error(&error, &id)
            }
        }
    };
    let mut reply = work.instrument(span).await;
    if let Ok(value) = id.parse() {
        reply.headers_mut().insert(reply::REQUEST_ID, value);
    }
    reply
}
