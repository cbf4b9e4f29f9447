//! A host whose agent is simulated ([`SimHost`]) and speaks the real protocol: reports over mTLS, and streams.

use crate::stack::{DEADLINE, Stack};
use reqwest::{Client, Method, RequestBuilder, Upgraded};
use roost_testbed::sim::{Behaviour, Controller, SimHost, unreachable};
use roost_types::agent::{
    ConsoleHeader, Desired, HelloRequest, HelloResponse, HostRequest, Report, ReportAck, StreamTarget,
    TunnelHeader,
};
use roost_types::{ApiError, HostId, Micros};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;

/// What every simulated guest has written on its console: a title, colours, and text.
pub const CONSOLE: &[u8] = b"\x1b]0;pwned\x07\x1b[32mLinux\x1b[0m version 6.1\r\n\x9b31mlogin: ";
/// Its ssh host key.
pub const HOST_KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEDkUaVuEhsBX0XW1jzDBwTBz9R9nuzfZ4UH0u8YcQ4k root@guest";

/// A running agent; it ends with this value.
pub struct Agent {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone)]
struct Link {
    base: String,
    http: Client,
}

struct Wire<'a> {
    link: Link,
    runtime: &'a Runtime,
}

impl Agent {
    /// A host of 4 CPUs and 8 GiB.
    pub fn start(stack: &Stack) -> Self {
        let out = stack.path("identity");
        let state = stack.state_dir();
        stack.controller(&[
            "agent-identity",
            "--state-dir",
            state.to_str().unwrap(),
            "--hostname",
            "sim-1",
            "--out",
            out.to_str().unwrap(),
        ]);
        let read = |name: &str| std::fs::read(out.join(name)).unwrap();
        let identity: serde_json::Value = serde_json::from_slice(&read("identity.json")).unwrap();
        let host_id: HostId = identity["host_id"].as_str().unwrap().parse().unwrap();
        let mut roots = rustls::RootCertStore::empty();
        for authority in CertificateDer::pem_slice_iter(&read("ca.pem")) {
            roots.add(authority.unwrap()).unwrap();
        }
        let chain = CertificateDer::pem_slice_iter(&read("cert.pem")).map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_slice(&read("key.pem")).unwrap();
        let tls =
            rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(roots)
                .with_client_auth_cert(chain, key)
                .unwrap();
        let http = Client::builder().tls_backend_preconfigured(tls).no_proxy().build().unwrap();
        let link = Link { base: format!("{}/agent/v1", stack.agents), http };
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || live(link, host_id, &stopped));
        let agent = Self { stop, thread: Some(thread) };
        let deadline = std::time::Instant::now() + DEADLINE;
        while stack.json(&["hosts"])["hosts"][0]["alive"] != true {
            assert!(std::time::Instant::now() < deadline, "the host does not become alive");
        }
        agent
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the simulated agent failed");
        }
    }
}

fn now() -> Micros {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    Micros(i64::try_from(since.as_micros()).unwrap())
}

fn live(link: Link, host_id: HostId, stop: &AtomicBool) {
    let runtime = Runtime::new().unwrap();
    let mut host = SimHost::new(1, 4, 8192, now());
    host.facts.host_id = host_id;
    host.behaviour = Behaviour {
        prepare: Micros(100_000),
        power_off: Micros(100_000),
        ready: Micros(100_000),
        starts_fail: false,
    };
    runtime.spawn(serve_streams(link.clone()));
    let wire = Wire { link, runtime: &runtime };
    while !stop.load(Ordering::Relaxed) {
        host.pass_time(now());
        // A controller that is gone is tried again, as a real agent does.
        let _ = host.round(&wire);
        runtime.block_on(async { tokio::time::sleep(Duration::from_millis(30)).await });
    }
    runtime.shutdown_background();
}

impl Link {
    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}/{path}", self.base))
    }
}

impl Wire<'_> {
    fn ask<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, ApiError> {
        self.runtime.block_on(async {
            let answer = request.send().await.map_err(|_| unreachable())?;
            answer.json().await.map_err(|_| unreachable())
        })
    }

    fn post<B: Serialize, T: DeserializeOwned>(&self, path: &str, body: &B) -> Result<T, ApiError> {
        self.ask(self.link.request(Method::POST, path).json(body))
    }
}

impl Controller for Wire<'_> {
    fn hello(&self, _: &HostId, request: HelloRequest) -> Result<HelloResponse, ApiError> {
        self.post("hello", &request)
    }

    fn desired(&self, _: &HostId) -> Result<Desired, ApiError> {
        self.ask(self.link.request(Method::GET, "desired"))
    }

    fn report(&self, _: &HostId, mut report: Report) -> Result<ReportAck, ApiError> {
        for seen in report.instances.iter_mut().filter(|seen| seen.guest_ready) {
            seen.ssh_host_key = Some(HOST_KEY.to_owned());
        }
        self.post("observed", &report)
    }
}

/// Takes what users ask for and serves each stream.
async fn serve_streams(link: Link) {
    loop {
        let Ok(answer) = link.request(Method::GET, "requests").send().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        for request in answer.json::<Vec<HostRequest>>().await.unwrap_or_default() {
            tokio::spawn(serve(link.clone(), request));
        }
    }
}

async fn serve(link: Link, request: HostRequest) {
    let dial = link.request(Method::GET, &format!("streams/{}", request.stream));
    let answer = dial.header("connection", "upgrade").header("upgrade", "roost-stream").send().await.unwrap();
    let Ok(mut stream) = answer.upgrade().await else { return };
    match request.target {
        StreamTarget::Console { offset, follow, input } => console(&mut stream, offset, follow, input).await,
        StreamTarget::Tcp { port } => tcp(stream, port).await,
    }
}

async fn line<T: Serialize>(stream: &mut Upgraded, value: &T) {
    let mut line = serde_json::to_vec(value).unwrap();
    line.push(b'\n');
    stream.write_all(&line).await.unwrap();
    stream.flush().await.unwrap();
}

/// A console: what was written, and what is typed comes back in capitals until `q`.
async fn console(stream: &mut Upgraded, offset: u64, follow: bool, input: bool) {
    line(stream, &ConsoleHeader { offset, lost: 0, error: None }).await;
    let from = usize::try_from(offset).unwrap().min(CONSOLE.len());
    stream.write_all(&CONSOLE[from..]).await.unwrap();
    stream.flush().await.unwrap();
    if follow && input {
        echo(stream).await;
    }
    let _ = stream.shutdown().await;
}

/// Sends back in capitals what comes, until `q`.
async fn echo(stream: &mut Upgraded) {
    let mut typed = [0; 256];
    while let Ok(count @ 1..) = stream.read(&mut typed).await {
        stream.write_all(&typed[..count].to_ascii_uppercase()).await.unwrap();
        stream.flush().await.unwrap();
        if typed[..count].contains(&b'q') {
            return;
        }
    }
}

/// Port 22 greets and sends back what it gets; nothing listens elsewhere.
async fn tcp(mut stream: Upgraded, port: u16) {
    if port != 22 {
        let error = Some("Connection refused".to_owned());
        line(&mut stream, &TunnelHeader { error }).await;
        let _ = stream.shutdown().await;
        return;
    }
    line(&mut stream, &TunnelHeader { error: None }).await;
    let _ = stream.write_all(b"SSH-2.0-simulated\r\n").await;
    let _ = stream.flush().await;
    let mut bytes = vec![0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut bytes).await {
        if stream.write_all(&bytes[..count]).await.is_err() || stream.flush().await.is_err() {
            return;
        }
    }
    let _ = stream.shutdown().await;
}
