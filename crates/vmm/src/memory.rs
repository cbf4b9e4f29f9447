//! Guest memory: private pages with a hole below 4 GiB, anonymous but for what a kernel was loaded to (see
//! [`crate::boot::mapped`]).

pub mod huge;
pub(crate) mod place;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::bitmap::{AtomicBitmap, BS, Bitmap, NewBitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, VolatileSlice,
};

use crate::error::{Error, Result};
use crate::layout::{HIGH_RAM_START, MMIO_HOLE_START};
use crate::ranges::RangeSet;

/// Pages that this process wrote, if anybody wants to know ([`Tracking`]). The guest's own writes KVM notes.
pub type Dirty = Option<AtomicBitmap>;

/// The memory of one guest.
pub type Memory = GuestMemoryMmap<Dirty>;

/// A piece of it.
pub type Slice<'m> = VolatileSlice<'m, BS<'m, Dirty>>;

/// Bytes that are no guest's as a piece of memory, for what takes such pieces.
#[must_use]
pub fn slice_of(bytes: &mut [u8]) -> Slice<'_> {
    // SAFETY: the bytes live as long as the slice, and are borrowed for it alone.
    unsafe { VolatileSlice::with_bitmap(bytes.as_mut_ptr(), bytes.len(), None, None) }
}

/// Whether it is noted which pages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// No.
    Off,
    /// One bit per page; what diff snapshots are made from.
    On,
}

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Below this files in guest memory end (8 TiB; servers' CPUs have 46 bits of addresses and more).
const ADDRESSES: u64 = 8 << 40;

/// What Linux adds memory by.
const LINUX_BLOCK: u64 = 128 << 20;

/// Most pieces that guests may cut a file's pages into: each is a mapping of the host's, of which a process has 65,530.
const MAX_FILE_PIECES: usize = 1024;

/// Which of the guest's pages are a file's (host addresses). Who maps and who gives back share it.
#[derive(Clone, Debug, Default)]
pub struct FilePages(Arc<Mutex<RangeSet>>);

impl FilePages {
    fn lock(&self) -> MutexGuard<'_, RangeSet> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One range of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Guest physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
}

/// Where `bytes` of RAM lie: below the hole, the rest from 4 GiB up.
#[must_use]
pub fn ranges(bytes: u64) -> Vec<Range> {
    let low = bytes.min(MMIO_HOLE_START);
    let mut ranges = vec![Range { start: 0, size: low }];
    if bytes > low {
        ranges.push(Range { start: HIGH_RAM_START, size: bytes - low });
    }
    ranges
}

/// Where memory that comes and goes lies: above all RAM, at whole blocks of the device and of Linux (128 MiB), and never where
/// RAM above the hole begins.
#[must_use]
pub fn hotplug_range(mem_size_mib: u64, total_size_mib: u64, block_size_mib: u64) -> Range {
    let start = above_ram(mem_size_mib).next_multiple_of(LINUX_BLOCK.max(block_size_mib << 20));
    Range { start, size: total_size_mib << 20 }
}

fn above_ram(mem_size_mib: u64) -> u64 {
    ranges(mem_size_mib << 20).last().map_or(0, |last| last.start + last.size).max(HIGH_RAM_START + 1)
}

/// Where files of these sizes lie, one after the other: above RAM and memory that comes and goes, each at a block of Linux's, so that
/// none shares one with memory of another kind. `None`: the last ends behind all addresses that there are.
#[must_use]
pub fn file_starts(mem_size_mib: u64, hotplug: Option<Range>, sizes: &[u64]) -> Option<Vec<u64>> {
    let mut end = hotplug.map_or_else(|| above_ram(mem_size_mib), |range| range.start + range.size);
    let place = |size: &u64| {
        let start = end.checked_next_multiple_of(LINUX_BLOCK)?;
        end = start.checked_add(*size).filter(|end| *end <= ADDRESSES)?;
        Some(start)
    };
    sizes.iter().map(place).collect()
}

/// Maps the memory of a guest. Pages are taken from the host as the guest touches them.
///
/// # Errors
/// [`Error::Memory`].
pub fn create(mem_size_mib: u64) -> Result<Memory> {
    create_with(mem_size_mib, None, Tracking::Off)
}

/// The same, with a range that is no RAM at first ([`hotplug_range`]); notes which pages are written if asked to.
///
/// # Errors
/// [`Error::Memory`].
pub fn create_with(mem_size_mib: u64, hotplug: Option<Range>, tracking: Tracking) -> Result<Memory> {
    let failed =
        |error: &dyn std::fmt::Display| Error::Memory(format!("mapping {mem_size_mib} MiB: {error}"));
    let mut regions = Vec::new();
    for range in ranges(mem_size_mib << 20).into_iter().chain(hotplug) {
        let size = usize::try_from(range.size).map_err(|error| failed(&error))?;
        let dirty = (tracking == Tracking::On).then(|| AtomicBitmap::with_len(size));
        let map = || {
            MmapRegionBuilder::new_with_bitmap(size, dirty)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
                .build()
        };
        let mapping = place::aligned(size, map).map_err(|error| failed(&error))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(range.start));
        regions.push(region.ok_or_else(|| failed(&"it ends behind the last address"))?);
    }
    let memory = Memory::from_regions(regions).map_err(|error| failed(&error))?;
    for region in memory.iter() {
        // A crash of the monitor must not write a tenant's memory to the host's disk.
        advise(region, libc::MADV_DONTDUMP);
    }
    Ok(memory)
}

