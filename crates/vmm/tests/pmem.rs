//! Files in the guest's memory, from the configuration to the guest and back.

// Tests build bytes out of numbers whose size they know.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;

use common::pmem::{ALIGNMENT, FAILED, OK, START, WINDOW, answer, ask, expect_config};
use common::virtio::{Device, NEXT, Ring, WRITE, block, block_header, register};
use common::{Code, Machine, disk, hand, refusal, says, wait_for};
use roost_vmm::exit::ExitCode;
use roost_vmm::status::{Event, ExitReason};
use serde_json::{Value, json};

const PMEM: Device = Device(0);
const RING: Ring = Ring { queue: 0, size: 8, base: 0x20_0000 };

fn set_up() -> Code {
    PMEM.go(PMEM.queue(PMEM.negotiate(Code::default(), 0), RING))
}

/// A machine with one file of this size, whose pages begin with their numbers from 1 up.
fn machine(code: &Code, bytes: u64, read_only: bool) -> Machine {
    let mut machine = Machine::new(code);
    let file = File::create_new(machine.path("file")).unwrap();
    file.set_len(bytes).unwrap();
    for page in 0..bytes / 4096 {
        file.write_all_at(&(page as u32 + 1).to_le_bytes(), page * 4096).unwrap();
    }
    machine.config["pmem"] =
        json!([{ "id": "data", "path_on_host": machine.text("file"), "read_only": read_only }]);
    machine
}

fn word(machine: &Machine, at: u64) -> u32 {
    let mut bytes = [0; 4];
    File::open(machine.path("file")).unwrap().read_exact_at(&mut bytes, at).unwrap();
    u32::from_le_bytes(bytes)
}

fn metrics(machine: &Machine) -> Value {
    machine.client().metrics().unwrap()["devices"]["data"].clone()
}

/// Asks for a flush as number `index`, and complains unless the answer is as it should be.
fn flush(code: Code, index: u16) -> Code {
    ask(code, PMEM, RING, index, 0).expect32(answer(RING), OK)
}

#[test]
fn a_guest_reads_writes_and_flushes() {
    let code = expect_config(set_up(), PMEM, START, 2 * ALIGNMENT).map_region(START, 2);
    let code = code.expect32(WINDOW, 1).expect32(WINDOW + (3 << 20), 769);
    let code = flush(code.store(WINDOW + (3 << 20), 0x600d_600d), 0);
    let code = ask(code, PMEM, RING, 1, 7).expect32(answer(RING), FAILED).print("done");
    let mut machine = machine(&code.stop(), 2 * ALIGNMENT, false);
    machine.start::<&str>(&[]);
    says(&machine, "done");
    let found = metrics(&machine);
    let counted = ["flushes", "syncs", "unsupported", "refused", "failed"].map(|name| found[name].as_u64());
    assert_eq!(counted, [Some(1), Some(1), Some(1), Some(0), Some(0)], "{found}");
    machine.client().force_stop().unwrap();
    assert_eq!(machine.wait().console, "done");
    assert_eq!(word(&machine, 3 << 20), 0x600d_600d);
}

/// A guest that writes where it may not goes on, and what it wrote is nowhere. Behind the file's end there are zeroes.
#[test]
fn writes_to_a_read_only_file_go_nowhere() {
    let bytes = ALIGNMENT + 5 * 4096;
    let code = expect_config(set_up(), PMEM, START, 2 * ALIGNMENT).map_region(START, 2);
    let code = code.store(WINDOW, 7).expect32(WINDOW, 1).store16(WINDOW + 8, 7).expect32(WINDOW + 8, 0);
    // The last page of the file, and behind it. mov edi, …; lock inc dword [rdi]
    let behind = WINDOW + bytes as u32;
    let code = code.expect32(behind - 4096, 517).store(behind - 4096, 7).expect32(behind - 4096, 517);
    let code = code.expect_zero_pages(behind, 507).store(behind, 7).expect_zero_pages(behind, 507);
    let code = flush(code, 0).print("alive").stop();
    let mut machine = machine(&code, bytes, true);
    machine.start::<&str>(&[]);
    says(&machine, "alive");
    let found = metrics(&machine);
    assert_eq!(
        (&found["discarded_writes"], &found["flushes"], &found["syncs"]),
        (&json!(4), &json!(1), &json!(0))
    );
    machine.client().force_stop().unwrap();
    let ended = machine.wait();
    assert_eq!(ended.console, "alive");
    assert!(
        ended.stderr.contains("pmem \"data\": the guest's write of 4 bytes at 0x0 is discarded"),
        "{}",
        ended.stderr
    );
    assert_eq!((word(&machine, 0), word(&machine, bytes - 4096)), (1, 517));
}

