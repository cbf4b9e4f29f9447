//! Uploads, and what agents may fetch of them.

use crate::harness::{Server, blob_id, eventually, refusal, zstd_like};
use futures_util::{FutureExt, StreamExt, stream};
use http_body_util::{Full, StreamBody};
use hyper::body::{Bytes, Frame};
use reqwest::{Body, Method, StatusCode};
use roost_controller::blobs::{BlobLimits, BlobStore};
use roost_controller::server::Limits;
use roost_types::api::DeregisterImage;
use roost_types::{AccountId, BlobId, ErrorCode};
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Everything in the folder of blobs, unfinished ones too.
fn files(server: &Server) -> Vec<PathBuf> {
    let dir = server.state.path("blobs");
    let names = |dir: PathBuf| std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    names(dir.clone()).filter(|path| path.is_file()).chain(names(dir.join("incoming"))).collect()
}

/// Limits with their own values for uploads.
fn with(edit: impl FnOnce(&mut BlobLimits)) -> Limits {
    let mut limits = Limits::default();
    edit(&mut limits.blobs);
    limits
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
    let server = Server::with_limits(with(|blobs| blobs.patience = Duration::from_millis(300))).await;
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
    let fetch = |agent: &crate::harness::Agent, id: &BlobId| {
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

/// Bytes of all files below a folder.
fn used(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).unwrap().map(Result::unwrap);
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => used(&entry.path()),
        Ok(meta) => meta.len(),
        // The file was removed since it was listed.
        Err(_) => 0,
    });
    sizes.sum()
}

const DISK: u64 = 1 << 20;
const RESERVE: u64 = 256 << 10;

/// Blobs on a disk of 1 MiB, of which 256 KiB are the database's.
fn small_disk(dir: &Path) -> BlobStore {
    let (of, limits) = (dir.to_owned(), BlobLimits { reserve: RESERVE, ..BlobLimits::default() });
    let free = move || Ok(DISK.saturating_sub(used(&of)));
    BlobStore::open_with(dir.to_owned(), limits, Box::new(free)).unwrap()
}

#[tokio::test]
async fn uploads_of_any_kind_and_number_leave_the_database_its_reserve() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = small_disk(dir.path());
    let account = |number: u8| AccountId::from_random([number; 8]);
    let id = BlobId::from_sha256([1; 32]);
    let piece = || Bytes::from(zstd_like(&"x".repeat(60_000)));
    // A chunked upload announces no length, and never ends.
    let endless = StreamBody::new(stream::repeat_with(|| Ok::<_, Infallible>(Frame::data(piece()))));
    let chunked = blobs.receive(&id, "one", (&account(1), 0), None, endless).await;
    let refused = chunked.err().unwrap();
    assert_eq!(refused.code, ErrorCode::Unavailable);
    assert!(refused.message.contains(&RESERVE.to_string()), "{refused}");
    assert_eq!(used(dir.path()), 0, "nothing of it stays");

    // Each announced upload would fit alone, and none has sent a byte.
    let silent = || {
        let body = StreamBody::new(stream::pending::<Result<Frame<Bytes>, Infallible>>());
        (body, Some(500 << 10))
    };
    let (first, length) = silent();
    let first_account = account(1);
    let mut first = std::pin::pin!(blobs.receive(&id, "two", (&first_account, 0), length, first));
    assert!(first.as_mut().now_or_never().is_none());
    let (second, length) = silent();
    let refused = blobs.receive(&id, "three", (&account(2), 0), length, second).await.err().unwrap();
    assert_eq!(refused.code, ErrorCode::Unavailable, "{refused}");
    // Chunks take what is left beside the first upload, and no byte more.
    let chunks = stream::repeat_with(|| Ok::<_, Infallible>(Frame::data(piece()))).take(3);
    let rest = chunks.chain(stream::pending());
    let third_account = account(3);
    let mut third =
        std::pin::pin!(blobs.receive(&id, "four", (&third_account, 0), None, StreamBody::new(rest)));
    eventually("three pieces are written", async || {
        assert!(third.as_mut().now_or_never().is_none());
        used(dir.path()) >= 3 * 60_000
    })
    .await;
    let refused = blobs.receive(&id, "five", (&account(4), 0), Some(200 << 10), Full::new(piece())).await;
    assert_eq!(refused.err().unwrap().code, ErrorCode::Unavailable);
}

#[tokio::test]
async fn an_account_has_so_many_bytes_stored_and_under_way_and_others_still_upload() {
    let limits = with(|blobs| blobs.account_bytes = 1000);
    let server = Server::with_limits(limits).await;
    let (alice, bob) = (server.account("alice").await, server.account("bob").await);
    let (one, two) = (zstd_like(&"1".repeat(600)), zstd_like(&"2".repeat(600)));
    alice.put_blob(&one).await;
    // The same file again takes no more room.
    alice.put_blob(&one).await;
    let path = format!("/v1/blobs/{}", blob_id(&two));
    let announced = alice.signed(Method::PUT, &path, two.clone(), None).send().await.unwrap();
    let refused = refusal(announced).await;
    assert_eq!(refused.code, ErrorCode::RequestLimitExceeded);
    let stored = format!("{} bytes", one.len());
    assert!(refused.message.contains(&stored) && refused.message.contains("1000"), "{refused:?}");
    let chunks = Body::wrap_stream(stream::iter([Ok::<_, std::io::Error>(two.clone())]));
    let chunked = alice.signed(Method::PUT, &path, Vec::new(), Some(blob_id(&two).as_str())).body(chunks);
    assert_eq!(refusal(chunked.send().await.unwrap()).await.code, ErrorCode::RequestLimitExceeded);
    bob.put_blob(&two).await;
}

