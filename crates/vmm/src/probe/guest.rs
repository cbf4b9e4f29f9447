//! A machine for one question: a few bytes of 64-bit kernel-mode code, and how it ended.
//!
//! The code says that it has reached its end by writing to a port (the in-kernel interrupt controller would swallow a
//! `hlt`); each of its 32 exceptions has a handler that writes its number to another port.

use std::fmt;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::cpu::registers::{self, Entry};
use crate::memory::{self, Memory};
use crate::vcpu::crash;
use crate::vcpu::kick::{KickPage, unblock_signal};

/// Where the code is.
const CODE: u64 = 0x10_0000;
/// A zeroed, aligned place for instructions that want memory.
pub const DATA: u32 = 0x12_0000;
const IDT: u64 = 0x13_0000;
const HANDLERS: u64 = 0x14_0000;
const STACK: u64 = 0x15_0000;
const EXCEPTIONS: u64 = 32;
/// The port of "reached the end".
pub const END_PORT: u8 = 0xf1;
const EXCEPTION_PORT: u8 = 0xf2;
const MEMORY_MIB: u64 = 2;

const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_OSXSAVE: u64 = 1 << 18;

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It reached its end.
    Reached,
    /// An exception.
    Exception(u8),
    /// KVM stopped it.
    Stopped(String),
    /// It did not end in time.
    TimedOut,
}

impl fmt::Display for Answer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reached => formatter.write_str("it works"),
            Self::Exception(6) => formatter.write_str("the guest gets #UD (invalid opcode)"),
            Self::Exception(13) => formatter.write_str("the guest gets #GP (general protection)"),
            Self::Exception(number) => write!(formatter, "the guest gets exception {number}"),
            Self::Stopped(why) => formatter.write_str(why),
            Self::TimedOut => formatter.write_str("it does not end in time"),
        }
    }
}

/// Runs code; returns how it ended.
///
/// # Errors
/// The machine cannot be made.
pub fn run(kvm: &Kvm, code: &[u8], xsave: bool, limit: Duration) -> Result<Answer, String> {
    with_machine(kvm, code, xsave, limit, enter)?.unwrap_or(Ok(Answer::TimedOut))
}

/// Runs code that reaches its end again and again, each time with another number of rounds in RSI: a warm-up, then
/// longer and longer until one run lasts `enough`. Returns the rounds of that run and how long it took.
///
/// # Errors
/// How it ended instead.
pub fn measure(kvm: &Kvm, code: &[u8], enough: Duration, limit: Duration) -> Result<(u32, Duration), String> {
    let measured = with_machine(kvm, code, false, limit, move |vcpu| {
        let mut rounds = 1_000_u32;
        loop {
            // The shorter of two times is the one that less else has disturbed.
            let time = timed(vcpu, rounds)?.min(timed(vcpu, rounds)?);
            if time >= enough || rounds >= MAX_ROUNDS {
                return Ok((rounds, time));
            }
            rounds = rounds.saturating_mul(4).min(MAX_ROUNDS);
        }
    })?;
    measured.unwrap_or_else(|| Err(Answer::TimedOut.to_string()))
}

/// Rounds of one run at most.
const MAX_ROUNDS: u32 = 1 << 28;

fn timed(vcpu: &mut VcpuFd, rounds: u32) -> Result<Duration, String> {
    let mut regs = vcpu.get_regs().map_err(|error| error.to_string())?;
    regs.rsi = u64::from(rounds);
    vcpu.set_regs(&regs).map_err(|error| error.to_string())?;
    let start = Instant::now();
    match enter(vcpu)? {
        Answer::Reached => Ok(start.elapsed()),
        other => Err(other.to_string()),
    }
}

