//! Guest memory: private pages with a hole below 4 GiB, anonymous but for what a kernel was loaded to (see
//! [`crate::boot::mapped`]).

use std::fs::File;
use std::os::fd::AsRawFd;

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::{Error, Result};
use crate::layout::{HIGH_RAM_START, MMIO_HOLE_START};

/// The memory of one guest.
pub type Memory = GuestMemoryMmap<()>;

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

/// Maps the memory of a guest. Pages are taken from the host as the guest touches them.
///
/// # Errors
/// [`Error::Memory`].
pub fn create(mem_size_mib: u64) -> Result<Memory> {
    let ranges: Vec<(GuestAddress, usize)> = ranges(mem_size_mib << 20)
        .iter()
        .map(|range| Ok((GuestAddress(range.start), usize::try_from(range.size)?)))
        .collect::<std::result::Result<_, std::num::TryFromIntError>>()
        .map_err(|error| Error::Memory(error.to_string()))?;
    let memory = Memory::from_ranges(&ranges)
        .map_err(|error| Error::Memory(format!("mapping {mem_size_mib} MiB: {error}")))?;
    for region in memory.iter() {
        // A crash of the monitor must not write a tenant's memory to the host's disk.
        advise(region, libc::MADV_DONTDUMP);
    }
    Ok(memory)
}

/// Asks the host for huge pages from here on. What was touched before stays as it is: the first 2 MiB, of which the
/// monitor writes a few pages, need not be cleared as a whole before the guest can start.
pub fn use_huge_pages(memory: &Memory) {
    for region in memory.iter() {
        advise(region, libc::MADV_HUGEPAGE);
    }
}

/// Maps pages of a file in place of `length` bytes of guest memory at the host's address `target`; what the guest writes
/// there stays its own. `false`: it could not be done, and the memory is as it was.
#[must_use]
pub fn map_file(memory: &Memory, target: *mut u8, length: usize, file: &File, offset: u64) -> bool {
    let (start, end) = (target as usize, (target as usize).saturating_add(length));
    let inside = memory.iter().any(|region| {
        let host = region.get_host_address(vm_memory::MemoryRegionAddress(0)).map_or(0, |host| host as usize);
        let size = usize::try_from(region.len()).unwrap_or(0);
        host <= start && end <= host.saturating_add(size)
    });
    let Ok(offset) = libc::off_t::try_from(offset) else { return false };
    if !inside || length == 0 {
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
    true
}

/// Gives every page back to the host: the guest finds zeroes, as after power-on, or what a file that is mapped holds.
///
/// # Errors
/// [`Error::Memory`].
pub fn clear(memory: &Memory) -> Result<()> {
    for region in memory.iter() {
        if !advise(region, libc::MADV_DONTNEED) {
            return Err(Error::Memory(format!("clearing: {}", std::io::Error::last_os_error())));
        }
    }
    Ok(())
}

fn advise(region: &impl GuestMemoryRegion, advice: i32) -> bool {
    let Ok(pointer) = region.get_host_address(vm_memory::MemoryRegionAddress(0)) else { return false };
    let Ok(length) = usize::try_from(region.len()) else { return false };
    // SAFETY: pointer and length are one whole mapping of guest memory, which Rust code reads only through volatile
    // accesses, so that content may change under it at any time.
    unsafe { libc::madvise(pointer.cast(), length, advice) == 0 }
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
    fn cleared_memory_is_zero() {
        let memory = create(4).unwrap();
        use_huge_pages(&memory);
        memory.write_obj(7_u64, GuestAddress(0x1000)).unwrap();
        clear(&memory).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 0);
        assert_eq!(low_end(&memory), 4 << 20);
    }
}
