//! The registers of CPUID whose bits are each a feature, and what Linux calls them.

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

/// A register that CPUID answers in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl Register {
    /// All of them, in order.
    pub const ALL: [Self; 4] = [Self::Eax, Self::Ebx, Self::Ecx, Self::Edx];

    /// What an entry has in it.
    #[must_use]
    pub const fn get(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }

    /// The place in an entry.
    pub const fn get_mut(self, entry: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Self::Eax => &mut entry.eax,
            Self::Ebx => &mut entry.ebx,
            Self::Ecx => &mut entry.ecx,
            Self::Edx => &mut entry.edx,
        }
    }

    /// What a table has in it; zero for a leaf that is not there, as CPUID says.
    #[must_use]
    pub fn of(self, table: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> u32 {
        find(table, leaf, subleaf).map_or(0, |entry| self.get(entry))
    }

    /// Its name as templates write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        }
    }
}

/// A leaf of a table.
#[must_use]
pub fn find(table: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Option<&kvm_cpuid_entry2> {
    table.iter().find(|entry| (entry.function, entry.index) == (leaf, subleaf))
}

/// The same, to be changed.
pub fn find_mut(table: &mut [kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Option<&mut kvm_cpuid_entry2> {
    table.iter_mut().find(|entry| (entry.function, entry.index) == (leaf, subleaf))
}

/// One register of features.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// Leaf.
    pub leaf: u32,
    /// Subleaf.
    pub subleaf: u32,
    /// Register.
    pub register: Register,
    /// Bits that are no feature of the host: they mirror what the guest does, or how many CPUs its machine has.
    pub ignored: u32,
    /// Names from bit 0 up; `-` for a bit that has none here.
    names: &'static str,
}

const fn features(
    leaf: u32,
    subleaf: u32,
    register: Register,
    ignored: u32,
    names: &'static str,
) -> Features {
    Features { leaf, subleaf, register, ignored, names }
}

/// OSXSAVE, OSPKE, HTT, CmpLegacy.
const LEAF1_ECX_OSXSAVE: u32 = 1 << 27;
const LEAF7_ECX_OSPKE: u32 = 1 << 4;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const EXT1_ECX_CMP_LEGACY: u32 = 1 << 1;

/// Names as in /proc/cpuinfo where it has one (Linux, arch/x86/include/asm/cpufeatures.h).
pub const FEATURES: &[Features] = &[
    features(
        1,
        0,
        Register::Ecx,
        LEAF1_ECX_OSXSAVE,
        "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 sse4_2 x2apic movbe \
         popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    ),
    features(
        1,
        0,
        Register::Edx,
        LEAF1_EDX_HTT,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss ht tm \
         ia64 pbe",
    ),
    features(6, 0, Register::Eax, 0, "dtherm ida arat - pln - pts hwp"),
    features(
        7,
        0,
        Register::Ebx,
        0,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a avx512f avx512dq \
         rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    features(
        7,
        0,
        Register::Ecx,
        LEAF7_ECX_OSPKE,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme \
         avx512_vpopcntdq - la57 - - - - - rdpid kl bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    features(
        7,
        0,
        Register::Edx,
        0,
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort - \
         tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl \
         intel_stibp flush_l1d arch_capabilities core_capabilities spec_ctrl_ssbd",
    ),
    features(
        7,
        1,
        Register::Eax,
        0,
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - fred lkgs wrmsrns nmi_src \
         amx_fp16 hreset avx_ifma - - lam msrlist - - - movrs",
    ),
    features(7, 1, Register::Ebx, 0, ""),
    features(7, 1, Register::Ecx, 0, ""),
    features(
        7,
        1,
        Register::Edx,
        0,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - utmr prefetchiti user_msr - - cet_sss avx10 - apx_f",
    ),
    features(7, 2, Register::Edx, 0, "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"),
    features(
        0xd,
        0,
        Register::Eax,
        0,
        "xcr0_x87 xcr0_sse xcr0_avx xcr0_bndregs xcr0_bndcsr xcr0_opmask xcr0_zmm_hi256 xcr0_hi16_zmm - xcr0_pkru - - - - - - - \
         xcr0_xtilecfg xcr0_xtiledata xcr0_apx",
    ),
    features(0xd, 0, Register::Edx, 0, ""),
    features(0xd, 1, Register::Eax, 0, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    features(0xd, 1, Register::Ecx, 0, ""),
    features(
        0x4000_0001,
        0,
        Register::Eax,
        0,
        "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - \
         kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield kvm_async_pf_int kvm_msi_ext_dest_id \
         kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvm_clocksource_stable",
    ),
    features(
        0x8000_0001,
        0,
        Register::Ecx,
        EXT1_ECX_CMP_LEGACY,
        "lahf_lm cmp_legacy svm extapic cr8_legacy lzcnt sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 tce - \
         nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    // Bits without a name repeat those of leaf 1 on AMD.
    features(
        0x8000_0001,
        0,
        Register::Edx,
        0,
        "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    features(0x8000_0007, 0, Register::Edx, 0, "- - - - - - - - invtsc"),
    features(
        0x8000_0008,
        0,
        Register::Ebx,
        0,
        "clzero irperf xsaveerptr invlpgb rdpru - - - mcommit wbnoinvd - - amd_ibpb int_wbinvd amd_ibrs amd_stibp ibrs_always_on \
         stibp_always_on ibrs_preferred ibrs_same_mode - - - ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no amd_ibpb_ret brs",
    ),
    features(
        0x8000_0021,
        0,
        Register::Eax,
        0,
        "no_nested_data_bp fsgs_non_serializing lfence_rdtsc - - verw_clear null_sel_clr_base upper_address_ignore autoibrs \
         no_smm_ctl_msr amd_fsrs amd_fsrc - prefetch_ctl - - - cpuid_user_dis - - - - - - eraps - - sbpb ibpb_brtype srso_no",
    ),
    features(0x8000_0021, 0, Register::Ecx, 0, "- tsa_sq_no tsa_l1_no"),
];

impl Features {
    /// The names of some of its bits, with where they are.
    fn named(&self, bits: u32) -> impl Iterator<Item = String> {
        (0..32).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| {
            let place =
                format!("CPUID leaf {:#x}.{} {} bit {bit}", self.leaf, self.subleaf, self.register.name());
            match self.names.split_ascii_whitespace().nth(bit).filter(|name| *name != "-") {
                Some(name) => format!("{name} ({place})"),
                None => place,
            }
        })
    }

    /// The bits of these names that are in this register.
    #[must_use]
    pub fn bits(&self, names: &str) -> u32 {
        let wanted = |name: &str| name != "-" && names.split_ascii_whitespace().any(|wanted| wanted == name);
        let own = self.names.split_ascii_whitespace().zip(0..32);
        own.filter(|(name, _)| wanted(name)).fold(0, |bits, (_, bit)| bits | 1 << bit)
    }
}

/// What a table has that another one lacks, as a list of names; empty if nothing.
#[must_use]
pub fn lacking(has: &[kvm_cpuid_entry2], other: &[kvm_cpuid_entry2]) -> Vec<String> {
    let missing = |features: &Features| {
        let of = |table| features.register.of(table, features.leaf, features.subleaf);
        features.named(of(has) & !of(other) & !features.ignored).collect::<Vec<String>>()
    };
    FEATURES.iter().flat_map(missing).collect()
}

/// What a table lacks of these names, as a list of them.
#[must_use]
pub fn lacking_names(names: &str, table: &[kvm_cpuid_entry2]) -> Vec<String> {
    let missing = |features: &Features| {
        let has = features.register.of(table, features.leaf, features.subleaf);
        features.named(features.bits(names) & !has).collect::<Vec<String>>()
    };
    FEATURES.iter().flat_map(missing).collect()
}

/// Whether a table has a feature.
#[must_use]
pub fn has(table: &[kvm_cpuid_entry2], name: &str) -> bool {
    FEATURES.iter().any(|features| {
        features.bits(name) & features.register.of(table, features.leaf, features.subleaf) != 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_stands_once_and_where_the_manuals_have_it() {
        let mut seen = std::collections::BTreeSet::new();
        for features in FEATURES {
            let names: Vec<&str> = features.names.split_ascii_whitespace().collect();
            assert!(names.len() <= 32, "{features:?}");
            for name in names.into_iter().filter(|name| *name != "-") {
                assert!(seen.insert(name), "{name} stands twice");
            }
        }
        // Intel SDM 2A, CPUID; AMD APM 3, appendix E; Linux, Documentation/virt/kvm/x86/cpuid.rst.
        for (name, leaf, subleaf, register, bit) in [
            ("hypervisor", 1, 0, Register::Ecx, 31),
            ("xsave", 1, 0, Register::Ecx, 26),
            ("sse2", 1, 0, Register::Edx, 26),
            ("ht", 1, 0, Register::Edx, 28),
            ("avx512vl", 7, 0, Register::Ebx, 31),
            ("smap", 7, 0, Register::Ebx, 20),
            ("umip", 7, 0, Register::Ecx, 2),
            ("la57", 7, 0, Register::Ecx, 16),
            ("pks", 7, 0, Register::Ecx, 31),
            ("amx_tile", 7, 0, Register::Edx, 24),
            ("spec_ctrl_ssbd", 7, 0, Register::Edx, 31),
            ("lam", 7, 1, Register::Eax, 26),
            ("apx_f", 7, 1, Register::Edx, 21),
            ("xcr0_apx", 0xd, 0, Register::Eax, 19),
            ("kvm_clocksource_stable", 0x4000_0001, 0, Register::Eax, 24),
            ("lzcnt", 0x8000_0001, 0, Register::Ecx, 5),
            ("mwaitx", 0x8000_0001, 0, Register::Ecx, 29),
            ("lm", 0x8000_0001, 0, Register::Edx, 29),
            ("rdtscp", 0x8000_0001, 0, Register::Edx, 27),
            ("invtsc", 0x8000_0007, 0, Register::Edx, 8),
            ("amd_ssbd", 0x8000_0008, 0, Register::Ebx, 24),
            ("brs", 0x8000_0008, 0, Register::Ebx, 31),
            ("srso_no", 0x8000_0021, 0, Register::Eax, 29),
        ] {
            let found = FEATURES.iter().find(|features| features.bits(name) != 0).unwrap();
            assert_eq!((found.leaf, found.subleaf, found.register), (leaf, subleaf, register), "{name}");
            assert_eq!(found.bits(name), 1 << bit, "{name}");
        }
    }

    #[test]
    fn what_is_missing_is_named_with_its_place() {
        let entry = |ebx| kvm_cpuid_entry2 { function: 7, ebx, ..kvm_cpuid_entry2::default() };
        assert_eq!(
            lacking(&[entry(1 << 5 | 1 << 22 | 1 << 8)], &[entry(1 << 8)]),
            ["avx2 (CPUID leaf 0x7.0 ebx bit 5)", "CPUID leaf 0x7.0 ebx bit 22"]
        );
        assert!(lacking(&[], &[]).is_empty());
    }
}
