//! CPUID: what KVM supports, with the guest's own topology: one socket, one thread per core, APIC id = vCPU number.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

use super::features::{self, Register};
use super::template;

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const EXT1_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXT1_ECX_SVM: u32 = 1 << 2;
const EXT7_EDX_INVARIANT_TSC: u32 = 1 << 8;
/// KVM's own leaf of features (Linux, Documentation/virt/kvm/x86/cpuid.rst).
const KVM_FEATURES: u32 = 0x4000_0001;
const KVM_CLOCKSOURCE: u32 = 1;
const KVM_CLOCKSOURCE2: u32 = 1 << 3;
/// Leaf 0xb level types (Intel SDM, CPUID).
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// What the tables of one machine depend on.
#[derive(Clone, Copy, Debug)]
pub struct Topology {
    /// vCPUs of the machine, 1–32.
    pub vcpus: u8,
}

/// What leaf 1 says of every vCPU alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// EAX: stepping, model and family.
    pub signature: u32,
    /// EDX: the oldest features.
    pub features: u32,
}

impl Identity {
    /// Reads it from a vCPU's table.
    #[must_use]
    pub fn of(table: &CpuId) -> Self {
        let leaf = table.as_slice().iter().find(|entry| entry.function == 1);
        leaf.map_or_else(Self::default, |leaf| Self { signature: leaf.eax, features: leaf.edx })
    }
}

/// Whether a Linux guest with this table keeps time by KVM's clock: it has that, and no TSC that is said to be invariant, which it would
/// prefer.
#[must_use]
pub fn keeps_time_by_kvmclock(table: &[kvm_cpuid_entry2]) -> bool {
    let leaf = |function| table.iter().find(|entry| entry.function == function);
    let clock = leaf(KVM_FEATURES).is_some_and(|leaf| leaf.eax & (KVM_CLOCKSOURCE | KVM_CLOCKSOURCE2) != 0);
    let invariant = leaf(0x8000_0007).is_some_and(|leaf| leaf.edx & EXT7_EDX_INVARIANT_TSC != 0);
    clock && !invariant
}

impl Topology {
    /// Bits of the APIC id that number the cores of a socket.
    fn core_bits(self) -> u32 {
        u32::from(self.vcpus).next_power_of_two().trailing_zeros()
    }
}

/// What a guest could have of what KVM supports: with the features that KVM makes and does not always list, without virtualization
/// of its own and without a topology, which is the machine's.
#[must_use]
pub fn offer(supported: &CpuId, tsc_deadline: bool) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<kvm_cpuid_entry2> =
        supported.as_slice().iter().copied().filter(|entry| !matches!(entry.function, 0xb | 0x1f)).collect();
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ecx |= LEAF1_ECX_HYPERVISOR | LEAF1_ECX_X2APIC;
                entry.ecx &= !LEAF1_ECX_VMX;
                if tsc_deadline {
                    entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
                }
            }
            0x8000_0001 => entry.ecx &= !EXT1_ECX_SVM,
            // AMD SVM's own leaf goes with its feature bit.
            0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
    entries
}

/// The table for vCPU number `id`: what its guest has, in the machine's topology.
///
/// # Errors
/// The table would be longer than KVM takes.
pub fn for_vcpu(
    has: &[kvm_cpuid_entry2],
    topology: Topology,
    id: u8,
) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let mut entries = has.to_vec();
    for entry in &mut entries {
        place(entry, topology, u32::from(id));
    }
    let max_leaf = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    if max_leaf >= 0xb {
        entries.extend(leaf_b(topology, u32::from(id)));
    }
    CpuId::from_entries(&entries)
}

