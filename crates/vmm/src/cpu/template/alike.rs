//! The template that makes hosts alike: each host's CPU as a template whose bits are all decided ([`dump`]), and what all of them
//! have ([`common`]).

use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::Kvm;

use super::msrs::{ARCH_CAPABILITIES, Bank, WORSE};
use super::{Bitmap, CpuTemplate, CpuidModifier, MsrModifier, RegisterModifier};
use crate::config::VmConfig;
use crate::cpu::cpuid;
use crate::cpu::features::{FEATURES, Register, find};
use crate::cpu::model::CpuModel;
use crate::error::{Error, Result};

/// IA32_PERF_CAPABILITIES, whose fields are numbers.
const PERF_CAPABILITIES: u32 = 0x345;
/// MSRs that say what a CPU is: MSR_PLATFORM_INFO, IA32_ARCH_CAPABILITIES, IA32_MISC_ENABLE, IA32_PERF_CAPABILITIES.
const DESCRIBING: [u32; 4] = [0xce, ARCH_CAPABILITIES, 0x1a0, PERF_CAPABILITIES];
/// Registers that hold the number of the last leaf, or of the last subleaf.
const LAST: [(u32, u32); 3] = [(0, 0), (7, 0), (0x8000_0000, 0)];
/// Address sizes, a byte each.
const ADDRESSES: u32 = 0x8000_0008;
/// Performance counters, whose fields are numbers.
const COUNTERS: u32 = 0xa;

/// This host's CPU as a guest of one vCPU without a template would have it.
///
/// # Errors
/// [`Error::Kvm`].
pub fn dump(kvm: &Kvm) -> Result<CpuTemplate> {
    let model = CpuModel::new(kvm, &VmConfig::default())?;
    let vm = kvm.create_vm().map_err(Error::kvm("KVM_CREATE_VM"))?;
    let vcpu = vm.create_vcpu(0).map_err(Error::kvm("KVM_CREATE_VCPU"))?;
    crate::vcpu::prepare(&vcpu, &model, 0)?;
    let msrs = DESCRIBING.iter().filter_map(|addr| Some((*addr, vcpu.read(*addr)?)));
    Ok(exact(model.table(0)?.as_slice(), msrs))
}

/// A table and MSRs as a template. Which CPUs there are is left out: that is each machine's own.
fn exact(table: &[kvm_cpuid_entry2], msrs: impl Iterator<Item = (u32, u64)>) -> CpuTemplate {
    let all = |entry: &kvm_cpuid_entry2| {
        Register::ALL.map(|register| (register, register.get(entry))).into_iter().collect::<Vec<_>>()
    };
    let entries = table.iter().filter(|entry| !super::TOPOLOGY.contains(&entry.function));
    CpuTemplate {
        cpuid_modifiers: entries.map(|entry| modifier(entry, all(entry))).collect(),
        msr_modifiers: msrs.map(|(addr, value)| MsrModifier { addr, bitmap: Bitmap::exact(value) }).collect(),
        ..CpuTemplate::default()
    }
}

fn modifier(entry: &kvm_cpuid_entry2, registers: Vec<(Register, u32)>) -> CpuidModifier {
    let modifier = |(register, value): (Register, u32)| RegisterModifier {
        register,
        bitmap: Bitmap::exact(value.into()),
    };
    CpuidModifier {
        leaf: entry.function,
        subleaf: entry.index,
        flags: entry.flags,
        modifiers: registers.into_iter().map(modifier).collect(),
    }
}

/// A host as its dump says.
struct Host {
    table: Vec<kvm_cpuid_entry2>,
    msrs: Vec<kvm_msr_entry>,
}

impl Host {
    fn new(template: &CpuTemplate) -> std::result::Result<Self, String> {
        let open = |place: String| {
            format!("{place} leaves bits open: this is a template, not what `cpu-template dump` prints")
        };
        let mut table = Vec::new();
        for CpuidModifier { leaf, subleaf, flags, modifiers } in &template.cpuid_modifiers {
            let mut entry = kvm_cpuid_entry2 {
                function: *leaf,
                index: *subleaf,
                flags: *flags,
                ..kvm_cpuid_entry2::default()
            };
            for RegisterModifier { register, bitmap } in modifiers {
                let value = bitmap.value().and_then(|value| u32::try_from(value).ok());
                *register.get_mut(&mut entry) = value.ok_or_else(|| {
                    open(format!("leaf {leaf:#x}, subleaf {subleaf:#x}, {}", register.name()))
                })?;
            }
            table.push(entry);
        }
        let mut msrs = Vec::new();
        for MsrModifier { addr, bitmap } in &template.msr_modifiers {
            let data = bitmap.value().ok_or_else(|| open(format!("addr {addr:#x}")))?;
            msrs.push(kvm_msr_entry { index: *addr, data, ..kvm_msr_entry::default() });
        }
        Ok(Self { table, msrs })
    }

    fn msr(&self, addr: u32) -> Option<u64> {
        self.msrs.iter().find(|entry| entry.index == addr).map(|entry| entry.data)
    }
}

