//! The root that is taken when nobody names one: a systemd scope of the state folder's own
//! (`docs/decisions/0010-instances-in-a-scope.md`), or a folder at the top where there is no systemd.

use super::files::CLEARING;
use crate::error::{Error, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Where cgroups are made when nobody says: with systemd in a delegated scope of their own, else a folder at the top.
///
/// The agent's own unit will not do: with instances below it, systemd cannot start the agent there again (a cgroup
/// that passes controllers down takes no process; status 219/CGROUP, seen with systemd 252). A scope is never
/// started again, only found.
pub fn root(state: &Path) -> Result<PathBuf> {
    if !Path::new("/run/systemd/system").is_dir() {
        return Ok(PathBuf::from("/sys/fs/cgroup/roost"));
    }
    let unit = name(state);
    if let Some(root) = find(&unit) {
        return Ok(root);
    }
    // The scope lives as long as a process in it does: this one holds it open while there are no instances.
    let mut holder = Command::new("systemd-run")
        .args(["--scope", "--quiet", "--collect", "--property=Delegate=yes", "--property=TasksMax=infinity"])
        .arg(format!("--unit={unit}"))
        // At shutdown systemd ends the agent first, so that nobody takes the end of the host for the end of a guest.
        .args(own_service().map(|own| format!("--property=Before={own}")))
        .args(["--description=Roost instances", "--", "sleep", "infinity"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // It outlives the agent: whoever waits for the end of the agent's output must not wait for it.
        .stderr(Stdio::null())
        .spawn()
        .map_err(Error::io("running systemd-run"))?;
    let deadline = Instant::now() + CLEARING;
    loop {
        if let Some(root) = find(&unit) {
            return Ok(root);
        }
        if let Ok(Some(status)) = holder.try_wait() {
            return Err(Error::NotNow(format!("systemd-run could not make {unit}: {status}")));
        }
        if Instant::now() > deadline {
            return Err(Error::NotNow(format!("systemd has not made {unit}")));
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
fn name(state: &Path) -> String {
    let state = state.canonicalize().unwrap_or_else(|_| state.to_owned());
    format!("roost-instances-{}.scope", &crate::record::hash_of(&state)[..8])
}

/// The cgroup of a scope that is there.
fn find(name: &str) -> Option<PathBuf> {
    let output =
        Command::new("systemctl").args(["show", "--property=ControlGroup", "--value", name]).output().ok()?;
    let path = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let root = Path::new("/sys/fs/cgroup").join(path.strip_prefix('/').filter(|path| !path.is_empty())?);
    root.is_dir().then_some(root)
}

/// Ends the scope of a state folder, with everything in it.
pub fn end(state: &Path) {
    if Path::new("/run/systemd/system").is_dir() {
        // Not loaded when the agent never made one.
        let _ = Command::new("systemctl").args(["stop", &name(state)]).stderr(Stdio::null()).status();
    }
}
