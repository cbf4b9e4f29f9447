//! What guests do to the monitor, and how it ends.

mod common;

use std::time::{Duration, Instant};

use common::virtio::{Device, Ring, WRITE, block, block_clear, block_request};
use common::{Code, Ended, Machine, disk, event_names, machines, tap, wait_for};
use roost_vmm::exit::ExitCode;
use roost_vmm::status::{Event, ExitReason};
use serde_json::json;

#[test]
fn a_guest_prints_and_powers_off() {
    let ended = Machine::new(&Code::default().print("hello\n").power_off()).run();
    assert_eq!(ended.code, ExitCode::PowerOff.code(), "{}", ended.stderr);
    assert_eq!(ended.console, "hello\n");
    assert_eq!(event_names(&ended.events), ["built", "vcpus_running", "exited"]);
    let Some(Event::Exited { reason, code, .. }) = ended.events.last() else { panic!("no exit") };
    assert_eq!((*reason, *code), (ExitReason::PowerOff, 0));
}

#[test]
fn a_triple_fault_ends_with_registers_and_code() {
    // mov rbx, 0x1122334455667788; ud2, without any handler
    let code =
        Code::default().bytes(&[0x48, 0xbb, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0x0f, 0x0b]);
    let ended = Machine::new(&code).run();
    assert_eq!(ended.code, ExitCode::GuestCrash.code());
    for part in ["triple fault", "RBX=1122334455667788", "RIP=000000000010000a", "[0f] 0b", "mode=64-bit"] {
        assert!(ended.stderr.contains(part), "{part:?} is not in {}", ended.stderr);
    }
    let Some(Event::Exited { reason, message, .. }) = ended.events.last() else { panic!("no exit") };
    assert_eq!(*reason, ExitReason::Crash);
    assert!(message.contains("RBX=1122334455667788"));
}

/// `lock cmpxchg16b` runs on real hardware; an instruction emulator stops at it, which must end in a clear message.
#[test]
fn an_instruction_that_kvm_cannot_run_is_no_hang() {
    // mov edi, 0x120000; lock cmpxchg16b [rdi]
    let code = Code::default().bytes(&[0xbf, 0, 0, 0x12, 0, 0xf0, 0x48, 0x0f, 0xc7, 0x0f]).power_off();
    let ended = Machine::new(&code).run();
    let probe = roost_vmm::probe::run();
    let works = probe
        .instructions
        .iter()
        .any(|i| i.name == "lock cmpxchg16b" && i.outcome == roost_vmm::probe::Outcome::Ok);
    if works {
        assert_eq!(ended.code, ExitCode::PowerOff.code(), "{}", ended.stderr);
    } else {
        assert_eq!(ended.code, ExitCode::GuestCrash.code());
        assert!(ended.stderr.contains("KVM_EXIT_INTERNAL_ERROR, suberror 1"), "{}", ended.stderr);
        assert!(ended.stderr.contains("[f0] 48 0f c7 0f"), "{}", ended.stderr);
    }
}

#[test]
fn a_guest_that_resets_starts_again_from_fresh_memory() {
    // mov edi, 0x200000; mov al, [rdi]; add al, '0'; mov edx, 0x3f8; out dx, al; mov byte [rdi], 7: memory that survived
    // the reset would print 7.
    let code = [
        &[0xbf, 0, 0, 0x20, 0, 0x8a, 0x07, 0x04, b'0', 0xba][..],
        &0x3f8_u32.to_le_bytes(),
        &[0xee, 0xc6, 0x07, 7],
    ]
    .concat();
    let mut machine = Machine::new(&Code::default().bytes(&code).reset());
    machine.start::<&str>(&[]);
    wait_for("five starts", || (machine.console().len() >= 5).then_some(()));
    machine.client().force_stop().unwrap();
    let ended = machine.wait();
    assert_eq!(ended.code, ExitCode::Killed.code(), "{}", ended.stderr);
    assert!(ended.console.bytes().all(|byte| byte == b'0'), "{}", ended.console);
    assert!(event_names(&ended.events).iter().filter(|name| **name == "guest_reset").count() >= 4);
}

#[test]
fn a_reset_can_end_the_process_instead() {
    let mut machine = Machine::new(&Code::default().reset());
    machine.config["machine-config"]["on_reset"] = json!("exit");
    assert_eq!(machine.run().code, ExitCode::GuestReset.code());
}

#[test]
fn a_reset_by_the_keyboard_controller_works_too() {
    let mut machine = Machine::new(&Code::default().out(0x64, 0xfe).stop());
    machine.config["machine-config"]["on_reset"] = json!("exit");
    assert_eq!(machine.run().code, ExitCode::GuestReset.code());
}