#[tokio::test]
async fn an_upload_that_drips_ends() {
    let server = Server::with_limits(with(|blobs| {
        blobs.patience = Duration::from_millis(300);
        blobs.progress = 1000;
    }))
    .await;
    let client = server.admin();
    let bytes = zstd_like("drop");
    let drops = stream::unfold(bytes.clone(), |next| async move {
        tokio::time::sleep(Duration::from_millis(20)).await;
        Some((Ok::<_, std::io::Error>(next), vec![b'x']))
    });
    let id = blob_id(&bytes);
    let request = client.signed(Method::PUT, &format!("/v1/blobs/{id}"), Vec::new(), Some(id.as_str()));
    let refused = refusal(request.body(Body::wrap_stream(drops)).send().await.unwrap()).await;
    assert_eq!(refused.code, ErrorCode::MalformedRequest);
    assert!(refused.message.contains("0.3 s"), "{refused:?}");
    eventually("nothing is left", async || files(&server).is_empty()).await;
}

#[tokio::test]
async fn an_account_has_so_many_uploads_at_once() {
    let server = Server::with_limits(with(|blobs| blobs.account_uploads = 1)).await;
    let client = server.admin();
    let bytes = zstd_like("one of two");
    let id = blob_id(&bytes);
    let put = || client.signed(Method::PUT, &format!("/v1/blobs/{id}"), Vec::new(), Some(id.as_str()));
    let begun = bytes.clone();
    let endless = stream::once(async { Ok::<_, std::io::Error>(begun) }).chain(stream::pending());
    let first = tokio::spawn(put().body(Body::wrap_stream(endless)).send());
    eventually("the first has begun", async || !files(&server).is_empty()).await;
    let refused = refusal(put().body(bytes.clone()).send().await.unwrap()).await;
    assert_eq!(refused.code, ErrorCode::RequestLimitExceeded);
    first.abort();
    eventually("the first is over", async || files(&server).is_empty()).await;
    client.put_blob(&bytes).await;
}

#[tokio::test]
async fn a_file_is_there_only_for_accounts_that_uploaded_it() {
    let server = Server::start().await;
    let (alice, mallory) = (server.account("alice").await, server.account("mallory").await);
    let image = alice.image("secret").await;
    let head = async |id: &BlobId| {
        let path = format!("/v1/blobs/{id}");
        mallory.signed(Method::HEAD, &path, Vec::new(), None).send().await.unwrap().status()
    };
    assert_eq!(head(&image.root).await, StatusCode::NOT_FOUND);
    let refused = mallory.call(&image).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::InvalidBlobNotFound);
    assert!(refused.message.contains(image.kernel.as_str()), "{refused:?}");
    // Uploading the bytes proves possession.
    for part in ["kernel", "initrd", "root"] {
        mallory.put_blob(&zstd_like(&format!("secret {part}"))).await;
    }
    assert_eq!(head(&image.root).await, StatusCode::OK);
    mallory.call(&image).await.unwrap();
    assert_eq!(files(&server).len(), 3, "the bytes are there once");
}

#[tokio::test]
async fn a_file_goes_when_its_last_owner_gives_it_up_and_not_while_an_image_needs_it() {
    let server = Server::start().await;
    let (alice, bob) = (server.account("alice").await, server.account("bob").await);
    let image = alice.image("mine").await;
    let bytes = zstd_like("mine root");
    bob.put_blob(&bytes).await;
    let delete = async |client: &crate::harness::Client, id: &BlobId| {
        client.signed(Method::DELETE, &format!("/v1/blobs/{id}"), Vec::new(), None).send().await.unwrap()
    };
    let there = || server.state.path("blobs").join(image.root.as_str()).exists();
    let refused = refusal(delete(&alice, &image.root).await).await;
    assert_eq!(refused.code, ErrorCode::DependencyViolation);
    alice.call(&DeregisterImage { image: "mine".into() }).await.unwrap();
    assert_eq!(delete(&alice, &image.root).await.status(), StatusCode::OK);
    assert!(there(), "bob has it too");
    assert_eq!(refusal(delete(&alice, &image.root).await).await.code, ErrorCode::InvalidBlobNotFound);
    assert_eq!(delete(&bob, &image.root).await.status(), StatusCode::OK);
    assert!(!there());
}

#[tokio::test]
async fn files_that_no_image_needs_are_removed_by_themselves() {
    let server = Server::start().await;
    let _host = server.host("box-1").await;
    let admin = server.admin();
    let (kept, withdrawn) = (admin.image("kept").await, admin.image("withdrawn").await);
    admin.image("forgotten").await;
    admin.put_blob(&zstd_like("stray")).await;
    // An instance needs its image's files although the image is withdrawn.
    admin.launch("withdrawn").await;
    for image in ["withdrawn", "forgotten"] {
        admin.call(&DeregisterImage { image: image.into() }).await.unwrap();
    }
    assert_eq!(files(&server).len(), 10);
    let (dir, state) = server.stop().await;
    let server = Server::again(dir, state, with(|blobs| blobs.keep_unnamed = Duration::ZERO)).await;
    eventually("only needed ones are left", async || files(&server).len() == 6).await;
    for image in [kept, withdrawn] {
        assert!(server.state.path("blobs").join(image.root.as_str()).exists());
    }
}
