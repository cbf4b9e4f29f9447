//! Packets in both directions.
#![no_main]

use libfuzzer_sys::fuzz_target;
use roost_vmm::devices::virtio::net::metrics::Metrics;
use roost_vmm::devices::virtio::net::queue::{Waiting, receive, transmit};
use roost_vmm_fuzz::guest::{self, Batch, Ring, Setup};
use roost_vmm_fuzz::host::Packets;

fuzz_target!(|input: (Setup, Setup, bool, Vec<(Batch, Batch, Vec<(u16, u8)>)>)| {
    let (receiving, sending, mergeable, steps) = input;
    let memory = guest::memory();
    let mut rx = Ring::new(&memory, receiving, 0);
    let mut tx = Ring::new(&memory, sending, 1);
    let (mut waiting, mut metrics) = (Waiting::default(), Metrics::default());
    for (wanted, sent, packets) in steps.into_iter().take(6) {
        let mut tap = Packets(packets.into());
        rx.write(&memory, &wanted);
        tx.write(&memory, &sent);
        let received = rx.turn(&memory, |queue| {
            receive(queue, &memory, &mut tap, &mut waiting, None, mergeable, &mut metrics)
        });
        let passed = tx.turn(&memory, |queue| transmit(queue, &memory, &mut tap, None, &mut metrics));
        if received.is_err() || passed.is_err() {
            return;
        }
    }
});
