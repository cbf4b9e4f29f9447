//! How much a client may take.

use crate::harness::{Client, DEADLINE, Server, refusal};
use reqwest::{Method, StatusCode};
use roost_controller::server::Limits;
use roost_controller::server::doors::DoorLimits;
use roost_types::ErrorCode;
use roost_types::api::GetCallerIdentity;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

#[tokio::test]
async fn a_body_of_more_than_a_mebibyte_is_refused() {
    let server = Server::start().await;
    let client = server.admin();
    let reply =
        client.signed(Method::POST, "/v1/DescribeHosts", vec![b' '; (1 << 20) + 1], None).send().await;
    let refused = refusal(reply.unwrap()).await;
    assert_eq!(refused.code, ErrorCode::MalformedRequest);
    assert!(refused.message.contains("1048576"), "{refused:?}");
    let most = [vec![b' '; (1 << 20) - 2], b"{}".to_vec()].concat();
    let reply = client.signed(Method::POST, "/v1/DescribeHosts", most, None).send().await.unwrap();
    assert_eq!(reply.status(), StatusCode::OK);
}

#[tokio::test]
async fn a_request_has_so_many_headers_and_no_more() {
    let server = Server::start().await;
    let client = server.admin();
    let many = (0..70).fold(client.http.get(format!("{}/v1/health", client.base)), |request, n| {
        request.header(format!("x-many-{n}"), "1")
    });
    assert_eq!(many.send().await.unwrap().status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    let long = client.http.get(format!("{}/v1/health", client.base)).header("x-long", "a".repeat(100_000));
    // Answered so, or cut off while it is still sending.
    let status =
        long.send().await.map_or(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, |reply| reply.status());
    assert_eq!(status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    let fine = client.http.get(format!("{}/v1/health", client.base)).send().await.unwrap();
    assert_eq!(fine.status(), StatusCode::OK);
}

fn brief() -> Limits {
    let moment = Duration::from_millis(300);
    Limits { handshake: moment, head: moment, body: moment, write: moment, ..Limits::default() }
}

async fn raw(server: &Server) -> TlsStream<TcpStream> {
    let mut roots = rustls::RootCertStore::empty();
    let ca = server.admin_file().ca_pem;
    roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).unwrap()).unwrap();
    let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let stream = TcpStream::connect(server.api).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
}

/// Reads until the server closes, within the deadline.
async fn until_closed(mut stream: impl tokio::io::AsyncRead + Unpin) -> String {
    let mut text = Vec::new();
    let read = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut text)).await;
    // A connection that is cut rather than closed is closed as well.
    let _ = read.expect("the server closes the connection");
    String::from_utf8_lossy(&text).into_owned()
}

#[tokio::test]
async fn a_connection_that_says_nothing_is_closed() {
    let server = Server::with_limits(brief()).await;
    until_closed(TcpStream::connect(server.api).await.unwrap()).await;
    until_closed(TcpStream::connect(server.agents).await.unwrap()).await;
    assert_eq!(until_closed(raw(&server).await).await, "");
}

#[tokio::test]
async fn a_head_that_does_not_end_is_not_waited_for() {
    let server = Server::with_limits(brief()).await;
    let mut stream = raw(&server).await;
    stream.write_all(b"GET /v1/health HTTP/1.1\r\nhost: localhost\r\nx-slow").await.unwrap();
    let answer = until_closed(stream).await;
    assert!(!answer.contains("200 OK"), "{answer}");
}

/// The head of a signed request without the header of its body's hash.
fn signed_head(client: &Client, action: &str, body: &[u8]) -> String {
    let request = client.signed(Method::POST, &format!("/v1/{action}"), body.to_vec(), None).build().unwrap();
    let (port, headers) = (request.url().port().unwrap(), request.headers().iter());
    let headers = headers.map(|(name, value)| format!("{name}: {}\r\n", value.to_str().unwrap()));
    format!("POST /v1/{action} HTTP/1.1\r\nhost: localhost:{port}\r\n{}", headers.collect::<String>())
}

#[tokio::test]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let server = Server::with_limits(brief()).await;
    let mut stream = raw(&server).await;
    let head = signed_head(&server.admin(), "DescribeHosts", b"{}");
    stream.write_all(format!("{head}content-length: 2\r\n\r\n{{").as_bytes()).await.unwrap();
    let answer = until_closed(stream).await;
    assert!(answer.contains("did not come"), "{answer}");
}

