use super::*;
use crate::cpu::features::FEATURES;
use proptest::prelude::*;
use serde_json::json;

/// What KVM gives of hosts of two vendors: features by Linux's names, leaf 0xD and address sizes.
fn host(vendor: &[u8; 12], physical_bits: u32, xcr0: u32, names: &str) -> Vec<kvm_cpuid_entry2> {
    let word = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
    let mut table = Vec::new();
    let mut put = |function, index, flags, [eax, ebx, ecx, edx]: [u32; 4]| {
        table.push(kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] });
    };
    put(0, 0, 0, [0x1f, word(0), word(8), word(4)]);
    put(1, 0, 0, [0x50657, 0x800, 0, 0]);
    put(6, 0, 0, [0; 4]);
    put(7, 0, 1, [2, 0, 0, 0]);
    put(7, 1, 1, [0; 4]);
    put(7, 2, 1, [0; 4]);
    put(0xa, 0, 0, [0x0730_0404, 0, 0, 0x603]);
    put(0xd, 0, 1, [xcr0, 2696, 2696, 0]);
    put(0xd, 1, 1, [0, 2696, 0, 0]);
    for (index, size, at) in [(2, 256, 576), (5, 64, 1088), (6, 512, 1152), (7, 1024, 1664), (9, 8, 2688)] {
        if xcr0 >> index & 1 == 1 {
            put(0xd, index, 1, [size, at, 0, 0]);
        }
    }
    put(0x14, 0, 1, [1, 7, 7, 7]);
    put(0x1d, 0, 1, [1, 0, 0, 0]);
    put(0x4000_0001, 0, 0, [0; 4]);
    put(0x8000_0000, 0, 0, [0x8000_0022, 0, 0, 0]);
    put(0x8000_0001, 0, 0, [0; 4]);
    put(0x8000_0007, 0, 0, [0; 4]);
    put(0x8000_0008, 0, 0, [48 << 8 | physical_bits, 0, 0, 0]);
    put(0x8000_001f, 0, 0, [1, 1, 1, 1]);
    put(0x8000_0021, 0, 0, [0; 4]);
    put(0x8000_0022, 0, 0, [1, 1, 1, 1]);
    for features in FEATURES {
        if let Some(entry) = features::find_mut(&mut table, features.leaf, features.subleaf) {
            *features.register.get_mut(entry) |= features.bits(names);
        }
    }
    table
}

const BOTH: &str = "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 syscall nx lm \
    rdtscp pdpe1gb sse3 pclmulqdq ssse3 fma cx16 sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave avx f16c rdrand \
    hypervisor lahf_lm lzcnt 3dnowprefetch fsgsbase tsc_adjust bmi1 avx2 smep bmi2 erms invpcid avx512f avx512dq rdseed adx smap \
    clflushopt clwb avx512cd avx512bw avx512vl umip pku avx512_vnni xsaveopt xsavec xgetbv1 xsaves arat invtsc spec_ctrl \
    intel_stibp spec_ctrl_ssbd arch_capabilities amd_ibpb amd_ibrs amd_stibp amd_ssbd kvm_clocksource kvm_nop_io_delay \
    kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt kvm_pv_send_ipi kvm_clocksource_stable pcid";

pub fn cascade_lake() -> Vec<kvm_cpuid_entry2> {
    host(b"GenuineIntel", 46, 0x2e7, &format!("{BOTH} ss ds_cpl pdcm md_clear flush_l1d mpx"))
        .into_iter()
        .map(|mut entry| {
            if (entry.function, entry.index) == (7, 0) {
                // KVM has not given MPX for long.
                entry.ebx &= !(1 << 14);
            }
            entry
        })
        .collect()
}

pub fn zen4() -> Vec<kvm_cpuid_entry2> {
    let own = "mmxext fxsr_opt cr8_legacy sse4a misalignsse osvw topoext perfctr_core avx512ifma sha_ni avx512vbmi avx512_vbmi2 gfni \
        vaes vpclmulqdq avx512_bitalg avx512_vpopcntdq avx512_bf16 rdpid fsrm clzero xsaveerptr rdpru wbnoinvd stibp_always_on \
        lfence_rdtsc null_sel_clr_base autoibrs";
    let mut table = host(b"AuthenticAMD", 48, 0x2e7, &format!("{BOTH} {own}"));
    let repeated = Register::Edx.of(&table, 1, 0) & 0x0183_f3ff;
    features::find_mut(&mut table, 0x8000_0001, 0).unwrap().edx |= repeated;
    table
}

fn template(value: &serde_json::Value) -> Result<CpuTemplate> {
    CpuTemplate::from_json(&value.to_string())
}

fn modifier(leaf: &str, subleaf: &str, flags: u32, register: &str, bitmap: &str) -> serde_json::Value {
    json!({ "leaf": leaf, "subleaf": subleaf, "flags": flags, "modifiers": [{ "register": register, "bitmap": bitmap }] })
}

