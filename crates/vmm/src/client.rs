//! A tiny blocking client of the API, for the agent, the tests and people's scripts.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

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
    /// A client of the API at this socket; calls take at most 10 s.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), timeout: Duration::from_secs(10) }
    }

    /// With another limit per call.
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
        let mut stream = UnixStream::connect(&self.path).map_err(io)?;
        stream.set_read_timeout(Some(self.timeout)).map_err(io)?;
        stream.set_write_timeout(Some(self.timeout)).map_err(io)?;
        send(&mut stream).map_err(io)?;
        read_response(&mut BufReader::new(stream), io)
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
    let mut line = String::new();
    reader.read_line(&mut line).map_err(&io)?;
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.ok_or_else(|| ClientError::Protocol(format!("status line {line:?}")))?;
    let mut length = 0;
    loop {
        line.clear();
        if reader.read_line(&mut line).map_err(&io)? == 0 {
            return Err(ClientError::Protocol("it ends in the headers".into()));
        }
        let header = line.trim_end();
        if header.is_empty() {
            break;
        }
        if let Some((name, value)) = header.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().map_err(|_| ClientError::Protocol(format!("header {header:?}")))?;
        }
    }
    let mut body = Vec::new();
    reader.take(length).read_to_end(&mut body).map_err(&io)?;
    Ok((status, body))
}
