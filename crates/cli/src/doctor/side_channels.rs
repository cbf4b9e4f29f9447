//! Side channels between guests through shared hardware, and their mitigations. No finding keeps
//! instances from running. The section is for hosts with tenants who do not trust each other.

use super::report::{Check, Remedies};
use std::fs;
use std::path::Path;

/// Findings about side channels.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SideChannels {
    /// SMT is on: two threads of a core run at the same time; `None` if the kernel does not tell.
    pub smt: Option<bool>,
    /// The kernel supports core scheduling.
    pub core_scheduling: CoreScheduling,
    /// `/sys/kernel/mm/ksm/run`; `None` if the kernel has no KSM.
    pub ksm: Option<String>,
    /// Name and state of every file in `/sys/devices/system/cpu/vulnerabilities`.
    pub vulnerabilities: Vec<(String, String)>,
    /// The kernel's command line has `mitigations=off`.
    pub mitigations_off: bool,
    /// Swap files and partitions in use.
    pub swaps: Vec<String>,
    /// Microcode revision as the processor reports it.
    pub microcode: Option<String>,
    /// This machine is virtual: its processor's state is the outer machine's.
    pub is_virtual: bool,
    /// The selected word of `/sys/kernel/mm/transparent_hugepage/enabled`.
    pub huge_pages: Option<String>,
    /// `nx_huge_pages` of KVM.
    pub nx_huge_pages: Option<String>,
}

/// The kernel's answer to a request for a core scheduling cookie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CoreScheduling {
    /// The kernel has core scheduling.
    Available,
    /// The kernel has core scheduling, and SMT is off.
    NotNeeded,
    /// The kernel was built without core scheduling.
    #[default]
    Absent,
}

const VULNERABILITIES: &str = "/sys/devices/system/cpu/vulnerabilities";

/// Looks.
pub fn gather(cpu: &str) -> SideChannels {
    let word = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    SideChannels {
        smt: word("/sys/devices/system/cpu/smt/active").map(|text| text == "1"),
        core_scheduling: core_scheduling(),
        ksm: word("/sys/kernel/mm/ksm/run"),
        vulnerabilities: vulnerabilities(Path::new(VULNERABILITIES)),
        mitigations_off: word("/proc/cmdline")
            .is_some_and(|text| text.split(' ').any(|w| w == "mitigations=off")),
        swaps: swaps(&fs::read_to_string("/proc/swaps").unwrap_or_default()),
        microcode: value(cpu, "microcode"),
        is_virtual: value(cpu, "flags")
            .is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
        huge_pages: word("/sys/kernel/mm/transparent_hugepage/enabled").and_then(|text| selected(&text)),
        nx_huge_pages: word("/sys/module/kvm/parameters/nx_huge_pages"),
    }
}

fn core_scheduling() -> CoreScheduling {
    use rustix::thread::{CoreSchedulingScope, core_scheduling_cookie};
    let this = rustix::process::getpid();
    match core_scheduling_cookie(this, CoreSchedulingScope::Thread) {
        Ok(_) => CoreScheduling::Available,
        Err(rustix::io::Errno::NODEV) => CoreScheduling::NotNeeded,
        Err(_) => CoreScheduling::Absent,
    }
}

fn vulnerabilities(folder: &Path) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let name = path.file_name()?.to_string_lossy().into_owned();
            Some((name, fs::read_to_string(path).ok()?.trim().to_owned()))
        })
        .collect();
    found.sort();
    found
}

/// The first column after the heading.
fn swaps(text: &str) -> Vec<String> {
    text.lines().skip(1).filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

/// The first value of a field of /proc/cpuinfo.
fn value(cpu: &str, field: &str) -> Option<String> {
    cpu.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == field).then(|| value.trim().to_owned())
    })
}

/// The word in brackets.
fn selected(text: &str) -> Option<String> {
    Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
}

fn check(check: &'static str, ok: bool, detail: impl Into<String>, fix: impl FnOnce() -> String) -> Check {
    Check { section: SECTION, check, ok, detail: detail.into(), fix: (!ok).then(fix) }
}

/// The section's heading.
pub const SECTION: &str = "side channels";

/// The findings one by one. Pure.
pub fn checks(found: &SideChannels, remedies: &Remedies) -> Vec<Check> {
    vec![
        smt(found),
        vulnerable(found),
        microcode(found, remedies),
        ksm(found),
        nx_huge_pages(found),
        check(
            "huge pages",
            true,
            match &found.huge_pages {
                Some(word) => format!("transparent ones: {word}"),
                None => "this kernel has no transparent ones".to_owned(),
            },
            String::new,
        ),
        check(
            "swap",
            true,
            if found.swaps.is_empty() {
                "none".to_owned()
            } else {
                format!("{}; no instance's memory goes there (memory.swap.max is 0)", found.swaps.join(", "))
            },
            String::new,
        ),
    ]
}

