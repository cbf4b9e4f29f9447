//! How much a client may take.

use crate::harness::{DEADLINE, Server, refusal};
use reqwest::{Method, StatusCode};
use roost_controller::server::Limits;
use roost_types::ErrorCode;
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
    Limits { handshake: moment, head: moment, body: moment, ..Limits::default() }
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

#[tokio::test]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let server = Server::with_limits(brief()).await;
    let mut stream = raw(&server).await;
    let head = "POST /v1/DescribeHosts HTTP/1.1\r\nhost: localhost\r\nauthorization: x\r\ncontent-length: 9\r\n\r\n{";
    stream.write_all(head.as_bytes()).await.unwrap();
    let answer = until_closed(stream).await;
    assert!(answer.contains("did not come"), "{answer}");
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_their_turn() {
    let limits = Limits { connections: 1, ..brief() };
    let server = Server::with_limits(limits).await;
    let first = raw(&server).await;
    let waiting = tokio::spawn({
        let client = server.admin();
        async move { client.http.get(format!("{}/v1/health", client.base)).send().await.unwrap().status() }
    });
    // The first is closed for its silence; then it is the other's turn.
    until_closed(first).await;
    assert_eq!(tokio::time::timeout(DEADLINE, waiting).await.unwrap().unwrap(), StatusCode::OK);
}