fn applied(modifiers: &serde_json::Value, host: &[kvm_cpuid_entry2]) -> Result<Vec<kvm_cpuid_entry2>> {
    Template::Own(&template(&json!({ "cpuid_modifiers": modifiers }))?).apply(host)
}

#[test]
fn firecrackers_own_example_is_taken_and_printed_again() {
    let text = json!({
        "kvm_capabilities": ["!56", "171"],
        "cpuid_modifiers": [modifier("0x1", "0x0", 0, "eax", "0bxxxx000000000011xx00011011110010")],
        "msr_modifiers": [{ "addr": "0x10a", "bitmap": format!("0b{}", "0".repeat(64)) }],
    });
    let template = template(&text).unwrap();
    assert_eq!(serde_json::to_value(&template).unwrap(), text);
    let table = Template::Own(&template).apply(&cascade_lake()).unwrap();
    assert_eq!(Register::Eax.of(&table, 1, 0), 0x0003_06f2, "of 0x50657 nothing is left");
    assert_eq!(Template::Own(&template).capabilities().collect::<Vec<_>>(), [171]);
}

#[test]
fn a_feature_goes_with_what_it_needs() {
    let table =
        applied(&json!([modifier("0x7", "0x0", 1, "ebx", "0b00x0xxxxxxxxxx0xxxxxxxxxxxxxxxx")]), &zen4());
    let table = table.unwrap();
    assert!(!features::has(&table, "avx512f") && features::has(&table, "avx2"));
    assert_eq!(Register::Eax.of(&table, 0xd, 0), 0x207);
    assert_eq!(Register::Ecx.of(&table, 0xd, 0), 2696, "protection keys have their place behind AVX-512's");
}

#[test]
fn what_the_host_lacks_is_refused_by_name() {
    let set = |leaf, subleaf, flags, register, bitmap| {
        applied(&json!([modifier(leaf, subleaf, flags, register, bitmap)]), &cascade_lake())
            .unwrap_err()
            .to_string()
    };
    let why = set("0x7", "0x0", 1, "ebx", "0b1xxxxxxxxxxxxxxxxxxxxxxxxxxxxx");
    assert!(why.contains("lacks what the template sets: sha_ni (CPUID leaf 0x7.0 ebx bit 29)"), "{why}");
    let why = set("0x1", "0x0", 0, "ecx", "0b1xxxxx");
    assert!(why.contains("vmx (CPUID leaf 0x1.0 ecx bit 5)"), "{why}");
    let why = set("0xd", "0x0", 1, "eax", "0b1xxxxxxxxxxxxxxxxx");
    assert!(why.contains("xcr0_xtilecfg"), "{why}");
    let why = set("0x80000008", "0x0", 0, "eax", "0b110001");
    assert!(why.contains("physical addresses of 49 bits") && why.contains("has 46"), "{why}");
    let why = set("0x1", "0x0", 0, "ecx", "0bx0xxxxxxxxxxxxxxxxxxxxxxxxxx");
    assert!(why.contains("avx is left in, but xsave is left out"), "{why}");
    let why = set("0x77", "0x0", 0, "eax", "0b0");
    assert!(why.contains("leaf 0x77, subleaf 0x0: this host's KVM has no such leaf"), "{why}");
    let why = set("0x7", "0x0", 0, "eax", "0b0");
    assert!(why.contains("flags 0 is not KVM's 1"), "{why}");
}

#[test]
fn what_makes_no_sense_anywhere_is_refused_at_once() {
    let msr = |addr: &str| json!({ "addr": addr, "bitmap": "0b0" });
    let leaf = |leaf: &str| modifier(leaf, "0x0", 0, "eax", "0b0");
    for (value, words) in [
        (json!({ "cpuid_modifiers": [leaf("0xb")] }), "leaf 0xb, subleaf 0x0: this leaf says which CPUs"),
        (json!({ "cpuid_modifiers": [leaf("1"), leaf("0x1")] }), "eax is there twice"),
        (json!({ "cpuid_modifiers": [leaf("eins")] }), "leaf \"eins\" is no number"),
        (json!({ "cpuid_modifiers": [leaf("0x100000000")] }), "leaf \"0x100000000\" is no number"),
        (json!({ "cpuid_modifiers": [modifier("1", "0", 8, "eax", "0b0")] }), "flags 8 is outside 0–7"),
        (json!({ "cpuid_modifiers": [modifier("1", "0", 0, "rax", "0b0")] }), "rax"),
        (json!({ "cpuid_modifiers": [modifier("1", "0", 0, "eax", "0b2")] }), "bitmap \"0b2\""),
        (json!({ "msr_modifiers": [msr("0x10a"), msr("266")] }), "addr 0x10a is there twice"),
        (json!({ "msr_modifiers": [msr("0x10")] }), "addr 0x10: this is the guest's clock"),
        (
            json!({ "reg_modifiers": [{ "addr": "0x1", "bitmap": "0b0" }] }),
            "reg_modifiers: these registers are aarch64's",
        ),
        (json!({ "vcpu_features": [{ "index": 0, "bitmap": "0b0" }] }), "vcpu_features: "),
        (json!({ "kvm_capabilities": ["all"] }), "kvm_capabilities: \"all\""),
        (json!({ "kvm_capabilities": ["!3"] }), "\"!3\": the monitor cannot do without user memory slots"),
        (json!({ "cpuid": [] }), "unknown field `cpuid`"),
    ] {
        let why = template(&value).unwrap_err().to_string();
        assert!(why.contains("cpu-config: ") && why.contains(words), "{value} gave {why}");
    }
    assert!(template(&json!({ "reg_modifiers": [], "vcpu_features": [] })).is_ok());
    let many: Vec<_> = (0..257).map(|n| msr(&format!("{:#x}", 0x4000_0000 + n))).collect();
    assert!(template(&json!({ "msr_modifiers": many })).unwrap_err().to_string().contains("257 entries"));
}

