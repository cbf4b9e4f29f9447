//! Disks and interfaces that change while the machine runs, as guest and host see it.

// Tests build bytes out of numbers whose size they know.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::Duration;

use common::virtio::{
    Device, NEXT, Ring, WRITE, block, block_clear, block_header, block_offer, block_request, register,
};
use common::{Code, Machine, disk, hand, hand_over, machines, notify, says, tap, wait_for};
use imago::FormatCreateBuilder;
use imago::qcow2::Qcow2;
use roost_vmm::client::{Client, ClientError};
use roost_vmm::threads;
use serde_json::{Value, json};

const DISK: Device = Device(0);
const RING: Ring = Ring { queue: 0, size: 8, base: 0x20_0000 };
const BUFFER: u32 = 0x50_0000;
/// Where the answer to a request is.
const STATUS: u32 = RING.base + 0xc010;

fn set_up() -> Code {
    DISK.go(DISK.queue(DISK.negotiate(Code::default(), 0), RING))
}

/// Reads a sector and complains if it does not begin with this.
fn expect_sector(code: Code, index: u16, sector: u64, value: u32) -> Code {
    let code = code.store(BUFFER, 0x0bad_0bad).store(STATUS, 0xff);
    block_request(code, RING, index, block::IN, sector, BUFFER, 512)
        .expect32(STATUS, 0)
        .expect32(BUFFER, value)
}

/// Waits for the interrupt that says that the configuration changed, and for this capacity.
fn wait_capacity(code: Code, sectors: u32) -> Code {
    wait_capacity_of(DISK, code, sectors)
}

fn wait_capacity_of(disk: Device, code: Code, sectors: u32) -> Code {
    let status = disk.register(register::INTERRUPT_STATUS);
    let code = code.wait_bits(status, 2).store(disk.register(register::INTERRUPT_ACKNOWLEDGE), 2);
    code.wait32(disk.register(register::CONFIG), sectors)
}

fn machine(code: &Code, drive: &Value) -> Machine {
    let mut machine = Machine::new(code);
    machine.config["drives"] = json!([drive]);
    machine
}

fn refusal(client: &Client, path: &str, body: &Value) -> String {
    match client.put("PATCH", path, body) {
        Err(ClientError::Refused(why)) => why,
        other => panic!("{body} was not refused: {other:?}"),
    }
}

fn patch(client: &Client, change: &Value) {
    client.put("PATCH", "/drives/d", change).unwrap();
}

fn metric(client: &Client, device: &str, name: &str) -> u64 {
    client.metrics().unwrap()["devices"][device][name].as_u64().unwrap()
}

#[test]
fn another_image_takes_the_place_of_a_disks_own_and_grows_under_the_running_guest() {
    let code = expect_sector(set_up(), 0, 3, 0x1111_1111).print("first");
    let code = expect_sector(wait_capacity(code, 4096), 1, 3, 0x2222_2222).print("second");
    // Beyond the end, until it grows.
    let code = block_request(code, RING, 2, block::IN, 4096, BUFFER, 512).expect32(STATUS, 1).print("full");
    let code = wait_capacity(code, 8192).store(BUFFER, 0x3333_3333);
    let code = block_request(code, RING, 3, block::OUT, 8191, BUFFER, 512).expect32(STATUS, 0).print("grown");
    let mut machine = machine(&code.power_off(), &json!({ "drive_id": "d", "path_on_host": "one" }));
    for (name, bytes, value) in [("one", 1 << 20, 0x1111_1111_u32), ("two", 2 << 20, 0x2222_2222)] {
        disk(&machine.path(name), bytes);
        let file = File::options().write(true).open(machine.path(name)).unwrap();
        file.write_all_at(&value.to_le_bytes(), 3 * 512).unwrap();
    }
    let (files, arguments) = hand(&machine, &["one", "two"]);
    machine.start(&arguments);
    let client = machine.client();
    says(&machine, "first");
    patch(&client, &json!({ "drive_id": "d", "path_on_host": "two" }));
    says(&machine, "full");
    files[1].set_len(4 << 20).unwrap();
    // What is open is looked at, paused or not.
    client.pause().unwrap();
    patch(&client, &json!({ "drive_id": "d", "path_on_host": "two" }));
    client.resume().unwrap();
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "firstsecondfullgrown"), "{}", ended.stderr);
    let mut bytes = [0; 4];
    files[1].read_exact_at(&mut bytes, 8191 * 512).unwrap();
    assert_eq!(u32::from_le_bytes(bytes), 0x3333_3333);
    assert!(files[0].metadata().unwrap().len() == 1 << 20);
}