#[tokio::test]
async fn nothing_of_a_body_is_waited_for_whose_signature_cannot_be_right() {
    let server = Server::start().await;
    let (admin, port) = (server.admin(), server.api.port());
    let stranger = server.client("AKIAAAAAAAAAAAAAAAAA", "secret");
    let forger = server.client(&admin.access_key_id, "not the secret");
    let unsigned =
        format!("POST /v1/DescribeHosts HTTP/1.1\r\nhost: localhost:{port}\r\nauthorization: x\r\n");
    // Without the hash header, only the key can be checked.
    let without_hash = |head: String| {
        let lines = head.split_inclusive("\r\n");
        lines.filter(|line| !line.starts_with("x-amz-content-sha256")).collect::<String>()
    };
    let unknown =
        without_hash(signed_head(&stranger, "DescribeHosts", b"{}")).replace("x-amz-content-sha256;", "");
    for head in [unsigned, unknown, signed_head(&forger, "DescribeHosts", b"{}")] {
        let mut stream = raw(&server).await;
        stream.write_all(format!("{head}content-length: 1000000\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = vec![0; 12];
        tokio::time::timeout(DEADLINE / 2, stream.read_exact(&mut answer)).await.unwrap().unwrap();
        assert_eq!(String::from_utf8_lossy(&answer), "HTTP/1.1 401", "{head}");
    }
}

/// Requests whose refusals quote them.
fn questions() -> String {
    format!("GET /{} HTTP/1.1\r\nhost: localhost\r\n\r\n", "x".repeat(3900)).repeat(50)
}

/// Sends requests on one connection without reading an answer, until the server reads no more.
async fn never_reading(server: &Server) -> TlsStream<TcpStream> {
    let (mut stream, questions) = (raw(server).await, questions());
    let full = Duration::from_millis(200);
    while let Ok(Ok(())) = tokio::time::timeout(full, stream.write_all(questions.as_bytes())).await {}
    stream
}

#[tokio::test]
async fn a_client_that_never_reads_is_closed() {
    let server = Server::with_limits(Limits { head: DEADLINE, ..brief() }).await;
    let mut stream = never_reading(&server).await;
    // The client writes until the server closes, and reads nothing.
    let closed = async { while stream.write_all(&[b' '; 1000]).await.is_ok() {} };
    tokio::time::timeout(DEADLINE, closed).await.expect("the server closes the connection");
}

#[tokio::test]
async fn connections_that_sign_nothing_keep_nobody_out() {
    let api = DoorLimits { connections: 20, per_address: 20, per_owner: 10 };
    let server = Server::with_limits(Limits { api, ..Limits::default() }).await;
    let alice = server.account("alice").await;
    let mut idle = Vec::new();
    for _ in 0..40 {
        idle.push(raw(&server).await);
    }
    for _ in 0..3 {
        let fresh = server.client(&alice.access_key_id, &alice.secret);
        let asked = tokio::time::timeout(Duration::from_secs(5), fresh.call(&GetCallerIdentity {}));
        asked.await.expect("answered at once").unwrap();
    }
}

#[tokio::test]
async fn an_account_has_so_many_connections() {
    let api = DoorLimits { connections: 20, per_address: 20, per_owner: 2 };
    let server = Server::with_limits(Limits { api, ..Limits::default() }).await;
    let (alice, bob) = (server.account("alice").await, server.account("bob").await);
    let second = server.client(&alice.access_key_id, &alice.secret);
    for client in [&alice, &second] {
        client.call(&GetCallerIdentity {}).await.unwrap();
    }
    let third = server.client(&alice.access_key_id, &alice.secret);
    let refused = third.call(&GetCallerIdentity {}).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::RequestLimitExceeded);
    bob.call(&GetCallerIdentity {}).await.unwrap();
    // The first connection is kept for its next request.
    alice.call(&GetCallerIdentity {}).await.unwrap();
}

#[tokio::test]
#[ignore = "slow: scripts/test --full"]
async fn a_thousand_clients_that_never_read_keep_nobody_out() {
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: files.maximum, maximum: files.maximum };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    let server = Server::start().await;
    let alice = server.account("alice").await;
    let mut held = Vec::new();
    for _ in 0..1024 {
        let mut stream = raw(&server).await;
        stream.write_all(questions().as_bytes()).await.unwrap();
        held.push(stream);
    }
    let fresh = server.client(&alice.access_key_id, &alice.secret);
    let asked = tokio::time::timeout(Duration::from_secs(5), fresh.call(&GetCallerIdentity {}));
    asked.await.expect("answered at once").unwrap();
}

#[tokio::test]
async fn what_a_client_sent_is_quoted_in_a_refusal_only_in_part() {
    let server = Server::start().await;
    let admin = server.admin();
    let long = "x".repeat(1_000_000);
    let deep = format!("{{\"instance_ids\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let tagged = format!(
        r#"{{"image":"a","instance_type":"t3.nano","min_count":1,"max_count":1,"tags":{{"{long}":""}}}}"#
    );
    for (action, body) in [
        ("DescribeInstances", format!(r#"{{"instance_ids":["{long}"]}}"#)),
        ("DescribeInstances", format!(r#"{{"{long}":1}}"#)),
        ("DescribeInstances", deep),
        ("RunInstances", tagged),
    ] {
        let refused = refusal(admin.post(action, &body).await).await;
        assert!(refused.message.chars().count() <= 4001, "{} characters", refused.message.len());
    }
}

#[tokio::test]
async fn where_every_connection_is_somebodys_a_newcomer_waits() {
    let api = DoorLimits { connections: 1, per_address: 1, per_owner: 1 };
    let server = Server::with_limits(Limits { api, ..brief() }).await;
    let admin = server.admin();
    admin.call(&GetCallerIdentity {}).await.unwrap();
    // The first is closed for its silence; then it is the other's turn.
    let other = server.admin();
    let asked = tokio::time::timeout(DEADLINE, other.call(&GetCallerIdentity {}));
    asked.await.unwrap().unwrap();
}
