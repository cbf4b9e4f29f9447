//! The findings one by one, each with the exact way to mend it. Pure.

use super::decision::{
    Findings, Kvm, LEAST_DISK_GIB, LEAST_MEMORY_MIB, NEEDED_CONTROLLERS, OLDEST_KERNEL, SLOWEST_CPL0,
    WANTED_CONTROLLERS, in_millions, missing_controllers,
};
use super::side_channels;
use roost_types::forward::{Barrier, LINKS};
use serde::Serialize;

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Heading of the section.
    pub section: &'static str,
    /// What.
    pub check: &'static str,
    /// Whether it is as it should be.
    pub ok: bool,
    /// What was found.
    pub detail: String,
    /// What to type.
    pub fix: Option<String>,
}

/// How programs are installed here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Packages {
    /// Debian and its children.
    Apt,
    /// Fedora and its like.
    Dnf,
    /// Arch.
    Pacman,
    /// SUSE.
    Zypper,
    /// Something else.
    #[default]
    Unknown,
}

/// What a fix depends on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Remedies {
    /// The package manager.
    pub packages: Packages,
    /// The processor is AMD's.
    pub amd: bool,
    /// The folder where instances' disks will be.
    pub state_dir: String,
    /// Why nft failed.
    pub nft_error: Option<String>,
    /// Programs that are looked for.
    pub programs: Vec<String>,
    /// Docker has its own chain for other people's rules.
    pub docker_user_chain: bool,
    /// Uplinks of instances.
    pub uplinks: Vec<String>,
    /// Chains of nftables that drop instances' packets.
    pub barriers: Vec<Barrier>,
}

impl Remedies {
    /// The installation command of a package, with its name in each distribution.
    pub fn install(&self, apt: &str, dnf: &str, pacman: &str, zypper: &str) -> String {
        match self.packages {
            Packages::Apt => format!("sudo apt-get install -y {apt}"),
            Packages::Dnf => format!("sudo dnf install -y {dnf}"),
            Packages::Pacman => format!("sudo pacman -S --needed {pacman}"),
            Packages::Zypper => format!("sudo zypper install -y {zypper}"),
            Packages::Unknown => format!("install {apt} (that is its name in Debian)"),
        }
    }
}

fn check(check: &'static str, ok: bool, detail: impl Into<String>, fix: impl FnOnce() -> String) -> Check {
    Check { section: MAIN, check, ok, detail: detail.into(), fix: (!ok).then(fix) }
}

/// The section about requirements of instances.
pub const MAIN: &str = "host";

/// Everything that was looked at.
pub fn checks(findings: &Findings, remedies: &Remedies) -> Vec<Check> {
    let mut checks = needs(findings, remedies);
    checks.extend(side_channels::checks(&findings.side_channels, remedies));
    checks
}

fn needs(findings: &Findings, remedies: &Remedies) -> Vec<Check> {
    vec![
        check("architecture", findings.arch == "x86_64", &findings.arch, || {
            "use a machine with an x86_64 processor".to_owned()
        }),
        kernel(findings, remedies),
        kvm(findings, remedies),
        cgroups(findings),
        cpuset(findings),
        user_namespaces(findings),
        check("nft", findings.nft, if findings.nft { "installed" } else { "not installed" }, || {
            remedies.install("nftables", "nftables", "nftables", "nftables")
        }),
        nftables(findings, remedies),
        forwarding(findings, remedies),
        check("tun", findings.tun, if findings.tun { "/dev/net/tun" } else { "no /dev/net/tun" }, || {
            "sudo modprobe tun && echo tun | sudo tee /etc/modules-load.d/roost.conf".to_owned()
        }),
        Check {
            section: MAIN,
            check: "ip forwarding",
            ok: true,
            detail: if findings.ip_forward { "on" } else { "off; the agent turns it on for instances" }
                .to_owned(),
            fix: None,
        },
        memory(findings),
        disk(findings, remedies),
        programs(findings, remedies),
        Check {
            section: MAIN,
            check: "systemd",
            ok: true,
            detail: if findings.systemd {
                "runs"
            } else {
                "does not run; controller and agent run without it"
            }
            .to_owned(),
            fix: None,
        },
        clock(findings),
        agent(findings),
    ]
}

/// Bills and signatures depend on the clock.
fn clock(findings: &Findings) -> Check {
    let detail = match findings.clock_synchronised {
        Some(true) => "synchronised",
        Some(false) => "not synchronised: it drifts, and signatures fail at five minutes",
        None => "nobody here tells whether it is synchronised (no timedatectl)",
    };
    check("clock", findings.clock_synchronised != Some(false), detail, || {
        "sudo timedatectl set-ntp true   # where that is not supported: install chrony".to_owned()
    })
}

/// Troubles that this machine's agent has reported.
fn agent(findings: &Findings) -> Check {
    let detail = match findings.agent_troubles.as_deref() {
        None => "none has run here since the last boot".to_owned(),
        Some([]) => "reports no trouble with this host".to_owned(),
        Some(troubles) => troubles.join("; "),
    };
    Check {
        section: MAIN,
        check: "agent",
        ok: findings.agent_troubles.as_ref().is_none_or(Vec::is_empty),
        detail,
        fix: None,
    }
}