/// Refuses huge pages until [`use_huge_pages`], where the host gives them to all (`transparent_hugepage/enabled`: `always`):
/// what the monitor writes a few pages of need not be cleared as a whole before the guest can start.
pub fn use_small_pages(memory: &Memory) {
    for region in memory.iter() {
        advise(region, libc::MADV_NOHUGEPAGE);
    }
}

/// Asks the host for huge pages from here on. What was touched before stays as it is.
pub fn use_huge_pages(memory: &Memory) {
    for region in memory.iter() {
        advise(region, libc::MADV_HUGEPAGE);
    }
}

/// Bytes of all regions: RAM and what may become RAM.
#[must_use]
pub fn bytes(memory: &Memory) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// Maps a whole memory file in place of guest memory: region by region, from the file's start on.
///
/// # Errors
/// [`Error::Memory`].
pub fn map_all(memory: &Memory, pages: &FilePages, file: &File) -> Result<()> {
    let mut offset = 0;
    for region in memory.iter() {
        let host =
            region.get_host_address(MemoryRegionAddress(0)).map_err(Error::memory("address of a region"))?;
        let length = usize::try_from(region.len()).map_err(|error| Error::Memory(error.to_string()))?;
        if !map_file(memory, pages, host, length, file, offset) {
            return Err(Error::Memory(format!("mapping the memory file: {}", io::Error::last_os_error())));
        }
        offset += region.len();
    }
    Ok(())
}

/// Whether these host addresses are memory of the guest, of one region.
fn is_inside(memory: &Memory, start: usize, end: usize) -> bool {
    memory.iter().any(|region| {
        let host = region.get_host_address(MemoryRegionAddress(0)).map_or(0, |host| host as usize);
        let size = usize::try_from(region.len()).unwrap_or(0);
        host <= start && end <= host.saturating_add(size)
    })
}

/// Maps pages of a file in place of `length` bytes of guest memory at the host's address `target`; what the guest writes
/// there stays its own. `false`: it could not be done, and the memory is as it was.
#[must_use]
pub fn map_file(
    memory: &Memory,
    pages: &FilePages,
    target: *mut u8,
    length: usize,
    file: &File,
    offset: u64,
) -> bool {
    let (start, end) = (target as usize, (target as usize).saturating_add(length));
    let Ok(offset) = libc::off_t::try_from(offset) else { return false };
    if !is_inside(memory, start, end) || length == 0 {
        return false;
    }
    let (access, kind) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE);
    // SAFETY: only memory of the guest is replaced, which Rust code reads through volatile accesses alone; the caller
    // gives whole pages, or the call fails.
    let mapped = unsafe { libc::mmap(target.cast(), length, access, kind, file.as_raw_fd(), offset) };
    if mapped == libc::MAP_FAILED {
        return false;
    }
    // As for all guest memory. SAFETY: the mapping was just made.
    unsafe { libc::madvise(mapped, length, libc::MADV_DONTDUMP) };
    pages.lock().add(start as u64..end as u64);
    true
}

