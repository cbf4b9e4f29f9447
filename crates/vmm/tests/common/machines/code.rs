//! A guest with three huge pages of code and one small one, which changes some of it.

use crate::common::elf::{Kernel, Segment, with_code_section};
use crate::common::{Code, Machine};

pub const START: u32 = 0x20_0000;
pub const PIECES_KIB: usize = 3 << 11;
pub const REST_KIB: usize = 4;
/// Where the guest changes its code: before it first comes to the monitor, and afterwards.
pub const EARLY: u32 = 0x40_0800;
const LATE: u32 = 0x60_0900;

/// What the code's file has everywhere but at its beginning.
pub fn pattern(at: u32) -> u32 {
    at.wrapping_mul(0x9e37_79b9) | 1
}

/// Waits for a byte of input: again: mov edx, 0x3fd; in al, dx; test al, 1; jz again; mov edx, 0x3f8; in al, dx
fn wait_for_input(code: Code) -> Code {
    code.bytes(&[0xba, 0xfd, 0x03, 0, 0, 0xec, 0xa8, 0x01, 0x74, 0xf6, 0xba, 0xf8, 0x03, 0, 0, 0xec])
}

/// Starts it by the API of a monitor that has KVM's machine ready, so that nothing of the code has moved before its guest runs.
pub fn start(machine: &Machine) {
    let client = machine.client();
    for part in ["boot-source", "machine-config", "serial"] {
        client.put("PUT", &format!("/{part}"), &machine.config[part].clone()).unwrap();
    }
    client.put("PUT", "/actions", &serde_json::json!({ "action_type": "InstanceStart" })).unwrap();
}

/// It prints a letter at its start and for each of two bytes of input, and looks at what it knows of its code each time.
pub fn machine() -> Machine {
    let words = [0x3f_f000, 0x40_0804, 0x5f_fffc, 0x60_0000, 0x7f_fffc, 0x80_0010];
    let look = |code: Code| words.into_iter().fold(code, |code, at| code.expect32(at, pattern(at)));
    let mut code = look(Code::default().store(EARLY, 0x1111_1111)).print("a");
    code = look(wait_for_input(code)).expect32(EARLY, 0x1111_1111).store(LATE, 0x2222_2222).print("b");
    code = look(wait_for_input(code)).expect32(EARLY, 0x1111_1111).expect32(LATE, 0x2222_2222).print("c");
    let words = (PIECES_KIB + REST_KIB) * 1024 / 4;
    let mut bytes: Vec<u8> = (0..words).flat_map(|n| pattern(START + 4 * n as u32).to_le_bytes()).collect();
    let code = code.stop().0;
    bytes[..code.len()].copy_from_slice(&code);
    let segments = vec![Segment::at(START.into(), bytes)];
    let kernel = Kernel { entry: START.into(), segments, pvh_entry: None };
    let machine = Machine::new(&Code::default());
    std::fs::write(machine.path("kernel"), with_code_section(kernel.image())).unwrap();
    machine
}