fn kernel(findings: &Findings, remedies: &Remedies) -> Check {
    let Some((major, minor)) = findings.kernel else {
        return check("kernel", true, "of an unknown version", String::new);
    };
    check("kernel", (major, minor) >= OLDEST_KERNEL, format!("{major}.{minor}"), || {
        let upgrade = remedies.install("linux-image-amd64", "kernel", "linux", "kernel-default");
        format!("{upgrade} && sudo reboot   # {}.{} or newer", OLDEST_KERNEL.0, OLDEST_KERNEL.1)
    })
}

fn kvm(findings: &Findings, remedies: &Remedies) -> Check {
    let module = if remedies.amd { "kvm_amd" } else { "kvm_intel" };
    let elsewhere = "nothing mends this here: use the virtual host (scripts/virtual-host up)";
    let (detail, fix) = match &findings.kvm {
        Kvm::Missing { processor_can: true } => (
            "no /dev/kvm, though the processor could".to_owned(),
            format!("sudo modprobe {module} && echo {module} | sudo tee /etc/modules-load.d/roost-kvm.conf"),
        ),
        Kvm::Missing { processor_can: false } => (
            "no /dev/kvm, and the processor offers neither VT-x nor AMD-V".to_owned(),
            "turn on VT-x, AMD-V or SVM in the firmware's settings; in a virtual machine, turn on nested \
             virtualisation at its host"
                .to_owned(),
        ),
        Kvm::Forbidden => (
            "/dev/kvm may not be opened by this user".to_owned(),
            "sudo usermod -aG kvm \"$USER\"   # then log in again; or: sudo roost doctor".to_owned(),
        ),
        Kvm::Broken(why) => (why.clone(), elsewhere.to_owned()),
        Kvm::Unknown(why) => (
            format!("not tried: {why}"),
            "build or install the monitor, then name it: roost doctor --vmm PATH/roost-vmm".to_owned(),
        ),
        Kvm::Probed { cpl0_per_second, failed } => {
            let speed =
                format!("a guest's kernel runs at {} M instructions/s", in_millions(*cpl0_per_second));
            if !failed.is_empty() {
                (format!("{speed}, without {}", failed.join(", ")), elsewhere.to_owned())
            } else if *cpl0_per_second < SLOWEST_CPL0 {
                (format!("{speed}: too slow to boot Linux"), elsewhere.to_owned())
            } else {
                return check("kvm", true, speed, String::new);
            }
        }
    };
    check("kvm", false, detail, || fix)
}

const UNIFIED: &str = "sudo sed -i 's/^GRUB_CMDLINE_LINUX=\"/&systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all /' \
                       /etc/default/grub && sudo update-grub && sudo reboot";

fn cgroups(findings: &Findings) -> Check {
    match &findings.controllers {
        None => check("cgroup v2", false, "not mounted", || UNIFIED.to_owned()),
        Some(present) => {
            let missing = missing_controllers(present, NEEDED_CONTROLLERS);
            let detail = if missing.is_empty() {
                present.join(" ")
            } else {
                format!("without {} (cgroup v1 holds them, or the kernel lacks them)", missing.join(", "))
            };
            check("cgroup v2", missing.is_empty(), detail, || UNIFIED.to_owned())
        }
    }
}

fn cpuset(findings: &Findings) -> Check {
    let present = findings.controllers.as_deref().unwrap_or_default();
    let missing = missing_controllers(present, WANTED_CONTROLLERS);
    let detail = if missing.is_empty() { "present" } else { "absent; instances work, dedicated CPUs do not" };
    check("cpuset", missing.is_empty(), detail, || UNIFIED.to_owned())
}

fn user_namespaces(findings: &Findings) -> Check {
    let most = findings.user_namespaces;
    let detail = if most > 0 {
        format!("up to {most}")
    } else {
        "none may be made; each instance's jail is one".to_owned()
    };
    check("user namespaces", most > 0, detail, || {
        "echo user.max_user_namespaces=30000 | sudo tee /etc/sysctl.d/60-roost.conf && sudo sysctl --system"
            .to_owned()
    })
}

fn nftables(findings: &Findings, remedies: &Remedies) -> Check {
    let why = remedies.nft_error.as_deref().unwrap_or("it does not answer");
    match findings.nftables {
        Some(true) => check("nftables in the kernel", true, "answers", String::new),
        None => {
            check("nftables in the kernel", true, "not asked: takes root (sudo roost doctor)", String::new)
        }
        Some(false) => check("nftables in the kernel", false, why, || {
            "sudo modprobe nf_tables   # in a container: give it CAP_NET_ADMIN".to_owned()
        }),
    }
}