/// Linux without EFI jumps to the firmware's reset vector in real mode; the code there must write the reset register.
#[test]
fn the_reset_vector_holds_code_that_resets() {
    // mov eax, 0xffff0; mov rsi, rax
    let mut code = Code::default().bytes(&[0xb8, 0xf0, 0xff, 0x0f, 0x00, 0x48, 0x89, 0xc6]);
    for _ in 0..9 {
        // lodsb; mov edx, 0x3f8; out dx, al
        code = code.bytes(&[0xac, 0xba, 0xf8, 0x03, 0x00, 0x00, 0xee]);
    }
    let mut machine = Machine::new(&code.power_off());
    assert_eq!(machine.run().code, 0);
    let file = std::fs::File::open(machine.path("console")).unwrap();
    let bytes = roost_vmm::console::ConsoleReader::new(file).unwrap().read_from(0).unwrap().bytes;
    // mov dx, 0x602; mov al, 1; out dx, al; hlt; jmp back
    assert_eq!(bytes, [0xba, 0x02, 0x06, 0xb0, 0x01, 0xee, 0xf4, 0xeb, 0xfd]);
}

/// As the ACPI code of a guest does it: the event register says that the button was pressed, once.
#[test]
fn the_power_button_reaches_the_guest() {
    // mov edx, 0x603; again: in al, dx; test al, 1; jz again; in al, dx; add al, '0'; mov dx, 0x3f8; out dx, al
    let code = [0xba, 0x03, 0x06, 0, 0, 0xec, 0xa8, 0x01, 0x74, 0xfb, 0xec, 0x04, b'0'];
    let code = Code::default().bytes(&code).bytes(&[0x66, 0xba, 0xf8, 0x03, 0xee]);
    let mut machine = Machine::new(&code.power_off());
    machine.start::<&str>(&[]);
    machine.client().power_button().unwrap();
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "0"), "{}", ended.stderr);
}

/// Every 32-bit register of every device is read, and what was read is written back: whatever that does to the
/// devices, the machine goes on.
#[test]
fn a_sweep_over_all_device_registers_is_survived() {
    // mov edi, 0xc0000000; mov ecx, 4 * 1024; again: mov eax, [rdi]; mov [rdi], eax; add edi, 4; dec ecx; jnz again
    let code = Code::default()
        .bytes(&[0xbf, 0, 0, 0, 0xc0, 0xb9, 0, 0x10, 0, 0])
        .bytes(&[0x8b, 0x07, 0x89, 0x07, 0x83, 0xc7, 0x04, 0xff, 0xc9, 0x75, 0xf5])
        .print("done")
        .power_off();
    let mut machine = Machine::new(&code);
    disk(&machine.path("disk"), 1 << 20);
    disk(&machine.path("other"), 1 << 20);
    machine.config["drives"] = json!([
        { "drive_id": "root", "path_on_host": machine.text("disk"), "is_root_device": true },
        { "drive_id": "data", "path_on_host": machine.text("other"), "is_read_only": true },
    ]);
    machine.config["entropy"] = json!({});
    let ended = machine.run();
    assert_eq!((ended.code, ended.console.as_str()), (0, "done"), "{}", ended.stderr);
}

