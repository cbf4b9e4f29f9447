//! Uploaded files: kernels, initial RAM disks and root disks, each a zstd-compressed file named by its SHA-256.
//!
//! ```text
//! DIR/incoming/RANDOM   being received; thrown away if anything goes wrong, and at every start
//! DIR/SHA256            whole, verified, on stable storage
//!
//! receive: grant (account's cap, disk's reserve) ─→ write ─→ … ─→ verify ─→ keep: rename, note in the database
//! collect: release what no image names ─→ remove files that the database does not know
//! ```
//! A file gets its name only after its bytes match the hash. Bytes are granted before they are
//! written. Concurrent uploads, announced or chunked, therefore never take the database's reserve.

use http_body_util::BodyExt;
use hyper::body::{Body, Bytes};
use roost_types::{AccountId, ApiError, BlobId, ErrorCode};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio::time::Instant;

/// What every zstd file begins with.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Limits of uploads.
#[derive(Debug, Clone)]
pub struct BlobLimits {
    /// Most bytes of one file.
    pub file_bytes: u64,
    /// Most bytes of one account: stored files and uploads in progress.
    pub account_bytes: u64,
    /// Most uploads of one account at once.
    pub account_uploads: usize,
    /// Bytes kept free for the database, which may share the disk.
    pub reserve: u64,
    /// An upload must bring `progress` bytes, or end, within this time of waiting for the client.
    pub patience: Duration,
    /// See `patience`.
    pub progress: u64,
    /// How long a file that no image names is kept.
    pub keep_unnamed: Duration,
}

impl Default for BlobLimits {
    fn default() -> Self {
        Self {
            file_bytes: 64 << 30,
            account_bytes: 256 << 30,
            account_uploads: 8,
            reserve: 256 << 20,
            patience: Duration::from_secs(30),
            progress: 1 << 20,
            keep_unnamed: Duration::from_secs(24 * 60 * 60),
        }
    }
}

/// Returns the free bytes of the blobs' disk.
pub type Free = Box<dyn Fn() -> io::Result<u64> + Send + Sync>;

/// The folder of uploaded files.
pub struct BlobStore {
    dir: PathBuf,
    limits: BlobLimits,
    free: Free,
    under_way: Arc<Mutex<UnderWay>>,
    /// Held while a file and its row in the database appear or disappear together.
    naming: tokio::sync::Mutex<()>,
}

/// Bytes granted to uploads in progress.
#[derive(Default)]
struct UnderWay {
    /// Bytes granted and not yet written, which the disk still reports as free.
    unwritten: u64,
    accounts: BTreeMap<AccountId, Share>,
}

#[derive(Default)]
struct Share {
    uploads: usize,
    bytes: u64,
}

/// A complete, verified file without a name; removed on drop.
pub struct Received {
    incoming: Incoming,
    grant: Grant,
    id: BlobId,
}

impl BlobStore {
    /// Opens the folder, makes it if need be, and clears away what was never finished.
    ///
    /// # Errors
    /// If the folder cannot be made or cleared.
    pub fn open(dir: PathBuf, limits: BlobLimits) -> io::Result<Self> {
        let on = dir.clone();
        let free = move || {
            let stat = rustix::fs::statvfs(&on)?;
            Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
        };
        Self::open_with(dir, limits, Box::new(free))
    }