/// Of a process's mappings of a file, KiB: all pages, by their share, those that are its own.
fn mapped(pid: u32, path: &str) -> [u64; 3] {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut inside, mut found) = (false, [0; 3]);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if !first.ends_with(':') {
            inside = line.ends_with(path);
        }
        let mut value = || words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        let at = match first {
            "Rss:" => 0,
            "Pss:" => 1,
            "Private_Dirty:" | "Private_Clean:" => 2,
            _ => continue,
        };
        found[at] += if inside { value() } else { 0 };
    }
    found
}

#[test]
fn machines_share_the_pages_of_a_read_only_file() {
    // Reads a word of each page: mov ecx, PAGES; again: mov eax, [rdi]; add edi, 4096; loop again
    let pages = 4 * 512_u32;
    let code =
        Code::default().map_region(START, 4).address(WINDOW).bytes(&[0xb9]).bytes(&pages.to_le_bytes());
    let code = code.bytes(&[0x8b, 0x07, 0x81, 0xc7, 0, 0x10, 0, 0, 0xe2, 0xf6]).print("read").stop();
    let mut first = machine(&code, 4 * ALIGNMENT, true);
    first.start::<&str>(&[]);
    says(&first, "read");
    let path = first.text("file");
    let size = 4 * ALIGNMENT / 1024;
    let [rss, pss, own] = mapped(first.pid(), &path);
    assert_eq!((rss, pss, own), (size, size, size), "alone");
    let mut second = Machine::new(&code);
    second.config["pmem"] = first.config["pmem"].clone();
    second.start::<&str>(&[]);
    says(&second, "read");
    for machine in [&first, &second] {
        let [rss, pss, own] = mapped(machine.pid(), &path);
        assert_eq!((rss, own), (size, 0));
        assert!(pss.abs_diff(size / 2) <= 4, "{pss} of {size} KiB");
    }
}

/// A disk's data comes from there and goes there, as with file systems that are used in place.
#[test]
fn devices_reach_it() {
    let (drive, pmem, ring) = (Device(0), Device(1), Ring { queue: 0, size: 8, base: 0x30_0000 });
    let code = disk_set_up(drive, ring).map_region(START, 1);
    // One sector from the file to the disk, one from the disk to the file.
    let code = at_region(code, ring, 0, block::OUT, 4, 4096);
    let code = at_region(code, ring, 1, block::IN, 8, 8192).expect32(WINDOW + 8192, 0x600d_600d);
    let code = pmem.go(pmem.queue(pmem.negotiate(code, 0), RING));
    let code = ask(code, pmem, RING, 0, 0).expect32(answer(RING), OK).print("done").power_off();
    for read_only in [false, true] {
        let mut machine = machine(&code, ALIGNMENT, read_only);
        disk(&machine.path("disk"), 1 << 20);
        let image = File::options().write(true).open(machine.path("disk")).unwrap();
        image.write_all_at(&0x600d_600d_u32.to_le_bytes(), 8 * 512).unwrap();
        machine.config["drives"] = json!([{ "drive_id": "d", "path_on_host": machine.text("disk") }]);
        let ended = machine.run();
        assert_eq!((ended.code, ended.console.as_str()), (0, "done"), "{}", ended.stderr);
        // What a device writes to a read-only file is the machine's own.
        assert_eq!(word(&machine, 8192), if read_only { 3 } else { 0x600d_600d });
        let mut sector = [0; 4];
        File::open(machine.path("disk")).unwrap().read_exact_at(&mut sector, 4 * 512).unwrap();
        assert_eq!(u32::from_le_bytes(sector), 2);
    }
}

fn disk_set_up(drive: Device, ring: Ring) -> Code {
    drive.go(drive.queue(drive.negotiate(Code::default(), 0), ring))
}

/// A request of one sector, whose data is at an offset of the region; complains unless it is done.
fn at_region(code: Code, ring: Ring, index: u16, kind: u32, sector: u64, offset: u64) -> Code {
    let (header, status) = (ring.base + 0xc000, ring.base + 0xc010);
    let code = block_header(code, header, kind, sector).store(status, 0xff);
    let code = ring.descriptor(code, 0, header.into(), 16, NEXT, 1);
    let direction = if kind == block::IN { WRITE } else { 0 };
    let code = ring.descriptor(code, 1, START + offset, 512, NEXT | direction, 2);
    let code = ring.descriptor(code, 2, status.into(), 1, WRITE, 0);
    let code = Device(0).notify(ring.offer(code, index, 0), 0).wait16(ring.used_index(), index + 1);
    code.expect32(status, 0)
}

