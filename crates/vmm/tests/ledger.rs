//! Every line of the system-call filters is of use to some machine: machines run here with each of their calls watched,
//! and what was allowed is compared with what was made.

// Tests build bytes out of numbers whose size they know.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use common::balloon::give;
use common::virtio::{Device, Ring, WRITE, block, block_clear, block_request};
use common::vsock::{connect, ping};
use common::watch::{self, Call};
use common::{Code, Ended, Machine, disk, hand, hand_over, machines, tap, wait_for};
use imago::FormatCreateBuilder;
use imago::qcow2::Qcow2;
use roost_vmm::exit::ExitCode;
use roost_vmm::seccomp::rules::{Kind, allowed};
use serde_json::json;

#[derive(Default)]
struct Ledger {
    calls: BTreeSet<(u8, u32, Call)>,
}

impl Ledger {
    /// Runs a machine, does something with it, and notes its calls.
    fn run(
        &mut self,
        machine: &mut Machine,
        arguments: &[String],
        meanwhile: impl FnOnce(&mut Machine),
    ) -> Ended {
        let command = machine.command(arguments);
        self.run_command(machine, command, meanwhile)
    }

    fn run_command(
        &mut self,
        machine: &mut Machine,
        mut command: Command,
        meanwhile: impl FnOnce(&mut Machine),
    ) -> Ended {
        command.stdin(Stdio::piped());
        let (child, seen) = watch::start(&mut command);
        machine.adopt(child);
        meanwhile(machine);
        let ended = machine.wait();
        let seen = seen.join().unwrap();
        self.calls.extend(seen.calls.into_iter().map(|(kind, call)| (kind, seen.pid, call)));
        ended
    }

    fn has(&self, kind: Kind, number: i64, takes: impl Fn(&[u64; 6], u32) -> bool) -> bool {
        self.calls.iter().any(|(of, pid, (call, arguments))| {
            *of == kind as u8 && *call == number && takes(arguments, *pid)
        })
    }
}

/// A machine that does all that machines do: disk (looked at again), interface, console both ways, a pause.
fn busy_life(ledger: &mut Ledger) {
    let Some(tap) = tap::create() else { return };
    let mut machine = machines::with_disk_and_interface();
    let arguments = machines::tap_argument(&tap);
    ledger.run(&mut machine, &arguments, |machine| {
        wait_for("the guest", || machine.console().contains(machines::UP).then_some(()));
        let client = machine.client();
        client.pause().unwrap();
        client.resume().unwrap();
        client.metrics().unwrap();
        let disk = json!({ "drive_id": "root", "path_on_host": machine.text("disk") });
        client.put("PATCH", "/drives/root", &disk).unwrap();
        client.console_input(b"x").unwrap();
        client.force_stop().unwrap();
    });
}

/// Snapshots of a machine that notes what is written.
fn snapshots(ledger: &mut Ledger) {
    let mut machine = Machine::new(&machines::echo());
    machine.config["machine-config"]["track_dirty_pages"] = json!(true);
    let (_files, mut arguments) = hand(&machine, &["state", "memory"]);
    arguments.push("--open-paths".to_owned());
    ledger.run(&mut machine, &arguments, |machine| {
        let client = machine.client();
        client.pause().unwrap();
        for (state, memory) in
            [(machine.text("s"), machine.text("m")), (machine.text("no/where"), machine.text("m"))]
        {
            let body = json!({ "snapshot_path": state, "mem_file_path": memory });
            assert_eq!(client.put("PUT", "/snapshot/create", &body).is_ok(), state.ends_with("/s"));
        }
        for kind in ["Full", "Diff"] {
            let body = json!({ "snapshot_type": kind, "snapshot_path": "state", "mem_file_path": "memory" });
            client.put("PUT", "/snapshot/create", &body).unwrap();
        }
        client.force_stop().unwrap();
    });
}

fn reset(ledger: &mut Ledger) {
    let mut machine = Machine::new(&Code::default().print("again").reset());
    let ended = ledger.run(&mut machine, &[], |machine| {
        wait_for("a second start", || (machine.console().len() >= 15).then_some(()));
        machine.client().force_stop().unwrap();
    });
    assert_eq!(ended.code, ExitCode::Killed.code(), "{}", ended.stderr);
}