/// The host's disk does not get on with writing an overlay, which came to a raw disk while the guest was running: another disk serves
/// the guest meanwhile, and takes another image itself.
#[test]
fn an_overlay_in_a_raw_disks_place_holds_no_other_device_up() {
    const OTHER: Device = Device(1);
    const OTHERS: Ring = Ring { base: 0x30_0000, ..RING };
    let (whole, rest) = ((BUFFER, 512), (BUFFER + 512, 512));
    let code = OTHER.go(OTHER.queue(OTHER.negotiate(set_up(), 0), OTHERS)).store(BUFFER, 0x600d_600d);
    let code = wait_capacity(code.print("up"), 4096);
    let code = block_offer(code, DISK, RING, 0, block::OUT, 5, whole);
    let code = wait_capacity_of(OTHER, code, 8192);
    let code = block_offer(code, OTHER, OTHERS, 0, block::IN, 8191, rest).wait16(OTHERS.used_index(), 1);
    let code = code.expect32(OTHERS.base + 0xc010, 0).expect32(RING.used_index(), 0).print("other");
    let code = code.wait16(RING.used_index(), 1).expect32(STATUS, 0);
    let code = expect_sector(code, 1, 5, 0x600d_600d).print("done").power_off();

    let mut machine = Machine::new(&code);
    machine.config["drives"] =
        ["d", "o"].iter().map(|name| json!({ "drive_id": name, "path_on_host": name })).collect();
    ["d", "o"].into_iter().for_each(|name| disk(&machine.path(name), 1 << 20));
    let overlay = File::create_new(machine.path("overlay")).unwrap();
    let builder = Qcow2::<imago::file::File>::create_builder(overlay.try_into().unwrap());
    builder.size(2 << 20).create().unwrap();
    let (files, arguments) = hand(&machine, &["d", "o", "overlay"]);

    let (child, listener) = notify::spawn(&mut machine.command(&arguments), notify::Calls::All).unwrap();
    machine.adopt(child);
    let (held, is_held) = channel();
    let (go_on, may_go_on) = channel();
    // Holds the first write to a file by any thread but that of the API, which makes the overlay ready.
    let host = std::thread::spawn(move || {
        let mut holding = None;
        loop {
            // A held call is looked after soon when it may go on.
            let next = notify::next(&listener, Duration::from_millis(20));
            if holding.is_some() && may_go_on.try_recv().is_ok() {
                notify::go_on(&listener, &holding.take().unwrap());
            }
            let Ok(call) = next else { continue };
            let Some(call) = call else { return };
            let writes = [libc::SYS_pwrite64, libc::SYS_pwritev, libc::SYS_pwritev2];
            let name = std::fs::read_to_string(format!("/proc/{}/comm", call.pid)).unwrap_or_default();
            if writes.contains(&i64::from(call.data.nr))
                && [threads::DEVICES, threads::DISK].contains(&name.trim_end())
                && held.send(name).is_ok()
            {
                holding = Some(call);
            } else {
                notify::go_on(&listener, &call);
            }
        }
    });
    let client = machine.client();
    says(&machine, "up");
    patch(&client, &json!({ "drive_id": "d", "path_on_host": "overlay", "format": "qcow2" }));
    assert_eq!(is_held.recv_timeout(common::DEADLINE).unwrap().trim_end(), threads::DISK);
    drop(is_held);
    files[1].set_len(4 << 20).unwrap();
    client.put("PATCH", "/drives/o", &json!({ "drive_id": "o", "path_on_host": "o" })).unwrap();
    says(&machine, "other");
    go_on.send(()).unwrap();
    let ended = machine.wait();
    host.join().unwrap();
    assert_eq!((ended.code, ended.console.as_str()), (0, "upotherdone"), "{}", ended.stderr);
}