/// After a reset a read-only file is as the host has it, a writable one as the guest left it.
#[test]
fn a_reset_leaves_the_file() {
    let ring = Ring { queue: 0, size: 8, base: 0x30_0000 };
    let code = disk_set_up(Device(0), ring).map_region(START, 1).expect32(WINDOW + 4096, 2);
    let code = at_region(code, ring, 0, block::IN, 0, 4096).expect32(WINDOW + 4096, 0).print("z").reset();
    let mut machine = machine(&code, ALIGNMENT, true);
    disk(&machine.path("disk"), 1 << 20);
    machine.config["drives"] = json!([{ "drive_id": "d", "path_on_host": machine.text("disk") }]);
    machine.start::<&str>(&[]);
    wait_for("three starts", || (machine.console().len() >= 3).then_some(()));
    machine.client().force_stop().unwrap();
    let ended = machine.wait();
    assert!(ended.console.bytes().all(|byte| byte == b'z'), "{}", ended.console);
}

/// Ends the machine that says `r` when its file is cut to nothing, and returns what it says about that.
fn cut(mut machine: Machine) -> String {
    machine.start::<&str>(&[]);
    says(&machine, "r");
    File::options().write(true).open(machine.path("file")).unwrap().set_len(0).unwrap();
    let ended = machine.wait();
    assert_eq!(ended.code, ExitCode::HostIo.code(), "{}", ended.stderr);
    let Some(Event::Exited { reason, code, message, .. }) = ended.events.last() else { panic!("no exit") };
    assert_eq!((*reason, *code), (ExitReason::Error, ended.code));
    assert!(message.contains("cut short") && ended.stderr.contains("cut short"), "{}", ended.stderr);
    message.clone()
}

/// A page that is not there any more ends the machine with a sentence, whoever touches it.
#[test]
fn a_file_that_is_cut_short_ends_the_machine() {
    // The guest, again and again: mov edi, WINDOW; again: mov eax, [rdi]; jmp again
    let code =
        Code::default().map_region(START, 1).print("r").address(WINDOW).bytes(&[0x8b, 0x07, 0xeb, 0xfc]);
    for read_only in [false, true] {
        let said = cut(machine(&code, ALIGNMENT, read_only));
        // By KVM's word, or by that of the thread that looks for KVM where it runs the instruction itself.
        assert!(said.contains("touched a page that is not there"), "{said}");
    }
    // The device thread, in its ring, which the guest leaves alone: mov edi, NOTIFY; again: mov dword [rdi], 0; jmp again
    let at = PMEM.register(register::STATUS);
    let code = PMEM.negotiate(Code::default(), 0).store(PMEM.register(register::QUEUE_SIZE), 8);
    let rings = [(register::DESCRIPTORS, 0_u32), (register::AVAILABLE, 0x4000), (register::USED, 0x8000)];
    let code = rings.iter().fold(code, |code, (register, offset)| {
        code.store(PMEM.register(*register), START as u32 + offset)
            .store(PMEM.register(register + 4), (START >> 32) as u32)
    });
    let code = code.store(PMEM.register(register::QUEUE_READY), 1).store(at, 15).wait32(at, 15).print("r");
    let code =
        code.address(PMEM.register(register::QUEUE_NOTIFY)).bytes(&[0xc7, 0x07, 0, 0, 0, 0, 0xeb, 0xf8]);
    let said = cut(machine(&code, ALIGNMENT, false));
    assert!(said.contains("thread vmm-dev touched a page"), "{said}");
}

#[test]
fn a_snapshot_has_nothing_of_the_file_and_goes_on_with_a_copy() {
    let marker = 0x5ec2_e700_u32;
    let code = set_up().map_region(START, 1).store(WINDOW, marker).print("w");
    // Waits for a byte of input: again: mov edx, 0x3fd; in al, dx; test al, 1; jz again
    let code = code.bytes(&[0xba, 0xfd, 0x03, 0, 0, 0xec, 0xa8, 0x01, 0x74, 0xf6]);
    let code = code.expect32(WINDOW, marker).expect32(WINDOW + 4096, 2).store(WINDOW + 4096, 77);
    let mut machine = machine(&flush(code, 0).print("on").power_off(), ALIGNMENT, false);
    machine.config["machine-config"]["track_dirty_pages"] = json!(true);
    let (_files, arguments) = hand(&machine, &["state", "memory"]);
    machine.start(&arguments);
    says(&machine, "w");
    let client = machine.client();
    client.pause().unwrap();
    let files = json!({ "snapshot_type": "Full", "snapshot_path": "state", "mem_file_path": "memory" });
    client.put("PUT", "/snapshot/create", &files).unwrap();
    // What the guest wrote is in the file, and the snapshot does not have it: the machine's own memory and a page.
    assert_eq!(word(&machine, 0), marker);
    std::fs::copy(machine.path("file"), machine.path("copy")).unwrap();
    let memory = std::fs::read(machine.path("memory")).unwrap();
    assert_eq!(memory.len() as u64, (16 << 20) + 4096);
    disk(&machine.path("longer"), 2 * ALIGNMENT);
    client.force_stop().unwrap();

    let load = |name: &str| {
        let mut clone = Machine::new(&Code::default());
        let socket = clone.text("api");
        clone.start_with(&["run", "--api-sock", &socket]);
        let body = json!({
            "snapshot_path": machine.path("state"), "mem_file_path": machine.path("memory"),
            "pmem_overrides": [{ "id": "data", "path_on_host": machine.path(name) }],
            "serial_override": { "output": clone.text("console") }, "resume_vm": true,
        });
        let answer = clone.client().put("PUT", "/snapshot/load", &body);
        (clone, answer)
    };
    let why = refusal(load("longer").1);
    let words =
        "\"data\": the guest knows 2097152 bytes at 0x108000000; the file that is there now would be 4194304";
    assert!(why.contains(words), "{why}");
    let (mut clone, answer) = load("copy");
    answer.unwrap();
    clone.client().console_input(b"x").unwrap();
    let ended = clone.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "on"), "{}", ended.stderr);
    let copied = std::fs::read(machine.path("copy")).unwrap();
    assert_eq!((copied[4096], word(&machine, 4096)), (77, 2));
}