/// A kernel of many pages, which a reset maps again.
fn reset_of_a_large_kernel(ledger: &mut Ledger) {
    let mut machine = Machine::new(&Code::default());
    machine.write_large_kernel(Code::default().print("again").reset());
    ledger.run(&mut machine, &[], |machine| {
        wait_for("a second start", || (machine.console().len() >= 15).then_some(()));
        machine.client().force_stop().unwrap();
    });
}

/// A kernel whose code moves into huge pages.
fn code_in_huge_pages(ledger: &mut Ledger) {
    let mut machine = machines::code::machine();
    let command = machine.command_with(&["run", "--api-sock", &machine.text("api")]);
    ledger.run_command(&mut machine, command, |machine| {
        machines::code::start(machine);
        wait_for("the guest", || (machine.console() == "a").then_some(()));
        machine.client().force_stop().unwrap();
    });
}

fn crash(ledger: &mut Ledger) {
    let ended = ledger.run(&mut Machine::new(&Code::default().bytes(&[0x0f, 0x0b])), &[], |_| ());
    assert_eq!(ended.code, ExitCode::GuestCrash.code(), "{}", ended.stderr);
}

/// Console input that comes from a pipe and ends; random bytes.
fn input_and_entropy(ledger: &mut Ledger) {
    let (device, ring) = (Device(0), Ring { queue: 0, size: 8, base: 0x20_0000 });
    let code = device.go(device.queue(device.negotiate(Code::default(), 0), ring));
    let code = ring.offer(ring.descriptor(code, 0, 0x50_0000, 64, WRITE, 0), 0, 0);
    let code = device.notify(code, 0).wait16(ring.used_index(), 1);
    // wait: mov edx, 0x3fd; in al, dx; test al, 1; jz wait
    let code = code.bytes(&[0xba, 0xfd, 0x03, 0, 0, 0xec, 0xa8, 0x01, 0x74, 0xf6]).power_off();
    let mut machine = Machine::new(&code);
    machine.config["entropy"] = json!({});
    machine.config["serial"]["input"] = json!("stdin");
    let ended = ledger.run(&mut machine, &[], |machine| machine.type_and_close(b"x"));
    assert_eq!(ended.code, 0, "{}", ended.stderr);
}

/// Disks that are limited, written, and then flushed by the end of the machine.
fn power_off_with_a_disk(ledger: &mut Ledger) {
    let (device, ring) = (Device(0), Ring { queue: 0, size: 8, base: 0x20_0000 });
    let code = device.go(device.queue(device.negotiate(Code::default(), 0), ring));
    let code = block_request(code, ring, 0, block::OUT, 0, 0x50_0000, 4096);
    let code = block_clear(code, ring, 1, block::DISCARD, 0, 8);
    let code = block_request(code, ring, 2, block::IN, 0, 0x50_0000, 512).power_off();
    let mut machine = Machine::new(&code);
    disk(&machine.path("disk"), 1 << 20);
    machine.config["drives"] = json!([{
        "drive_id": "root",
        "path_on_host": machine.text("disk"),
        "rate_limiter": { "bandwidth": { "size": 512, "refill_time": 20 } },
        "io_engine": "Sync",
    }]);
    let ended = ledger.run(&mut machine, &[], |_| ());
    assert_eq!(ended.code, 0, "{}", ended.stderr);
}

/// An interface of two taps, of which the guest uses both.
fn several_pairs(ledger: &mut Ledger) {
    let Some((taps, _wire)) = tap::create_several(2) else { return };
    let (net, control) = (Device(0), Ring { queue: 4, size: 8, base: 0x20_0000 });
    let code = net.go(net.queue(net.negotiate(Code::default(), machines::SEVERAL_PAIRS), control));
    let code = machines::use_pairs(code, net, control, 0, 2, 0).power_off();
    let mut machine = Machine::new(&code);
    machine.config["network-interfaces"] =
        json!([{ "iface_id": "eth0", "host_dev_name": "tap", "num_queue_pairs": 2 }]);
    let arguments = [hand_over("tap", &taps[0]), hand_over("tap.1", &taps[1])].concat();
    let ended = ledger.run(&mut machine, &arguments, |_| ());
    assert_eq!((ended.code, ended.console.as_str()), (0, ""), "{}", ended.stderr);
}

