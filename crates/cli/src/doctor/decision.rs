//! What the findings come to. Pure: everything that was looked at is in [`Findings`].

use super::side_channels::SideChannels;
use serde::Serialize;

/// Instructions per second at CPL 0 below which a guest's kernel crawls: hardware and a virtual host's own KVM do
/// hundreds of millions, a KVM that emulates kernel mode about two.
pub const SLOWEST_CPL0: u64 = 50_000_000;
/// Controllers of cgroup v2 without which an instance's limits cannot be set.
pub const NEEDED_CONTROLLERS: &[&str] = &["cpu", "memory", "pids", "io"];
/// Controllers that some features want.
pub const WANTED_CONTROLLERS: &[&str] = &["cpuset"];
/// Oldest kernel: cgroup.kill came with 5.14, seccomp user notification and pidfd long before.
pub const OLDEST_KERNEL: (u32, u32) = (5, 14);
/// Memory in MiB without which not even a small guest fits beside the programs.
pub const LEAST_MEMORY_MIB: u64 = 1024;
/// Memory in MiB that a virtual host needs.
pub const VIRTUAL_HOST_MEMORY_MIB: u64 = 3072;
/// Disk in GiB for an image or two and what instances write.
pub const LEAST_DISK_GIB: u64 = 4;
/// Disk in GiB that a virtual host needs on top.
pub const VIRTUAL_HOST_DISK_GIB: u64 = 6;

/// What KVM can do here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kvm {
    /// There is no /dev/kvm.
    Missing {
        /// Whether the processor says that it could.
        processor_can: bool,
    },
    /// It is there, and may not be opened.
    Forbidden,
    /// It cannot be used.
    Broken(String),
    /// The probe guest did not run, so nobody knows.
    Unknown(String),
    /// The probe guest ran.
    Probed {
        /// Instructions per second in kernel mode.
        cpl0_per_second: u64,
        /// Instructions that a kernel needs and that failed.
        failed: Vec<String>,
    },
}

/// What was found on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Findings {
    /// Machine architecture, as the kernel names it.
    pub arch: String,
    /// Kernel version, as far as it can be read.
    pub kernel: Option<(u32, u32)>,
    /// KVM.
    pub kvm: Kvm,
    /// Controllers of the mounted cgroup v2 hierarchy; `None` where none is mounted.
    pub controllers: Option<Vec<String>>,
    /// How many user namespaces there may be (`user.max_user_namespaces`): each instance's jail is one. 0 where the kernel has none.
    pub user_namespaces: u64,
    /// The nft program.
    pub nft: bool,
    /// Whether the kernel answers nft; `None` where that takes root.
    pub nftables: Option<bool>,
    /// /dev/net/tun.
    pub tun: bool,
    /// Chains drop forwarded packets; `None` if the check needs root.
    pub forward_drop: Option<bool>,
    /// The host forwards already; the agent would enable forwarding for instances only.
    pub ip_forward: bool,
    /// Free disk in GiB where instances' disks will be.
    pub disk_gib: Option<u64>,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// systemd runs.
    pub systemd: bool,
    /// The kernel reports its clock as synchronised; `None` if it was not asked.
    pub clock_synchronised: Option<bool>,
    /// Side channels between guests. They decide nothing.
    pub side_channels: SideChannels,
    /// The agent's troubles of this host; `None` if no agent has run since the last boot.
    pub agent_troubles: Option<Vec<String>>,
    /// Needed programs that are not there.
    pub missing_programs: Vec<String>,
}

/// Where instances should run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "decision", content = "why", rename_all = "kebab-case")]
pub enum Decision {
    /// On this machine itself.
    BareHost,
    /// In a virtual host on it.
    VirtualHost(String),
    /// Nowhere on it.
    Refuse(String),
}

/// Decides.
pub fn decide(findings: &Findings) -> Decision {
    let bare = not_bare(findings);
    if bare.is_empty() {
        return Decision::BareHost;
    }
    let virtual_host = not_virtual(findings);
    if virtual_host.is_empty() {
        Decision::VirtualHost(bare.join("; "))
    } else {
        Decision::Refuse(format!(
            "{}; and a virtual host will not do: {}",
            bare.join("; "),
            virtual_host.join("; ")
        ))
    }
}