fn smt(found: &SideChannels) -> Check {
    let cores = match found.core_scheduling {
        CoreScheduling::Available => {
            "the kernel has core scheduling, so that each instance has a core to itself while it runs"
        }
        CoreScheduling::NotNeeded => "no core scheduling is needed",
        CoreScheduling::Absent => {
            "this kernel has no core scheduling (Debian's have none): two instances can run on one core at once"
        }
    };
    let (ok, detail) = match found.smt {
        Some(true) => (found.core_scheduling == CoreScheduling::Available, format!("on; {cores}")),
        Some(false) => (true, "off".to_owned()),
        None => (true, format!("this kernel does not tell; {cores}")),
    };
    check("smt", ok, detail, || {
        "echo off | sudo tee /sys/devices/system/cpu/smt/control   # for good: nosmt on the kernel's command line; \
         or give each account whole cores (cpusets), or take a kernel with CONFIG_SCHED_CORE"
            .to_owned()
    })
}

fn vulnerable(found: &SideChannels) -> Check {
    let open: Vec<&str> = found
        .vulnerabilities
        .iter()
        .filter(|(_, state)| state.starts_with("Vulnerable") || state.contains("KVM: Vulnerable"))
        .map(|(name, _)| name.as_str())
        .collect();
    let detail = match (found.vulnerabilities.len(), open.as_slice()) {
        (0, _) => "this kernel does not tell".to_owned(),
        (known, []) => format!("none of the {known} that this kernel knows is open"),
        (_, open) => format!("open: {}", open.join(", ")),
    };
    check("cpu vulnerabilities", open.is_empty(), detail, || {
        let outside = if found.is_virtual { ", here and on the machine outside" } else { "" };
        let off = if found.mitigations_off {
            "take mitigations=off from the kernel's command line, and "
        } else {
            ""
        };
        format!("{off}bring kernel and microcode up to date{outside}; `grep . {VULNERABILITIES}/*` says more")
    })
}

fn microcode(found: &SideChannels, remedies: &Remedies) -> Check {
    // Newer kernels have the file "old_microcode"; older ones report it within single
    // vulnerabilities.
    let is_old = found.vulnerabilities.iter().any(|(name, state)| {
        (name == "old_microcode" && state.starts_with("Vulnerable")) || state.contains("no microcode")
    });
    let revision = found.microcode.as_deref().unwrap_or("of an unknown revision");
    let detail = match (is_old, found.is_virtual) {
        (true, _) => format!("{revision}; the kernel says that it is too old"),
        (false, true) => format!("{revision}, as the machine outside says"),
        (false, false) if found.vulnerabilities.is_empty() => {
            format!("{revision}; the kernel does not tell whether that is new enough")
        }
        (false, false) => format!("{revision}; the kernel misses nothing in it"),
    };
    check("microcode", !is_old, detail, || {
        if found.is_virtual {
            return "bring the machine outside up to date".to_owned();
        }
        let (apt, other) =
            if remedies.amd { ("amd64-microcode", "amd-ucode") } else { ("intel-microcode", "intel-ucode") };
        format!(
            "{} && sudo reboot",
            remedies.install(
                apt,
                if remedies.amd { "amd-ucode-firmware" } else { "microcode_ctl" },
                other,
                if remedies.amd { "ucode-amd" } else { "ucode-intel" }
            )
        )
    })
}

fn ksm(found: &SideChannels) -> Check {
    let runs = found.ksm.as_deref() == Some("1");
    let detail = match found.ksm.as_deref() {
        None => "this kernel has none",
        Some("1") => "runs; the monitor offers it no guest's memory, but what others offer it merges",
        Some(_) => "off",
    };
    check("ksm", !runs, detail, || {
        "echo 2 | sudo tee /sys/kernel/mm/ksm/run   # takes apart what is merged; ksmtuned would turn it on again".to_owned()
    })
}