fn place(entry: &mut kvm_cpuid_entry2, topology: Topology, id: u32) {
    let vcpus = u32::from(topology.vcpus);
    match entry.function {
        1 => {
            // EBX: initial APIC id, number of addressable ids, CLFLUSH line (kept).
            entry.ebx = entry.ebx & 0xffff | id << 24 | vcpus.next_power_of_two() << 16;
            set(&mut entry.edx, LEAF1_EDX_HTT, vcpus > 1);
        }
        // Intel caches: bits 25–14 say how many ids share one, bits 31–26 how many cores the socket has.
        4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { vcpus.next_power_of_two() } else { 1 };
            entry.eax = entry.eax & 0x3fff | (sharing - 1) << 14 | (vcpus.next_power_of_two() - 1) << 26;
        }
        0x8000_0001 => set(&mut entry.ecx, EXT1_ECX_CMP_LEGACY, vcpus > 1),
        // AMD: cores − 1 in bits 7–0, bits of the APIC id in bits 15–12.
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | (vcpus - 1) | topology.core_bits() << 12,
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

impl SavedCpuid {
    /// A vCPU's table.
    #[must_use]
    pub fn new(table: &CpuId) -> Self {
        Self(table.as_slice().to_vec())
    }

    /// The table, for a host that offers all that is in it.
    ///
    /// # Errors
    /// What this host lacks, by name.
    pub fn on(&self, offered: &[kvm_cpuid_entry2]) -> Result<CpuId, String> {
        let (born, here) = (vendor(&self.0), vendor(offered));
        if born != here {
            return Err(format!(
                "the guest was started on a CPU of {born}, this host's is of {here}: a kernel chooses at its start what it must do \
                 for its vendor's CPUs, so snapshots move between CPUs of one vendor"
            ));
        }
        let mut missing = features::lacking(&self.0, offered);
        missing.extend(template::wider(&self.0, offered));
        if !missing.is_empty() {
            return Err(format!("this host's CPU or KVM lacks what the guest uses: {}", missing.join(", ")));
        }
        CpuId::from_entries(&self.0).map_err(|error| format!("its CPUID table: {error:?}"))
    }
}

/// Who made a CPU, as it says itself.
#[must_use]
pub fn vendor(table: &[kvm_cpuid_entry2]) -> String {
    let words = [Register::Ebx, Register::Edx, Register::Ecx].map(|register| register.of(table, 0, 0));
    String::from_utf8_lossy(&words.map(u32::to_le_bytes).concat()).into_owned()
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
    use crate::cpu::template::tests::{cascade_lake, zen4};
    use crate::cpu::template::{CpuTemplate, Level, Template};

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

    #[test]
    fn time_is_kept_by_kvmclock_where_the_tsc_is_not_said_to_be_invariant() {
        let table = |features, power| {
            let features = kvm_cpuid_entry2 { function: KVM_FEATURES, eax: features, ..Default::default() };
            let power = kvm_cpuid_entry2 { function: 0x8000_0007, edx: power, ..Default::default() };
            [features, power]
        };
        for (features, power, keeps) in
            [(0, 0, false), (1, 0, true), (8, 0, true), (!9, 0, false), (9, !0x100, true), (9, 0x100, false)]
        {
            assert_eq!(keeps_time_by_kvmclock(&table(features, power)), keeps, "{features:#x} {power:#x}");
        }
        assert!(!keeps_time_by_kvmclock(&[]) && keeps_time_by_kvmclock(&table(1, 0)[..1]));
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn every_vcpu_of_every_size_has_a_consistent_topology() {
        for vcpus in 1..=32 {
            let topology = Topology { vcpus };
            for id in 0..vcpus {
                let cpuid = for_vcpu(&offer(&supported(), true), topology, id).unwrap();
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

    /// A host as another one sees it.
    fn moved(has: &[kvm_cpuid_entry2], to: &[kvm_cpuid_entry2]) -> Result<CpuId, String> {
        let table = for_vcpu(has, Topology { vcpus: 2 }, 1).unwrap();
        let moved = SavedCpuid::new(&table).on(to)?;
        assert_eq!(moved.as_slice(), table.as_slice(), "the guest's table changed on its way");
        Ok(moved)
    }

    #[test]
    fn a_guest_moves_to_a_host_that_has_all_it_was_told_of() {
        let rich = cascade_lake();
        let mut poor = rich.clone();
        features::find_mut(&mut poor, 7, 0).unwrap().ebx &= !(1 << 16);
        features::find_mut(&mut poor, 0xd, 0).unwrap().eax = 0x207;
        moved(&poor, &rich).unwrap();
        let why = moved(&rich, &poor).unwrap_err();
        assert!(why.contains("avx512f (CPUID leaf 0x7.0 ebx bit 16), xcr0_opmask (CPUID"), "{why}");
        // A template that leaves out what the other lacks, and a level below it.
        let text = r#"{"cpuid_modifiers": [{"leaf": "0x7", "subleaf": "0x0", "flags": 1,
            "modifiers": [{"register": "ebx", "bitmap": "0b0xxxxxxxxxxxxxxxx"}]}]}"#;
        let own = CpuTemplate::from_json(text).unwrap();
        for template in [Template::Own(&own), Template::Level(Level::V3), Template::Level(Level::V2)] {
            moved(&template.apply(&rich).unwrap(), &poor).unwrap();
        }
        let why = moved(&Template::Level(Level::V4).apply(&rich).unwrap(), &poor).unwrap_err();
        assert!(why.contains("avx512f"), "{why}");
    }

    #[test]
    fn addresses_that_are_too_long_and_another_vendor_are_refused() {
        let rich = cascade_lake();
        let mut small = rich.clone();
        features::find_mut(&mut small, 0x8000_0008, 0).unwrap().eax = 48 << 8 | 39;
        let why = moved(&rich, &small).unwrap_err();
        assert!(why.contains("physical addresses of 46 bits") && why.contains("has 39"), "{why}");
        let level = Template::Level(Level::V3).apply(&rich).unwrap();
        moved(&level, &small).unwrap();
        let why = moved(&level, &zen4()).unwrap_err();
        assert!(why.contains("of GenuineIntel, this host's is of AuthenticAMD"), "{why}");
    }
}