    /// As [`Self::open`], with a function that reports the free disk.
    ///
    /// # Errors
    /// Errors of [`Self::open`].
    pub fn open_with(dir: PathBuf, limits: BlobLimits, free: Free) -> io::Result<Self> {
        let incoming = dir.join("incoming");
        match std::fs::remove_dir_all(&incoming) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => std::fs::create_dir_all(&incoming)?,
        }
        let naming = tokio::sync::Mutex::new(());
        Ok(Self { dir, limits, free, under_way: Arc::default(), naming })
    }

    /// Where a blob lies, whether it is there or not.
    pub fn path(&self, id: &BlobId) -> PathBuf {
        self.dir.join(id.as_str())
    }

    /// The size of a blob that is there.
    pub fn size(&self, id: &BlobId) -> Option<u64> {
        std::fs::metadata(self.path(id)).ok().filter(std::fs::Metadata::is_file).map(|meta| meta.len())
    }

    /// Receives a blob for an account that has `stored` bytes already. The file has no name until
    /// [`Self::keep`].
    ///
    /// # Errors
    /// `InvalidParameterValue` if the bytes are not those of the id, not zstd, or too many;
    /// `MalformedQueryString` if they stop coming; `RequestLimitExceeded` if the account has too
    /// many; `Unavailable` if the disk is full.
    pub async fn receive<B>(
        &self,
        id: &BlobId,
        unique: &str,
        (account, stored): (&AccountId, u64),
        announced: Option<u64>,
        body: B,
    ) -> Result<Received, ApiError>
    where
        B: Body<Data = Bytes> + Send + Unpin,
        B::Error: std::fmt::Display,
    {
        let mut grant = self.begin(account, stored)?;
        self.grow(&mut grant, announced.unwrap_or(0))?;
        let incoming = Incoming { path: self.dir.join("incoming").join(unique) };
        self.fill(&incoming.path, id, &mut grant, body).await?;
        Ok(Received { incoming, grant, id: id.clone() })
    }

    /// Names a received file, records it through `note`, and returns its size. `note` gets the
    /// size, and refuses if the account's other uploads have taken its room meanwhile.
    ///
    /// Errors of `note`; `InternalError` or `Unavailable` if the disk fails.
    pub async fn keep<N, F>(&self, received: Received, note: N) -> Result<u64, ApiError>
    where
        N: FnOnce(u64) -> F,
        F: Future<Output = Result<(), ApiError>>,
    {
        let _naming = self.naming.lock().await;
        let size = received.grant.bytes;
        let rename = async {
            tokio::fs::rename(&received.incoming.path, self.path(&received.id)).await?;
            File::open(&self.dir).await?.sync_all().await
        };
        rename.await.map_err(|error| disk_error(&error))?;
        // The next `collect` removes a file whose row was refused.
        note(size).await?;
        Ok(size)
    }

    /// Runs `release`, which deletes rows of the database. Then removes the files that `known` does
    /// not list.
    ///
    /// # Errors
    /// Errors of `release` and `known`; `InternalError` if the folder cannot be read.
    pub async fn collect<R>(
        &self,
        release: impl Future<Output = Result<R, ApiError>>,
        known: impl Fn(&BlobId) -> Result<bool, ApiError> + Send + 'static,
    ) -> Result<R, ApiError> {
        let _naming = self.naming.lock().await;
        let released = release.await?;
        let dir = self.dir.clone();
        crate::server::reply::blocking(move || {
            for entry in std::fs::read_dir(&dir).map_err(|error| disk_error(&error))? {
                let entry = entry.map_err(|error| disk_error(&error))?;
                let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<BlobId>().ok()) else {
                    continue;
                };
                if !known(&id)? {
                    let bytes = entry.metadata().map_or(0, |meta| meta.len());
                    std::fs::remove_file(entry.path()).map_err(|error| disk_error(&error))?;
                    tracing::info!(blob = %id, bytes, "blob removed: no image needs it");
                }
            }
            Ok(())
        })
        .await?;
        Ok(released)
    }

    /// Refuses `more` bytes for an account that has `stored` bytes if the sum exceeds its limit.
    ///
    /// # Errors
    /// `RequestLimitExceeded`.
    pub fn check_account(&self, stored: u64, under_way: u64, more: u64) -> Result<(), ApiError> {
        let most = self.limits.account_bytes;
        if stored.saturating_add(under_way).saturating_add(more) <= most {
            return Ok(());
        }
        Err(ApiError::new(
            ErrorCode::RequestLimitExceeded,
            format!(
                "the account has {stored} bytes of uploaded files and is uploading {}, allowed are {most}: withdraw \
                 images that are no longer needed",
                under_way.saturating_add(more)
            ),
        ))
    }

    fn begin(&self, account: &AccountId, stored: u64) -> Result<Grant, ApiError> {
        let mut under_way = lock(&self.under_way);
        let share = under_way.accounts.entry(account.clone()).or_default();
        let most = self.limits.account_uploads;
        if share.uploads >= most {
            return Err(ApiError::new(
                ErrorCode::RequestLimitExceeded,
                format!(
                    "the account has {most} uploads under way, which is the most: wait until one has ended"
                ),
            ));
        }
        share.uploads += 1;
        drop(under_way);
        let under_way = Arc::clone(&self.under_way);
        Ok(Grant { under_way, account: account.clone(), stored, bytes: 0, unwritten: 0 })
    }

    /// Grants an upload `more` bytes if the file's, the account's and the disk's limits allow.
    fn grow(&self, grant: &mut Grant, more: u64) -> Result<(), ApiError> {
        let size = grant.bytes.saturating_add(more);
        if size > self.limits.file_bytes {
            return Err(self.too_big(size));
        }
        let mut under_way = lock(&self.under_way);
        let others = under_way.accounts.get(&grant.account).map_or(0, |share| share.bytes);
        self.check_account(grant.stored, others, more)?;
        let free = (self.free)().map_err(|error| disk_error(&error))?;
        let taken = under_way.unwritten.saturating_add(more);
        let reserve = self.limits.reserve;
        if free < taken.saturating_add(reserve) {
            return Err(ApiError::new(
                ErrorCode::Unavailable,
                format!(
                    "the controller's disk is full: uploads need {taken} bytes more, {free} bytes are free and \
                     {reserve} of them are kept for the database"
                ),
            ));
        }
        under_way.unwritten = taken;
        if let Some(share) = under_way.accounts.get_mut(&grant.account) {
            share.bytes += more;
        }
        grant.bytes += more;
        grant.unwritten += more;
        Ok(())
    }

    fn too_big(&self, size: u64) -> ApiError {
        let most = self.limits.file_bytes;
        ApiError::new(
            ErrorCode::InvalidParameterValue,
            format!("the file has {size} bytes or more, allowed are {most}"),
        )
    }

    async fn fill<B>(&self, path: &Path, id: &BlobId, grant: &mut Grant, mut body: B) -> Result<(), ApiError>
    where
        B: Body<Data = Bytes> + Send + Unpin,
        B::Error: std::fmt::Display,
    {
        let disk = |error: io::Error| disk_error(&error);
        let mut file = File::create_new(path).await.map_err(disk)?;
        let (mut hash, mut size, mut head) = (Sha256::new(), 0_u64, Vec::with_capacity(4));
        // Only time and bytes of waiting for the client count, not the time of our own disk.
        let (mut waited, mut brought) = (Duration::ZERO, 0_u64);
        loop {
            let from = Instant::now();
            let left = self.limits.patience.saturating_sub(waited);
            let frame = tokio::time::timeout(left, body.frame()).await.map_err(|_| {
                let patience = self.limits.patience.as_secs_f32();
                broken(&format!("{brought} bytes came in {patience} s after {} bytes", size - brought))
            })?;
            waited += from.elapsed();
            let Some(frame) = frame else { break };
            let frame = frame.map_err(|error| broken(&format!("it ended after {size} bytes: {error}")))?;
            let Ok(data) = frame.into_data() else { continue };
            let came = data.len() as u64;
            (size, brought) = (size + came, brought + came);
            if brought >= self.limits.progress {
                (waited, brought) = (Duration::ZERO, 0);
            }
            self.grow(grant, size.saturating_sub(grant.bytes))?;
            head.extend(data.iter().take(ZSTD_MAGIC.len() - head.len()));
            if !ZSTD_MAGIC.starts_with(&head) {
                return Err(ApiError::new(
                    ErrorCode::InvalidParameterValue,
                    "the file is not zstd-compressed: kernels, initial RAM disks and root disks are uploaded as zstd files",
                ));
            }
            hash.update(&data);
            file.write_all(&data).await.map_err(disk)?;
            grant.wrote(came);
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
        file.sync_all().await.map_err(disk)
    }
}

fn lock(under_way: &Mutex<UnderWay>) -> MutexGuard<'_, UnderWay> {
    // No code panics while it holds the lock. After a panic, the sums would still be sums.
    under_way.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes granted to one upload; returned on drop.
struct Grant {
    under_way: Arc<Mutex<UnderWay>>,
    account: AccountId,
    /// Bytes that the account had when the upload began.
    stored: u64,
    bytes: u64,
    unwritten: u64,
}

impl Grant {
    fn wrote(&mut self, bytes: u64) {
        lock(&self.under_way).unwritten -= bytes;
        self.unwritten -= bytes;
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        let mut under_way = lock(&self.under_way);
        under_way.unwritten -= self.unwritten;
        if let Some(share) = under_way.accounts.get_mut(&self.account) {
            share.bytes -= self.bytes;
            share.uploads -= 1;
            if share.uploads == 0 {
                under_way.accounts.remove(&self.account);
            }
        }
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
