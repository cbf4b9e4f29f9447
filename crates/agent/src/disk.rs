//! The host's disk: volumes are thin and grow while their guests write, beside the records of the agent and, where both
//! stand on one file system, the controller's database. Below the reserve nothing new is put on it.

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

    /// Looks; gives the owner's sentence if less than the reserve is free. It is over when a quarter more is.
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

    /// Whether less than the reserve was free at the last look.
    pub fn is_low(&self) -> bool {
        self.low.load(Ordering::Relaxed)
    }

    /// Looks before something new is put on the disk.
    ///
    /// # Errors
    /// The reserve is not free.
    pub fn has_room(&self) -> Result<()> {
        require(&self.folders.state, self.reserve)
    }
}

/// Whether the disk of a folder has this much free.
///
/// # Errors
/// It has not, which is worth another try.
pub fn require(folder: &Path, reserve: u64) -> Result<()> {
    let free = free(folder)?;
    if free >= reserve { Ok(()) } else { Err(Error::NotNow(full(free, reserve))) }
}

const fn is_low(free: u64, reserve: u64, was: bool) -> bool {
    free < if was { reserve.saturating_add(reserve / 4) } else { reserve }
}

/// Why something has to wait, for the tenant.
pub fn full(free: u64, reserve: u64) -> String {
    format!("the host's disk is full: {} MiB are free, and {} MiB are kept free", free >> 20, reserve >> 20)
}

/// Bytes that are free for whoever is not root.
fn free(folder: &Path) -> Result<u64> {
    let disk = rustix::fs::statvfs(folder).map_err(|error| Error::file("measure", folder)(error.into()))?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Bytes that the files of a folder take on the disk.
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
