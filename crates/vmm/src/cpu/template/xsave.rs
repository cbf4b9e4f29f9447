//! Leaf 0xD, which must go with the features that are left: the state that XSAVE keeps, and how much room it takes.

use kvm_bindings::kvm_cpuid_entry2;

use crate::cpu::features::{Register, find, find_mut, has};

/// x87 and SSE, which XSAVE always keeps.
const LEGACY: u64 = 3;
/// The legacy area and the header.
const LEAST: u32 = 576;
/// Components of XCR0, each with the feature whose state it is (Intel SDM 1, 13.1; AMD APM 2, 11.5.2).
const COMPONENTS: [(u64, &str); 7] = [
    (1 << 2, "avx"),
    (3 << 3, "mpx"),
    (7 << 5, "avx512f"),
    (1 << 9, "pku"),
    (3 << 17, "amx_tile"),
    (1 << 19, "apx_f"),
    (1 << 62, "lwp"),
];
/// Features whose instructions work on AVX's state, beside AVX-512's.
const ON_YMM: [&str; 5] = ["avx2", "fma", "f16c", "vaes", "vpclmulqdq"];
/// CET's two components of IA32_XSS.
const CET: u64 = 3 << 11;
const XSAVEC: u32 = 1 << 1;
const XSAVES: u32 = 1 << 3;

