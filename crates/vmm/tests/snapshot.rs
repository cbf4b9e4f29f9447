//! Machines that go on from a snapshot: what runs after it is what ran before it.

// Tests build bytes out of numbers whose size they know.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;

use common::balloon::give;
use common::faults::Faults;
use common::machines::{self, echo};
use common::virtio::{Device, Ring, WRITE, block, block_request};
use common::{Code, Machine, disk, hand, hand_over, refusal, tap, vsock, wait_for};
use roost_vmm::client::{Client, ClientError};
use roost_vmm::exit::ExitCode;
use serde_json::{Value, json};

fn types(machine: &Machine, client: &Client, byte: &str, answer: &str) {
    client.console_input(byte.as_bytes()).unwrap();
    wait_for(answer, || machine.console().ends_with(answer).then_some(()));
}

fn snapshot(client: &Client, kind: &str, state: &str, memory: &str) -> Result<(), ClientError> {
    let body = json!({ "snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory });
    client.put("PUT", "/snapshot/create", &body)
}

/// Starts a machine, and takes its snapshot into `state` and `memory` when its guest has printed a word; then it is gone.
fn freeze(machine: &mut Machine, word: &str) {
    let (_files, arguments) = hand(machine, &["state", "memory"]);
    machine.start(&arguments);
    wait_for(word, || machine.console().ends_with(word).then_some(()));
    let client = machine.client();
    client.pause().unwrap();
    snapshot(&client, "Full", "state", "memory").unwrap();
    client.force_stop().unwrap();
}

/// A monitor that has loaded files of this folder.
fn load(from: &Path, state: &str, memory: &str, more: &Value) -> (Machine, Client) {
    let (clone, client) = bare();
    let mut body = json!({
        "snapshot_path": from.join(state),
        "mem_backend": { "backend_type": "File", "backend_path": from.join(memory) },
        "serial_override": { "output": clone.text("console") },
        "resume_vm": true,
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    client.put("PUT", "/snapshot/load", &body).unwrap();
    (clone, client)
}

/// A monitor that has nothing yet.
fn bare() -> (Machine, Client) {
    let mut machine = Machine::new(&Code::default());
    let socket = machine.text("api");
    machine.start_with(&["run", "--api-sock", &socket]);
    let client = machine.client();
    (machine, client)
}

#[test]
fn clones_go_on_where_the_snapshot_was_taken_and_so_does_the_original() {
    let mut machine = Machine::new(&echo());
    machine.config["machine-config"]["vcpu_count"] = json!(2);
    let (_files, arguments) = hand(&machine, &["state", "memory"]);
    machine.start(&arguments);
    let client = machine.client();
    types(&machine, &client, "a", "a1");
    client.pause().unwrap();
    // Input that the guest has not read yet comes with the snapshot.
    client.console_input(b"b").unwrap();
    snapshot(&client, "Full", "state", "memory").unwrap();
    client.resume().unwrap();
    wait_for("the original", || (machine.console() == "a1b2").then_some(()));
    types(&machine, &client, "x", "x3");

    for _ in 0..2 {
        let (clone, client) = load(machine.dir.path(), "state", "memory", &json!({}));
        wait_for("the clone", || (clone.console() == "b2").then_some(()));
        types(&clone, &client, "c", "c3");
        types(&clone, &client, "d", "d4");
        client.force_stop().unwrap();
    }
}

/// Waits for a byte of input: again: mov edx, 0x3fd; in al, dx; test al, 1; jz again; mov edx, 0x3f8; in al, dx
fn wait_for_input(code: Code) -> Code {
    code.bytes(&[0xba, 0xfd, 0x03, 0, 0, 0xec, 0xa8, 0x01, 0x74, 0xf6, 0xba, 0xf8, 0x03, 0, 0, 0xec])
}

#[test]
fn diffs_on_top_of_each_other_are_the_machine() {
    let mut machine = Machine::new(&echo());
    machine.config["machine-config"]["track_dirty_pages"] = json!(true);
    let names = ["s0", "m0", "s1", "m1", "s2", "m2"];
    let (_files, arguments) = hand(&machine, &names);
    machine.start(&arguments);
    let client = machine.client();
    // The first has nothing to differ from, so it has everything.
    for (n, byte) in ["a", "b", "c"].into_iter().enumerate() {
        types(&machine, &client, byte, &format!("{byte}{}", n + 1));
        client.pause().unwrap();
        snapshot(&client, "Diff", &format!("s{n}"), &format!("m{n}")).unwrap();
        client.resume().unwrap();
    }
    client.force_stop().unwrap();
    let blocks = |name: &str| {
        std::os::unix::fs::MetadataExt::blocks(&File::open(machine.path(name)).unwrap().metadata().unwrap())
    };
    assert!(blocks("m1") < blocks("m0"), "a diff is not smaller");

    let (_bare, client) = bare();
    let body = json!({ "snapshot_path": machine.path("s1"), "mem_file_path": machine.path("m1") });
    let why = refusal(client.put("PUT", "/snapshot/load", &body));
    assert!(why.contains("roost-vmm rebase"), "{why}");

    let rebase = |base: &str, diff: &str| {
        let mut command = Command::new(&machine.program);
        command.args(["rebase", "--base", &machine.text(base), "--diff", &machine.text(diff)]);
        command.output().unwrap()
    };
    let wrong = rebase("m0", "m2");
    assert_eq!(wrong.status.code(), Some(ExitCode::Config.code()));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("not made on top of this base"));
    for (diff, state, answer) in [("m1", "s1", "x3"), ("m2", "s2", "x4")] {
        let done = rebase("m0", diff);
        assert!(done.status.success(), "{done:?}");
        let (clone, client) = load(machine.dir.path(), state, "m0", &json!({}));
        types(&clone, &client, "x", answer);
    }
}

/// Pages that a device writes are in a diff as the guest's own are.
#[test]
fn what_a_device_wrote_is_in_a_diff() {
    let (device, ring) = (Device(0), Ring { queue: 0, size: 8, base: 0x20_0000 });
    let code = device.go(device.queue(device.negotiate(Code::default(), 0), ring)).print("1");
    let code = block_request(wait_for_input(code), ring, 0, block::IN, 0, 0x50_0000, 4096).print("2");
    let code = wait_for_input(code).address(0x50_0000).expect32(0x50_0000, 0x6161_6161).print("3").stop();
    let mut machine = Machine::new(&code);
    std::fs::write(machine.path("disk"), vec![b'a'; 1 << 20]).unwrap();
    machine.config["machine-config"]["track_dirty_pages"] = json!(true);
    machine.config["drives"] = json!([{ "drive_id": "root", "path_on_host": machine.text("disk") }]);
    let (_files, arguments) = hand(&machine, &["s0", "m0", "s1", "m1"]);
    machine.start(&arguments);
    let client = machine.client();
    for (n, (byte, answer)) in [("", "1"), ("x", "2")].into_iter().enumerate() {
        types(&machine, &client, byte, answer);
        client.pause().unwrap();
        snapshot(&client, if n == 0 { "Full" } else { "Diff" }, &format!("s{n}"), &format!("m{n}")).unwrap();
        client.resume().unwrap();
    }
    client.force_stop().unwrap();
    let open = |name: &str| File::options().read(true).write(true).open(machine.path(name)).unwrap();
    roost_vmm::snapshot::rebase(&open("m0"), &open("m1")).unwrap();
    let mut read = [0; 4096];
    open("m0").read_exact_at(&mut read, 0x50_0000).unwrap();
    assert_eq!(read, [b'a'; 4096]);
    let (clone, client) = load(machine.dir.path(), "s1", "m0", &json!({}));
    types(&clone, &client, "y", "3");
}

/// Disk and interface go on, each clone on its own disk and tap.
#[test]
fn devices_go_on_in_the_middle_of_their_rings() {
    let Some(tap) = tap::create() else { return };
    let (device, ring) = (Device(0), Ring { queue: 0, size: 8, base: 0x20_0000 });
    let net = (Device(1), Ring { queue: 1, size: 8, base: 0x30_0000 });
    let mut code = device.go(device.queue(device.negotiate(Code::default(), 0), ring));
    let receive = Ring { queue: 0, size: 8, base: 0x40_0000 };
    code = net.0.go(net.0.queue(net.0.queue(net.0.negotiate(code, 0), receive), net.1));
    code = net.1.descriptor(code, 0, 0x70_0000, 72, 0, 0);
    for part in 0..2_u16 {
        for n in 5 * part..5 * part + 5 {
            code = code.fill_pages(0x50_0000, 1, u32::from(n) + 1);
            code = block_request(code, ring, n, block::OUT, u64::from(n) * 8, 0x50_0000, 4096);
            code = net.0.notify(net.1.offer(code, n, 0), 1).wait16(net.1.used_index(), n + 1);
        }
        code = code.print(if part == 0 { "half" } else { "whole" });
        if part == 0 {
            code = wait_for_input(code);
        }
    }
    let mut machine = Machine::new(&code.stop());
    disk(&machine.path("disk"), 1 << 20);
    machine.config["drives"] = json!([{ "drive_id": "root", "path_on_host": machine.text("disk") }]);
    machine.config["network-interfaces"] = json!([{ "iface_id": "eth0", "host_dev_name": "tap" }]);
    let (_files, mut arguments) = hand(&machine, &["state", "memory"]);
    arguments.extend(machines::tap_argument(&tap));
    machine.start(&arguments);
    wait_for("half", || machine.console().contains("half").then_some(()));
    let client = machine.client();
    client.pause().unwrap();
    snapshot(&client, "Full", "state", "memory").unwrap();
    client.force_stop().unwrap();

    let words = |path: &Path| {
        let bytes = std::fs::read(path).unwrap();
        (0..10).map(|n| bytes[n * 4096]).collect::<Vec<u8>>()
    };
    for name in ["one", "other"] {
        std::fs::copy(machine.path("disk"), machine.path(name)).unwrap();
        let Some(tap) = tap::create() else { return };
        let mut clone = Machine::new(&Code::default());
        let mut arguments = hand_over("tap9", &tap).to_vec();
        arguments.extend(["--api-sock".to_owned(), clone.text("api")]);
        let words_of: Vec<&str> = ["run"].into_iter().chain(arguments.iter().map(String::as_str)).collect();
        clone.start_with(&words_of);
        let client = clone.client();
        let body = json!({
            "snapshot_path": machine.path("state"), "mem_file_path": machine.path("memory"), "resume_vm": true,
            "network_overrides": [{ "iface_id": "eth0", "host_dev_name": "tap9" }],
            "drive_overrides": [{ "drive_id": "root", "path_on_host": machine.path(name) }],
            "serial_override": { "output": clone.path("console") },
        });
        client.put("PUT", "/snapshot/load", &body).unwrap();
        types(&clone, &client, "x", "whole");
        client.force_stop().unwrap();
        assert_eq!(words(&machine.path(name)), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    }
    assert_eq!(words(&machine.path("disk")), [1, 2, 3, 4, 5, 0, 0, 0, 0, 0]);
}

/// A clone finds another generation id and another mark in VMClock, and the event device's line raised for it.
#[test]
fn a_clone_knows_that_it_is_one() {
    let mut code = Code::default().print("1");
    // again: mov edx, 0x603; in al, dx; test al, 0x80; jz again
    code = code.bytes(&[0xba, 0x03, 0x06, 0, 0, 0xec, 0xa8, 0x80, 0x74, 0xf6]);
    // The generation id; VMClock's disruption marker and generation counter.
    for address in (0xe_f000..0xe_f010).chain(0xe_e010..0xe_e018).chain(0xe_e068..0xe_e070) {
        // mov al, [rdi]; and al, 15; add al, 'a'; mov edx, 0x3f8; out dx, al
        code =
            code.address(address).bytes(&[0x8a, 0x07, 0x24, 0x0f, 0x04, b'a', 0xba, 0xf8, 0x03, 0, 0, 0xee]);
    }
    let mut machine = Machine::new(&code.print(".").stop());
    freeze(&mut machine, "1");
    let ids = [(), ()].map(|()| {
        let (clone, _client) = load(machine.dir.path(), "state", "memory", &json!({}));
        wait_for("the id", || clone.console().ends_with('.').then_some(()));
        clone.console()
    });
    let mut own = String::new();
    for (address, count) in [(0xe_f000, 16), (0xe_e010, 8), (0xe_e068, 8)] {
        let mut bytes = vec![0; count];
        File::open(machine.path("memory")).unwrap().read_exact_at(&mut bytes, address).unwrap();
        own.extend(bytes.iter().map(|byte| char::from(b'a' + (byte & 15))));
    }
    for part in [0..16, 16..24, 24..32] {
        let (one, other, own) = (&ids[0][part.clone()], &ids[1][part.clone()], &own[part]);
        assert!(one != other && one != own && other != own, "{one} {other} {own}");
    }
}

/// What a reset finds is what power-on leaves, not what the memory file holds.
#[test]
fn a_clone_that_resets_starts_from_its_kernel() {
    // cmp dword [0x300000], 0; a mark there is complained of
    let code = Code::default().address(0x30_0000).expect32(0x30_0000, 0).print("up").store(0x30_0000, 7);
    let mut machine = Machine::new(&wait_for_input(code).reset());
    freeze(&mut machine, "up");

    let (clone, client) = load(machine.dir.path(), "state", "memory", &json!({}));
    for times in 1..3 {
        client.console_input(b"x").unwrap();
        wait_for("a reset", || (clone.console() == "up".repeat(times)).then_some(()));
    }
    // Without the kernel's file, a reset is the end.
    std::fs::remove_file(machine.path("kernel")).unwrap();
    let (mut clone, client) = load(machine.dir.path(), "state", "memory", &json!({}));
    client.console_input(b"x").unwrap();
    assert_eq!(clone.wait().code, ExitCode::GuestReset.code());
}

#[test]
fn what_cannot_be_is_refused_with_the_reason_and_nothing_is_lost() {
    let mut machine = Machine::new(&echo());
    let full = File::options().write(true).open("/dev/full").unwrap();
    let (_files, mut arguments) = hand(&machine, &["state", "memory"]);
    arguments.extend(hand_over("full", &full));
    machine.start(&arguments);
    let client = machine.client();
    types(&machine, &client, "a", "a1");
    let refused = |kind: &str, state: &str, memory: &str| refusal(snapshot(&client, kind, state, memory));
    assert!(refused("Full", "state", "memory").contains("PATCH /vm"));
    client.pause().unwrap();
    for (kind, state, memory, words) in [
        ("Diff", "state", "memory", "track_dirty_pages"),
        ("Full", "nowhere", "memory", "\"nowhere\" was not handed over"),
        ("Full", "state", "state", "one file"),
        ("Full", "state", "full", "memory file"),
    ] {
        let why = refused(kind, state, memory);
        assert!(why.contains(words), "{words}: {why}");
    }
    let why =
        refusal(client.put("PUT", "/snapshot/load", &json!({ "snapshot_path": "s", "mem_file_path": "m" })));
    assert!(why.contains("built already"), "{why}");
    // A snapshot that failed half-way is none.
    let (_bare, other) = bare();
    let load = |body: &Value| refusal(other.put("PUT", "/snapshot/load", body));
    let files = json!({ "snapshot_path": machine.path("state"), "mem_file_path": machine.path("memory") });
    assert!(load(&files).contains("the state file has 0 bytes"));

    snapshot(&client, "Full", "state", "memory").unwrap();
    client.resume().unwrap();
    types(&machine, &client, "b", "b2");
    let with = |name: &str, value: Value| {
        let mut body = files.clone();
        body[name] = value;
        body
    };
    for (body, words) in [
        (with("mem_backend", json!({ "backend_type": "File", "backend_path": "m" })), "exactly one"),
        (
            with("network_overrides", json!([{ "iface_id": "eth7", "host_dev_name": "t" }])),
            "\"eth7\" is not in the snapshot",
        ),
        (
            with("drive_overrides", json!([{ "drive_id": "root", "path_on_host": "t" }])),
            "\"root\" is not in the snapshot",
        ),
        (with("vsock_override", json!({ "uds_path": "v" })), "vsock_override"),
        (with("mem_file_path", json!(machine.path("state"))), "no memory file"),
        (with("snapshot_path", json!(machine.path("memory"))), "no state file"),
        (with("snapshot_path", json!(machine.path("nowhere"))), "nowhere"),
    ] {
        let why = load(&body);
        assert!(why.contains(words), "{words}: {why}");
    }
    // Another snapshot's memory.
    let memory = std::fs::read(machine.path("memory")).unwrap();
    client.pause().unwrap();
    snapshot(&client, "Full", "state", "memory").unwrap();
    std::fs::write(machine.path("old"), memory).unwrap();
    assert!(load(&with("mem_file_path", json!(machine.path("old")))).contains("two snapshots"));
    // After all that it can be loaded.
    other.put("PUT", "/snapshot/load", &files).unwrap();
    assert_eq!(other.info().unwrap().state, "Paused");
}

/// A guest ends all its connections when it hears that they are gone: none that began after that may be among them.
#[test]
fn a_clone_is_told_that_its_connections_are_gone_before_it_gets_new_ones() {
    const VSOCK: Device = Device(0);
    const EVENT: Ring = Ring { queue: 2, size: 8, base: 0x40_0000 };
    let event = |n: u16| 0x50_0000 + 0x100 * u32::from(n);
    let mut code = VSOCK.negotiate(Code::default(), 0);
    for ring in [vsock::RX, vsock::TX, EVENT] {
        code = VSOCK.queue(code.store(ring.available(), 0).store(ring.used(), 0), ring);
    }
    code = VSOCK.go(code);
    for n in 0..8 {
        code = vsock::RX.descriptor(code, n, vsock::received(n).into(), 256, WRITE, 0);
        code = vsock::RX.offer(code, n, n);
        code = EVENT.descriptor(code.store(event(n), u32::MAX), n, event(n).into(), 8, WRITE, 0);
        code = EVENT.offer(code, n, n);
    }
    code = VSOCK.notify(VSOCK.notify(code, 0), 2).print("1").wait16(EVENT.used_index(), 1);
    code = code.address(event(0)).expect32(event(0), 0);
    // A while later nothing has come; when the buffer is given back, it does.
    code = code.look16(vsock::RX.used_index(), 1, 20_000).address(vsock::RX.used_index());
    code = code.expect32(vsock::RX.used_index(), 0).print("2");
    code = VSOCK.notify(EVENT.offer(code, 8, 0), 2);
    code = vsock::expect(code, 0, vsock::REQUEST).print("3").stop();

    let mut machine = Machine::new(&code);
    machine.config["vsock"] = json!({ "guest_cid": vsock::GUEST_CID, "uds_path": machine.text("v.sock") });
    freeze(&mut machine, "1");

    let elsewhere = tempfile::tempdir().unwrap();
    let socket = elsewhere.path().join("v.sock");
    let more = json!({ "vsock_override": { "uds_path": socket }, "resume_vm": false });
    let (clone, client) = load(machine.dir.path(), "state", "memory", &more);
    let program = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    std::io::Write::write_all(&mut &program, b"CONNECT 52\n").unwrap();
    client.resume().unwrap();
    wait_for("the connection", || clone.console().ends_with('3').then_some(()));
    assert_eq!(clone.console(), "23");
}

/// As scripts do that were made for Firecracker: every file by its path, whenever it is needed.
#[test]
fn with_open_paths_requests_name_paths_and_otherwise_descriptors() {
    let mut machine = Machine::new(&echo());
    machine.start(&["--open-paths"]);
    let client = machine.client();
    types(&machine, &client, "a", "a1");
    client.pause().unwrap();
    let why = refusal(snapshot(&client, "Full", &machine.text("no/state"), &machine.text("memory")));
    assert!(why.contains("no/state") && why.contains("No such file"), "{why}");
    snapshot(&client, "Full", &machine.text("state"), &machine.text("memory")).unwrap();
    client.force_stop().unwrap();
    let (clone, client) = load(machine.dir.path(), "state", "memory", &json!({}));
    types(&clone, &client, "b", "b2");

    // This one opens no path, but takes descriptors; not for the file that its memory comes from.
    client.pause().unwrap();
    client.hand_over("own", &File::options().write(true).open(machine.path("memory")).unwrap()).unwrap();
    let why = refusal(snapshot(&client, "Full", "own", "own"));
    assert!(why.contains("one file"), "{why}");
    client.hand_over("s", &File::create(machine.path("s")).unwrap()).unwrap();
    let why = refusal(snapshot(&client, "Full", "s", "own"));
    assert!(why.contains("this machine's memory comes from"), "{why}");
    let why = refusal(snapshot(&client, "Full", &machine.text("s"), &machine.text("m")));
    assert!(why.contains("was not handed over"), "{why}");
    for name in ["s", "m"] {
        client.hand_over(name, &File::create(machine.path(name)).unwrap()).unwrap();
    }
    snapshot(&client, "Full", "s", "m").unwrap();
    client.force_stop().unwrap();
    let (clone, client) = load(machine.dir.path(), "s", "m", &json!({}));
    types(&clone, &client, "c", "c3");
    let why = refusal(client.put("PUT", "/descriptors/x", &json!({})));
    assert!(why.contains("none came with the request"), "{why}");
    for n in 0..256 {
        client.hand_over(&format!("n{n}"), &File::open("/dev/null").unwrap()).unwrap();
    }
    let why = refusal(client.hand_over("one_more", &File::open("/dev/null").unwrap()));
    assert!(why.contains("descriptors"), "{why}");
}

/// Pages come from a program as the guest touches them, and what the guest gives back comes as zeroes.
#[test]
fn a_program_brings_memory_page_by_page() {
    let balloon_queue = Ring { queue: 0, size: 8, base: 0x20_0000 };
    let mut code = Device(0).go(Device(0).queue(Device(0).negotiate(Code::default(), 0), balloon_queue));
    code = code.fill_pages(0x40_0000, 256, 7).print("1");
    code = wait_for_input(code).address(0x40_0000).expect32(0x40_0000, 7).print("2");
    // One of these pages goes to the host, and is touched again.
    code = give(code, Device(0), balloon_queue, 0, (0x400, 1)).expect_zero_pages(0x40_0000, 1);
    code = code.address(0x40_1000).expect32(0x40_1000, 7).print("3");
    let mut machine = Machine::new(&code.stop());
    machine.config["balloon"] = json!({ "amount_mib": 1 });
    freeze(&mut machine, "1");

    let socket = machine.path("faults");
    let body = |clone: &Machine| {
        json!({
            "snapshot_path": machine.path("state"), "resume_vm": true,
            "mem_backend": { "backend_type": "Uffd", "backend_path": socket },
            "serial_override": { "output": clone.text("console") },
        })
    };
    for at_a_time in [1, 32] {
        let memory = File::open(machine.path("memory")).unwrap();
        let mut faults = Faults::serve(UnixListener::bind(&socket).unwrap(), memory, at_a_time);
        let (mut clone, client) = bare();
        client.put("PUT", "/snapshot/load", &body(&clone)).unwrap();
        types(&clone, &client, "x", "23");
        assert_eq!(clone.console(), "23");
        let answered = faults.answered.load(Ordering::SeqCst);
        assert!((3..100).contains(&answered), "{answered} faults for 4096 pages, {at_a_time} at a time");
        // Without it, a guest would wait for ever.
        faults.end();
        let ended = clone.wait();
        assert_eq!(ended.code, ExitCode::HostIo.code());
        assert!(ended.stderr.contains("page-fault handler"), "{}", ended.stderr);
        std::fs::remove_file(&socket).unwrap();
    }

    let (clone, client) = bare();
    assert!(refusal(client.put("PUT", "/snapshot/load", &body(&clone))).contains("page-fault handler"));
}
