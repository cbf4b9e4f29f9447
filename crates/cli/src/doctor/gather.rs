//! Looks at the machine. Nothing here decides anything, and nothing is changed.

use super::decision::{Findings, Kvm};
use super::probe;
use super::report::{Packages, Remedies, VETH_PREFIX};
use super::side_channels;
use crate::args::DoctorArgs;
use nix::sys::statvfs::statvfs;
use roost_types::forward::{self, Barrier};
use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::process::Command;

/// Longest that any program here may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// Programs that are needed wherever instances run.
const PROGRAMS: &[&str] = &["ssh"];

/// Everything about this machine that decisions and fixes depend on.
pub async fn gather(args: &DoctorArgs) -> (Findings, Remedies) {
    let root = nix::unistd::geteuid().is_root();
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let (nftables, nft_error) = if root { nftables().await } else { (None, None) };
    let forward = if root { forward_chain().await } else { None };
    let barriers = if root { barriers().await } else { None };
    let uname = nix::sys::utsname::uname().ok();
    let text = |name: Option<&std::ffi::OsStr>| name.unwrap_or_default().to_string_lossy().into_owned();
    let findings = Findings {
        arch: text(uname.as_ref().map(nix::sys::utsname::UtsName::machine)),
        kernel: version(&text(uname.as_ref().map(nix::sys::utsname::UtsName::release))),
        kvm: kvm(args.vmm.as_deref(), &cpu).await,
        controllers: controllers(),
        user_namespaces: fs::read_to_string("/proc/sys/user/max_user_namespaces")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0),
        nft: program("nft").is_some(),
        nftables,
        tun: Path::new("/dev/net/tun").exists(),
        forward_drop: match (&forward, &barriers) {
            (None, None) => None,
            (rules, barriers) => Some(
                rules.as_deref().is_some_and(forward_drops)
                    || barriers.as_ref().is_some_and(|found| !found.is_empty()),
            ),
        },
        ip_forward: fs::read_to_string("/proc/sys/net/ipv4/ip_forward").is_ok_and(|text| text.trim() == "1"),
        disk_gib: free_gib(&args.state_dir),
        memory_mib: memory_mib(&fs::read_to_string("/proc/meminfo").unwrap_or_default()),
        systemd: Path::new("/run/systemd/system").is_dir(),
        clock_synchronised: clock_synchronised().await,
        side_channels: side_channels::gather(&cpu),
        agent_troubles: agent_troubles(&args.run_dir),
        missing_programs: PROGRAMS
            .iter()
            .filter(|name| program(name).is_none())
            .map(|name| (*name).to_owned())
            .collect(),
    };
    let remedies = Remedies {
        packages: packages(),
        amd: cpu.contains("AuthenticAMD"),
        state_dir: args.state_dir.display().to_string(),
        nft_error,
        programs: PROGRAMS.iter().map(|name| (*name).to_owned()).collect(),
        uplinks: uplinks(&fs::read_to_string("/proc/net/route").unwrap_or_default()),
        barriers: barriers.unwrap_or_default(),
        docker_user_chain: forward.is_some_and(|rules| rules.lines().any(|line| line == "-N DOCKER-USER")),
    };
    (findings, remedies)
}

/// Finds a program on the PATH, or where administrators' programs are when the PATH is a user's.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let administrators = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(administrators)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

/// What a program left behind when it ended.
pub struct Ended {
    /// How it ended.
    pub status: ExitStatus,
    /// Its output, without surrounding white space.
    pub stdout: String,
    /// The last line of its errors.
    pub last_error: String,
}

impl Ended {
    /// Why it failed, in a line.
    pub fn failure(&self, program: &Path) -> String {
        let colon = if self.last_error.is_empty() { "" } else { ": " };
        format!("{} ended with {}{colon}{}", program.display(), self.status, self.last_error)
    }
}

