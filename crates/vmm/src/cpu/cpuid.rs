//! CPUID: what KVM supports, with the guest's own topology: one socket, one thread per core, APIC id = vCPU number.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const EXT1_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXT1_ECX_SVM: u32 = 1 << 2;
/// Leaf 0xb level types (Intel SDM, CPUID).
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// What the tables of one machine depend on.
#[derive(Clone, Copy, Debug)]
pub struct Topology {
    /// vCPUs of the machine, 1–32.
    pub vcpus: u8,
    /// KVM has the TSC deadline timer (it is not always in KVM's own list).
    pub tsc_deadline: bool,
}

impl Topology {
    /// Bits of the APIC id that number the cores of a socket.
    fn core_bits(self) -> u32 {
        u32::from(self.vcpus).next_power_of_two().trailing_zeros()
    }
}

/// The table for vCPU number `id`.
///
/// # Errors
/// The table would be longer than KVM takes.
pub fn for_vcpu(supported: &CpuId, topology: Topology, id: u8) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let mut entries: Vec<kvm_cpuid_entry2> =
        supported.as_slice().iter().copied().filter(|entry| !matches!(entry.function, 0xb | 0x1f)).collect();
    for entry in &mut entries {
        adapt(entry, topology, u32::from(id));
    }
    let max_leaf = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    if max_leaf >= 0xb {
        entries.extend(leaf_b(topology, u32::from(id)));
    }
    CpuId::from_entries(&entries)
}

fn adapt(entry: &mut kvm_cpuid_entry2, topology: Topology, id: u32) {
    let vcpus = u32::from(topology.vcpus);
    match entry.function {
        1 => {
            // EBX: initial APIC id, number of addressable ids, CLFLUSH line (kept).
            entry.ebx = entry.ebx & 0xffff | id << 24 | vcpus.next_power_of_two() << 16;
            entry.ecx |= LEAF1_ECX_HYPERVISOR | LEAF1_ECX_X2APIC;
            entry.ecx &= !LEAF1_ECX_VMX;
            if topology.tsc_deadline {
                entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
            }
            set(&mut entry.edx, LEAF1_EDX_HTT, vcpus > 1);
        }
        // Intel caches: bits 25–14 say how many ids share one, bits 31–26 how many cores the socket has.
        4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { vcpus.next_power_of_two() } else { 1 };
            entry.eax = entry.eax & 0x3fff | (sharing - 1) << 14 | (vcpus.next_power_of_two() - 1) << 26;
        }
        0x8000_0001 => {
            entry.ecx &= !EXT1_ECX_SVM;
            set(&mut entry.ecx, EXT1_ECX_CMP_LEGACY, vcpus > 1);
        }
        // AMD: cores − 1 in bits 7–0, bits of the APIC id in bits 15–12.
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | (vcpus - 1) | topology.core_bits() << 12,
        // AMD SVM's own leaf goes with its feature bit.
        0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // AMD caches: bits 25–14 as in leaf 4.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 >= 3 { vcpus } else { 1 };
            entry.eax = entry.eax & !(0xfff << 14) | (sharing - 1) << 14;
        }
        // AMD topology: extended APIC id, core id with one thread per core, one node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

fn leaf_b(topology: Topology, id: u32) -> [kvm_cpuid_entry2; 2] {
    let level = |index: u32, kind: u32, shift: u32, count: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | kind << 8,
        edx: id,
        ..kvm_cpuid_entry2::default()
    };
    [level(0, LEVEL_THREAD, 0, 1), level(1, LEVEL_CORE, topology.core_bits(), u32::from(topology.vcpus))]
}

/// What one vCPU can do: what a snapshot holds of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedCpuid(Vec<kvm_cpuid_entry2>);

/// Registers of leaves whose bits are each a feature: leaf, subleaf, register, bits that only mirror the state of a CPU.
const FEATURES: [(u32, u32, Register, u32); 14] = [
    // OSXSAVE.
    (1, 0, Register::Ecx, 1 << 27),
    (1, 0, Register::Edx, 0),
    (7, 0, Register::Ebx, 0),
    // OSPKE.
    (7, 0, Register::Ecx, 1 << 4),
    (7, 0, Register::Edx, 0),
    (7, 1, Register::Eax, 0),
    (0xd, 0, Register::Eax, 0),
    (0xd, 1, Register::Eax, 0),
    (0x4000_0001, 0, Register::Eax, 0),
    (0x8000_0001, 0, Register::Ecx, 0),
    (0x8000_0001, 0, Register::Edx, 0),
    (0x8000_0007, 0, Register::Edx, 0),
    (0x8000_0008, 0, Register::Ebx, 0),
    (0x8000_0021, 0, Register::Eax, 0),
];

