//! A file in the guest's memory: where it is mapped, and what KVM is told about it.
//!
//! ```text
//!   start             end of the file's last page            start + size, a multiple of 2 MiB
//!     ├─── the file ────┼─── anonymous pages, of a read-only one alone ───┤
//! ```
//! A file that may be written is shared: what the guest stores is in the host's page cache at once, and a flush puts it on stable
//! storage. A read-only one is mapped privately and writable, behind a slot of KVM's that the guest cannot write: pages that are only
//! read are those of the page cache, the same for all machines, and a device that a guest sends there writes into a copy of that
//! machine's own instead of ending the monitor.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use crate::error::{Error, Result};
use crate::memory::{self, Dirty, Memory, PAGE, Range};

/// What addresses and sizes of regions are multiples of (virtio 1.2, 5.19.4; Linux's for memory that it adds).
pub const ALIGNMENT: u64 = 2 << 20;

/// A file in the guest's memory.
pub struct Image {
    file: File,
    range: Range,
    region: Arc<GuestRegionMmap<Dirty>>,
    read_only: bool,
}

impl Image {
    /// Maps a file of so many bytes.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn new(file: File, bytes: u64, start: u64, read_only: bool) -> Result<Self> {
        let failed = |error: &dyn std::fmt::Display| Error::Memory(format!("mapping a pmem file: {error}"));
        let range = Range { start, size: region_size(bytes) };
        let size = usize::try_from(range.size).map_err(|error| failed(&error))?;
        let map = || {
            MmapRegionBuilder::new_with_bitmap(size, None)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
                .build()
        };
        let mapping = memory::place::aligned(size, map).map_err(|error| failed(&error))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start));
        let region = Arc::new(region.ok_or_else(|| failed(&"it ends behind the last address"))?);
        let image = Self { file, range, region, read_only };
        image.map(bytes).map_err(|error| failed(&error))?;
        Ok(image)
    }

    /// Puts the file's pages in place of those at the region's begin.
    fn map(&self, bytes: u64) -> io::Result<()> {
        let (target, size) = self.host()?;
        let length = usize::try_from(bytes.next_multiple_of(PAGE)).map_err(io::Error::other)?;
        let sharing = if self.read_only { libc::MAP_PRIVATE } else { libc::MAP_SHARED };
        let (access, kind) =
            (libc::PROT_READ | libc::PROT_WRITE, sharing | libc::MAP_FIXED | libc::MAP_NORESERVE);
        // SAFETY: only pages of this region are replaced, which nobody has seen yet.
        let mapped = unsafe { libc::mmap(target, length, access, kind, self.file.as_raw_fd(), 0) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // As for all guest memory: a crash of the monitor must not write it to the host's disk.
        // SAFETY: the range is the whole region.
        unsafe { libc::madvise(target, size, libc::MADV_DONTDUMP) };
        Ok(())
    }

    fn host(&self) -> io::Result<(*mut libc::c_void, usize)> {
        let host = self.region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?;
        Ok((host.cast(), usize::try_from(self.region.len()).map_err(io::Error::other)?))
    }

    /// As after power-on: what devices wrote into copies of a read-only file's pages is gone.
    ///
    /// # Errors
    /// The host's error.
    pub fn power_on(&self) -> io::Result<()> {
        if !self.read_only {
            return Ok(());
        }
        let (start, size) = self.host()?;
        // SAFETY: the range is the whole region, which Rust code reads only through volatile accesses, so that content may change
        // under it at any time.
        let result = unsafe { libc::madvise(start, size, libc::MADV_DONTNEED) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Puts what the guest wrote on stable storage.
    ///
    /// # Errors
    /// The host's error.
    pub fn sync(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.file.sync_data() }
    }

    /// The file.
    #[must_use]
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// Where the guest finds it.
    #[must_use]
    pub const fn range(&self) -> Range {
        self.range
    }

    /// The region.
    #[must_use]
    pub fn region(&self) -> &Arc<GuestRegionMmap<Dirty>> {
        &self.region
    }

    /// The guest may not write.
    #[must_use]
    pub const fn read_only(&self) -> bool {
        self.read_only
    }
}

/// Bytes of a region with a file of so many.
#[must_use]
pub const fn region_size(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGNMENT)
}

/// What devices reach: RAM and all files.
///
/// # Errors
/// [`Error::Memory`]: two are in one place.
pub fn reach(ram: &Memory, images: &[Arc<Image>]) -> Result<Memory> {
    let with = |memory: Memory, image: &Arc<Image>| memory.insert_region(Arc::clone(image.region()));
    let all = images.iter().try_fold(ram.clone(), with);
    all.map_err(|error| Error::Memory(format!("pmem: {error}")))
}