/// What all of these hosts have, as a template that each of them takes. Each is what [`dump`] gave there.
///
/// # Errors
/// Fewer than two, or of two vendors, or one that is no dump.
pub fn common(dumps: &[CpuTemplate]) -> std::result::Result<CpuTemplate, String> {
    let hosts = dumps.iter().map(Host::new).collect::<std::result::Result<Vec<Host>, String>>()?;
    let [first, others @ ..] = hosts.as_slice() else { return Err("common needs two dumps or more".into()) };
    if others.is_empty() {
        return Err("common needs two dumps or more".into());
    }
    for other in others {
        let (one, other) = (cpuid::vendor(&first.table), cpuid::vendor(&other.table));
        if one != other {
            return Err(format!(
                "a CPU of {one} and one of {other}: snapshots move between CPUs of one vendor"
            ));
        }
    }
    // A leaf that one of them does not have cannot be named there: the number of the last leaf leaves it out.
    let everywhere = |entry: &&kvm_cpuid_entry2| {
        others.iter().all(|host| find(&host.table, entry.function, entry.index).is_some())
    };
    let cpuid_modifiers = first.table.iter().filter(everywhere).filter_map(|entry| {
        let registers: Vec<(Register, u32)> = Register::ALL
            .into_iter()
            .filter_map(|register| Some((register, shared(&hosts, entry, register)?)))
            .collect();
        (!registers.is_empty()).then(|| modifier(entry, registers))
    });
    let msr_modifiers = first.msrs.iter().filter_map(|entry| {
        let values = hosts.iter().map(|host| host.msr(entry.index)).collect::<Option<Vec<u64>>>()?;
        let (all, any) = (
            values.iter().fold(u64::MAX, |all, value| all & value),
            values.iter().fold(0, |any, value| any | value),
        );
        let value = match entry.index {
            ARCH_CAPABILITIES => all & !WORSE | any & WORSE,
            PERF_CAPABILITIES if all != any => 0,
            _ => all,
        };
        Some(MsrModifier { addr: entry.index, bitmap: Bitmap::exact(value) })
    });
    Ok(CpuTemplate {
        cpuid_modifiers: cpuid_modifiers.collect(),
        msr_modifiers: msr_modifiers.collect(),
        ..CpuTemplate::default()
    })
}

/// What a register has to be on all hosts; `None` for one that describes and may differ.
fn shared(hosts: &[Host], entry: &kvm_cpuid_entry2, register: Register) -> Option<u32> {
    let (leaf, subleaf) = (entry.function, entry.index);
    let values = || hosts.iter().map(|host| register.of(&host.table, leaf, subleaf));
    let place = |features: &&super::features::Features| {
        (features.leaf, features.subleaf, features.register) == (leaf, subleaf, register)
    };
    if let Some(features) = FEATURES.iter().find(place) {
        return Some(values().fold(u32::MAX, |all, value| all & value) & !features.ignored);
    }
    if register == Register::Eax && LAST.contains(&(leaf, subleaf)) {
        return values().min();
    }
    if (leaf, register) == (ADDRESSES, Register::Eax) {
        let byte = |shift: u32| values().map(|value| value >> shift & 0xff).min().unwrap_or(0) << shift;
        return Some(byte(0) | byte(8) | byte(16));
    }
    let differ = || {
        Register::ALL.iter().any(|register| {
            let mut values = hosts.iter().map(|host| register.of(&host.table, leaf, subleaf));
            let first = values.next();
            values.any(|value| Some(value) != first)
        })
    };
    (leaf == COUNTERS && differ()).then_some(0)
}

