//! Images and volumes on a disk: fetched, unpacked in a process of their own, made, pruned.

#![allow(clippy::unwrap_used)] // a test may panic, its helpers too

use roost_agent::error::Error;
use roost_agent::names::Folders;
use roost_agent::storage::{BlobSource, Bytes, Images, Opening, make_volume};
use roost_agent::testing::ensure;
use roost_agent::unpack::Unpacker;
use roost_types::agent::ImageSpec;
use roost_types::ids::BlobId;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

struct Shelf {
    blobs: BTreeMap<BlobId, Vec<u8>>,
    opened: AtomicU32,
}

impl BlobSource for Shelf {
    fn open(&self, blob: &BlobId) -> Opening<'_> {
        self.opened.fetch_add(1, Ordering::SeqCst);
        let bytes = self.blobs.get(blob).cloned().ok_or_else(|| Error::NotNow("no such blob".into()));
        Box::pin(async move { bytes.map(|bytes| Box::new(std::io::Cursor::new(bytes)) as Bytes) })
    }
}

fn unpacker(reserve: u64) -> Unpacker {
    Unpacker { program: env!("CARGO_BIN_EXE_roost-agent").into(), user: 2_000_000_000, reserve }
}

fn pack(raw: &[u8]) -> (BlobId, Vec<u8>) {
    let packed = zstd::encode_all(raw, 1).unwrap();
    (BlobId::from_sha256(Sha256::digest(&packed).into()), packed)
}

fn world(blobs: Vec<(BlobId, Vec<u8>)>) -> (tempfile::TempDir, Folders, Arc<Shelf>, Arc<Images>) {
    let folder = tempfile::tempdir().unwrap();
    let folders = Folders { state: folder.path().into(), run: "/nowhere".into(), netns: "/nowhere".into() };
    let shelf = Arc::new(Shelf { blobs: blobs.into_iter().collect(), opened: AtomicU32::new(0) });
    let images = Images::new(folders.clone(), shelf.clone(), unpacker(0)).unwrap();
    (folder, folders, shelf, Arc::new(images))
}

fn image(kernel: &BlobId, root: &BlobId) -> ImageSpec {
    ImageSpec { kernel: kernel.clone(), root: root.clone(), ..ensure(1).spec.image }
}

#[tokio::test]
async fn blobs_are_unpacked_with_holes_and_fetched_once_by_many() {
    let mut raw = vec![0; 8 << 20];
    raw[5 << 20] = 1;
    let (kernel, root) = (pack(b"kernel"), pack(&raw));
    let (_folder, folders, shelf, images) = world(vec![kernel.clone(), root.clone()]);
    let image = image(&kernel.0, &root.0);
    assert!(!images.present(&image));
    let many: Vec<_> = (0..5)
        .map(|_| {
            let (images, image) = (Arc::clone(&images), image.clone());
            tokio::spawn(async move { images.fetch(&image).await })
        })
        .collect();
    for one in many {
        one.await.unwrap().unwrap();
    }
    assert!(images.present(&image));
    assert_eq!(shelf.opened.load(Ordering::SeqCst), 2);
    let path = folders.image(&root.0);
    assert_eq!(fs::read(&path).unwrap(), raw);
    assert!(fs::metadata(&path).unwrap().blocks() * 512 < 1 << 20, "holes are kept");
}

#[tokio::test]
async fn a_damaged_blob_and_one_that_is_no_image_leave_nothing() {
    let (id, mut packed) = pack(b"kernel, kernel, kernel");
    let last = packed.len() - 1;
    packed[last] ^= 1;
    let junk = b"no zstd".to_vec();
    let junk_id = BlobId::from_sha256(Sha256::digest(&junk).into());
    let (_folder, folders, _, images) = world(vec![(id.clone(), packed), (junk_id.clone(), junk)]);
    let error = images.fetch(&image(&id, &id)).await.unwrap_err();
    assert!(error.to_string().contains("came damaged") && !error.is_permanent(), "{error}");
    let error = images.fetch(&image(&junk_id, &junk_id)).await.unwrap_err();
    assert!(error.to_string().contains("no zstd file") && error.is_permanent(), "{error}");
    assert_eq!(fs::read_dir(folders.images()).unwrap().count(), 0);
}

#[tokio::test]
async fn unused_old_images_are_pruned_and_others_stay() {
    let (a, b) = (pack(b"a"), pack(b"b"));
    let (_folder, folders, _, images) = world(vec![a.clone(), b.clone()]);
    images.fetch(&image(&a.0, &b.0)).await.unwrap();
    let used = BTreeSet::from([a.0.as_str().to_owned()]);
    assert_eq!(images.prune(&used, Duration::from_secs(3600)).unwrap(), 0, "too young");
    let old = SystemTime::now() - Duration::from_secs(7200);
    for blob in [&a.0, &b.0] {
        let times = fs::FileTimes::new().set_accessed(old).set_modified(old);
        File::options().write(true).open(folders.image(blob)).unwrap().set_times(times).unwrap();
    }
    assert_eq!(images.prune(&used, Duration::from_secs(3600)).unwrap(), 1);
    assert!(folders.image(&a.0).exists() && !folders.image(&b.0).exists());
}