/// What an overlay still held in memory is written before another takes its place.
#[test]
fn an_overlay_is_whole_when_it_is_taken_away() {
    let code = block_request(set_up().store(BUFFER, 7), RING, 0, block::OUT, 5, BUFFER, 512).print("written");
    let code = expect_sector(wait_capacity(code, 2048), 1, 5, 0).print("raw");
    let code = expect_sector(wait_capacity(code, 2048), 2, 5, 7).print("back");
    let code = expect_sector(code, 3, 6, 0x600d_600d);
    let mut machine = machine(
        &code.power_off(),
        &json!({ "drive_id": "d", "path_on_host": "overlay", "format": "qcow2", "backing": "base" }),
    );
    let overlay = File::create_new(machine.path("overlay")).unwrap();
    let builder = Qcow2::<imago::file::File>::create_builder(overlay.try_into().unwrap());
    builder.size(1 << 20).backing("base".into(), "raw".into()).create().unwrap();
    ["base", "empty"].into_iter().for_each(|name| disk(&machine.path(name), 1 << 20));
    let base = File::options().write(true).open(machine.path("base")).unwrap();
    base.write_all_at(&0x600d_600d_u32.to_le_bytes(), 6 * 512).unwrap();
    let (_files, arguments) = hand(&machine, &["overlay", "base", "empty"]);
    machine.start(&arguments);
    let client = machine.client();
    says(&machine, "written");
    patch(&client, &json!({ "drive_id": "d", "path_on_host": "empty", "format": "raw" }));
    says(&machine, "raw");
    let back = json!({ "drive_id": "d", "path_on_host": "overlay", "format": "qcow2", "backing": "base" });
    patch(&client, &back);
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "writtenrawback"), "{}", ended.stderr);
}

#[test]
fn a_drive_that_is_no_file_is_refused_by_name() {
    for (name, what) in [("folder", "a folder"), ("pipe", "a pipe"), ("/dev/zero", "a character device")] {
        let code = Code::default().power_off();
        let mut machine =
            machine(&code, &json!({ "drive_id": "d", "path_on_host": "", "is_read_only": true }));
        std::fs::create_dir(machine.path("folder")).unwrap();
        assert!(Command::new("mkfifo").arg(machine.path("pipe")).status().unwrap().success());
        // Both ends are open, so that neither open blocks.
        let _ends = File::options().read(true).write(true).open(machine.path("pipe")).unwrap();
        machine.config["drives"][0]["path_on_host"] = json!(machine.path(name));
        let ended = machine.run();
        assert_ne!(ended.code, 0);
        let words = format!("is {what}, must be a file or a block device");
        assert!(ended.stderr.contains(&words) && ended.stderr.contains(name), "{}", ended.stderr);
    }
}