/// A drop on the forward hook is final, whatever other tables accept. The agent opens the chain of
/// iptables, which Docker makes drop, and names any other.
fn forwarding(findings: &Findings, remedies: &Remedies) -> Check {
    let named: Vec<String> = remedies.barriers.iter().map(ToString::to_string).collect();
    let detail = match findings.forward_drop {
        Some(true) if named.is_empty() => "the FORWARD chain drops (Docker does that)".to_owned(),
        Some(true) => format!("dropped by {}", named.join(", ")),
        Some(false) => "nothing drops what is forwarded".to_owned(),
        None => "not asked: takes root and nft (sudo roost doctor)".to_owned(),
    };
    check("forwarding", findings.forward_drop != Some(true), detail, || {
        let uplinks =
            if remedies.uplinks.is_empty() { vec!["UPLINK".to_owned()] } else { remedies.uplinks.clone() };
        let commands: Vec<String> = if remedies.barriers.is_empty() {
            let chain = if remedies.docker_user_chain { "DOCKER-USER" } else { "FORWARD" };
            let accept =
                |from: &str, to: &str| format!("sudo iptables -I {chain} -i {from} -o {to} -j ACCEPT");
            let guests = format!("{VETH_PREFIX}+");
            uplinks.iter().flat_map(|uplink| [accept(&guests, uplink), accept(uplink, &guests)]).collect()
        } else {
            let ways = uplinks.iter().flat_map(|uplink| [(LINKS, uplink.as_str()), (uplink, LINKS)]);
            let ways: Vec<(&str, &str)> = ways.collect();
            let rules = |barrier: &Barrier| -> Vec<String> {
                ways.iter().map(|(from, to)| format!("sudo nft '{}'", barrier.pass(from, to))).collect()
            };
            remedies.barriers.iter().flat_map(rules).collect()
        };
        format!("{}   # the agent does this by itself for iptables' own chain", commands.join(" && "))
    })
}

/// How the host's ends of instances' veth pairs begin.
pub const VETH_PREFIX: &str = "rv";

fn memory(findings: &Findings) -> Check {
    check("memory", findings.memory_mib >= LEAST_MEMORY_MIB, format!("{} MiB", findings.memory_mib), || {
        format!("use a machine with {LEAST_MEMORY_MIB} MiB or more")
    })
}

fn disk(findings: &Findings, remedies: &Remedies) -> Check {
    let Some(free) = findings.disk_gib else {
        return check("disk", true, format!("{} cannot be measured", remedies.state_dir), String::new);
    };
    check("disk", free >= LEAST_DISK_GIB, format!("{free} GiB free for {}", remedies.state_dir), || {
        format!("free {LEAST_DISK_GIB} GiB or more, or put the state on another disk with --state-dir DIR")
    })
}

fn programs(findings: &Findings, remedies: &Remedies) -> Check {
    let missing = &findings.missing_programs;
    let detail = if missing.is_empty() {
        remedies.programs.join(", ")
    } else {
        format!("missing: {}", missing.join(", "))
    };
    check("programs", missing.is_empty(), detail, || {
        remedies.install("openssh-client", "openssh-clients", "openssh", "openssh-clients")
    })
}

#[cfg(test)]
mod tests {
    use super::super::decision::tests::good;
    use super::*;

    fn of(findings: &Findings) -> Vec<Check> {
        let remedies = Remedies {
            packages: Packages::Apt,
            state_dir: "/var/lib/roost".into(),
            programs: vec!["ssh".into()],
            ..Remedies::default()
        };
        checks(findings, &remedies)
    }

    #[test]
    fn whatever_is_not_ok_has_a_fix_and_nothing_else_does() {
        let bad = Findings {
            arch: "aarch64".into(),
            kernel: Some((4, 19)),
            kvm: Kvm::Forbidden,
            controllers: Some(vec![]),
            user_namespaces: 0,
            nft: false,
            nftables: Some(false),
            tun: false,
            forward_drop: Some(true),
            clock_synchronised: Some(false),
            disk_gib: Some(0),
            memory_mib: 10,
            missing_programs: vec!["ssh".into()],
            ..good()
        };
        for check in of(&bad).iter().chain(&of(&good())) {
            assert_eq!(check.ok, check.fix.is_none(), "{check:?}");
            assert!(!check.detail.is_empty() && check.fix.as_deref() != Some(""), "{check:?}");
        }
        assert!(of(&good()).iter().all(|check| check.ok));
        let failing = of(&bad).iter().filter(|check| !check.ok).count();
        assert_eq!(failing, 14, "{:#?}", of(&bad));
    }

    #[test]
    fn each_state_of_kvm_has_a_fix_of_its_own() {
        let states = [
            Kvm::Missing { processor_can: true },
            Kvm::Missing { processor_can: false },
            Kvm::Forbidden,
            Kvm::Broken("x".into()),
            Kvm::Unknown("y".into()),
        ];
        let fixes: std::collections::BTreeSet<String> =
            states.into_iter().map(|kvm| of(&Findings { kvm, ..good() }).remove(2).fix.unwrap()).collect();
        assert_eq!(fixes.len(), 5);
    }
}
