//! Uploaded files: kernels, initial RAM disks and root disks, each a zstd-compressed file named by its SHA-256.
//!
//! ```text
//! DIR/incoming/RANDOM   being received; thrown away if anything goes wrong, and at every start
//! DIR/SHA256            whole, verified, on stable storage
//! ```
//! A file has its name only once its bytes are those of the name.

use http_body_util::BodyExt;
use hyper::body::{Body, Bytes};
use roost_types::{ApiError, BlobId, ErrorCode};
use sha2::{Digest, Sha256};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::fs::File;
use tokio::io::AsyncWriteExt;

/// What every zstd file begins with.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Kept free for the database, which may share the disk.
const RESERVE: u64 = 256 << 20;

/// The folder of uploaded files.
pub struct BlobStore {
    dir: PathBuf,
    max_bytes: u64,
    /// Longest wait for the next piece of an upload.
    patience: Duration,
}

impl BlobStore {
    /// Opens the folder, makes it if need be, and clears away what was never finished.
    ///
    /// # Errors
    /// If the folder cannot be made or cleared.
    pub fn open(dir: PathBuf, max_bytes: u64, patience: Duration) -> io::Result<Self> {
        let incoming = dir.join("incoming");
        match std::fs::remove_dir_all(&incoming) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => std::fs::create_dir_all(&incoming)?,
        }
        Ok(Self { dir, max_bytes, patience })
    }

    /// Where a blob lies, whether it is there or not.
    pub fn path(&self, id: &BlobId) -> PathBuf {
        self.dir.join(id.as_str())
    }

    /// The size of a blob that is there.
    pub fn size(&self, id: &BlobId) -> Option<u64> {
        std::fs::metadata(self.path(id)).ok().filter(std::fs::Metadata::is_file).map(|meta| meta.len())
    }

    /// Receives a blob and answers its size. Until the last byte is verified and durable, nothing has its name.
    ///
    /// # Errors
    /// `InvalidParameterValue` if the bytes are not those of the id, not zstd, or too many; `MalformedQueryString`
    /// if they stop coming; `Unavailable` if the disk is full.
    pub async fn receive<B>(
        &self,
        id: &BlobId,
        unique: &str,
        announced: Option<u64>,
        body: B,
    ) -> Result<u64, ApiError>
    where
        B: Body<Data = Bytes> + Send + Unpin,
        B::Error: std::fmt::Display,
    {
        self.check_room(announced)?;
        let incoming = Incoming { path: self.dir.join("incoming").join(unique) };
        let size = self.fill(&incoming.path, id, body).await?;
        let rename = async {
            tokio::fs::rename(&incoming.path, self.path(id)).await?;
            File::open(&self.dir).await?.sync_all().await
        };
        rename.await.map_err(|error| disk_error(&error))?;
        Ok(size)
    }

    fn check_room(&self, announced: Option<u64>) -> Result<(), ApiError> {
        let wanted = announced.unwrap_or(0);
        if wanted > self.max_bytes {
            return Err(self.too_big(wanted));
        }
        let stat = rustix::fs::statvfs(&self.dir).map_err(|errno| disk_error(&errno.into()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if free < wanted.saturating_add(RESERVE) {
            return Err(ApiError::new(
                ErrorCode::Unavailable,
                format!(
                    "the controller's disk is full: the file has {wanted} bytes, {free} bytes are free and {RESERVE} of them are kept for the database"
                ),
            ));
        }
        Ok(())
    }

    fn too_big(&self, size: u64) -> ApiError {
        let most = self.max_bytes;
        ApiError::new(
            ErrorCode::InvalidParameterValue,
            format!("the file has {size} bytes or more, allowed are {most}"),
        )
    }

    async fn fill<B>(&self, path: &Path, id: &BlobId, mut body: B) -> Result<u64, ApiError>
    where
        B: Body<Data = Bytes> + Send + Unpin,
        B::Error: std::fmt::Display,
    {
        let disk = |error: io::Error| disk_error(&error);
        let mut file = File::create_new(path).await.map_err(disk)?;
        let (mut hash, mut size, mut head) = (Sha256::new(), 0_u64, Vec::with_capacity(4));
        loop {
            let frame = tokio::time::timeout(self.patience, body.frame()).await.map_err(|_| {
                broken(&format!("nothing came for {} s after {size} bytes", self.patience.as_secs()))
            })?;
            let Some(frame) = frame else { break };
            let frame = frame.map_err(|error| broken(&format!("it ended after {size} bytes: {error}")))?;
            let Ok(data) = frame.into_data() else { continue };
            size += data.len() as u64;
            if size > self.max_bytes {
                return Err(self.too_big(size));
            }
            head.extend(data.iter().take(ZSTD_MAGIC.len() - head.len()));
            if !ZSTD_MAGIC.starts_with(&head) {
                return Err(ApiError::new(
                    ErrorCode::InvalidParameterValue,
                    "the file is not zstd-compressed: kernels, initial RAM disks and root disks are uploaded as zstd files",
                ));
            }
            hash.update(&data);
            file.write_all(&data).await.map_err(disk)?;
        }
        let found = BlobId::from_sha256(hash.finalize().into());
        if found != *id {
            return Err(ApiError::new(
                ErrorCode::InvalidParameterValue,
                format!("the {size} bytes received have SHA-256 {found}, not {id}"),
            ));
        }
        if head.len() < ZSTD_MAGIC.len() {
            return Err(ApiError::new(
                ErrorCode::InvalidParameterValue,
                format!("the file has {size} bytes: it is no zstd file"),
            ));
        }
        file.sync_all().await.map_err(disk)?;
        Ok(size)
    }
}

/// A file that is being received; gone when this is dropped, unless it was renamed.
struct Incoming {
    path: PathBuf,
}

impl Drop for Incoming {
    fn drop(&mut self) {
        // Not there any more after a rename.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn broken(why: &str) -> ApiError {
    ApiError::new(ErrorCode::MalformedRequest, format!("the upload broke off: {why}"))
}

fn disk_error(error: &io::Error) -> ApiError {
    tracing::error!("blobs: {error}");
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ApiError::new(
            ErrorCode::Unavailable,
            format!("the controller's disk is full ({error}): free some space and upload again"),
        ),
        _ => {
            ApiError::new(ErrorCode::InternalError, format!("the controller cannot write its blobs: {error}"))
        }
    }
}
