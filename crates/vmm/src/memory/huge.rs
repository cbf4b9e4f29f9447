//! Guest memory that moves into huge pages.

use std::arch::x86_64::{__m128i, _mm_load_si128, _mm_store_si128};
use std::io;
use std::ops::Range;
use std::ptr;

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::place::{self, HUGE};
use super::{FilePages, Memory, is_inside};
use crate::error::{Error, Result};

/// Moves pages of a file that lie in whole huge pages of guest memory (guest physical addresses) into huge pages of the guest's own, as
/// far as the host has them to give: what the guest finds there stays the same. No vCPU runs. Where the guest has given something back
/// already, or there is no room, nothing is done.
///
/// # Errors
/// [`Error::Memory`]: the guest's memory is not whole any more.
pub fn move_to(memory: &Memory, pages: &FilePages, range: &Range<u64>) -> Result<()> {
    let mut pages = pages.lock();
    let Ok(target) = memory.get_host_address(GuestAddress(range.start)) else { return Ok(()) };
    let Ok(length) = usize::try_from(range.end - range.start) else { return Ok(()) };
    let (start, end) = (target as usize, (target as usize).saturating_add(length));
    let whole = pages.cut(start as u64..end as u64) == [(start as u64..end as u64, true)];
    let huge = start.is_multiple_of(HUGE) && length.is_multiple_of(HUGE);
    if !whole || !huge || !is_inside(memory, start, end) {
        return Ok(());
    }
    let Some(room) = Room::new(length) else { return Ok(()) };
    let (from, to): (*const __m128i, *mut __m128i) = (target.cast(), room.start.cast());
    for index in 0..length / size_of::<__m128i>() {
        let (from, to) = (from.wrapping_add(index), to.wrapping_add(index));
        // SAFETY: of `length` bytes of whole pages. No vCPU runs; what a device writes here meanwhile is lost to the guest that asked
        // for it, and to nobody else.
        let line = unsafe { _mm_load_si128(from) };
        // SAFETY: the room is as long and new: nobody else has it.
        unsafe { _mm_store_si128(to, line) };
    }
    pages.remove(start as u64..end as u64);
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: the room is this function's own, and only memory of the guest is replaced, which Rust code reads through volatile accesses
    // alone.
    let moved = unsafe { libc::mremap(room.start.cast(), length, length, flags, target) };
    if moved == libc::MAP_FAILED {
        let error = io::Error::last_os_error();
        return Err(Error::Memory(format!("moving the kernel's code into huge pages: {error}")));
    }
    // It is the guest's now.
    std::mem::forget(room);
    Ok(())
}

/// Fresh memory at whole huge pages; goes with this.
struct Room {
    start: *mut u8,
    length: usize,
}

impl Room {
    fn new(length: usize) -> Option<Self> {
        let (access, kind) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        );
        let start = place::aligned(length, || {
            // SAFETY: a new mapping, wherever there is room.
            unsafe { libc::mmap(ptr::null_mut(), length, access, kind, -1, 0) }
        });
        if start == libc::MAP_FAILED {
            return None;
        }
        for advice in [libc::MADV_DONTDUMP, libc::MADV_HUGEPAGE] {
            // SAFETY: the mapping was just made. A host without huge pages refuses, and gives small ones.
            unsafe { libc::madvise(start, length, advice) };
        }
        let room = Self { start: start.cast(), length };
        (start as usize).is_multiple_of(HUGE).then_some(room)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's own.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::Bytes;

    use super::*;
    use crate::memory::{PAGE, Range as Piece, create, give_back, map_file};

    const HUGE_PAGE: u64 = HUGE as u64;

    fn byte(memory: &Memory, address: u64) -> u8 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn what_moves_into_huge_pages_stays_as_it_is() {
        let memory = create(8).unwrap();
        let (pages, file) = (FilePages::default(), tempfile::tempfile().unwrap());
        let content: Vec<u8> = (0..4_u32 << 20).map(|n| (n % 249) as u8).collect();
        FileExt::write_all_at(&file, &content, 0).unwrap();
        let (from, to) = (HUGE_PAGE, 3 * HUGE_PAGE);
        let target = memory.get_host_address(GuestAddress(from)).unwrap();
        assert!(map_file(&memory, &pages, target, content.len(), &file, 0));
        memory.write_obj(5_u8, GuestAddress(from + 5000)).unwrap();
        // What is no file's, or no whole huge page, stays.
        for range in [0..2 * HUGE_PAGE, from..from + PAGE, from + PAGE..to, to..to + HUGE_PAGE] {
            move_to(&memory, &pages, &range).unwrap();
            assert_eq!(pages.lock().len(), 1);
        }
        move_to(&memory, &pages, &(from..to)).unwrap();
        assert!(pages.lock().is_empty());
        let mut found = vec![0; content.len()];
        memory.read_slice(&mut found, GuestAddress(from)).unwrap();
        assert_eq!((found[5000], byte(&memory, from - 1), byte(&memory, to)), (5, 0, 0));
        found[5000] = content[5000];
        assert!(found == content);
        // It is no file's any more: given back, it is zero.
        give_back(&memory, &pages, Piece { start: from, size: HUGE_PAGE }).unwrap();
        assert_eq!([from, from + 5000].map(|at| byte(&memory, at)), [0, 0]);
    }
}
