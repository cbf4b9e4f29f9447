//! Requests to flush a file in memory, and a host that is done sooner or later.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use roost_vmm::devices::virtio::pmem::metrics::Metrics;
use roost_vmm::devices::virtio::pmem::queue::{Flushes, ROOM, serve_read_only};
use roost_vmm_fuzz::guest::{self, Batch, Place, Ring, Setup};
use vm_memory::{Bytes, GuestAddress};

#[derive(Arbitrary, Debug)]
enum Step {
    /// A request lies in slot 0, what the batch says is sent.
    Ask {
        kind: u8,
        batch: Batch,
    },
    Begin,
    Finish(bool),
}

fuzz_target!(|input: (Setup, bool, Vec<Step>)| {
    let (setup, read_only, steps) = input;
    let memory = guest::memory();
    let mut ring = Ring::new(&memory, setup, 0);
    let (mut flushes, mut metrics) = (Flushes::default(), Metrics::default());
    for step in steps.into_iter().take(32) {
        match step {
            Step::Ask { kind, batch } => {
                ring.write(&memory, &batch);
                let slot = GuestAddress(Place::Slot(0, 0).address());
                memory.write_obj(u32::from(kind / 128), slot).unwrap();
                let before = flushes.len();
                let turn = ring.turn(&memory, |queue| match read_only {
                    true => serve_read_only(queue, &memory, &mut metrics),
                    false => flushes.take(queue, &memory, &mut metrics),
                });
                if turn.is_err() {
                    return;
                }
                assert!((before..=ROOM).contains(&flushes.len()) && (!read_only || flushes.is_empty()));
            }
            Step::Begin => flushes.begin(),
            Step::Finish(done) => {
                let (before, answered) = (flushes.len(), metrics.flushes);
                let turn = |queue: &mut _| flushes.finish(queue, &memory, done, &mut metrics);
                if ring.turn(&memory, turn).is_err() {
                    return;
                }
                assert_eq!(before as u64 + answered, flushes.len() as u64 + metrics.flushes, "one is lost");
            }
        }
    }
    // Whatever came before: two calls of the host's answer all.
    for _ in 0..2 {
        let turn = |queue: &mut _| flushes.finish(queue, &memory, true, &mut metrics);
        if ring.turn(&memory, turn).is_err() {
            return;
        }
        flushes.begin();
    }
    let turn = |queue: &mut _| flushes.finish(queue, &memory, true, &mut metrics);
    assert!(ring.turn(&memory, turn).is_err() || flushes.is_empty());
});