/// A disk that was opened by path can be looked at again, though no path is opened any more.
#[test]
fn limits_come_and_go_at_once_and_what_cannot_be_is_refused() {
    let read = |code, index, word| expect_sector(code, index, 0, 0).print(word);
    let capacity = DISK.register(register::CONFIG);
    let code = read(read(set_up(), 0, "a"), 1, "b").wait32(capacity, 4096);
    let code = read(read(code, 2, "c"), 3, "d").wait32(capacity, 2048);
    // It stays until the host has looked.
    let code = read(code, 4, "e").wait32(capacity, 4096);
    let drive = json!({ "drive_id": "d", "path_on_host": "", "is_read_only": false });
    let mut machine = machine(&code.power_off(), &drive);
    machine.config["drives"][0]["path_on_host"] = json!(machine.text("disk"));
    disk(&machine.path("disk"), 1 << 20);
    disk(&machine.path("small"), 1 << 20);
    let path = machine.text("disk");
    let read_only = File::open(machine.path("small")).unwrap();
    machine.start(&hand_over("read-only", &read_only));
    let client = machine.client();
    let limit = |size: u64, refill: u64| json!({ "bandwidth": { "size": size, "refill_time": refill } });
    says(&machine, "b");
    assert_eq!(metric(&client, "d", "limited"), 0);

    for (id, change, word) in [
        ("d", json!({ "drive_id": "d", "path_on_host": "nowhere" }), "nowhere"),
        ("d", json!({ "drive_id": "d", "path_on_host": "read-only" }), "cannot be written"),
        ("d", json!({ "drive_id": "d", "path_on_host": path, "format": "qcow2" }), "as Qcow2"),
        ("d", json!({ "drive_id": "d", "path_on_host": path, "backing": "x" }), "format qcow2"),
        ("d", json!({ "drive_id": "d", "is_read_only": true }), "is_read_only"),
        ("d", json!({ "drive_id": "e" }), "is not the path's"),
        ("e", json!({ "drive_id": "e" }), "no drive_id \"e\""),
    ] {
        let why = refusal(&client, &format!("/drives/{id}"), &change);
        assert!(why.contains(word), "{change}: {why}");
    }
    let config = || client.request("GET", "/vm/config", b"").unwrap();
    let drive = || serde_json::from_slice::<Value>(&config()).unwrap()["drives"][0].clone();
    assert_eq!(drive()["path_on_host"], json!(path));

    // The guest's third read leaves one byte, so that its fourth passes too; the next waits for an hour.
    patch(&client, &json!({ "drive_id": "d", "rate_limiter": limit(513, 3_600_000) }));
    assert_eq!(drive()["rate_limiter"], limit(513, 3_600_000));
    File::options().write(true).open(machine.path("disk")).unwrap().set_len(2 << 20).unwrap();
    patch(&client, &json!({ "drive_id": "d", "path_on_host": path }));
    says(&machine, "d");
    let waits = |count| wait_for("a wait", || (metric(&client, "d", "limited") >= count).then_some(()));
    // The look for a request that is not there yet counts.
    waits(1);
    File::options().write(true).open(machine.path("disk")).unwrap().set_len(1 << 20).unwrap();
    patch(&client, &json!({ "drive_id": "d", "path_on_host": path }));
    waits(2);
    assert_eq!(machine.console(), "abcd");
    patch(&client, &json!({ "drive_id": "d", "rate_limiter": limit(0, 0) }));
    assert!(drive().get("rate_limiter").is_none());
    File::options().write(true).open(machine.path("disk")).unwrap().set_len(2 << 20).unwrap();
    patch(&client, &json!({ "drive_id": "d", "path_on_host": path }));
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "abcde"), "{}", ended.stderr);
}

#[test]
fn an_interfaces_limits_change_each_way() {
    let Some(tap) = tap::create() else { return };
    let (net, ring, frame) = (Device(0), Ring { queue: 1, size: 8, base: 0x40_0000 }, 0x70_0000);
    let receive = Ring { queue: 0, size: 8, base: 0x30_0000 };
    let code = net.go(net.queue(net.queue(net.negotiate(Code::default(), 0), receive), ring));
    let send = |code, index| {
        let code = ring.descriptor(code, 0, frame, 72, 0, 0);
        net.notify(ring.offer(code, index, 0), 1).wait16(ring.used_index(), index + 1).print("s")
    };
    let code = (0..4).fold(code, send);
    let mut machine = Machine::new(&code.power_off());
    machine.config["network-interfaces"] = json!([{
        "iface_id": "eth0", "host_dev_name": "tap",
        "tx_rate_limiter": { "ops": { "size": 2, "refill_time": 3_600_000 } },
    }]);
    machine.start(&machines::tap_argument(&tap));
    let client = machine.client();
    wait_for("a wait", || (metric(&client, "eth0", "tx_limited") > 0).then_some(()));
    says(&machine, "ss");
    let none = json!({ "ops": { "size": 0, "refill_time": 0 } });
    let other = json!({ "ops": { "size": 1, "refill_time": 100 } });
    let why = refusal(&client, "/network-interfaces/eth1", &json!({ "iface_id": "eth1" }));
    assert!(why.contains("no iface_id \"eth1\""), "{why}");
    let change = |body: &Value| client.put("PATCH", "/network-interfaces/eth0", body).unwrap();
    change(&json!({ "iface_id": "eth0", "rx_rate_limiter": other }));
    assert_eq!(machine.console(), "ss");
    change(&json!({ "iface_id": "eth0", "tx_rate_limiter": none }));
    let config: Value = serde_json::from_slice(&client.request("GET", "/vm/config", b"").unwrap()).unwrap();
    let interface = &config["network-interfaces"][0];
    assert_eq!((&interface["rx_rate_limiter"], interface.get("tx_rate_limiter")), (&other, None));
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "ssss"), "{}", ended.stderr);
}

