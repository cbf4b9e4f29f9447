//! cgroup v2 (Linux `Documentation/admin-guide/cgroup-v2.rst`): `<root>/<family>/<instance>` with a threaded child
//! `vcpu`.
//!
//! ```text
//! <root>                       cpu cpuset memory pids below it
//! ├── keep                     a process that keeps the root's scope open, where systemd made it
//! └── t3                       a family
//!     └── i-0123…              memory.max, memory.swap.max, memory.oom.group, pids.max, cpu.weight, cpu.max (loose)
//!         ├── (monitor's API and device threads)
//!         └── vcpu             threaded: cpu.max (the type's), the vCPU threads
//! ```
//! Every value is read back. A missing controller or a value that did not take is final: the instance is not started.

use crate::error::{Error, Result};
use crate::names::Folders;
use nix::libc;
use roost_types::agent::InstanceSpec;
use roost_types::ids::InstanceId;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Period of `cpu.max`, microseconds.
pub const PERIOD_US: u64 = 100_000;
/// Controllers that instances need.
const CONTROLLERS: [&str; 4] = ["cpu", "cpuset", "memory", "pids"];
/// CPU beside the vCPUs' that a monitor's device and API threads may take, in milli-CPUs.
const IO_MILLI: u64 = 1000;
/// Threads beside the vCPUs'.
const IO_THREADS: u64 = 16;
/// Leaf of the root for processes that were found in it.
const KEEP: &str = "keep";
/// How long the kernel may take to clear a killed cgroup.
const CLEARING: Duration = Duration::from_secs(10);

/// The cgroups of one host.
#[derive(Debug, Clone)]
pub struct Cgroups {
    root: PathBuf,
    /// A folder that only looks like a cgroup (tests on hosts without v2): values are files, and nothing is enforced.
    pretend: bool,
}

/// One file and what it must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Limit {
    file: &'static str,
    value: String,
}

/// The limits of an instance and of its `vcpu` child: pure.
fn limits(spec: &InstanceSpec, overhead_mib: u64) -> (Vec<Limit>, Vec<Limit>) {
    let limit = |file, value: String| Limit { file, value };
    let quota = |milli: u64| {
        // 1 ms is the least that the kernel takes.
        format!("{} {PERIOD_US}", (milli * PERIOD_US / 1000).max(1000))
    };
    let vcpu = u64::from(spec.cpu.max_milli);
    let memory = (spec.memory_mib + overhead_mib) << 20;
    let instance = vec![
        limit("memory.max", memory.to_string()),
        limit("memory.swap.max", "0".into()),
        limit("memory.oom.group", "1".into()),
        limit("pids.max", (u64::from(spec.cpu.vcpus) + IO_THREADS).to_string()),
        limit("cpu.weight", spec.cpu.weight.to_string()),
        limit("cpu.max", quota(vcpu + IO_MILLI)),
    ];
    (instance, vec![limit("cpu.max", quota(vcpu))])
}

impl Cgroups {
    /// The cgroups below `root`, which is made and given its controllers; without `root` below a systemd scope that
    /// belongs to the state folder, or where there is no systemd below `/sys/fs/cgroup/roost`.
    ///
    /// # Errors
    /// There is no cgroup v2 here, or it lacks a controller.
    pub fn open(root: Option<&Path>, state: &Path) -> Result<Self> {
        let this = Self::at(match root {
            Some(root) => root.to_owned(),
            None => default_root(state)?,
        });
        if !this.root.is_dir() {
            make(&this.root)?;
        }
        this.check_kind()?;
        this.leave_root()?;
        // The parent must pass the controllers down; where it is not ours to change it already does.
        if let Some(parent) = this.root.parent().filter(|parent| is_cgroup2(parent)) {
            enable(parent, &CONTROLLERS)?;
        }
        enable(&this.root, &CONTROLLERS)?;
        Ok(this)
    }

    /// Cgroups that were opened before, to look at and to clear away.
    pub const fn at(root: PathBuf) -> Self {
        Self { root, pretend: false }
    }

    /// A folder of plain files, for tests on hosts without cgroup v2. Limits are written and read back, and limit
    /// nothing.
    #[doc(hidden)]
    pub const fn pretend(root: PathBuf) -> Self {
        Self { root, pretend: true }
    }

