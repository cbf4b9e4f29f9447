//! Requests for memory that comes and goes, with blocks that really go back to the host, and states of snapshots.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use roost_vmm::devices::virtio::mem::blocks::{Blocks, MemState};
use roost_vmm::devices::virtio::mem::metrics::Metrics;
use roost_vmm::devices::virtio::mem::queue::{REQUEST, serve};
use roost_vmm::memory::{self, FilePages, Range, Tracking, give_back};
use roost_vmm_fuzz::guest::{self, Batch, Place, Ring, Setup};
use vm_memory::{Bytes, GuestAddress};

const TOTAL_MIB: u64 = 128;

#[derive(Arbitrary, Debug)]
enum Step {
    /// A request lies in slot 0, what the batch says is sent.
    Ask {
        kind: u8,
        /// From two blocks before the region's begin.
        block: u8,
        /// Beside a block's begin.
        off: Option<u8>,
        count: u16,
        batch: Batch,
    },
    /// The host says how many blocks the guest should have.
    Request(u8),
    /// A snapshot's state takes the place of the device's.
    Restore { requested: u64, plugged: Vec<u64> },
    /// A snapshot of its own.
    Save,
}

fn request(kind: u16, address: u64, count: u16) -> [u8; REQUEST] {
    let mut bytes = [0; REQUEST];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    bytes
}

fn plugged(blocks: &Blocks) -> u64 {
    blocks.state().plugged.iter().map(|word| u64::from(word.count_ones()) * blocks.block_size()).sum()
}

fuzz_target!(|input: (Setup, u8, Vec<Step>)| {
    let (setup, size, steps) = input;
    let block_mib = 2 << (size % 7);
    let region = memory::hotplug_range(guest::MEMORY_MIB, TOTAL_MIB, block_mib);
    let memory = memory::create_with(guest::MEMORY_MIB, Some(region), Tracking::Off).unwrap();
    let mut ring = Ring::new(&memory, setup, 0);
    let mut blocks = Blocks::new(region, block_mib << 20);
    let (pages, mut metrics) = (FilePages::default(), Metrics::default());
    let size = blocks.block_size();
    let give = |range: Range| {
        assert!(range.start.is_multiple_of(size) && range.size.is_multiple_of(size), "{range:?}");
        assert!(range.start >= region.start && range.start + range.size <= region.start + region.size);
        give_back(&memory, &pages, range)
    };
    for step in steps.into_iter().take(24) {
        match step {
            Step::Ask { kind, block, off, count, batch } => {
                ring.write(&memory, &batch);
                let address =
                    (region.start + u64::from(block) * size - 2 * size) + u64::from(off.unwrap_or(0));
                let bytes = request(u16::from(kind % 6), address, count % 80);
                memory.write_slice(&bytes, GuestAddress(Place::Slot(0, 0).address())).unwrap();
                let before = (blocks.plugged(), metrics);
                let turn = |queue: &mut _| serve(queue, &memory, &mut blocks, give, &mut metrics);
                if ring.turn(&memory, turn).is_err() {
                    return;
                }
                let came = metrics.plugged_bytes - before.1.plugged_bytes;
                let went = metrics.unplugged_bytes - before.1.unplugged_bytes;
                assert_eq!(before.0 + came, blocks.plugged() + went, "{metrics:?}");
                assert!(blocks.plugged() <= before.0.max(blocks.requested()), "more than the host wants");
            }
            Step::Request(count) => blocks.request(u64::from(count) * size),
            Step::Restore { requested, plugged } => {
                let state = MemState { requested, plugged };
                let before = blocks.state();
                let taken = blocks.restore(state.clone());
                assert_eq!(blocks.state(), if taken { state } else { before });
            }
            Step::Save => {
                let mut other = Blocks::new(region, size);
                assert!(other.restore(blocks.state()));
                assert_eq!((other.plugged(), other.requested()), (blocks.plugged(), blocks.requested()));
            }
        }
        assert_eq!(blocks.plugged(), plugged(&blocks));
        assert!(blocks.plugged() <= region.size && blocks.requested() <= region.size);
    }
    assert_eq!(metrics.failed, 0);
});
