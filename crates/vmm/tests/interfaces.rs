//! Interfaces with several pairs of queues, as guest and host see them.

// Tests build bytes out of numbers whose size they know.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use common::machines::{SEVERAL_PAIRS, use_pairs};
use common::tap::{self, Wire};
use common::virtio::{Device, Ring, WRITE, register};
use common::{Code, Machine, hand_over, wait_for};
use serde_json::json;

const NET: Device = Device(0);
/// Flows that the host sends one packet of.
const FLOWS: u16 = 64;

fn ring(queue: u32) -> Ring {
    Ring { queue, size: 128, base: 0x20_0000 + 0x2_0000 * queue }
}

/// Sets these queues up, empty, and the receiving ones with 100 buffers each.
fn set_up(features: u32, queues: &[u32]) -> Code {
    let code = queues.iter().fold(NET.negotiate(Code::default(), features), |code, queue| {
        let ring = ring(*queue);
        NET.queue(code.store(ring.available(), 0).store(ring.used(), 0), ring)
    });
    queues.iter().filter(|queue| [0, 2].contains(*queue)).fold(NET.go(code), |code, queue| {
        let ring = ring(*queue);
        let code = (0..100).fold(code, |code, n| {
            let code = ring.descriptor(code, n, 0x80_0000 + 0x800 * u64::from(n), 2048, WRITE, 0);
            ring.offer(code, n, n)
        });
        NET.notify(code, *queue)
    })
}

/// Waits until a word has at least this value: again: cmp word [rdi], VALUE; jb again
fn wait_least(code: Code, address: u32, value: u16) -> Code {
    code.address(address).bytes(&[0x66, 0x81, 0x3f]).bytes(&value.to_le_bytes()).bytes(&[0x72, 0xf9])
}

/// Waits for a byte of input: again: mov edx, 0x3fd; in al, dx; test al, 1; jz again; mov edx, 0x3f8; in al, dx
fn wait_for_input(code: &Code) -> Code {
    let wait = [0xba, 0xfd, 0x03, 0, 0, 0xec, 0xa8, 0x01, 0x74, 0xf6, 0xba, 0xf8, 0x03, 0, 0, 0xec];
    code.clone().bytes(&wait)
}

/// One packet of each of many flows: Ethernet, IPv4, UDP.
fn send_flows(wire: &Wire) {
    for flow in 0..FLOWS {
        let mut frame = [&[0xff; 6][..], &[2, 0, 0, 0, 0, 1], &[8, 0]].concat();
        frame.extend([0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([&(1000 + 37 * flow).to_be_bytes()[..], &[0, 9], &[0, 26, 0, 0], &[0; 18]].concat());
        wire.send(&frame);
    }
}

#[test]
fn the_host_spreads_its_packets_over_the_pairs_that_the_driver_uses() {
    let Some((taps, wire)) = tap::create_several(2) else { return };
    // mac, status; then the pairs that there are.
    let code = Code::default().expect32(NET.register(register::CONFIG + 8), 2 | 1500 << 16);
    let code = code.bytes(&set_up(SEVERAL_PAIRS, &[0, 1, 2, 3, 4]).0);
    // As many as there are, not more, not none.
    let code = use_pairs(code, NET, ring(4), 0, 3, 1);
    let code = use_pairs(code, NET, ring(4), 1, 0, 1);
    let code = use_pairs(code, NET, ring(4), 2, 2, 0);
    // From the second pair.
    let code = ring(3).descriptor(code, 0, 0x70_0000, 72, 0, 0);
    let code = NET.notify(ring(3).offer(code, 0, 0), 3).wait16(ring(3).used_index(), 1).print("two");
    let code = wait_least(wait_least(code, ring(0).used_index(), 1), ring(2).used_index(), 1).print("both");
    // A driver that knows of one pair only has all packets there.
    let code = wait_for_input(&code).bytes(&set_up(0, &[0, 1]).0).print("one");
    let code = wait_least(code, ring(0).used_index(), FLOWS).print("all").power_off();
    let mut machine = Machine::new(&code);
    machine.config["network-interfaces"] =
        json!([{ "iface_id": "eth0", "host_dev_name": "tap", "num_queue_pairs": 2 }]);
    machine.start(&[hand_over("tap", &taps[0]), hand_over("tap.1", &taps[1])].concat());
    let client = machine.client();
    let says = |word: &str| wait_for(word, || machine.console().ends_with(word).then_some(()));
    let metric = |name: &str| client.metrics().unwrap()["devices"]["eth0"][name].as_u64().unwrap();
    says("two");
    assert_eq!(metric("tx_packets"), 1);
    send_flows(&wire);
    says("both");
    // Nothing of this is left for the driver that comes.
    wait_for("the packets", || (metric("rx_packets") >= FLOWS.into()).then_some(()));
    client.console_input(b"x").unwrap();
    says("one");
    send_flows(&wire);
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "twobothoneall"), "{}", ended.stderr);
}

#[test]
fn a_tap_that_is_none_of_several_is_refused() {
    let Some(tap) = tap::create() else { return };
    let mut machine = Machine::new(&Code::default().stop());
    machine.config["network-interfaces"] =
        json!([{ "iface_id": "eth0", "host_dev_name": "tap", "num_queue_pairs": 2 }]);
    machine.start(&hand_over("tap", &tap));
    let ended = machine.wait();
    assert!(ended.stderr.contains("IFF_MULTI_QUEUE"), "{}", ended.stderr);
}