/// Makes a machine and lets a thread of its own do something with its vCPU; `None` when that was not over in time and
/// had to be interrupted without giving a result.
fn with_machine<T: Send + 'static>(
    kvm: &Kvm,
    code: &[u8],
    xsave: bool,
    limit: Duration,
    body: impl FnOnce(&mut VcpuFd) -> Result<T, String> + Send + 'static,
) -> Result<Option<Result<T, String>>, String> {
    let memory = memory::create(MEMORY_MIB).map_err(|error| error.chain())?;
    write_guest(&memory, code).map_err(|error| format!("writing the guest: {error}"))?;
    let (vm, mut vcpu) = make(kvm, &memory, xsave).map_err(|error| format!("making the machine: {error}"))?;
    let kick = KickPage::new(&vcpu).map_err(|error| error.chain())?;
    let (sender, receiver) = channel();
    let thread = std::thread::spawn(move || {
        unblock_signal();
        let _ = sender.send(body(&mut vcpu));
    });
    let mut deadline = limit;
    let result = loop {
        match receiver.recv_timeout(deadline) {
            Ok(result) => break Some(result),
            Err(RecvTimeoutError::Timeout) => kick.kick(Some(&thread)),
            Err(RecvTimeoutError::Disconnected) => break None,
        }
        deadline = Duration::from_millis(20);
    };
    let _ = thread.join();
    drop(vm);
    Ok(result)
}

fn enter(vcpu: &mut VcpuFd) -> Result<Answer, String> {
    Ok(match vcpu.run() {
        Ok(VcpuExit::IoOut(port, _)) if port == u16::from(END_PORT) => Answer::Reached,
        Ok(VcpuExit::IoOut(port, data)) if port == u16::from(EXCEPTION_PORT) => {
            Answer::Exception(data.first().copied().unwrap_or(u8::MAX))
        }
        Ok(VcpuExit::InternalError) => Answer::Stopped(crash::internal_error(vcpu.get_kvm_run())),
        Ok(VcpuExit::Shutdown) => Answer::Stopped("triple fault".into()),
        Ok(other) => Answer::Stopped(format!("KVM stops with {other:?}")),
        Err(error) if error.errno() == libc::EINTR => Answer::TimedOut,
        Err(error) => Answer::Stopped(format!("KVM_RUN fails: {error}")),
    })
}

fn make(kvm: &Kvm, memory: &Memory, xsave: bool) -> Result<(VmFd, VcpuFd), kvm_ioctls::Error> {
    let vm = kvm.create_vm()?;
    let Some(region) = memory.iter().next() else { return Err(kvm_ioctls::Error::new(libc::ENOMEM)) };
    let host = region.get_host_address(vm_memory::MemoryRegionAddress(0));
    let slot = kvm_bindings::kvm_userspace_memory_region {
        memory_size: region.len(),
        userspace_addr: host.map_err(|_| kvm_ioctls::Error::new(libc::EFAULT))? as u64,
        ..kvm_bindings::kvm_userspace_memory_region::default()
    };
    // SAFETY: the region is one mapping, which the caller keeps until the machine is gone.
    unsafe { vm.set_user_memory_region(slot) }?;
    let vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let entry = Entry::Long { rip: CODE, rsi: 0 };
    let mut sregs = vcpu.get_sregs()?;
    registers::special(&mut sregs, entry);
    sregs.idt.base = IDT;
    sregs.idt.limit = 16 * 32 - 1;
    sregs.cr4 |= CR4_OSFXSR | CR4_OSXMMEXCPT | if xsave { CR4_OSXSAVE } else { 0 };
    vcpu.set_sregs(&sregs)?;
    let mut regs = registers::general(entry);
    regs.rsp = STACK;
    vcpu.set_regs(&regs)?;
    Ok((vm, vcpu))
}

fn write_guest(memory: &Memory, code: &[u8]) -> Result<(), vm_memory::GuestMemoryError> {
    let entry = Entry::Long { rip: CODE, rsi: 0 };
    registers::write_tables(memory, entry).map_err(|_| vm_memory::GuestMemoryError::InvalidBackendAddress)?;
    memory.write_slice(code, GuestAddress(CODE))?;
    for vector in 0..EXCEPTIONS {
        let handler = HANDLERS + 16 * vector;
        // mov al, VECTOR; out EXCEPTION_PORT, al; jmp self
        let bytes = [0xb0, (vector & 0xff) as u8, 0xe6, EXCEPTION_PORT, 0xeb, 0xfe];
        memory.write_slice(&bytes, GuestAddress(handler))?;
        // A 64-bit interrupt gate through the code segment 0x10.
        let gate = handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        memory.write_obj(gate, GuestAddress(IDT + 16 * vector))?;
        memory.write_obj(handler >> 32, GuestAddress(IDT + 16 * vector + 8))?;
    }
    Ok(())
}
