//! A controller in this process, and clients for it.

use aws_credential_types::Credentials;
use aws_sigv4::http_request::{PayloadChecksumKind, SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4;
use reqwest::{Certificate, Identity, Method, RequestBuilder, Response, StatusCode};
use roost_controller::config::{AdminFile, StateDir};
use roost_controller::serve::{Controller, ServeOptions};
use roost_controller::server::Limits;
use roost_controller::setup::{self, AgentIdentity, InitOptions};
use roost_types::agent::{HelloRequest, HostFacts, Observation, Observed, PROTOCOL, Report};
use roost_types::api::{Action, CreateAccount, NewAccount, RegisterImage, Reservation, RunInstances};
use roost_types::error::ErrorBody;
use roost_types::{BlobId, ErrorCode, HostId, InstanceId};
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Longest wait for anything in a test.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// A controller that runs in this process.
pub struct Server {
    pub dir: TempDir,
    pub state: StateDir,
    pub api: SocketAddr,
    pub agents: SocketAddr,
    stop: watch::Sender<bool>,
    running: JoinHandle<()>,
}

pub fn options(mut limits: Limits) -> ServeOptions {
    limits.blobs.file_bytes = 1 << 20;
    ServeOptions {
        listen: "127.0.0.1:0".parse().unwrap(),
        agent_listen: "127.0.0.1:0".parse().unwrap(),
        types: None,
        prices: None,
        public_pool: "100.64.0.0/16".parse().unwrap(),
        limits,
    }
}

impl Server {
    pub async fn start() -> Self {
        Self::with_limits(Limits::default()).await
    }

    pub async fn with_limits(limits: Limits) -> Self {
        // Already there if another test was first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path().join("controller"));
        setup::init(&state, &InitOptions::default()).unwrap();
        Self::again(dir, state, limits).await
    }

    /// A controller over the state of one that was stopped.
    pub async fn again(dir: TempDir, state: StateDir, limits: Limits) -> Self {
        let (stop, stopped) = watch::channel(false);
        let controller = Controller::open(&state, &options(limits), stopped).await.unwrap();
        let (api, agents) = (controller.api, controller.agents);
        let running = tokio::spawn(controller.run());
        Self { dir, state, api, agents, stop, running }
    }

    /// Stops it as a signal would, and waits.
    pub async fn stop(self) -> (TempDir, StateDir) {
        self.stop.send_replace(true);
        tokio::time::timeout(DEADLINE, self.running).await.expect("stops in time").unwrap();
        (self.dir, self.state)
    }

    pub fn admin_file(&self) -> AdminFile {
        self.state.read_json("admin.json").unwrap().unwrap()
    }

    /// The first account.
    pub fn admin(&self) -> Client {
        let admin = self.admin_file();
        self.client(&admin.access_key_id, &admin.secret_access_key)
    }

    pub fn client(&self, access_key_id: &str, secret: &str) -> Client {
        let ca = Certificate::from_pem(self.admin_file().ca_pem.as_bytes()).unwrap();
        Client {
            http: reqwest::Client::builder().tls_certs_only([ca]).build().unwrap(),
            base: format!("https://localhost:{}", self.api.port()),
            access_key_id: access_key_id.to_owned(),
            secret: secret.to_owned(),
            region: "home-1".to_owned(),
            skew: 0,
        }
    }

    /// Another account.
    pub async fn account(&self, name: &str) -> Client {
        let request = CreateAccount { name: name.to_owned(), admin: false };
        let made: NewAccount = self.admin().call(&request).await.unwrap();
        self.client(&made.access_key_id, &made.secret_access_key)
    }

    /// A host whose agent has said hello.
    pub async fn host(&self, name: &str) -> Agent {
        let out = self.dir.path().join(name);
        let identity = setup::agent_identity(&self.state, name, None, None, &out).unwrap();
        let agent = Agent::new(identity, &out, self.agents);
        let hello = HelloRequest { protocol: PROTOCOL, version: "test".into(), host: agent.facts.clone() };
        let reply = agent.request(Method::POST, "hello").json(&hello).send().await.unwrap();
        assert_eq!(reply.status(), StatusCode::OK, "{}", reply.text().await.unwrap());
        agent
    }
}

/// A user who signs requests.
#[derive(Clone)]
pub struct Client {
    pub http: reqwest::Client,
    pub base: String,
    pub access_key_id: String,
    pub secret: String,
    pub region: String,
    /// Seconds that this user's clock is off.
    pub skew: i64,
}

/// A refusal: the status and the body as the wire has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub status: u16,
    pub code: ErrorCode,
    pub message: String,
}

impl Client {
    /// Signs a request for a path with its query. `hash` replaces the body's own in the signature.
    pub fn signed(&self, method: Method, path: &str, body: Vec<u8>, hash: Option<&str>) -> RequestBuilder {
        let url = format!("{}{path}", self.base);
        let identity = Credentials::new(&self.access_key_id, &self.secret, None, None, "test").into();
        let mut settings = SigningSettings::default();
        settings.payload_checksum_kind = PayloadChecksumKind::XAmzSha256;
        let off = Duration::from_secs(self.skew.unsigned_abs());
        let time = if self.skew < 0 { SystemTime::now() - off } else { SystemTime::now() + off };
        let params = v4::SigningParams::builder().identity(&identity).region(&self.region).name("roost");
        let params = params.time(time).settings(settings).build().unwrap().into();
        let signable = match hash {
            Some(hash) => SignableBody::Precomputed(hash.to_owned()),
            None => SignableBody::Bytes(&body),
        };
        let request = SignableRequest::new(method.as_str(), &url, std::iter::empty(), signable).unwrap();
        let (instructions, _) = sign(request, &params).unwrap().into_parts();
        let unsigned = self.http.request(method, &url);
        instructions.headers().fold(unsigned, |request, (name, value)| request.header(name, value)).body(body)
    }