#[derive(Clone, Copy, Debug)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn of(self, entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> u32 {
        let entry = entries.iter().find(|entry| (entry.function, entry.index) == (leaf, subleaf));
        entry.map_or(0, |entry| match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        })
    }
}

impl SavedCpuid {
    /// A vCPU's table.
    #[must_use]
    pub fn new(table: &CpuId) -> Self {
        Self(table.as_slice().to_vec())
    }

    /// The table, for a host that supports all that is in it.
    ///
    /// # Errors
    /// Which features this host lacks.
    pub fn on(&self, supported: &CpuId, topology: Topology) -> Result<CpuId, String> {
        // What the monitor adds by itself is not always in KVM's list.
        let added = |leaf: u32, register: Register| match (leaf, register) {
            (1, Register::Ecx) => {
                let deadline = if topology.tsc_deadline { LEAF1_ECX_TSC_DEADLINE } else { 0 };
                LEAF1_ECX_HYPERVISOR | LEAF1_ECX_X2APIC | deadline
            }
            (1, Register::Edx) => LEAF1_EDX_HTT,
            (0x8000_0001, Register::Ecx) => EXT1_ECX_CMP_LEGACY,
            _ => 0,
        };
        let missing: Vec<String> = FEATURES
            .iter()
            .filter_map(|(leaf, subleaf, register, ignored)| {
                let [had, have] =
                    [&self.0, supported.as_slice()].map(|entries| register.of(entries, *leaf, *subleaf));
                let bits = had & !(have | added(*leaf, *register) | ignored);
                (bits != 0).then(|| format!("leaf {leaf:#x}.{subleaf} {register:?} bits {bits:#010x}"))
            })
            .collect();
        if !missing.is_empty() {
            return Err(format!(
                "this host's CPU or KVM lacks what the guest uses: CPUID {}",
                missing.join(", ")
            ));
        }
        CpuId::from_entries(&self.0).map_err(|error| format!("its CPUID table: {error:?}"))
    }
}

const fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let entry = |function, index, eax| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx: 0xdead_0800,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..kvm_cpuid_entry2::default()
        };
        CpuId::from_entries(&[
            entry(0, 0, 0x1f),
            entry(1, 0, 0),
            entry(4, 0, 0x121),
            entry(4, 3, 0x163),
            entry(0xb, 0, 1),
            entry(0x1f, 0, 1),
            entry(0x8000_0001, 0, 0),
            entry(0x8000_0008, 0, 0),
            entry(0x8000_001e, 0, 0),
        ])
        .unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn every_vcpu_of_every_size_has_a_consistent_topology() {
        for vcpus in 1..=32 {
            let topology = Topology { vcpus, tsc_deadline: true };
            for id in 0..vcpus {
                let cpuid = for_vcpu(&supported(), topology, id).unwrap();
                let one = leaf(&cpuid, 1, 0);
                assert_eq!(one.ebx >> 24, u32::from(id));
                assert_eq!(one.ebx & 0xffff, 0x0800);
                assert_eq!(one.edx & LEAF1_EDX_HTT != 0, vcpus > 1);
                assert_eq!(one.ecx & LEAF1_ECX_VMX, 0);
                assert_ne!(one.ecx & LEAF1_ECX_TSC_DEADLINE, 0);
                let (threads, cores) = (leaf(&cpuid, 0xb, 0), leaf(&cpuid, 0xb, 1));
                assert_eq!((threads.edx, cores.edx), (u32::from(id), u32::from(id)));
                assert_eq!(cores.ebx, u32::from(vcpus));
                assert!(1 << cores.eax >= u32::from(vcpus), "the APIC id has room for {vcpus} cores");
                assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx & 0xff, u32::from(vcpus) - 1);
                assert_eq!(leaf(&cpuid, 0x8000_001e, 0).eax, u32::from(id));
                assert_eq!(leaf(&cpuid, 0x8000_0001, 0).ecx & EXT1_ECX_SVM, 0);
                assert_eq!(leaf(&cpuid, 4, 0).eax >> 14 & 0xfff, 0);
                assert_eq!(leaf(&cpuid, 4, 3).eax >> 26, u32::from(vcpus).next_power_of_two() - 1);
                assert!(cpuid.as_slice().iter().all(|e| e.function != 0x1f));
            }
        }
    }
}