#[test]
fn a_configuration_names_a_file_or_holds_the_template() {
    let read = |text: &str| serde_json::from_str::<CpuConfig>(text);
    assert_eq!(read("\"t.json\"").unwrap(), CpuConfig::Named("t.json".into()));
    assert_eq!(read("{}").unwrap(), CpuConfig::Template(CpuTemplate::default()));
    let why = read("{\"msr_modifiers\": [{\"addr\": \"x\"}]}").unwrap_err().to_string();
    assert!(why.contains("addr \"x\" is no number"), "{why}");
    assert!(read("7").unwrap_err().to_string().contains("the name of a file"));
}

fn any_bitmap() -> impl Strategy<Value = String> {
    "[01x]{1,32}".prop_map(|digits| format!("0b{digits}"))
}

fn any_modifiers() -> impl Strategy<Value = Vec<serde_json::Value>> {
    let leaves =
        zen4().into_iter().map(|entry| (entry.function, entry.index, entry.flags)).collect::<Vec<_>>();
    let one = (prop::sample::select(leaves), prop::sample::select(Register::ALL.to_vec()), any_bitmap());
    let one = one.prop_map(|((leaf, subleaf, flags), register, bitmap)| {
        modifier(&format!("{leaf:#x}"), &subleaf.to_string(), flags, register.name(), &bitmap)
    });
    prop::collection::vec(one, 1..4)
}

fn only_clearing(modifiers: &[serde_json::Value]) -> Vec<serde_json::Value> {
    let mut modifiers = modifiers.to_vec();
    for modifier in &mut modifiers {
        let bitmap = modifier["modifiers"][0]["bitmap"].as_str().unwrap().replace('1', "x");
        modifier["modifiers"][0]["bitmap"] = json!(bitmap);
    }
    modifiers
}

proptest! {
    /// Whatever a template says: a guest has nothing that the host lacks, and all that it has goes together.
    #[test]
    fn templates_add_nothing(modifiers in any_modifiers(), clearing: bool) {
        let modifiers = if clearing { only_clearing(&modifiers) } else { modifiers };
        for host in [cascade_lake(), zen4()] {
            let Ok(table) = applied(&json!(modifiers), &host) else { continue };
            for features in FEATURES {
                let of = |table| features.register.of(table, features.leaf, features.subleaf);
                prop_assert_eq!(of(&table) & !of(&host) & !features.ignored, 0);
            }
            prop_assert_eq!(wider(&table, &host), None);
            let mut again = table.clone();
            prop_assert_eq!(xsave::settle(&mut again), Ok(()));
            prop_assert_eq!(again, table);
        }
    }

    /// A level of a host that lacks anything: refused, or within both.
    #[test]
    fn levels_add_nothing(gone in prop::collection::vec(any::<[u32; 4]>(), 40), sparse: bool, level in 1..6_usize) {
        for mut host in [cascade_lake(), zen4()] {
            for (entry, gone) in host.iter_mut().zip(&gone) {
                for (register, gone) in Register::ALL.into_iter().zip(gone) {
                    let rare = (0..8).fold(*gone, |rare, turn| rare & gone.rotate_left(3 * turn));
                    let rare = if sparse { rare } else { 0 };
                    *register.get_mut(entry) &= !rare;
                }
            }
            let level = [Level::None, Level::V1, Level::V2, Level::V2Aes, Level::V3, Level::V4][level];
            let Ok(table) = Template::Level(level).apply(&host) else { continue };
            prop_assert!(features::lacking(&table, &host).is_empty());
            prop_assert_eq!(Template::Level(level).apply(&table).unwrap(), table);
        }
    }
}
