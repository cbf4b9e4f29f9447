//! Interfaces with several pairs of queues, as guest and host see them.

// Tests build bytes out of numbers whose size they know.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::fs::File;

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
    // The host's own packets (IPv6) may have brought the guest further already.
    let says = |word: &str| common::says(&machine, word);
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

/// An open `/dev/vhost-net`. `None` (said aloud) where the host has none.
fn vhost() -> Option<File> {
    let opened = File::options().read(true).write(true).open("/dev/vhost-net");
    opened.inspect_err(|error| eprintln!("NOT RUN: /dev/vhost-net: {error}")).ok()
}

fn handed(names: &[&str], files: &[&File]) -> Vec<String> {
    names.iter().zip(files).flat_map(|(name, file)| hand_over(name, *file)).collect()
}

#[test]
fn a_host_without_vhost_net_is_said_to_be_one() {
    let Some(tap) = tap::create() else { return };
    let mut machine = Machine::new(&Code::default().stop());
    machine.config["network-interfaces"] =
        json!([{ "iface_id": "eth0", "host_dev_name": "tap", "vhost": true }]);
    let none = File::open("/dev/null").unwrap();
    machine.start(&handed(&["tap", "tap.vhost"], &[&tap, &none]));
    let ended = machine.wait();
    let why = r#"interface "eth0": vhost true needs a fresh /dev/vhost-net, or one handed over as "tap.vhost": VHOST_GET_FEATURES: "#;
    assert!(ended.stderr.contains(why), "{}", ended.stderr);
    assert_ne!(ended.code, 0);
}

/// Packets both ways through both pairs; a reset; a driver of one pair.
#[test]
fn the_hosts_kernel_moves_the_packets_of_all_pairs() {
    if vhost().is_none() {
        return;
    }
    let Some((taps, wire)) = tap::create_several(2) else { return };
    let code = set_up(SEVERAL_PAIRS, &[0, 1, 2, 3, 4]);
    let code = use_pairs(code, NET, ring(4), 0, 3, 1);
    let code = use_pairs(code, NET, ring(4), 1, 2, 0);
    let send = |code, queue: u32, nth: u16| {
        let ring = ring(queue);
        let code = ring.descriptor(code, nth, 0x70_0000, 72, 0, 0);
        NET.notify(ring.offer(code, nth, nth), queue).wait16(ring.used_index(), nth + 1)
    };
    let code = send(send(code, 1, 0), 3, 0).print("two");
    let code = wait_least(wait_least(code, ring(0).used_index(), 1), ring(2).used_index(), 1);
    // The interrupt's cause, after it was acknowledged as before.
    let code = code.store(NET.register(register::INTERRUPT_ACKNOWLEDGE), 1);
    let code = code.expect32(NET.register(register::INTERRUPT_STATUS), 1).print("both");
    let code = wait_for_input(&code).bytes(&set_up(0, &[0, 1]).0).print("one");
    let code = wait_least(send(code, 1, 0), ring(0).used_index(), FLOWS).print("all").power_off();
    let mut machine = Machine::new(&code);
    machine.config["network-interfaces"] =
        json!([{ "iface_id": "eth0", "host_dev_name": "tap", "num_queue_pairs": 2, "vhost": true }]);
    machine.start(&handed(&["tap", "tap.1"], &[&taps[0], &taps[1]]));
    let client = machine.client();
    // The host's own packets (IPv6) may have brought the guest further already.
    let says = |word: &str| common::says(&machine, word);
    says("two");
    send_flows(&wire);
    says("both");
    assert_eq!(client.metrics().unwrap()["devices"]["eth0"], json!({ "vhost": true }));
    let limit = json!({ "iface_id": "eth0", "rx_rate_limiter": { "ops": { "size": 1, "refill_time": 1 } } });
    assert!(client.put("PATCH", "/network-interfaces/eth0", &limit).is_err());
    client.console_input(b"x").unwrap();
    says("one");
    send_flows(&wire);
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "twobothoneall"), "{}", ended.stderr);
}

/// What the kernel cannot go on with stops the device, as if the monitor had found it.
#[test]
fn a_queue_that_is_broken_under_the_kernel_needs_a_reset() {
    if std::env::var("ROOST_BIRTH").is_ok_and(|birth| birth == "snapshot") {
        eprintln!("NOT RUN: a vhost-net that is handed over serves one process");
        return;
    }
    let Some(vhost) = vhost() else { return };
    let Some(tap) = tap::create() else { return };
    // A chain that begins behind the last descriptor.
    let code = NET.notify(ring(1).offer(set_up(0, &[0, 1]), 0, 4000), 1).print("broken");
    let code = code.wait_bits(NET.register(register::STATUS), 64).print("seen");
    // It works again after its reset.
    let code = code.bytes(&set_up(0, &[0, 1]).0);
    let code = ring(1).descriptor(code, 0, 0x70_0000, 72, 0, 0);
    let code = NET.notify(ring(1).offer(code, 0, 0), 1).wait16(ring(1).used_index(), 1).power_off();
    let mut machine = Machine::new(&code);
    machine.config["network-interfaces"] =
        json!([{ "iface_id": "eth0", "host_dev_name": "tap", "vhost": true }]);
    machine.start(&handed(&["tap", "tap.vhost"], &[&tap, &vhost]));
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "brokenseen"), "{}", ended.stderr);
    assert!(ended.stderr.contains("interface \"eth0\": the guest broke a queue"), "{}", ended.stderr);
}
