//! Streams: consoles and tunnels between a user and an instance's host.
//!
//! ```text
//! user ── GET /v1/instances/ID/console ──→ open: queue a request for the host, wait ──┐
//! agent ── GET /agent/v1/requests ──────→ take the request                            │
//! agent ── GET /agent/v1/streams/STREAM → join: hand over the agent's connection ─────┘
//!                                           pump bytes both ways until either ends
//! ```
//! A host cannot be dialled, only asked to dial; what nobody waits for any more is forgotten.

use roost_types::agent::{HostRequest, StreamTarget};
use roost_types::{AccountId, ApiError, ErrorCode, HostId, InstanceId};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{oneshot, watch};

/// Most streams at once.
#[derive(Debug, Clone, Copy)]
pub struct StreamLimits {
    /// Most streams.
    pub streams: usize,
    /// Most streams of one account.
    pub per_account: usize,
}

impl Default for StreamLimits {
    fn default() -> Self {
        Self { streams: 4096, per_account: 64 }
    }
}

/// After one side has said all it has to say, the other may be silent for so long.
const LINGER: Duration = Duration::from_secs(10);
const BUFFER: usize = 16 * 1024;

/// Any connection.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// An agent's end of a stream.
pub type AgentEnd = Box<dyn Connection>;

#[derive(Default)]
struct Inner {
    queues: HashMap<HostId, VecDeque<HostRequest>>,
    waiting: HashMap<String, (HostId, oneshot::Sender<AgentEnd>)>,
    per_account: BTreeMap<AccountId, usize>,
}

/// Brings users and agents together.
pub struct Broker {
    limits: StreamLimits,
    inner: Mutex<Inner>,
    /// Bumped whenever a queue grows.
    queued: watch::Sender<u64>,
}

/// A user's half of a stream; forgets all of it when dropped.
pub struct Opened {
    broker: Arc<Broker>,
    account: AccountId,
    host: HostId,
    stream: String,
    agent: oneshot::Receiver<AgentEnd>,
}

impl Broker {
    /// Creates a broker with these limits.
    pub fn new(limits: StreamLimits) -> Self {
        Self { limits, inner: Mutex::default(), queued: watch::Sender::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it holds the lock; and if it did, the maps would still be maps.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks a host's agent to dial in for an instance.
    ///
    /// # Errors
    /// `RequestLimitExceeded` if the account, or the controller, has too many streams.
    pub fn open(
        self: &Arc<Self>,
        account: &AccountId,
        host: &HostId,
        instance_id: InstanceId,
        target: StreamTarget,
        stream: String,
    ) -> Result<Opened, ApiError> {
        let (sender, agent) = oneshot::channel();
        let mut inner = self.lock();
        let StreamLimits { streams: most, per_account } = self.limits;
        if inner.per_account.values().sum::<usize>() >= most {
            let message = format!("{most} streams are open, which is the most of this controller: try again");
            return Err(ApiError::new(ErrorCode::RequestLimitExceeded, message));
        }
        let streams = inner.per_account.entry(account.clone()).or_default();
        if *streams >= per_account {
            return Err(ApiError::new(
                ErrorCode::RequestLimitExceeded,
                format!("the account has {streams} streams open, allowed are {per_account}: close one"),
            ));
        }
        *streams += 1;
        inner.waiting.insert(stream.clone(), (host.clone(), sender));
        let request = HostRequest { stream: stream.clone(), instance_id, target };
        inner.queues.entry(host.clone()).or_default().push_back(request);
        drop(inner);
        self.queued.send_modify(|count| *count = count.wrapping_add(1));
        Ok(Opened { broker: Arc::clone(self), account: account.clone(), host: host.clone(), stream, agent })
    }

    /// What is asked of a host: at once if there is something, else when something comes or time is up.
    pub async fn requests(&self, host: &HostId, patience: Duration) -> Vec<HostRequest> {
        let mut queued = self.queued.subscribe();
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let taken = self.lock().queues.remove(host);
            if let Some(requests) = taken.filter(|requests| !requests.is_empty()) {
                return requests.into();
            }
            if !matches!(tokio::time::timeout_at(deadline, queued.changed()).await, Ok(Ok(()))) {
                return Vec::new();
            }
        }
    }

    /// Takes the place that waits for a host's agent to dial in.
    ///
    /// # Errors
    /// `InvalidParameterValue` if nobody waits for it (any more), or waits for another host.
    pub fn join(&self, host: &HostId, stream: &str) -> Result<oneshot::Sender<AgentEnd>, ApiError> {
        let mut inner = self.lock();
        match inner.waiting.remove(stream) {
            Some((expected, sender)) if expected == *host => Ok(sender),
            other => {
                inner.waiting.extend(other.map(|entry| (stream.to_owned(), entry)));
                let message = format!("nobody waits for stream {stream:?} of this host");
                Err(ApiError::new(ErrorCode::InvalidParameterValue, message))
            }
        }
    }

    /// Streams that are open or waited for.
    pub fn open_streams(&self) -> usize {
        self.lock().per_account.values().sum()
    }
}

impl Opened {
    /// Waits until the agent has dialled in.
    ///
    /// # Errors
    /// `Unavailable` if it does not come.
    pub async fn agent(&mut self, patience: Duration) -> Result<AgentEnd, ApiError> {
        match tokio::time::timeout(patience, &mut self.agent).await {
            Ok(Ok(agent)) => Ok(agent),
            Ok(Err(_)) => Err(self.unavailable("broke off while it was opening the stream")),
            Err(_) => Err(self.unavailable(&format!("did not answer within {} s", patience.as_secs()))),
        }
    }