/// Takes the components out whose feature is gone, and computes the sizes anew.
///
/// # Errors
/// A feature is there whose state is not: a guest that uses it would fault.
pub fn settle(table: &mut [kvm_cpuid_entry2]) -> Result<(), String> {
    if find(table, 0xd, 0).is_none() {
        return Ok(());
    }
    let wide = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let of = |table: &[kvm_cpuid_entry2], register: Register, subleaf| register.of(table, 0xd, subleaf);
    let xsave = has(table, "xsave");
    let (features, absent): (Vec<_>, Vec<_>) = COMPONENTS.iter().partition(|(_, name)| has(table, name));
    let gone = absent.iter().fold(0, |gone, (bits, _)| gone | bits);
    let offered = wide(of(table, Register::Eax, 0), of(table, Register::Edx, 0));
    let xcr0 = if xsave { offered & !gone } else { 0 };
    if let Some((bits, name)) = features.iter().find(|(bits, _)| xcr0 & bits != *bits) {
        let why = if xsave {
            format!("leaf 0xd.0 leaves out its state (bits {bits:#x})")
        } else {
            "xsave is left out".into()
        };
        return Err(format!("{name} is left in, but {why}"));
    }
    if xsave && xcr0 & LEGACY != LEGACY {
        return Err(format!("leaf 0xd.0 eax leaves out what every XSAVE has (bits {LEGACY:#x}: x87, SSE)"));
    }

    for (bit, below) in [(7 << 5, 1 << 2), (1 << 2, LEGACY)] {
        if xcr0 & bit != 0 && xcr0 & below != below {
            return Err(format!(
                "leaf 0xd.0 has state {bit:#x} without {below:#x}, which no CPU can switch on: leave both out"
            ));
        }
    }
    if xcr0 & (1 << 2) == 0
        && let Some(name) = ON_YMM.iter().find(|name| has(table, name))
    {
        return Err(format!("{name} is left in, but avx and its state are left out"));
    }

    let kinds = if xsave { of(table, Register::Eax, 1) } else { 0 };
    let mut xss = wide(of(table, Register::Ecx, 1), of(table, Register::Edx, 1));
    if kinds & XSAVES == 0 {
        xss = 0;
    } else if !has(table, "shstk") && !has(table, "ibt") {
        xss &= !CET;
    }
    for entry in table.iter_mut().filter(|entry| entry.function == 0xd && (2..64).contains(&entry.index)) {
        if (xcr0 | xss) >> entry.index & 1 == 0 {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
    }
    let (standard, compact) = (standard_size(table, xcr0), compact_size(table, xcr0 | xss));
    let [low, high] = halves(xcr0);
    if let Some(entry) = find_mut(table, 0xd, 0) {
        // EBX is the size for what the guest has switched on: KVM keeps it up to date.
        (entry.eax, entry.ebx, entry.ecx, entry.edx) = (low, standard, standard, high);
    }
    let [low, high] = halves(xss);
    if let Some(entry) = find_mut(table, 0xd, 1) {
        let size = if kinds & (XSAVEC | XSAVES) == 0 { 0 } else { compact };
        (entry.eax, entry.ebx, entry.ecx, entry.edx) = (kinds, size, low, high);
    }
    Ok(())
}

#[allow(clippy::cast_possible_truncation, reason = "the two halves of it")]
const fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

fn components(table: &[kvm_cpuid_entry2], bits: u64) -> impl Iterator<Item = &kvm_cpuid_entry2> {
    (2..64).filter(move |bit| bits >> bit & 1 == 1).filter_map(|bit| find(table, 0xd, bit))
}

/// The area in the standard format: each component (EAX bytes) at its own place (EBX).
fn standard_size(table: &[kvm_cpuid_entry2], xcr0: u64) -> u32 {
    let ends = components(table, xcr0).map(|entry| entry.ebx.saturating_add(entry.eax));
    if xcr0 == 0 { 0 } else { ends.fold(LEAST, u32::max) }
}

/// The area in the compacted format: one component behind the other, at a multiple of 64 if it asks for that (ECX bit 1).
fn compact_size(table: &[kvm_cpuid_entry2], bits: u64) -> u32 {
    components(table, bits).fold(LEAST, |end, entry| {
        let start = if entry.ecx & 2 == 0 { end } else { end.next_multiple_of(64) };
        start.saturating_add(entry.eax)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED_AVX512: u32 = 0xe7;

    /// A table as KVM gives on a host with AVX-512, protection keys and CET; sizes as of a Sapphire Rapids without AMX.
    fn table(leaf1_ecx: u32, leaf7: [u32; 3]) -> Vec<kvm_cpuid_entry2> {
        let entry = |function, index, [eax, ebx, ecx, edx]: [u32; 4]| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..kvm_cpuid_entry2::default()
        };
        vec![
            entry(1, 0, [0, 0, leaf1_ecx, 0]),
            entry(7, 0, [0, leaf7[0], leaf7[1], leaf7[2]]),
            entry(0xd, 0, [0x2e7, 2696, 2696, 0]),
            entry(0xd, 1, [0xf, 2696, 0x1800, 0]),
            entry(0xd, 2, [256, 576, 0, 0]),
            entry(0xd, 5, [64, 1088, 0, 0]),
            entry(0xd, 6, [512, 1152, 0, 0]),
            entry(0xd, 7, [1024, 1664, 0, 0]),
            entry(0xd, 9, [8, 2688, 0, 0]),
            entry(0xd, 11, [16, 0, 1, 0]),
            entry(0xd, 12, [24, 0, 1, 0]),
        ]
    }

    const XSAVE_AVX: u32 = 1 << 26 | 1 << 28;
    const AVX512F: u32 = 1 << 16;
    const PKU_SHSTK: u32 = 1 << 3 | 1 << 7;

    fn leaf(table: &[kvm_cpuid_entry2], index: u32) -> [u32; 4] {
        let entry = find(table, 0xd, index).unwrap();
        [entry.eax, entry.ebx, entry.ecx, entry.edx]
    }

    #[test]
    fn state_that_no_cpu_can_switch_on_is_refused() {
        let without_avx = 1 << 26;
        let why = settle(&mut table(without_avx, [AVX512F, 0, 0])).unwrap_err();
        assert!(why.contains("without 0x4"), "{why}");
        let avx2 = 1 << 5;
        let why = settle(&mut table(without_avx, [avx2, 0, 0])).unwrap_err();
        assert!(why.contains("avx2"), "{why}");
    }

    #[test]
    fn what_all_features_have_stays() {
        let before = table(XSAVE_AVX, [AVX512F, PKU_SHSTK, 0]);
        let mut after = before.clone();
        settle(&mut after).unwrap();
        // Compacted: 576 + 256 + 64 + 512 + 1024 + 8 + 16 + 24.
        assert_eq!(leaf(&after, 0), leaf(&before, 0));
        assert_eq!(leaf(&after, 1), [0xf, 2480, 0x1800, 0]);
        assert_eq!(leaf(&after, 9), leaf(&before, 9));
    }

    #[test]
    fn state_goes_with_its_feature_and_the_sizes_with_it() {
        let mut left = table(XSAVE_AVX, [AVX512F, 0, 0]);
        settle(&mut left).unwrap();
        assert_eq!(leaf(&left, 0), [SAVED_AVX512, 2688, 2688, 0]);
        assert_eq!(leaf(&left, 1), [0xf, 2432, 0, 0]);
        assert_eq!(leaf(&left, 9), [0; 4]);
        let mut left = table(XSAVE_AVX, [0, 0, 0]);
        settle(&mut left).unwrap();
        assert_eq!(leaf(&left, 0), [7, 832, 832, 0]);
        assert_eq!((leaf(&left, 5), leaf(&left, 12)), ([0; 4], [0; 4]));
        let mut left = table(1 << 26, [0, 0, 0]);
        settle(&mut left).unwrap();
        assert_eq!(leaf(&left, 0), [3, 576, 576, 0]);
        let mut left = table(0, [0, 0, 0]);
        settle(&mut left).unwrap();
        for index in [0, 1, 2, 5, 6, 7, 9, 11, 12] {
            assert_eq!(leaf(&left, index), [0; 4], "{index}");
        }
    }

    #[test]
    fn a_component_begins_where_it_asks_to() {
        let mut aligned = table(XSAVE_AVX, [AVX512F, PKU_SHSTK, 0]);
        find_mut(&mut aligned, 0xd, 11).unwrap().ecx = 3;
        settle(&mut aligned).unwrap();
        // 576 + 256 + 64 + 512 + 1024 + 8 = 2440; from 2496 on 16 and 24.
        assert_eq!(leaf(&aligned, 1)[1], 2536);
        find_mut(&mut aligned, 0xd, 1).unwrap().eax = 1;
        settle(&mut aligned).unwrap();
        assert_eq!(leaf(&aligned, 1), [1, 0, 0, 0]);
    }

    #[test]
    fn a_feature_without_its_state_is_refused() {
        let why = settle(&mut table(1 << 28, [0, 0, 0])).unwrap_err();
        assert_eq!(why, "avx is left in, but xsave is left out");
        let mut cut = table(XSAVE_AVX, [AVX512F, 0, 0]);
        find_mut(&mut cut, 0xd, 0).unwrap().eax = 0x27;
        assert!(settle(&mut cut).unwrap_err().contains("avx512f is left in, but leaf 0xd.0"), "{cut:?}");
        find_mut(&mut cut, 0xd, 0).unwrap().eax = 0xe6;
        assert!(settle(&mut cut).unwrap_err().contains("bits 0x3"));
        // A KVM without the leaf has nothing to settle.
        assert_eq!(settle(&mut [find(&cut, 1, 0).copied().unwrap()]), Ok(()));
    }
}
