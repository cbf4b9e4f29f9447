//! Requests for random bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use roost_vmm::devices::virtio::entropy::queue::{Metrics, process};
use roost_vmm_fuzz::guest::{self, Batch, Ring, Setup};

fuzz_target!(|input: (Setup, Vec<Batch>)| {
    let (setup, batches) = input;
    let memory = guest::memory();
    let mut ring = Ring::new(&memory, setup, 0);
    let mut metrics = Metrics::default();
    let random = |buffer: &mut [u8]| {
        buffer.fill(0xa5);
        buffer.len()
    };
    for batch in batches.iter().take(8) {
        ring.write(&memory, batch);
        if ring.turn(&memory, |queue| process(queue, &memory, random, None, &mut metrics)).is_err() {
            return;
        }
    }
});