    fn unavailable(&self, what: &str) -> ApiError {
        let message = format!("the agent of host {} {what}: is it running? try again", self.host);
        ApiError::new(ErrorCode::Unavailable, message)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let mut inner = self.broker.lock();
        inner.waiting.remove(&self.stream);
        if let Some(queue) = inner.queues.get_mut(&self.host) {
            queue.retain(|request| request.stream != self.stream);
            if queue.is_empty() {
                inner.queues.remove(&self.host);
            }
        }
        if let Some(streams) = inner.per_account.get_mut(&self.account) {
            *streams -= 1;
            if *streams == 0 {
                inner.per_account.remove(&self.account);
            }
        }
    }
}

/// Pumps bytes both ways. When one side ends, the other hears so, and may finish what it has to say.
///
/// # Errors
/// If a connection breaks; both are closed then.
pub async fn pump(user: impl Connection, agent: impl Connection) -> io::Result<(u64, u64)> {
    let (mut from_user, mut to_user) = tokio::io::split(user);
    let (mut from_agent, mut to_agent) = tokio::io::split(agent);
    let ended = watch::Sender::new(false);
    let up = one_way(&mut from_user, &mut to_agent, &ended);
    let down = one_way(&mut from_agent, &mut to_user, &ended);
    tokio::try_join!(up, down)
}

async fn one_way(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    ended: &watch::Sender<bool>,
) -> io::Result<u64> {
    let mut other = ended.subscribe();
    let mut buffer = vec![0; BUFFER];
    let mut total = 0;
    loop {
        let count = tokio::select! {
            count = from.read(&mut buffer) => count?,
            () = linger(&mut other) => break,
        };
        if count == 0 {
            break;
        }
        to.write_all(&buffer[..count]).await?;
        to.flush().await?;
        total += count as u64;
    }
    ended.send_replace(true);
    to.shutdown().await?;
    Ok(total)
}

/// Ends [`LINGER`] after the other direction has ended; begun anew for every piece that still comes.
async fn linger(other: &mut watch::Receiver<bool>) {
    // The sender lives as long as both directions.
    let _ = other.wait_for(|ended| *ended).await;
    tokio::time::sleep(LINGER).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids() -> (AccountId, HostId, InstanceId) {
        (AccountId::from_random([1; 8]), HostId::from_random([2; 9]), InstanceId::from_random([3; 9]))
    }

    fn open(broker: &Arc<Broker>, stream: &str) -> Result<Opened, ApiError> {
        let (account, host, instance) = ids();
        broker.open(&account, &host, instance, StreamTarget::Tcp { port: 22 }, stream.into())
    }

    #[tokio::test]
    async fn an_agent_that_dials_in_is_handed_to_who_waits() {
        let broker = Arc::new(Broker::new(StreamLimits::default()));
        let (_, host, _) = ids();
        let mut opened = open(&broker, "s1").unwrap();
        let requests = broker.requests(&host, Duration::ZERO).await;
        assert_eq!(requests[0].stream, "s1");
        let (near, mut far) = tokio::io::duplex(64);
        assert!(broker.join(&host, "s1").unwrap().send(Box::new(near)).is_ok());
        opened.agent(Duration::from_secs(10)).await.unwrap().write_all(b"hello").await.unwrap();
        let mut bytes = [0; 5];
        far.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"hello");
        assert!(broker.join(&host, "s1").is_err(), "a stream is joined once");
    }

