//! Streams: a signed GET that becomes raw bytes both ways (`Upgrade: roost-stream`).

use super::{CONNECT_TIMEOUT, Endpoint};
use crate::error::{Error, Result};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::header::{CONNECTION, UPGRADE};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Longest wait for the 101: the controller asks the agent, which dials back.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest first line of a stream.
const MAX_HEADER: u64 = 64 * 1024;

type Io = TokioIo<hyper::upgrade::Upgraded>;

/// An open stream.
pub struct Duplex {
    /// What comes.
    pub reader: BufReader<ReadHalf<Io>>,
    /// What goes.
    pub writer: WriteHalf<Io>,
}

impl Duplex {
    /// Reads the JSON line that every stream begins with.
    pub async fn header<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        let wait = async { (&mut self.reader).take(MAX_HEADER).read_line(&mut line).await };
        match timeout(UPGRADE_TIMEOUT, wait).await {
            Ok(Ok(0)) => {
                return Err(Error::Unavailable("the host closed the stream at once; try again".to_owned()));
            }
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(Error::Unavailable(format!("the stream broke: {error}"))),
            Err(_) => {
                return Err(Error::Unavailable(
                    "the host does not answer on the stream; try again".to_owned(),
                ));
            }
        }
        serde_json::from_str(&line).map_err(|error| {
            Error::Internal(format!("the stream begins with a line that cannot be read: {error}"))
        })
    }
}

/// Why a stream did not open.
pub enum OpenError {
    /// The controller answered with this status and body.
    Refused(u16, Bytes),
    /// No answer.
    Failed(Box<dyn std::error::Error + Send + Sync>),
}

impl<E: std::error::Error + Send + Sync + 'static> From<E> for OpenError {
    fn from(error: E) -> Self {
        OpenError::Failed(Box::new(error))
    }
}

/// Opens a stream with headers that are signed already.
pub async fn open(
    endpoint: &Endpoint,
    tls: &Arc<rustls::ClientConfig>,
    path_and_query: &str,
    signed: &[(&'static str, String)],
) -> std::result::Result<Duplex, OpenError> {
    let name = endpoint.server_name()?;
    let connect = async {
        let tcp = TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await?;
        tcp.set_nodelay(true)?;
        tokio_rustls::TlsConnector::from(tls.clone()).connect(name, tcp).await
    };
    let stream = timeout(CONNECT_TIMEOUT, connect).await??;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the stream.
    tokio::spawn(connection.with_upgrades());

    let mut request =
        hyper::Request::get(path_and_query).header(CONNECTION, "Upgrade").header(UPGRADE, "roost-stream");
    for (name, value) in signed {
        request = request.header(*name, value);
    }
    let request = request.body(Empty::<Bytes>::new())?;
    let response = timeout(UPGRADE_TIMEOUT, sender.send_request(request)).await??;
    if response.status() != hyper::StatusCode::SWITCHING_PROTOCOLS {
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), 64 * 1024).collect().await;
        return Err(OpenError::Refused(
            status,
            body.map(http_body_util::Collected::to_bytes).unwrap_or_default(),
        ));
    }
    let (reader, writer) = tokio::io::split(TokioIo::new(hyper::upgrade::on(response).await?));
    Ok(Duplex { reader: BufReader::with_capacity(64 * 1024, reader), writer })
}
