//! Requests of a disk.
#![no_main]

use libfuzzer_sys::fuzz_target;
use roost_vmm::devices::virtio::block::backend::Backend;
use roost_vmm::devices::virtio::block::metrics::Metrics;
use roost_vmm::devices::virtio::block::queue::{Disk, Host, process};
use roost_vmm_fuzz::guest::{self, Batch, Ring, Setup};
use roost_vmm_fuzz::host;

fuzz_target!(|input: (Setup, u8, bool, bool, Vec<Batch>)| {
    let (setup, sectors, read_only, write_through, batches) = input;
    let memory = guest::memory();
    let mut ring = Ring::new(&memory, setup, 0);
    let mut backend = host::Disk::new(sectors);
    let size = backend.size();
    let host = Host::Here(&mut backend);
    let mut disk = Disk { host, size, read_only, write_through, pace: None, id: "fuzz" };
    let mut metrics = Metrics::default();
    for batch in batches.iter().take(8) {
        ring.write(&memory, batch);
        if ring.turn(&memory, |queue| process(queue, &memory, &mut disk, &mut metrics)).is_err() {
            return;
        }
    }
    assert!(!read_only || metrics.write_bytes + metrics.cleared_bytes == 0, "a read-only disk was written");
});
