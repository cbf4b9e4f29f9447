//! What a crashed guest leaves for people: why, the registers, the instruction bytes.

use std::fmt::Write;

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, kvm_regs, kvm_run, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::Memory;

/// Instruction bytes shown before and at RIP.
const BEFORE: u64 = 8;
const AT: u64 = 16;

/// Says what a KVM_EXIT_INTERNAL_ERROR means.
#[must_use]
pub fn internal_error(run: &kvm_run) -> String {
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, which fills this member of the union.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let meaning = match internal.suberror {
        KVM_INTERNAL_ERROR_EMULATION => "KVM cannot emulate the guest's instruction",
        KVM_INTERNAL_ERROR_SIMUL_EX => "exceptions while an exception was delivered",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while an event was delivered",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit reason that KVM does not expect",
        _ => "an error without a name",
    };
    let count = (internal.ndata as usize).min(internal.data.len());
    let data: Vec<String> = internal.data[..count].iter().map(|word| format!("{word:#x}")).collect();
    format!("{meaning} (KVM_EXIT_INTERNAL_ERROR, suberror {}, data [{}])", internal.suberror, data.join(", "))
}

/// The whole report of one vCPU.
#[must_use]
pub fn report(id: u8, vcpu: &VcpuFd, memory: &Memory, reason: &str) -> String {
    let mut text = format!("vCPU {id}: {reason}");
    let (Ok(regs), Ok(sregs)) = (vcpu.get_regs(), vcpu.get_sregs()) else {
        text.push_str("\n  (its registers cannot be read)");
        return text;
    };
    registers(&mut text, &regs, &sregs);
    let code = instruction_bytes(&regs, &sregs, memory, |address| {
        vcpu.translate_gva(address).ok().filter(|t| t.valid != 0).map(|t| t.physical_address)
    });
    let _ = write!(text, "\n  code at RIP: {code}");
    text
}

fn registers(text: &mut String, r: &kvm_regs, s: &kvm_sregs) {
    let _ = write!(
        text,
        "\n  RIP={:016x} RFLAGS={:016x} CPL={} mode={}\n  RAX={:016x} RBX={:016x} RCX={:016x} RDX={:016x}\n  \
         RSI={:016x} RDI={:016x} RSP={:016x} RBP={:016x}\n  R8 ={:016x} R9 ={:016x} R10={:016x} R11={:016x}\n  \
         R12={:016x} R13={:016x} R14={:016x} R15={:016x}\n  CR0={:016x} CR2={:016x} CR3={:016x} CR4={:016x}\n  \
         EFER={:x} CS={:x} SS={:x} DS={:x} GDT={:x}+{:x} IDT={:x}+{:x}",
        r.rip,
        r.rflags,
        s.cs.selector & 3,
        mode(s),
        r.rax,
        r.rbx,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        r.rsp,
        r.rbp,
        r.r8,
        r.r9,
        r.r10,
        r.r11,
        r.r12,
        r.r13,
        r.r14,
        r.r15,
        s.cr0,
        s.cr2,
        s.cr3,
        s.cr4,
        s.efer,
        s.cs.selector,
        s.ss.selector,
        s.ds.selector,
        s.gdt.base,
        s.gdt.limit,
        s.idt.base,
        s.idt.limit,
    );
}

const fn mode(s: &kvm_sregs) -> &'static str {
    if s.cr0 & 1 == 0 {
        "real"
    } else if s.efer & 1 << 10 == 0 {
        "protected"
    } else if s.cs.l == 1 {
        "64-bit"
    } else {
        "compatibility"
    }
}

/// Hex bytes, the one at RIP in brackets.
fn instruction_bytes(
    regs: &kvm_regs,
    sregs: &kvm_sregs,
    memory: &Memory,
    translate: impl Fn(u64) -> Option<u64>,
) -> String {
    let rip = if sregs.cs.l == 1 { regs.rip } else { sregs.cs.base.wrapping_add(regs.rip) };
    let mut text = String::new();
    for address in rip.saturating_sub(BEFORE)..rip.saturating_add(AT) {
        let physical = if sregs.cr0 >> 31 & 1 == 0 { Some(address) } else { translate(address) };
        let byte = physical.and_then(|physical| memory.read_obj::<u8>(GuestAddress(physical)).ok());
        let byte = byte.map_or_else(|| "??".to_owned(), |byte| format!("{byte:02x}"));
        let _ = if address == rip { write!(text, "[{byte}] ") } else { write!(text, "{byte} ") };
    }
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_at_rip_is_marked_and_missing_memory_is_no_panic() {
        let memory = crate::memory::create(1).unwrap();
        memory.write_slice(&[0x0f, 0x0b], GuestAddress(0x1000)).unwrap();
        let sregs = kvm_sregs::default();
        let regs = kvm_regs { rip: 0x1000, ..kvm_regs::default() };
        let text = instruction_bytes(&regs, &sregs, &memory, |_| None);
        assert!(text.contains("00 [0f] 0b 00"), "{text}");
        let regs = kvm_regs { rip: u64::MAX - 3, ..kvm_regs::default() };
        assert!(instruction_bytes(&regs, &sregs, &memory, |_| None).contains("[??]"));
    }
}
