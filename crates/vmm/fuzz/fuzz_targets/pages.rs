//! What `roost-vmm serve-memory` reads: a working set's file, and what a monitor says of its memory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use roost_vmm::page_server::{WorkingSet, mappings};

const BYTES: u64 = 16 << 20;
const ID: [u8; 16] = [0x11; 16];

fuzz_target!(|bytes: &[u8]| {
    if let Ok(set) = WorkingSet::parse(bytes, ID, BYTES) {
        let again = WorkingSet::parse(&set.to_text(ID).unwrap(), ID, BYTES).unwrap();
        assert_eq!(set, again);
        let batches = set.batches();
        assert!(batches.iter().all(|range| range.start < range.end && range.end <= BYTES));
        assert_eq!(batches.iter().map(|range| (range.end - range.start) / 4096).sum::<u64>(), set.pages());
    }
    if let Ok(mappings) = mappings(bytes, BYTES) {
        for mapping in &mappings {
            assert!(mapping.offset + mapping.size <= BYTES);
            let _ = mapping.base_host_virt_addr.checked_add(mapping.size).unwrap();
        }
    }
});
