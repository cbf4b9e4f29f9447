//! Memory that comes and goes, from the API to the guest and back.

// Tests build bytes out of numbers whose size they know.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use common::mem::{
    ACK, BLOCK, ERROR, NACK, PLUG, PLUGGED, REQUESTED, Request, START, STATE, UNPLUG, UNPLUG_ALL, WINDOW,
    ask, send,
};
use common::virtio::{Device, Ring, register};
use common::{Code, Machine, footprint, refusal, says, wait_for};
use roost_vmm::client::{Client, ClientError};
use serde_json::{Value, json};

const MEM: Device = Device(0);
const RING: Ring = Ring { queue: 0, size: 8, base: 0x20_0000 };
const MEMORY_MIB: u64 = 64;
const TOTAL_MIB: u64 = 128;
/// Pages of the four blocks that guests here are given.
const PAGES: u32 = 2048;

fn set_up() -> Code {
    MEM.go(MEM.queue(MEM.negotiate(Code::default(), 0), RING))
}

fn asks(code: Code, first: u16, requests: &[(u16, u64, u16, u16, u16)]) -> Code {
    ask(code, MEM, RING, first, requests)
}

fn should_have(code: Code, mib: u32) -> Code {
    code.wait32(MEM.register(REQUESTED), mib << 20)
}

fn machine(code: &Code) -> Machine {
    let mut machine = Machine::new(code);
    machine.config["machine-config"]["mem_size_mib"] = json!(MEMORY_MIB);
    machine.config["memory-hotplug"] = json!({ "total_size_mib": TOTAL_MIB });
    machine
}

fn request(client: &Client, mib: u64) -> Result<(), ClientError> {
    client.put("PATCH", "/hotplug/memory", &json!({ "requested_size_mib": mib }))
}

fn get(client: &Client, path: &str) -> Value {
    serde_json::from_slice(&client.request("GET", path, b"").unwrap()).unwrap()
}

fn sizes(client: &Client) -> (Value, Value) {
    let status = get(client, "/hotplug/memory");
    (status["plugged_size_mib"].clone(), status["requested_size_mib"].clone())
}

/// What the host has given for the region, KiB. The host may show it and the machine's own memory as one mapping.
fn resident(machine: &Machine) -> u64 {
    let alone = footprint::of(machine.pid(), TOTAL_MIB);
    alone.or_else(|_| footprint::of(machine.pid(), TOTAL_MIB + MEMORY_MIB)).unwrap().guest_rss_kib
}

#[test]
fn memory_comes_is_used_and_goes_back_to_the_host() {
    let code = should_have(set_up().map(4).print("r"), 8);
    let code =
        asks(code, 0, &[(PLUG, START, 5, NACK, 0), (PLUG, START, 4, ACK, 0), (STATE, START, 4, ACK, 0)]);
    let code = code.wait32(MEM.register(PLUGGED), 8 << 20).expect_zero_pages(WINDOW, PAGES);
    let code = code.fill_pages(WINDOW, PAGES, 0x600d_600d).print("full");
    let code =
        asks(should_have(code, 2), 3, &[(UNPLUG, START + BLOCK, 3, ACK, 0), (STATE, START, 4, ACK, 2)]);
    // The block that is left is as it was, the others are nobody's.
    let code = code.expect32(WINDOW, 0x600d_600d).print("gone").wait32(MEM.register(REQUESTED), 8 << 20);
    let code =
        asks(code, 5, &[(PLUG, START + BLOCK, 3, ACK, 0)]).expect_zero_pages(WINDOW + 0x20_0000, PAGES - 512);
    let mut machine = machine(&code.print("back").power_off());
    machine.start::<&str>(&[]);
    let client = machine.client();
    says(&machine, "r");
    assert_eq!(sizes(&client), (json!(0), json!(0)));
    request(&client, 8).unwrap();
    says(&machine, "full");
    let full = resident(&machine);
    assert!(full >= 8 << 10, "{full} KiB");
    assert_eq!(sizes(&client), (json!(8), json!(8)));
    // By the machine's whole memory, this time.
    client.put("PATCH", "/machine-config", &json!({ "mem_size_mib": MEMORY_MIB + 2 })).unwrap();
    says(&machine, "gone");
    let gone = resident(&machine);
    assert!(gone + (6 << 10) <= full + 64, "{full} KiB before, {gone} KiB after");
    assert_eq!(sizes(&client), (json!(2), json!(2)));
    assert_eq!(get(&client, "/machine-config")["mem_size_mib"], json!(MEMORY_MIB + 2));
    let metrics = client.metrics().unwrap()["devices"]["mem"].clone();
    assert_eq!(
        (&metrics["too_much"], &metrics["unplugged_bytes"]),
        (&json!(1), &json!(6 << 20)),
        "{metrics}"
    );
    request(&client, 8).unwrap();
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "rfullgoneback"), "{}", ended.stderr);
}

