//! The guest's side of CPUs that come and go.

use super::Code;
use roost_vmm::cpu::features::Register;

/// The event register (reading clears it) and its bit for CPUs.
pub const EVENT: u16 = 0x603;
pub const EVENT_CPUS: u8 = 2;
/// The register of the first vCPU.
pub const CPUS: u16 = 0x620;
pub const PLUGGED: u8 = 1;
pub const INSERTING: u8 = 2;
pub const REMOVING: u8 = 4;
pub const EJECT: u8 = 8;

/// The local APIC's spurious interrupt vector register, whose bit 8 switches it on.
const SVR: u32 = 0xfee0_00f0;
/// Its interrupt command register.
const ICR_LOW: u32 = 0xfee0_0300;
const ICR_HIGH: u32 = 0xfee0_0310;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;

/// Where other CPUs start, and what they set when they have.
const PAGE: u32 = 0x30;
pub const STARTED: u32 = (PAGE << 12) + 0x800;

/// What a guest tells of its CPU.
#[derive(Clone, Copy)]
pub enum Told {
    /// Leaf, subleaf, register.
    Cpuid(u32, u32, Register),
    /// The lower half of an MSR.
    Msr(u32),
}

/// The words that a guest has told.
pub fn told(text: &str) -> Vec<u32> {
    let digit = |byte: &u8| u32::from(byte - b'a');
    text.as_bytes()
        .chunks_exact(8)
        .map(|word| word.iter().fold(0, |value, byte| value << 4 | digit(byte)))
        .collect()
}

impl Code {
    /// Waits until a port reads as a value: mov edx, PORT; again: in al, dx; cmp al, VALUE; jne again
    pub fn wait_port(self, port: u16, value: u8) -> Self {
        let code = self.bytes(&[0xba]).bytes(&u32::from(port).to_le_bytes());
        code.bytes(&[0xec, 0x3c, value, 0x75, 0xfb])
    }

    /// Waits for the event of CPUs, whatever else is told with it (a machine from a snapshot hears that it is one):
    /// mov edx, EVENT; again: in al, dx; test al, EVENT_CPUS; jz again
    pub fn wait_cpus_event(self) -> Self {
        let code = self.bytes(&[0xba]).bytes(&u32::from(EVENT).to_le_bytes());
        code.bytes(&[0xec, 0xa8, EVENT_CPUS, 0x74, 0xfb])
    }

    /// Puts the code of other CPUs in its place: it says which CPU it is by its APIC's id, `0` and up, and halts. Switches this
    /// CPU's APIC on, as every guest does: KVM looks anew then which CPUs there are to send to.
    pub fn other_cpus(self) -> Self {
        self.other_cpus_then(&[])
    }

    /// The same, but each lets go of itself before it halts.
    pub fn other_cpus_that_leave(self) -> Self {
        let [low, high] = CPUS.to_le_bytes();
        // mov dx, CPUS; add dl, bl; mov al, EJECT; out dx, al
        self.other_cpus_then(&[0xba, low, high, 0x00, 0xda, 0xb0, EJECT, 0xee])
    }

    /// The same, but each says what it has in registers of CPUID and in MSRs before it has started: eight letters from `a` up for each,
    /// one for four bits. In real mode, where each KVM answers CPUID by itself: kvm_pvm lets 64-bit code have the host's.
    pub fn other_cpus_that_tell(self, what: &[Told]) -> Self {
        let mut first = Vec::new();
        for what in what {
            match *what {
                // mov eax, LEAF; mov ecx, SUBLEAF; cpuid; mov esi, eax, ebx, ecx or edx
                Told::Cpuid(leaf, subleaf, register) => {
                    first.extend([[0x66, 0xb8].as_slice(), &leaf.to_le_bytes()].concat());
                    first.extend([[0x66, 0xb9].as_slice(), &subleaf.to_le_bytes()].concat());
                    first.extend([0x0f, 0xa2, 0x66, 0x89, [0xc6, 0xde, 0xce, 0xd6][register as usize]]);
                }
                // mov ecx, ADDR; rdmsr; mov esi, eax
                Told::Msr(addr) => {
                    first.extend([[0x66, 0xb9].as_slice(), &addr.to_le_bytes()].concat());
                    first.extend([0x0f, 0x32, 0x66, 0x89, 0xc6]);
                }
            }
            for shift in (0..32).step_by(4).rev() {
                // mov eax, esi; shr eax, SHIFT; and al, 15; add al, 'a'; mov dx, 0x3f8; out dx, al
                first.extend([
                    0x66, 0x89, 0xf0, 0x66, 0xc1, 0xe8, shift, 0x24, 0x0f, 0x04, b'a', 0xba, 0xf8, 0x03, 0xee,
                ]);
            }
        }
        self.other_cpus_with(&first, &[])
    }

    fn other_cpus_then(self, then: &[u8]) -> Self {
        self.other_cpus_with(&[], then)
    }

    fn other_cpus_with(self, first: &[u8], then: &[u8]) -> Self {
        let code = [
            &[0x66, 0xb8, 1, 0, 0, 0][..], // mov eax, 1
            &[0x0f, 0xa2],                 // cpuid
            &[0x66, 0xc1, 0xeb, 24],       // shr ebx, 24
            &[0x88, 0xd8, 0x04, b'0'],     // mov al, bl; add al, '0'
            &[0xba, 0xf8, 0x03, 0xee],     // mov dx, 0x3f8; out dx, al
            first,
            &[0x2e, 0xc6, 0x06, 0x00, 0x08, 0x01], // mov byte [cs:0x800], 1
            then,
            &[0xfa, 0xf4, 0xeb, 0xfd], // cli; hlt; jmp back to hlt
        ]
        .concat();
        let mut words = code.clone();
        words.resize(code.len().next_multiple_of(4), 0x90);
        (PAGE << 12..)
            .step_by(4)
            .zip(words.chunks_exact(4))
            .fold(self.store(SVR, 0x1ff), |code, (at, word)| {
                code.store(at, u32::from_le_bytes(word.try_into().unwrap()))
            })
    }

    /// Sends INIT and SIPI to a CPU, which starts if it is there.
    pub fn start_cpu(self, id: u8) -> Self {
        let code = self.store(STARTED, 0).store(ICR_HIGH, u32::from(id) << 24).store(ICR_LOW, INIT);
        code.store(ICR_HIGH, u32::from(id) << 24).store(ICR_LOW, STARTUP | PAGE)
    }

    /// The same, and waits until it has said so.
    pub fn started_cpu(self, id: u8) -> Self {
        self.start_cpu(id).wait16(STARTED, 1)
    }

    /// Waits for the event of CPUs, for a CPU's register to be as it should, and says that it was seen.
    pub fn see_cpu(self, id: u8, register: u8) -> Self {
        let port = CPUS + u16::from(id);
        let code = self.wait_cpus_event().wait_port(port, register);
        code.out(port, register & (INSERTING | REMOVING)).wait_port(port, PLUGGED)
    }

    /// Lets go of a CPU.
    pub fn eject_cpu(self, id: u8) -> Self {
        self.out(CPUS + u16::from(id), EJECT).wait_port(CPUS + u16::from(id), 0)
    }
}
