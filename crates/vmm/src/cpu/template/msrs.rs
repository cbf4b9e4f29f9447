//! MSRs of a template, in a vCPU.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::{Bitmap, MsrModifier};
use crate::cpu::state::{read, write_msrs};
use crate::error::{Error, Result};

/// `IA32_ARCH_CAPABILITIES`: what the CPU is not affected by, and what it has against the rest.
pub const ARCH_CAPABILITIES: u32 = 0x10a;
/// TSC, TSC_ADJUST and the TSC deadline: what is written there moves on, or moves something.
pub(super) const CLOCKS: [u32; 3] = [0x10, 0x3b, 0x6e0];

/// Bits of IA32_ARCH_CAPABILITIES by name (Intel, "CPUID enumeration and architectural MSRs").
const NAMES: [(u32, &str); 25] = [
    (0, "RDCL_NO"),
    (1, "IBRS_ALL"),
    (3, "SKIP_L1DFL_VMENTRY"),
    (4, "SSB_NO"),
    (5, "MDS_NO"),
    (6, "IF_PSCHANGE_MC_NO"),
    (7, "TSX_CTRL"),
    (8, "TAA_NO"),
    (10, "MISC_PACKAGE_CTRLS"),
    (11, "ENERGY_FILTERING_CTL"),
    (12, "DOITM"),
    (13, "SBDR_SSDP_NO"),
    (14, "FBSDP_NO"),
    (15, "PSDP_NO"),
    (17, "FB_CLEAR"),
    (18, "FB_CLEAR_CTRL"),
    (20, "BHI_NO"),
    (21, "XAPIC_DISABLE_STATUS"),
    (23, "OVERCLOCKING_STATUS"),
    (24, "PBRSB_NO"),
    (25, "GDS_CTRL"),
    (26, "GDS_NO"),
    (27, "RFDS_NO"),
    (28, "RFDS_CLEAR"),
    (62, "ITS_NO"),
];
/// RSBA and RRSBA say that the CPU is worse, not better: a template may set them on any host.
pub const WORSE: u64 = 1 << 2 | 1 << 19;
/// What says that the CPU is not affected: `*_NO` and SKIP_L1DFL_VMENTRY.
const UNAFFECTED: u64 =
    1 | 1 << 3 | 0b111 << 4 & !(1 << 7) | 1 << 8 | 0b111 << 13 | 1 << 20 | 1 << 24 | 0b11 << 26 | 1 << 62;

/// The change that tells a guest to protect itself from everything: it may meet a host that is affected.
#[must_use]
pub(super) const fn affected_by_all() -> MsrModifier {
    MsrModifier { addr: ARCH_CAPABILITIES, bitmap: Bitmap::clearing(UNAFFECTED) }
}

/// What a guest was told of its CPU's virtues and `host` does not have, as a list of names.
#[must_use]
pub fn lacking(told: u64, host: u64) -> Vec<String> {
    let bits = told & !host & !WORSE;
    let name = |bit: u32| NAMES.iter().find(|(at, _)| *at == bit).map(|(_, name)| *name);
    let missing = (0..64).filter(|bit| bits >> bit & 1 == 1);
    missing
        .map(|bit| match name(bit) {
            Some(name) => format!("{name} (MSR {ARCH_CAPABILITIES:#x} bit {bit})"),
            None => format!("MSR {ARCH_CAPABILITIES:#x} bit {bit}"),
        })
        .collect()
}

/// IA32_ARCH_CAPABILITIES as this host has it; `None` where KVM does not tell.
#[must_use]
pub fn host_arch_capabilities(kvm: &kvm_ioctls::Kvm) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[entry(ARCH_CAPABILITIES, 0)]).ok()?;
    (kvm.get_msrs(&mut msrs) == Ok(1)).then(|| msrs.as_slice()[0].data)
}

/// What reads and writes MSRs.
pub trait Bank {
    /// The value of one, if there is such a one.
    fn read(&self, addr: u32) -> Option<u64>;
    /// Sets one.
    fn write(&self, addr: u32, value: u64);
}