    pub async fn post(&self, action: &str, body: &str) -> Response {
        let path = format!("/v1/{action}");
        self.signed(Method::POST, &path, body.into(), None).send().await.unwrap()
    }

    pub async fn call<A: Action>(&self, request: &A) -> Result<A::Response, Refusal> {
        answer(self.post(A::NAME, &serde_json::to_string(request).unwrap()).await).await
    }

    pub async fn put_blob(&self, bytes: &[u8]) -> BlobId {
        let id = blob_id(bytes);
        let path = format!("/v1/blobs/{id}");
        let reply = self.signed(Method::PUT, &path, bytes.to_vec(), None).send().await.unwrap();
        assert_eq!(reply.status(), StatusCode::OK, "{}", reply.text().await.unwrap());
        id
    }

    /// An image of three small blobs.
    pub async fn image(&self, name: &str) -> RegisterImage {
        let mut blobs = Vec::new();
        for part in ["kernel", "initrd", "root"] {
            blobs.push(self.put_blob(&zstd_like(&format!("{name} {part}"))).await);
        }
        let [kernel, initrd, root] = blobs.try_into().unwrap();
        let request = RegisterImage {
            name: name.to_owned(),
            description: String::new(),
            kernel,
            initrd: Some(initrd),
            root,
            root_bytes: 1,
            boot_args: "console=ttyS0".into(),
            default_user: "root".into(),
            ssh: None,
        };
        self.call(&request).await.unwrap();
        request
    }

    pub async fn launch(&self, image: &str) -> InstanceId {
        let request = RunInstances {
            image: image.to_owned(),
            instance_type: "t3.nano".into(),
            min_count: 1,
            max_count: 1,
            key_name: None,
            user_data: None,
            volume_gib: None,
            tags: Default::default(),
            metadata_options: None,
            client_token: None,
            dry_run: false,
        };
        let made: Reservation = self.call(&request).await.unwrap();
        made.instances[0].instance_id.clone()
    }
}

/// Reads a success, or a refusal whose form it checks.
pub async fn answer<T: DeserializeOwned>(reply: Response) -> Result<T, Refusal> {
    let status = reply.status();
    let request_id = reply.headers()["x-request-id"].to_str().unwrap().to_owned();
    assert_eq!(reply.headers()["content-type"], "application/json");
    let text = reply.text().await.unwrap();
    if status.is_success() {
        return Ok(serde_json::from_str(&text).unwrap());
    }
    let body: ErrorBody = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(body.request_id, request_id);
    assert_eq!(body.error.code.http_status(), status.as_u16());
    Err(Refusal { status: status.as_u16(), code: body.error.code, message: body.error.message })
}

pub async fn refusal(reply: Response) -> Refusal {
    answer::<serde_json::Value>(reply).await.unwrap_err()
}

/// Bytes that begin as a zstd file does.
pub fn zstd_like(text: &str) -> Vec<u8> {
    // A frame's header without a content size.
    [&[0x28, 0xb5, 0x2f, 0xfd, 0, 0], text.as_bytes()].concat()
}

pub fn blob_id(bytes: &[u8]) -> BlobId {
    BlobId::from_sha256(Sha256::digest(bytes).into())
}

/// A host's agent, as far as the wire goes.
pub struct Agent {
    pub http: reqwest::Client,
    pub base: String,
    pub facts: HostFacts,
}

pub fn agent_http(dir: &Path) -> reqwest::Client {
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
    let identity = Identity::from_pem(format!("{}{}", read("key.pem"), read("cert.pem")).as_bytes()).unwrap();
    let ca = Certificate::from_pem(read("ca.pem").as_bytes()).unwrap();
    reqwest::Client::builder().tls_certs_only([ca]).identity(identity).build().unwrap()
}

impl Agent {
    pub fn new(identity: AgentIdentity, dir: &Path, agents: SocketAddr) -> Self {
        Self {
            http: agent_http(dir),
            base: format!("https://localhost:{}/agent/v1", agents.port()),
            facts: HostFacts {
                host_id: identity.host_id,
                hostname: identity.hostname,
                zone: identity.zone,
                cpus: 4,
                cpu_milli: 4000,
                memory_mib: 8192,
                disk_gib: 100,
                max_vcpus: 4,
                overhead_mib: 16,
                gpus: 0,
            },
        }
    }

    pub fn id(&self) -> &HostId {
        &self.facts.host_id
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}/{path}", self.base))
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Refusal> {
        answer(self.request(Method::GET, path).send().await.unwrap()).await
    }

    /// Reports one instance.
    pub async fn report(&self, observation: Observation) {
        let report = Report {
            host: self.facts.clone(),
            boot_id: "boot".into(),
            agent_run: "run".into(),
            instances: vec![observation],
            trouble: Vec::new(),
            orphans: Vec::new(),
            last: false,
        };
        let reply = self.request(Method::POST, "observed").json(&report).send().await.unwrap();
        assert_eq!(reply.status(), StatusCode::OK, "{}", reply.text().await.unwrap());
    }
}

/// An instance's word: it has run for this long.
pub fn running(instance_id: &InstanceId, generation: u64, for_us: u64) -> Observation {
    Observation {
        age_us: for_us,
        run_began_age_us: Some(for_us),
        last_seen_age_us: Some(0),
        ..Observation::new(instance_id.clone(), generation, 1, Observed::Running)
    }
}

/// Looks until it is so.
pub async fn eventually(what: &str, mut look: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !look().await {
        assert!(tokio::time::Instant::now() < deadline, "{what}: not within {DEADLINE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