/// What keeps instances from running on this machine itself.
fn not_bare(findings: &Findings) -> Vec<String> {
    let mut reasons = everywhere(findings);
    match &findings.kvm {
        Kvm::Missing { processor_can: true } => {
            reasons.push("there is no /dev/kvm, though the processor could".to_owned());
        }
        Kvm::Missing { processor_can: false } => {
            reasons.push("there is no /dev/kvm, and the processor offers no virtualisation".to_owned());
        }
        Kvm::Forbidden => reasons.push("/dev/kvm may not be opened".to_owned()),
        Kvm::Broken(why) => reasons.push(format!("KVM does not work: {why}")),
        Kvm::Unknown(why) => reasons.push(format!("KVM could not be tried: {why}")),
        Kvm::Probed { cpl0_per_second, failed } => {
            if *cpl0_per_second < SLOWEST_CPL0 {
                reasons.push(format!(
                    "KVM runs a guest's kernel at {} M instructions/s, too slow to boot Linux",
                    in_millions(*cpl0_per_second)
                ));
            }
            if !failed.is_empty() {
                reasons
                    .push(format!("KVM cannot run instructions that a kernel needs: {}", failed.join(", ")));
            }
        }
    }
    match &findings.controllers {
        None => reasons.push("cgroup v2 is not mounted".to_owned()),
        Some(present) => {
            let missing = missing_controllers(present, NEEDED_CONTROLLERS);
            if !missing.is_empty() {
                reasons.push(format!("cgroup v2 lacks the controllers {}", missing.join(", ")));
            }
        }
    }
    if findings.user_namespaces == 0 {
        reasons.push(
            "user namespaces are off (user.max_user_namespaces), and each instance's jail is one".to_owned(),
        );
    }
    if !findings.nft {
        reasons.push("the program nft is missing".to_owned());
    }
    if findings.nftables == Some(false) {
        reasons.push("the kernel does not answer nft".to_owned());
    }
    if !findings.tun {
        reasons.push("there is no /dev/net/tun".to_owned());
    }
    if let Some((major, minor)) = findings.kernel.filter(|version| *version < OLDEST_KERNEL) {
        reasons.push(format!(
            "the kernel is {major}.{minor}, older than {}.{}",
            OLDEST_KERNEL.0, OLDEST_KERNEL.1
        ));
    }
    reasons
}

/// What keeps a virtual host from running. It brings its own QEMU.
fn not_virtual(findings: &Findings) -> Vec<String> {
    let mut reasons = everywhere(findings);
    if findings.memory_mib < VIRTUAL_HOST_MEMORY_MIB {
        reasons.push(format!(
            "it needs {VIRTUAL_HOST_MEMORY_MIB} MiB of memory, and there are {}",
            findings.memory_mib
        ));
    }
    if let Some(disk) = findings.disk_gib.filter(|disk| *disk < VIRTUAL_HOST_DISK_GIB) {
        reasons.push(format!("it needs {VIRTUAL_HOST_DISK_GIB} GiB of disk, and {disk} are free"));
    }
    reasons
}

/// What keeps instances from running at all.
fn everywhere(findings: &Findings) -> Vec<String> {
    let mut reasons = Vec::new();
    if findings.arch != "x86_64" {
        reasons.push(format!("this machine is {}, and Roost runs on x86_64 only", findings.arch));
    }
    if findings.memory_mib < LEAST_MEMORY_MIB {
        reasons
            .push(format!("there are {} MiB of memory, less than {LEAST_MEMORY_MIB}", findings.memory_mib));
    }
    if let Some(disk) = findings.disk_gib.filter(|disk| *disk < LEAST_DISK_GIB) {
        reasons.push(format!("{disk} GiB of disk are free, less than {LEAST_DISK_GIB}"));
    }
    reasons
}