/// A guest that drives the entropy device by hand: queue in memory, bell, used ring.
#[test]
fn a_bare_metal_driver_gets_random_bytes() {
    let mut code = Code::default().bytes(&[0xbf, 0, 0, 0, 0xc0]); // mov edi, 0xc0000000
    let register = |code: Code, offset: u32, value: u32| {
        // mov dword [rdi + OFFSET], VALUE
        code.bytes(&[0xc7, 0x87]).bytes(&offset.to_le_bytes()).bytes(&value.to_le_bytes())
    };
    let memory = |code: Code, address: u32, value: u32| {
        // mov dword [ADDRESS], VALUE (absolute, through SIB)
        code.bytes(&[0xc7, 0x04, 0x25]).bytes(&address.to_le_bytes()).bytes(&value.to_le_bytes())
    };
    let (descriptors, available, used, buffer) = (0x20_0000, 0x20_1000, 0x20_2000, 0x20_3000);
    for (offset, value) in [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x30, 0), (0x38, 8)] {
        code = register(code, offset, value);
    }
    for (offset, value) in [(0x80, descriptors), (0x90, available), (0xa0, used), (0x44, 1), (0x70, 15)] {
        code = register(code, offset, value);
    }
    // One descriptor: buffer, 16 bytes, writable. It is made available, and the bell rings.
    for (address, value) in [
        (descriptors, buffer),
        (descriptors + 8, 16),
        (descriptors + 12, 2),
        (available + 4, 0),
        (available, 1 << 16),
    ] {
        code = memory(code, address, value);
    }
    code = register(code, 0x50, 0);
    // again: cmp word [USED + 2], 1; jne again
    code = code.bytes(&[0x66, 0x83, 0x3c, 0x25]).bytes(&(used + 2).to_le_bytes()).bytes(&[1, 0x75, 0xf5]);
    // mov eax, [BUFFER]; or eax, [BUFFER + 4]; test eax, eax; jz over; print "random"; over: power off
    code = code.bytes(&[0x8b, 0x04, 0x25]).bytes(&buffer.to_le_bytes());
    code = code.bytes(&[0x0b, 0x04, 0x25]).bytes(&(buffer + 4).to_le_bytes());
    let print = Code::default().print("random").0;
    code = code.bytes(&[0x85, 0xc0, 0x74, u8::try_from(print.len()).unwrap()]).bytes(&print).power_off();
    let mut machine = Machine::new(&code);
    machine.config["entropy"] = json!({});
    let ended = machine.run();
    assert_eq!((ended.code, ended.console.as_str()), (0, "random"), "{}", ended.stderr);
}

/// What a guest discards its host gets back; what it zeroes is zero; the rest stays.
#[test]
fn a_guest_gives_disk_space_back() {
    use std::os::unix::fs::MetadataExt;
    let (device, ring) = (Device(0), Ring { queue: 0, size: 8, base: 0x20_0000 });
    let code = device.go(device.queue(device.negotiate(Code::default(), 1 << 9 | 1 << 13 | 1 << 14), ring));
    let code = block_clear(code, ring, 0, block::DISCARD, 0, 1024);
    let code = block_clear(code, ring, 1, block::WRITE_ZEROES, 1025, 3);
    let code = block_request(code, ring, 2, block::FLUSH, 0, 0, 0);
    let mut machine = Machine::new(&code.expect32(ring.base + 0xc010, 0).print("done").power_off());
    std::fs::write(machine.path("disk"), vec![7; 1 << 20]).unwrap();
    let file = std::fs::File::open(machine.path("disk")).unwrap();
    file.sync_all().unwrap();
    let before = file.metadata().unwrap().blocks() * 512;
    machine.config["drives"] = json!([{ "drive_id": "root", "path_on_host": machine.text("disk") }]);
    let ended = machine.run();
    assert_eq!((ended.code, ended.console.as_str()), (0, "done"), "{}", ended.stderr);
    let after = file.metadata().unwrap().blocks() * 512;
    assert!(after + (500 << 10) <= before, "{before} bytes before, {after} after");
    let content = std::fs::read(machine.path("disk")).unwrap();
    assert_eq!(content.len(), 1 << 20);
    assert!(content[1025 * 512..1028 * 512].iter().all(|byte| *byte == 0));
    assert!(content[1024 * 512..1025 * 512].iter().chain(&content[1028 * 512..]).all(|byte| *byte == 7));
}

/// How long vCPUs ran.
fn ran(ended: &Ended) -> Duration {
    let time = |event: &Event| match event {
        Event::Built { boottime_ns, .. }
        | Event::VcpusRunning { boottime_ns }
        | Event::GuestReset { boottime_ns }
        | Event::Exited { boottime_ns, .. } => *boottime_ns,
    };
    Duration::from_nanos(time(&ended.events[ended.events.len() - 1]) - time(&ended.events[1]))
}

/// A guest that writes 256 KiB to a disk of 64 KiB at once and 64 KiB per 100 ms needs 200 ms at least; nothing is lost.
#[test]
fn a_disk_keeps_its_limits() {
    let (device, ring) = (Device(0), Ring { queue: 0, size: 8, base: 0x20_0000 });
    let mut code = device.go(device.queue(device.negotiate(Code::default(), 0), ring));
    for index in 0..8_u16 {
        code = code.store(0x50_0000, u32::from(index) + 1);
        code = block_request(code, ring, index, block::OUT, u64::from(index) * 64, 0x50_0000, 32 << 10);
    }
    let mut machine = Machine::new(&code.print("done").power_off());
    disk(&machine.path("disk"), 1 << 20);
    machine.config["drives"] = json!([{
        "drive_id": "root",
        "path_on_host": machine.text("disk"),
        "rate_limiter": { "bandwidth": { "size": 65536, "refill_time": 100 } },
    }]);
    let ended = machine.run();
    assert_eq!((ended.code, ended.console.as_str()), (0, "done"), "{}", ended.stderr);
    assert!(ran(&ended) >= Duration::from_millis(200), "{:?}", ran(&ended));
    let content = std::fs::read(machine.path("disk")).unwrap();
    for index in 0..8 {
        assert_eq!(usize::from(content[index * 32 * 1024]), index + 1);
    }
}

