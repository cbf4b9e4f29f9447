//! The agent's side of the wire: it dials, with its certificate, and trusts the one CA that it was given.

use crate::error::{Error, Result};
use crate::storage::{BlobSource, Bytes, Opening};
use futures_util::TryStreamExt;
use reqwest::{
    Certificate, Client, Identity, Method, RequestBuilder, Response, StatusCode, Upgraded, header,
};
use roost_types::agent::{Desired, HelloRequest, HelloResponse, HostRequest, Report, ReportAck};
use roost_types::ids::BlobId;
use serde::de::DeserializeOwned;
use std::path::Path;
use std::time::Duration;
use tokio_util::io::StreamReader;

/// Longest that a quick call may take.
const QUICK: Duration = Duration::from_secs(15);
/// Longest that a long poll may take.
const LONG: Duration = Duration::from_secs(60);

/// A controller.
#[derive(Debug, Clone)]
pub struct Controller {
    url: String,
    client: Client,
}

impl Controller {
    /// A controller at `url`, with the certificate, key and CA of an identity folder.
    ///
    /// # Errors
    /// A file is missing or no PEM.
    pub fn new(url: &str, identity: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = identity.join(name);
            std::fs::read(&path).map_err(Error::file("read", &path))
        };
        let fault = |what: &str, source| Error::Controller {
            url: url.to_owned(),
            what: format!("{what} in {} cannot be used", identity.display()),
            source: Some(Box::new(source)),
        };
        let mut pem = read("cert.pem")?;
        pem.push(b'\n');
        pem.extend(read("key.pem")?);
        let own = Identity::from_pem(&pem).map_err(|error| fault("cert.pem and key.pem", error))?;
        let authority =
            Certificate::from_pem_bundle(&read("ca.pem")?).map_err(|error| fault("ca.pem", error))?;
        let client = Client::builder()
            .tls_certs_only(authority)
            .identity(own)
            .http1_only()
            .no_proxy()
            .https_only(true)
            .connect_timeout(Duration::from_secs(5))
            .tcp_keepalive(Duration::from_secs(15))
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| fault("the identity", error))?;
        Ok(Self { url: url.trim_end_matches('/').to_owned(), client })
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}/agent/v1/{path}", self.url))
    }

    fn fault(&self, what: impl Into<String>, source: Option<reqwest::Error>) -> Error {
        Error::Controller { url: self.url.clone(), what: what.into(), source: source.map(Box::new) }
    }

    async fn send(&self, what: &str, request: RequestBuilder) -> Result<Response> {
        let response =
            request.send().await.map_err(|error| self.fault(format!("{what}: no answer"), Some(error)))?;
        let status = response.status();
        if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let text = response.text().await.unwrap_or_default();
        let text: String = text.chars().take(500).collect();
        Err(self.fault(format!("{what}: {status}: {text}"), None))
    }

    async fn json<T: DeserializeOwned>(&self, what: &str, request: RequestBuilder) -> Result<T> {
        let response = self.send(what, request).await?;
        response
            .json()
            .await
            .map_err(|error| self.fault(format!("{what}: the answer is not understood"), Some(error)))
    }

    /// Says who we are.
    ///
    /// # Errors
    /// No answer, or a refusal with its reason.
    pub async fn hello(&self, hello: &HelloRequest) -> Result<HelloResponse> {
        self.json("hello", self.request(Method::POST, "hello").timeout(QUICK).json(hello)).await
    }

    /// What the host must look like: at once if it differs from version `after`, else when it does or time is up.
    ///
    /// # Errors
    /// No answer or a refusal.
    pub async fn desired(&self, after: Option<u64>) -> Result<Desired> {
        let path = after.map_or_else(|| "desired".to_owned(), |version| format!("desired?after={version}"));
        self.json("desired", self.request(Method::GET, &path).timeout(LONG)).await
    }

    /// Says what the host looks like.
    ///
    /// # Errors
    /// No answer or a refusal.
    pub async fn observed(&self, report: &Report) -> Result<ReportAck> {
        self.json("observed", self.request(Method::POST, "observed").timeout(QUICK).json(report)).await
    }

    /// Streams that are asked for.
    ///
    /// # Errors
    /// No answer or a refusal.
    pub async fn requests(&self) -> Result<Vec<HostRequest>> {
        self.json("requests", self.request(Method::GET, "requests").timeout(LONG)).await
    }

    /// Dials a stream.
    ///
    /// # Errors
    /// Nobody waits for it any more.
    pub async fn stream(&self, stream: &str) -> Result<Upgraded> {
        // The name becomes part of a path.
        if stream.is_empty()
            || !stream.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        {
            return Err(self.fault(format!("{stream:?} cannot name a stream"), None));
        }
        let request = self
            .request(Method::GET, &format!("streams/{stream}"))
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, "roost-stream");
        let response = self.send("stream", request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(self.fault(format!("stream: {} instead of an upgrade", response.status()), None));
        }
        response.upgrade().await.map_err(|error| self.fault("stream: the upgrade failed", Some(error)))
    }
}

impl BlobSource for Controller {
    fn open(&self, blob: &BlobId) -> Opening<'_> {
        let path = format!("blobs/{}", blob.as_str());
        Box::pin(async move {
            let response = self.send("blob", self.request(Method::GET, &path)).await?;
            let stream = response.bytes_stream().map_err(std::io::Error::other);
            Ok(Box::new(StreamReader::new(Box::pin(stream))) as Bytes)
        })
    }
}