/// An overlay, which has a thread of its own.
fn overlay(ledger: &mut Ledger) {
    let (device, ring) = (Device(0), Ring { queue: 0, size: 8, base: 0x20_0000 });
    let code = device.go(device.queue(device.negotiate(Code::default(), 1 << 9), ring));
    let code = block_request(code, ring, 0, block::OUT, 0, 0x50_0000, 4096);
    let code = block_request(code, ring, 1, block::IN, 0, 0x50_0000, 512);
    let code = block_request(code, ring, 2, block::FLUSH, 0, 0, 0);
    let code = block_clear(code, ring, 3, block::DISCARD, 0, 128).power_off();
    let mut machine = Machine::new(&code);
    let file = File::create_new(machine.path("overlay")).unwrap();
    let builder = Qcow2::<imago::file::File>::create_builder(file.try_into().unwrap());
    builder.size(1 << 20).create().unwrap();
    machine.config["drives"] = json!([
        { "drive_id": "root", "path_on_host": machine.text("overlay"), "format": "qcow2" },
    ]);
    let ended = ledger.run(&mut machine, &[], |_| ());
    assert_eq!(ended.code, 0, "{}", ended.stderr);
}

/// A balloon that is given a page of the kernel's file and pages of nobody's; its statistics come at another interval.
fn balloon(ledger: &mut Ledger) {
    let (device, ring) = (Device(0), Ring { queue: 0, size: 8, base: 0x30_0000 });
    let code = device.go(device.queue(device.negotiate(Code::default(), 0), ring));
    let code = give(code, device, ring, 0, (0x18_0000 >> 12, 1));
    let code = give(code, device, ring, 1, (0x50_0000 >> 12, 4));
    let mut machine = Machine::new(&Code::default());
    machine.write_large_kernel(code.print("given").stop());
    machine.config["balloon"] = json!({ "amount_mib": 1, "stats_polling_interval_s": 1 });
    ledger.run(&mut machine, &[], |machine| {
        wait_for("the guest", || machine.console().contains("given").then_some(()));
        let client = machine.client();
        client.put("PATCH", "/balloon/statistics", &json!({ "stats_polling_interval_s": 60 })).unwrap();
        client.force_stop().unwrap();
    });
}

/// A guest that connects to a program, and a program that connects to the guest (which refuses).
fn vsock(ledger: &mut Ledger) {
    let mut machine = Machine::new(&ping(Code::default(), Device(0)).print("done").stop());
    machine.config["vsock"] = json!({ "guest_cid": 7, "uds_path": machine.text("v.sock") });
    let listener = UnixListener::bind(machine.path("v.sock_52")).unwrap();
    ledger.run(&mut machine, &[], |machine| {
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; 4]).unwrap();
        stream.write_all(b"pong").unwrap();
        assert_eq!(stream.read(&mut [0; 4]).unwrap(), 0);
        drop(stream);
        wait_for("the guest", || machine.console().contains("done").then_some(()));
        let socket = machine.path("v.sock");
        let waiting = std::thread::spawn(move || connect(&socket, 4000));
        let asked = || machine.client().metrics().unwrap()["devices"]["vsock"]["from_host"] == json!(1);
        wait_for("the request", || asked().then_some(()));
        machine.client().force_stop().unwrap();
        assert_eq!(waiting.join().unwrap().1, "");
    });
}

#[test]
fn every_allowed_call_is_made() {
    let mut ledger = Ledger::default();
    if tap::create().is_none() {
        return;
    }
    busy_life(&mut ledger);
    snapshots(&mut ledger);
    reset(&mut ledger);
    reset_of_a_large_kernel(&mut ledger);
    code_in_huge_pages(&mut ledger);
    crash(&mut ledger);
    input_and_entropy(&mut ledger);
    power_off_with_a_disk(&mut ledger);
    overlay(&mut ledger);
    several_pairs(&mut ledger);
    balloon(&mut ledger);
    vsock(&mut ledger);

    let mut useless = Vec::new();
    let mut report = std::io::stderr().lock();
    for kind in [Kind::Api, Kind::Devices, Kind::Disk, Kind::Vcpu, Kind::Opener] {
        for line in allowed(kind) {
            let made = ledger.has(kind, line.call, |arguments, pid| line.only.takes(arguments, pid));
            let _ = writeln!(report, "{kind:?} {} {:?}: {}, made: {made}", line.call, line.only, line.why);
            if !made && line.unseen.is_none() {
                useless.push((kind, roost_vmm::seccomp::name(line.call), line.only, line.why));
            }
        }
    }
    assert!(useless.is_empty(), "allowed, but made by no machine: {useless:#?}");
}
