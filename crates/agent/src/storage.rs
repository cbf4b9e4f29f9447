//! Images and volumes.
//!
//! An image is fetched once: its compressed bytes are hashed and unpacked in one pass, with holes where it is empty,
//! and take their name only when the hash is right. A volume is a qcow2 overlay on such an image; nothing is copied.
//! The name of its base inside the overlay is a mere word: the monitor gets both as open files and opens nothing.

use crate::durable;
use crate::error::{Error, Result};
use crate::names::Folders;
use imago::FormatCreateBuilder;
use imago::file::File as ImageFile;
use imago::qcow2::Qcow2CreateBuilder;
use roost_types::agent::{ImageSpec, InstanceSpec, VolumeSpec};
use roost_types::ids::BlobId;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::io::AsyncRead;
use tokio_util::io::SyncIoBridge;

/// Largest unpacked image: a few kilobytes of zstd can claim any size.
const UNPACKED_MAX: u64 = 1 << 40;
/// Unit of holes.
const BLOCK: usize = 64 * 1024;

/// Bytes that come from somewhere.
pub type Bytes = Box<dyn AsyncRead + Send + Unpin>;
/// A stream that is being opened.
pub type Opening<'a> = Pin<Box<dyn Future<Output = Result<Bytes>> + Send + 'a>>;

/// Where blobs come from: the controller, or a folder in tests.
pub trait BlobSource: Send + Sync {
    /// The compressed bytes of a blob.
    fn open(&self, blob: &BlobId) -> Opening<'_>;
}

/// The images of one host.
pub struct Images {
    folders: Folders,
    source: Arc<dyn BlobSource>,
    fetching: Mutex<BTreeMap<BlobId, Arc<tokio::sync::Mutex<()>>>>,
}

/// The blobs of an image.
pub fn blobs(image: &ImageSpec) -> Vec<&BlobId> {
    [Some(&image.kernel), image.initrd.as_ref(), Some(&image.root)].into_iter().flatten().collect()
}

impl Images {
    /// Images below `folders.state`, fetched from `source`.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn new(folders: Folders, source: Arc<dyn BlobSource>) -> Result<Self> {
        durable::make_folder(&folders.images())?;
        durable::make_folder(&folders.volumes())?;
        // What an earlier agent did not finish is begun again.
        for entry in fs::read_dir(folders.images()).map_err(Error::file("list", folders.images()))?.flatten()
        {
            if entry.path().extension().is_some_and(|extension| extension == "part") {
                durable::remove_file(&entry.path())?;
            }
        }
        Ok(Self { folders, source, fetching: Mutex::default() })
    }

    /// Whether all blobs of an image are here.
    pub fn present(&self, image: &ImageSpec) -> bool {
        blobs(image).into_iter().all(|blob| self.folders.image(blob).exists())
    }

    /// Fetches what is missing. Two instances that need the same blob share one fetch.
    ///
    /// # Errors
    /// The controller does not give it, it is damaged, or the disk is full.
    pub async fn fetch(&self, image: &ImageSpec) -> Result<()> {
        for blob in blobs(image) {
            let turn = {
                let mut fetching = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
                Arc::clone(fetching.entry(blob.clone()).or_default())
            };
            let _turn = turn.lock().await;
            let path = self.folders.image(blob);
            if !path.exists() {
                let bytes = self.source.open(blob).await?;
                let wanted = blob.clone();
                tokio::task::spawn_blocking(move || unpack(SyncIoBridge::new(bytes), &wanted, &path))
                    .await
                    .map_err(|error| Error::NotNow(format!("unpacking was cut short: {error}")))??;
            }
        }
        Ok(())
    }

    /// Removes images that no one in `used` names and that have not been touched for `idle`.
    ///
    /// # Errors
    /// The folder cannot be read or a file not removed.
    pub fn prune(&self, used: &BTreeSet<String>, idle: Duration) -> Result<usize> {
        let folder = self.folders.images();
        let mut removed = 0;
        for entry in fs::read_dir(&folder).map_err(Error::file("list", &folder))?.flatten() {
            let path = entry.path();
            let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default().to_owned();
            let blob = path.extension().is_some_and(|extension| extension == "raw");
            let touched = entry.metadata().and_then(|meta| Ok(meta.accessed()?.max(meta.modified()?)));
            let old =
                touched.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age > idle));
            if blob && old && !used.contains(&name) {
                durable::remove_file(&path)?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}

struct Hashing<R> {
    inner: R,
    digest: Sha256,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.digest.update(&buffer[..count]);
        Ok(count)
    }
}

/// Hashes and unpacks in one pass. The file has its name only when the hash is right.
fn unpack(bytes: impl Read, blob: &BlobId, path: &Path) -> Result<()> {
    let part = path.with_extension("part");
    let result = unpack_to(bytes, blob, &part);
    if result.is_err() {
        durable::remove_file(&part)?;
        return result;
    }
    fs::rename(&part, path).map_err(Error::file("replace", path))?;
    durable::sync_parent(path)
}