#[test]
fn nothing_changes_before_the_start() {
    let mut machine = Machine::new(&Code::default());
    let socket = machine.text("api");
    machine.start_with(&["run", "--api-sock", &socket]);
    let client = machine.client();
    for (path, body) in
        [("/drives/d", json!({ "drive_id": "d" })), ("/network-interfaces/e", json!({ "iface_id": "e" }))]
    {
        let why = refusal(&client, path, &body);
        assert!(why.contains("has not been started"), "{why}");
    }
}

/// Each engine with each format, under one guest: it writes, reads back, zeroes, flushes, and has 64 requests under way at once.
#[test]
fn every_engine_does_the_same_work() {
    for (engine, format) in [("Sync", "raw"), ("Async", "raw"), ("Sync", "qcow2"), ("Async", "qcow2")] {
        let ring = Ring { queue: 0, size: 128, base: RING.base };
        let code = DISK.go(DISK.queue(DISK.negotiate(Code::default(), 1 << 9), ring));
        let request = |code, index, kind, sector, length| {
            block_request(code, ring, index, kind, sector, BUFFER, length).expect32(STATUS, 0)
        };
        let code = request(code.store(BUFFER, 0x600d_600d), 0, block::OUT, 9, 4096);
        let code = request(code.store(BUFFER, 0), 1, block::IN, 9, 512).expect32(BUFFER, 0x600d_600d);
        let code = request(code, 2, block::FLUSH, 0, 0);
        let code = block_clear(code, ring, 3, block::WRITE_ZEROES, 9, 1).expect32(STATUS, 0);
        let code = request(code, 4, block::IN, 9, 512).expect32(BUFFER, 0);
        // One chain, offered 64 times before the bell rings: each reads the same into the same place.
        let code = request(code.store(BUFFER, 0x1234_5678), 5, block::OUT, 20, 512).store(BUFFER, 0);
        let header = ring.base + 0xc000;
        let code = block_header(code, header, block::IN, 20).store(STATUS, 0xff);
        let code = ring.descriptor(code, 1, BUFFER.into(), 512, NEXT | WRITE, 2);
        let code = (6..70).fold(code, |code, index| ring.offer(code, index, 0));
        let code = DISK.notify(code, 0).wait16(ring.used_index(), 70).expect32(BUFFER, 0x1234_5678);
        let code = code.expect32(STATUS, 0).print("done").power_off();
        let drive = json!({ "drive_id": "d", "path_on_host": "", "format": format, "io_engine": engine });
        let mut machine = machine(&code, &drive);
        machine.config["drives"][0]["path_on_host"] = json!(machine.text("disk"));
        disk(&machine.path("disk"), if format == "raw" { 1 << 20 } else { 0 });
        if format == "qcow2" {
            let file = File::options().read(true).write(true).open(machine.path("disk")).unwrap();
            let builder = Qcow2::<imago::file::File>::create_builder(file.try_into().unwrap());
            builder.size(1 << 20).create().unwrap();
        }
        machine.start::<&str>(&[]);
        let ended = machine.wait();
        assert_eq!((ended.code, ended.console.as_str()), (0, "done"), "{engine} {format}: {}", ended.stderr);
        if format == "raw" {
            let file = File::open(machine.path("disk")).unwrap();
            let mut bytes = [0; 4];
            file.read_exact_at(&mut bytes, 20 * 512).unwrap();
            assert_eq!(u32::from_le_bytes(bytes), 0x1234_5678);
        }
    }
}

