//! Pages that were written since a snapshot. Who asks for them takes them: KVM and memory forget what they tell. So what was taken
//! and could not be used goes back, and is in the next diff.

use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::error::Result;
use crate::memory::{Memory, PAGE};

/// Bits of a word of a dirty log.
const BITS: u64 = 64;

/// Pages that were written since the base, region by region, one bit each.
pub(super) struct Written(Vec<Vec<u64>>);

impl Written {
    /// Takes what was noted: by KVM of the guest, by memory itself of the devices. `log` is KVM's for a region by number and length.
    ///
    /// # Errors
    /// KVM's. Nothing is lost then.
    pub(super) fn take(memory: &Memory, log: impl FnMut(usize, u64) -> Result<Vec<u64>>) -> Result<Self> {
        let mut written = Self(Vec::new());
        match written.fill(memory, log) {
            Ok(()) => Ok(written),
            Err(error) => {
                // KVM clears before it copies (Linux, kvm_get_dirty_log_protect): of the region that it failed at, each page may
                // have been written.
                let failed_at = memory.iter().nth(written.0.len());
                written.0.extend(failed_at.map(|region| vec![u64::MAX; words(region.len())]));
                written.put_back(memory);
                Err(error)
            }
        }
    }

    fn fill(&mut self, memory: &Memory, mut log: impl FnMut(usize, u64) -> Result<Vec<u64>>) -> Result<()> {
        for (slot, region) in memory.iter().enumerate() {
            let mut pages = log(slot, region.len())?;
            let mapping = region.get_mmap();
            let ours = mapping.bitmap().as_ref().map(AtomicBitmap::get_and_reset).unwrap_or_default();
            for (word, ours) in pages.iter_mut().zip(ours) {
                *word |= ours;
            }
            self.0.push(pages);
        }
        Ok(())
    }

    /// Whether a page of a region was written.
    pub(super) fn has(&self, region: usize, page: u64) -> bool {
        let word = usize::try_from(page / BITS).ok().and_then(|at| self.0.get(region)?.get(at));
        word.is_some_and(|word| word >> (page % BITS) & 1 == 1)
    }

    /// Puts everything back: whoever took it could not use it.
    pub(super) fn put_back(&self, memory: &Memory) {
        for (number, region) in memory.iter().enumerate() {
            for page in (0..region.len() / PAGE).filter(|page| self.has(number, *page)) {
                let (at, length) = (usize::try_from(page * PAGE), usize::try_from(PAGE));
                if let (Ok(at), Ok(length)) = (at, length) {
                    region.bitmap().mark_dirty(at, length);
                }
            }
        }
    }
}

/// Words of the dirty log of so much memory.
fn words(bytes: u64) -> usize {
    usize::try_from((bytes / PAGE).div_ceil(BITS)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::memory::{self, Tracking};
    use vm_memory::{Bytes, GuestAddress};

    /// KVM's dirty logs of two regions, which forget what they have told, and one of which may fail.
    struct Logs {
        regions: [Vec<u64>; 2],
        fails_at: Option<usize>,
    }

    impl Logs {
        fn tell(&mut self, slot: usize, bytes: u64) -> Result<Vec<u64>> {
            let words = words(bytes);
            let told = std::mem::replace(&mut self.regions[slot], vec![0; words]);
            if self.fails_at == Some(slot) {
                return Err(Error::Kvm {
                    what: "KVM_GET_DIRTY_LOG",
                    source: kvm_ioctls::Error::new(libc::EFAULT),
                });
            }
            Ok(told)
        }

        fn note(&mut self, region: usize, page: u64) {
            self.regions[region][usize::try_from(page / BITS).unwrap()] |= 1 << (page % BITS);
        }
    }

    /// Memory of 4 MiB (1024 pages) and a region of 128 MiB that comes and goes.
    fn machine() -> (Memory, Logs, u64) {
        let range = memory::hotplug_range(4, 128, 2);
        let memory = memory::create_with(4, Some(range), Tracking::On).unwrap();
        let lengths: Vec<u64> = memory.iter().map(GuestMemoryRegion::len).collect();
        let regions = [vec![0; words(lengths[0])], vec![0; words(lengths[1])]];
        // What was written while it was made is of no snapshot.
        let mut logs = Logs { regions, fails_at: None };
        drop(Written::take(&memory, |slot, bytes| logs.tell(slot, bytes)).unwrap());
        (memory, logs, range.start)
    }

    fn pages(written: &Written, region: usize, of: u64) -> Vec<u64> {
        (0..of).filter(|page| written.has(region, *page)).collect()
    }

    #[test]
    fn what_the_guest_and_devices_wrote_is_taken_once() {
        let (memory, mut logs, _) = machine();
        logs.note(0, 3);
        logs.note(0, 1023);
        memory.write_obj(7_u8, GuestAddress(70 * PAGE)).unwrap();
        let mut take = || Written::take(&memory, |slot, bytes| logs.tell(slot, bytes)).unwrap();
        assert_eq!(pages(&take(), 0, 1024), [3, 70, 1023]);
        assert!(pages(&take(), 0, 1024).is_empty());
    }

    #[test]
    fn what_was_taken_before_kvm_failed_is_taken_the_next_time() {
        for fails_at in [0, 1] {
            let (memory, mut logs, second) = machine();
            logs.note(0, 3);
            logs.note(1, 9);
            memory.write_obj(7_u8, GuestAddress(70 * PAGE)).unwrap();
            memory.write_obj(7_u8, GuestAddress(second + 80 * PAGE)).unwrap();
            logs.fails_at = Some(fails_at);
            assert!(Written::take(&memory, |slot, bytes| logs.tell(slot, bytes)).is_err());

            logs.fails_at = None;
            logs.note(0, 5);
            let written = Written::take(&memory, |slot, bytes| logs.tell(slot, bytes)).unwrap();
            // KVM may have forgotten all of the region that it failed at.
            let (first, all) = ([3, 5, 70], |pages: u64| (0..pages).collect::<Vec<u64>>());
            let rest = 128 * 256;
            let expected = if fails_at == 0 { (all(1024), vec![9, 80]) } else { (first.to_vec(), all(rest)) };
            assert_eq!((pages(&written, 0, 1024), pages(&written, 1, rest)), expected);
            let again = Written::take(&memory, |slot, bytes| logs.tell(slot, bytes)).unwrap();
            assert_eq!((pages(&again, 0, 1024), pages(&again, 1, rest)), (vec![], vec![]));
        }
    }

    #[test]
    fn what_could_not_be_used_is_taken_the_next_time() {
        let (memory, mut logs, _) = machine();
        logs.note(0, 63);
        logs.note(0, 64);
        logs.note(1, 1);
        let mut take = || Written::take(&memory, |slot, bytes| logs.tell(slot, bytes)).unwrap();
        take().put_back(&memory);
        let written = take();
        assert_eq!((pages(&written, 0, 1024), pages(&written, 1, 1024)), (vec![63, 64], vec![1]));
    }
}