fn unpack_to(bytes: impl Read, blob: &BlobId, part: &Path) -> Result<()> {
    let mut file = File::create(part).map_err(Error::file("create", part))?;
    let mut hashing = Hashing { inner: bytes, digest: Sha256::new() };
    let unpacked = sparse_copy(&mut hashing, &mut file, part);
    // What follows the last frame belongs to the blob too; and of a blob that does not unpack the hash says whether
    // it came damaged or is no image at all.
    let drained = std::io::copy(&mut hashing, &mut std::io::sink());
    let got = BlobId::from_sha256(hashing.digest.finalize().into());
    match (unpacked, drained) {
        (_, Err(error)) => return Err(Error::io(format!("receiving blob {}", blob.as_str()))(error)),
        (unpacked, Ok(_)) if got == *blob => unpacked?,
        _ => {
            return Err(Error::NotNow(format!(
                "blob {} came damaged: its bytes have the hash {}",
                blob.as_str(),
                got.as_str()
            )));
        }
    }
    file.sync_all().map_err(Error::file("flush", part))
}

fn sparse_copy(packed: &mut impl Read, file: &mut File, path: &Path) -> Result<()> {
    let broken = |error: std::io::Error| Error::Impossible(format!("a blob is no zstd file: {error}"));
    let mut reader = zstd::stream::read::Decoder::new(packed).map_err(broken)?;
    let mut block = vec![0; BLOCK];
    let mut length = 0_u64;
    loop {
        let count = fill(&mut reader, &mut block).map_err(broken)?;
        if count == 0 {
            break;
        }
        if length + count as u64 > UNPACKED_MAX {
            return Err(Error::Impossible(format!("a blob unpacks to more than {UNPACKED_MAX} bytes")));
        }
        if block[..count].iter().all(|byte| *byte == 0) {
            file.seek(SeekFrom::Current(i64::try_from(count).unwrap_or(0)))
                .map_err(Error::file("seek in", path))?;
        } else {
            file.write_all(&block[..count]).map_err(Error::file("write", path))?;
        }
        length += count as u64;
    }
    file.set_len(length).map_err(Error::file("size", path))
}

fn fill(reader: &mut impl Read, block: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < block.len() {
        match reader.read(&mut block[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Makes the root volume, if it is not there. Blocks.
///
/// # Errors
/// The volume is smaller than its image, or the disk is full.
pub fn make_volume(folders: &Folders, spec: &InstanceSpec) -> Result<()> {
    let VolumeSpec { volume_id, size_gib, .. } = &spec.root_volume;
    let path = folders.volume(volume_id);
    if path.exists() {
        return Ok(());
    }
    let size = size_gib << 30;
    let base = folders.image(&spec.image.root);
    let least = fs::metadata(&base).map_err(Error::file("look at", &base))?.len();
    if least > size {
        return Err(Error::Impossible(format!(
            "the volume of {size_gib} GiB is smaller than its image, which takes {} GiB",
            least.div_ceil(1 << 30)
        )));
    }
    let part = path.with_extension("part");
    durable::remove_file(&part)?;
    let options = || File::options().read(true).write(true).create_new(true).open(&part);
    let file = options().map_err(Error::file("create", &part))?;
    let flush = file.try_clone().map_err(Error::file("open", &part))?;
    let image = ImageFile::try_from(file).map_err(Error::file("open", &part))?;
    Qcow2CreateBuilder::<ImageFile>::new(image)
        .size(size)
        .backing("base".into(), "raw".into())
        .create()
        .map_err(Error::file("make a qcow2 overlay in", &part))?;
    flush.sync_all().map_err(Error::file("flush", &part))?;
    fs::rename(&part, &path).map_err(Error::file("replace", &path))?;
    durable::sync_parent(&path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::ensure;
    use std::os::unix::fs::MetadataExt;
    use std::sync::atomic::{AtomicU32, Ordering};

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

    fn pack(raw: &[u8]) -> (BlobId, Vec<u8>) {
        let packed = zstd::encode_all(raw, 1).unwrap();
        (BlobId::from_sha256(Sha256::digest(&packed).into()), packed)
    }

    fn world(blobs: Vec<(BlobId, Vec<u8>)>) -> (tempfile::TempDir, Folders, Arc<Shelf>, Arc<Images>) {
        let folder = tempfile::tempdir().unwrap();
        let folders =
            Folders { state: folder.path().into(), run: "/nowhere".into(), netns: "/nowhere".into() };
        let shelf = Arc::new(Shelf { blobs: blobs.into_iter().collect(), opened: AtomicU32::new(0) });
        let images = Images::new(folders.clone(), shelf.clone()).unwrap();
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
        durable::remove_file(&path).unwrap();
        assert!(make_volume(&folders, &spec).unwrap_err().to_string().contains("smaller than its image"));
    }
}