    /// The root.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn check_kind(&self) -> Result<()> {
        if is_cgroup2(&self.root) {
            return Ok(());
        }
        Err(Error::Impossible(format!(
            "{} is no cgroup v2 folder; instances need cgroup v2 (boot with systemd.unified_cgroup_hierarchy=1, or \
             point --cgroup-root into a cgroup2 mount)",
            self.root.display()
        )))
    }

    /// A cgroup with processes of its own cannot pass controllers down: what is in the root steps into a leaf.
    fn leave_root(&self) -> Result<()> {
        let procs = self.root.join("cgroup.procs");
        let pids = read(&procs)?;
        if pids.trim().is_empty() {
            return Ok(());
        }
        let leaf = self.root.join(KEEP);
        make(&leaf)?;
        for pid in pids.lines() {
            match fs::write(leaf.join("cgroup.procs"), pid) {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                    return Err(Error::file("move a process to", leaf.join("cgroup.procs"))(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn path(&self, spec: &InstanceSpec, id: &InstanceId) -> Result<PathBuf> {
        let family = &spec.cpu.family;
        let plain = !family.is_empty()
            && family.len() <= 32
            && family.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
        if !plain || family == KEEP {
            return Err(Error::Impossible(format!("the family name {family:?} cannot name a cgroup")));
        }
        Ok(Folders::cgroup(&self.root, family, id))
    }

    /// The file that a process writes itself into to join.
    ///
    /// # Errors
    /// The family's name is unfit.
    pub fn procs(&self, spec: &InstanceSpec, id: &InstanceId) -> Result<PathBuf> {
        Ok(self.path(spec, id)?.join("cgroup.procs"))
    }

    /// Makes the cgroup and its child, sets each limit and reads it back.
    ///
    /// # Errors
    /// A controller is missing or a limit did not take: final, and the text says which.
    pub fn ensure(&self, spec: &InstanceSpec, id: &InstanceId, overhead_mib: u64) -> Result<()> {
        let path = self.path(spec, id)?;
        let vcpu = path.join("vcpu");
        if let Some(family) = path.parent() {
            self.make(family)?;
            if !self.pretend {
                enable(family, &CONTROLLERS)?;
            }
        }
        self.make(&path)?;
        self.make(&vcpu)?;
        if !self.pretend {
            let kind = vcpu.join("cgroup.type");
            if read(&kind)?.trim() != "threaded" {
                fs::write(&kind, "threaded").map_err(Error::file("write", &kind))?;
            }
            // Only threaded controllers may be passed to a threaded child.
            enable(&path, &["cpu", "cpuset"])?;
        }
        let (instance, threads) = limits(spec, overhead_mib);
        for (folder, limits) in [(&path, instance), (&vcpu, threads)] {
            for limit in limits {
                self.set(folder, &limit)?;
            }
        }
        Ok(())
    }

    /// Whether the cgroup has exactly these limits.
    pub fn stands(&self, spec: &InstanceSpec, id: &InstanceId, overhead_mib: u64) -> bool {
        let Ok(path) = self.path(spec, id) else { return false };
        let (instance, threads) = limits(spec, overhead_mib);
        let holds = |folder: &Path, limits: Vec<Limit>| {
            limits.iter().all(|limit| {
                fs::read_to_string(folder.join(limit.file)).is_ok_and(|got| same(&got, &limit.value))
            })
        };
        holds(&path, instance) && holds(&path.join("vcpu"), threads)
    }

    fn make(&self, path: &Path) -> Result<()> {
        if self.pretend { fs::create_dir_all(path).map_err(Error::file("create", path)) } else { make(path) }
    }

    fn set(&self, folder: &Path, limit: &Limit) -> Result<()> {
        let path = folder.join(limit.file);
        if !self.pretend && !path.exists() {
            let controller = limit.file.split('.').next().unwrap_or_default();
            return Err(Error::Impossible(format!(
                "{} has no {}: the cgroup controller {controller:?} is not there (the kernel lacks it, or it is \
                 bound to cgroup v1), so the limit cannot be set",
                folder.display(),
                limit.file
            )));
        }
        let refused = |what: String| {
            Error::Impossible(format!("{} = {:?} was not taken: {what}", path.display(), limit.value))
        };
        fs::write(&path, &limit.value).map_err(|error| refused(error.to_string()))?;
        let got = read(&path)?;
        if same(&got, &limit.value) { Ok(()) } else { Err(refused(format!("it reads {:?}", got.trim()))) }
    }

    /// Puts the vCPU threads of a process into the `vcpu` child and reads back that they are there. Gives how many.
    ///
    /// # Errors
    /// The process is gone, has not all its vCPU threads, or one was not taken.
    pub fn place_vcpus(&self, spec: &InstanceSpec, id: &InstanceId, pid: i32) -> Result<usize> {
        let threads = vcpu_threads(pid)?;
        let wanted = usize::try_from(spec.cpu.vcpus).unwrap_or(usize::MAX);
        if threads.len() != wanted {
            return Err(Error::NotNow(format!("the monitor has {} of {wanted} vCPU threads", threads.len())));
        }
        if self.pretend {
            return Ok(threads.len());
        }
        let file = self.path(spec, id)?.join("vcpu/cgroup.threads");
        for thread in &threads {
            fs::write(&file, thread.to_string()).map_err(Error::file("move a vCPU thread to", &file))?;
        }
        let there = read(&file)?;
        let missing = threads.iter().find(|thread| !there.lines().any(|line| line == thread.to_string()));
        match missing {
            None => Ok(threads.len()),
            Some(thread) => Err(Error::NotNow(format!("vCPU thread {thread} is not in {}", file.display()))),
        }
    }

    /// Every cgroup of the instance, whatever its family was.
    pub fn of(&self, id: &InstanceId) -> Vec<PathBuf> {
        let Ok(families) = fs::read_dir(&self.root) else { return vec![] };
        families
            .flatten()
            .map(|family| family.path().join(id.as_str()))
            .filter(|path| path.is_dir())
            .collect()
    }

    /// Processes of the instance.
    pub fn processes(&self, id: &InstanceId) -> Vec<i32> {
        let files = self.of(id).into_iter().map(|path| path.join("cgroup.procs"));
        let texts: Vec<String> = files.filter_map(|file| fs::read_to_string(file).ok()).collect();
        // A process may be listed more than once when its threads have been moved.
        let pids: BTreeSet<i32> =
            texts.iter().flat_map(|text| text.lines()).filter_map(|line| line.parse().ok()).collect();
        pids.into_iter()
            .filter(|pid| !self.pretend || crate::monitor::start_ticks(*pid).is_some())
            .filter(|pid| !is_kernel_thread(*pid))
            .collect()
    }

    /// Notes a process that was started in the cgroup. The kernel knows; only a pretended cgroup is told.
    ///
    /// # Errors
    /// The folder is gone.
    pub fn started(&self, spec: &InstanceSpec, id: &InstanceId, pid: i32) -> Result<()> {
        if self.pretend {
            let path = self.procs(spec, id)?;
            fs::write(&path, pid.to_string()).map_err(Error::file("write", &path))?;
        }
        Ok(())
    }

    /// Kills every process of the instance and waits until they are gone.
    ///
    /// # Errors
    /// They do not go.
    pub fn kill(&self, id: &InstanceId) -> Result<()> {
        let deadline = Instant::now() + CLEARING;
        for path in self.of(id) {
            if self.pretend {
                self.kill_each(id);
                continue;
            }
            let kill = path.join("cgroup.kill");
            fs::write(&kill, "1").map_err(Error::file("write", &kill))?;
            loop {
                let events = fs::read_to_string(path.join("cgroup.events")).unwrap_or_default();
                if !events.lines().any(|line| line == "populated 1") {
                    break;
                }
                if Instant::now() > deadline {
                    return Err(Error::NotNow(format!("processes in {} do not end", path.display())));
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Ok(())
    }

    fn kill_each(&self, id: &InstanceId) {
        for pid in self.processes(id) {
            let monitor = crate::record::MonitorId {
                pid,
                start_ticks: crate::monitor::start_ticks(pid).unwrap_or_default(),
            };
            crate::monitor::kill(&monitor);
            while crate::monitor::lives(&monitor) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// Removes every cgroup of the instance, and its family's when that is empty.
    ///
    /// # Errors
    /// A process is left in one.
    pub fn remove(&self, id: &InstanceId) -> Result<()> {
        for path in self.of(id) {
            if self.pretend {
                crate::durable::remove_folder(&path)?;
            } else {
                remove_tree(&path)?;
            }
            if let Some(family) = path.parent() {
                // Busy while other instances of the family live.
                let _ = fs::remove_dir(family);
            }
        }
        Ok(())
    }

    /// `usage_usec` of the instance.
    pub fn cpu_usage_us(&self, spec: &InstanceSpec, id: &InstanceId) -> Option<u64> {
        let text = fs::read_to_string(self.path(spec, id).ok()?.join("cpu.stat")).ok()?;
        field(&text, "usage_usec")
    }

    /// Whether the kernel has killed in this cgroup for want of memory.
    pub fn out_of_memory(&self, id: &InstanceId) -> bool {
        self.of(id).iter().any(|path| {
            let text = fs::read_to_string(path.join("memory.events")).unwrap_or_default();
            field(&text, "oom_kill").is_some_and(|count| count > 0)
        })
    }
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

/// Whether a limit reads as it was written. Memory is kept in whole pages, so what was written is too.
fn same(got: &str, wanted: &str) -> bool {
    got.trim() == wanted
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(Error::file("read", path))
}

fn make(path: &Path) -> Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(Error::file("create", path)(error))
        }
        _ => Ok(()),
    }
}

/// Passes controllers down to the children, and reads back that they are.
fn enable(path: &Path, controllers: &[&str]) -> Result<()> {
    let file = path.join("cgroup.subtree_control");
    let has = || read(&file).map(|text| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
    let missing: Vec<&str> = {
        let have = has()?;
        controllers.iter().copied().filter(|name| !have.iter().any(|h| h == name)).collect()
    };
    for name in missing {
        fs::write(&file, format!("+{name}")).map_err(|error| {
            Error::Impossible(format!(
                "the cgroup controller {name:?} cannot be enabled in {}: {error}; available there: {}",
                file.display(),
                fs::read_to_string(path.join("cgroup.controllers")).unwrap_or_default().trim()
            ))
        })?;
    }
    let have = has()?;
    match controllers.iter().find(|name| !have.iter().any(|h| h == *name)) {
        None => Ok(()),
        Some(name) => {
            Err(Error::Impossible(format!("the cgroup controller {name:?} is not in {}", file.display())))
        }
    }
}

fn remove_tree(path: &Path) -> Result<()> {
    if let Ok(children) = fs::read_dir(path) {
        for child in children.flatten().filter(|child| child.path().is_dir()) {
            remove_tree(&child.path())?;
        }
    }
    let deadline = Instant::now() + CLEARING;
    loop {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            // A zombie counts until its parent has seen it.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(Error::file("remove", path)(error)),
        }
    }
}

/// `f_type` of a cgroup2 mount, from linux/magic.h.
fn is_cgroup2(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type == 0x6367_7270)
}

/// Where cgroups are made when nobody says: with systemd in a delegated scope of their own, else a folder at the top.
///
/// The agent's own unit will not do: with instances below it, systemd cannot start the agent there again (a cgroup
/// that passes controllers down takes no process; status 219/CGROUP, seen with systemd 252). A scope is never
/// started again, only found.
fn default_root(state: &Path) -> Result<PathBuf> {
    if !Path::new("/run/systemd/system").is_dir() {
        return Ok(PathBuf::from("/sys/fs/cgroup/roost"));
    }
    let name = scope_name(state);
    if let Some(root) = scope_root(&name) {
        return Ok(root);
    }
    // The scope lives as long as a process in it does: this one holds it open while there are no instances.
    let mut holder = Command::new("systemd-run")
        .args(["--scope", "--quiet", "--collect", "--property=Delegate=yes", "--property=TasksMax=infinity"])
        .arg(format!("--unit={name}"))
        // At shutdown systemd ends the agent first, so that nobody takes the end of the host for the end of a guest.
        .args(own_service().map(|unit| format!("--property=Before={unit}")))
        .args(["--description=Roost instances", "--", "sleep", "infinity"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // It outlives the agent: whoever waits for the end of the agent's output must not wait for it.
        .stderr(Stdio::null())
        .spawn()
        .map_err(Error::io("running systemd-run"))?;
    let deadline = Instant::now() + CLEARING;
    loop {
        if let Some(root) = scope_root(&name) {
            return Ok(root);
        }
        if let Ok(Some(status)) = holder.try_wait() {
            return Err(Error::NotNow(format!("systemd-run could not make {name}: {status}")));
        }
        if Instant::now() > deadline {
            return Err(Error::NotNow(format!("systemd has not made {name}")));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The systemd service that this process runs in.
fn own_service() -> Option<String> {
    let cgroup = fs::read_to_string("/proc/self/cgroup").ok()?;
    let unit = cgroup.lines().find_map(|line| line.strip_prefix("0::"))?.rsplit('/').next()?;
    unit.ends_with(".service").then(|| unit.to_owned())
}

/// One scope per state folder, so that several agents can stand side by side.
fn scope_name(state: &Path) -> String {
    let state = state.canonicalize().unwrap_or_else(|_| state.to_owned());
    format!("roost-instances-{}.scope", &crate::record::hash_of(&state)[..8])
}

fn scope_root(name: &str) -> Option<PathBuf> {
    let output =
        Command::new("systemctl").args(["show", "--property=ControlGroup", "--value", name]).output().ok()?;
    let path = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let root = Path::new("/sys/fs/cgroup").join(path.strip_prefix('/').filter(|path| !path.is_empty())?);
    root.is_dir().then_some(root)
}

/// Ends the scope of a state folder, with everything in it.
pub fn end_scope(state: &Path) {
    if Path::new("/run/systemd/system").is_dir() {
        // Not loaded when the agent never made one.
        let _ = Command::new("systemctl").args(["stop", &scope_name(state)]).stderr(Stdio::null()).status();
    }
}

/// KVM's helpers (`kvm-nx-lpage-recovery`) stand in their machine's cgroup and go with it. Field 4 of
/// `/proc/<pid>/stat` is the parent: kthreadd has number 2.
fn is_kernel_thread(pid: i32) -> bool {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    text.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(1)) == Some("2")
}

/// Thread ids of a process whose names are `vcpu` and a number.
fn vcpu_threads(pid: i32) -> Result<Vec<i32>> {
    let folder = PathBuf::from(format!("/proc/{pid}/task"));
    let mut threads = Vec::new();
    for entry in fs::read_dir(&folder).map_err(Error::file("list", &folder))?.flatten() {
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let number = name
            .trim()
            .strip_prefix("vcpu")
            .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
        if let (true, Some(thread)) = (number, entry.file_name().to_str().and_then(|text| text.parse().ok()))
        {
            threads.push(thread);
        }
    }
    Ok(threads)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::ensure;

    #[test]
    fn limits_follow_from_the_spec() {
        let mut spec = ensure(1).spec;
        spec.cpu.max_milli = 250;
        let (instance, vcpu) = limits(&spec, 64);
        assert_eq!(vcpu, [Limit { file: "cpu.max", value: "25000 100000".into() }]);
        assert!(instance.contains(&Limit { file: "memory.max", value: (192 << 20).to_string() }));
        assert!(instance.contains(&Limit { file: "memory.swap.max", value: "0".into() }));
        assert!(instance.contains(&Limit { file: "cpu.max", value: "125000 100000".into() }));
        spec.cpu.max_milli = 1;
        assert_eq!(limits(&spec, 0).1[0].value, "1000 100000", "the kernel's least");
    }

    #[test]
    fn a_pretended_cgroup_is_made_found_and_removed_with_its_family() {
        let folder = tempfile::tempdir().unwrap();
        let cgroups = Cgroups::pretend(folder.path().into());
        let ensure = ensure(1);
        let (id, spec) = (&ensure.instance_id, &ensure.spec);
        assert!(!cgroups.stands(spec, id, 64));
        cgroups.ensure(spec, id, 64).unwrap();
        assert!(cgroups.stands(spec, id, 64));
        assert!(!cgroups.stands(spec, id, 65), "another limit does not stand");
        assert_eq!(cgroups.of(id).len(), 1);
        cgroups.remove(id).unwrap();
        assert!(cgroups.of(id).is_empty());
        assert!(!folder.path().join("t3").exists());
    }

    #[test]
    fn a_family_cannot_leave_its_folder() {
        let cgroups = Cgroups::pretend("/nowhere".into());
        for family in ["", "..", "a/b", KEEP] {
            let mut ensure = ensure(1);
            ensure.spec.cpu.family = family.into();
            let error = cgroups.ensure(&ensure.spec, &ensure.instance_id, 0).unwrap_err();
            assert!(error.is_permanent(), "{family:?}: {error}");
        }
    }

    #[test]
    fn a_folder_that_is_no_cgroup_is_refused_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let error = Cgroups::open(Some(folder.path()), folder.path()).unwrap_err().to_string();
        assert!(error.contains("no cgroup v2 folder") && error.contains("--cgroup-root"), "{error}");
    }

    #[test]
    fn vcpu_threads_are_told_by_their_names() {
        let threads: Vec<_> = ["vcpu0", "vcpu12", "vcpux", "device"]
            .iter()
            .map(|name| {
                let (ready, is_ready) = std::sync::mpsc::channel();
                let (hold, held) = std::sync::mpsc::channel::<()>();
                let thread = std::thread::Builder::new().name((*name).into());
                let thread = thread.spawn(move || {
                    ready.send(()).unwrap();
                    let _ = held.recv();
                });
                is_ready.recv().unwrap();
                (thread.unwrap(), hold)
            })
            .collect();
        let pid = i32::try_from(std::process::id()).unwrap();
        assert_eq!(vcpu_threads(pid).unwrap().len(), 2);
        for (thread, hold) in threads {
            drop(hold);
            thread.join().unwrap();
        }
    }
}
