//! Guests that attack their devices. After each attack the guest resets what it attacked and uses it as a good driver
//! would: the monitor must not hang, crash, or lose the device, and nothing outside of what was asked may change.
//!
//! The same devices see arbitrary queues in the property tests beside them; here the attacks go the whole way, through
//! KVM, the registers, the bells and the device thread.

// Tests build bytes out of numbers whose size they know.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use common::balloon::{REPORTING, STATISTICS, give, list, send};
use common::hostile::{BUFFER, CANARY, LOOKS, canary, queue};
use common::mem::{self, ask};
use common::pmem;
use common::virtio::{
    Device, INDIRECT, NEXT, Ring, WINDOW, WINDOW_SIZE, WRITE, block, block_header, block_request, register,
};
use common::vsock::{self, GUEST_CID, HEADER};
use common::{Code, Ended, Machine, RESET, SLEEP_CONTROL, disk, tap};
use serde_json::json;

const MEMORY_MIB: u64 = 16;
const MEMORY_END: u64 = MEMORY_MIB << 20;
/// Devices in the order of their windows.
const DISK: Device = Device(0);
const NET: Device = Device(1);
const ENTROPY: Device = Device(2);
const BALLOON: Device = Device(3);
const VSOCK: Device = Device(4);
const MEM: Device = Device(5);
const PMEM: Device = Device(6);
const DEVICES: [Device; 7] = [DISK, NET, ENTROPY, BALLOON, VSOCK, MEM, PMEM];
/// A page that a good driver gives back.
const GIVEN: u32 = 0x90_0000;
const DISK_BYTES: u64 = 1 << 20;
/// What a good driver writes there at the end.
const WRITTEN: u32 = 0x600d_600d;

/// How many queues a device has.
fn queues(device: Device) -> u32 {
    [1, 2, 1, 4, 3, 1, 1][device.0 as usize]
}

/// Sets a device up with all its queues.
fn set_up(code: Code, device: Device) -> Code {
    let own = if device.0 == BALLOON.0 { REPORTING | STATISTICS } else { 0 };
    let code = (0..queues(device)).fold(device.negotiate(code, 1 << 28 | own), |code, n| {
        let ring = queue(n);
        // A queue starts with empty rings.
        let code = code.store(ring.available(), 0).store(ring.used(), 0).store(canary(ring), CANARY);
        device.queue(code, ring)
    });
    device.go(code)
}

/// Uses a device as a good driver does, and waits for it.
fn use_well(code: Code, device: Device) -> Code {
    let code = set_up(code, device);
    match device.0 {
        0 => {
            let code = code.store(BUFFER, WRITTEN);
            let code = block_request(code, queue(0), 0, block::OUT, 2, BUFFER, 512);
            code.expect32(queue(0).base + 0xc010, 0)
        }
        1 => {
            let ring = queue(1);
            let code = ring.descriptor(code, 0, BUFFER.into(), 72, 0, 0);
            device.notify(ring.offer(code, 0, 0), 1).wait16(ring.used_index(), 1)
        }
        3 => {
            // A page of its own, gone and back.
            let code = code.store(GIVEN, 1);
            let code = give(code, device, queue(0), 0, (GIVEN >> 12, 1)).expect32(GIVEN, 0);
            give(code, device, queue(1), 0, (GIVEN >> 12, 1))
        }
        4 => {
            // Nobody listens, and the device says so.
            let ring = queue(0);
            let code = ring.offer(ring.descriptor(code, 0, BUFFER.into(), 64, WRITE, 0), 0, 0);
            let code = vsock::header(code, (1000, 52), 0, vsock::REQUEST, 0);
            let code = vsock::send(device.notify(code, 0), device, 0, HEADER).wait16(ring.used_index(), 1);
            code.expect32(BUFFER + vsock::TYPE_AND_OP, 1 | vsock::RESET << 16)
        }
        // A block that it does not have, and is not given.
        5 => {
            let requests =
                [(mem::STATE, mem::START, 1, mem::ACK, 1), (mem::PLUG, mem::START, 1, mem::NACK, 0)];
            ask(code, device, queue(0), 0, &requests)
        }
        6 => {
            let ring = queue(0);
            pmem::ask(code, device, ring, 0, pmem::FLUSH).expect32(pmem::answer(ring), pmem::OK)
        }
        _ => {
            let ring = queue(0);
            let code = ring.descriptor(code, 0, BUFFER.into(), 64, WRITE, 0);
            device.notify(ring.offer(code, 0, 0), 0).wait16(ring.used_index(), 1)
        }
    }
}