/// The interrupt controller itself is asked: its request register shows that the device's line rose, without a handler.
#[test]
fn a_new_size_raises_an_interrupt() {
    // again: mov al, 0x0a; out 0x20, al; in al, 0x20; test al, 1 << 6; jz again
    let interrupted = [0xb0, 0x0a, 0xe6, 0x20, 0xe4, 0x20, 0xa8, 0x40, 0x74, 0xf6];
    let status = MEM.register(register::INTERRUPT_STATUS);
    let code = set_up().wait32(status, 1).print("r").bytes(&interrupted).wait_bits(status, 2);
    let mut machine = machine(&should_have(code, 2).power_off());
    machine.start::<&str>(&[]);
    let client = machine.client();
    says(&machine, "r");
    request(&client, 2).unwrap();
    assert_eq!(machine.wait().code, 0);
}

/// A guest that is started anew has none of it, finds it clean, and is told again how much it should have.
#[test]
fn a_reset_takes_all_of_it() {
    let code =
        should_have(set_up().map(1), 2).wait32(MEM.register(PLUGGED), 0).expect_zero_pages(WINDOW, 512);
    let code = asks(code, 0, &[(PLUG, START, 1, ACK, 0)]).fill_pages(WINDOW, 512, 7);
    // A driver that goes does not give anything back.
    let code = code.store(MEM.register(register::STATUS), 0).wait32(MEM.register(PLUGGED), 2 << 20);
    let mut machine = machine(&code.print("z").reset());
    machine.start::<&str>(&[]);
    let client = machine.client();
    request(&client, 2).unwrap();
    wait_for("three starts", || (machine.console().len() >= 3).then_some(()));
    client.force_stop().unwrap();
    let ended = machine.wait();
    assert!(ended.console.bytes().all(|byte| byte == b'z'), "{}", ended.console);
}

/// Blocks that it does not have are read, written, and given to the device for its answers and its rings.
#[test]
fn a_guest_that_uses_what_it_does_not_have_hurts_only_itself() {
    let outside = START + (TOTAL_MIB << 20);
    let refused = [
        (PLUG, START, 1, NACK, 0),
        (UNPLUG, START, 1, ERROR, 0),
        (PLUG, START + 1, 1, ERROR, 0),
        (PLUG, START, 0, ERROR, 0),
        (PLUG, 0, 1, ERROR, 0),
        (PLUG, outside, 1, ERROR, 0),
        (PLUG, outside - BLOCK, 2, ERROR, 0),
        (PLUG, u64::MAX, u16::MAX, ERROR, 0),
        (STATE, START - BLOCK, 1, ERROR, 0),
        (STATE, START, 64, ACK, 1),
        (77, START, 1, ERROR, 0),
    ];
    let count = refused.len() as u16;
    let code = asks(set_up().map(2), 0, &refused).fill_pages(WINDOW, 1024, 7).expect32(WINDOW, 7);
    let state = |index, answer| Request { index, kind: STATE, address: START, blocks: 1, answer };
    // The answer into a block that is not there, across the end of the region, and beyond it.
    let code = send(code, MEM, RING, state(count, START + 16)).expect32(WINDOW + 24, 1);
    let code = send(code, MEM, RING, state(count + 1, outside - 5));
    let code = send(code, MEM, RING, state(count + 2, outside));
    // What it wrote is gone when it says that it gives all of it.
    let code = asks(code, count + 3, &[(UNPLUG_ALL, 0, 0, ACK, 0)]).expect_zero_pages(WINDOW, 1024);
    // Rings there.
    let code = MEM.negotiate(code, 0);
    let high = Ring { base: WINDOW, ..RING };
    let code = MEM.queue(code, RING);
    let code = code.store(MEM.register(register::STATUS), 0);
    let code = MEM.negotiate(code, 0).store(MEM.register(register::QUEUE_SELECT), 0);
    let code = code.store(MEM.register(register::QUEUE_SIZE), 8);
    let rings = [(register::DESCRIPTORS, 0_u32), (register::AVAILABLE, 0x4000), (register::USED, 0x8000)];
    let code = rings.iter().fold(code, |code, (register, offset)| {
        code.store(MEM.register(*register), START as u32 + offset).store(MEM.register(register + 4), 1)
    });
    let code = MEM.go(code.store(MEM.register(register::QUEUE_READY), 1));
    let code = asks_through(code, high);
    let mut machine = machine(&code.print("done").power_off());
    machine.start::<&str>(&[]);
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "done"), "{}", ended.stderr);
}