/// Gives whole pages of guest memory back to the host: the guest finds zeroes there when it looks again. Returns how many
/// bytes went: pages of a file stay as they are where more holes would cut it into too many pieces.
///
/// # Errors
/// The range is not of whole pages or leaves guest memory (nothing was done then), or the host's error.
pub fn give_back(memory: &Memory, pages: &FilePages, range: Range) -> io::Result<u64> {
    let whole = range.start.is_multiple_of(PAGE) && range.size.is_multiple_of(PAGE);
    let bytes = usize::try_from(range.size).map_err(io::Error::other)?;
    if !whole || range.size == 0 || !memory.check_range(GuestAddress(range.start), bytes) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let (mut at, mut left, mut given) = (range.start, range.size, 0);
    while left > 0 {
        let (region, offset) = memory.to_region_addr(GuestAddress(at)).ok_or(io::ErrorKind::InvalidInput)?;
        let here = left.min(region.len() - offset.raw_value());
        let host = region.get_host_address(offset).map_err(io::Error::other)?;
        given += give_back_mapped(&mut pages.lock(), host, here)?;
        let bytes = |n| usize::try_from(n).map_err(io::Error::other);
        region.bitmap().mark_dirty(bytes(offset.raw_value())?, bytes(here)?);
        (at, left) = (at + here, left - here);
    }
    Ok(given)
}