/// Six requests of 64 bytes: two at once and one per 100 ms after them need 400 ms. With 64 bytes per 200 ms, and as many on top, the first
/// two are paid at once, the third leaves a debt, and three wait for theirs to be paid.
#[test]
fn random_bytes_keep_their_limits() {
    let (device, ring) = (Device(0), Ring { queue: 0, size: 8, base: 0x20_0000 });
    let code = device.go(device.queue(device.negotiate(Code::default(), 0), ring));
    let code = ring.descriptor(code, 0, 0x50_0000, 64, WRITE, 0);
    let code = (0..6).fold(code, |code, index| {
        device.notify(ring.offer(code, index, 0), 0).wait16(ring.used_index(), index + 1)
    });
    let code = code.print("done").power_off();
    for (limits, least) in [
        (json!({ "ops": { "size": 2, "refill_time": 200 } }), 400),
        (json!({ "bandwidth": { "size": 64, "one_time_burst": 64, "refill_time": 200 } }), 600),
    ] {
        let mut machine = Machine::new(&code);
        machine.config["entropy"] = json!({ "rate_limiter": limits });
        let ended = machine.run();
        assert_eq!((ended.code, ended.console.as_str()), (0, "done"), "{}", ended.stderr);
        assert!(ran(&ended) >= Duration::from_millis(least), "{limits}: {:?}", ran(&ended));
    }
}

/// One packet per 200 ms, either way, after a first one: four take 600 ms at least, and none is lost.
#[test]
fn an_interface_keeps_its_limits() {
    let Some((tap, wire)) = tap::create_with_wire() else { return };
    let limit = json!({ "ops": { "size": 1, "refill_time": 200 } });
    let least = Duration::from_millis(600);
    let mut machine = machines::with_disk_and_interface();
    machine.config["network-interfaces"][0]["tx_rate_limiter"] = limit.clone();
    machine.config["network-interfaces"][0]["rx_rate_limiter"] = limit;

    let began = Instant::now();
    machine.start(&machines::tap_argument(&tap));
    wait_for("the guest", || machine.console().contains(machines::UP).then_some(()));
    assert!(began.elapsed() >= least, "four packets from the guest in {:?}", began.elapsed());

    let client = machine.client();
    let counted = |what: &str| client.metrics().unwrap()["devices"]["eth0"][what].as_u64().unwrap();
    // The host's own packets, of a new interface, may be among them.
    let began = Instant::now();
    let before = counted("rx_packets");
    (0..4).for_each(|_| wire.send(&[0xff; 100]));
    wait_for("four packets at the guest", || (counted("rx_packets") >= before + 4).then_some(()));
    assert!(began.elapsed() >= least, "four packets to the guest in {:?}", began.elapsed());
    assert_eq!((counted("tx_packets"), counted("tx_dropped")), (4, 0));
    assert!(counted("tx_limited") >= 3 && counted("rx_limited") >= 3);
}

#[test]
fn console_input_reaches_the_guest() {
    // again: mov edx, 0x3fd; wait: in al, dx; test al, 1; jz wait; mov dl, 0xf8; in al, dx; out dx, al; cmp al, 'q'; jne again
    let echo = [
        0xba, 0xfd, 0x03, 0, 0, 0xec, 0xa8, 0x01, 0x74, 0xfb, 0xb2, 0xf8, 0xec, 0xee, 0x3c, b'q', 0x75, 0xee,
    ];
    let mut machine = Machine::new(&Code::default().bytes(&echo).power_off());
    machine.start::<&str>(&[]);
    let line = "a line that is longer than the serial port's own buffer of sixty-four bytes, quite a bit";
    let line = line.replace('q', "k") + "q";
    machine.client().console_input(line.as_bytes()).unwrap();
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console), (0, line));
}

#[test]
fn the_console_goes_on_over_two_runs() {
    let mut machine = Machine::new(&Code::default().print("x").power_off());
    machine.run();
    // The first run's API socket is still there, and is replaced.
    assert!(machine.path("api").exists());
    assert_eq!(machine.run().console, "xx");
}
