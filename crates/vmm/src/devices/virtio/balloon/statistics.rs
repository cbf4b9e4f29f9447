//! What a guest says about its memory (virtio 1.2, 5.5.6.3). It may say anything: these are indications, not facts.

use serde_json::{Map, Value};

/// Bytes of one entry: a tag of 16 bits and a value of 64.
pub const ENTRY: usize = 10;

/// Names by tag: virtio 1.2, 5.5.6.4, and behind those the ones that Linux has added since (6.11).
const NAMES: [&str; 16] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kill",
    "alloc_stall",
    "async_scan",
    "direct_scan",
    "async_reclaim",
    "direct_reclaim",
];

/// Most bytes of a list that are looked at: each tag once, and as many again that are not known.
pub const MAX_BYTES: usize = 2 * NAMES.len() * ENTRY;

/// The latest value of each tag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics([Option<u64>; NAMES.len()]);

impl Statistics {
    /// Takes a list of entries over. Tags that are not known and a piece of an entry at the end are left out; values that the
    /// list does not have stay. Returns how many values there were.
    pub fn update(&mut self, list: &[u8]) -> usize {
        let mut count = 0;
        for entry in list.chunks_exact(ENTRY) {
            let (tag, value) = entry.split_at(2);
            let (Ok(tag), Ok(value)) = (<[u8; 2]>::try_from(tag), <[u8; 8]>::try_from(value)) else {
                continue;
            };
            if let Some(known) = self.0.get_mut(usize::from(u16::from_le_bytes(tag))) {
                *known = Some(u64::from_le_bytes(value));
                count += 1;
            }
        }
        count
    }

    /// Values by name; what the guest has not said is left out.
    #[must_use]
    pub fn named(&self) -> Map<String, Value> {
        let known = NAMES.iter().zip(self.0);
        known.filter_map(|(name, value)| Some(((*name).to_owned(), Value::from(value?)))).collect()
    }
}
