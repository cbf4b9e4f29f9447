//! Uploads, and what agents may fetch of them.

use crate::harness::{Server, blob_id, eventually, refusal, zstd_like};
use futures_util::stream;
use reqwest::{Body, Method, StatusCode};
use roost_controller::server::Limits;
use roost_types::ErrorCode;
use std::path::PathBuf;
use std::time::Duration;

/// Everything in the folder of blobs, unfinished ones too.
fn files(server: &Server) -> Vec<PathBuf> {
    let dir = server.state.path("blobs");
    let names = |dir: PathBuf| std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    names(dir.clone()).filter(|path| path.is_file()).chain(names(dir.join("incoming"))).collect()
}

#[tokio::test]
async fn a_blob_is_there_once_it_was_uploaded_and_not_before() {
    let server = Server::start().await;
    let client = server.account("alice").await;
    let bytes = zstd_like("kernel");
    let path = format!("/v1/blobs/{}", blob_id(&bytes));
    let head = || client.signed(Method::HEAD, &path, Vec::new(), None).send();
    assert_eq!(head().await.unwrap().status(), StatusCode::NOT_FOUND);
    for _ in 0..2 {
        client.put_blob(&bytes).await;
    }
    let found = head().await.unwrap();
    assert_eq!(found.status(), StatusCode::OK);
    assert_eq!(found.headers()["content-length"], bytes.len().to_string().as_str());
    assert_eq!(files(&server).len(), 1);
    assert_eq!(std::fs::read(&files(&server)[0]).unwrap(), bytes);
}

#[tokio::test]
async fn a_blob_that_is_not_what_it_says_leaves_nothing() {
    let server = Server::start().await;
    let client = server.admin();
    let good = blob_id(&zstd_like("good"));
    let put = |id: &str, bytes: &[u8]| {
        client.signed(Method::PUT, &format!("/v1/blobs/{id}"), bytes.to_vec(), Some(id)).send()
    };
    let plain = blob_id(b"plain text");
    let large = zstd_like(&"x".repeat(1 << 20));
    for (id, bytes, named) in [
        (&good, zstd_like("evil"), good.as_str()),
        (&plain, b"plain text".to_vec(), "zstd"),
        (&blob_id(b""), Vec::new(), "0 bytes"),
        (&blob_id(&large), large.clone(), "1048576"),
    ] {
        let refused = refusal(put(id.as_str(), &bytes).await.unwrap()).await;
        assert_eq!(refused.code, ErrorCode::InvalidParameterValue);
        assert!(refused.message.contains(named), "{refused:?}");
        assert_eq!(files(&server), Vec::<PathBuf>::new());
    }
    let refused = refusal(put("../../etc/passwd", b"").await.unwrap()).await;
    assert!(matches!(refused.code, ErrorCode::InvalidAction | ErrorCode::InvalidParameterValue));
}

#[tokio::test]
async fn the_name_is_signed_and_the_upload_must_be() {
    let server = Server::start().await;
    let client = server.admin();
    let bytes = zstd_like("kernel");
    let url = format!("{}/v1/blobs/{}", client.base, blob_id(&bytes));
    let unsigned = client.http.put(&url).body(bytes.clone()).send().await.unwrap();
    assert_eq!(refusal(unsigned).await.code, ErrorCode::MissingAuthenticationToken);
    // Signed for other bytes, sent under a name that fits them.
    let path = format!("/v1/blobs/{}", blob_id(&bytes));
    let other =
        client.signed(Method::PUT, &path, bytes, Some(blob_id(b"other").as_str())).send().await.unwrap();
    assert_eq!(refusal(other).await.code, ErrorCode::AuthFailure);
    assert_eq!(files(&server), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn an_upload_that_stops_leaves_nothing() {
    let limits = Limits { body: Duration::from_millis(300), ..Limits::default() };
    let server = Server::with_limits(limits).await;
    let client = server.admin();
    let bytes = zstd_like("half of it");
    let id = blob_id(&bytes);
    let path = format!("/v1/blobs/{id}");
    let never_ending = Body::wrap_stream(stream::unfold(Some(bytes), |piece| async move {
        match piece {
            Some(piece) => Some((Ok::<_, std::io::Error>(piece), None)),
            None => std::future::pending().await,
        }
    }));
    let request = client.signed(Method::PUT, &path, Vec::new(), Some(id.as_str())).body(never_ending);
    let refused = refusal(request.send().await.unwrap()).await;
    assert_eq!(refused.code, ErrorCode::MalformedRequest);
    eventually("nothing is left", async || files(&server).is_empty()).await;
}

#[tokio::test]
async fn an_agent_gets_the_blobs_of_its_instances_images_and_no_others() {
    let server = Server::start().await;
    let admin = server.admin();
    let (one, two) = (server.host("box-1").await, server.host("box-2").await);
    let image = admin.image("debian").await;
    let stray = admin.put_blob(&zstd_like("stray")).await;
    let instance = admin.launch("debian").await;
    let desired: roost_types::agent::Desired = one.get("desired").await.unwrap();
    let (host, other) = if desired.instances.is_empty() { (two, one) } else { (one, two) };
    let desired: roost_types::agent::Desired = host.get("desired").await.unwrap();
    assert_eq!(desired.instances[0].instance_id, instance);
    let fetch = |agent: &crate::harness::Agent, id: &roost_types::BlobId| {
        agent.request(Method::GET, &format!("blobs/{id}")).send()
    };
    for id in [&image.kernel, &image.root, image.initrd.as_ref().unwrap()] {
        let reply = fetch(&host, id).await.unwrap();
        assert_eq!(reply.status(), StatusCode::OK);
        assert_eq!(blob_id(&reply.bytes().await.unwrap()), *id);
        let refused = refusal(fetch(&other, id).await.unwrap()).await;
        assert_eq!(refused.code, ErrorCode::InvalidBlobNotFound);
    }
    let refused = refusal(fetch(&host, &stray).await.unwrap()).await;
    assert!(refused.message.contains(stray.as_str()), "{refused:?}");
}
