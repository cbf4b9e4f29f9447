//! The guest's init of the boots: one line, then nothing. It is a few instructions, so that what is measured is the kernel and the
//! monitor: the C library's start alone would be more than all of it.

use std::arch::global_asm;

use crate::common::elf::{Kernel, Segment};

/// What a guest says when it is up.
pub const LINE: &str = "the guest is up";

/// Where the program lies.
const ADDRESS: u64 = 0x40_0000;

// write(1, line, length), then pause() for ever. The kernel opens its console as init's standard streams.
global_asm!(
    ".pushsection .rodata",
    "roost_guest_begin:",
    "mov eax, 1",
    "mov edi, 1",
    "lea rsi, [rip + 2f]",
    "mov edx, 16",
    "syscall",
    "1: mov eax, 34",
    "syscall",
    "jmp 1b",
    "2: .ascii \"the guest is up\\n\"",
    "roost_guest_end:",
    ".popsection",
);

unsafe extern "C" {
    static roost_guest_begin: u8;
    static roost_guest_end: u8;
}

/// The init as a static program.
pub fn program() -> Vec<u8> {
    let (begin, end) = (&raw const roost_guest_begin, &raw const roost_guest_end);
    // SAFETY: the assembly above puts both labels around its bytes, the second behind the first.
    let length = unsafe { end.offset_from_unsigned(begin) };
    // SAFETY: the same.
    let code = unsafe { std::slice::from_raw_parts(begin, length) };
    Kernel { entry: ADDRESS, segments: vec![Segment::at(ADDRESS, code.to_vec())], pvh_entry: None }.image()
}