#[tokio::test]
async fn a_volume_is_an_empty_overlay_of_the_asked_size_and_is_made_once() {
    let raw = vec![7; 3 << 20];
    let root = pack(&raw);
    let (_folder, folders, _, images) = world(vec![root.clone()]);
    let mut spec = ensure(1).spec;
    spec.image = image(&root.0, &root.0);
    images.fetch(&spec.image).await.unwrap();
    make_volume(&folders, &spec).unwrap();
    let path = folders.volume(&spec.root_volume.volume_id);
    let header = fs::read(&path).unwrap();
    assert_eq!(header[..4], *b"QFI\xfb");
    assert_eq!(header[24..32], (1_u64 << 30).to_be_bytes());
    assert!(header.len() < 1 << 20);
    let before = fs::metadata(&path).unwrap().ino();
    make_volume(&folders, &spec).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().ino(), before);
    spec.root_volume.size_gib = 0;
    fs::remove_file(&path).unwrap();
    assert!(make_volume(&folders, &spec).unwrap_err().to_string().contains("smaller than its image"));
}

/// A few kilobytes unpack to any size: neither the disk nor the memory of the host pays for it.
#[tokio::test]
async fn a_blob_that_unpacks_to_more_than_its_image_says_is_refused_for_good_and_leaves_nothing() {
    const SAYS: usize = 4 << 20;
    let (exact, more) = (pack(&vec![1; SAYS]), pack(&vec![1; SAYS + 1]));
    let (_folder, folders, _, images) = world(vec![exact.clone(), more.clone()]);
    let says = |root: &BlobId| ImageSpec { root_bytes: Some(SAYS as u64), ..image(&exact.0, root) };
    images.fetch(&says(&exact.0)).await.unwrap();
    let error = images.fetch(&says(&more.0)).await.unwrap_err();
    assert!(error.to_string().contains("unpacks to more than the 4194304 bytes"), "{error}");
    assert!(error.is_permanent());
    assert_eq!(fs::read_dir(folders.images()).unwrap().count(), 1, "only the honest one is here");
}

/// The frame's header asks for a window of 2 GiB.
#[tokio::test]
async fn a_blob_that_wants_more_memory_than_zstd_takes_by_default_is_refused() {
    let blob = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x01, 0x00, 0x00];
    let id = BlobId::from_sha256(Sha256::digest(blob).into());
    let (_folder, _, _, images) = world(vec![(id.clone(), blob.to_vec())]);
    let error = images.fetch(&image(&id, &id)).await.unwrap_err();
    assert!(error.is_permanent() && error.to_string().contains("memory"), "{error}");
}

#[tokio::test]
async fn nothing_is_unpacked_into_the_reserve_of_the_disk() {
    let root = pack(b"root");
    let (folder, _, shelf, _) = world(vec![root.clone()]);
    let folders = Folders { state: folder.path().into(), run: "/nowhere".into(), netns: "/nowhere".into() };
    let images = Images::new(folders.clone(), shelf, unpacker(u64::MAX)).unwrap();
    let error = images.fetch(&image(&root.0, &root.0)).await.unwrap_err();
    assert!(error.to_string().contains("kept free") && !error.is_permanent(), "{error}");
    assert_eq!(fs::read_dir(folders.images()).unwrap().count(), 0);
}

/// The process has its three descriptors, another user if the test is root, and nothing else.
#[test]
fn the_unpacking_process_is_locked_down_while_it_reads_its_first_byte() {
    let folder = tempfile::tempdir().unwrap();
    let output = File::create(folder.path().join("part")).unwrap();
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_roost-agent"))
        .args(["unpack", "--most", "1048576", "--reserve", "0", "--user", "2000000000"])
        .stdin(std::process::Stdio::piped())
        .stdout(output)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let read = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", child.id())).unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    let status = loop {
        let status = read("status");
        if status.contains("Seccomp:\t2") && read("stat").contains(") S ") {
            break status;
        }
        assert!(std::time::Instant::now() < deadline, "never locked down:\n{status}");
        std::thread::yield_now();
    };
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    if rustix::process::geteuid().is_root() {
        assert!(status.contains("Uid:\t2000000000\t2000000000\t2000000000\t2000000000"), "{status}");
        assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
        assert!(status.contains("CapPrm:\t0000000000000000"), "{status}");
        let own = fs::read_link("/proc/self/ns/net").unwrap();
        assert_ne!(fs::read_link(format!("/proc/{}/ns/net", child.id())).unwrap(), own);
    }
    drop(child.stdin.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3), "an empty blob is none: {output:?}");
}