/// A guest resets its disk over and over while requests are under way, and uses their memory for its queue meanwhile.
#[test]
fn resets_wait_for_what_is_under_way() {
    for (engine, format) in [("Async", "raw"), ("Async", "qcow2")] {
        let ring = Ring { queue: 0, size: 128, base: RING.base };
        let set_up = |code| {
            let code = DISK.negotiate(code, 1 << 9);
            let code = code.store(ring.available(), 0).store(ring.used(), 0);
            DISK.go(DISK.queue(code, ring))
        };
        let (header, length) = (ring.base + 0xc000, 1 << 20);
        // Reads of 1 MiB each; after the reset the first and last words are the guest's own, and stay so.
        let body = block_header(set_up(Code::default()), header, block::IN, 0);
        let body = ring.descriptor(body, 0, header.into(), 16, NEXT, 1);
        let body = ring.descriptor(body, 1, BUFFER.into(), length, NEXT | WRITE, 2);
        let body = ring.descriptor(body, 2, u64::from(header) + 16, 1, WRITE, 0);
        let body = (0..16).fold(body, |code, index| ring.offer(code, index, 0));
        let body = DISK.notify(body, 0).store(DISK.register(register::STATUS), 0);
        let last = BUFFER + length - 4;
        let body = body.store(BUFFER, 7).store(last, 7).store(STATUS, 7);
        let body = body.look16(BUFFER, 8, 200).expect32(BUFFER, 7).expect32(last, 7).expect32(STATUS, 7);
        let code = Code::default().times(100, &body);
        let code = block_request(set_up(code), ring, 0, block::IN, 0, BUFFER, 512).expect32(STATUS, 0);
        let drive = json!({ "drive_id": "d", "path_on_host": "", "format": format, "io_engine": engine });
        let mut machine = machine(&code.print("alive").power_off(), &drive);
        machine.config["drives"][0]["path_on_host"] = json!(machine.text("disk"));
        disk(&machine.path("disk"), if format == "raw" { 2 << 20 } else { 0 });
        if format == "qcow2" {
            let file = File::options().read(true).write(true).open(machine.path("disk")).unwrap();
            let builder = Qcow2::<imago::file::File>::create_builder(file.try_into().unwrap());
            builder.size(2 << 20).create().unwrap();
        }
        machine.start::<&str>(&[]);
        let ended = machine.wait();
        assert_eq!((ended.code, ended.console.as_str()), (0, "alive"), "{format}: {}", ended.stderr);
    }
}

/// Three of a disk's four queues, each with its own requests; all three share the disk's limit, and none waits for ever.
#[test]
fn queues_of_one_disk_share_its_image_and_its_limits() {
    let rings = [0, 1, 3].map(|queue| Ring { queue, size: 8, base: 0x20_0000 + 0x2_0000 * queue });
    // VIRTIO_BLK_F_MQ and VIRTIO_BLK_F_FLUSH. The count of queues is behind the bytes of the cache's mode.
    let code = Code::default().expect32(DISK.register(register::CONFIG + 32), 4 << 16);
    let code =
        rings.iter().fold(DISK.negotiate(code, 1 << 12 | 1 << 9), |code, ring| DISK.queue(code, *ring));
    let mut code = DISK.go(code);
    for (n, ring) in (0..).zip(rings) {
        code = block_request(code.store(BUFFER, 0x100 + n), ring, 0, block::OUT, u64::from(n), BUFFER, 512);
    }
    // Seven requests to each queue before any bell rings.
    for (n, ring) in (0..).zip(rings) {
        let header = ring.base + 0xc000;
        code = block_header(code, header, block::IN, n).store(ring.base + 0xc010, 0xff);
        code = ring.descriptor(code, 1, u64::from(ring.base) + 0xd000, 512, NEXT | WRITE, 2);
        code = (1..8).fold(code, |code, index| ring.offer(code, index, 0));
    }
    code = rings.into_iter().fold(code, |code, ring| DISK.notify(code, ring.queue));
    for (n, ring) in (0..).zip(rings) {
        code = code.wait16(ring.used_index(), 8).expect32(ring.base + 0xc010, 0);
        code = code.expect32(ring.base + 0xd000, 0x100 + n);
    }
    for engine in ["Sync", "Async"] {
        let drive = json!({
            "drive_id": "d", "path_on_host": "", "num_queues": 4, "io_engine": engine,
            "rate_limiter": { "ops": { "size": 4, "refill_time": 20 } },
        });
        let mut machine = machine(&code.clone().print("done").power_off(), &drive);
        machine.config["drives"][0]["path_on_host"] = json!(machine.text("disk"));
        disk(&machine.path("disk"), 1 << 20);
        machine.start::<&str>(&[]);
        let ended = machine.wait();
        assert_eq!((ended.code, ended.console.as_str()), (0, "done"), "{engine}: {}", ended.stderr);
    }
}