/// As the guest's kernel is told about a root: by the command line, which is in its memory.
#[test]
fn the_root_is_on_the_command_line() {
    let words = b"root=/dev/pmem1 ro rootflags=dax rootwait\0\0\0";
    let code = words.chunks(4).zip(0_u32..).fold(Code::default(), |code, (word, n)| {
        code.expect32(0x2_0000 + 4 * n, u32::from_le_bytes(word.try_into().unwrap()))
    });
    let mut machine = machine(&code.print("done").power_off(), ALIGNMENT, true);
    disk(&machine.path("root"), 4096);
    let root =
        json!({ "id": "r", "path_on_host": machine.text("root"), "root_device": true, "read_only": true });
    machine.config["pmem"].as_array_mut().unwrap().push(root);
    let ended = machine.run();
    assert_eq!((ended.code, ended.console.as_str()), (0, "done"), "{}", ended.stderr);
}

#[test]
fn the_api_says_what_is_illegal_when() {
    let mut machine = Machine::new(&Code::default().stop());
    disk(&machine.path("odd"), ALIGNMENT + 4096);
    let socket = machine.text("api");
    machine.start_with(&["run", "--api-sock", &socket]);
    let client = machine.client();
    let put = |id: &str, body: Value| client.put("PUT", &format!("/pmem/{id}"), &body);
    let path = machine.text("odd");
    let why = refusal(put("a", json!({ "id": "b", "path_on_host": path })));
    assert!(why.contains("pmem: id \"b\" is not the path's \"a\""), "{why}");
    let why = refusal(put("a", json!({ "id": "a", "path_on_host": path, "backend_type": "Uffd" })));
    assert!(why.contains("unknown field `backend_type`"), "{why}");
    put("a", json!({ "id": "a", "path_on_host": path, "root_device": true })).unwrap();
    let why = refusal(put("c", json!({ "id": "c", "path_on_host": path, "root_device": true })));
    assert!(why.contains("more than one has root_device"), "{why}");
    let drive = json!({ "drive_id": "d", "path_on_host": path, "is_root_device": true });
    assert!(refusal(client.put("PUT", "/drives/d", &drive)).contains("there is one root"));
    let limits = json!({ "id": "a", "rate_limiter": { "ops": { "size": 1, "refill_time": 100 } } });
    assert!(refusal(client.put("PATCH", "/pmem/a", &limits)).contains("has not been started"));
    client.put("PUT", "/boot-source", &machine.config["boot-source"].clone()).unwrap();
    client.put("PUT", "/serial", &json!({})).unwrap();
    // A writable file of another size is refused at the start, and the machine can be told better.
    let why = refusal(client.start());
    assert!(why.contains("no multiple of 2097152 (2 MiB)"), "{why}");
    put("a", json!({ "id": "a", "path_on_host": path, "read_only": true })).unwrap();
    client.start().unwrap();
    assert!(refusal(put("a", json!({ "id": "a", "path_on_host": path }))).contains("built already"));
    client.put("PATCH", "/pmem/a", &limits).unwrap();
    let missing = json!({ "id": "x", "rate_limiter": {} });
    assert!(refusal(client.put("PATCH", "/pmem/x", &missing)).contains("there is no id \"x\""));
    let config: Value = serde_json::from_slice(&client.request("GET", "/vm/config", b"").unwrap()).unwrap();
    assert_eq!(config["pmem"][0]["rate_limiter"], limits["rate_limiter"]);
    client.force_stop().unwrap();
    machine.wait();
}
