//! Machines that more than one test uses.

pub mod code;

use std::fs::File;

use serde_json::json;

use super::virtio::{Device, NEXT, Ring, WRITE, block, block_request};
use super::{Code, Machine, disk, footprint, hand_over};

/// Their memory, MiB.
pub const MEMORY_MIB: u64 = 128;
/// What the guest prints when it has used its devices.
pub const UP: &str = "up";

/// Disk requests that the guest makes, and their size.
const REQUESTS: u16 = 32;
const REQUEST_BYTES: u32 = 64 * 1024;
const FRAME: u32 = 12 + 60;

/// Answers each byte of input by that byte and by how many there have been, counted in memory.
pub fn echo() -> Code {
    Code::default()
        // again: mov edx, 0x3fd; in al, dx; test al, 1; jz again
        .bytes(&[0xba, 0xfd, 0x03, 0, 0, 0xec, 0xa8, 0x01, 0x74, 0xf6])
        // mov edx, 0x3f8; in al, dx; out dx, al
        .bytes(&[0xba, 0xf8, 0x03, 0, 0, 0xec, 0xee])
        // mov edi, 0x200000; inc byte [rdi]; mov al, [rdi]; add al, '0'; out dx, al; jmp again
        .bytes(&[0xbf, 0, 0, 0x20, 0, 0xfe, 0x07, 0x8a, 0x07, 0x04, 0x30, 0xee, 0xeb, 0xe1])
}

/// The code of a guest that reads and writes its disk.
fn use_disk() -> Code {
    let (ring, buffer, block) = (Ring { queue: 0, size: 8, base: 0x20_0000 }, 0x50_0000, Device(0));
    let mut code = block.go(block.queue(block.negotiate(Code::default(), 0), ring));
    for index in 0..REQUESTS {
        let kind = if index % 2 == 0 { block::IN } else { block::OUT };
        let sector = u64::from(index) * u64::from(REQUEST_BYTES / 512);
        code = block_request(code, ring, index, kind, sector, buffer, REQUEST_BYTES);
    }
    block_request(code, ring, REQUESTS, block::FLUSH, 0, 0, 0)
}

/// The machine of a guest with a disk, which says that it is up and halts in the end.
fn machine_with_disk(code: Code) -> Machine {
    // cli; hlt; jmp back to hlt
    let mut machine = Machine::new(&code.print(UP).bytes(&[0xfa, 0xf4, 0xeb, 0xfd]));
    footprint::settle(&machine.program);
    disk(&machine.path("disk"), 8 << 20);
    machine.config["machine-config"]["mem_size_mib"] = json!(MEMORY_MIB);
    machine.config["drives"] =
        json!([{ "drive_id": "root", "path_on_host": machine.text("disk"), "is_root_device": true }]);
    machine
}

/// A guest that reads and writes its disk, says so, and halts.
pub fn with_disk() -> Machine {
    machine_with_disk(use_disk())
}

/// A guest that reads and writes its disk, sends and takes packets, says so, and halts.
pub fn with_disk_and_interface() -> Machine {
    let receive = Ring { queue: 0, size: 8, base: 0x30_0000 };
    let transmit = Ring { queue: 1, size: 8, base: 0x40_0000 };
    let (packets, frame, net) = (0x60_0000_u32, 0x70_0000, Device(1));
    let mut code = use_disk();

    code = net.queue(net.queue(net.negotiate(code, 0), receive), transmit);
    for n in 0..receive.size {
        code = receive.descriptor(code, n, u64::from(packets + 0x1000 * u32::from(n)), 2048, WRITE, 0);
        code = receive.offer(code, n, n);
    }
    // Broadcast, from nobody in particular, of a type that nobody listens to.
    code = code.store(frame + 12, u32::MAX).store(frame + 16, 0x0002_ffff).store(frame + 24, 0xb588);
    code = transmit.descriptor(net.go(code), 0, frame.into(), 12, NEXT, 1);
    code = transmit.descriptor(code, 1, u64::from(frame) + 12, FRAME - 12, 0, 0);
    for index in 0..4 {
        code = net.notify(transmit.offer(code, index, 0), transmit.queue);
        code = code.wait16(transmit.used_index(), index + 1);
    }
    let mut machine = machine_with_disk(code);
    machine.config["network-interfaces"] = json!([{ "iface_id": "eth0", "host_dev_name": "tap" }]);
    machine
}

/// Hands the tap over.
pub fn tap_argument(tap: &File) -> Vec<String> {
    hand_over("tap", tap).to_vec()
}

/// Features of an interface with several pairs of queues: `VIRTIO_NET_F_CTRL_VQ` and `VIRTIO_NET_F_MQ`.
pub const SEVERAL_PAIRS: u32 = 1 << 17 | 1 << 22;

/// Tells an interface by its control queue, as command number `index`, how many pairs of queues are used; complains about another answer.
pub fn use_pairs(code: Code, net: Device, control: Ring, index: u16, pairs: u32, answer: u32) -> Code {
    let command = control.base + 0xc000;
    let code = code.store(command, 4 | pairs << 16).store(command + 8, 0xff);
    let code = control.descriptor(code, 0, command.into(), 4, NEXT, 1);
    let code = control.descriptor(code, 1, u64::from(command) + 8, 1, WRITE, 0);
    let code = net.notify(control.offer(code, index, 0), control.queue);
    code.wait16(control.used_index(), index + 1).expect32(command + 8, answer)
}