/// Runs a program to its end, or says why that was not possible.
pub async fn run(program: &Path, args: &[&str]) -> Result<Ended, String> {
    let run = Command::new(program).args(args).stdin(Stdio::null()).kill_on_drop(true).output();
    let shown = program.display();
    let output = match tokio::time::timeout(PATIENCE, run).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return Err(format!("{shown} cannot be run: {error}")),
        Err(_) => return Err(format!("{shown} did not end within {} s", PATIENCE.as_secs())),
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    Ok(Ended {
        status: output.status,
        stdout: text(&output.stdout),
        last_error: text(&output.stderr).lines().last().unwrap_or_default().to_owned(),
    })
}

/// What a program says on success, or why it did not succeed.
async fn said(program: &Path, args: &[&str]) -> Result<String, String> {
    let ended = run(program, args).await?;
    if ended.status.success() { Ok(ended.stdout) } else { Err(ended.failure(program)) }
}

async fn kvm(vmm: Option<&Path>, cpu: &str) -> Kvm {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => probe::run(vmm, can_virtualise(cpu)).await,
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Kvm::Forbidden,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Kvm::Missing { processor_can: can_virtualise(cpu) }
        }
        // The node is there, and no driver behind it.
        Err(error) if error.raw_os_error().is_some_and(is_no_device) => {
            Kvm::Missing { processor_can: can_virtualise(cpu) }
        }
        Err(error) => Kvm::Broken(format!("/dev/kvm cannot be opened: {error}")),
    }
}

fn is_no_device(errno: i32) -> bool {
    let errno = nix::errno::Errno::from_raw(errno);
    matches!(errno, nix::errno::Errno::ENXIO | nix::errno::Errno::ENODEV)
}

fn can_virtualise(cpu: &str) -> bool {
    cpu.lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_ascii_whitespace().any(|flag| matches!(flag, "vmx" | "svm")))
}

/// Controllers of the hierarchy of version 2, wherever it is mounted.
fn controllers() -> Option<Vec<String>> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let folder = cgroup2_mount(&mounts)?;
    let text = fs::read_to_string(Path::new(folder).join("cgroup.controllers")).ok()?;
    Some(text.split_ascii_whitespace().map(str::to_owned).collect())
}

fn cgroup2_mount(mounts: &str) -> Option<&str> {
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (folder, kind) = (words.nth(1)?, words.next()?);
        (kind == "cgroup2").then_some(folder)
    })
}

async fn nftables() -> (Option<bool>, Option<String>) {
    let Some(nft) = program("nft") else { return (None, None) };
    match said(&nft, &["list", "tables"]).await {
        Ok(_) => (Some(true), None),
        Err(why) => (Some(false), Some(why)),
    }
}

/// Returns true if these iptables rules drop forwarded packets by policy, without an exception for
/// the instances' links.
fn forward_drops(rules: &str) -> bool {
    let accepts = |direction| {
        let link = format!(" {direction} {VETH_PREFIX}+ ");
        let accepts = |line: &str| line.starts_with("-A ") && line.ends_with(" -j ACCEPT");
        rules.lines().any(|line| accepts(line) && line.contains(&link))
    };
    rules.lines().any(|line| line == "-P FORWARD DROP") && !(accepts("-i") && accepts("-o"))
}

/// The rules of iptables, if that program is installed.
async fn forward_chain() -> Option<String> {
    said(&program("iptables")?, &["-S"]).await.ok()
}

/// Chains of nftables that drop instances' packets; `None` if nft reports nothing.
async fn barriers() -> Option<Vec<Barrier>> {
    let text = said(&program("nft")?, &["-j", "-s", "list", "ruleset"]).await.ok()?;
    Some(unpassed(&serde_json::from_str(&text).ok()?))
}

fn unpassed(ruleset: &serde_json::Value) -> Vec<Barrier> {
    let passes = |barrier: &Barrier| {
        barrier.passes(ruleset, Some(forward::LINKS), None)
            && barrier.passes(ruleset, None, Some(forward::LINKS))
    };
    forward::barriers(ruleset, forward::HOST_TABLE).into_iter().filter(|barrier| !passes(barrier)).collect()
}

/// Links of default routes in the kernel's table.
fn uplinks(routes: &str) -> Vec<String> {
    let fields = routes.lines().skip(1).map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    fields.filter(|fields| fields.get(1) == Some(&"00000000")).map(|fields| fields[0].to_owned()).collect()
}