/// The same within one region: `length` bytes from the host's address `host` on.
fn give_back_mapped(pages: &mut RangeSet, host: *mut u8, length: u64) -> io::Result<u64> {
    let start = host as u64;
    let mut given = 0;
    for (piece, of_file) in pages.cut(start..start + length) {
        let bytes = piece.end - piece.start;
        let (at, count) = (usize::try_from(piece.start - start), usize::try_from(bytes));
        let (Ok(at), Ok(count)) = (at, count) else { continue };
        let target = host.wrapping_add(at);
        if of_file {
            pages.remove(piece.clone());
            if pages.len() > MAX_FILE_PIECES {
                pages.add(piece);
                continue;
            }
            // Advice alone would bring the file's bytes back.
            map_nothing(target, count)?;
        } else {
            // SAFETY: the range lies inside guest memory, which Rust code reads only through volatile accesses, so that
            // content may change under it at any time.
            let result = unsafe { libc::madvise(target.cast(), count, libc::MADV_DONTNEED) };
            if result < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        given += bytes;
    }
    Ok(given)
}

/// Puts fresh pages in place of what is mapped.
fn map_nothing(target: *mut u8, length: usize) -> io::Result<()> {
    let (access, kind) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
    );
    // SAFETY: only memory of the guest is replaced, which Rust code reads through volatile accesses alone.
    let mapped = unsafe { libc::mmap(target.cast(), length, access, kind, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // As for all guest memory. SAFETY: the mapping was just made.
    unsafe { libc::madvise(mapped, length, libc::MADV_DONTDUMP) };
    Ok(())
}

/// Gives every page back to the host: the guest finds zeroes, as after power-on. What was mapped from files is gone.
///
/// # Errors
/// [`Error::Memory`].
pub fn clear(memory: &Memory, pages: &FilePages) -> Result<()> {
    let failed = |error: io::Error| Error::Memory(format!("clearing: {error}"));
    let mut pages = pages.lock();
    for region in memory.iter() {
        let host =
            region.get_host_address(MemoryRegionAddress(0)).map_err(Error::memory("address of a region"))?;
        let start = host as u64;
        for (piece, of_file) in pages.cut(start..start + region.len()) {
            if of_file {
                let bytes = |n: u64| usize::try_from(n).map_err(|error| Error::Memory(error.to_string()));
                let target = host.wrapping_add(bytes(piece.start - start)?);
                map_nothing(target, bytes(piece.end - piece.start)?).map_err(failed)?;
                pages.remove(piece);
            }
        }
        if !advise(region, libc::MADV_DONTNEED) {
            return Err(failed(io::Error::last_os_error()));
        }
        region.bitmap().mark_dirty(0, usize::try_from(region.len()).unwrap_or(usize::MAX));
    }
    Ok(())
}

fn advise(region: &impl GuestMemoryRegion, advice: i32) -> bool {
    let Ok(pointer) = region.get_host_address(MemoryRegionAddress(0)) else { return false };
    let Ok(length) = usize::try_from(region.len()) else { return false };
    // SAFETY: pointer and length are one whole mapping of guest memory, which Rust code reads only through volatile
    // accesses, so that content may change under it at any time.
    unsafe { libc::madvise(pointer.cast(), length, advice) == 0 }
}

/// RAM above the hole, if there is any.
#[must_use]
pub fn high_ram(memory: &Memory) -> Option<Range> {
    let region = memory.iter().find(|region| region.start_addr().raw_value() == HIGH_RAM_START)?;
    Some(Range { start: HIGH_RAM_START, size: region.len() })
}

/// End of the RAM below the hole.
#[must_use]
pub fn low_end(memory: &Memory) -> u64 {
    memory.iter().next().map_or(0, |region| region.last_addr().raw_value() + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn memory_goes_around_the_hole() {
        assert_eq!(ranges(128 << 20), [Range { start: 0, size: 128 << 20 }]);
        assert_eq!(ranges(3 << 30), [Range { start: 0, size: 3 << 30 }]);
        let both = ranges((3 << 30) + 4096);
        assert_eq!(both[1], Range { start: 1 << 32, size: 4096 });
    }

    #[test]
    fn memory_that_comes_and_goes_is_above_all_ram() {
        for (ram, block) in
            [(1, 2), (128, 2), (3 << 10, 2), ((3 << 10) + 1, 2), (4 << 10, 256), (5 << 10, 1 << 10)]
        {
            let range = hotplug_range(ram, 1024, block);
            let end = ranges(ram << 20).iter().map(|ram| ram.start + ram.size).max().unwrap();
            assert!(range.start >= end && range.start > HIGH_RAM_START, "{ram} MiB: {range:?}");
            assert!(range.start.is_multiple_of((block << 20).max(128 << 20)), "{range:?}");
            assert!(range.start < end.max(HIGH_RAM_START) + (block << 20) + (128 << 20) + 1, "{range:?}");
        }
        let range = hotplug_range(128, 256, 2);
        let memory = create_with(128, Some(range), Tracking::Off).unwrap();
        assert_eq!((low_end(&memory), high_ram(&memory)), (128 << 20, None));
        memory.write_obj(7_u8, GuestAddress(range.start + range.size - 1)).unwrap();
        let both =
            create_with((3 << 10) + 4, Some(hotplug_range((3 << 10) + 4, 256, 2)), Tracking::Off).unwrap();
        assert_eq!(high_ram(&both), Some(Range { start: HIGH_RAM_START, size: 4 << 20 }));
        assert_eq!(both.iter().count(), 3);
    }

    #[test]
    fn files_are_above_all_of_it_and_share_no_block() {
        let hotplug = hotplug_range(5 << 10, 256, 2);
        let starts = file_starts(5 << 10, Some(hotplug), &[2 << 20, 130 << 20, 4 << 20]).unwrap();
        let block = 128 << 20;
        let first = (hotplug.start + hotplug.size).next_multiple_of(block);
        assert_eq!(starts, [first, first + block, first + 3 * block]);
        assert_eq!(file_starts(16, None, &[2 << 20]).unwrap(), [HIGH_RAM_START + block]);
        assert!(file_starts(16, None, &[]).unwrap().is_empty());
        assert_eq!(file_starts(16, None, &[2 << 40, 2 << 40, 2 << 40, 2 << 40]), None);
    }

    /// `VmFlags` of proc(5) of the mapping at this address of ours.
    fn flags(address: usize) -> String {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let from = smaps.find(&format!("{address:x}-")).unwrap();
        let line = smaps[from..].lines().find(|line| line.starts_with("VmFlags:")).unwrap();
        format!("{line} ")
    }

    #[test]
    fn huge_pages_are_refused_until_they_are_asked_for() {
        let memory = create(4).unwrap();
        let host = memory.get_host_address(GuestAddress(0)).unwrap() as usize;
        use_small_pages(&memory);
        assert!(flags(host).contains(" nh ") && !flags(host).contains(" hg "), "{}", flags(host));
        use_huge_pages(&memory);
        assert!(flags(host).contains(" hg ") && !flags(host).contains(" nh "), "{}", flags(host));
    }

    #[test]
    fn cleared_memory_is_zero() {
        let memory = create(4).unwrap();
        use_huge_pages(&memory);
        memory.write_obj(7_u64, GuestAddress(0x1000)).unwrap();
        clear(&memory, &FilePages::default()).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 0);
        assert_eq!(low_end(&memory), 4 << 20);
    }

    fn byte(memory: &Memory, address: u64) -> u8 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn what_is_given_back_is_zero_and_nothing_else_is() {
        // Two regions, so that a range across their border would be one across the hole.
        let memory = create(3 * 1024 + 4).unwrap();
        let pages = FilePages::default();
        for page in [0, 1, 2, 3] {
            memory.write_obj(7_u8, GuestAddress(page * PAGE)).unwrap();
        }
        assert_eq!(give_back(&memory, &pages, Range { start: PAGE, size: 2 * PAGE }).unwrap(), 2 * PAGE);
        assert_eq!([0, 1, 2, 3].map(|page| byte(&memory, page * PAGE)), [7, 0, 0, 7]);
        for (start, size) in [
            (1, PAGE),
            (PAGE, 1),
            (PAGE, 0),
            (MMIO_HOLE_START, PAGE),
            (MMIO_HOLE_START - PAGE, 2 * PAGE),
            (u64::MAX - PAGE + 1, PAGE),
            (0, u64::MAX - PAGE + 1),
        ] {
            assert!(give_back(&memory, &pages, Range { start, size }).is_err(), "{start:#x} {size:#x}");
        }
        assert_eq!(byte(&memory, 0), 7);
        give_back(&memory, &pages, Range { start: HIGH_RAM_START, size: PAGE }).unwrap();
    }

    fn with_file(file_pages: u64) -> (Memory, FilePages, File) {
        let memory = create(16).unwrap();
        let pages = FilePages::default();
        let mut file = tempfile::tempfile().unwrap();
        let bytes = usize::try_from(file_pages * PAGE).unwrap();
        io::Write::write_all(&mut file, &vec![9; bytes]).unwrap();
        let target = memory.get_host_address(GuestAddress(PAGE)).unwrap();
        assert!(map_file(&memory, &pages, target, bytes, &file, 0));
        (memory, pages, file)
    }

    #[test]
    fn pages_of_a_file_are_zero_too_and_the_file_is_as_it_was() {
        let (memory, pages, file) = with_file(8);
        memory.write_obj(5_u8, GuestAddress(3 * PAGE)).unwrap();
        // From anonymous memory across the file's pages into anonymous memory, and once more over the same.
        for _ in 0..2 {
            give_back(&memory, &pages, Range { start: 2 * PAGE, size: 3 * PAGE }).unwrap();
            let found = [1, 2, 3, 4, 5, 8, 9].map(|page| byte(&memory, page * PAGE));
            assert_eq!(found, [9, 0, 0, 0, 9, 9, 0]);
        }
        give_back(&memory, &pages, Range { start: 0, size: 16 * PAGE }).unwrap();
        assert_eq!([0, 1, 5, 8, 9].map(|page| byte(&memory, page * PAGE)), [0; 5]);
        assert!(pages.lock().is_empty());
        let mut content = Vec::new();
        io::Seek::rewind(&mut &file).unwrap();
        io::Read::read_to_end(&mut &file, &mut content).unwrap();
        assert!(content.iter().all(|byte| *byte == 9));
    }

    /// A guest that gives back every other page of a large kernel must not use up the monitor's mappings.
    #[test]
    fn a_files_pages_are_not_cut_into_any_number_of_pieces() {
        let count = 3 * MAX_FILE_PIECES as u64;
        let (memory, pages, _file) = with_file(count);
        let given: u64 = (0..count / 2 - 1)
            .map(|n| give_back(&memory, &pages, Range { start: (2 + 2 * n) * PAGE, size: PAGE }).unwrap())
            .sum();
        assert_eq!(pages.lock().len(), MAX_FILE_PIECES);
        assert_eq!(given, (MAX_FILE_PIECES as u64 - 1) * PAGE);
        assert_eq!((byte(&memory, 2 * PAGE), byte(&memory, (count - 2) * PAGE)), (0, 9));
    }
}
