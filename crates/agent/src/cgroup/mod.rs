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

mod files;
mod limits;
mod scope;
mod threads;

pub use scope::end as end_scope;

use crate::error::{Error, Result};
use crate::names::Folders;
use files::{CLEARING, enable, field, is_cgroup2, make, read, remove_tree};
use limits::{Limit, limits, same};
use nix::libc;
use roost_types::agent::InstanceSpec;
use roost_types::ids::InstanceId;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use threads::{is_kernel_thread, vcpu_threads};

/// Controllers that instances need.
const CONTROLLERS: [&str; 4] = ["cpu", "cpuset", "memory", "pids"];
/// Leaf of the root for processes that were found in it.
const KEEP: &str = "keep";

/// The cgroups of one host.
#[derive(Debug, Clone)]
pub struct Cgroups {
    root: PathBuf,
    /// Period of `cpu.max`, microseconds.
    period_us: u64,
    /// A folder that only looks like a cgroup (tests on hosts without v2): values are files, and nothing is enforced.
    pretend: bool,
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
            None => scope::root(state)?,
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

    /// With another period of `cpu.max`, 10–1000 ms. A longer one holds guests back more rarely, and for longer at a time.
    #[must_use]
    pub const fn with_period_ms(mut self, milliseconds: u64) -> Self {
        self.period_us = milliseconds * 1000;
        self
    }

    /// Cgroups that were opened before, to look at and to clear away.
    pub const fn at(root: PathBuf) -> Self {
        Self { root, period_us: limits::PERIOD_US, pretend: false }
    }

    /// A folder of plain files, for tests on hosts without cgroup v2. Limits are written and read back, and limit
    /// nothing.
    #[doc(hidden)]
    pub const fn pretend(root: PathBuf) -> Self {
        Self { root, period_us: limits::PERIOD_US, pretend: true }
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

    /// The folder of the cgroup that the instance's processes join; nobody joins a pretended one.
    ///
    /// # Errors
    /// The family's name is unfit.
    pub fn folder(&self, spec: &InstanceSpec, id: &InstanceId) -> Result<Option<PathBuf>> {
        let path = self.path(spec, id)?;
        Ok((!self.pretend).then_some(path))
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
        let (instance, threads) = limits(spec, overhead_mib, self.period_us);
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
        let (instance, threads) = limits(spec, overhead_mib, self.period_us);
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
            let path = self.path(spec, id)?.join("cgroup.procs");
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::ensure;

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
}