/// The machine with all devices. Without a tap the interface is left out, and the entropy device takes its place.
fn machine(code: &Code) -> Machine {
    let mut machine = Machine::new(code);
    disk(&machine.path("disk"), DISK_BYTES);
    machine.config["machine-config"] =
        json!({ "vcpu_count": 1, "mem_size_mib": MEMORY_MIB, "on_reset": "exit" });
    machine.config["drives"] = json!([{ "drive_id": "root", "path_on_host": machine.text("disk") }]);
    machine.config["network-interfaces"] = json!([{ "iface_id": "eth0", "host_dev_name": "tap" }]);
    machine.config["entropy"] = json!({});
    machine.config["vsock"] = json!({ "guest_cid": GUEST_CID, "uds_path": machine.text("v.sock") });
    machine.config["memory-hotplug"] = json!({ "total_size_mib": 128 });
    disk(&machine.path("file"), pmem::ALIGNMENT);
    machine.config["pmem"] = json!([{ "id": "data", "path_on_host": machine.text("file") }]);
    machine.config["balloon"] =
        json!({ "amount_mib": 1, "stats_polling_interval_s": 1, "free_page_reporting": true });
    machine
}

/// Runs an attack on a device, then the good driver; returns how it ended.
fn attack(name: &str, device: Device, tap: &std::fs::File, attack: impl FnOnce(Code) -> Code) -> Ended {
    let code = attack(set_up(Code::default(), device));
    let code = (0..queues(device)).fold(code, |code, n| code.expect32(canary(queue(n)), CANARY));
    let code = use_well(code, device).print("alive").power_off();
    let mut machine = machine(&code);
    machine.start(&common::machines::tap_argument(tap));
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "alive"), "{name}: {}", ended.stderr);
    assert!(!ended.stderr.contains("internal fault"), "{name}: {}", ended.stderr);
    if device.0 == DISK.0 {
        let mut expected = vec![0; DISK_BYTES as usize];
        expected[1024..1028].copy_from_slice(&WRITTEN.to_le_bytes());
        assert!(std::fs::read(machine.path("disk")).unwrap() == expected, "{name}: the disk was changed");
    }
    if device.0 == PMEM.0 {
        let file = std::fs::read(machine.path("file")).unwrap();
        assert!(file.iter().all(|byte| *byte == 0), "{name}: the file was changed");
    }
    ended
}

