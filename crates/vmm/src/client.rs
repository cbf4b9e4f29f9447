//! A tiny blocking client of the API, for the agent, the tests and people's scripts.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Most bytes of a response's status line and headers.
const MAX_HEAD: u64 = 16 << 10;
/// Most bytes of a response's body.
const MAX_BODY: u64 = 256 << 10;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The monitor cannot be reached, or the connection broke.
    #[error("the monitor's API at {path:?}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The monitor answered what is no HTTP response.
    #[error("the monitor's answer is not understood: {0}")]
    Protocol(String),
    /// The monitor refused, and says why.
    #[error("the monitor refused: {0}")]
    Refused(String),
}

/// State of a machine, as `GET /` says it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceInfo {
    /// The monitor's `--id`.
    pub id: String,
    /// `Not started`, `Running` or `Paused`.
    pub state: String,
    /// The monitor's version.
    pub vmm_version: String,
    /// `roost-vmm`.
    pub app_name: String,
}

/// A client of one monitor. Each call makes a connection of its own, so a client outlives restarts of either side.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
    timeout: Duration,
}

impl Client {
    /// Creates a client of the API at this socket. A call takes at most 10 s, whatever the monitor
    /// sends.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), timeout: Duration::from_secs(10) }
    }

    /// Creates a client with another time limit per call: connecting, sending and the whole
    /// response.
    #[must_use]
    pub const fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `GET /`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn info(&self) -> Result<InstanceInfo, ClientError> {
        let body = self.request("GET", "/", b"")?;
        serde_json::from_slice(&body).map_err(|error| ClientError::Protocol(error.to_string()))
    }

    /// `GET /metrics`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn metrics(&self) -> Result<serde_json::Value, ClientError> {
        let body = self.request("GET", "/metrics", b"")?;
        serde_json::from_slice(&body).map_err(|error| ClientError::Protocol(error.to_string()))
    }

    /// Starts the vCPUs.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn start(&self) -> Result<(), ClientError> {
        self.action("InstanceStart")
    }

    /// Presses the power button: the guest shuts itself down, if it listens.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn power_button(&self) -> Result<(), ClientError> {
        self.action("SendPowerButton")
    }

    /// Ends the machine at once.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn force_stop(&self) -> Result<(), ClientError> {
        self.action("ForceStop")
    }

    /// Pauses the vCPUs.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn pause(&self) -> Result<(), ClientError> {
        self.put("PATCH", "/vm", &json!({ "state": "Paused" }))
    }

    /// Lets the vCPUs go on.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn resume(&self) -> Result<(), ClientError> {
        self.put("PATCH", "/vm", &json!({ "state": "Resumed" }))
    }

    /// Gives the guest console input.
    ///
    /// # Errors
    /// [`ClientError`]; refused when the guest has not read what it got before.
    pub fn console_input(&self, bytes: &[u8]) -> Result<(), ClientError> {
        self.request("PUT", "/serial/input", bytes).map(drop)
    }

    /// Hands an open descriptor over under a name.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn hand_over(&self, name: &str, descriptor: &impl AsRawFd) -> Result<(), ClientError> {
        let head =
            format!("PUT /descriptors/{name} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n");
        let (status, body) = self.talk(|stream| {
            let sent = stream.send_with_fd(head.as_bytes(), descriptor.as_raw_fd());
            sent.map(drop).map_err(std::io::Error::from)
        })?;
        accepted(status, body).map(drop)
    }

    fn action(&self, action: &str) -> Result<(), ClientError> {
        self.put("PUT", "/actions", &json!({ "action_type": action }))
    }

    /// Any request with a JSON body whose answer has none.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn put(&self, method: &str, path: &str, body: &serde_json::Value) -> Result<(), ClientError> {
        self.request(method, path, body.to_string().as_bytes()).map(drop)
    }

    /// Any request.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn request(&self, method: &str, path: &str, body: &[u8]) -> Result<Vec<u8>, ClientError> {
        let mut request =
            format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", body.len())
                .into_bytes();
        request.extend_from_slice(body);
        let (status, body) = self.talk(|stream| stream.write_all(&request))?;
        accepted(status, body)
    }

    /// One request and its answer.
    fn talk(
        &self,
        send: impl FnOnce(&mut UnixStream) -> std::io::Result<()>,
    ) -> Result<(u16, Vec<u8>), ClientError> {
        let io = |source| ClientError::Io { path: self.path.clone(), source };
        let deadline = Instant::now() + self.timeout;
        let mut stream = connect(&self.path, self.timeout).map_err(io)?;
        stream.set_write_timeout(Some(left(deadline).map_err(io)?)).map_err(io)?;
        send(&mut stream).map_err(io)?;
        read_response(&mut BufReader::new(Hurried { stream, deadline }), io)
    }
}