/// Those of `wanted` that are not there.
pub fn missing_controllers(present: &[String], wanted: &[&'static str]) -> Vec<&'static str> {
    wanted.iter().copied().filter(|name| !present.iter().any(|have| have == name)).collect()
}

/// Millions with one decimal.
pub fn in_millions(number: u64) -> String {
    format!("{}.{}", number / 1_000_000, number % 1_000_000 / 100_000)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A machine that lacks nothing.
    pub fn good() -> Findings {
        Findings {
            arch: "x86_64".into(),
            kernel: Some((6, 1)),
            kvm: Kvm::Probed { cpl0_per_second: 1_800_000_000, failed: vec![] },
            controllers: Some(["cpuset", "cpu", "io", "memory", "pids"].map(str::to_owned).to_vec()),
            user_namespaces: 31_000,
            nft: true,
            nftables: Some(true),
            tun: true,
            forward_drop: Some(false),
            ip_forward: false,
            disk_gib: Some(100),
            memory_mib: 8000,
            systemd: true,
            clock_synchronised: Some(true),
            side_channels: super::super::side_channels::tests::good(),
            agent_troubles: Some(vec![]),
            missing_programs: vec![],
        }
    }

    #[derive(Debug)]
    enum Expected {
        Bare,
        Virtual,
        Refused,
    }

    /// A change of a good machine, what is decided then, and what the reason must name.
    type Case = (&'static str, fn(&mut Findings), Expected, &'static str);

    const CASES: &[Case] = &[
        ("a good machine", |_| {}, Expected::Bare, ""),
        (
            "slow KVM",
            |f| f.kvm = Kvm::Probed { cpl0_per_second: 1_700_000, failed: vec![] },
            Expected::Virtual,
            "1.7 M instructions/s",
        ),
        (
            "KVM without instructions",
            |f| {
                let failed = vec!["cmpxchg16b".to_owned(), "clac".to_owned()];
                f.kvm = Kvm::Probed { cpl0_per_second: 900_000_000, failed };
            },
            Expected::Virtual,
            "cmpxchg16b, clac",
        ),
        (
            "missing KVM",
            |f| f.kvm = Kvm::Missing { processor_can: true },
            Expected::Virtual,
            "though the processor could",
        ),
        (
            "no KVM at all",
            |f| f.kvm = Kvm::Missing { processor_can: false },
            Expected::Virtual,
            "no virtualisation",
        ),
        ("forbidden KVM", |f| f.kvm = Kvm::Forbidden, Expected::Virtual, "may not be opened"),
        ("broken KVM", |f| f.kvm = Kvm::Broken("API version 11".into()), Expected::Virtual, "API version 11"),
        (
            "no monitor to try it",
            |f| f.kvm = Kvm::Unknown("no roost-vmm".into()),
            Expected::Virtual,
            "no roost-vmm",
        ),
        (
            "just fast enough",
            |f| f.kvm = Kvm::Probed { cpl0_per_second: SLOWEST_CPL0, failed: vec![] },
            Expected::Bare,
            "",
        ),
        ("no cgroup v2", |f| f.controllers = None, Expected::Virtual, "cgroup v2 is not mounted"),
        (
            "cgroup v2 without controllers",
            |f| f.controllers = Some(vec!["pids".into()]),
            Expected::Virtual,
            "cpu, memory, io",
        ),
        ("no user namespaces", |f| f.user_namespaces = 0, Expected::Virtual, "user.max_user_namespaces"),
        (
            "no cpuset is only a pity",
            |f| f.controllers.as_mut().unwrap().retain(|c| c != "cpuset"),
            Expected::Bare,
            "",
        ),
        ("no nft", |f| f.nft = false, Expected::Virtual, "nft is missing"),
        (
            "no nf_tables in the kernel",
            |f| f.nftables = Some(false),
            Expected::Virtual,
            "does not answer nft",
        ),
        ("nft not asked", |f| f.nftables = None, Expected::Bare, ""),
        ("no tun", |f| f.tun = false, Expected::Virtual, "/dev/net/tun"),
        ("Docker can be told", |f| f.forward_drop = Some(true), Expected::Bare, ""),
        ("no systemd is no matter", |f| f.systemd = false, Expected::Bare, ""),
        ("an old kernel", |f| f.kernel = Some((4, 19)), Expected::Virtual, "4.19, older than 5.14"),
        ("an unknown kernel", |f| f.kernel = None, Expected::Bare, ""),
        ("another processor", |f| f.arch = "aarch64".into(), Expected::Refused, "x86_64 only"),
        ("hardly any memory", |f| f.memory_mib = 512, Expected::Refused, "512 MiB"),
        ("little memory and good KVM", |f| f.memory_mib = 2048, Expected::Bare, ""),
        (
            "little memory and no KVM",
            |f| {
                f.memory_mib = 2048;
                f.kvm = Kvm::Missing { processor_can: false };
            },
            Expected::Refused,
            "needs 3072 MiB",
        ),
        ("no disk", |f| f.disk_gib = Some(1), Expected::Refused, "1 GiB of disk"),
        (
            "little disk and no cgroups",
            |f| {
                f.disk_gib = Some(5);
                f.controllers = None;
            },
            Expected::Refused,
            "needs 6 GiB",
        ),
        ("an unreadable disk", |f| f.disk_gib = None, Expected::Bare, ""),
    ];

    #[test]
    fn every_machine_gets_the_decision_that_it_needs() {
        for (name, change, expected, reason) in CASES {
            let mut findings = good();
            change(&mut findings);
            let decision = decide(&findings);
            let why = match (&decision, expected) {
                (Decision::BareHost, Expected::Bare) => "",
                (Decision::VirtualHost(why), Expected::Virtual)
                | (Decision::Refuse(why), Expected::Refused) => why.as_str(),
                _ => panic!("{name}: {decision:?}, expected {expected:?}"),
            };
            assert!(why.contains(reason), "{name}: {why:?} should say {reason:?}");
        }
    }

    #[test]
    fn all_reasons_are_said_not_only_the_first() {
        let findings = Findings { kvm: Kvm::Forbidden, controllers: None, tun: false, ..good() };
        let Decision::VirtualHost(why) = decide(&findings) else { panic!("a virtual host will do") };
        assert_eq!(why.matches("; ").count(), 2, "{why}");
    }
}
