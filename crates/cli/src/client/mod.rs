//! The controller's API: signed actions, uploads and streams.
//!
//! Only the profile's own CA is trusted, no proxy is used, and every request is signed (SigV4, service `roost`).
//! Actions go over reqwest; streams take over their connection after the 101 and are driven by hyper directly.

mod endpoint;
mod sign;
mod stream;

pub use endpoint::Endpoint;
pub use stream::Duplex;

use crate::config::Profile;
use crate::error::{Error, Result};
use roost_types::api::Action;
use roost_types::error::ErrorBody;
use roost_types::{BlobId, ErrorCode};
use sign::Signer;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncRead;

/// Longest wait for a connection.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for the answer to an action.
const ACTION_TIMEOUT: Duration = Duration::from_secs(60);
/// Pauses before an action is tried again.
const PAUSES: &[Duration] =
    &[Duration::from_millis(200), Duration::from_millis(600), Duration::from_millis(1500)];

/// Actions that a repetition would do, or answer, differently: these are sent once.
const SENT_ONCE: &[&str] =
    &["CreateAccount", "CreateKeyPair", "ImportKeyPair", "RegisterImage", "RebootInstances"];

/// A connection to one controller as one account.
pub struct Client {
    endpoint: Endpoint,
    signer: Signer,
    tls: Arc<rustls::ClientConfig>,
    http: reqwest::Client,
}

impl Client {
    /// Makes ready; nothing is sent yet.
    pub fn new(profile: &Profile) -> Result<Self> {
        let endpoint = Endpoint::parse(&profile.endpoint)?;
        let tls = Arc::new(endpoint::tls(&profile.ca_pem)?);
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured((*tls).clone())
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .user_agent(concat!("roost/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| Error::Internal(format!("cannot set up TLS: {error}")))?;
        Ok(Self { endpoint, signer: Signer::new(profile), tls, http })
    }

    /// Takes an action, again if the connection failed and a repetition does no harm.
    pub async fn call<A: Action>(&self, action: &A) -> Result<A::Response> {
        let body = serde_json::to_vec(action).map_err(|error| Error::Internal(error.to_string()))?;
        let mut pauses = PAUSES.iter();
        loop {
            let error = match self.call_once::<A>(&body).await {
                Ok(response) => return Ok(response),
                Err(error) => error,
            };
            let again = match &error {
                Error::Api { error, .. } => {
                    matches!(error.code, ErrorCode::Unavailable | ErrorCode::RequestLimitExceeded)
                }
                // Nobody listens: saying so at once is better than hoping.
                Error::Unreachable { source, .. } => !is_refused(source.as_ref()),
                _ => false,
            };
            match pauses.next() {
                Some(pause) if again && !SENT_ONCE.contains(&A::NAME) => tokio::time::sleep(*pause).await,
                _ => return Err(error),
            }
        }
    }

    async fn call_once<A: Action>(&self, body: &[u8]) -> Result<A::Response> {
        let path = format!("/v1/{}", A::NAME);
        let signed =
            self.signer.sign("POST", &self.endpoint, &path, &[("content-type", "application/json")], body)?;
        let mut request =
            self.http.post(self.endpoint.url(&path)).timeout(ACTION_TIMEOUT).body(body.to_vec());
        for (name, value) in &signed {
            request = request.header(*name, value);
        }
        let response = request.send().await.map_err(|error| self.unreachable(error))?;
        let status = response.status();
        let bytes = response.bytes().await.map_err(|error| self.unreachable(error))?;
        if !status.is_success() {
            return Err(self.refusal(status.as_u16(), &bytes));
        }
        serde_json::from_slice(&bytes).map_err(|error| Error::NotAController {
            endpoint: self.endpoint.to_string(),
            detail: format!("its answer to {} cannot be read ({error}); are both of one version?", A::NAME),
        })
    }

    /// Whether the controller has this blob.
    pub async fn has_blob(&self, blob: &BlobId) -> Result<bool> {
        let path = format!("/v1/blobs/{blob}");
        let signed = self.signer.sign("HEAD", &self.endpoint, &path, &[], b"")?;
        let mut request = self.http.head(self.endpoint.url(&path)).timeout(ACTION_TIMEOUT);
        for (name, value) in &signed {
            request = request.header(*name, value);
        }
        let response = request.send().await.map_err(|error| self.unreachable(error))?;
        match response.status().as_u16() {
            200 | 204 => Ok(true),
            404 => Ok(false),
            // An answer to HEAD has no body that could say why; that of an action does.
            status @ (400 | 401 | 403) => {
                self.call(&roost_types::api::GetCallerIdentity {}).await?;
                Err(self.refusal(status, b""))
            }
            status => Err(self.refusal(status, b"")),
        }
    }

    /// Uploads a blob of `length` bytes. The id is the hash that the signature covers, so that a byte changed on
    /// the way is found out.
    pub async fn put_blob<R>(&self, blob: &BlobId, length: u64, content: R) -> Result<()>
    where
        R: AsyncRead + Send + Sync + 'static,
    {
        let path = format!("/v1/blobs/{blob}");
        let headers = [("content-type", "application/zstd")];
        let signed = self.signer.sign_hashed("PUT", &self.endpoint, &path, &headers, blob.as_str())?;
        let stream = tokio_util::io::ReaderStream::with_capacity(content, 256 * 1024);
        let mut request = self
            .http
            .put(self.endpoint.url(&path))
            .header("content-length", length)
            .body(reqwest::Body::wrap_stream(stream));
        for (name, value) in &signed {
            request = request.header(*name, value);
        }
        let response = request.send().await.map_err(|error| self.unreachable(error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(());
        }
        let bytes = response.bytes().await.map_err(|error| self.unreachable(error))?;
        Err(self.refusal(status.as_u16(), &bytes))
    }

    /// Opens a stream: a GET that becomes raw bytes both ways.
    pub async fn open(&self, path_and_query: &str) -> Result<Duplex> {
        let signed = self.signer.sign("GET", &self.endpoint, path_and_query, &[], b"")?;
        match stream::open(&self.endpoint, &self.tls, path_and_query, &signed).await {
            Ok(duplex) => Ok(duplex),
            Err(stream::OpenError::Refused(status, body)) => Err(self.refusal(status, &body)),
            Err(stream::OpenError::Failed(source)) => {
                Err(Error::Unreachable { endpoint: self.endpoint.to_string(), source })
            }
        }
    }

    fn unreachable(&self, error: reqwest::Error) -> Error {
        Error::Unreachable { endpoint: self.endpoint.to_string(), source: Box::new(error.without_url()) }
    }

    fn refusal(&self, status: u16, body: &[u8]) -> Error {
        match serde_json::from_slice::<ErrorBody>(body) {
            Ok(body) => Error::Api { error: body.error, request_id: Some(body.request_id) },
            Err(_) => {
                let said: String = String::from_utf8_lossy(body).chars().take(200).collect();
                let detail = if said.is_empty() { String::new() } else { format!(": {said}") };
                Error::NotAController {
                    endpoint: self.endpoint.to_string(),
                    detail: format!("HTTP status {status}{detail}"),
                }
            }
        }
    }
}

/// Whether nobody listens there at all.
fn is_refused(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<std::io::Error>()
            && error.kind() == std::io::ErrorKind::ConnectionRefused
        {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests;