fn nx_huge_pages(found: &SideChannels) -> Check {
    let affected = found
        .vulnerabilities
        .iter()
        .any(|(name, state)| name == "itlb_multihit" && !state.contains("Not affected"));
    let off = found.nx_huge_pages.as_deref().is_some_and(|word| matches!(word, "N" | "off" | "never"));
    let detail = match found.nx_huge_pages.as_deref() {
        None => "KVM does not tell".to_owned(),
        Some(word) if affected => word.to_owned(),
        Some(word) => format!("{word}; this processor does not need it"),
    };
    check("nx_huge_pages", !(affected && off), detail, || {
        "echo options kvm nx_huge_pages=force | sudo tee /etc/modprobe.d/roost-kvm.conf && sudo reboot   # a guest can \
         stop this processor without it"
            .to_owned()
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// An Intel machine without an open vulnerability.
    pub fn good() -> SideChannels {
        SideChannels {
            smt: Some(false),
            core_scheduling: CoreScheduling::NotNeeded,
            ksm: Some("0".into()),
            vulnerabilities: vec![
                ("itlb_multihit".into(), "KVM: Mitigation: Split huge pages".into()),
                ("mds".into(), "Mitigation: Clear CPU buffers; SMT disabled".into()),
            ],
            mitigations_off: false,
            swaps: vec![],
            microcode: Some("0xf4".into()),
            is_virtual: false,
            huge_pages: Some("madvise".into()),
            nx_huge_pages: Some("Y".into()),
        }
    }

    fn of(found: &SideChannels, name: &str) -> Check {
        checks(found, &Remedies::default()).into_iter().find(|check| check.check == name).unwrap()
    }

    #[test]
    fn a_good_machine_has_no_open_side_channel() {
        assert!(checks(&good(), &Remedies::default()).iter().all(|check| check.ok && check.fix.is_none()));
    }

    #[test]
    fn smt_is_open_where_no_core_scheduling_keeps_instances_apart() {
        for (cores, ok) in [(CoreScheduling::Available, true), (CoreScheduling::Absent, false)] {
            let check = of(&SideChannels { smt: Some(true), core_scheduling: cores, ..good() }, "smt");
            assert_eq!(check.ok, ok, "{check:?}");
            assert_eq!(check.detail.contains("Debian"), !ok, "{check:?}");
            assert!(ok || check.fix.as_ref().unwrap().contains("cpusets"), "{check:?}");
        }
    }

    #[test]
    fn each_open_channel_is_named_with_what_closes_it() {
        let vulnerable = |name: &str, state: &str| SideChannels {
            vulnerabilities: vec![(name.into(), state.into())],
            ..good()
        };
        let cases = [
            (
                SideChannels { mitigations_off: true, ..vulnerable("spectre_v2", "Vulnerable") },
                "cpu vulnerabilities",
                "mitigations=off",
            ),
            (vulnerable("itlb_multihit", "KVM: Vulnerable"), "cpu vulnerabilities", "microcode"),
            (
                vulnerable("mds", "Vulnerable: Clear CPU buffers attempted, no microcode"),
                "microcode",
                "intel-microcode",
            ),
            (vulnerable("old_microcode", "Vulnerable"), "microcode", "intel-microcode"),
            (SideChannels { ksm: Some("1".into()), ..good() }, "ksm", "/sys/kernel/mm/ksm/run"),
            (
                SideChannels { nx_huge_pages: Some("N".into()), ..good() },
                "nx_huge_pages",
                "nx_huge_pages=force",
            ),
        ];
        for (found, name, fix) in cases {
            let check = of(&found, name);
            assert!(!check.ok && check.fix.as_ref().unwrap().contains(fix), "{check:?}");
        }
        let amd = vulnerable("itlb_multihit", "Not affected");
        assert!(of(&SideChannels { nx_huge_pages: Some("N".into()), ..amd }, "nx_huge_pages").ok);
    }

    #[test]
    fn what_the_system_says_is_read_right() {
        let cpu = "processor\t: 0\nflags\t\t: fpu hypervisor vmx\nmicrocode\t: 0x1\nprocessor\t: 1\nmicrocode\t: 0x2\n";
        assert_eq!(value(cpu, "microcode").as_deref(), Some("0x1"));
        assert_eq!(value(cpu, "model"), None);
        assert_eq!(selected("always [madvise] never").as_deref(), Some("madvise"));
        let text = "Filename\tType\tSize\n/dev/sda2   partition\t8\n/swap file\t8\n";
        assert_eq!(swaps(text), ["/dev/sda2", "/swap"]);
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("mds"), "Not affected\n").unwrap();
        assert_eq!(vulnerabilities(folder.path()), [("mds".to_owned(), "Not affected".to_owned())]);
        assert_eq!(vulnerabilities(Path::new("/nonexistent")), []);
    }
}