/// Connects within this time. A monitor that accepts no connection has a full backlog, on which
/// `connect` blocks.
#[allow(clippy::cast_possible_truncation)] // two small constants of the C library
fn connect(path: &Path, timeout: Duration) -> std::io::Result<UnixStream> {
    // SAFETY: takes numbers.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: socket has just made it, and nothing else owns it.
    let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    // SO_SNDTIMEO limits connecting as well as sending (unix(7)).
    stream.set_write_timeout(Some(timeout))?;
    // SAFETY: all bytes of the struct may be zero.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let name = path.as_os_str().as_bytes();
    // The last byte stays zero and ends the name.
    if name.len() >= address.sun_path.len() || name.contains(&0) {
        let why = format!("a socket's path has 1 to {} bytes", address.sun_path.len() - 1);
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, why));
    }
    for (to, from) in address.sun_path.iter_mut().zip(name) {
        *to = from.cast_signed();
    }
    let length = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: reads the address, which is as long as it says.
    if unsafe { libc::connect(stream.as_raw_fd(), (&raw const address).cast(), length) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(stream)
}

/// Returns the time until the deadline, or `TimedOut` if it has passed.
fn left(deadline: Instant) -> std::io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(std::io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// A stream whose reads share one deadline: a peer that sends single bytes gains no time.
struct Hurried {
    stream: UnixStream,
    deadline: Instant,
}

impl Read for Hurried {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.stream.set_read_timeout(Some(left(self.deadline)?))?;
        self.stream.read(buffer)
    }
}

/// The body of a success.
fn accepted(status: u16, body: Vec<u8>) -> Result<Vec<u8>, ClientError> {
    if (200..300).contains(&status) {
        return Ok(body);
    }
    let fault: Option<serde_json::Value> = serde_json::from_slice(&body).ok();
    let message = fault.as_ref().and_then(|fault| fault["fault_message"].as_str());
    Err(ClientError::Refused(message.map_or_else(|| format!("status {status}"), str::to_owned)))
}

fn read_response(
    reader: &mut impl BufRead,
    io: impl Fn(std::io::Error) -> ClientError,
) -> Result<(u16, Vec<u8>), ClientError> {
    let mut head = reader.by_ref().take(MAX_HEAD);
    let mut next = || {
        let mut line = String::new();
        head.read_line(&mut line).map_err(&io)?;
        if line.ends_with('\n') {
            return Ok(line);
        }
        Err(ClientError::Protocol(if head.limit() == 0 {
            format!("its head is longer than {} KiB", MAX_HEAD >> 10)
        } else {
            "it ends in the head".into()
        }))
    };
    let line = next()?;
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.ok_or_else(|| ClientError::Protocol(format!("status line {}", shown(&line))))?;
    let mut length = 0;
    loop {
        let line = next()?;
        let header = line.trim_end();
        if header.is_empty() {
            break;
        }
        if let Some((name, value)) = header.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value
                .trim()
                .parse()
                .map_err(|_| ClientError::Protocol(format!("header {}", shown(header))))?;
        }
    }
    if length > MAX_BODY {
        let why = format!("its body has {length} bytes, more than {} KiB", MAX_BODY >> 10);
        return Err(ClientError::Protocol(why));
    }
    let mut body = Vec::new();
    reader.take(length).read_to_end(&mut body).map_err(&io)?;
    if u64::try_from(body.len()) != Ok(length) {
        let why = format!("its body ends after {} of {length} bytes", body.len());
        return Err(ClientError::Protocol(why));
    }
    Ok((status, body))
}

