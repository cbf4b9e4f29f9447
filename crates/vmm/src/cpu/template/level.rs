//! Built-in templates: the levels of the x86-64 psABI. A guest has all instructions of its level and none above it, so that hosts
//! that reach the level are alike to it.

use std::fmt;

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use crate::cpu::features::{self, FEATURES, Register};

/// A template by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub enum Level {
    /// All that KVM gives.
    #[default]
    None,
    /// The baseline: every x86-64 CPU.
    #[serde(rename = "x86-64-v1")]
    V1,
    /// Up to SSE4.2: Intel since 2008, AMD since 2011.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// The same, AES and carry-less multiplication: Intel since 2010, AMD since 2011.
    #[serde(rename = "x86-64-v2-AES")]
    V2Aes,
    /// Up to AVX2: Intel since 2013, AMD since 2015.
    #[serde(rename = "x86-64-v3")]
    V3,
    /// Up to AVX-512 as of 2017: Intel's servers, AMD since 2022.
    #[serde(rename = "x86-64-v4")]
    V4,
}

/// System V ABI, AMD64 supplement, table 3.1; `syscall` is its SCE, `nx` is what every kernel of today asks for.
const V1: &str = "fpu tsc cx8 cmov mmx fxsr sse sse2 syscall nx lm";
const V2: &str = "sse3 ssse3 cx16 sse4_1 sse4_2 popcnt lahf_lm";
/// In no level of the ABI, but in every CPU with AVX2; without it disks and connections are slow to encrypt. Proxmox VE's models of
/// the same names have AES from v2-AES up.
const AES: &str = "aes pclmulqdq";
const V3: &str = "avx avx2 bmi1 bmi2 f16c fma lzcnt movbe xsave";
const V4: &str = "avx512f avx512bw avx512cd avx512dq avx512vl";

/// What a level does not speak of and a kernel lives by: left as the host has it. First what every CPU has or KVM makes; then what
/// protects the guest, which it must not lose because another host might lack it; then the clock and paravirtual help that is
/// as old as these CPUs.
const KEPT: &str = "vme de pse msr pae mce apic sep mtrr pge mca pat pse36 clflush x2apic tsc_deadline_timer tsc_adjust hypervisor arat rdtscp \
     smep smap umip md_clear spec_ctrl intel_stibp flush_l1d arch_capabilities spec_ctrl_ssbd \
     amd_ibpb amd_ibrs amd_stibp stibp_always_on amd_ssbd virt_ssbd amd_ibpb_ret \
     lfence_rdtsc verw_clear null_sel_clr_base autoibrs sbpb ibpb_brtype \
     invtsc kvm_clocksource kvm_nop_io_delay kvm_clocksource2 kvm_clocksource_stable kvm_steal_time kvm_pv_eoi kvm_pv_unhalt";
/// Bits of leaf 0x8000_0001 EDX that repeat those of leaf 1 on AMD.
const EXT1_EDX_REPEATED: u32 = 0x0183_f3ff;

/// Leaves that describe instead of offering: vendor and names, caches and TLBs, topology, the TSC's frequency.
const DESCRIBING: [u32; 15] = [
    0,
    2,
    4,
    0xb,
    0x15,
    0x16,
    0x4000_0000,
    0x8000_0000,
    0x8000_0002,
    0x8000_0003,
    0x8000_0004,
    0x8000_0005,
    0x8000_0006,
    0x8000_001d,
    0x8000_001e,
];
/// Physical addresses of Intel's client CPUs have as many bits, all later and larger ones more.
const PHYSICAL_BITS: u32 = 39;
/// Linear addresses without LA57.
const LINEAR_BITS: u32 = 48;

impl Level {
    /// All of them.
    const ALL: [Self; 6] = [Self::None, Self::V1, Self::V2, Self::V2Aes, Self::V3, Self::V4];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "None",
            Self::V1 => "x86-64-v1",
            Self::V2 => "x86-64-v2",
            Self::V2Aes => "x86-64-v2-AES",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        }
    }

    /// Whether it is none.
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "the shape that serde calls")]
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::None
    }

    /// What a guest of this level has, by name.
    fn required(self) -> String {
        let parts = [(Self::V1, V1), (Self::V2, V2), (Self::V2Aes, AES), (Self::V3, V3), (Self::V4, V4)];
        parts
            .into_iter()
            .filter(|(level, _)| *level <= self)
            .map(|(_, names)| names)
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// Leaves of a table what is in the level.
    ///
    /// # Errors
    /// What of the level the table lacks.
    pub fn apply(self, table: &mut [kvm_cpuid_entry2]) -> Result<(), String> {
        if self == Self::None {
            return Ok(());
        }
        let required = self.required();
        let lacking = features::lacking_names(&required, table);
        if !lacking.is_empty() {
            return Err(format!(
                "cpu_template {:?}: this host's CPU or KVM does not reach it: it lacks {}",
                self.name(),
                lacking.join(", ")
            ));
        }
        for entry in &mut *table {
            reduce(entry, &required);
        }
        Ok(())
    }
}