/// One request through rings that the guest sees in its window; request and answer stay in RAM.
fn asks_through(code: Code, ring: Ring) -> Code {
    let at = RING.base + 0xc000;
    let code = code.store(at, STATE.into()).store(at + 8, START as u32).store(at + 12, 1).store(at + 16, 1);
    let code = ring.descriptor(code, 0, at.into(), 24, 1, 1);
    let code = ring.descriptor(code, 1, u64::from(at) + 64, 10, 2, 0);
    let code = MEM.notify(ring.offer(code, 0, 0), 0);
    code.wait16(ring.used_index(), 1).expect32(at + 72, 1)
}

#[test]
fn the_api_says_what_is_illegal_when() {
    let mut machine = Machine::new(&Code::default().stop());
    let socket = machine.text("api");
    machine.start_with(&["run", "--api-sock", &socket]);
    let client = machine.client();
    let put = |body: Value| client.put("PUT", "/hotplug/memory", &body);
    assert!(refusal(client.request("GET", "/hotplug/memory", b"")).contains("no memory that comes and goes"));
    assert!(refusal(request(&client, 2)).contains("has not been started"));
    let why = refusal(put(json!({ "total_size_mib": 192 })));
    assert!(why.contains("total_size_mib 192 is no multiple of slot_size_mib 128"), "{why}");
    let why = refusal(put(json!({ "total_size_mib": 128, "block_size_mib": 3 })));
    assert!(why.contains("block_size_mib 3 is no power of two"), "{why}");
    put(json!({ "total_size_mib": 256, "block_size_mib": 4 })).unwrap();
    let expected = json!({
        "total_size_mib": 256, "block_size_mib": 4, "slot_size_mib": 128,
        "plugged_size_mib": 0, "requested_size_mib": 0,
    });
    assert_eq!(get(&client, "/hotplug/memory"), expected);
    client.put("PUT", "/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": 16 })).unwrap();
    client.put("PUT", "/boot-source", &machine.config["boot-source"].clone()).unwrap();
    client.put("PUT", "/serial", &json!({})).unwrap();
    client.start().unwrap();

    assert!(refusal(put(json!({ "total_size_mib": 128 }))).contains("built already"));
    for mib in [2, 260, u64::MAX] {
        let why = refusal(request(&client, mib));
        assert!(
            why.contains(&format!("requested_size_mib {mib} is no multiple of block_size_mib 4")),
            "{why}"
        );
    }
    let resize = |body: Value| client.put("PATCH", "/machine-config", &body);
    for mib in [0, 15, 18, 276] {
        let why = refusal(resize(json!({ "mem_size_mib": mib })));
        assert!(why.contains(&format!("mem_size_mib {mib} is not the 16")), "{why}");
    }
    // All of it or nothing.
    refusal(resize(json!({ "mem_size_mib": 20, "vcpu_count": 2 })));
    assert_eq!(sizes(&client), (json!(0), json!(0)));
    resize(json!({ "mem_size_mib": 20, "vcpu_count": 1 })).unwrap();
    assert_eq!(sizes(&client), (json!(0), json!(4)));
    assert_eq!(get(&client, "/vm/config")["machine-config"]["mem_size_mib"], json!(16));
    client.force_stop().unwrap();
    machine.wait();
}

#[test]
fn a_machine_without_it_says_so() {
    let mut machine = Machine::new(&Code::default().stop());
    machine.start::<&str>(&[]);
    let client = machine.client();
    wait_for("the start", || (client.info().unwrap().state == "Running").then_some(()));
    assert!(refusal(request(&client, 2)).contains("PUT /hotplug/memory"));
    let resize = |mib: u64| client.put("PATCH", "/machine-config", &json!({ "mem_size_mib": mib }));
    assert!(refusal(resize(32)).contains("mem_size_mib 32: the machine was started without memory-hotplug"));
    resize(16).unwrap();
    client.force_stop().unwrap();
    machine.wait();
}
