//! The metadata server of one instance (IMDSv1 and v2).
//!
//! It knows whom it serves by the wire: its socket is bound to the instance's own tap, in the instance's own
//! namespace. Replies go one hop (EC2's default), so that a container bridge in the guest does not pass them on.
//! The guest is hostile: connections, their time and their size are bounded.

use super::metadata::{Found, Tree};
use hmac::{Hmac, KeyInit, Mac};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use roost_types::agent::{HttpEndpoint, HttpTokens, MetadataOptions};
use sha2::Sha256;
use std::convert::Infallible;
use std::sync::{Arc, RwLock};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Connections at a time.
const CONNECTIONS: usize = 32;
/// Longest that one connection lasts.
const CONNECTION_TIME: Duration = Duration::from_secs(30);
/// Longest session, seconds (EC2: six hours).
const TTL_MAX: u64 = 21_600;

const TTL: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token-ttl-seconds");
const TOKEN: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token");
const FORWARDED: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Makes and checks session tokens: `expiry.mac`, so that they hold over a restart of the agent and need no table
/// that a guest could fill.
#[derive(Clone)]
pub struct Tokens {
    key: [u8; 32],
    instance: String,
}

impl Tokens {
    /// Tokens of one instance under the host's key.
    pub const fn new(key: [u8; 32], instance: String) -> Self {
        Self { key, instance }
    }

    fn mac(&self, expires: u64) -> Hmac<Sha256> {
        // Any length of key is fine for HMAC.
        #[allow(clippy::unwrap_used)]
        let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(&self.key).unwrap();
        mac.update(self.instance.as_bytes());
        mac.update(&expires.to_be_bytes());
        mac
    }

    /// A token that holds until `expires` (seconds, any clock that both calls share).
    pub fn make(&self, expires: u64) -> String {
        format!("{expires:x}.{}", hex::encode(self.mac(expires).finalize().into_bytes()))
    }

    /// Whether a token is ours and holds; seconds left.
    pub fn check(&self, token: &str, now: u64) -> Option<u64> {
        let (expires, mac) = token.split_once('.')?;
        let expires = u64::from_str_radix(expires, 16).ok()?;
        self.mac(expires).verify_slice(&hex::decode(mac).ok()?).ok()?;
        expires.checked_sub(now).filter(|left| *left > 0)
    }
}

/// What one server answers from; replaced when the spec changes.
pub struct Imds {
    tokens: Tokens,
    tree: RwLock<Tree>,
}

impl Imds {
    /// A server's content.
    pub fn new(tokens: Tokens, tree: Tree) -> Arc<Self> {
        Arc::new(Self { tokens, tree: RwLock::new(tree) })
    }

    /// Serves something else from now on.
    pub fn replace(&self, tree: Tree) {
        *self.tree.write().unwrap_or_else(std::sync::PoisonError::into_inner) = tree;
    }

    /// Answers one request at `now` seconds.
    pub fn answer(
        &self,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
        now: u64,
    ) -> Response<Full<Bytes>> {
        let tree = self.tree.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let MetadataOptions { http_tokens, http_endpoint } = tree.options();
        if http_endpoint == HttpEndpoint::Disabled {
            return plain(StatusCode::FORBIDDEN, "the metadata service is turned off for this instance");
        }
        if method == Method::PUT {
            return self.session(path, headers, now);
        }
        if method != Method::GET && method != Method::HEAD {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "allowed: GET, HEAD, PUT");
        }
        let mut left = None;
        if let Some(token) = headers.get(TOKEN) {
            left = token.to_str().ok().and_then(|token| self.tokens.check(token, now));
            if left.is_none() {
                return plain(StatusCode::UNAUTHORIZED, "the session token is invalid or has expired");
            }
        } else if http_tokens == HttpTokens::Required {
            let text = format!("a session token is required: PUT /latest/api/token, then the header {TOKEN}");
            return plain(StatusCode::UNAUTHORIZED, &text);
        }
        let mut response = match tree.get(path) {
            Found::Text(text) => with(StatusCode::OK, "text/plain", text),
            Found::Json(text) => with(StatusCode::OK, "application/json", text),
            Found::Nothing => plain(StatusCode::NOT_FOUND, "not found"),
        };
        if let Some(left) = left {
            response.headers_mut().insert(TTL, HeaderValue::from(left));
        }
        response
    }

    fn session(&self, path: &str, headers: &HeaderMap, now: u64) -> Response<Full<Bytes>> {
        if path.trim_end_matches('/') != "/latest/api/token" {
            return plain(StatusCode::NOT_FOUND, "not found");
        }
        // EC2: a request that came through a proxy gets no session.
        if headers.contains_key(FORWARDED) {
            return plain(StatusCode::FORBIDDEN, "requests with X-Forwarded-For get no session");
        }
        let ttl =
            headers.get(TTL).and_then(|value| value.to_str().ok()).and_then(|text| text.parse::<u64>().ok());
        let Some(ttl) = ttl.filter(|ttl| (1..=TTL_MAX).contains(ttl)) else {
            let what = format!("{TTL} must be between 1 and {TTL_MAX}");
            return plain(StatusCode::BAD_REQUEST, &what);
        };
        let mut response = plain(StatusCode::OK, &self.tokens.make(now + ttl));
        response.headers_mut().insert(TTL, HeaderValue::from(ttl));
        response
    }
}

fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    with(status, "text/plain", text.as_bytes().to_vec())
}

fn with(status: StatusCode, kind: &'static str, body: Vec<u8>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// Serves until dropped.
pub async fn serve(listener: TcpListener, imds: Arc<Imds>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "metadata service: accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let imds = Arc::clone(&imds);
        connections.spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let now = crate::clock::boottime_ns() / 1_000_000_000;
                let response = imds.answer(request.method(), request.uri().path(), request.headers(), now);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(5))
                .max_buf_size(16 * 1024)
                .serve_connection(TokioIo::new(stream), service);
            let _ = tokio::time::timeout(CONNECTION_TIME, connection).await;
            drop(slot);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::ensure;

    fn imds() -> Arc<Imds> {
        Imds::new(Tokens::new([7; 32], "i-05050505050505050".into()), Tree::new(&ensure(1)))
    }

    fn headers(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
    }

    async fn body(response: Response<Full<Bytes>>) -> String {
        use http_body_util::BodyExt;
        String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
    }

    #[tokio::test]
    async fn a_session_token_opens_the_tree_until_it_expires() {
        let imds = imds();
        let response = imds.answer(&Method::PUT, "/latest/api/token", &headers(&[(TTL, "60")]), 100);
        assert_eq!(response.status(), StatusCode::OK);
        let token = body(response).await;
        let with_token = headers(&[(TOKEN, &token)]);
        let path = "/latest/meta-data/instance-id";
        assert_eq!(imds.answer(&Method::GET, path, &with_token, 159).status(), StatusCode::OK);
        assert_eq!(imds.answer(&Method::GET, path, &with_token, 160).status(), StatusCode::UNAUTHORIZED);
        // Another instance's token is worth nothing.
        let other = Imds::new(Tokens::new([7; 32], "i-other".into()), Tree::default());
        assert_eq!(other.answer(&Method::GET, path, &with_token, 100).status(), StatusCode::UNAUTHORIZED);
    }

    #[tokio::test]
    async fn version_one_needs_no_token_but_a_wrong_one_is_refused() {
        let imds = imds();
        let path = "/latest/meta-data/instance-id";
        let response = imds.answer(&Method::GET, path, &HeaderMap::new(), 1);
        assert_eq!(body(response).await, "i-05050505050505050");
        for token in ["", "x", "ffff.00", "ffffffffff.zz"] {
            let status = imds.answer(&Method::GET, path, &headers(&[(TOKEN, token)]), 1).status();
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{token:?}");
        }
    }

    /// The status of every way to ask.
    fn ways(imds: &Imds, token: &str) -> [u16; 3] {
        let path = "/latest/meta-data/instance-id";
        let status = |method, path, pairs: &[_]| imds.answer(method, path, &headers(pairs), 1).status();
        let (plain, session) = (status(&Method::GET, path, &[]), [(TTL, "60")]);
        let ways = [plain, status(&Method::GET, path, &[(TOKEN, token)])];
        [ways[0], ways[1], status(&Method::PUT, "/latest/api/token", &session)].map(|status| status.as_u16())
    }

    #[tokio::test]
    async fn an_instances_options_close_version_one_or_everything() {
        let imds = imds();
        let token = imds.answer(&Method::PUT, "/latest/api/token", &headers(&[(TTL, "60")]), 1);
        let token = body(token).await;
        let mut ensure = ensure(1);
        assert_eq!(ways(&imds, &token), [200, 200, 200]);
        ensure.spec.metadata.options.http_tokens = HttpTokens::Required;
        imds.replace(Tree::new(&ensure));
        assert_eq!(ways(&imds, &token), [401, 200, 200]);
        ensure.spec.metadata.options.http_endpoint = HttpEndpoint::Disabled;
        imds.replace(Tree::new(&ensure));
        assert_eq!(ways(&imds, &token), [403, 403, 403]);
    }

    #[test]
    fn sessions_are_refused_to_proxies_and_without_a_proper_time() {
        let imds = imds();
        let status = |pairs: &[(HeaderName, &str)]| {
            imds.answer(&Method::PUT, "/latest/api/token", &headers(pairs), 1).status()
        };
        assert_eq!(status(&[(TTL, "60"), (FORWARDED, "1.2.3.4")]), StatusCode::FORBIDDEN);
        for ttl in ["0", "21601", "-1", "x"] {
            assert_eq!(status(&[(TTL, ttl)]), StatusCode::BAD_REQUEST, "{ttl}");
        }
        assert_eq!(status(&[]), StatusCode::BAD_REQUEST);
        assert_eq!(status(&[(TTL, "21600")]), StatusCode::OK);
        let post = imds.answer(&Method::POST, "/latest/meta-data/", &HeaderMap::new(), 1);
        assert_eq!(post.status(), StatusCode::METHOD_NOT_ALLOWED);
    }
}