/// Where the host forbids io_uring, a raw disk has a thread of its own, and says so.
#[test]
fn without_io_uring_a_disk_has_a_thread() {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
    use std::os::unix::process::CommandExt;
    let rules = [(libc::SYS_io_uring_setup, Vec::new())].into_iter().collect();
    let forbidden = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, forbidden, TargetArch::x86_64).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    let code = block_request(set_up().store(BUFFER, 5), RING, 0, block::OUT, 0, BUFFER, 512).store(BUFFER, 0);
    let code = expect_sector(code, 1, 0, 5).print("done").power_off();
    let mut machine = machine(&code, &json!({ "drive_id": "d", "path_on_host": "" }));
    machine.config["drives"][0]["path_on_host"] = json!(machine.text("disk"));
    disk(&machine.path("disk"), 1 << 20);
    let mut command = machine.command::<&str>(&[]);
    // SAFETY: between fork and exec the filter is installed by system calls alone.
    unsafe { command.pre_exec(move || seccompiler::apply_filter(&program).map_err(std::io::Error::other)) };
    machine.adopt(command.spawn().unwrap());
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "done"), "{}", ended.stderr);
    assert!(ended.stderr.contains("disk \"d\": no io_uring"), "{}", ended.stderr);
}

/// Snapshots of a guest that always has eight requests of 8 MiB under way: each is whole, and both guest and clone miss nothing.
#[test]
fn a_snapshot_waits_for_what_is_under_way() {
    const TURNS: u16 = 30;
    const BYTES: u32 = 8 << 20;
    let ring = Ring { queue: 0, size: 128, base: RING.base };
    let header = ring.base + 0xc000;
    let code = DISK.go(DISK.queue(DISK.negotiate(Code::default(), 1 << 9), ring));
    // The disk's first sectors are written again and again, as reads of what the host has in memory would be done at once.
    let code = block_header(code.store(BUFFER, 0x6161_6161), header, block::OUT, 0);
    let code = ring.descriptor(code, 0, header.into(), 16, NEXT, 1);
    let code = ring.descriptor(code, 1, BUFFER.into(), BYTES, NEXT, 2);
    let code = ring.descriptor(code, 2, STATUS.into(), 1, WRITE, 0);
    let code = (0..TURNS).fold(code, |code, turn| {
        let code = code.store(STATUS, 0xff);
        let code = (0..8).fold(code, |code, n| ring.offer(code, 8 * turn + n, 0));
        let code = DISK.notify(code, 0).print(",").wait16(ring.used_index(), 8 * (turn + 1));
        code.expect32(STATUS, 0).print(".")
    });
    for format in ["raw", "qcow2"] {
        let drive = json!({ "drive_id": "d", "path_on_host": "disk", "format": format });
        let mut machine = machine(&code.clone().power_off(), &drive);
        machine.config["machine-config"]["mem_size_mib"] = json!(32);
        disk(&machine.path("disk"), if format == "raw" { u64::from(BYTES) } else { 0 });
        if format == "qcow2" {
            let file = File::options().read(true).write(true).open(machine.path("disk")).unwrap();
            let builder = Qcow2::<imago::file::File>::create_builder(file.try_into().unwrap());
            builder.size(BYTES.into()).create().unwrap();
        }
        let (_files, arguments) = hand(&machine, &["disk", "state", "memory"]);
        machine.start(&arguments);
        let client = machine.client();
        let mut printed = String::new();
        for _ in 0..5 {
            wait_for("requests", || machine.console()[printed.len()..].contains(',').then_some(()));
            client.pause().unwrap();
            printed = machine.console();
            let body = json!({ "snapshot_path": "state", "mem_file_path": "memory" });
            client.put("PUT", "/snapshot/create", &body).unwrap();
            client.resume().unwrap();
        }
        let ended = machine.wait();
        let all = ",.".repeat(TURNS.into());
        assert_eq!((ended.code, ended.console.as_str()), (0, all.as_str()), "{format}: {}", ended.stderr);

        let mut clone = Machine::new(&Code::default());
        let socket = clone.text("api");
        let mut with = vec!["run", "--api-sock", &socket];
        with.extend(arguments.iter().map(String::as_str));
        clone.start_with(&with);
        let body = json!({
            "snapshot_path": "state", "mem_file_path": "memory", "resume_vm": true,
            "serial_override": { "output": clone.text("console") },
        });
        clone.client().put("PUT", "/snapshot/load", &body).unwrap();
        let ended = clone.wait();
        let rest = &all[printed.len()..];
        assert!(!rest.is_empty(), "{format}: the guest was too quick");
        assert_eq!((ended.code, ended.console.as_str()), (0, rest), "{format}: {}", ended.stderr);
    }
}
