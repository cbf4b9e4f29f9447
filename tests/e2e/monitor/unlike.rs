//! A guest moves to a host whose CPUs have less, and back.

use crate::by_hand::ByHand;
use crate::{clock_error, cpuid};
use roost_e2e::{OwnHost, Rig, TempFile};
use serde_json::{Value, json};

/// By QEMU's names, and where a guest sees them: bits of leaf 7 EBX.
const LACKS: [(&str, u32); 2] = [("avx2", 1 << 5), ("bmi2", 1 << 8)];

/// Which of them a guest is told of.
fn told(monitor: &ByHand<'_>) -> Vec<&'static str> {
    let leaf = cpuid(monitor, "7 0")[1];
    LACKS.iter().filter(|(_, bit)| leaf & bit != 0).map(|(name, _)| *name).collect()
}

/// The template that the hosts themselves say they need.
fn common(rig: &Rig, hosts: &[&Rig]) -> Value {
    let program = rig.host_bin.join("roost-vmm").display().to_string();
    let dumps: Vec<TempFile> = (0..)
        .zip(hosts)
        .map(|(n, host)| {
            let dump = host.host(&format!("{program} cpu-template dump")).ok();
            TempFile::new(&format!("host-{n}.json"), &dump)
        })
        .collect();
    let folder = format!("/run/{}-dumps", rig.units);
    rig.copy_to_host(&dumps.iter().map(|dump| dump.0.as_path()).collect::<Vec<_>>(), &folder);
    rig.host(&format!("{program} cpu-template common {folder}/*; rm -r {folder}")).json()
}

#[test]
fn a_linux_guest_moves_between_hosts_that_are_not_alike() {
    let rig = Rig::get();
    if !rig.is_emulated() {
        println!(
            "not tested: the other host is a virtual one, and its CPU may be of another vendor than this host's"
        );
        return;
    }
    let names = LACKS.map(|(name, _)| name);
    let options = ["--cpus", "1", "--memory-mib", "1536", "--lacks", &names.join(",")];
    let host = OwnHost::up(&rig, "less", &options);
    let less = host.rig(&rig);

    // Without a template the guest is told of all that its host has, and cannot go where that is not.
    let plain = ByHand::start(&rig, "plain", &json!({}));
    assert_eq!(told(&plain), names);
    plain.snapshot();
    let carried = plain.carry(&less);
    let refused = ByHand::named(&less, "refused");
    let answer = refused.try_load(&carried);
    assert_eq!(answer.code, Some(2), "{answer:?}");
    for name in names {
        assert!(answer.stderr.contains(&format!("{name} (CPUID leaf 0x7.0 ebx bit")), "{}", answer.stderr);
    }
    drop((plain, carried, refused));

    let template = common(&rig, &[&rig, &less]);
    let original = ByHand::start(&rig, "mover", &json!({ "cpu-config": template }));
    assert_eq!(told(&original), Vec::<&str>::new());
    assert_eq!(original.ask("hold 20"), "held 20");
    original.snapshot();
    let carried = original.carry(&less);
    drop(original);
    let (moved, _) = ByHand::load(&less, "moved", &carried, &json!({ "clock_realtime": true }));
    assert_eq!((moved.ask("hold 1"), told(&moved)), ("held 21".into(), vec![]));
    assert!(clock_error(&moved).abs() < 2.0, "{}", clock_error(&moved));

    // And home again.
    moved.snapshot();
    let carried = moved.carry(&rig);
    let (back, _) = ByHand::load(&rig, "back", &carried, &json!({ "clock_realtime": true }));
    assert_eq!((back.ask("hold 1"), told(&back)), ("held 22".into(), vec![]));
    assert_eq!(back.ask("off"), "");
}