/// The agent's troubles of this host; `None` if no agent has written any.
fn agent_troubles(run_dir: &Path) -> Option<Vec<String>> {
    let text = fs::read_to_string(run_dir.join("trouble")).ok()?;
    Some(text.lines().map(str::to_owned).collect())
}

/// Returns the kernel's clock status, whichever program disciplines the clock.
async fn clock_synchronised() -> Option<bool> {
    let told =
        said(&program("timedatectl")?, &["show", "--property=NTPSynchronized", "--value"]).await.ok()?;
    match told.as_str() {
        "yes" => Some(true),
        "no" => Some(false),
        _ => None,
    }
}

fn free_gib(folder: &Path) -> Option<u64> {
    // It may not be there yet: then what it will be made in.
    let folder = std::path::absolute(folder).ok()?;
    let there = folder.ancestors().find(|folder| folder.exists())?;
    let found = statvfs(there).ok()?;
    Some(found.blocks_available() * found.fragment_size() / (1 << 30))
}

fn memory_mib(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    line.and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok())
        .unwrap_or(0)
        / 1024
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn packages() -> Packages {
    [
        ("apt-get", Packages::Apt),
        ("dnf", Packages::Dnf),
        ("pacman", Packages::Pacman),
        ("zypper", Packages::Zypper),
    ]
    .into_iter()
    .find(|(name, _)| program(name).is_some())
    .map_or(Packages::Unknown, |(_, packages)| packages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_says_is_read_right() {
        assert_eq!(version("6.1.0-40-cloud-amd64"), Some((6, 1)));
        assert_eq!(version("6.18"), Some((6, 18)));
        assert_eq!(version("weird"), None);
        assert_eq!(memory_mib("MemTotal:       24571234 kB\nMemFree: 1 kB\n"), 23995);
        assert_eq!(memory_mib(""), 0);
        assert!(can_virtualise("flags\t\t: fpu vme svm sse\n"));
        assert!(!can_virtualise("flags\t\t: fpu svm_lock\nbugs: vmx\n"));
        let mounts = "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup2_mount(mounts), Some("/sys/fs/cgroup/unified"));
        assert_eq!(cgroup2_mount("cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n"), None);
    }

    #[test]
    fn dockers_drop_counts_until_instances_are_excepted() {
        let docker = "-P INPUT ACCEPT\n-P FORWARD DROP\n-N DOCKER-USER\n";
        assert!(forward_drops(docker));
        assert!(!forward_drops("-P FORWARD ACCEPT\n"));
        let half = format!("{docker}-A DOCKER-USER -i rv+ -o eth0 -j ACCEPT\n");
        assert!(forward_drops(&half));
        assert!(!forward_drops(&format!("{half}-A DOCKER-USER -i eth0 -o rv+ -j ACCEPT\n")));
    }

    #[test]
    fn a_chain_of_nftables_that_drops_is_seen_where_iptables_says_nothing() {
        let chain = serde_json::json!({"chain": {"family": "inet", "table": "filter", "name": "forward",
            "hook": "forward", "policy": "drop"}});
        let found = unpassed(&serde_json::json!({"nftables": [chain]}));
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].to_string(), "chain forward of table inet filter");
        let own = serde_json::json!({"chain": {"family": "inet", "table": forward::HOST_TABLE, "name": "forward",
            "hook": "forward", "policy": "drop"}});
        assert!(unpassed(&serde_json::json!({"nftables": [own]})).is_empty());
    }

    #[test]
    fn default_routes_name_the_uplinks() {
        let routes = "Iface\tDestination\tGateway\neth0\t00000000\t010200C0\ndocker0\t000011AC\t00000000\n";
        assert_eq!(uplinks(routes), ["eth0"]);
    }

    #[tokio::test]
    async fn a_failing_program_says_its_last_line() {
        let sh = program("sh").unwrap();
        assert_eq!(said(&sh, &["-c", "echo yes"]).await.unwrap(), "yes");
        let why = said(&sh, &["-c", "echo one >&2; echo two >&2; exit 3"]).await.unwrap_err();
        assert!(why.ends_with("exit status: 3: two"), "{why}");
    }
}