/// The queue that an attack goes to, and whether its device writes into chains.
fn targets() -> [(&'static str, Device, Ring, u16); 13] {
    [
        ("disk", DISK, queue(0), 0),
        ("net, receive", NET, queue(0), WRITE),
        ("net, transmit", NET, queue(1), 0),
        ("entropy", ENTROPY, queue(0), WRITE),
        ("balloon, inflate", BALLOON, queue(0), 0),
        ("balloon, deflate", BALLOON, queue(1), 0),
        ("balloon, statistics", BALLOON, queue(2), 0),
        ("balloon, reporting", BALLOON, queue(3), WRITE),
        ("vsock, receive", VSOCK, queue(0), WRITE),
        ("vsock, transmit", VSOCK, queue(1), 0),
        ("vsock, event", VSOCK, queue(2), WRITE),
        ("memory", MEM, queue(0), 0),
        ("file in memory", PMEM, queue(0), 0),
    ]
}

/// Makes one chain available, rings, and gives the device a while.
fn submit(code: Code, device: Device, ring: Ring, head: u16) -> Code {
    device.notify(ring.offer(code, 0, head), ring.queue).look16(ring.used_index(), 1, LOOKS)
}

#[test]
fn descriptors_that_loop() {
    let Some(tap) = tap::create() else { return };
    for (name, device, ring, flags) in targets() {
        attack(&format!("{name}: to itself"), device, &tap, |code| {
            submit(ring.descriptor(code, 0, BUFFER.into(), 16, NEXT | flags, 0), device, ring, 0)
        });
        attack(&format!("{name}: round and round"), device, &tap, |code| {
            let code = (0..8)
                .fold(code, |code, n| ring.descriptor(code, n, BUFFER.into(), 16, NEXT | flags, (n + 1) % 8));
            submit(code, device, ring, 3)
        });
        attack(&format!("{name}: out of the table"), device, &tap, |code| {
            submit(ring.descriptor(code, 0, BUFFER.into(), 16, NEXT | flags, 8000), device, ring, 0)
        });
        attack(&format!("{name}: a head out of the table"), device, &tap, |code| {
            submit(code, device, ring, 0xffff)
        });
    }
}

#[test]
fn indirect_tables_that_lie() {
    let Some(tap) = tap::create() else { return };
    let table = Ring { queue: 0, size: 8, base: 0x60_0000 };
    for (name, device, ring, flags) in targets() {
        for (what, address, length) in [
            ("half a descriptor", u64::from(table.base), 8),
            ("none", u64::from(table.base), 0),
            ("endless", u64::from(table.base), u32::MAX),
            ("outside of memory", MEMORY_END, 64),
            ("across the end of memory", MEMORY_END - 16, 64),
            ("at the end of the world", u64::MAX - 8, 64),
            ("in the device's own registers", u64::from(WINDOW), 64),
        ] {
            attack(&format!("{name}: indirect, {what}"), device, &tap, |code| {
                submit(ring.descriptor(code, 0, address, length, INDIRECT, 0), device, ring, 0)
            });
        }
        attack(&format!("{name}: indirect within indirect"), device, &tap, |code| {
            let code = table.descriptor(code, 0, table.base.into(), 64, INDIRECT | flags, 0);
            submit(ring.descriptor(code, 0, table.base.into(), 64, INDIRECT, 0), device, ring, 0)
        });
        attack(&format!("{name}: an indirect table that loops"), device, &tap, |code| {
            let code = table.descriptor(code, 0, BUFFER.into(), 16, NEXT | flags, 1);
            let code = table.descriptor(code, 1, BUFFER.into(), 16, NEXT | flags, 0);
            submit(ring.descriptor(code, 0, table.base.into(), 32, INDIRECT, 0), device, ring, 0)
        });
    }
}

#[test]
fn buffers_of_wrong_lengths_and_outside_of_memory() {
    let Some(tap) = tap::create() else { return };
    for (name, device, ring, flags) in targets() {
        for (address, length) in [
            (u64::from(BUFFER), 0),
            (u64::from(BUFFER), 1),
            (u64::from(BUFFER), u32::MAX),
            (MEMORY_END - 8, 4096),
            (MEMORY_END, 4096),
            (0xbfff_fff0, 4096),
            (u64::from(WINDOW), 4096),
            (0x1_0000_0000, 4096),
            (u64::MAX, 1),
            (u64::MAX - 4095, 4096),
        ] {
            for direction in [flags, flags ^ WRITE] {
                attack(&format!("{name}: {length:#x} at {address:#x}"), device, &tap, |code| {
                    submit(ring.descriptor(code, 0, address, length, direction, 0), device, ring, 0)
                });
            }
        }
    }
}

#[test]
fn block_requests_that_are_none() {
    let Some(tap) = tap::create() else { return };
    let ring = queue(0);
    let header = 0x60_0000;
    let ask = |name: &str, kind: u32, sector: u64, data: &[(u64, u32, u16)]| {
        attack(name, DISK, &tap, |code| {
            let code = block_header(code, header, kind, sector);
            let code = ring.descriptor(code, 0, header.into(), 16, NEXT, 1);
            let last = data.len() as u16;
            let code = data.iter().zip(1..).fold(code, |code, ((address, length, flags), n)| {
                let next = if n == last { 0 } else { NEXT };
                ring.descriptor(code, n, *address, *length, flags | next, n + 1)
            });
            submit(code, DISK, ring, 0)
        });
    };
    let status = (u64::from(header) + 64, 1, WRITE);
    let sector = (u64::from(BUFFER), 512, 0);
    let into = (u64::from(BUFFER), 512, WRITE);
    ask("a write beyond the end", block::OUT, DISK_BYTES / 512, &[sector, status]);
    ask("a write across the end", block::OUT, DISK_BYTES / 512 - 1, &[(BUFFER.into(), 1024, 0), status]);
    ask("a write at the end of the world", block::OUT, u64::MAX, &[sector, status]);
    ask("a write that wraps round", block::OUT, u64::MAX / 512, &[sector, status]);
    ask("a write without a status", block::OUT, 0, &[sector]);
    ask("a write of half a sector", block::OUT, 0, &[(BUFFER.into(), 100, 0), status]);
    ask("a write behind its status", block::OUT, 0, &[status, sector]);
    ask("a write from outside of memory", block::OUT, 0, &[(MEMORY_END, 512, 0), status]);
    ask("a write half from outside", block::OUT, 0, &[sector, (MEMORY_END - 256, 512, 0), status]);
    ask("a write with its status outside", block::OUT, 0, &[sector, (MEMORY_END, 1, WRITE)]);
    ask("a read beyond the end", block::IN, DISK_BYTES / 512, &[into, status]);
    ask("a read into itself", block::IN, 0, &[(queue(0).descriptors().into(), 512, WRITE), status]);
    ask("a read over the available ring", block::IN, 0, &[(queue(0).available().into(), 512, WRITE), status]);
    ask("a request of no kind", 0xffff_ffff, 0, &[into, status]);
    ask("a flush with data", block::FLUSH, 7, &[sector, status]);
}

#[test]
fn lists_of_pages_that_are_none() {
    let Some(tap) = tap::create() else { return };
    let last = (MEMORY_END >> 12) as u32 - 1;
    for n in [0, 1] {
        let ring = queue(n);
        let ask = |name: &str, first: u32, count: u32, length: u32| {
            attack(&format!("queue {n}: {name}"), BALLOON, &tap, |code| {
                let code = list(code, 0x60_0000, first, count);
                send(code, BALLOON, ring, 0, (0x60_0000, length), 0).look16(ring.used_index(), 1, LOOKS)
            });
        };
        ask("pages beyond the end", last, 64, 256);
        ask("pages in the hole", 0xbffff, 64, 256);
        ask("pages at the end of the world", u32::MAX - 3, 8, 32);
        ask("half a page number", BUFFER >> 12, 1, 2);
        ask("a list that is too long", BUFFER >> 12, 16, 1 << 20);
        ask("its own list", 0x60_0000 >> 12, 64, 256);
        // Whatever the device reads next is zero then.
        ask("its own descriptors", ring.descriptors() >> 12, 4, 16);
        ask("its own available ring", ring.available() >> 12, 4, 16);
        // The same page again and again, in one list and in many.
        attack(&format!("queue {n}: duplicates"), BALLOON, &tap, |code| {
            let code = [0, 4, 8].into_iter().fold(code, |code, at| code.store(BUFFER + at, GIVEN >> 12));
            (0..200).fold(code, |code, index| {
                let code = send(code, BALLOON, ring, index, (BUFFER, 12), 0);
                code.wait16(ring.used_index(), index + 1)
            })
        });
    }
    let ring = queue(3);
    attack("a report of its own rings", BALLOON, &tap, |code| {
        let code = send(code, BALLOON, ring, 0, (ring.base, 0x8000), WRITE);
        code.look16(ring.used_index(), 1, LOOKS)
    });
    attack("many buffers for statistics", BALLOON, &tap, |code| {
        (0..100).fold(code, |code, index| {
            let code = send(code, BALLOON, queue(2), index, (BUFFER, 13), 0);
            code.look16(queue(2).used_index(), index, LOOKS)
        })
    });
}

#[test]
fn flushes_that_are_none() {
    let Some(tap) = tap::create() else { return };
    let ring = queue(0);
    let request = (u64::from(BUFFER), 4, 0);
    let answer = (u64::from(BUFFER) + 64, 4, WRITE);
    let ask = |name: &str, kind: u32, chain: &[(u64, u32, u16)]| {
        attack(name, PMEM, &tap, |code| {
            let last = chain.len() as u16 - 1;
            let code =
                chain.iter().zip(0..).fold(code.store(BUFFER, kind), |code, ((at, length, flags), n)| {
                    let next = if n == last { 0 } else { NEXT };
                    ring.descriptor(code, n, *at, *length, flags | next, n + 1)
                });
            submit(code, PMEM, ring, 0)
        });
    };
    for kind in [1, 2, u32::MAX] {
        ask(&format!("a request of kind {kind}"), kind, &[request, answer]);
    }
    ask("without an answer", 0, &[request]);
    ask("without a request", 0, &[answer]);
    ask("behind its answer", 0, &[answer, request]);
    ask("half a request", 0, &[(BUFFER.into(), 2, 0), answer]);
    ask("half an answer", 0, &[request, (u64::from(BUFFER) + 64, 2, WRITE)]);
    ask("an answer outside", 0, &[request, (MEMORY_END, 4, WRITE)]);
    ask("an answer half outside", 0, &[request, (MEMORY_END - 2, 4, WRITE)]);
    ask("an answer over its own ring", 0, &[request, (ring.available().into(), 4, WRITE)]);
    // The same chain, offered again while the host works on it.
    attack("again and again", PMEM, &tap, |code| {
        let code = ring.descriptor(code.store(BUFFER, 0), 0, request.0, 4, NEXT, 1);
        let code = ring.descriptor(code, 1, answer.0, 4, WRITE, 0);
        (0..400).fold(code, |code, index| PMEM.notify(ring.offer(code, index, 0), 0)).look16(
            ring.used_index(),
            400,
            LOOKS,
        )
    });
}

/// Packets whose lengths, ids and operations are wrong, to a program that listens and to nobody.
#[test]
fn packets_that_are_none() {
    let Some(tap) = tap::create() else { return };
    let ring = queue(0);
    let ask = |name: &str, sent: &[(u32, u32)], bytes: u32| {
        attack(name, VSOCK, &tap, |code| {
            let code = (0..8).fold(code, |code, n| {
                let at = BUFFER + 0x1000 * u32::from(n);
                ring.offer(ring.descriptor(code, n, at.into(), 256, WRITE, 0), n, n)
            });
            let code = vsock::header(VSOCK.notify(code, 0), (1000, 52), 0, vsock::REQUEST, 0);
            let code =
                sent.iter().fold(code, |code, (field, value)| code.store(vsock::PACKET + field, *value));
            let code = vsock::send(code, VSOCK, 0, bytes);
            vsock::send(code, VSOCK, 1, bytes).look16(ring.used_index(), 1, LOOKS)
        });
    };
    for op in [0, 2, 4, 5, 6, 7, 8, 0xffff] {
        ask(&format!("operation {op}"), &[(vsock::TYPE_AND_OP, 1 | op << 16)], HEADER);
    }
    for kind in [0, 2, 0xffff] {
        ask(&format!("type {kind}"), &[(vsock::TYPE_AND_OP, kind | vsock::REQUEST << 16)], HEADER);
    }
    for (length, bytes) in
        [(1, HEADER), (u32::MAX, HEADER), (u32::MAX, HEADER + 8), (0x1_0001, 0x2_0000), (0, 0x2_0000)]
    {
        let data = (vsock::TYPE_AND_OP, 1 | vsock::DATA << 16);
        ask(&format!("{length} bytes of {bytes}"), &[data, (vsock::LENGTH, length)], bytes);
        ask(&format!("a request, {length} bytes of {bytes}"), &[(vsock::LENGTH, length)], bytes);
    }
    for bytes in [1, HEADER - 1] {
        ask(&format!("{bytes} bytes"), &[], bytes);
    }
    for (field, value) in
        [(0, 0), (0, 2), (4, 1), (8, 3), (8, GUEST_CID), (12, u32::MAX), (vsock::DST_PORT, u32::MAX)]
    {
        ask(&format!("{value} at {field}"), &[(field, value)], HEADER);
    }
}

#[test]
fn indices_that_jump() {
    let Some(tap) = tap::create() else { return };
    for (name, device, ring, flags) in targets() {
        for index in [9, 0x7fff, 0x8000, 0xfff8, 0xffff_u16] {
            attack(&format!("{name}: available index {index:#x}"), device, &tap, |code| {
                let code = ring.descriptor(code, 0, BUFFER.into(), 16, flags, 0);
                device.notify(code.store16(ring.available() + 2, index), ring.queue).look16(
                    ring.used_index(),
                    index,
                    LOOKS,
                )
            });
        }
        attack(&format!("{name}: the index goes back"), device, &tap, |code| {
            let code = submit(ring.descriptor(code, 0, BUFFER.into(), 16, flags, 0), device, ring, 0);
            let code = code.store16(ring.available() + 2, 0);
            device.notify(code, ring.queue).look16(ring.used_index(), 2, LOOKS)
        });
    }
}

#[test]
fn rings_that_are_nowhere() {
    let Some(tap) = tap::create() else { return };
    for (name, device, ring, _) in targets() {
        for offset in [register::DESCRIPTORS, register::AVAILABLE, register::USED] {
            for (low, high) in
                [(MEMORY_END as u32 - 4, 0), (MEMORY_END as u32, 0), (WINDOW, 0), (0, u32::MAX), (1, 0)]
            {
                attack(&format!("{name}: register {offset:#x} = {high:x}{low:08x}"), device, &tap, |code| {
                    let code = device.queue(device.negotiate(code, 0), ring);
                    let code = code.store(device.register(register::QUEUE_READY), 0);
                    let code =
                        code.store(device.register(offset), low).store(device.register(offset + 4), high);
                    let code = device.go(code.store(device.register(register::QUEUE_READY), 1));
                    submit(code, device, ring, 0)
                });
            }
        }
        for size in [0, 3, 0x8000, 0x1_0000] {
            attack(&format!("{name}: queue size {size:#x}"), device, &tap, |code| {
                let code =
                    device.negotiate(code, 0).store(device.register(register::QUEUE_SELECT), ring.queue);
                let code = code.store(device.register(register::QUEUE_SIZE), size);
                submit(device.go(code.store(device.register(register::QUEUE_READY), 1)), device, ring, 0)
            });
        }
    }
}

/// The device thread is in the middle of a request whenever the guest resets, reconfigures and rings again.
#[test]
fn resets_and_changes_while_requests_run() {
    let Some(tap) = tap::create() else { return };
    for (name, device, ring, flags) in targets() {
        attack(name, device, &tap, |code| {
            let body = set_up(Code::default(), device);
            let body = (0..8).fold(body, |code, n| {
                ring.offer(ring.descriptor(code, n, BUFFER.into(), 4096, flags, 0), n, n)
            });
            let body = device.notify(body, ring.queue);
            let body = body.store(device.register(register::QUEUE_SELECT), ring.queue);
            let body = body.store(device.register(register::DESCRIPTORS), 0xffff_ffff);
            let body = device.notify(body.store16(ring.available() + 2, 0x4000), ring.queue);
            let body = body.store(device.register(register::STATUS), 0);
            let body = device.notify(body, ring.queue).store(device.register(register::STATUS), 0x80);
            code.times(300, &body).store(device.register(register::STATUS), 0)
        });
    }
}

/// Bells for queues that are there and for some that are not, acknowledgements of interrupts that never were.
#[test]
fn storms_of_bells_and_acknowledgements() {
    let Some(tap) = tap::create() else { return };
    for (name, device, ring, flags) in targets() {
        attack(name, device, &tap, |code| {
            let code = ring.descriptor(code, 0, BUFFER.into(), 16, flags, 0);
            let body = [0, 1, 2, 255, 0xffff, u32::MAX]
                .into_iter()
                .fold(Code::default(), |code, queue| device.notify(code, queue));
            let body = body.store(device.register(register::INTERRUPT_ACKNOWLEDGE), u32::MAX);
            code.times(5_000, &body)
        });
    }
}

/// Ports, without the registers that end a machine: read and written in each width, one by one and as strings. All ports
/// that a PC has devices at, and every thirteenth of the rest.
#[test]
fn a_sweep_over_the_ports() {
    let Some(tap) = tap::create() else { return };
    let ranges = [(0, SLEEP_CONTROL - 1, 1), (RESET + 1, 0xfff, 1), (0x1000, u16::MAX, 13_u32)];
    let code = ranges.into_iter().fold(Code::default(), |code, (from, to, step)| {
        // mov esi, FROM; again: mov edx, esi
        let sweep = code.bytes(&[0xbe]).bytes(&u32::from(from).to_le_bytes()).bytes(&[0x89, 0xf2]);
        // in al, dx; in ax, dx; in eax, dx; xor eax, eax; out dx, al; out dx, ax; out dx, eax
        let sweep = sweep.bytes(&[0xec, 0x66, 0xed, 0xed, 0x31, 0xc0, 0xee, 0x66, 0xef, 0xef]);
        // add esi, STEP; cmp esi, TO; jbe again
        let sweep = sweep.bytes(&[0x81, 0xc6]).bytes(&step.to_le_bytes()).bytes(&[0x81, 0xfe]);
        sweep.bytes(&u32::from(to).to_le_bytes()).bytes(&[0x76, 0xe6])
    });
    // rep insb and rep outsb, 8 KiB each, at ports with and without a device.
    let code = [0x3f8, 0x3f9, 0x64, 0x600, 0x620, 0x1234_u32].into_iter().fold(code, |code, port| {
        let code = code.bytes(&[0xba]).bytes(&port.to_le_bytes()).address(BUFFER);
        let code = code.bytes(&[0xb9, 0, 0x20, 0, 0, 0xf3, 0x6c]);
        if matches!(port, 0x64 | 0x600) {
            code
        } else {
            // mov esi, BUFFER; mov ecx, 0x2000; rep outsb
            code.bytes(&[0xbe])
                .bytes(&(BUFFER + 0x10_0000).to_le_bytes())
                .bytes(&[0xb9, 0, 0x20, 0, 0, 0xf3, 0x6e])
        }
    });
    let code = use_well(code, DISK).print("alive").power_off();
    let mut machine = machine(&code);
    machine.config["machine-config"]["max_vcpu_count"] = json!(4);
    machine.start(&common::machines::tap_argument(&tap));
    let ended = machine.wait();
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert!(ended.console.ends_with("alive"), "{}", ended.stderr);
}

/// Registers in every width, at every offset, also across windows and where no device is.
#[test]
fn a_sweep_over_all_registers_in_all_widths() {
    let Some(tap) = tap::create() else { return };
    let windows = 8 * WINDOW_SIZE;
    // mov edi, WINDOW; again: mov al, [rdi]; mov [rdi], al; mov ax, [rdi]; mov [rdi], ax; mov eax, [rdi]; mov [rdi], eax;
    // mov rax, [rdi]; mov [rdi], rax; inc edi; cmp edi, END; jb again
    let code = Code::default().address(WINDOW).bytes(&[
        0x8a, 0x07, 0x88, 0x07, 0x66, 0x8b, 0x07, 0x66, 0x89, 0x07, 0x8b, 0x07, 0x89, 0x07, 0x48, 0x8b, 0x07,
        0x48, 0x89, 0x07, 0xff, 0xc7, 0x81, 0xff,
    ]);
    let code = code.bytes(&(WINDOW + windows).to_le_bytes()).bytes(&[0x72, 0xe2]);
    // Pages of the hole that belong to nobody, up to the IOAPIC: mov eax, [rdi]; mov [rdi], eax; add edi, 0x10ffc
    let code = code.address(WINDOW + windows).bytes(&[0x8b, 0x07, 0x89, 0x07, 0x81, 0xc7]);
    let code = code.bytes(&0x1_0ffc_u32.to_le_bytes()).bytes(&[0x81, 0xff]);
    let code = code.bytes(&0xfec0_0000_u32.to_le_bytes()).bytes(&[0x72, 0xee]);
    let code = DEVICES.into_iter().fold(code, use_well).print("alive").power_off();
    let mut machine = machine(&code);
    machine.start(&common::machines::tap_argument(&tap));
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "alive"), "{}", ended.stderr);
}

/// The API answers while a guest does nothing but ring bells and print.
#[test]
fn a_storm_does_not_keep_the_api_waiting() {
    let Some(tap) = tap::create() else { return };
    let code = DEVICES.into_iter().fold(Code::default(), set_up);
    let storm = DEVICES.into_iter().fold(Code::default(), |code, device| {
        let code = device.notify(device.notify(code, 0), 1);
        code.store(device.register(register::INTERRUPT_ACKNOWLEDGE), 3)
    });
    let storm = storm.print(".");
    let back = -i32::try_from(storm.0.len() + 5).unwrap();
    let code = code.bytes(&storm.0).bytes(&[0xe9]).bytes(&back.to_le_bytes());
    let mut machine = machine(&code);
    machine.start(&common::machines::tap_argument(&tap));
    let client = machine.client().with_timeout(std::time::Duration::from_secs(5));
    common::wait_for("the storm", || machine.console().contains("....").then_some(()));
    for _ in 0..20 {
        client.metrics().unwrap();
        client.pause().unwrap();
        client.resume().unwrap();
    }
    client.force_stop().unwrap();
    let ended = machine.wait();
    assert_eq!(ended.code, roost_vmm::exit::ExitCode::Killed.code(), "{}", ended.stderr);
}