    #[tokio::test]
    async fn another_host_cannot_take_a_stream_and_does_not_spoil_it() {
        let broker = Arc::new(Broker::new(StreamLimits::default()));
        let opened = open(&broker, "s1").unwrap();
        let (_, host, _) = ids();
        assert!(broker.join(&HostId::from_random([9; 9]), "s1").is_err());
        assert!(broker.join(&host, "s1").is_ok());
        drop(opened);
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_does_not_come_is_named_and_nothing_is_left() {
        let broker = Arc::new(Broker::new(StreamLimits::default()));
        let (_, host, _) = ids();
        let mut opened = open(&broker, "s1").unwrap();
        let Err(error) = opened.agent(Duration::from_secs(10)).await else { panic!("nobody dialled in") };
        assert_eq!(error.code, ErrorCode::Unavailable);
        assert!(error.message.contains(host.as_str()), "{error}");
        drop(opened);
        assert_eq!(broker.open_streams(), 0);
        assert!(broker.requests(&host, Duration::ZERO).await.is_empty());
        assert!(broker.join(&host, "s1").is_err());
    }

    #[tokio::test]
    async fn an_account_has_so_many_streams_and_no_more() {
        let broker = Arc::new(Broker::new(StreamLimits::default()));
        let mut held: Vec<_> = (0..StreamLimits::default().per_account)
            .map(|n| open(&broker, &format!("s{n}")).unwrap())
            .collect();
        let Err(error) = open(&broker, "more") else { panic!("one too many") };
        assert_eq!(error.code, ErrorCode::RequestLimitExceeded);
        held.pop();
        assert!(open(&broker, "again").is_ok());
    }

    #[tokio::test]
    async fn a_side_that_has_ended_lets_the_other_finish() {
        let (mut user, user_end) = tokio::io::duplex(64);
        let (mut agent, agent_end) = tokio::io::duplex(64);
        let pumped = tokio::spawn(pump(user_end, agent_end));
        user.write_all(b"question").await.unwrap();
        user.shutdown().await.unwrap();
        let mut question = String::new();
        agent.read_to_string(&mut question).await.unwrap();
        agent.write_all(b"answer").await.unwrap();
        drop(agent);
        let mut answer = String::new();
        user.read_to_string(&mut answer).await.unwrap();
        assert_eq!((question.as_str(), answer.as_str()), ("question", "answer"));
        assert_eq!(pumped.await.unwrap().unwrap(), (8, 6));
    }

    #[tokio::test(start_paused = true)]
    async fn a_side_that_stays_silent_after_the_other_has_ended_is_closed() {
        let (user, user_end) = tokio::io::duplex(64);
        let (_agent, agent_end) = tokio::io::duplex(64);
        drop(user);
        assert_eq!(pump(user_end, agent_end).await.unwrap(), (0, 0));
    }
}
