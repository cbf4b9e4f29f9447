//! Limits in snapshots: a machine that goes on has what was left of them, not more.

// Tests build bytes out of numbers whose size they know.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use common::virtio::{Device, NEXT, Ring, WRITE, block, block_header};
use common::{Code, Machine, disk, hand, hand_over, says, tap, wait_for};
use roost_vmm::client::Client;
use serde_json::{Value, json};

const DISK: (Device, Ring) = (Device(0), Ring { queue: 0, size: 16, base: 0x20_0000 });
const RX: Ring = Ring { queue: 0, size: 8, base: 0x30_0000 };
const NET: (Device, Ring) = (Device(1), Ring { queue: 1, size: 16, base: 0x40_0000 });
const ENTROPY: (Device, Ring) = (Device(2), Ring { queue: 0, size: 16, base: 0x60_0000 });
const HOUR: u64 = 3_600_000;

/// Sets all devices up, one chain each.
fn set_up() -> Code {
    let up = |code, (device, rings): (Device, &[Ring])| {
        let code = device.negotiate(code, 0);
        device.go(rings.iter().fold(code, |code, ring| device.queue(code, *ring)))
    };
    let all: [(Device, &[Ring]); 3] = [(DISK.0, &[DISK.1]), (NET.0, &[RX, NET.1]), (ENTROPY.0, &[ENTROPY.1])];
    let code = all.into_iter().fold(Code::default(), up);
    let header = DISK.1.base + 0xc000;
    let code = block_header(code, header, block::IN, 0);
    let code = DISK.1.descriptor(code, 0, header.into(), 16, NEXT, 1);
    let code = DISK.1.descriptor(code, 1, 0x50_0000, 512, NEXT | WRITE, 2);
    let code = DISK.1.descriptor(code, 2, u64::from(header) + 16, 1, WRITE, 0);
    let code = NET.1.descriptor(code, 0, 0x70_0000, 72, 0, 0);
    ENTROPY.1.descriptor(code, 0, 0x51_0000, 64, WRITE, 0)
}

/// Makes so many requests to each device, and waits for them or not.
fn requests(code: Code, numbers: std::ops::Range<u16>, waits: bool) -> Code {
    let end = numbers.end;
    [DISK, NET, ENTROPY].into_iter().fold(code, |code, (device, ring)| {
        let code = numbers.clone().fold(code, |code, n| ring.offer(code, n, 0));
        let code = device.notify(code, ring.queue);
        if waits { code.wait16(ring.used_index(), end) } else { code }
    })
}

fn counted(client: &Client, path: &str) -> u64 {
    client.metrics().unwrap().pointer(path).unwrap().as_u64().unwrap()
}

#[test]
fn what_was_left_of_limits_is_what_is_left() {
    let Some(tap) = tap::create() else { return };
    // Four of each, of which the guest uses two before the snapshot, and would use six after it.
    let code = requests(set_up(), 0..2, true).print("1");
    // again: mov edx, 0x3fd; in al, dx; test al, 1; jz again; mov edx, 0x3f8; in al, dx
    let code =
        code.bytes(&[0xba, 0xfd, 0x03, 0, 0, 0xec, 0xa8, 0x01, 0x74, 0xf6, 0xba, 0xf8, 0x03, 0, 0, 0xec]);
    let code = requests(code, 2..8, false).print("2345678901").stop();
    let mut machine = Machine::new(&code);
    disk(&machine.path("disk"), 1 << 20);
    let bucket =
        |size: u64, burst: u64| json!({ "size": size, "one_time_burst": burst, "refill_time": HOUR });
    machine.config["drives"] = json!([{
        "drive_id": "root", "path_on_host": machine.text("disk"), "rate_limiter": { "ops": bucket(1, 3) },
    }]);
    machine.config["network-interfaces"] = json!([{
        "iface_id": "eth0", "host_dev_name": "tap", "tx_rate_limiter": { "ops": bucket(4, 0) },
    }]);
    machine.config["entropy"] = json!({ "rate_limiter": { "bandwidth": bucket(64, 192) } });
    machine.config["serial"]["rate_limiter"] = bucket(3, 2);
    let (_files, mut arguments) = hand(&machine, &["state", "memory"]);
    arguments.extend(hand_over("tap", &tap));
    machine.start(&arguments);
    says(&machine, "1");
    let client = machine.client();
    client.pause().unwrap();
    client
        .put("PUT", "/snapshot/create", &json!({ "snapshot_path": "state", "mem_file_path": "memory" }))
        .unwrap();
    client.force_stop().unwrap();
    machine.wait();

    let limited = json!({ "output": "console", "rate_limiter": bucket(3, 2) });
    let other = json!({ "output": "console", "rate_limiter": bucket(6, 0) });
    for (serial, printed) in [(limited, "2345"), (other, "234567")] {
        let mut clone = Machine::new(&Code::default());
        let socket = clone.text("api");
        let (_console, console) = hand(&clone, &["console"]);
        let mut words = vec!["run", "--api-sock", &socket];
        words.extend(arguments.iter().chain(&console).map(String::as_str));
        clone.start_with(&words);
        let client = clone.client();
        let body: Value = json!({
            "snapshot_path": "state", "mem_file_path": "memory", "resume_vm": true, "serial_override": serial,
        });
        client.put("PUT", "/snapshot/load", &body).unwrap();
        client.console_input(b"x").unwrap();
        wait_for("all output", || (counted(&client, "/serial/bytes_out") == 10).then_some(()));
        assert_eq!(clone.console(), printed);
        for (limited, done) in [
            ("/devices/root/limited", "/devices/root/reads"),
            ("/devices/eth0/tx_limited", "/devices/eth0/tx_packets"),
            ("/devices/entropy/limited", "/devices/entropy/requests"),
        ] {
            wait_for(limited, || (counted(&client, limited) > 0).then_some(()));
            wait_for(done, || (counted(&client, done) >= 2).then_some(()));
            assert_eq!(counted(&client, done), 2, "{done}");
        }
    }
}
