//! The client against a small TLS server: whom it trusts, what it repeats, how it reads refusals.

use super::*;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use roost_types::api::{CreateKeyPair, DescribeKeyPairs, GetCallerIdentity, KeyPairs};
use rustls::pki_types::PrivateKeyDer;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// What the server does with each connection, by its number from 0.
type Script = fn(usize) -> &'static str;

struct Server {
    profile: Profile,
    asked: Arc<AtomicUsize>,
}

async fn server(script: Script) -> Server {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
    let tls = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("https://{}", listener.local_addr().unwrap());
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let Ok(mut stream) = acceptor.accept(tcp).await else { continue };
            let mut request = Vec::new();
            while !request.windows(4).any(|end| end == b"\r\n\r\n") {
                if stream.read_buf(&mut request).await.unwrap_or(0) == 0 {
                    break;
                }
            }
            let answer = script(count.fetch_add(1, Ordering::SeqCst));
            let _ = stream.write_all(answer.as_bytes()).await;
            let _ = stream.shutdown().await;
        }
    });
    let profile = Profile {
        endpoint,
        region: "home-1".into(),
        access_key_id: "AKIAIOSFODNN7EXAMPLE".into(),
        secret_access_key: "s".into(),
        ca_pem: cert.pem(),
        account_id: None,
    };
    Server { profile, asked }
}

const EMPTY_KEYS: &str =
    "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 16\r\n\r\n{\"key_pairs\":[]}";

#[tokio::test]
async fn an_action_whose_connection_breaks_is_repeated() {
    let server = server(|number| if number < 2 { "" } else { EMPTY_KEYS }).await;
    let client = Client::new(&server.profile).unwrap();
    let answer = client.call(&DescribeKeyPairs {}).await.unwrap();
    assert_eq!(answer, KeyPairs { key_pairs: vec![] });
    assert_eq!(server.asked.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn an_action_that_cannot_be_repeated_is_sent_once() {
    let server = server(|_| "").await;
    let client = Client::new(&server.profile).unwrap();
    let error = client.call(&CreateKeyPair { key_name: "k".into() }).await.unwrap_err();
    assert!(error.is_transport(), "{error}");
    assert_eq!(server.asked.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_refusal_keeps_its_code_message_and_request_id() {
    let server = server(|_| {
        "HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n\
         {\"Error\":{\"Code\":\"InvalidKeyPair.Duplicate\",\"Message\":\"taken\"},\"RequestId\":\"req-7\"}"
    })
    .await;
    let client = Client::new(&server.profile).unwrap();
    let error = client.call(&CreateKeyPair { key_name: "k".into() }).await.unwrap_err();
    assert_eq!((error.code(), error.exit_code()), ("InvalidKeyPair.Duplicate", 6));
    assert!(matches!(error, Error::Api { request_id: Some(id), .. } if id == "req-7"));
}

#[tokio::test]
async fn only_the_profiles_own_ca_is_trusted() {
    let (one, other) = (server(|_| EMPTY_KEYS).await, server(|_| EMPTY_KEYS).await);
    let mixed = Profile { ca_pem: other.profile.ca_pem.clone(), ..one.profile.clone() };
    let error = Client::new(&mixed).unwrap().call(&GetCallerIdentity {}).await.unwrap_err();
    assert!(error.chain().contains("certificate"), "{}", error.chain());
    assert_eq!(one.asked.load(Ordering::SeqCst), 0);
    // Streams take another road and must be as strict.
    let error = Client::new(&mixed).unwrap().open("/v1/instances/i/tcp/22").await.err().unwrap();
    assert!(error.chain().contains("certificate"), "{}", error.chain());
    assert_eq!(one.asked.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn nobody_listening_is_said_at_once_with_the_endpoint() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let server = server(|_| EMPTY_KEYS).await;
    let profile = Profile { endpoint: format!("https://{address}"), ..server.profile };
    let error = Client::new(&profile).unwrap().call(&DescribeKeyPairs {}).await.unwrap_err();
    assert!(error.to_string().contains(&format!("https://{address}")), "{error}");
    assert_eq!(error.exit_code(), crate::exit::UNAVAILABLE);
}

#[tokio::test]
async fn a_stream_begins_with_its_header_and_then_flows() {
    use roost_types::agent::ConsoleHeader;
    let server = server(|_| {
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: roost-stream\r\n\r\n\
         {\"offset\":5,\"lost\":5}\nhello"
    })
    .await;
    let client = Client::new(&server.profile).unwrap();
    let mut stream = client.open("/v1/instances/i/console?offset=0").await.unwrap();
    let header: ConsoleHeader = stream.header().await.unwrap();
    assert_eq!((header.offset, header.lost), (5, 5));
    let mut rest = String::new();
    stream.reader.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "hello");
}

#[tokio::test]
async fn a_refused_stream_says_why() {
    let server = server(|_| {
        "HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n\
         {\"Error\":{\"Code\":\"IncorrectInstanceState\",\"Message\":\"it is stopped\"},\"RequestId\":\"r\"}"
    })
    .await;
    let error = Client::new(&server.profile).unwrap().open("/v1/instances/i/tcp/22").await.err().unwrap();
    assert_eq!(
        (error.to_string().as_str(), error.exit_code()),
        ("it is stopped (IncorrectInstanceState)", 6)
    );
}
