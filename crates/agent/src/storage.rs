//! Images and volumes.
//!
//! An image is fetched once. Its compressed bytes are hashed and unpacked in one pass
//! ([`crate::unpack`]), with holes for zeroes. The file gets its name only after the hash matched.
//! A volume is a qcow2 overlay on such an image, without a copy. The base's name inside the overlay
//! is unused: the monitor gets both as open files.

use crate::durable;
use crate::error::{Error, Result};
use crate::names::Folders;
use crate::unpack::Unpacker;
use imago::FormatCreateBuilder;
use imago::file::File as ImageFile;
use imago::qcow2::Qcow2CreateBuilder;
use roost_types::agent::{ImageSpec, InstanceSpec, VolumeSpec};
use roost_types::ids::BlobId;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::io::AsyncRead;

/// Largest unpacked root disk of an image whose size the controller does not state.
const ROOT_MAX: u64 = 1 << 40;
/// Largest unpacked kernel or initial RAM disk: guest memory holds both.
const BOOT_FILE_MAX: u64 = 1 << 30;

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
    unpacker: Unpacker,
    fetching: Mutex<BTreeMap<BlobId, Arc<tokio::sync::Mutex<()>>>>,
}

/// The blobs of an image, and the bytes that each may unpack to.
pub fn blobs(image: &ImageSpec) -> Vec<(&BlobId, u64)> {
    let boot = [Some(&image.kernel), image.initrd.as_ref()].into_iter().flatten();
    let root = (&image.root, image.root_bytes.unwrap_or(ROOT_MAX));
    boot.map(|blob| (blob, BOOT_FILE_MAX)).chain([root]).collect()
}

impl Images {
    /// Images below `folders.state`, fetched from `source`.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn new(folders: Folders, source: Arc<dyn BlobSource>, unpacker: Unpacker) -> Result<Self> {
        durable::make_folder(&folders.images())?;
        durable::make_folder(&folders.volumes())?;
        // What an earlier agent did not finish is begun again.
        for entry in fs::read_dir(folders.images()).map_err(Error::file("list", folders.images()))?.flatten()
        {
            if entry.path().extension().is_some_and(|extension| extension == "part") {
                durable::remove_file(&entry.path())?;
            }
        }
        Ok(Self { folders, source, unpacker, fetching: Mutex::default() })
    }

    /// Whether all blobs of an image are here.
    pub fn present(&self, image: &ImageSpec) -> bool {
        blobs(image).into_iter().all(|(blob, _)| self.folders.image(blob).exists())
    }

    /// Fetches what is missing. Two instances that need the same blob share one fetch.
    ///
    /// # Errors
    /// The controller does not give it, it is damaged, or the disk is full.
    pub async fn fetch(&self, image: &ImageSpec) -> Result<()> {
        for (blob, most) in blobs(image) {
            let turn = {
                let mut fetching = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
                Arc::clone(fetching.entry(blob.clone()).or_default())
            };
            let _turn = turn.lock().await;
            let path = self.folders.image(blob);
            if !path.exists() {
                let bytes = self.source.open(blob).await?;
                let part = path.with_extension("part");
                if let Err(error) = self.unpacker.unpack(bytes, blob, most, &part).await {
                    durable::remove_file(&part)?;
                    return Err(error);
                }
                fs::rename(&part, &path).map_err(Error::file("replace", &path))?;
                durable::sync_parent(&path)?;
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