/// Quotes the beginning of a line.
fn shown(line: &str) -> String {
    format!("{:?}", line.chars().take(200).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    const LIMIT: Duration = Duration::from_millis(300);

    /// Calls a monitor that answers like this. Returns the error and the duration.
    fn ask(answer: impl FnOnce(UnixStream) + Send + 'static) -> (String, Duration) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        let listener = UnixListener::bind(&path).unwrap();
        let monitor = std::thread::spawn(move || answer(listener.accept().unwrap().0));
        let begin = Instant::now();
        let error = Client::new(&path).with_timeout(LIMIT).info().unwrap_err();
        let took = begin.elapsed();
        monitor.join().unwrap();
        let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        (format!("{error}: {source}"), took)
    }

    /// Writes until the other end closes.
    fn for_ever(mut stream: UnixStream, head: &str, again: &[u8], pause: Duration) {
        let mut sent = stream.write_all(head.as_bytes());
        while sent.is_ok() {
            std::thread::sleep(pause);
            sent = stream.write_all(again);
        }
    }

    #[test]
    fn a_monitor_that_drips_or_is_silent_holds_a_call_no_longer_than_its_limit() {
        let drip = Duration::from_millis(20);
        let ok = "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n";
        for (head, again) in [("", "H"), ("HTTP/1.1 200 OK\r\n", "a: b\r\n"), (ok, " ")] {
            let (why, took) = ask(move |stream| for_ever(stream, head, again.as_bytes(), drip));
            assert!(why.contains("the monitor's API at"), "{why}");
            assert!(took < LIMIT * 3, "{again:?}: {took:?}");
        }
        // The monitor sends no byte until the client closes.
        let (_, took) = ask(|mut stream| drop(std::io::copy(&mut stream, &mut std::io::sink())));
        assert!(took >= LIMIT && took < LIMIT * 3, "{took:?}");
    }

    #[test]
    fn a_monitor_that_accepts_nothing_holds_a_call_no_longer_than_its_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        let listener = UnixListener::bind(&path).unwrap();
        // SAFETY: an open socket; a backlog of 0 holds one connection.
        assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
        let _first = UnixStream::connect(&path).unwrap();
        let begin = Instant::now();
        Client::new(&path).with_timeout(LIMIT).power_button().unwrap_err();
        assert!(begin.elapsed() >= LIMIT && begin.elapsed() < LIMIT * 3, "{:?}", begin.elapsed());
    }

    #[test]
    fn an_endless_head_or_body_is_refused_before_it_is_kept() {
        let fast = Duration::ZERO;
        for (head, again, words) in [
            ("", "H", "head is longer than 16 KiB"),
            ("HTTP/1.1 200 OK\r\n", "a: b\r\n", "head is longer than 16 KiB"),
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551615\r\n\r\n",
                " ",
                "18446744073709551615 bytes, more than 256 KiB",
            ),
            ("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", " ", "Content-Length: -1"),
        ] {
            let again = again.repeat(1000);
            let (why, _) = ask(move |stream| for_ever(stream, head, again.as_bytes(), fast));
            assert!(why.contains(words), "{why}");
        }
    }

    #[test]
    fn a_body_that_is_shorter_than_it_says_is_no_answer() {
        let (why, _) = ask(|mut stream| {
            // Closing a socket with unread bytes resets the connection.
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") {
                stream.read_exact(&mut byte).unwrap();
                request.extend(byte);
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}").unwrap();
        });
        assert!(why.contains("ends after 2 of 9 bytes"), "{why}");
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_named_as_such() {
        let error = Client::new("/".repeat(200)).info().unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("1 to 107 bytes"), "{source}");
    }
}
