//! A tiny static program that makes the system calls it is told to, whatever is around it, and writes what each of them gave.

use std::path::Path;

use super::elf::{Kernel, Segment};

const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x80_0000;
const RESULTS: u64 = 0xc0_0000;

/// An argument of a call.
pub enum Argument {
    Number(i64),
    /// Where these bytes are, with a NUL behind them.
    Bytes(Vec<u8>),
    /// What an earlier call gave.
    Result(usize),
}

impl From<i32> for Argument {
    fn from(number: i32) -> Self {
        Self::Number(number.into())
    }
}

impl From<i64> for Argument {
    fn from(number: i64) -> Self {
        Self::Number(number)
    }
}

impl From<&str> for Argument {
    fn from(text: &str) -> Self {
        Self::Bytes(text.into())
    }
}

/// The calls, in order.
#[derive(Default)]
pub struct Calls {
    code: Vec<u8>,
    data: Vec<u8>,
    count: usize,
}

impl Calls {
    /// Adds a call of at most six arguments and returns its index.
    pub fn call<const N: usize>(&mut self, number: i64, arguments: [Argument; N]) -> usize {
        // mov rdi, rsi, rdx, r10, r8 or r9, IMMEDIATE; the same from rax
        let registers: [([u8; 2], [u8; 3]); 6] = [
            ([0x48, 0xbf], [0x48, 0x89, 0xc7]),
            ([0x48, 0xbe], [0x48, 0x89, 0xc6]),
            ([0x48, 0xba], [0x48, 0x89, 0xc2]),
            ([0x49, 0xba], [0x49, 0x89, 0xc2]),
            ([0x49, 0xb8], [0x49, 0x89, 0xc0]),
            ([0x49, 0xb9], [0x49, 0x89, 0xc1]),
        ];
        for (argument, (immediate, from_rax)) in arguments.into_iter().zip(registers) {
            let value = match argument {
                Argument::Number(value) => value.cast_unsigned(),
                Argument::Bytes(bytes) => {
                    let at = DATA + self.data.len() as u64;
                    self.data.extend(bytes);
                    self.data.push(0);
                    at
                }
                Argument::Result(earlier) => {
                    // mov rax, [RESULT]
                    self.code.extend([0x48, 0xa1]);
                    self.code.extend(result(earlier).to_le_bytes());
                    self.code.extend(from_rax);
                    continue;
                }
            };
            self.code.extend(immediate);
            self.code.extend(value.to_le_bytes());
        }
        // mov rax, NUMBER; syscall; mov [RESULT], rax
        self.code.extend([0x48, 0xb8]);
        self.code.extend(number.to_le_bytes());
        self.code.extend([0x0f, 0x05, 0x48, 0xa3]);
        self.code.extend(result(self.count).to_le_bytes());
        self.count += 1;
        self.count - 1
    }

    /// Writes the program: it writes all results to its stdout, and ends.
    pub fn write(mut self, path: &Path) {
        let length = Argument::Number((8 * self.count as u64).cast_signed());
        let address = Argument::Number(RESULTS.cast_signed());
        self.call(libc::SYS_write, [1.into(), address, length]);
        self.call(libc::SYS_exit_group, [0.into()]);
        self.data.push(0);
        let results = vec![0; 8 * self.count];
        let segments =
            vec![Segment::at(CODE, self.code), Segment::at(DATA, self.data), Segment::at(RESULTS, results)];
        std::fs::write(path, Kernel { entry: CODE, segments, pvh_entry: None }.image()).unwrap();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(path, executable).unwrap();
    }
}

fn result(number: usize) -> u64 {
    RESULTS + 8 * number as u64
}

/// What the program wrote: a number, or an error below 0.
pub fn results(output: &[u8]) -> Vec<i64> {
    output.chunks_exact(8).map(|word| i64::from_le_bytes(word.try_into().unwrap())).collect()
}