fn reduce(entry: &mut kvm_cpuid_entry2, required: &str) {
    let (leaf, subleaf) = (entry.function, entry.index);
    if DESCRIBING.contains(&leaf) {
        return;
    }
    let was = *entry;
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
    for features in FEATURES.iter().filter(|features| (features.leaf, features.subleaf) == (leaf, subleaf)) {
        let mut left = features.bits(required) | features.bits(KEPT) | features.ignored;
        if (leaf, features.register) == (0x8000_0001, Register::Edx) {
            left |= EXT1_EDX_REPEATED;
        }
        *features.register.get_mut(entry) = features.register.get(&was) & left;
    }
    match (leaf, subleaf) {
        // Family and model; CLFLUSH's line.
        (1, 0) => (entry.eax, entry.ebx) = (was.eax, was.ebx),
        // What goes with the features that are left is found out afterwards.
        (0xd, 0) | (0xd, 2..) => *entry = was,
        (0x8000_0001, _) => (entry.eax, entry.ebx) = (was.eax, was.ebx),
        (0x8000_0008, _) => {
            let bits = |shift: u32, most: u32| (was.eax >> shift & 0xff).min(most) << shift;
            entry.eax = bits(0, PHYSICAL_BITS) | bits(8, LINEAR_BITS);
            entry.ecx = was.ecx;
        }
        _ => {}
    }
}

impl TryFrom<String> for Level {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        if let Some(level) = Self::ALL.into_iter().find(|level| level.name() == name) {
            return Ok(level);
        }
        let is = if matches!(name.as_str(), "C3" | "T2" | "T2A" | "T2CL" | "T2S" | "V1N1") {
            "is one of Firecracker's templates that it gives up itself: write it as cpu-config, or"
        } else {
            "is no template;"
        };
        let names: Vec<String> = Self::ALL.iter().map(|level| format!("`{}`", level.name())).collect();
        Err(format!("cpu_template {name:?} {is} expected one of {}", names.join(", ")))
    }
}

impl fmt::Display for Level {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::template::tests::{cascade_lake, zen4};
    use crate::cpu::template::xsave;

    fn reduced(level: Level, mut table: Vec<kvm_cpuid_entry2>) -> Result<Vec<kvm_cpuid_entry2>, String> {
        level.apply(&mut table)?;
        xsave::settle(&mut table)?;
        Ok(table)
    }

    #[test]
    fn two_vendors_that_reach_a_level_have_the_same_instructions() {
        for level in [Level::V1, Level::V2, Level::V2Aes, Level::V3, Level::V4] {
            let tables = [cascade_lake(), zen4()].map(|table| reduced(level, table).unwrap());
            for (one, other) in [(0, 1), (1, 0)] {
                let differ = features::lacking(&tables[one], &tables[other]);
                let names: Vec<&str> = differ.iter().filter_map(|text| text.split(' ').next()).collect();
                let only_protection = names.iter().all(|name| KEPT.contains(name) || *name == "CPUID");
                assert!(only_protection, "{level}: {differ:?}");
            }
            for table in &tables {
                assert!(features::lacking_names(&level.required(), table).is_empty());
            }
        }
    }

    #[test]
    fn nothing_above_a_level_is_left() {
        for (level, gone) in [
            (Level::V1, "sse3 popcnt xsave rdrand avx fsgsbase"),
            (Level::V2, "aes avx xsave bmi1 movbe rdrand fsgsbase xcr0_x87"),
            (Level::V2Aes, "avx xsave bmi1 movbe rdrand"),
            (Level::V3, "avx512f rdseed adx sha_ni vaes pku xcr0_opmask xcr0_pkru xsavec pdpe1gb"),
            (Level::V4, "avx512_vnni avx512_bf16 avx512vbmi pku gfni xcr0_pkru"),
        ] {
            for table in [cascade_lake(), zen4()] {
                let left = reduced(level, table).unwrap();
                for name in gone.split(' ') {
                    assert!(!features::has(&left, name), "{level} has {name}");
                }
                // Performance counters, AMX tiles, memory encryption.
                for leaf in [0xa, 0x14, 0x1d, 0x8000_001f, 0x8000_0022] {
                    for register in Register::ALL {
                        assert_eq!(register.of(&left, leaf, 0), 0, "{leaf:#x}");
                    }
                }
                assert_eq!(Register::Eax.of(&left, 7, 0), 0, "leaf 7 has one subleaf");
                assert_eq!(Register::Eax.of(&left, 0x8000_0008, 0) & 0xffff, 48 << 8 | 39);
            }
        }
        assert_eq!(Register::Ecx.of(&reduced(Level::V3, zen4()).unwrap(), 0xd, 0), 832);
        assert_eq!(Register::Ecx.of(&reduced(Level::V4, cascade_lake()).unwrap(), 0xd, 0), 2688);
    }

    #[test]
    fn a_host_below_a_level_is_refused_with_what_it_lacks() {
        let mut table = zen4();
        features::find_mut(&mut table, 7, 0).unwrap().ebx &= !(1 << 5 | 1 << 8);
        let why = reduced(Level::V3, table.clone()).unwrap_err();
        assert_eq!(
            why,
            "cpu_template \"x86-64-v3\": this host's CPU or KVM does not reach it: it lacks avx2 (CPUID leaf 0x7.0 ebx bit 5), \
             bmi2 (CPUID leaf 0x7.0 ebx bit 8)"
        );
        assert!(reduced(Level::V2Aes, table).is_ok());
    }

    #[test]
    fn names_are_read_as_they_are_printed() {
        for level in Level::ALL {
            assert_eq!(Level::try_from(level.to_string()), Ok(level));
            assert_eq!(serde_json::to_value(level).unwrap(), level.name());
        }
        let why = Level::try_from("T2S".to_owned()).unwrap_err();
        assert!(why.contains("\"T2S\" is one of Firecracker's") && why.contains("`x86-64-v3`"), "{why}");
    }

    #[test]
    fn every_name_here_is_a_feature() {
        for name in [V1, V2, AES, V3, V4, KEPT].join(" ").split(' ') {
            assert!(FEATURES.iter().any(|features| features.bits(name) != 0), "{name}");
        }
    }
}