/// Takes the leaves out that are beyond the last one that the table says it has.
pub(super) fn trim(table: &mut Vec<kvm_cpuid_entry2>) {
    let last = |leaf| find(table, leaf, 0).map(|entry| entry.eax);
    let (basic, seventh, extended) = (last(0), last(7), last(0x8000_0000));
    table.retain(|entry| {
        let beyond = |number: u32, last: Option<u32>| last.is_some_and(|last| number > last);
        let basic = entry.function < 0x4000_0000 && beyond(entry.function, basic);
        let extended = entry.function >> 16 == 0x8000
            && entry.function != 0x8000_0000
            && beyond(entry.function, extended);
        let seventh = entry.function == 7 && entry.index > 0 && beyond(entry.index, seventh);
        !(basic || extended || seventh)
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::cpuid::{SavedCpuid, Topology, for_vcpu};
    use crate::cpu::features::{find_mut, lacking};
    use crate::cpu::template::Template;
    use crate::cpu::template::tests::{cascade_lake, zen4};
    use proptest::prelude::*;

    fn dumped(table: &[kvm_cpuid_entry2], msrs: &[(u32, u64)]) -> CpuTemplate {
        exact(table, msrs.iter().copied())
    }

    #[test]
    fn a_dump_survives_its_file_and_changes_nothing_at_home() {
        for table in [cascade_lake(), zen4()] {
            let dump = dumped(&table, &[(ARCH_CAPABILITIES, 0xeb)]);
            let text = serde_json::to_string_pretty(&dump).unwrap();
            assert_eq!(CpuTemplate::from_json(&text).unwrap(), dump);
            let left = Template::Own(&dump).apply(&table).unwrap();
            assert_eq!((lacking(&left, &table).len(), lacking(&table, &left).len()), (0, 0));
        }
    }

    #[test]
    fn msrs_that_say_what_holds_are_those_of_all() {
        let (one, other) = (cascade_lake(), cascade_lake());
        let rsba = 1 << 2;
        let dumps = [
            dumped(&one, &[(ARCH_CAPABILITIES, 0b1000_1011), (PERF_CAPABILITIES, 0x2000), (0xce, 1 << 31)]),
            dumped(&other, &[(ARCH_CAPABILITIES, 0b1010_1001 | rsba), (PERF_CAPABILITIES, 0x3000)]),
        ];
        let template = common(&dumps).unwrap();
        let msrs: Vec<_> = template.msr_modifiers.iter().map(|msr| (msr.addr, msr.bitmap.value())).collect();
        assert_eq!(msrs, [(ARCH_CAPABILITIES, Some(0b1000_1001 | rsba)), (PERF_CAPABILITIES, Some(0))]);
    }

    #[test]
    fn what_has_nothing_in_common_is_refused() {
        let (intel, amd) = (dumped(&cascade_lake(), &[]), dumped(&zen4(), &[]));
        let why = common(&[intel.clone(), amd]).unwrap_err();
        assert!(why.contains("GenuineIntel") && why.contains("AuthenticAMD"), "{why}");
        assert!(common(std::slice::from_ref(&intel)).unwrap_err().contains("two dumps"));
        let mut open = intel.clone();
        open.cpuid_modifiers[0].modifiers[0].bitmap = Bitmap::clearing(1);
        assert!(common(&[intel, open]).unwrap_err().contains("leaf 0x0, subleaf 0x0, eax leaves bits open"));
    }

    /// A leaf that one host does not have, numbers that are smaller there, counters that are others.
    #[test]
    fn numbers_are_the_least_and_leaves_those_of_all() {
        let rich = zen4();
        let mut poor = rich.clone();
        poor.retain(|entry| entry.function != 0x8000_0021 && (entry.function, entry.index) != (7, 2));
        find_mut(&mut poor, 0x8000_0000, 0).unwrap().eax = 0x8000_001f;
        find_mut(&mut poor, 7, 0).unwrap().eax = 1;
        find_mut(&mut poor, 0x8000_0008, 0).unwrap().eax = 48 << 8 | 43;
        find_mut(&mut poor, 0xa, 0).unwrap().eax = 2;
        let template = common(&[dumped(&rich, &[]), dumped(&poor, &[])]).unwrap();
        for host in [&rich, &poor] {
            let left = Template::Own(&template).apply(host).unwrap();
            assert_eq!(Register::Eax.of(&left, 0x8000_0000, 0), 0x8000_001f);
            assert_eq!(Register::Eax.of(&left, 0x8000_0008, 0), 48 << 8 | 43);
            assert_eq!(Register::Eax.of(&left, 0xa, 0), 0);
            assert!(find(&left, 0x8000_0021, 0).is_none() && find(&left, 7, 2).is_none());
        }
    }

    fn without(table: &[kvm_cpuid_entry2], gone: &[[u32; 4]]) -> Vec<kvm_cpuid_entry2> {
        let mut table = table.to_vec();
        for features in FEATURES {
            let at = table
                .iter()
                .position(|entry| (entry.function, entry.index) == (features.leaf, features.subleaf));
            if let Some(at) = at.filter(|_| features.leaf != 0xd) {
                *features.register.get_mut(&mut table[at]) &= !gone[at][features.register as usize];
            }
        }
        // KVM gives state and features that go together.
        for name in ["avx", "xsave", "avx512f", "pku"] {
            for features in FEATURES.iter().filter(|features| features.bits(name) != 0) {
                let entry = find_mut(&mut table, features.leaf, features.subleaf).unwrap();
                *features.register.get_mut(entry) |= features.bits(name);
            }
        }
        table
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// A guest born on any of them with what they have in common goes on on any other, and sees the same features everywhere.
        #[test]
        fn what_hosts_have_in_common_moves_between_them(gone in prop::collection::vec(prop::collection::vec(any::<[u32; 4]>(), 40), 2..4)) {
            for whole in [cascade_lake(), zen4()] {
                let hosts: Vec<_> = gone.iter().map(|gone| without(&whole, gone)).collect();
                let dumps: Vec<_> = hosts.iter().map(|host| dumped(host, &[])).collect();
                let template = common(&dumps).unwrap();
                template.check().unwrap();
                let births: Vec<_> = hosts.iter().map(|host| Template::Own(&template).apply(host).unwrap()).collect();
                for born in &births {
                    prop_assert!(lacking(born, &births[0]).is_empty() && lacking(&births[0], born).is_empty());
                    let saved = SavedCpuid::new(&for_vcpu(born, Topology { vcpus: 4 }, 3).unwrap());
                    for host in &hosts {
                        prop_assert!(saved.on(host).is_ok());
                    }
                }
            }
        }
    }
}