impl Bank for VcpuFd {
    fn read(&self, addr: u32) -> Option<u64> {
        read(self, &[addr]).first().map(|entry| entry.data)
    }

    fn write(&self, addr: u32, value: u64) {
        write_msrs(self, &[entry(addr, value)]);
    }
}

const fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, reserved: 0 }
}

/// Changes a vCPU's MSRs from what they are. `host` is IA32_ARCH_CAPABILITIES of this host.
///
/// # Errors
/// [`Error::Config`] for an MSR that KVM does not know, one that it leaves as it was, and a virtue that this host does not have.
pub fn apply(vcpu: &impl Bank, modifiers: &[MsrModifier], host: Option<u64>) -> Result<()> {
    for MsrModifier { addr, bitmap } in modifiers {
        let refuse =
            |why: String| Err(Error::Config(format!("cpu-config: msr_modifiers: addr {addr:#x}: {why}")));
        let Some(before) = vcpu.read(*addr) else {
            return refuse("this host's KVM has no such MSR".into());
        };
        let wanted = bitmap.apply(before);
        if let Some(host) = host.filter(|_| *addr == ARCH_CAPABILITIES) {
            let lacking = lacking(bitmap.sets(), host);
            if !lacking.is_empty() {
                return refuse(format!("this host lacks what the template sets: {}", lacking.join(", ")));
            }
        }
        vcpu.write(*addr, wanted);
        let after = vcpu.read(*addr);
        if after != Some(wanted) {
            return refuse(format!(
                "KVM keeps it at {:#x} and does not take {wanted:#x}",
                after.unwrap_or(before)
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    /// MSRs of which one is fixed.
    struct Fake(RefCell<BTreeMap<u32, u64>>);

    const FIXED: u32 = 0xce;

    impl Bank for Fake {
        fn read(&self, addr: u32) -> Option<u64> {
            self.0.borrow().get(&addr).copied()
        }

        fn write(&self, addr: u32, value: u64) {
            if addr != FIXED {
                self.0.borrow_mut().insert(addr, value);
            }
        }
    }

    fn bank() -> Fake {
        Fake(RefCell::new([(ARCH_CAPABILITIES, 0xff), (0x1a0, 1), (FIXED, 1 << 31)].into()))
    }

    fn modifier(addr: u32, bitmap: &str) -> MsrModifier {
        MsrModifier { addr, bitmap: bitmap.parse().unwrap() }
    }

    #[test]
    fn bits_change_from_what_the_host_has() {
        let bank = bank();
        apply(&bank, &[modifier(0x1a0, "0b1x"), modifier(ARCH_CAPABILITIES, "0bx0xx1xxx")], Some(0xff))
            .unwrap();
        assert_eq!((bank.read(0x1a0), bank.read(ARCH_CAPABILITIES)), (Some(3), Some(0xbf)));
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_address() {
        for (change, words) in [
            (modifier(0x777, "0b0"), "addr 0x777: this host's KVM has no such MSR"),
            (modifier(FIXED, "0b1"), "addr 0xce: KVM keeps it at 0x80000000"),
            (modifier(ARCH_CAPABILITIES, "0b100000000"), "TAA_NO (MSR 0x10a bit 8)"),
        ] {
            let why = apply(&bank(), &[change], Some(0xff)).unwrap_err().to_string();
            assert!(why.contains(words), "{why}");
        }
        // That the CPU is worse may be said anywhere.
        apply(&bank(), &[modifier(ARCH_CAPABILITIES, "0b1xx")], Some(0)).unwrap();
    }

    #[test]
    fn a_level_leaves_what_protects_and_takes_what_excuses() {
        let all = affected_by_all().bitmap.apply(u64::MAX);
        for (bit, name) in NAMES {
            let excuses = name.ends_with("_NO") || name == "SKIP_L1DFL_VMENTRY";
            assert_eq!(all >> bit & 1 == 0, excuses, "{name}");
        }
        assert_eq!(all & WORSE, WORSE);
        assert_eq!(lacking(0b11, 0b10), ["RDCL_NO (MSR 0x10a bit 0)"]);
        assert!(lacking(WORSE, 0).is_empty());
    }
}
