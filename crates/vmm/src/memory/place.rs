//! Where guest memory lies in this process: at multiples of 2 MiB.
//!
//! KVM gives a guest a huge page only where the addresses of host and guest agree in their lowest 21 bits. Linux before 6.7
//! (Debian 12's is older) places mappings at any page, so that a guest meets one fault for each of its 4 KiB pages: thousands
//! while it boots.

/// Bytes of a huge page.
pub const HUGE: usize = 2 << 20;

/// Runs `map`, which makes one mapping of `size` bytes wherever the host likes, with a hole of this size at a multiple of
/// 2 MiB below all other holes: the host takes the highest one that fits. Where it does not, the mapping lies elsewhere, which
/// costs a guest time and is no error.
pub fn aligned<T>(size: usize, map: impl FnOnce() -> T) -> T {
    let room = size.checked_add(HUGE).filter(|_| size >= HUGE);
    let Some((start, room)) = room.and_then(|room| Some((reserve(room)?, room))) else { return map() };
    let hole = start.next_multiple_of(HUGE);
    release(hole, hole + size);
    let mapped = map();
    release(start, hole);
    release(hole + size, start + room);
    mapped
}

/// Takes addresses that nothing uses; `None` where there are not so many.
fn reserve(size: usize) -> Option<usize> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh mapping wherever there is room, that nobody can touch.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_NONE, flags, -1, 0) };
    (start != libc::MAP_FAILED).then_some(start as usize)
}

/// Gives addresses back that were reserved and not used since.
fn release(start: usize, end: usize) {
    if start < end {
        // SAFETY: this part of the reservation is still as it was made: mappings are only ever made in its hole.
        unsafe { libc::munmap(start as *mut libc::c_void, end - start) };
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestAddress, GuestMemoryBackend};

    use super::*;

    fn mappings() -> usize {
        std::fs::read_to_string("/proc/self/maps").unwrap().lines().count()
    }

    #[test]
    fn guest_memory_lies_at_huge_pages_and_no_reservation_is_left() {
        let (mut held, mut elsewhere) = (Vec::new(), 0);
        for mib in [2, 3, 16, 128, 129, 1024, 3 * 1024 + 8] {
            // Something odd of this process comes in between.
            held.push(reserve(4096 * 3).unwrap());
            let before = mappings();
            let memory = crate::memory::create(mib).unwrap();
            for address in [0, crate::layout::HIGH_RAM_START] {
                let Ok(host) = memory.get_host_address(GuestAddress(address)) else { continue };
                elsewhere += usize::from(!(host as usize).is_multiple_of(HUGE));
            }
            assert!(mappings() <= before + 2, "{mib} MiB");
            drop(memory);
        }
        // A gap of just the right size above all that is mapped would be taken first (once in some hundred processes).
        assert!(elsewhere <= 1, "{elsewhere} regions lie elsewhere");
    }

    #[test]
    fn where_there_is_no_room_the_mapping_is_made_all_the_same() {
        assert_eq!(aligned(usize::MAX - 5, || 7), 7);
        assert_eq!(aligned(1 << 62, || 7), 7);
        assert_eq!(aligned(4096, || 7), 7);
    }
}
