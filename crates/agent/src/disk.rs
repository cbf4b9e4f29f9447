//! The host's disk. Volumes are thin and grow while their guests write. The agent's records, and
//! often the controller's database, share the file system. The agent puts nothing new on it below
//! the reserve.

use crate::error::{Error, Result};
use crate::names::Folders;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// The disk of a state folder.
#[derive(Debug)]
pub struct Disk {
    folders: Folders,
    /// Bytes that are kept free.
    reserve: u64,
    low: AtomicBool,
}

impl Disk {
    /// The disk of `folders.state`, of which `reserve` bytes are kept free.
    pub const fn new(folders: Folders, reserve: u64) -> Self {
        Self { folders, reserve, low: AtomicBool::new(false) }
    }

    /// Reads the free space. Returns the sentence for the owner if less than the reserve is free;
    /// the sentence ends once a quarter more is free.
    ///
    /// # Errors
    /// The state folder is gone.
    pub fn look(&self) -> Result<Option<String>> {
        let free = free(&self.folders.state)?;
        let low = is_low(free, self.reserve, self.low.load(Ordering::Relaxed));
        self.low.store(low, Ordering::Relaxed);
        Ok(low.then(|| {
            let taken = |folder: PathBuf| taken(&folder) >> 20;
            format!(
                "the disk of {} has {} MiB free, and {} MiB are kept free (--reserve-disk-mib): nothing is launched \
                 here until there is room; volumes take {} MiB, images {} MiB",
                self.folders.state.display(),
                free >> 20,
                self.reserve >> 20,
                taken(self.folders.volumes()),
                taken(self.folders.images())
            )
        }))
    }

    /// Returns true if less than the reserve was free at the last look.
    pub fn is_low(&self) -> bool {
        self.low.load(Ordering::Relaxed)
    }

    /// Checks the reserve before something new is put on the disk.
    ///
    /// # Errors
    /// Less than the reserve is free.
    pub fn has_room(&self) -> Result<()> {
        require(&self.folders.state, self.reserve)
    }
}

/// Checks that a folder's disk has this many bytes free.
///
/// # Errors
/// The disk has fewer; the error is worth a retry.
pub fn require(folder: &Path, reserve: u64) -> Result<()> {
    let free = free(folder)?;
    if free >= reserve { Ok(()) } else { Err(Error::NotNow(full(free, reserve))) }
}

const fn is_low(free: u64, reserve: u64, was: bool) -> bool {
    free < if was { reserve.saturating_add(reserve / 4) } else { reserve }
}

/// The tenant's sentence about an operation that waits for disk space.
pub fn full(free: u64, reserve: u64) -> String {
    format!("the host's disk is full: {} MiB are free, and {} MiB are kept free", free >> 20, reserve >> 20)
}

/// Bytes that are free for unprivileged users.
fn free(folder: &Path) -> Result<u64> {
    let disk = rustix::fs::statvfs(folder).map_err(|error| Error::file("measure", folder)(error.into()))?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Bytes of disk that the files of a folder occupy.
pub fn taken(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|meta| meta.blocks() * 512).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(reserve: u64) -> (tempfile::TempDir, Disk) {
        let folder = tempfile::tempdir().unwrap();
        let folders =
            Folders { state: folder.path().into(), run: "/nowhere".into(), netns: "/nowhere".into() };
        (folder, Disk::new(folders, reserve))
    }

    #[test]
    fn a_disk_without_its_reserve_is_told_and_takes_nothing_new() {
        let (_folder, full) = disk(u64::MAX);
        assert!(full.look().unwrap().unwrap().contains("nothing is launched here"));
        assert!(full.is_low() && full.has_room().is_err());
        let (_folder, roomy) = disk(0);
        assert_eq!(roomy.look().unwrap(), None);
        assert!(!roomy.is_low() && roomy.has_room().is_ok());
    }

    #[test]
    fn a_disk_at_its_reserve_does_not_flap() {
        assert!(is_low(399, 400, false) && !is_low(400, 400, false));
        assert!(is_low(499, 400, true) && !is_low(500, 400, true));
    }
}
